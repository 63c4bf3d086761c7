"""A decoding step under a method never waits for the device, and costs few operators.

Reading a number from a tensor makes the CPU wait for a GPU. Transformers' own steps do so at times;
what counts is what a method adds to them.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

import clva_lens as cl
from clva_lens.engine.kernels import Merging
from clva_lens.methods.clva import ClvaSession
from clva_lens.models.kv_cache import CACHE

WAITS = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "equal",
    "masked_select",
    "unique2",
)
STEPS = 3
METHODS = {
    "clva": cl.CLVA(tau=1.0),
    "clva from the prompt": cl.CLVA(tau=1.0, refresh="prompt"),
    "knock-out": cl.KnockOut(),
    "knock-out of heads": cl.KnockOut(heads="sensitive"),
    "composed": cl.compose(cl.CLVA(tau=1.0, layers=(5, 6, 7)), cl.KnockOut(layers=(9,))),
}


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))

    @property
    def waits(self):
        return sum(self.names[name] for name in WAITS)


def decode(model, inputs, kind, *methods):
    """Return the operators of the decoding steps, and the logits of the last one."""
    count, config = inputs["input_ids"].shape[1], model.config.text_config
    static = kind is StaticCache
    cache = StaticCache(config=config, max_cache_len=count + STEPS) if static else DynamicCache()
    seen, mask = Operators(), inputs["attention_mask"]
    with torch.inference_mode(), cl.intervening(model, *methods):
        out = model(**inputs, **{CACHE: cache}, use_cache=True)
        for _ in range(STEPS):
            ids = out.logits[:, -1:].argmax(dim=-1)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            more = {"input_ids": ids, "attention_mask": mask, CACHE: cache}
            with seen:
                out = model(**more, use_cache=True)
    return seen, out.logits[:, -1]


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_never_waits_for_the_device(name, kind, one, ask):
    inputs, model = ask(one, 2).inputs, one.hf_model
    plain, before = decode(model, inputs, kind)
    seen, after = decode(model, inputs, kind, METHODS[name])
    assert seen.waits == plain.waits
    assert (after - before).abs().max() > 0.05


def test_a_wait_is_counted():
    with torch.inference_mode(), Operators() as seen:
        x = torch.ones(3)
        assert x.all() and float(x[0]) == 1 and x.nonzero().tolist()
    assert seen.waits >= 3


@pytest.mark.parametrize("name", METHODS)
def test_static_and_dynamic_caches_give_the_same(name, one, ask):
    inputs, model = ask(one, 2).inputs, one.hf_model
    (_, dynamic), (_, static) = (
        decode(model, inputs, kind, METHODS[name]) for kind in (DynamicCache, StaticCache)
    )
    torch.testing.assert_close(static, dynamic, atol=1e-4, rtol=0)


def test_the_bias_is_made_once_a_step_whatever_the_number_of_edited_layers(one, ask):
    inputs, model = ask(one).inputs, one.hf_model
    plain, _ = decode(model, inputs, DynamicCache)
    few, many = (
        decode(model, inputs, DynamicCache, cl.CLVA(tau=1.0, layers=layers))[0].names.total()
        for layers in ((5,), (5, 6, 7, 8, 9, 10, 11))
    )
    assert few == many
    assert few - plain.names.total() <= 55 * STEPS


def test_only_the_layers_that_matter_are_asked(one, ask, monkeypatch):
    """In a pass: both anchors, and one of the layers that are edited alike; none at others."""
    asked = []
    attention = ClvaSession.attention

    def spy(self, call):
        asked.append((call.step.number, call.layer))
        return attention(self, call)

    monkeypatch.setattr(ClvaSession, "attention", spy)
    method = cl.CLVA(tau=1.0, layers=(6, 7, 9, 11))
    decode(one.hf_model, ask(one).inputs, DynamicCache, method)
    assert asked == [(step, layer) for step in range(STEPS + 1) for layer in (0, 4, 6)]


@pytest.mark.parametrize("more", [cl.KnockOut(layers=(7, 9)), cl.PAI(layers=(9,))])
def test_layers_with_other_sessions_are_not_taken_for_the_same(one, ask, more):
    """Against the run in which every layer is asked."""
    model, inputs = one.hf_model, ask(one, 2).inputs
    method = cl.CLVA(tau=1.0, layers=(6, 7, 9, 11))
    _, alone = decode(model, inputs, DynamicCache, method)
    _, found = decode(model, inputs, DynamicCache, method, more)
    with pytest.MonkeyPatch.context() as patch:
        none = property(lambda _: [], lambda *_: None)
        patch.setattr(Merging, "ready", none, raising=False)
        _, expected = decode(model, inputs, DynamicCache, method, more)
    assert torch.equal(found, expected)
    assert (found - alone).abs().max() > 0.01


def test_one_static_cache_may_be_reset_for_another_prompt(one, ask):
    model, method = one.hf_model, cl.CLVA(tau=1.0)
    first, second = ask(one).inputs, ask(one, first=2).inputs
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    with torch.inference_mode(), cl.intervening(model, method):
        for inputs in (first, second):
            cache.reset()
            out = model(**inputs, **{CACHE: cache}, use_cache=True)
            ids = out.logits[:, -1:].argmax(dim=-1)
            again = model(input_ids=ids, **{CACHE: cache}, use_cache=True).logits[:, -1]
    with torch.inference_mode(), cl.intervening(model, method):
        fresh = DynamicCache()
        model(**second, **{CACHE: fresh}, use_cache=True)
        expected = model(input_ids=ids, **{CACHE: fresh}, use_cache=True).logits[:, -1]
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=0)
