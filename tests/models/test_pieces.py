"""Pieces are where the pixels are: a spot on a photo moves the tokens whose boxes it touches.

The oracle knows no formula: the photo with a spot and without goes through each family's own image
processor and vision tower, and the image tokens that enter the decoder are compared. The towers'
attention is silenced, so that a token sees its own patches (and what a convolution adds to them).
"""

import numpy as np
import pytest
import torch
from PIL import Image
from real_families import REAL
from real_processors import TORCHVISION, make_model, make_processor
from survey_table import ABSENT

import clva_lens as cl
from clva_lens.figures.saliency import saliency_overlays
from clva_lens.ground.errors import ParameterError, PromptError
from clva_lens.lens.side_by_side import Look, saliency_picture
from clva_lens.models.paintings import fitted, painted
from clva_lens.models.prompt import as_prompt
from clva_lens.science.anchors import VisualAnchors

SIZES = ((90, 60), (60, 100))
SPOTS = ((0.2, 0.2), (0.45, 0.3), (0.8, 0.25), (0.3, 0.55), (0.6, 0.7), (0.15, 0.85), (0.85, 0.8))
HALF, BLUR = 5, 6
"""Of a spot, in pixels of the photo; and how far beyond it resizing may carry it."""
QUESTION = "Is there a cup?"
# The token's place on the photo is known, but convolutions carry its pixels farther.
FAR = ("deepseek_vl_hybrid", "got_ocr2", "lfm3_vl", "pp_chart2table")
NO_PIECES = (
    "apertus1p5",
    "aria",
    "gemma4",
    "gemma4_unified",
    "idefics2",
    "step3p7",
)
ELSEWHERE = ("fuyu", "shieldgemma2")
"""Model types whose processor needs torchvision to run, or writes another prompt than asked for."""
# Of transformers' own processors, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


# LLaVA-OneVision makes a mosaic smaller that would have more tokens than so many tiles.
SMALLER = {"vision_aspect_ratio": "anyres_max_1"}
ONEVISION = REAL["llava_onevision"]
PROCESSORS = REAL | {
    "llava_onevision (smaller)": ONEVISION._replace(
        settings={**ONEVISION.settings, **SMALLER},
        model={"top": {**ONEVISION.model["top"], **SMALLER}},
    )
}


class Entered(Exception):
    """The decoder got its input: the rest of the pass is of no interest."""


def lens_of(kind):
    try:
        processor = make_processor(PROCESSORS[kind])
    except (ImportError, AttributeError):  # or there is none for Pillow
        if TORCHVISION:
            raise
        pytest.skip("un-skip where torchvision is installed: the processor needs it")
    model = make_model(kind.removesuffix(" (smaller)"), PROCESSORS[kind])
    lens = cl.load((model, processor), check=False)
    inside = {id(part) for part in lens.hf_model.get_decoder().modules()}
    for part in lens.hf_model.modules():
        if id(part) not in inside and type(part).__name__.endswith("Attention"):
            part.register_forward_hook(silenced)
    return lens


def silenced(module, args, out):
    first, *rest = out if isinstance(out, tuple) else (out,)
    return (torch.zeros_like(first), *rest) if isinstance(out, tuple) else torch.zeros_like(out)


def entering(lens, prompt):
    """Return the image tokens as they enter the decoder."""
    seen = {}

    def stop(module, args, kwargs):
        seen.update(kwargs)
        raise Entered

    hook = lens.hf_model.get_decoder().register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.inference_mode(), pytest.raises(Entered):
            lens.hf_model(**prompt)
    finally:
        hook.remove()
    return seen["inputs_embeds"][prompt.spans.image]


def photo(size, seed=0):
    return np.random.default_rng(seed).integers(90, 160, (*size[::-1], 3)).astype(np.uint8)


def touched(cells, x, y, half):
    """Return the area of each cell that a square around a point covers."""
    low = torch.maximum(cells[:, :2], torch.tensor([x - half, y - half]))
    high = torch.minimum(cells[:, 2:], torch.tensor([x + half, y + half]))
    return (high - low).clamp(min=0).prod(dim=1)


