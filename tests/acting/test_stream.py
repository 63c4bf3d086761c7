"""The residual stream in the seam: sessions that read and edit it, wherever the model runs."""

import nnsight
import pytest
import torch
from test_state import state
from tiny_models import blip_of, tiny_blip

import clva_lens as cl
from clva_lens.engine.run import running
from clva_lens.engine.session import Session
from clva_lens.ground.errors import ModelLoadError, ParameterError
from clva_lens.methods.base import Method

PARTS = ("resid_pre", "attn_out", "mlp_out", "resid_post")
PLACES = [(part, layer) for part in PARTS for layer in (0, 5, 11)]


class Add(Session):
    """Adds a number to every entry of the last row of each pass, and keeps what it was shown."""

    layers = ()

    def __init__(self, part, layer, amount, site="decoder"):
        self.site, self.streams, self.amount = site, {(part, layer)}, amount
        self.calls, self.shown = [], []

    def stream(self, call, hidden):
        self.calls.append(call)
        self.shown.append(hidden.detach().clone())
        if self.amount is None:
            return None
        edited = hidden.clone()
        edited[:, -1] = edited[:, -1] * 1.5 + self.amount
        return edited


class Adding(Method):
    name = "adding"

    def __init__(self, *made):
        self.made = made

    def sessions(self, target):
        return [Add(*one) for one in self.made]


def logits(lens, prompt, *sessions):
    with torch.inference_mode(), running(lens.hf_model, sessions):
        return lens.hf_model(**prompt.inputs).logits


def by_hand(lens, prompt, part, layer, amount):
    """The same edit by a hook of our own on the Llama's modules."""
    block = lens.hf_model.get_decoder().layers[layer]

    def edit(value):
        value = value.clone()
        value[:, -1] = value[:, -1] * 1.5 + amount
        return value

    module = {"attn_out": block.self_attn.o_proj, "mlp_out": block.mlp}.get(part, block)
    if part == "resid_pre":
        hook = module.register_forward_pre_hook(lambda m, args: (edit(args[0]), *args[1:]))
    else:
        hook = module.register_forward_hook(lambda m, args, out: edit(out))
    try:
        with torch.inference_mode():
            return lens.hf_model(**prompt.inputs).logits
    finally:
        hook.remove()


@pytest.mark.parametrize(("part", "layer"), PLACES)
def test_edits_are_those_by_hand(lens, ask, part, layer):
    prompt = ask(lens, 3)
    found = logits(lens, prompt, Add(part, layer, 0.3))
    plain = logits(lens, prompt)
    assert torch.equal(found, by_hand(lens, prompt, part, layer, 0.3))
    assert float((found - plain)[:, -1].abs().max()) > 0.05
    earlier = prompt.spans.real[:, :-1]  # eager rows of padding look at every row
    assert torch.equal(found[:, :-1][earlier], plain[:, :-1][earlier])


def test_looking_changes_nothing_and_sees_what_the_cache_has(lens, ask):
    prompt = ask(lens, 3)
    sessions = [Add(part, layer, None) for part, layer in PLACES]
    assert torch.equal(logits(lens, prompt, *sessions), logits(lens, prompt))
    _, cache = lens.run_with_cache(prompt)
    for session, (part, layer) in zip(sessions, PLACES, strict=True):
        assert torch.equal(session.shown[0], cache[f"blocks.{layer}.hook_{part}"])
        call = session.calls[0]
        assert (call.part, call.layer, call.step.number) == (part, layer, 0)


def test_each_session_sees_the_edits_before_it(one, ask):
    first, second = Add("mlp_out", 4, 0.2), Add("mlp_out", 4, -0.1)
    logits(one, ask(one), first, second)
    wanted = first.shown[0][:, -1] * 1.5 + 0.2
    assert torch.equal(second.shown[0][:, -1], wanted)
    assert torch.equal(second.shown[0][:, :-1], first.shown[0][:, :-1])


def test_the_cache_shows_what_methods_make(one, ask):
    prompt = ask(one, 3)
    _, plain = one.run_with_cache(prompt)
    for part in PARTS:
        method = Adding((part, 5, 0.3))
        _, cache = one.run_with_cache(prompt, method=method)
        name = f"blocks.5.hook_{part}"
        wanted = plain[name][:, -1] * 1.5 + 0.3
        assert torch.equal(cache[name][:, -1], wanted)
        assert torch.equal(cache["blocks.6.hook_resid_pre"], cache["blocks.5.hook_resid_post"])
        with cl.intervening(one.hf_model, method):
            _, open_now = one.run_with_cache(prompt, names_filter=name)
        assert torch.equal(open_now[name], cache[name])


