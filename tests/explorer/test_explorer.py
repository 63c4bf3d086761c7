"""Arrays of the explorer: what is read, kept in one file, and packed for a page."""

import ast
import base64
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pages
import pytest
import torch
import traitlets
from explorations import synthetic
from PIL import Image
from typer.testing import CliRunner

import clva_lens as cl
from clva_lens.__main__ import app
from clva_lens.ground.errors import ParameterError, PromptError
from clva_lens.lens.explorer import widget
from clva_lens.lens.explorer.exploration import Exploration
from clva_lens.lens.explorer.gallery import method_of
from clva_lens.lens.explorer.packing import MOST_BYTES, coded, decoded, heads_of, pack
from clva_lens.lens.explorer.page import module, style
from clva_lens.lens.provenance import identity
from clva_lens.toy.scenes import render, sample_scenes

SCENE = sample_scenes(3, seed=7)[0]
KIND = max(SCENE.kinds, key=lambda kind: SCENE.patches(kind).sum())
OBJECT = torch.as_tensor(np.asarray(SCENE.patches(KIND))).flatten().bool()


@pytest.fixture(scope="module")
def model():
    return pages.load("toy-llava")


@pytest.fixture(scope="module")
def asked(model):
    return model.prompt(render(SCENE), f"is there a {KIND} in the image?")


@pytest.fixture(scope="module")
def told(model, asked):
    methods = [cl.CLVA(alpha=0, beta=0), cl.CLVA()]  # the first changes nothing
    return cl.explore(model, asked, methods, objects=OBJECT, progress=False)


def test_what_is_read_is_what_other_functions_read(model, asked, told):
    answers = [cl.generate(model, asked, one) for one in (None, cl.CLVA(), cl.KnockOut(layers=()))]
    assert told.answers[0] == answers[0].texts[0] and told.answers[2] == answers[1].texts[0]
    assert told.margins[0, 0, 0] == pytest.approx(answers[0].margins[0], abs=1e-4)
    assert told.margins[2, 0, 0] == pytest.approx(answers[1].margins[0], abs=1e-4)
    blind = cl.generate(model, asked, cl.KnockOut(layers=range(12))).margins[0]
    assert told.margins[0, 1, 0] == pytest.approx(blind, abs=1e-4)
    print("margin:", told.margins[0, 0, 0], "blind:", blind)
    assert abs(told.margins[0, 0, 0] - blind) > 1
    for look, method in ((0, None), (2, cl.CLVA())):
        trace = cl.trace_attention(model, asked, method)
        for kind in ("all", "sensitive", "insensitive"):
            wanted = trace.saliency(kind)[6].reshape(8, 8)
            assert np.allclose(told.map(layer=6, heads=kind, look=look), wanted, atol=1e-6)
        without = cl.compose(method, cl.KnockOut(layers=(6,)))
        margin = cl.generate(model, asked, without).margins[0]
        assert told.knocked[look, 6] == pytest.approx(margin, abs=1e-4)
    assert told.outlines["object"].tolist() == OBJECT.tolist()
    assert {"positive anchor", "negative anchor"} <= set(told.outlines)


def test_a_method_that_changes_nothing_gains_nothing(told):
    pairs = (told.maps, told.mass, told.probabilities, told.margins, told.knocked, told.curves)
    assert all(np.array_equal(one[0], one[1], equal_nan=True) for one in pairs)
    moved = np.abs(told.maps[2] - told.maps[0]).max()
    print("largest change under CLVA:", moved)
    assert moved > 0.01 and told.names == ("no method", "cl.CLVA(alpha=0, beta=0)", "cl.CLVA()")


def test_words_of_a_caption_are_read_as_they_were_written(model):
    prompt = model.prompt(render(SCENE), "describe the image.")
    told = cl.explore(model, prompt, "clva", knock_outs=False, max_new_tokens=6, progress=False)
    greedy = cl.Greedy(max_new_tokens=6)
    plain = cl.caption_attention(model, prompt, decoding=greedy)
    assert told.words == tuple(word.text for word in plain.words) and len(told.words) > 3
    assert np.allclose(told.maps[0], plain.maps.reshape(told.maps[0].shape), atol=1e-6)
    assert np.allclose(told.probabilities[0, 0], plain.probabilities, atol=1e-5)
    edited = cl.caption_attention(model, prompt, "clva", greedy)
    assert edited.text == plain.text  # so that what CLVA wrote can be compared with what it read
    assert np.allclose(told.maps[1], edited.maps.reshape(told.maps[1].shape), atol=1e-6)
    assert np.abs(told.maps[1] - told.maps[0]).max() > 0.01
    assert np.isnan(told.knocked).all()