def spotted(lens, pixels, pieces, before):
    """Yield each spot's place and how far it moves each image token."""
    for across, down in SPOTS:
        x, y = int(across * pixels.shape[1]), int(down * pixels.shape[0])
        shown = pixels.copy()
        shown[y - HALF : y + HALF, x - HALF : x + HALF] //= 3
        yield x, y, (entering(lens, lens.prompt(shown, QUESTION)) - before).norm(dim=-1)


@pytest.mark.parametrize("kind", sorted(set(PROCESSORS) - set(ELSEWHERE) - ABSENT))
def test_a_spot_moves_the_tokens_whose_boxes_it_touches(kind):
    lens, hits, off = lens_of(kind), [], []
    for size in SIZES:
        pixels = photo(size)
        prompt = lens.prompt(pixels, QUESTION)
        if kind in NO_PIECES:
            assert prompt.pieces == ()
            with pytest.raises(PromptError, match="says where its image tokens lie"):
                prompt.pieces_at("decoder")
            return
        pieces = prompt.pieces_at("decoder")
        before = entering(lens, prompt)
        patches = torch.cat([one.tokens for one in pieces])
        assert len(patches.unique()) == len(patches)
        for x, y, moved in spotted(lens, pixels, pieces, before):
            for one in pieces:
                cells, own = one.cells, moved[one.tokens]
                area = touched(cells, x, y, HALF)
                away = touched(cells, x, y, HALF + BLUR) == 0
                if kind not in FAR:
                    assert (own[away] < moved.max() / 50).all(), (one, x, y)
                size_of_cell = (cells[0, 2:] - cells[0, :2]).prod()
                if area.max() > min(size_of_cell, 4 * HALF**2) / 4:
                    hits.append(float(area[own.argmax()] / area.max()))
                    middle = (cells[:, :2] + cells[:, 2:]) / 2
                    centres = [(middle * w[:, None]).sum(0) / w.sum() for w in (own**2, area)]
                    off.append((centres[0] - centres[1]) / (cells[0, 2:] - cells[0, :2]))
            loose = torch.ones(len(moved), dtype=torch.bool)
            loose[patches] = False
            assert not moved[loose].any()  # what ends a row sees nothing
    shift = torch.stack(off).mean(dim=0)
    print(f"{kind}: {len(hits)} spots, the least hit {min(hits):.2f}, mean shift {shift.tolist()}")
    assert len(hits) > 10  # a crop may leave spots out
    assert min(hits) > 0
    assert shift.abs().max() < 0.25  # of a cell


# ── what is measured ──

EXACT = {
    "cropped": (lambda one: one[10:50, 5:65], (5, 10, 65, 50)),
    "padded": (lambda one: np.pad(one, ((0, 0), (20, 12), (0, 0))), (-20, 0, 102, 60)),
    "larger": (lambda one: one.repeat(3, axis=0).repeat(2, axis=1), (0, 0, 90, 60)),
    "a corner": (lambda one: np.pad(one[:9, :7], ((23, 0), (25, 0), (0, 0))), (-25, -23, 7, 9)),
}


def measured(change):
    """Return what is seen of a picture of 90 × 60, changed and normalised by channel."""

    def encode(shown):
        colours = change(np.asarray(shown[0])) / 255
        normal = (colours - (0.5, 0.4, 0.3)) / (0.2, 0.3, 0.4)
        return {"pixel_values": torch.from_numpy(normal).permute(2, 0, 1)[None]}

    pictures = [Image.fromarray(photo((90, 60)))]
    return fitted(list(painted(pictures, encode)[1]), pictures)


@pytest.mark.parametrize("name", EXACT)
def test_boxes_are_exact(name):
    change, box = EXACT[name]
    high, wide = change(photo((90, 60))).shape[:2]
    (found,) = measured(change)
    near = found.box((0, 0, wide / 4, high / 4), 4, 4)
    assert near == (pytest.approx(box, abs=0.1) if name == "a corner" else box)


def test_what_cannot_be_followed_is_refused():
    with pytest.raises(PromptError, match=r"moves parts of a picture by \d+%"):
        measured(lambda one: np.pad(one, ((0, 0), (30, 30), (0, 0)), mode="reflect"))
    with pytest.raises(PromptError, match=r"all padding|comes out of the processor as a black one"):
        measured(np.zeros_like)


