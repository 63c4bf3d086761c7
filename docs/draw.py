"""Draw the pictures of the README, of the gallery and of the explorer: python docs/draw.py.

The gallery shows each registered figure's own example, the data that the laws of figures are held
against; the README's two pictures are of toy-llava.
"""

import io
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image

import clva_lens as cl
from clva_lens.figures.base import FIGURES, Drawing, look
from clva_lens.toy.scenes import Scene, render, sample_scenes

PICTURES = Path(__file__).parent / "pictures"


def save(drawing: Drawing, path: Path, dpi: int) -> None:
    """Write a figure as a PNG of at most 256 colours, of the same bytes each time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    with look():
        drawing.savefig(drawn, dpi=dpi, format="png")
    Image.open(drawn).convert("RGB").quantize(256).save(path, optimize=True)


def gallery(folder: Path = PICTURES / "gallery") -> None:
    """Draw every registered figure from its example."""
    for name in FIGURES.names():
        figure = FIGURES.get(name)
        save(figure.draw(**figure.example.arguments), folder / f"{name}.png", 80)


def scene_of_the_readme() -> tuple[Scene, str]:
    """Return a scene, and the kind in it that covers most of the picture."""
    scene = sample_scenes(3, seed=7)[0]
    return scene, max(scene.kinds, key=lambda kind: scene.patches(kind).sum())


def readme(folder: Path = PICTURES) -> None:
    """Draw a caption word by word, and one prompt looked at from all sides."""
    model = cl.load("toy-llava")
    scene, kind = scene_of_the_readme()
    photo = render(scene)
    told = cl.caption_attention(model, (photo, "describe the image."), objects=scene.kinds)
    save(told.draw(6, columns=7), folder / "caption.png", 90)
    asked = model.prompt(photo, f"is there a {kind} in the image?")
    save(cl.scan(model, asked, progress=False).draw(), folder / "scan.png", 90)


def explorer(folder: Path = PICTURES) -> None:
    """Take a picture of the explorer's page, with the browser that playwright finds."""
    from playwright.sync_api import sync_playwright

    model = cl.load("toy-llava")
    scene, kind = scene_of_the_readme()
    marked = torch.as_tensor(scene.patches(kind)).flatten().bool()
    asked = model.prompt(render(scene), "describe the image.")
    told = cl.explore(model, asked, cl.CLVA(), objects=marked)
    with TemporaryDirectory() as place, sync_playwright() as driver:
        path = told.to_html(Path(place) / "page.html")
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 750}, reduced_motion="reduce")
        page.goto(path.as_uri())
        page.get_by_role("button", name="bicycle").click()
        shot = Image.open(io.BytesIO(page.screenshot()))
        browser.close()
    shot.convert("RGB").save(folder / "explorer.png", optimize=True)


if __name__ == "__main__":
    parts = {"--gallery": gallery, "--readme": readme, "--explorer": explorer}
    for name, draw in parts.items():
        if name in sys.argv or len(sys.argv) == 1:
            draw()
