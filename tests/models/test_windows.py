"""Sliding windows: CLVA on a Gemma 3, held against eager float64 patterns that are rewritten."""

import pytest
import torch
from transformers.models.gemma3 import modeling_gemma3

import clva_lens as cl
from clva_lens.ground.errors import InterventionError
from clva_lens.models.family import FAMILIES

IMAGE, COUNT, LONG = 5, 16, 70
# Every third layer has no window; the image is out of reach of the last row in the others.
HEADS = {2: ((), (1, 3)), 5: ((0, 2), ())}
ALPHA, BETA, TAU, STEPS = 14.0, 0.9, 0.5, 4


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    made = FAMILIES.get("generic").tiny().double()
    with torch.no_grad():
        for layer in made.get_decoder().layers:
            layer.self_attn.q_proj.weight.mul_(6)
            layer.self_attn.k_proj.weight.mul_(6)
            layer.self_attn.v_proj.weight.mul_(6)
            layer.self_attn.o_proj.weight.mul_(6)
    return made


def inputs(words=LONG):
    generator = torch.Generator().manual_seed(words)
    text = torch.randint(10, 60, (words,), generator=generator)
    ids = torch.cat([torch.tensor([2]), torch.full((COUNT,), IMAGE), text])[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.randn(1, 3, 32, 32, generator=generator, dtype=torch.double),
    }


class Rewriting:
    """Gemma's attention with whole patterns, rewritten after the softmax (Eqs. 8-11)."""

    def __init__(self, prompt_rows):
        self.prompt_rows, self.masks = prompt_rows, {}

    def __call__(self, module, query, key, value, attention_mask, **kwargs):
        shared = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(shared, dim=1) for part in (key, value))
        scores = query @ key.transpose(2, 3) * module.scaling
        pattern = (scores + attention_mask).softmax(dim=-1)
        layer, visual = module.layer_idx, slice(1, 1 + COUNT)
        if layer in HEADS:
            heads = HEADS[layer][0] or HEADS[layer][1]
            found = pattern[0, list(heads), self.prompt_rows - 1, visual].mean(dim=0)
            z = (found - found.mean()) / (found.std(correction=0) + 1e-6)
            self.masks[layer] = (z > TAU).double()
        if layer > 5:
            weights = 1 + ALPHA * self.masks[5] - BETA * self.masks[2]
            pattern = pattern.clone()
            pattern[:, :, 1 + COUNT :, visual] *= weights
            pattern = pattern / pattern.sum(dim=-1, keepdim=True)
        return (pattern @ value).transpose(1, 2), pattern


def clva(**changes):
    chosen = {5: HEADS[5][0]}, {2: HEADS[2][1]}
    heads = cl.HeadClasses.from_indices(*chosen, layers=12, heads=4)
    given = {"negative_layer": 2, "positive_layer": 5, "tau": TAU, "refresh": "prompt"}
    return cl.CLVA(alpha=ALPHA, beta=BETA, heads=heads, **(given | changes))


@torch.inference_mode()
def test_edits_respect_each_layers_own_window(model, monkeypatch):
    asked = inputs()
    rows = asked["input_ids"].shape[1]
    with cl.intervening(model, clva()) as run:
        out = model.generate(
            **asked,
            max_new_tokens=STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    edited = torch.stack(out.logits, dim=1)[0]
    ids = out.sequences[:, :-1]
    whole = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": (torch.arange(ids.shape[1]) < 1 + COUNT).long()[None]
        * (ids == IMAGE).long(),
        "pixel_values": asked["pixel_values"],
    }
    plain = model(**whole).logits[0, rows - 1 :]
    rewriting = Rewriting(rows)
    monkeypatch.setattr(modeling_gemma3, "eager_attention_forward", rewriting)
    model.set_attn_implementation("eager")
    try:
        expected = model(**whole).logits[0, rows - 1 :]
    finally:
        model.set_attn_implementation("sdpa")
    assert all(0 < mask.sum() < COUNT for mask in rewriting.masks.values())
    assert torch.equal(run.anchors.positive.double(), rewriting.masks[5])
    effect, error = (float((edited - one).abs().max()) for one in (plain, expected))
    print(f"effect {effect:.3g}, error {error:.3g}")
    assert effect > 1e-3 and error < effect / 1e4


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"negative_layer": 0}, "negative"), ({"positive_layer": 4}, "positive")],
)
def test_an_anchor_layer_that_cannot_see_the_image_is_refused(model, changes, word):
    method = cl.CLVA(**({"negative_layer": 2, "positive_layer": 5} | changes))
    with (
        pytest.raises(InterventionError, match=f"64 positions back.*no {word} anchor.*Pass {word}"),
        cl.intervening(model, method),
    ):
        model(**inputs())
    with torch.inference_mode(), cl.intervening(model, method):
        model(**inputs(20))  # short enough for the window