# ── what is drawn and asked of pieces ──

CUT = ("idefics3", "llava_next")
"""Model types with tiles whose processors need no torchvision."""


@pytest.fixture(scope="module", params=CUT)
def cut(request):
    return lens_of(request.param)


@pytest.mark.parametrize("part", ["tiles", "thumbnail"])
def test_a_map_is_drawn_where_the_pixels_are(cut, part):
    pixels = photo((90, 60))
    prompt = cut.prompt(pixels, QUESTION)
    assert prompt.grid is None
    piece = prompt.piece_at("decoder", part)
    assert piece.thumbnail == (part == "thumbnail")
    before = entering(cut, prompt)
    for x, y, moved in spotted(cut, pixels, prompt.pieces, before):
        drawn = prompt.on_grid(torch.stack([moved, -moved]), part)
        assert drawn.shape == (2, piece.rows, piece.columns)
        row, column = divmod(int(drawn[0].argmax()), piece.columns)
        left, top, right, bottom = piece.box
        wide, high = (right - left) / piece.columns, (bottom - top) / piece.rows
        assert abs(left + (column + 0.5) * wide - x) < wide / 2 + HALF
        assert abs(top + (row + 0.5) * high - y) < high / 2 + HALF
    whole = prompt.on_grid(torch.arange(len(moved)))
    assert torch.equal(whole, prompt.on_grid(torch.arange(len(moved)), "tiles"))


def test_objects_are_on_tiles_and_thumbnail(cut):
    """Against a mask of ten times the size, averaged over each box."""
    size, (x, y, wide, high) = (90, 60), (21, 8, 47, 29)
    prompt = cut.prompt(photo(size), QUESTION)
    mask = np.zeros(size[::-1], dtype=bool)
    mask[y : y + high, x : x + wide] = True
    found = cl.patch_mask(cut, mask, prompt=prompt)
    fine = np.pad(mask.repeat(10, axis=0).repeat(10, axis=1), 1000)
    ends_rows = torch.ones(len(found), dtype=torch.bool)
    for piece in prompt.pieces:
        ends_rows[piece.tokens] = False
        for token, box in zip(piece.tokens, (piece.cells * 10 + 1000).round().int(), strict=True):
            left, top, right, bottom = box.tolist()
            share = fine[top:bottom, left:right].mean()
            assert abs(share - 0.25) < 0.03 or found[token] == (share >= 0.25)
    assert not found[ends_rows].any() and 0.2 < found.float().mean() < 0.5
    # A map that looks at the object alone, and twice as much at what ends rows.
    looks = found.float() + 2 * ends_rows
    played = cl.pointing_game(looks[None], found, prompt=prompt)
    assert played.hits.item() == played.shares.item() == 1
    assert cl.pointing_game(looks[None], found).hits.item() == (not ends_rows.any())
    for part in ("tiles", "thumbnail"):
        chance = cl.pointing_game(looks[None], found, prompt=prompt, part=part).chance
        tokens = prompt.piece_at("decoder", part).tokens
        assert chance == pytest.approx(float(found[tokens].float().mean()))
    with pytest.raises(ParameterError, match="Pass prompt= too"):
        cl.pointing_game(looks[None], found, part="tiles")


