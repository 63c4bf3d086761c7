"""``names_filter`` keeps what it names and nothing else; runs compose, and leave nothing behind."""

import gc

import pytest
import torch
import watching
from tiny_models import blip_of, lens_of, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import clva_lens as cl
from clva_lens.experiments.speed.bench import PeakMemory, peak_memory
from clva_lens.ground.errors import (
    InterventionError,
    ModelLoadError,
    ParameterError,
    PromptError,
    UnknownName,
)

CPU = torch.device("cpu")
PATTERN = "blocks.6.attn.hook_pattern"


def size(cache):
    return sum(value.numel() * value.element_size() for value in cache.values())


# ── memory ──


def kept(call):
    """Bytes that are alive after a call whose result is held, and the result."""
    with PeakMemory() as memory:
        result = call()
        gc.collect()
        return memory.live, result


def test_memory_is_that_of_what_was_asked_for(one, ask):
    """Of the whole run, the logits and the named activations stay; all else is gone."""
    prompt = ask(one, 3)
    one.run_with_cache(prompt, "hook_embed")  # what is made once and for all
    for names in ("blocks.3.hook_resid_post", PATTERN, ["blocks.0.attn.hook_q", PATTERN]):
        live, (logits, cache) = kept(lambda names=names: one.run_with_cache(prompt, names))
        own = size(cache) + logits.numel() * logits.element_size()
        assert own <= live <= own + 1024, names


def test_peak_memory_grows_by_what_was_asked_for(ask):
    """A pass with one name costs a plain pass and that name; all names cost much more."""
    lens = lens_of("full", "sdpa")
    prompt = ask(lens, 3)

    def plain():
        with torch.no_grad():
            lens.hf_model(**prompt.inputs)

    plain()
    base = peak_memory(plain, CPU)
    _, one_name = lens.run_with_cache(prompt, "blocks.3.hook_resid_mid")
    few = peak_memory(lambda: lens.run_with_cache(prompt, "blocks.3.hook_resid_mid"), CPU)
    assert few <= base + size(one_name) + 2048
    _, everything = lens.run_with_cache(prompt)
    most = peak_memory(lambda: lens.run_with_cache(prompt), CPU)
    assert most - base > 20 * size(one_name)
    assert most <= base + size(everything) + 2048


def test_entries_hold_no_larger_tensors(ask):
    """A view of something larger would keep all of it."""
    for lens in (lens_of("grouped", "sdpa"), blip_of("sdpa")):
        _, cache = lens.run_with_cache(ask(lens, 2), lambda name: True)
        for name, value in cache.items():
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), name


class Squares(TorchDispatchMode):
    """Remembers whether an operator gave [..., n, n]."""

    def __init__(self, *sides):
        super().__init__()
        self.sides, self.found = sides, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple) else (out,):
            if isinstance(one, torch.Tensor) and one.is_floating_point():
                self.found += any(one.shape[-2:] == (side, side) for side in self.sides)
        return out


def test_no_attention_matrix_is_formed_unless_it_is_named(one, ask):
    prompt = ask(one)
    sides = (prompt["input_ids"].shape[1], 17)
    with Squares(*sides) as squares:
        one.run_with_cache(prompt)
    assert squares.found == 0
    with Squares(*sides) as squares:
        one.run_with_cache(prompt, PATTERN)
    assert 0 < squares.found <= 10  # one layer's


# ── names ──


