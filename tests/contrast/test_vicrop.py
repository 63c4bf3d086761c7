"""ViCrop: its map, its box, its crop and what is said of both pictures, from its formulas.

In float64, from plain passes of transformers without a cache; the box by loops over windows.
"""

from functools import cache

import numpy as np
import pytest
import torch
from test_contrast_reference import decode, lens_inputs
from tiny_models import blip_of, double_of, lens_of
from torch.nn import functional

import clva_lens as cl
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.methods.target import Target
from clva_lens.methods.vicrop import GENERAL, crop_box, cropped

IMAGE, LAYER, STEPS, ERROR = 5, 5, 3, 1e-3  # 14 of 32 is 5 of 12


@cache
def eager():
    model = double_of("full")
    model.set_attn_implementation("eager")
    return model


def row_of(inputs, item):
    """One prompt without its padding, and its picture in float64."""
    real = inputs["attention_mask"][item].bool()
    return inputs["input_ids"][item][real], inputs["pixel_values"][item].double()


def looked(ids, picture):
    with torch.no_grad():
        out = eager()(
            input_ids=ids[None], pixel_values=picture[None], output_attentions=True, use_cache=False
        )
    return out.attentions[LAYER][0, :, -1, ids == IMAGE].mean(dim=0).reshape(4, 4)


def box_by_loops(values, size, window):
    """Every window of every size, its sum and its neighbours', as the release goes over them."""
    cell = size[0] / values.shape[1], size[1] / values.shape[0]
    found = []
    for ratio in (1, 1.2, 1.4, 1.6, 1.8, 2):
        wide = min(int(window * ratio / cell[0]), values.shape[1])
        high = min(int(window * ratio / cell[1]), values.shape[0])
        if wide == values.shape[1] and high == values.shape[0]:
            if ratio == 1:
                return 0, 0, *size
            continue
        sums = {}
        for x in range(values.shape[1] - wide + 1):
            for y in range(values.shape[0] - high + 1):
                sums[x, y] = sum(
                    float(values[y + j, x + i]) for j in range(high) for i in range(wide)
                )
        x, y = max(sums, key=sums.get)
        beside = [sums[at] for at in ((x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1)) if at in sums]
        falls = (sums[x, y] - np.mean(beside)) / (wide * high)
        found.append((falls, ratio, int((x + wide / 2) * cell[0]), int((y + high / 2) * cell[1])))
    _, ratio, across, down = max(found, key=lambda one: one[0])
    half = window * ratio // 2
    across, down = (
        min(max(at, half), length - half) for at, length in ((across, size[0]), (down, size[1]))
    )
    return (
        max(0, across - half),
        max(0, down - half),
        min(size[0], across + half),
        min(size[1], down + half),
    )


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("grid", "size", "window"),
    [((24, 24), (640, 480), 336), ((16, 16), (500, 375), 224), ((4, 4), (32, 32), 16)],
)
def test_the_box_is_the_releases(seed, grid, size, window):
    values = torch.rand(grid, generator=torch.Generator().manual_seed(seed)).double() ** 4
    assert tuple(crop_box(values, size, window)) == box_by_loops(values, size, window)


def test_the_box_lies_on_the_peak():
    values = torch.zeros(24, 24)
    values[18:21, 3:6] = 1
    box = crop_box(values, (960, 960), 336)
    assert box.left <= 3 * 40 and box.right >= 6 * 40
    assert box.top <= 18 * 40 and box.bottom >= 21 * 40
    assert crop_box(values, (300, 300), 336) == (0, 0, 300, 300)


@torch.no_grad()
def test_both_pictures_are_asked_about():
    """The map, the crop and the answer's logits at each step, of prompts of two lengths."""
    lens = lens_of("full", "sdpa")
    inputs = lens_inputs(lens)
    method = cl.ViCrop()
    ids, found = decode(lens, inputs, method, max_new_tokens=STEPS)
    plain = decode(lens, inputs, max_new_tokens=1)[1][:, 0]
    (session,) = method.sessions(Target(lens.hf_model, lens.processor))
    second = session.seconds[0](inputs)
    words = lens.family.ask(lens.processor, GENERAL, None).split("<image>")[-1]
    general = torch.tensor(lens.processor.tokenizer(words, add_special_tokens=False).input_ids)
    error, wrong, effects, boxes = 0.0, 0.0, [], set()
    for item in range(3):
        own, picture = row_of(inputs, item)
        last = int((own == IMAGE).nonzero()[-1])
        relative = looked(own, picture) / looked(torch.cat([own[: last + 1], general]), picture)
        mine = session.seconds[0]._relative(inputs)[item].double()
        wrong = max(wrong, float((mine / relative - 1).abs().max()))
        left, top, right, bottom = (int(one) for one in box_by_loops(relative, (32, 32), 16))
        boxes.add((left, top, right, bottom))
        part = picture[None, :, top:bottom, left:right]
        crop = functional.interpolate(part, size=(32, 32), mode="bilinear", align_corners=False)
        assert torch.allclose(second["pixel_values"][2 * item + 1].double(), crop[0], atol=1e-5)
        both = torch.cat([own[: last + 1], own[own == IMAGE], own[last + 1 :], ids[item, :-1]])
        shown = torch.cat([picture[None], crop])
        asked = {"input_ids": both[None], "pixel_values": shown}
        wanted = eager()(**asked, use_cache=False).logits[0, -STEPS:]
        error = max(error, float((found[item] - wanted).abs().max()))
        effects.append(float((wanted[0] - plain[item]).abs().max()))
    print(f"vicrop: error {error:.1e}, effect {min(effects):.3f}; map {wrong:.1e}; {boxes}")
    assert wrong < 1e-3
    assert error < ERROR
    assert min(effects) > max(0.05, 100 * error)
    assert len(boxes) > 1


def test_a_crop_of_everything_is_the_picture():
    shown = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cropped(shown, crop_box(torch.eye(4), (32, 32), 32)), shown)


def test_refusals():
    lens = lens_of("full", "sdpa")
    for wrong, said in (
        ({"window": 0}, r"window must be in \(0, 1\]"),
        ({"general": " "}, "general is empty"),
    ):
        with pytest.raises(ParameterError, match=said):
            cl.ViCrop(**wrong)
    with (
        pytest.raises(InterventionError, match=r"one picture by queries.*Use a model whose"),
        cl.intervening(blip_of("sdpa"), cl.ViCrop()),
    ):
        pass
    with (
        pytest.raises(InterventionError, match="has no processor"),
        cl.intervening(lens.hf_model, cl.ViCrop()),
    ):
        pass
    (session,) = cl.ViCrop().sessions(Target(lens.hf_model, lens.processor))
    tiles = {**lens_inputs(lens), "image_sizes": torch.tensor([[32, 32]] * 3)}
    with pytest.raises(InterventionError, match=r"pixel_values with image_sizes.*LLaVA-1.5"):
        session.seconds[0](tiles)