def test_several_pictures_have_pieces_of_their_own():
    lens, sizes = lens_of("idefics3"), ((90, 60), (60, 100))
    first, second = photo(sizes[0]), photo(sizes[1], 1)
    dark = first.copy()
    dark[10:30, 10:30] //= 3
    asked = [lens.prompt(second, QUESTION, turns=[(one, QUESTION, "yes")]) for one in (first, dark)]
    before, after = (entering(lens, one) for one in asked)
    prompt, moved = asked[0], (after - before).norm(dim=-1)
    alone = [lens.prompt(one, QUESTION).pieces for one in (first, second)]
    for picture, pieces in enumerate(alone):
        own = [one for one in prompt.pieces if one.picture == picture]
        assert [(one.box, one.thumbnail) for one in own] == [
            (one.box, one.thumbnail) for one in pieces
        ]
        tokens = torch.cat([one.tokens for one in own])
        assert bool(moved[tokens].any()) == (picture == 0)
    assert sum(len(one.tokens) for one in prompt.pieces) == len(moved)
    with pytest.raises(ParameterError, match="has 2 pictures, but picture is None"):
        prompt.on_grid(moved)
    assert prompt.on_grid(moved, picture=1).max() == 0 < prompt.on_grid(moved, picture=0).max()
    mask = np.ones(sizes[1][::-1], dtype=bool)
    assert not cl.patch_mask(lens, mask, prompt=prompt, picture=1)[: len(moved) // 3].any()


def test_batches_share_pieces_where_they_can(cut):
    same = cut.prompt([photo((90, 60)), photo((90, 60), 1)], QUESTION)
    alone = cut.prompt(photo((90, 60)), QUESTION)
    assert [one.box for one in same.pieces] == [one.box for one in alone.pieces]
    values = torch.arange(2.0 * alone.spans.visual_count).reshape(2, -1)
    assert torch.equal(same.on_grid(values)[0], alone.on_grid(values[0]))
    if cut.hf_model.config.model_type == "llava_next":  # the numbers of tokens differ too
        return
    mixed = cut.prompt([photo((90, 60)), photo((60, 100))], QUESTION)
    with pytest.raises(PromptError, match=r"different sizes.*Take prompt\.row"):
        mixed.pieces_at("decoder")
    assert [one.box for one in mixed.row(0).pieces] == [one.box for one in alone.pieces]


def test_what_is_unknown_is_said(cut):
    prompt = cut.prompt(photo((90, 60)), QUESTION)
    bare = as_prompt(cut, dict(prompt))
    assert bare.pieces == ()
    with pytest.raises(PromptError, match="was not made of one"):
        bare.pieces_at("decoder")
    with pytest.raises(PromptError, match=r"there is no grid|lie on no single grid"):
        bare.on_grid(torch.zeros(prompt.spans.visual_count))
    with pytest.raises(ParameterError, match="Pass 'tiles' or 'thumbnail'"):
        prompt.piece_at("decoder", "mosaic")
    with pytest.raises(ParameterError, match="has 1 pictures, but picture is 3"):
        prompt.piece_at("decoder", picture=3)


def test_lenses_and_overlays_draw_pieces(cut):
    pixels = photo((90, 60))
    prompt = cut.prompt(pixels, QUESTION)
    shapes = {part: prompt.piece_at("decoder", part) for part in ("tiles", "thumbnail")}
    seen = cl.logit_lens(cut, prompt, span="image")
    for part, piece in shapes.items():
        drawn = seen.on_grid(part=part)
        assert drawn.shape[-2:] == (piece.rows, piece.columns)
        assert torch.equal(drawn.flatten(-2), seen.margin[..., piece.tokens])
    assert seen.draw()._repr_png_()
    with pytest.raises(PromptError, match=r"has 3 values, but there are \d+ tokens at the decoder"):
        prompt.on_grid(torch.zeros(3))
    trace = cl.trace_attention(cut, prompt)
    positive = torch.arange(prompt.spans.visual_count) % 3 == 0
    anchors = VisualAnchors(positive, ~positive, *trace.saliency("all")[:2], None, 1, 0)
    picture = saliency_picture(cut, Look(prompt, trace, trace, anchors, None, cl.CLVA()))
    mosaic = shapes["tiles"]
    assert picture.before.shape[-2:] == picture.positive.shape == (mosaic.rows, mosaic.columns)
    # Over the photo within the mosaic's box; where padding goes beyond it, there is black.
    left, top, right, bottom = (round(edge) for edge in mosaic.box)
    assert picture.image.shape == (bottom - top, right - left, 3) and (left, right) == (0, 90)
    assert not picture.image[: max(0, -top - 1)].any()
    middle = (picture.image[30 - top] * 255).round()
    assert min(np.abs(middle - row).max() for row in pixels[29:32]) == 0
    assert saliency_overlays([picture], range(6))._repr_png_()