def test_with_clva_in_one_trace(one, ask):
    """Inside a trace, also of a bare handle, as outside; what later layers read is edited."""
    prompt = ask(one)
    methods = (Adding(("resid_pre", 3, 0.3), ("mlp_out", 6, 0.2)), cl.CLVA(tau=1.0))
    with torch.inference_mode(), cl.intervening(one.hf_model, *methods):
        expected = one.hf_model(**prompt.inputs).logits
    with one.trace(prompt):
        cl.intervene(*methods)
        entering = one.model.language_model.layers[3].input.save()
        found = one.output.logits.save()
    _, cache = one.run_with_cache(prompt, "blocks.3.hook_resid_pre")
    assert torch.equal(entering[:, -1], cache["resid_pre", 3][:, -1] * 1.5 + 0.3)
    assert torch.equal(found, expected)
    handle = nnsight.NNsight(one.hf_model)
    with handle.trace(**prompt):
        cl.intervene(*methods)
        again = handle.output.logits.save()
    assert torch.equal(again, expected)
    with torch.inference_mode(), cl.intervening(one.hf_model, methods[1]):
        alone = one.hf_model(**prompt.inputs).logits
    assert float((alone - expected).abs().max()) > 0.05


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}])
def test_generating(lens, ask, options):
    """The last row of each pass is edited, so a run with the cache is one without."""
    prompt = ask(lens, 2)
    given = {"max_new_tokens": 4, "do_sample": False, "output_logits": True} | options
    session = Add("resid_post", 6, None)
    with torch.inference_mode(), running(lens.hf_model, [session]):
        lens.hf_model.generate(**prompt.inputs, **given)
    beams = options.get("num_beams", 1)
    length = prompt["input_ids"].shape[1]
    uncached = options.get("use_cache") is False
    lengths = [length + i if uncached else 1 for i in range(1, 4)]
    assert [tuple(one.shape[:2]) for one in session.shown] == [
        (2 * beams, count) for count in (length, *lengths)
    ]
    assert [call.step.number for call in session.calls] == [0, 1, 2, 3]
    offsets = [0, 0, 0, 0] if uncached else [0, *range(length, length + 3)]
    assert [call.step.offset for call in session.calls] == offsets


def test_state_is_restored(lens, ask):
    before = state(lens.hf_model)
    sessions = [Add(part, layer, 0.1) for part, layer in PLACES]
    logits(lens, ask(lens), *sessions)
    assert state(lens.hf_model) == before
    with pytest.raises(KeyError, match="mine"), running(lens.hf_model, sessions):
        assert state(lens.hf_model) != before
        raise KeyError("mine")
    assert state(lens.hf_model) == before
    outer, inner = Add("mlp_out", 3, 0.1), Add("resid_pre", 4, 0.1)
    with running(lens.hf_model, [outer]):
        during = state(lens.hf_model)
        with running(lens.hf_model, [inner]):
            assert state(lens.hf_model)[0] != during[0]
        assert state(lens.hf_model)[0] == during[0]
    assert state(lens.hf_model) == before


def test_no_hook_without_a_session_that_wants_one(one):
    block = one.hf_model.get_decoder().layers[0]
    with cl.intervening(one.hf_model, cl.CLVA(), cl.AblateHeads()):
        for module in block.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks


@pytest.mark.parametrize("part", [*PARTS, "cross_attn_out"])
def test_qformer(one_blip, ask, part):
    prompt = ask(one_blip, 2)
    looking, editing = Add(part, 4, None, "qformer"), Add(part, 4, 0.5, "qformer")
    plain = logits(one_blip, prompt, looking)
    _, cache = one_blip.run_with_cache(prompt)
    assert torch.equal(looking.shown[0], cache[f"qformer.blocks.4.hook_{part}"])
    assert float((logits(one_blip, prompt, editing) - plain).abs().max()) > 1e-3


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("language", ["llama", "opt"])
def test_behind_a_qformer(ask, language, part):
    """OPT's MLPs know no batch axis; sessions are shown one all the same."""
    lens = blip_of("sdpa", language)
    prompt = ask(lens, 2)
    looking, editing = Add(part, 4, None), Add(part, 4, 0.5)
    plain = logits(lens, prompt, looking)
    _, cache = lens.run_with_cache(prompt)
    assert torch.equal(looking.shown[0], cache[f"blocks.4.hook_{part}"])
    edited = logits(lens, prompt, editing)
    assert float((edited - plain)[:, -1].abs().max()) > 0.05
    assert torch.equal(edited[:, :-1], plain[:, :-1])


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (("resid_pre", 12), r"no 'blocks.12.hook_resid_pre'.*decoder has resid_pre.*0 to 11"),
        (("cross_attn_out", 4), r"no 'blocks.4.hook_cross_attn_out'"),
        (("resid_mid", 4), r"no 'blocks.4.hook_resid_mid'"),
    ],
)
def test_refused(one, untyped, place, message):
    before, (part, layer) = state(one.hf_model), place
    with (
        pytest.raises(ParameterError, match=message),
        running(one.hf_model, [Add("mlp_out", 2, 0.1), Add(part, layer, 0.1)]),
    ):
        pass
    assert state(one.hf_model) == before


def test_a_language_model_without_names():
    model = tiny_blip("t5")
    before = state(model)
    with (
        pytest.raises(ModelLoadError, match=r"'t5', for which"),
        cl.intervening(model, cl.KnockOut(site="decoder"), Adding(("mlp_out", 2, 0.1))),
    ):
        pass
    assert state(model) == before


def test_as_hooks_of_a_bridge(lens, ask, no_process):
    prompt = ask(lens, 3)
    method = cl.compose(
        Adding(("resid_pre", 3, 0.3), ("mlp_out", 6, 0.2), ("attn_out", 2, 0.1)),
        cl.CLVA(tau=1.0),
        Adding(("resid_post", 8, 0.3)),
    )
    bridge = cl.to_transformer_lens(lens)
    with torch.inference_mode(), cl.intervening(lens.hf_model, method):
        expected = lens.hf_model(**prompt.inputs).logits
    with torch.inference_mode():
        plain = bridge(**bridge.inputs(prompt))
        hooks = method.as_hooks(bridge, prompt)
        found = bridge.run_with_hooks(**bridge.inputs(prompt), fwd_hooks=hooks)
    real = prompt.spans.real
    error = float((found - expected)[real].abs().max())
    effect = float((found - plain)[real].abs().max())
    print(f"error {error:.1e}, effect {effect:.3f}")
    assert error < 5e-5
    assert effect > 1000 * error