def test_where_a_qformer_reads_the_picture_all_words_share_its_maps():
    blip = pages.load("toy-instructblip")
    question = f"is there a {KIND} in the image?"
    told = cl.explore(blip, (render(SCENE), question), "clva", knock_outs=False, progress=False)
    trace = cl.trace_attention(blip, (render(SCENE), question))
    assert told.maps.shape[3] == 1
    assert np.allclose(told.map(layer=told.layers[-1]).ravel(), trace.saliency()[-1], atol=1e-6)


def test_what_cannot_be_explored_is_refused(model, asked, told):
    with pytest.raises(ParameterError, match="OPERA searches for its answer"):
        cl.explore(model, asked, cl.OPERA(), progress=False)
    with pytest.raises(PromptError, match=r"Pass prompt\.row\(index\)"):
        cl.explore(model, model.prompt([render(SCENE)] * 2, ["a cup?"] * 2))
    with pytest.raises(ParameterError, match="64 image tokens"):
        cl.explore(model, asked, knock_outs=False, objects=OBJECT[:9], progress=False)
    for wrong in ({"word": 3}, {"layer": 99}, {"heads": "best"}, {"look": -1}):
        with pytest.raises(ParameterError, match=r"there (is|are) no"):
            told.map(**wrong)


def test_the_record_tells_edited_weights_from_those_that_were_loaded(model, asked, told):
    """By the digest that a run's record has."""
    assert told.record["weights"] == identity(model)["weights"]
    head = model.hf_model.lm_head.weight
    kept = head.detach().clone()
    with torch.no_grad():
        head[0, 0] += 1.0
    try:
        other = cl.explore(model, asked, knock_outs=False, max_new_tokens=1, progress=False)
    finally:
        with torch.no_grad():
            head.copy_(kept)
    ours = {name for name in told.record if told.record[name] != other.record.get(name)}
    assert ours == {"weights", "methods", "decoding"}


def test_arrays_come_back_from_their_file(told, tmp_path):
    again = Exploration.load(told.save(tmp_path / "one.npz"))
    assert repr(again) == repr(told) and again.record == json.loads(json.dumps(told.record))
    for name, array in told._arrays().items():
        assert np.array_equal(getattr(again, name), array, equal_nan=True), name
        with pytest.raises(ValueError, match="read-only"):
            getattr(again, name)[...] = 0
    assert all(np.array_equal(again.outlines[n], one) for n, one in told.outlines.items())
    assert again.words == told.words and again.lens_words == told.lens_words
    assert pack(again) == pack(told) and list(tmp_path.iterdir()) == [tmp_path / "one.npz"]
    (tmp_path / "broken.npz").write_bytes(b"no archive")
    for wrong, said in ((tmp_path / "broken.npz", "no exploration"), ("x.txt", r"end in \.npz")):
        with pytest.raises(ParameterError, match=said):
            Exploration.load(wrong)


def test_codes_stand_for_values_to_within_half_a_step():
    maps = synthetic().maps[0]
    for levels in (255, 45):
        back = decoded(*coded(maps, levels), levels)
        root = np.sqrt(maps / maps.max(axis=-1, keepdims=True))
        error = np.abs(np.sqrt(back / maps.max(axis=-1, keepdims=True)) - root).max()
        assert 0 < error <= 0.5 / levels + 1e-6
    assert not decoded(*coded(np.zeros((2, 4)), 255), 255).any()


def section(packed, name):
    """An array of a packed exploration, as a browser reads it."""
    raw = gzip.decompress(packed.data)
    (found,) = (one for one in packed.said["sections"] if one[0] == name)
    _, kind, shape, start = found
    dtype = {"u8": "u1", "u32": "<u4", "f32": "<f4"}[kind]
    assert start % 4 == 0
    return np.frombuffer(raw, dtype, int(np.prod(shape)), start).reshape(shape)