def test_kinds_of_filters_agree(one, ask):
    prompt = ask(one)
    names = [f"blocks.{i}.attn.hook_pattern" for i in range(12)]
    _, listed = one.run_with_cache(prompt, names[::-1])
    _, asked = one.run_with_cache(
        prompt, lambda name: name.startswith("blocks") and name.endswith("hook_pattern")
    )
    assert list(listed.keys()) == list(asked.keys()) == names
    for name in names:
        assert torch.equal(listed[name], asked[name])
    _, single = one.run_with_cache(prompt, names[4])
    assert list(single.keys()) == [names[4]]
    assert torch.equal(single["pattern", 4], listed["pattern", 4])
    _, default = one.run_with_cache(prompt)
    assert not any("pattern" in n or "scores" in n or "result" in n for n in default)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("blocks.6.attn.hook_patern", UnknownName, "Did you mean 'blocks.6.attn.hook_pattern'"),
        (["hook_embed", "blocks.99.hook_resid_pre"], UnknownName, "'blocks.9.hook_resid_pre'"),
        ("resid_post", UnknownName, "'vision.blocks.0.hook_resid_post'"),
        ("zzz", UnknownName, "Known, with i for a layer: blocks.i.attn.hook_attn_scores"),
        ([], ParameterError, "selects none of the 292 activations"),
        (lambda name: "moe" in name, ParameterError, "true of some, or None for all"),
        (7, ParameterError, "holds 7, which is no name"),
        ([PATTERN, 7], ParameterError, "holds 7, which is no name"),
    ],
)
def test_filters_that_cannot_be(one, ask, untyped, names, error, message):
    with pytest.raises(error, match=message):
        one.run_with_cache(ask(one), names)


def test_a_t5_is_refused(ask):
    lens = blip_of("sdpa", "t5")
    with pytest.raises(ModelLoadError, match="'t5', for which run_with_cache has no table"):
        lens.run_with_cache(ask(lens))


def test_a_question_is_no_prompt(one, untyped):
    with pytest.raises(PromptError, match=r"but got str\. Pass model\.prompt\(image, question\)"):
        one.run_with_cache("is there a cup ?")


def test_a_trace_is_no_place_for_it(one, ask):
    prompt = ask(one)
    with (
        pytest.raises(InterventionError, match="inside a trace, but it runs the model itself"),
        one.trace(prompt),
    ):
        one.run_with_cache(prompt)
    assert one.run_with_cache(prompt, "hook_embed").cache["hook_embed"].shape[0] == 1


def test_layers_of_another_make_have_fewer_names(ask):
    """What their norms are for is unknown; the stream between them is not."""
    model = tiny_model()
    model.model.language_model.layers[3].extra = torch.nn.Linear(2, 2)
    lens = cl.load((model, lens_of("full", "sdpa").processor))
    prompt = ask(lens)
    names = set(lens.run_with_cache(prompt).cache)
    assert {"blocks.3.hook_resid_pre", "blocks.3.attn.hook_z", "blocks.3.mlp.hook_post"} <= names
    assert {"blocks.2.hook_resid_mid", "blocks.2.ln2.hook_scale"} <= names
    for name in ("hook_resid_mid", "ln2.hook_scale"):
        with pytest.raises(UnknownName, match=r"norms are of no known.*extra.*\(layers 3\)\. Ask"):
            lens.run_with_cache(prompt, f"blocks.3.{name}")
    with pytest.raises(ModelLoadError, match="no sum over its heads and MLPs: its layers' norms"):
        cl.direct_logit_attribution(lens, prompt)


# ── interventions ──


def test_patterns_show_the_intervention(ask):
    """What the eager kernel really weighs by, with the bias of CLVA in it."""
    lens, method = lens_of("grouped", "eager"), cl.CLVA()
    prompt = ask(lens, 2)
    names = [f"blocks.{i}.attn.hook_pattern" for i in range(12)] + ["blocks.11.hook_resid_post"]
    logits, cache = lens.run_with_cache(prompt, names, method=method)
    places = {
        name: (f"model.language_model.layers.{i}.self_attn", "weights")
        for i, name in enumerate(names[:12])
    }
    places[names[12]] = ("model.language_model.layers.11", "out")
    with (
        torch.no_grad(),
        cl.intervening(lens, method),
        watching.watched(lens.hf_model, places) as s,
    ):
        wanted = lens.hf_model(**prompt.inputs).logits
    keep = prompt["attention_mask"].bool()
    assert torch.equal(logits, wanted)
    for name in names[:12]:
        assert (cache[name] - s[name]).transpose(1, 2)[keep].abs().max() < 1e-5, name
    assert torch.equal(cache[names[12]], s[names[12]])
    _, plain = lens.run_with_cache(prompt, names)
    moved = [(cache[name] - plain[name]).abs().max() for name in names[:12]]
    assert max(moved[:4]) == 0
    assert min(moved[6:]) > 0.01


