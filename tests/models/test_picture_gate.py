"""One gate for pictures: however one comes, it has the pixels of the model's own processor."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tiny_models import QUESTIONS
from transformers.image_utils import load_image

from clva_lens.ground.errors import ParameterError, PromptError
from clva_lens.ground.picture import Picture
from clva_lens.models.pictures import LONGEST_RATIO, read_image

RANDOM = np.random.default_rng(3)
TAG = 0x0112
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")
ARRAYS = ("1", "L", "LA", "RGB", "RGBA")  # an array of the others does not say what it is
CLEAR = ("LA", "P", "RGBA")
DEEP = {"I;16": np.uint16, "F": np.float32}


def colours(channels):
    return RANDOM.integers(0, 256, (20, 30, channels), dtype=np.uint8)


def picture_in(mode):
    """A picture of 30 × 20 pixels; those of CLEAR are transparent in places and by degrees."""
    if mode == "P":
        made = Image.fromarray(colours(3)).quantize(16)
        made.info["transparency"] = bytes(range(0, 256, 16))
        return made
    if mode in DEEP:
        kind = DEEP[mode]
        values = RANDOM.random((20, 30))
        return Image.fromarray((values * (65535 if kind is np.uint16 else 1)).astype(kind))
    return {
        "1": lambda: Image.fromarray(colours(1)[:, :, 0] > 127),
        "L": lambda: Image.fromarray(colours(1)[:, :, 0]),
        "LA": lambda: Image.fromarray(colours(2)),
        "RGB": lambda: Image.fromarray(colours(3)),
        "RGBA": lambda: Image.fromarray(colours(4)),
        "CMYK": lambda: Image.frombytes("CMYK", (30, 20), colours(4).tobytes()),
    }[mode]()


def saved(image, orientation):
    """The bytes of a file without loss that has an EXIF orientation."""
    tag = Image.Exif()
    tag[TAG] = orientation
    file = io.BytesIO()
    image.save(file, "PNG" if image.mode in (*MODES[:-1], "I;16") else "TIFF", exif=tag)
    return file.getvalue()


def routes(data, path):
    """The same file as everything that a prompt takes."""
    path.write_bytes(data)
    loaded = Image.open(io.BytesIO(data))
    loaded.load()
    yield from {
        "text": str(path),
        "path": path,
        "bytes": data,
        "file": io.BytesIO(data),
        "lazy": Image.open(io.BytesIO(data)),
        "loaded": loaded,
    }.items()
    if loaded.mode in (*ARRAYS, *DEEP):
        pixels = np.array(ImageOps.exif_transpose(loaded))
        yield "array", pixels
        yield "tensor", torch.from_numpy(pixels)


@pytest.mark.parametrize("mode", MODES)
def test_every_way_in_gives_the_processors_pixels(one, tmp_path, mode):
    image = picture_in(mode)
    seen = set()
    for orientation in range(1, 9):
        data = saved(image, orientation)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        wanted = one.images(images=upright, return_tensors="pt")["pixel_values"]
        seen.add(wanted.numpy().tobytes())
        for name, picture in routes(data, tmp_path / "picture"):
            found = one.prompt(picture, QUESTIONS[0])["pixel_values"]
            assert torch.equal(found, wanted), (name, orientation)
    assert len(seen) == 8


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in CLEAR])
def test_what_is_opaque_is_read_as_transformers_loads_it(tmp_path, mode):
    for orientation in (1, 6):
        (tmp_path / "picture").write_bytes(saved(picture_in(mode), orientation))
        # A file object: Pillow forgets to turn a TIFF that it opened by name.
        with (tmp_path / "picture").open("rb") as file:
            wanted = load_image(Image.open(file))
        assert np.array_equal(read_image(tmp_path / "picture"), wanted)


@pytest.mark.parametrize("mode", DEEP)
def test_pictures_of_more_than_eight_bits(tmp_path, mode):
    """16 bits by their upper byte, as Pillow reads colours; floats times 255."""
    image = picture_in(mode)
    values = np.asarray(image)
    wanted = values >> 8 if mode == "I;16" else (values * 255).round()
    assert wanted.max() > 200
    for orientation in range(1, 9):
        tag = Image.Exif()
        tag[TAG] = orientation
        turned = Image.fromarray(wanted.astype(np.uint8))
        turned.info["exif"] = tag.tobytes()
        turned = np.asarray(ImageOps.exif_transpose(turned).convert("RGB"))
        for name, picture in routes(saved(image, orientation), tmp_path / "picture"):
            assert np.array_equal(read_image(picture), turned), (name, orientation)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((20, 30), 300, dtype=np.int32), "are int32. Scale them"),
        (np.full((20, 30), 1.5, dtype=np.float32), r"range from 1.5 to 1.5"),
        (np.full((20, 30), np.nan, dtype=np.float32), "600 pixel values that are NaN"),
    ],
)
def test_ranges_are_refused_as_a_file_and_as_an_array(tmp_path, values, message):
    Image.fromarray(values).save(tmp_path / "deep.tiff")
    for picture in (values, Image.fromarray(values), tmp_path / "deep.tiff"):
        with pytest.raises(PromptError, match=message):
            read_image(picture)


def test_a_colour_that_is_transparent():
    """A PNG may name one colour as transparent, without an alpha channel."""
    pixels = np.zeros((20, 30, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", transparency=(0, 0, 0))
    assert np.asarray(read_image(file.getvalue())).min() == 255
    assert np.asarray(read_image(Picture(file.getvalue(), background=None))).max() == 0


def test_pictures_that_are_closed_or_cut_short(tmp_path):
    path = tmp_path / "picture.png"
    data = saved(picture_in("RGB"), 6)
    path.write_bytes(data)
    with Image.open(path) as closed:
        pass
    shut = io.BytesIO(data)
    shut.close()
    cut = Image.open(io.BytesIO(data[:900]))
    for picture in (closed, shut, cut, io.BytesIO(data[:900])):
        with pytest.raises(PromptError, match=r"closed, broken or truncated.*Open it again"):
            read_image(picture)
    with pytest.raises(PromptError, match=r"is broken or truncated.*a whole one"):
        read_image(data[:900])
    with pytest.raises(PromptError, match=r"the picture is not an image that Pillow can read"):
        read_image(b"no picture")
    with Image.open(path) as lazy:
        assert read_image(lazy).size == (20, 30)


def test_damaged_files_are_never_a_bare_traceback():
    """Every tenth byte overwritten, in each format: a picture, or a PromptError."""
    refused = 0
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        file = io.BytesIO()
        picture_in("RGB").save(file, kind)
        for place in range(0, len(file.getvalue()), 10):
            data = bytearray(file.getvalue())
            data[place] ^= 0xFF
            try:
                read_image(bytes(data))
            except PromptError:
                refused += 1
    assert refused > 20


def test_sides_and_sizes(monkeypatch):
    most = np.zeros((2, 2 * LONGEST_RATIO), dtype=np.uint8)
    assert read_image(most).size == (2 * LONGEST_RATIO, 2)
    longer = np.zeros((2, 2 * LONGEST_RATIO + 1), dtype=np.uint8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    large = np.zeros((20, 21), dtype=np.uint8)
    for make in (lambda pixels: pixels, Image.fromarray):
        with pytest.raises(PromptError, match=r"21 × 20 = 420 pixels, at most 400"):
            read_image(make(large))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    for make in (lambda pixels: pixels, Image.fromarray):
        with pytest.raises(PromptError, match=r"401 × 2 pixels.* 200 times the other, at most 200"):
            read_image(make(longer))
    with pytest.raises(PromptError, match=r"empty \(0 × 3\)"):
        read_image(Image.new("RGB", (0, 3)))


# ── how a picture is read ──


def test_as_it_is_stored(tmp_path):
    """What ``PIL.Image.open(path).convert("RGB")`` makes, as LLaVA's and POPE's scripts read it."""
    for mode in ("RGB", "RGBA", "LA"):
        (tmp_path / "picture").write_bytes(saved(picture_in(mode), 6))
        found = read_image(Picture(tmp_path / "picture", "as stored", None))
        assert found.size == (30, 20)
        assert np.array_equal(found, Image.open(tmp_path / "picture").convert("RGB"))


def test_backgrounds():
    clear = Image.new("RGBA", (4, 3), (10, 20, 30, 0))
    for background, colour in {
        "white": (255, 255, 255),
        "black": (0, 0, 0),
        "#7f7f80": (127, 127, 128),
        None: (10, 20, 30),
    }.items():
        assert read_image(Picture(clear, background=background)).getpixel((0, 0)) == colour


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_floats_of_every_width(kind):
    """What each value is, times 255, rounded once; the same as a tensor and as an array."""
    tensor = torch.arange(0, 1, 1 / 4096, dtype=torch.float64).reshape(64, 64).to(kind)
    wanted = (tensor.double() * 255).round().to(torch.uint8).numpy()
    assert np.array_equal(read_image(tensor).convert("L"), wanted)
    if kind != torch.bfloat16:
        assert np.array_equal(read_image(tensor.numpy()).convert("L"), wanted)


def test_the_background_of_a_prompt(one):
    """In every place of a prompt; a Picture has its own."""
    clear = Image.new("RGBA", (32, 32), (10, 20, 30, 0))
    for background in ("white", "black", None):
        wanted = one.prompt(Picture(clear, background=background), QUESTIONS[0])
        found = one.prompt(clear, QUESTIONS[0], background=background)
        assert torch.equal(found["pixel_values"], wanted["pixel_values"])
        several = one.prompt([clear, clear], QUESTIONS[:2], background=background)
        assert torch.equal(several["pixel_values"][1:], wanted["pixel_values"])
        turns = [(clear, QUESTIONS[1], "no")]
        later = one.prompt(clear, QUESTIONS[0], turns=turns, background=background)
        assert torch.equal(later["pixel_values"], wanted["pixel_values"].expand(2, -1, -1, -1))
        own = one.prompt(Picture(clear, background="red"), QUESTIONS[0], background=background)
        assert not torch.equal(own["pixel_values"], wanted["pixel_values"])
    plain = one.prompt(clear, QUESTIONS[0])["pixel_values"]
    assert torch.equal(plain, one.prompt(clear, QUESTIONS[0], background="white")["pixel_values"])
    with pytest.raises(ParameterError, match="background must be an opaque colour or None"):
        one.prompt(clear, QUESTIONS[0], background="no colour")


def test_readings_that_there_are_not(untyped):
    with pytest.raises(ParameterError, match="orientation must be 'upright' or 'as stored'"):
        Picture("x.png", orientation="sideways")
    for wrong in ("no colour", "#ffffff00", 7):
        with pytest.raises(ParameterError, match="background must be an opaque colour or None"):
            Picture("x.png", background=wrong)