def test_what_is_packed_are_means_classes_and_single_heads():
    told = synthetic(words=4)
    packed = pack(told)
    assert packed.said["every"] and packed.said["levels"] == 255
    for kind, look, layer in (("all", 0, 1), ("sensitive", 1, 2), ("insensitive", 0, 3)):
        values = decoded(section(packed, kind), section(packed, f"{kind}.scale"), 255)
        wanted = told.map(2, layer, kind, look).ravel()
        assert np.allclose(values[look, layer, 2], wanted, atol=wanted.max() / 250)
    keys = section(packed, "heads.key")
    assert keys.tolist() == list(range(4 * 4 * 3))  # word, layer, head
    values = decoded(section(packed, "heads"), section(packed, "heads.scale"), 255)
    head = told.map(3, heads=[(2, 1)], look=1).ravel()
    assert np.allclose(values[1, (3 * 4 + 2) * 3 + 1], head, atol=head.max() / 250)
    live = np.frombuffer(heads_of(told, 3, [[2, 1]]), "<f4").reshape(1, 2, -1)
    assert np.allclose(live[0, 1], head)


def test_a_seven_billion_model_stays_small(tmp_path):
    """32 × 32 heads, 576 patches, 20 words, two looks; random maps are the worst to pack."""
    told = synthetic(layers=32, heads=32, words=20, grid=(24, 24))
    path = told.to_html(tmp_path / "large.html")
    document = json.loads(re.search(r'data">(.*?)</script>', path.read_text())[1])["explorations"]
    kept = {name: shape for name, _, shape, _ in document[0]["sections"]}
    print("bytes:", path.stat().st_size, "steps:", document[0]["levels"])
    assert 1_000_000 < path.stat().st_size <= MOST_BYTES
    assert kept["heads"] == [2, 1024 + 19 * 16, 576] and kept["sensitive"] == [2, 32, 20, 576]


def test_a_page_asks_for_nothing_and_no_text_is_markup(tmp_path):
    hostile = '</script><img src=x onerror="alert(1)"><!-- \' & ' + "w" * 300
    told = replace(synthetic(), question=hostile, words=(hostile,) * 3, answers=(hostile,) * 2)
    text = told.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("</script>") == 2 and "<img" not in text.replace(module(), "")
    scripts = re.findall(r"<script type=\"module\">(.*?)</script>", text, re.DOTALL)
    assert scripts == [module()]
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', text)[1]
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    links = set(re.findall(r"https?://[^\"'\s)]+", module() + style()))
    assert links == {"http://www.w3.org/2000/svg"}  # a name, which nothing is loaded from
    assert "</script" not in module() and "</style" not in style()
    with pytest.raises(ParameterError, match=r"end in \.html"):
        told.to_html(tmp_path / "page.pdf")


def test_the_module_is_small_and_plain():
    assert len(module().encode()) <= 40_000
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", module()
    )
    assert not re.search(r"^import |\bfetch\(|XMLHttpRequest|WebSocket", module(), re.MULTILINE)


def test_two_are_linked_only_where_their_cursors_mean_the_same():
    one = synthetic()
    assert one._with(None) == [one] and len(one._with(synthetic(seed=1))) == 2
    with pytest.raises(ParameterError, match="Explore both prompts with one model"):
        one._with(synthetic(layers=5))


def test_functions_without_a_page():
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node; un-skip where one is installed")
    packed = pack(synthetic())
    given = {"module": module(), **packed.document}
    command = [node, "--test", str(Path(__file__).with_name("pure.test.mjs"))]
    given_path = {"EXPLORATION": json.dumps(given)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PATH": "", **given_path}
    )
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"# pass [5-9]", done.stdout)


class StandIn(traitlets.HasTraits):
    """What of anywidget's class is used, where that is not installed: its fields and messages."""

    def on_msg(self, take):
        self.take = take


def test_without_anywidget_show_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "anywidget", None)
    widget._widget_class.cache_clear()
    with pytest.raises(ParameterError, match=r"clva-lens\[explorer\]"):
        synthetic().show()


