"""The pointing game by hand, masks through processors, and the toys' and COCO's objects."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import lens_of, make_processor
from transformers import BlipImageProcessorPil, CLIPImageProcessorPil, LlavaImageProcessorPil

import clva_lens as cl
from clva_lens.experiments.toy_measures import object_patches, trace_questions
from clva_lens.ground.errors import BenchmarkError, PromptError
from clva_lens.lens.patch_masks import coco_mask, pixel_mask
from clva_lens.models.prompt import as_prompt
from clva_lens.science.pointing import pointing
from clva_lens.toy.questions import exist_question
from clva_lens.toy.scenes import render, sample_scenes

DATA = Path(__file__).parents[3] / "shared" / "data"
COCO = DATA / "coco_mini" / "annotations" / "instances_mini.json"


def test_by_hand():
    maps = torch.tensor([[[0.1, 0.2, 0.6, 0.1], [0.5, 0.2, 0.2, 0.1]], [[1.0, 0, 0, 0]] * 2])
    masks = torch.tensor([[False, True, True, False], [False, False, False, True]])
    found = pointing(maps, masks)
    assert found.hit.tolist() == [[True, False], [False, False]]
    torch.testing.assert_close(found.share, torch.tensor([[0.8, 0.4], [0.0, 0.0]]))
    assert found.chance.tolist() == [0.5, 0.25]
    game = cl.pointing_game(maps, masks, layers=(4, 6))
    torch.testing.assert_close(game.shares, torch.tensor([0.4, 0.2]))
    assert game.hits.tolist() == [0.5, 0.0]
    assert game.chance == 0.375
    assert game.hit_intervals is not None
    assert game.hit_intervals.tolist() == [[0.0, 1.0], [0.0, 0.0]]
    assert repr(game).startswith("PointingGame(2 objects: layer 4 points at 50% (0% to 100%)")
    single = cl.pointing_game(maps[0], masks[0])
    assert single.hits.tolist() == [1.0, 0.0]
    assert single.hit_intervals is None


def test_what_is_known_exactly():
    masks = torch.rand(9, 64, generator=torch.Generator().manual_seed(0)) > 0.7
    uniform = torch.full((9, 3, 64), 1 / 64)
    found = pointing(uniform, masks)
    torch.testing.assert_close(found.share, found.chance[:, None].expand(-1, 3))
    perfect = pointing(masks.float()[:, None], masks)
    assert perfect.hit.all()
    assert torch.equal(perfect.share, torch.ones(9, 1))


def test_the_interval_is_wider_for_groups_of_like_objects():
    masks = torch.zeros(40, 4, dtype=torch.bool)
    masks[:, 0] = True
    maps = torch.zeros(40, 1, 4)
    maps[:20, 0, 0] = maps[20:, 0, 1] = 1.0
    alone = cl.pointing_game(maps, masks).hit_intervals
    grouped = cl.pointing_game(maps, masks, groups=[i // 10 for i in range(40)]).hit_intervals
    assert alone is not None
    assert grouped is not None
    assert float(grouped.diff()) > 2 * float(alone.diff())
    # Fair coins: the normal interval of 40 draws is 0.5 ± 1.96 · 0.5/√40 = ± 0.155.
    assert float(alone[0, 1] - 0.5) == pytest.approx(0.155, abs=0.03)


@pytest.mark.parametrize(
    ("maps", "mask", "message"),
    [
        (torch.ones(2, 4), torch.zeros(4, dtype=torch.bool), "1 of 1 objects cover no patch"),
        (torch.ones(2, 4), torch.ones(5, dtype=torch.bool), "maps are .2, 4. and the masks"),
        (torch.ones(2, 4), torch.ones(3, 4, dtype=torch.bool), "one mask"),
        (-torch.ones(2, 4), torch.ones(4, dtype=torch.bool), "negative"),
        (torch.zeros(2, 4), torch.ones(4, dtype=torch.bool), "all 0"),
    ],
)
def test_refused(untyped, maps, mask, message):
    with pytest.raises(BenchmarkError, match=message):
        cl.pointing_game(maps, mask)


def test_it_draws_itself():
    maps = torch.rand(12, 3, 16, generator=torch.Generator().manual_seed(1))
    game = cl.pointing_game(maps, maps[:, 0] > 0.6, layers=(0, 4, 8))
    drawn = game.draw()
    assert drawn.axes[0].get_xlabel() == "layer (index, 0-based)"
    assert {row["layer"] for row in drawn.rows} == {0, 4, 8}
    assert drawn.rows[0]["low"] <= drawn.rows[0]["value"] <= drawn.rows[0]["high"]
    assert (game._repr_png_() or b"").startswith(b"\x89PNG")
    heads = cl.pointing_game(maps[:, :, None].expand(-1, -1, 4, -1), maps[:, 0] > 0.6)
    assert heads.hits.shape == (3, 4)
    assert {(row["layer"], row["head"]) for row in heads.draw().rows} == {
        (layer, head) for layer in range(3) for head in range(4)
    }
    whole = cl.pointing_game(maps[:, 0], maps[:, 0] > 0.6, layers=(0,))
    assert whole.hits.ndim == 0 and whole._repr_png_() is None
    with pytest.raises(BenchmarkError, match="layers, or layers and heads, are drawn"):
        whole.draw()


# ── masks ──


def test_run_lengths_by_hand():
    """Column by column: 2 outside, 3 inside, 1 outside, in a picture of 2 × 3."""
    found = pixel_mask((2, 3), counts=[2, 3, 1])
    assert found.astype(int).tolist() == [[0, 1, 1], [0, 1, 0]]
    assert pixel_mask((2, 3), counts=[0, 6]).all()
    with pytest.raises(BenchmarkError, match="add up to 5 pixels"):
        pixel_mask((2, 3), counts=[2, 3])
    with pytest.raises(BenchmarkError, match="one of them"):
        pixel_mask((2, 3))
    with pytest.raises(BenchmarkError, match=r"of a picture of \[3, 2\], but size is \[2, 3\]"):
        coco_mask({"segmentation": {"counts": [2, 4], "size": [3, 2]}}, (2, 3))
    for nothing in ({}, {"segmentation": []}):
        with pytest.raises(BenchmarkError, match="no segmentation"):
            coco_mask(nothing, (2, 3))


# Run lengths, the picture's size, and the text that pycocotools 2.0.11 makes of them.
COMPRESSED = [
    ([2, 3, 1], (2, 3), "231"),
    ([0, 6], (2, 3), "06"),
    ([6], (2, 3), "6"),
    ([100, 5, 200, 3, 1692], (40, 50), "T35X6Nd^1"),
    ([3000, 120, 30, 7, 4000, 2, 2841], (100, 100), "hm2h3n0_LRl3KikN"),
    ([0, 1, 1, 1, 95, 1, 1], (10, 10), "0110n20RM"),
    ([1, 1, 1, 1, 1, 1, 1, 1], (2, 4), "11100000"),
    ([5, 20, 75], (10, 10), "5d0[2"),
]


@pytest.mark.parametrize("kind", [str, str.encode])
@pytest.mark.parametrize(("counts", "size", "text"), COMPRESSED)
def test_compressed_run_lengths_are_the_same_pixels(counts, size, text, kind):
    wanted = pixel_mask(size, counts=counts)
    packed = {"segmentation": {"counts": kind(text), "size": list(size)}, "iscrowd": 1}
    assert np.array_equal(coco_mask(packed, size), wanted)
    assert np.array_equal(pixel_mask(size, counts=kind(text)), wanted)
    with pytest.raises(BenchmarkError, match=r"add up to .* pixels, but the picture has"):
        pixel_mask((size[0] + 1, size[1]), counts=kind(text))


def test_what_are_no_compressed_run_lengths():
    for text in ("2 3", "23\n1", "é"):
        with pytest.raises(BenchmarkError, match="have the character"):
            pixel_mask((2, 3), counts=text)
    with pytest.raises(BenchmarkError, match="add up to 0 pixels"):
        pixel_mask((2, 3), counts="")


def test_boxes_and_polygons():
    box = pixel_mask((10, 12), box=(2, 3, 4, 5))
    assert box.sum() == 20
    assert box[3:8, 2:6].all()
    # A polygon's numbers are edges between pixels: two of 3 × 4 and 2 × 1, joined.
    corners = pixel_mask(
        (10, 12), polygons=[[2, 3, 5, 3, 5, 7, 2, 7], [9, 9, 11, 9, 11, 10, 9, 10]]
    )
    assert corners.sum() == 14
    assert corners[3:7, 2:5].all()
    assert corners[9, 9:11].all()
    with pytest.raises(BenchmarkError, match="4 numbers"):
        pixel_mask((10, 12), polygons=[[1, 2, 3, 4]])


def geometry(mask, kind):
    """The same by PIL alone: 32 × 32 pixels in patches of 8."""
    height, width = mask.shape
    picture = Image.fromarray((mask * 255).astype(np.uint8))
    if kind == "crop":
        scale = 32 / min(height, width)
        size = (max(32, int(width * scale)), max(32, int(height * scale)))
        picture = picture.resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
        picture = picture.crop((left, top, left + 32, top + 32))
    else:
        picture = picture.resize((32, 32), Image.Resampling.BICUBIC)
    return np.array(picture).reshape(4, 8, 4, 8).mean(axis=(1, 3)) / 255


@pytest.mark.parametrize("kind", ["crop", "square"])
@pytest.mark.parametrize("size", [(64, 64), (48, 90), (120, 50)])
def test_patches_follow_the_processor(kind, size):
    processor = make_processor()
    processor.image_processor = {
        "crop": CLIPImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
        "square": BlipImageProcessorPil(size={"height": 32, "width": 32}),
    }[kind]
    lens = cl.load((lens_of("full", "sdpa").hf_model, processor), check=False)
    rng, seen = np.random.default_rng(0), 0
    for _ in range(12):
        x, y = rng.integers(0, size[1] - 20), rng.integers(0, size[0] - 20)
        mask = pixel_mask(size, box=(int(x), int(y), 18, 16))
        found = cl.patch_mask(lens, mask).reshape(4, 4).numpy()
        share = geometry(mask, kind)
        sure = np.abs(share - 0.25) > 0.01
        assert (found == (share >= 0.25))[sure].all()
        seen += int(found.sum())
    assert seen > 12
    assert cl.patch_mask(lens, np.ones(size, dtype=bool)).all()


def with_images(images):
    """The tiny model behind another image processor."""
    processor = make_processor()
    processor.image_processor = images
    return cl.load((lens_of("full", "sdpa").hf_model, processor), check=False)


class Padding(CLIPImageProcessorPil):
    """Pads every picture to a square with ``fill``, a colour or a way of np.pad, before CLIP's."""

    fill = (0, 255, 0)

    def __call__(self, images, **options):
        picture = np.asarray(images)
        spare = [max(picture.shape[:2]) - side for side in picture.shape[:2]]
        around = [(one // 2, one - one // 2) for one in spare] + [(0, 0)]
        if isinstance(self.fill, str):
            padded = np.pad(picture, around, mode=self.fill)
        else:
            padded = np.empty((max(picture.shape[:2]),) * 2 + (3,), dtype=np.uint8)
            padded[:] = self.fill
            (top, _), (left, _), _ = around
            padded[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
        return super().__call__(Image.fromarray(padded), **options)


SQUARE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}


@pytest.mark.parametrize("fill", ["llava", (0, 255, 0), (255, 0, 0), (0, 0, 255), (255, 255, 255)])
def test_padding_is_no_object_and_moves_the_rest(fill):
    """128 × 64 pixels, padded to 128 × 128: the picture is on the middle two columns of patches.

    Rows of patches are 32 pixels high, columns 32 wide, the first of the picture's at column 1.
    """
    if fill == "llava":
        images = LlavaImageProcessorPil(do_pad=True, **SQUARE)
    else:
        images = Padding(**SQUARE)
        images.fill = fill
    lens = with_images(images)
    whole = np.ones((128, 64), dtype=bool)
    assert cl.patch_mask(lens, whole).reshape(4, 4).tolist() == [[False, True, True, False]] * 4
    found = cl.patch_mask(lens, pixel_mask((128, 64), box=(32, 64, 32, 64))).reshape(4, 4)
    assert found.nonzero().tolist() == [[2, 2], [3, 2]]
    # The same object would be elsewhere if the picture were cropped.
    cropped = cl.patch_mask(with_images(CLIPImageProcessorPil(**SQUARE)), whole)
    assert cropped.all()


@pytest.mark.parametrize("fill", ["edge", "reflect", "wrap"])
def test_padding_with_the_picture_itself_is_refused(fill):
    images = Padding(**SQUARE)
    images.fill = fill
    lens = with_images(images)
    with pytest.raises(BenchmarkError, match=r"pad with the picture itself.*yourself"):
        cl.patch_mask(lens, np.ones((64, 128), dtype=bool))
    # A square picture is not padded.
    assert cl.patch_mask(lens, np.ones((64, 64), dtype=bool)).all()


def test_other_colours_are_refused():
    class Normalising(CLIPImageProcessorPil):
        def __call__(self, images, **options):
            return super().__call__(images, **(options | {"do_normalize": True}))

    with pytest.raises(BenchmarkError, match="changes colours although do_normalize"):
        cl.patch_mask(with_images(Normalising(**SQUARE)), np.ones((64, 64), dtype=bool))


def test_a_prompt_gives_the_size_and_the_grid(one):
    """A picture of 40 × 64: its left half is the left half of the patches."""
    picture = Image.fromarray(np.zeros((40, 64, 3), np.uint8))
    prompt = one.prompt(picture, "is there a cup ?")
    half = pixel_mask((40, 64), box=(0, 0, 32, 40))
    found = cl.patch_mask(one, half, prompt=prompt)
    assert torch.equal(found, cl.patch_mask(one, half))
    assert found.reshape(prompt.grid)[:, : prompt.grid[1] // 2].all() and not found.all()
    for size in ((64, 40), (40, 63), (1, 1)):
        with pytest.raises(BenchmarkError, match=rf"has {size[0]} × {size[1]} .* has 40 × 64\."):
            cl.patch_mask(one, np.ones(size, dtype=bool), prompt=prompt)
    batch = one.prompt([picture, picture.rotate(90, expand=True)], "is there a cup ?")
    with pytest.raises(BenchmarkError, match=r"prompt\.row\(index\)"):
        cl.patch_mask(one, half, prompt=batch)
    assert torch.equal(cl.patch_mask(one, half, prompt=batch.row(0)), found)
    # A processor's output has no picture to compare with.
    assert torch.equal(cl.patch_mask(one, half, prompt=as_prompt(one, dict(prompt))), found)
    # The grid is the prompt's own: where it is another, its patches are others.
    coarse = {n: t._replace(grid=(2, 2), places=None) for n, t in prompt.sites.items()}
    narrow = replace(prompt, sites=coarse)
    assert cl.patch_mask(one, half, prompt=narrow).tolist() == [True, False, True, False]
    with pytest.raises(PromptError, match="no attention site 'eye'"):
        cl.patch_mask(one, half, "eye", prompt=prompt)


def test_what_is_cropped_away_is_on_no_patch(one):
    edge = np.zeros((40, 100), dtype=bool)
    edge[:, :20] = True
    assert not cl.patch_mask(one, edge).any()


@pytest.mark.parametrize("name", ["toy-llava", "toy-instructblip"])
def test_the_toys_objects(name):
    """Through the processor, boxes become the patches that a scene knows."""
    model, checked = cl.load(name), 0
    for scene in sample_scenes(10, seed=3):
        prompt = model.prompt(render(scene), "Is there a cup?")
        for kind in scene.kinds:
            covered = np.zeros((64, 64), dtype=bool)
            for thing in scene.of_kind(kind):
                covered |= pixel_mask((64, 64), box=(thing.x, thing.y, thing.size, thing.size))
            wanted = torch.from_numpy(scene.patches(kind)).flatten()
            assert torch.equal(cl.patch_mask(model, covered), wanted)
            assert torch.equal(cl.patch_mask(model, covered, prompt=prompt), wanted)
            checked += 1
    assert checked > 20


def test_the_qformers_fourth_layer_points_at_the_object():
    """What the card of toy-instructblip says: 95 % of the questions."""
    model, scenes = cl.load("toy-instructblip"), sample_scenes(40, seed=5)
    asked = [
        (index, exist_question(scene, kind))
        for index, scene in enumerate(scenes)
        for kind in scene.kinds
        if scene.patches(kind).any()
    ]
    trace = trace_questions(model, scenes, asked)
    game = cl.pointing_game(
        trace.saliency("all"),
        object_patches(scenes, asked),
        layers=trace.layers,
        groups=[index for index, _ in asked],
    )
    print(game)
    at = trace.layers.index(4)
    assert float(game.hits[at]) > 0.85
    assert game.hit_intervals is not None
    assert float(game.hit_intervals[at, 0]) > 5 * game.chance
    assert float(game.hits[0]) < 0.5


@pytest.mark.skipif(not COCO.exists(), reason="needs the COCO annotations beside the repository")
def test_coco_objects(one):
    data = json.loads(COCO.read_text())
    sizes = {one["id"]: (one["height"], one["width"]) for one in data["images"]}
    masks, pictures, runs, digests = [], [], 0, ""
    for number, annotation in enumerate(data["annotations"]):
        size = sizes[annotation["image_id"]]
        pixels = coco_mask(annotation, size)
        assert pixels.shape == size
        runs += annotation["iscrowd"]
        if annotation["area"] > 2000:
            assert pixels.sum() == pytest.approx(annotation["area"], rel=0.15)
        x, y, wide, high = annotation["bbox"]
        # Tips that are thinner than a pixel have none, so a mask may end well inside its box.
        ys, xs = np.nonzero(pixels)
        assert ((x - 1 <= xs) & (xs <= x + wide)).all()
        assert ((y - 1 <= ys) & (ys <= y + high)).all()
        digests += hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
        if number % 4:  # all masks are checked above; patches of a quarter of them
            continue
        patches = cl.patch_mask(one, pixels)
        if patches.any():
            masks.append(patches)
            pictures.append(annotation["image_id"])
    assert runs == 16
    # Of the masks that pycocotools 2.0.11 makes of the same annotations.
    whole = hashlib.sha256(digests.encode()).hexdigest()
    assert whole == "9b542bad6743d8db68bf051ba4338d91ea7acb90f85dfd872fd7541c03d9b5d3"
    found = torch.stack(masks)
    assert len(found) > 75
    game = cl.pointing_game(torch.ones(len(found), 2, 16), found, groups=pictures)
    torch.testing.assert_close(game.shares, torch.full((2,), game.chance))
    perfect = cl.pointing_game(found.float()[:, None], found, groups=pictures)
    assert perfect.hits.tolist() == perfect.shares.tolist() == [1.0]
