"""The page in a real browser: from disk, by pointer, by keyboard, in the dark; and the widget."""

import base64
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from explorations import over_photo, synthetic
from PIL import Image

from clva_lens.lens.explorer import packing
from clva_lens.lens.explorer.packing import MOST_LIVE, heads_of, pack
from clva_lens.lens.explorer.page import module, style

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FOUND = next((path for path in map(shutil.which, BROWSERS) if path), None)
pytestmark = [
    pytest.mark.skipif(
        FOUND is None, reason=f"none of {', '.join(BROWSERS)} is there; un-skip with a browser"
    ),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="un-skip with playwright")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=FOUND, args=["--no-sandbox"])
        yield found
        found.close()


class Visit:
    """A page that was opened from disk, and everything that it said or asked for."""

    def __init__(self, browser, path, viewport=WIDE, **options):
        self.said, self.asked, self.path = [], [], path
        self.page = browser.new_context(viewport=viewport, **options).new_page()
        self.page.on("console", self.hear)
        self.page.on("pageerror", lambda one: self.said.append(str(one)))
        self.page.on("dialog", lambda one: (self.said.append(one.message), one.dismiss()))
        self.page.on("request", lambda one: self.asked.append(one.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]", state="attached")

    def hear(self, message):
        """Keep what the page says; but for advice about the test's own reading of pixels."""
        if "willReadFrequently" not in message.text:
            self.said.append(f"{message.type}: {message.text}")

    def pixels(self, figure=0):
        """The canvas of a map: [patch, colour and opacity]."""
        script = """(at) => { const one = document.querySelectorAll("canvas.heat")[at];
            return [...one.getContext("2d").getImageData(0, 0, one.width, one.height).data]; }"""
        return np.array(self.page.evaluate(script, figure)).reshape(-1, 4)

    def quiet(self):
        """Whether nothing was said, and nothing asked for but the page and what is in it."""
        others = [url for url in self.asked if not url.startswith(("data:", "blob:"))]
        return self.said == [] and others == [self.path.as_uri()]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.page.context.close()


@pytest.fixture(scope="module")
def told():
    return synthetic(layers=5, heads=4, words=4, grid=(6, 6))


@pytest.fixture(scope="module")
def path(told, tmp_path_factory):
    return told.to_html(tmp_path_factory.mktemp("explorer") / "page.html")


def assert_shown(visit, before, after):
    """The three canvases are the arrays: before, after and difference, on one scale."""
    both = np.sort(np.concatenate([before.ravel(), after.ravel()]))
    top = both[int(0.99 * (len(both) - 1))]
    largest = 0
    for figure, values in enumerate((before, after, after - before)):
        pixels = visit.pixels(figure)
        wanted = np.array([over_photo(value, top) for value in values.ravel()])
        # Canvases keep colours times opacity in 8 bits, so faint colours are rough; codes are 255.
        rough = 4 + 300 / wanted[:, 3:].clip(1)
        loose = np.abs(values.ravel()) < 0.02 * top  # its sign may be lost in the codes
        assert (np.abs(pixels - wanted)[~loose] <= rough[~loose]).all(), figure
        largest = max(largest, pixels[:, 3].max())
    assert largest > 250


def layer_shown(page):
    return int(page.locator(".controls output").first.inner_text())


def test_from_disk_by_pointer(browser, told, path):
    with Visit(browser, path) as visit:
        page = visit.page
        assert visit.quiet(), (visit.said, visit.asked)
        layer = layer_shown(page)
        assert_shown(visit, *(told.map(0, layer, look=look) for look in (0, 1)))
        page.locator(".chip").nth(1).hover()
        second = [told.map(1, layer, look=look) for look in (0, 1)]
        assert_shown(visit, *second)
        box = page.locator(".frame").first.bounding_box()
        page.mouse.move(box["x"] + box["width"] * 2.5 / 6, box["y"] + box["height"] * 4.5 / 6)
        said = page.locator(".status").inner_text()
        assert said.startswith("row 5, column 3:")
        value = float(re.search(r": (\.\d+)", said)[1])
        assert value == pytest.approx(second[0][4, 2], abs=2e-4)
        times = float(re.search(r"\(([\d.]+)× uniform", said)[1])
        assert times == pytest.approx(second[0][4, 2] / second[0].mean(), rel=0.05, abs=0.06)
        cells = page.locator(".cells [role=gridcell]")
        cells.nth(4 * 2 + 3).click()
        assert_shown(visit, *(told.map(1, heads=[(2, 3)], look=look) for look in (0, 1)))
        cells.nth(4 * 4 + 1).click(modifiers=["Shift"])
        pair = [(2, 3), (4, 1)]
        assert_shown(visit, *(told.map(1, heads=pair, look=look) for look in (0, 1)))
        page.locator(".strip button").nth(1).click()
        page.select_option(".controls select >> nth=0", "sensitive")
        assert_shown(visit, *(told.map(1, 1, "sensitive", look) for look in (0, 1)))
        assert visit.quiet(), (visit.said, visit.asked)


def said_number(value, digits=2):
    """A number as the page writes it, with its sign: no 0 before the point, and a real minus."""
    text = f"{value:+.{digits}f}".replace("+0.", "+.").replace("-0.", "−.").replace("-", "−")
    return text if re.search(r"[1-9]", text) else text.lstrip("+−")


def test_what_stands_around_the_maps(browser, told, path):
    with Visit(browser, path) as visit:
        page = visit.page
        assert page.evaluate("document.documentElement.scrollHeight") <= 800  # one screen
        maps = page.locator("canvas.heat")
        for box, wanted in ((False, "pixelated"), (True, "auto")):
            page.get_by_label("smooth").set_checked(box)
            assert maps.first.evaluate("(one) => getComputedStyle(one).imageRendering") == wanted
        page.get_by_label("opacity").fill("0.35")
        assert maps.nth(2).evaluate("(one) => getComputedStyle(one).opacity") == "0.35"
        around = page.locator(".outline path:not(.halo)")
        assert around.first.get_attribute("d").count("M") == 2 * (6 + 2)  # the two columns' border
        page.select_option("label:has-text('outline') select", "")
        assert around.first.get_attribute("d") == ""
        layer = layer_shown(page)
        under = [one.inner_text().split("\n") for one in page.locator(".maps dl").all()]
        for look, rows in ((0, under[0]), (1, under[1]), ("difference", under[2])):
            read = [
                values[1] - values[0] if look == "difference" else values[look]
                for values in (told.margins[:, 0, 0], told.margins[:, 1, 0], told.knocked[:, layer])
            ]
            margin, blind, one_blind = map(said_number, read)
            assert f"{margin}, blind {blind}" in rows and one_blind in rows
        chart = page.locator(".chart svg").nth(1)
        place = chart.bounding_box()
        page.mouse.move(place["x"] + place["width"] / 2, place["y"] + 40)
        page.mouse.down()
        page.mouse.move(place["x"] + place["width"] - 3, place["y"] + 40, steps=4)
        page.mouse.up()
        assert layer_shown(page) == 4
        drift = told.curves[:, 2, 4]
        assert said_number(drift[1]).lstrip("+") in page.locator(".chart b").nth(1).inner_text()
        lens = page.locator(".lens").inner_text()
        assert "after layer 4" in lens and "“cat”" in lens
        assert said_number(told.lens[1, 4, 1]).lstrip("+") in lens
        page.locator(".cells [role=gridcell]").nth(4 * 2 + 3).click()
        page.get_by_role("button", name="Copy as Python").click()
        code = page.locator("dialog pre").text_content().split("\n")
        (call,) = (line for line in code if line.startswith("told.map("))
        after = eval(call, {"told": told})
        assert np.array_equal(after, told.map(0, heads=[(2, 3)], look=1))
        page.keyboard.press("Escape")
        assert visit.pixels(1)[:, 3].argmax() == after.argmax()
        assert visit.quiet(), visit.said


def test_by_keyboard_alone(browser, told, path):
    with Visit(browser, path, reduced_motion="reduce") as visit:
        page, keys = visit.page, visit.page.keyboard
        focused = "document.activeElement.className + document.activeElement.textContent"

        def tab_to(wanted, most=30):
            for _ in range(most):
                keys.press("Tab")
                if page.evaluate("(one) => document.activeElement.matches(one)", wanted):
                    return
            raise AssertionError(f"{wanted} is not reached: {page.evaluate(focused)}")

        tab_to(".tools button")
        keys.press("Enter")
        rows = page.locator("dialog tbody tr")
        assert rows.count() == 4 and rows.nth(1).inner_text().startswith("word1")
        keys.press("Escape")
        tab_to(".chip")
        keys.press("ArrowRight")
        assert page.locator(".chip[aria-pressed=true] .word").inner_text() == "word1"
        layer = layer_shown(page)
        tab_to(".frame")
        start = page.evaluate("document.activeElement.ariaLabel")
        assert "as “word1” is written" in start and "of the attention lies on" in start
        keys.press("ArrowRight")
        assert page.locator(".status").inner_text().startswith("row 4, column 5:")
        tab_to(".strip button")
        keys.press("ArrowRight")
        assert layer_shown(page) == layer + 1
        tab_to(".cells button")
        keys.press("ArrowDown")
        keys.press("ArrowRight")
        assert "layer 1, head 0" in page.evaluate("document.activeElement.ariaLabel")
        keys.press("Enter")
        assert_shown(visit, *(told.map(1, heads=[(1, 0)], look=look) for look in (0, 1)))
        stops = page.locator("[tabindex='0'], select, input, dialog:not([open]) button").count()
        assert stops < 30  # one for each group of buttons
        assert visit.quiet(), visit.said


def test_texts_of_others_stay_text(browser, tmp_path):
    bad = "</script><img src=x onerror=\"alert('1')\"><b>&amp; " + "w" * 400
    names = ("no method", bad)
    hostile = replace(synthetic(), question=bad, names=names, answers=(bad,) * 2, words=(bad,) * 3)
    path = hostile.to_html(tmp_path / "hostile.html")
    with Visit(browser, path, NARROW) as visit:
        page = visit.page
        assert page.locator("h1").text_content() == bad
        assert page.locator(".chip .word").first.text_content() == bad
        assert page.locator("img[onerror], .cx b b").count() == 0
        page.get_by_role("button", name="Tables").click()
        assert page.locator("dialog tbody th").first.text_content() == bad
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Copy as Python").click()
        assert json.dumps(bad) in page.locator("dialog pre").text_content()
        page.keyboard.press("Escape")
        with page.expect_download() as saved:
            page.get_by_role("button", name="SVG").click()
        drawn = saved.value.path().read_text(encoding="utf-8")
        assert "&lt;img" in drawn and "<img" not in drawn
        width = "[document.documentElement.scrollWidth, innerWidth]"
        assert page.evaluate(width) == [390, 390]
        assert visit.quiet(), (visit.said, visit.asked)


def test_the_picture_that_is_saved_is_the_view(browser, path):
    with Visit(browser, path) as visit:
        with visit.page.expect_download() as saved:
            visit.page.get_by_role("button", name="PNG").click()
        assert saved.value.path().read_bytes().startswith(b"\x89PNG")
        assert saved.value.path().stat().st_size > 10_000
        assert visit.quiet(), visit.said


@pytest.mark.parametrize("smooth", [False, True])
def test_the_picture_is_smooth_where_the_view_is(browser, told, tmp_path, smooth):
    """Between the middles of two patches: one of their colours, or the mean of both."""
    flat = replace(told, photo=np.full((60, 60, 3), 120, np.uint8), outlines={})
    with Visit(browser, flat.to_html(tmp_path / "flat.html")) as visit:
        if smooth:
            visit.page.get_by_label("smooth").check()
        with visit.page.expect_download() as saved:
            visit.page.get_by_role("button", name="PNG").click()
        drawn = np.asarray(Image.open(saved.value.path()).convert("RGB")).astype(float)
        assert visit.quiet(), visit.said
    middles = [100 * place + 50 for place in range(6)]  # of the first map, in a picture twice 300
    panel = drawn[104:704, 32:632]
    rows = panel[middles]
    left, right = rows[:, middles[:-1]], rows[:, middles[1:]]
    steps = np.abs(right - left).max(axis=-1)
    for share in (0.2, 0.8):
        between = rows[:, [round(one + 100 * share) for one in middles[:-1]]]
        wanted = left + share * (right - left) if smooth else (left if share < 0.5 else right)
        error = np.abs(between - wanted).max()
        print(f"smooth {smooth}, {share}: {error:.1f} of steps to {steps.max():.0f}")
        assert error < 0.1 * steps.max() and steps.max() > 40


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_serious_stands_in_the_way(browser, path, scheme):
    """axe-core's rules, of contrast too; and the page is light or dark as it was asked to be."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="un-skip with axe")
    with Visit(browser, path, color_scheme=scheme, bypass_csp=True) as visit:
        found = axe.Axe().run(visit.page).response["violations"]
        wrong = [
            (one["id"], node["target"], node.get("failureSummary"))
            for one in found
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"][:3]
        ]
        assert wrong == []
        paper = visit.page.evaluate(
            "getComputedStyle(document.querySelector('.cx')).backgroundColor"
        )
        light = np.mean([int(one) for one in re.findall(r"\d+", paper)[:3]])
        assert light > 200 if scheme == "light" else light < 60


def test_two_prompts_have_linked_cursors(browser, told, tmp_path):
    other = synthetic(layers=5, heads=4, words=4, grid=(6, 6), seed=1)
    with Visit(browser, told.to_html(tmp_path / "two.html", beside=other)) as visit:
        page = visit.page
        assert page.locator(".cx").count() == 2
        page.locator(".chip").nth(2).hover()
        pressed = page.locator(".chip[aria-pressed=true] .word").all_inner_texts()
        assert pressed == ["word2", "word2"]
        page.locator(".frame").first.hover()
        assert page.locator(".cross:visible").count() == 6
        layer = layer_shown(page)
        both = [one.map(2, layer, look=0) for one in (told, other)]
        opacity = [visit.pixels(figure)[:, 3].argmax() for figure in (0, 3)]
        assert opacity == [one.argmax() for one in both] and visit.quiet()


WIDGET = """async ([source, style, said, data]) => {
    document.head.append(Object.assign(document.createElement("style"), {textContent: style}));
    const url = URL.createObjectURL(new Blob([source], {type: "text/javascript"}));
    const {default: door} = await import(url);
    const codes = (text) => Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
    const bytes = (text) => new DataView(codes(text).buffer);
    window.sent = [];
    const model = {
        get: (name) => name === "said" ? said : data.map(bytes),
        send: (message) => window.sent.push(message),
        on: (_, take) => { window.take = (message, text) => take(message, [bytes(text)]); },
        off: () => { window.gone = true; },
    };
    document.body.innerHTML = "<div data-jp-theme-light=false><div id=cell></div></div>";
    window.leave = await door.render({model, el: document.getElementById("cell")});
}"""


def test_the_widget_asks_the_kernel_for_a_head(browser, monkeypatch):
    """With a model as anywidget hands it over; the page has the first word's heads only."""
    monkeypatch.setattr(packing, "_PLANS", ((255, False),))
    monkeypatch.setattr(packing, "STRONGEST", 1)
    told = synthetic(layers=5, heads=4, words=4, grid=(6, 6))
    packed = pack(told, MOST_LIVE)
    page = browser.new_context(viewport=WIDE).new_page()
    errors = []
    page.on("pageerror", lambda one: errors.append(str(one)))
    page.goto("about:blank")
    data = base64.b64encode(packed.data).decode()
    page.evaluate(WIDGET, [module(), style(), [packed.said], [data]])
    page.locator(".chip").nth(3).click()
    absent = next(place for place in np.ndindex(5, 4) if place not in told.strongest(3, 1))
    page.locator(".cells [role=gridcell]").nth(absent[0] * 4 + absent[1]).click()
    assert "Asking the kernel" in page.locator(".missing").inner_text()
    (asked,) = page.evaluate("sent")
    assert asked == {"which": 0, "word": 3, "heads": [list(absent)]}
    raw = base64.b64encode(heads_of(told, asked["word"], asked["heads"])).decode()
    page.evaluate("([message, text]) => take(message, text)", [asked, raw])
    visit = Visit.__new__(Visit)
    visit.page = page
    assert_shown(visit, *(told.map(3, heads=[absent], look=look) for look in (0, 1)))
    assert page.locator("#cell").get_attribute("data-theme") == "dark"
    page.evaluate("leave()")
    assert page.evaluate("gone") and errors == []
    page.context.close()