@pytest.mark.parametrize("site", ["qformer", "decoder"])
def test_open_interventions_are_seen(one_blip, ask, site):
    prompt, layer = ask(one_blip, 2), {"qformer": 4, "decoder": 6}[site]
    method = cl.KnockOut(site=site, layers=(layer,))
    name = {"qformer": "qformer.blocks.4.cross_attn.hook_pattern", "decoder": PATTERN}[site]
    with cl.intervening(one_blip, method):
        inside = one_blip.run_with_cache(prompt, [name, "blocks.11.hook_resid_post"])
    passed = one_blip.run_with_cache(prompt, [name, "blocks.11.hook_resid_post"], method=method)
    plain = one_blip.run_with_cache(prompt, [name, "blocks.11.hook_resid_post"])
    assert torch.equal(inside.logits, passed.logits)
    assert not torch.equal(inside.logits, plain.logits)
    for one in (name, "blocks.11.hook_resid_post"):
        assert torch.equal(inside.cache[one], passed.cache[one])
    spans = prompt.spans_at(site)
    rows = inside.cache[name].transpose(1, 2)
    rows = rows[spans.text] if site == "decoder" else rows.flatten(0, 1)
    visual = spans.image[0]
    assert rows[..., visual].abs().max() < 1e-6
    assert plain.cache[name][..., visual].max() > 0.01


def test_a_cache_belongs_to_its_own_prompt(one, ask):
    """Two prompts under one open intervention."""
    with cl.intervening(one, cl.CLVA()):
        both = [one.run_with_cache(ask(one, None, first), PATTERN) for first in (0, 1)]
    for first, run in enumerate(both):
        alone = one.run_with_cache(ask(one, None, first), PATTERN, method=cl.CLVA())
        assert torch.equal(run.cache[PATTERN], alone.cache[PATTERN])
        assert torch.equal(run.logits, alone.logits)


# ── state ──


def state(model):
    hooks = sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )
    kernels = [
        module.config._attn_implementation
        for module in model.modules()
        if hasattr(module, "config")
    ]
    return hooks, kernels


@pytest.mark.parametrize("names", [None, PATTERN])
def test_nothing_is_left_behind(ask, names):
    lens = cl.load((tiny_model(), lens_of("full", "sdpa").processor))
    prompt, before = ask(lens), state(lens.hf_model)
    wanted = lens.run_with_cache(prompt, names, method=cl.CLVA())
    assert state(lens.hf_model) == before

    def fail(*_):
        raise ZeroDivisionError("in layer 7")

    handle = lens.hf_model.model.language_model.layers[7].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError, match="in layer 7"):
        lens.run_with_cache(prompt, names, method=cl.CLVA())
    handle.remove()
    assert state(lens.hf_model) == before
    again = lens.run_with_cache(prompt, names, method=cl.CLVA())
    assert torch.equal(again.logits, wanted.logits)
    for name in wanted.cache:
        assert torch.equal(again.cache[name], wanted.cache[name])
    with torch.no_grad():
        plain = lens.hf_model(**prompt.inputs).logits
    assert torch.equal(plain, lens.run_with_cache(prompt, names).logits)


def test_no_graph_is_kept(one, ask):
    logits, cache = one.run_with_cache(ask(one))
    assert not logits.requires_grad
    assert not any(value.requires_grad for value in cache.values())
    assert torch.is_grad_enabled()