def test_the_widget_sends_the_heads_that_are_asked_for(monkeypatch):
    if find_spec("anywidget") is None:
        monkeypatch.setitem(sys.modules, "anywidget", SimpleNamespace(AnyWidget=StandIn))
    widget._widget_class.cache_clear()
    told, sent = synthetic(), []
    shown = told.show(beside=synthetic(seed=1))
    assert len(shown.said) == len(shown.data) == 2 and shown.said[0]["question"] == told.question
    assert shown._esm == module() and shown._css == style()
    shown.send = lambda content, buffers: sent.append((content, buffers))
    asked = {"which": 0, "word": 2, "heads": [[1, 2], [3, 0]]}
    widget.answer(shown, [told], asked)
    ((content, (raw,)),) = sent
    values = np.frombuffer(raw, "<f4").reshape(2, 2, -1)
    assert content == asked
    widget._widget_class.cache_clear()
    assert np.allclose(values[1, 1], told.map(2, heads=[(3, 0)], look=1).ravel())


def test_the_command_writes_a_page(tmp_path):
    Image.fromarray(render(SCENE)).save(tmp_path / "photo.png")
    given = [
        "--image",
        str(tmp_path / "photo.png"),
        "--question",
        f"is there a {KIND} in the image?",
    ]
    out = ["--out", str(tmp_path / "page.html"), "--arrays", str(tmp_path / "arrays.npz")]
    done = CliRunner().invoke(app, ["explore", *given, *out, "-p", "alpha=9", "--no-knock-outs"])
    assert done.exit_code == 0, done.output
    told = Exploration.load(tmp_path / "arrays.npz")
    assert told.names == ("no method", "cl.CLVA(alpha=9)")
    assert KIND in (tmp_path / "page.html").read_text()
    for wrong, said in ((["--image", "no.png", *given[2:]], "no picture"), (given, r"\.html")):
        extra = ["--out", "page.txt"] if wrong is given else []
        done = CliRunner().invoke(app, ["explore", *wrong, *extra])
        assert done.exit_code == 1 and re.search(said, done.output)


def test_a_report_shows_what_its_method_fixed_and_broke(model, tmp_path):
    plain, blind = cl.evaluate(
        model, "pope/toy/adversarial", methods=[None, cl.KnockOut()], limit=12, progress=False
    )
    index = blind.explore(model, plain, tmp_path / "gallery", most=1, progress=False)
    text = index.read_text(encoding="utf-8")
    linked = re.findall(r'href="([^"]+)"', text)
    changed = cl.compare(plain.score, blind.score)
    assert f"Fixed: {changed.fixed}" in text and f"Broken: {changed.broken}" in text
    assert len(linked) == min(1, changed.fixed) + min(1, changed.broken) > 0
    assert all((index.parent / one).is_file() for one in linked)
    assert text.count('src="data:image/jpeg') == 3 * len(linked)
    assert method_of(blind.record) == cl.KnockOut()
    with pytest.raises(ParameterError, match="does not make again"):
        plain.explore(model, blind, tmp_path / "none")


def test_python_of_a_view_can_be_read_back(told):
    """Names of methods are Python, too."""
    for name in told.names[1:]:
        assert isinstance(ast.parse(name, mode="eval").body, ast.Call)


@pytest.mark.parametrize("name", [*synthetic()._arrays(), "object"])
def test_an_array_that_is_missing_or_of_another_size_is_refused(name, tmp_path):
    """Its page would show one thing under the name of another."""
    whole = synthetic().save(tmp_path / "new" / "whole.npz")
    with np.load(whole) as file:
        arrays = dict(file)
    key = "outline: object" if name == "object" else name
    if name != "photo":
        np.savez(tmp_path / "short.npz", **{**arrays, key: arrays[key][..., :-1]})
        with pytest.raises(ParameterError, match=r"fits the maps|are named"):
            Exploration.load(tmp_path / "short.npz")
    if name != "object":
        arrays.pop(key)
        np.savez(tmp_path / "less.npz", **arrays)
        with pytest.raises(ParameterError, match=r"is no exploration \(KeyError\)"):
            Exploration.load(tmp_path / "less.npz")


def test_maps_that_are_no_numbers_and_an_empty_file_are_refused(tmp_path):
    told = synthetic()
    with pytest.raises(ParameterError, match="not numbers"):
        replace(told, maps=np.full_like(told.maps, np.nan))
    (tmp_path / "empty.npz").write_bytes(b"")
    with pytest.raises(ParameterError, match="is no exploration"):
        Exploration.load(tmp_path / "empty.npz")
    assert told.to_html(tmp_path / "not" / "yet" / "there.html").is_file()
