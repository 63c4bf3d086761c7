"""A prompt cut at the end of its picture, in every family of transformers that keeps the laws.

Where the model itself gives other logits for a cut prompt, nothing is shown of the method; such
families are named here, so that a new one is seen.
"""

import pytest
import tiny_families as tiny
import torch
from survey_table import PROVEN
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import clva_lens as cl
from clva_lens.models.beginning import read_beginning
from clva_lens.models.family import find_family
from clva_lens.models.kv_cache import CACHE, cache_of
from clva_lens.models.positions import positions_of

WHOLE_ONLY = {"paligemma"}  # its image tokens see the question


def keeps_every_key(model):
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) is DynamicLayer for layer in layers)


def logits(model, method, *passes):
    cache = None
    with torch.inference_mode(), cl.intervening(model, *([method] if method else [])):
        for inputs in passes:
            given = {} if cache is None else {CACHE: cache}
            out = model(**inputs, **given, use_cache=True)
            cache = cache_of(out)
    return out.logits[:, -1]


@pytest.mark.parametrize("kind", PROVEN)
def test_cut_at_the_end_of_the_picture(kind):
    model, inputs = tiny.tiny_model(kind), tiny.sample(kind, 0)
    places = positions_of(model, inputs)
    inputs |= {} if places is None else {"position_ids": places}
    by_token = [name for name in inputs if name == "attention_mask" or name.endswith("_ids")]
    end = int((inputs["input_ids"][0] == tiny.IMAGE).nonzero().max()) + 1
    seen = {name: one for name, one in inputs.items() if name not in by_token}
    first = {**seen, **{name: inputs[name][..., :end] for name in by_token}}
    rest = {name: inputs[name][..., end:] for name in by_token}
    rest["attention_mask"] = inputs["attention_mask"]
    first_layer, second = find_family(model).sites(model)[0].layers[:2]
    clva = cl.CLVA(negative_layer=first_layer, positive_layer=second, tau=0.5)
    found = {}
    for name, method in (("plain", None), ("CLVA", clva)):
        whole = logits(model, method, tiny.sample(kind, 0))  # with positions of its own
        found[name] = (whole, (logits(model, method, first, rest) - whole).abs().max())
    effect = (found["CLVA"][0] - found["plain"][0]).abs().max()
    if kind not in WHOLE_ONLY and keeps_every_key(model):
        whole = logits(model, cl.VisFlow(), tiny.sample(kind, 0))
        spans = find_family(model).spans(model, "decoder", first)
        onto = {CACHE: read_beginning(model, first, spans).fork(model, torch.tensor([0]))}
        found["VisFlow"] = (
            whole,
            (logits(model, cl.VisFlow(), {**rest, **onto}) - whole).abs().max(),
        )
        looked = (whole - found["plain"][0]).abs().max()
        assert found["VisFlow"][1] < looked / 200
    print(f"{kind}: {[f'{error:.1e}' for _, error in found.values()]}, effect {effect:.2g}")
    if kind in WHOLE_ONLY:
        assert found["plain"][1] > 1e-3
    else:
        assert max(error for _, error in found.values()) < effect / 200
