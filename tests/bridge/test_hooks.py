"""The same edit gives the same logits on both backends: fused biases, and TransformerLens hooks."""

import pytest
import torch
from tiny_models import lens_of

import clva_lens as cl
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.models.kv_cache import CACHE, cache_of
from clva_lens.science.anchors import anchor_mask, reanchor, reanchor_weights, saliency_map

pytestmark = pytest.mark.usefixtures("no_process")
SOME_HEADS = cl.HeadClasses.from_indices({4: [0, 1]}, {0: [3]}, layers=12, heads=4)
CASES = {
    "CLVA": cl.CLVA(tau=1.0),
    "last row": cl.CLVA(tau=1.0, rows="last"),
    "some layers, weak": cl.CLVA(tau=1.0, alpha=3.0, beta=0.5, layers=(6, 9)),
    "other anchors": cl.CLVA(tau=0.5, positive_layer=6, negative_layer=2, head_threshold=0.3),
    "given heads": cl.CLVA(tau=1.0, heads=SOME_HEADS),
    "empty sets skipped": cl.CLVA(tau=0.5, empty="skip"),
    "weight 0": cl.CLVA(tau=1.0, alpha=0.0, beta=1.0),
    "knock-out": cl.KnockOut(),
    "knock-out, last row": cl.KnockOut(layers=(3, 8), rows="last"),
    "knock-out of heads": cl.KnockOut(heads=SOME_HEADS.sensitive | SOME_HEADS.insensitive),
    "knock-out of a class": cl.KnockOut(heads="insensitive"),
    "ablation": cl.AblateHeads(heads=SOME_HEADS.sensitive | SOME_HEADS.insensitive),
    "ablation of a class, then CLVA": cl.compose(cl.AblateHeads(rows="last"), cl.CLVA(tau=1.0)),
    "ClearSight": cl.ClearSight(),
    "ClearSight, the paper's": cl.ClearSight(variant="paper"),
    "PAI": cl.PAI(),
    "VisFlow": cl.VisFlow(),
    "CLVA, then PAI": cl.compose(cl.CLVA(tau=1.0), cl.PAI()),
    "knock-out, then ClearSight": cl.compose(cl.KnockOut(layers=(3,)), cl.ClearSight()),
    "shuffled": cl.Shuffled(cl.CLVA(tau=1.0)),
    "CLVA, then knock-out": cl.compose(
        cl.CLVA(tau=1.0, layers=(5, 6, 7)), cl.KnockOut(layers=(7, 9))
    ),
    "knock-out, then CLVA": cl.compose(cl.KnockOut(layers=(2, 3)), cl.CLVA(tau=1.0)),
}


@pytest.fixture(scope="module")
def bridge_of():
    made = {}

    def make(lens):
        if id(lens) not in made:
            made[id(lens)] = cl.to_transformer_lens(lens)
        return made[id(lens)]

    return make


PLAIN = {}  # logits by model and inputs, with which every case compares


@torch.inference_mode()
def both_backends(lens, bridge, prompt, method):
    """Return (error, effect) over the real rows, and the anchors' owners."""
    inputs, real = bridge.inputs(prompt), prompt.spans.real
    key = lens.hf_model, *(one.numpy().tobytes() for one in prompt.inputs.values())
    if key not in PLAIN:
        PLAIN[key] = lens.hf_model(**prompt).logits
    plain = PLAIN[key]
    with cl.intervening(lens.hf_model, method) as run:
        ours = lens.hf_model(**prompt).logits
    hooks = method.as_hooks(bridge, prompt)
    theirs = bridge.run_with_hooks(**inputs, fwd_hooks=hooks)
    error = float((theirs - ours)[real].abs().max())
    return error, float((ours - plain)[real].abs().max()), run, hooks


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("name", CASES)
def test_same_edit_same_logits(lens, bridge_of, ask, name, batch):
    prompt = ask(lens, batch)
    error, effect, run, hooks = both_backends(lens, bridge_of(lens), prompt, CASES[name])
    print(f"{name}: error {error:.1e}, effect {effect:.3f}")
    assert error < 5e-5
    assert effect > 1000 * error
    assert effect > 0.02
    if isinstance(CASES[name], cl.CLVA):
        found = hooks.sessions[0].anchors
        assert torch.equal(found.positive, run.anchors.positive)
        assert torch.equal(found.negative, run.anchors.negative)
        torch.testing.assert_close(found.positive_map, run.anchors.positive_map)


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("heads", ["full", "grouped"])
def test_memvr(heads, variant, batch, ask):
    """What an FFN reads and puts out, and the picture's features, through a bridge's hooks."""
    lens = lens_of(heads, "sdpa", 8.0)
    bridge, prompt = cl.to_transformer_lens(lens), ask(lens, batch)
    method = cl.MemVR(ratio=0.3, gamma=0.6, variant=variant)
    error, effect, _, hooks = both_backends(lens, bridge, prompt, method)
    print(f"error {error:.1e}, effect {effect:.3f}")
    assert error < 1e-4
    assert effect > max(0.05, 500 * error)
    assert {name.partition(".")[0] for name, _ in hooks} == {"embed", "blocks"}
    assert {name for name, _ in hooks} >= {"blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out"}
    both = cl.compose(method, cl.CLVA(tau=1.0))
    assert both_backends(lens, bridge, prompt, both)[0] < 1e-4


def test_lists_of_hooks_add_up(one, bridge_of, ask):
    """Hooks of two methods in one list are their composition, in that order."""
    bridge, prompt = bridge_of(one), ask(one, 3)
    first, second = cl.KnockOut(layers=(2, 3)), cl.CLVA(tau=1.0)
    inputs = bridge.inputs(prompt)
    with torch.inference_mode():
        joined = bridge.run_with_hooks(
            **inputs, fwd_hooks=[*first.as_hooks(bridge, prompt), *second.as_hooks(bridge, prompt)]
        )
        composed = bridge.run_with_hooks(
            **inputs, fwd_hooks=cl.compose(first, second).as_hooks(bridge, prompt)
        )
        alone = bridge.run_with_hooks(**inputs, fwd_hooks=second.as_hooks(bridge, prompt))
    assert torch.equal(joined, composed)
    assert float((joined - alone).abs().max()) > 0.05


def test_the_rewrite_of_the_pattern(one, bridge_of, ask):
    """Hooks that rewrite hook_pattern by hand, as Eqs. 10-11 are printed, give the same logits."""
    bridge, prompt = bridge_of(one), ask(one)
    spans, maps = prompt.spans, {}
    text, image = spans.text[0], spans.image[0]

    def read(kind):
        def hook(pattern, hook):
            mass = pattern[0][:, text][..., image].sum(-1).mean(-1)
            chosen = getattr(cl.classify_heads(mass[None]), kind)[0]
            maps[kind] = anchor_mask(saliency_map(pattern[0, :, -1, image], chosen), 1.0)

        return hook

    def rewrite(pattern, hook):
        weights = torch.ones(1, pattern.shape[3])
        weights[0, image] = reanchor_weights(maps["sensitive"], maps["insensitive"], 14, 0.9)
        return reanchor(pattern, weights, spans.text)

    name = "blocks.{}.attn.hook_pattern"
    by_hand = [(name.format(0), read("insensitive")), (name.format(4), read("sensitive"))]
    by_hand += [(name.format(layer), rewrite) for layer in range(5, 12)]
    inputs = bridge.inputs(prompt)
    with torch.inference_mode():
        plain = bridge(**inputs)
        expected = bridge.run_with_hooks(**inputs, fwd_hooks=by_hand)
        hooks = cl.CLVA(tau=1.0).as_hooks(bridge, prompt)
        found = bridge.run_with_hooks(**inputs, fwd_hooks=hooks)
    error, effect = float((found - expected).abs().max()), float((found - plain).abs().max())
    print(f"error {error:.1e}, effect {effect:.3f}")
    assert error < 5e-5
    assert effect > 1000 * error


@pytest.mark.parametrize("refresh", ["step", "prompt"])
@pytest.mark.parametrize("heads", ["full", "grouped"])
def test_steps(heads, refresh, bridge_of, ask):
    """Token by token onto the cache, the logits are those of the fused backend."""
    lens = lens_of(heads, "sdpa")
    bridge, prompt, method = bridge_of(lens), ask(lens, 3), cl.CLVA(tau=1.0, refresh=refresh)
    written = torch.tensor([[12, 30, 14, 9], [8, 21, 33, 40], [50, 11, 10, 13]])

    def rows(run, first):
        kept, cache, mask = [], None, prompt["attention_mask"]
        for step in range(5):
            logits, cache = run(first if step == 0 else written[:, step - 1 : step], mask, cache)
            kept.append(logits[:, -1])
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        return torch.stack(kept)

    pixels = prompt["pixel_values"]
    model = lens.hf_model

    def ours(ids, mask, cache):
        given = {"pixel_values": pixels} if cache is None else {}
        # Positions after padding, as generate() counts them.
        at = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        out = model(
            ids,
            attention_mask=mask,
            **{CACHE: cache},
            position_ids=at,
            use_cache=True,
            **given,
        )
        return out.logits, cache_of(out)

    def theirs(ids, mask, cache):
        given = {"pixel_values": pixels} if cache is None else {}
        return bridge(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            return_type="logits_and_cache",
            use_cache=True,
            **given,
        )

    with torch.inference_mode():
        plain = rows(ours, prompt["input_ids"])
        with cl.intervening(model, method):
            expected = rows(ours, prompt["input_ids"])
        with bridge.hooks(fwd_hooks=method.as_hooks(bridge, prompt)):
            found = rows(theirs, prompt["input_ids"])
    error = float((found - expected).abs().max())
    effect = (expected - plain).abs().amax(dim=(1, 2))
    print(f"error {error:.1e}, effect by step {[round(float(x), 3) for x in effect]}")
    assert error < 5e-5
    assert bool((effect > 1000 * error).all())


@pytest.mark.parametrize("method", [None, cl.CLVA(tau=1.0), cl.KnockOut()])
def test_generate(one, bridge_of, ask, method):
    bridge, prompt, method = bridge_of(one), ask(one, 3), method or cl.compose()
    with cl.intervening(one.hf_model, method):
        expected = one.hf_model.generate(**prompt, max_new_tokens=6, do_sample=False)
    with torch.inference_mode(), bridge.hooks(fwd_hooks=method.as_hooks(bridge, prompt)):
        found = bridge.generate(
            **bridge.inputs(prompt),
            max_new_tokens=6,
            do_sample=False,
            stop_at_eos=False,
            return_type="tokens",
            verbose=False,
        )
    assert torch.equal(found, expected)


def test_hooks_can_be_used_again(one, bridge_of, ask):
    bridge, prompt = bridge_of(one), ask(one)
    hooks = cl.CLVA(tau=1.0).as_hooks(bridge, prompt)
    with torch.inference_mode():
        first, second = (
            bridge.run_with_hooks(**bridge.inputs(prompt), fwd_hooks=hooks) for _ in range(2)
        )
        plain = bridge(**bridge.inputs(prompt))
    assert torch.equal(first, second)
    assert not torch.equal(first, plain)


def test_only_the_layers_in_question(one, bridge_of, ask):
    bridge, prompt = bridge_of(one), ask(one)
    names = [name for name, _ in cl.CLVA(layers=(7, 9)).as_hooks(bridge, prompt)]
    assert names == ["embed.hook_in"] + [f"blocks.{i}.attn.hook_attn_scores" for i in (0, 4, 7, 9)]


def test_compatibility_mode(ask):
    """Folded weights and masks of −inf: the edited probabilities are the same, padded or not."""
    lens = lens_of("full", "sdpa")
    bridge, prompt, method = cl.to_transformer_lens(lens), ask(lens, 3), cl.CLVA(tau=1.0)
    bridge.enable_compatibility_mode(disable_warnings=True)
    with torch.inference_mode():
        with cl.intervening(lens.hf_model, method):
            expected = lens.hf_model(**prompt).logits.log_softmax(-1)
        plain = bridge(**bridge.inputs(prompt)).log_softmax(-1)
        hooks = method.as_hooks(bridge, prompt)
        found = bridge.run_with_hooks(**bridge.inputs(prompt), fwd_hooks=hooks).log_softmax(-1)
    real = prompt.spans.real
    error = float((found - expected)[real].abs().max())
    effect = float((found - plain)[real].abs().max())
    print(f"error {error:.1e}, effect {effect:.3f}")
    assert error < 1e-4
    assert effect > 1000 * error


def test_refused(one, bridge_of, ask, untyped):
    bridge, prompt, other = bridge_of(one), ask(one), ask(one, first=1)
    inputs = bridge.inputs(prompt)
    hooks = cl.CLVA(tau=1.0).as_hooks(bridge, prompt)
    with pytest.raises(InterventionError, match=r"neither the prompt.*as_hooks\(bridge, prompt\)"):
        bridge.run_with_hooks(**bridge.inputs(other), fwd_hooks=hooks)
    longer = {**inputs, "input": torch.cat([inputs["input"], torch.tensor([[9, 9]])], dim=1)}
    with pytest.raises(InterventionError, match="use_past_kv_cache=True"):
        bridge.run_with_hooks(longer["input"], pixel_values=inputs["pixel_values"], fwd_hooks=hooks)
    bridge.run_with_hooks(**inputs, fwd_hooks=hooks)
    embeds = torch.zeros(*inputs["input"].shape, 32)
    with pytest.raises(InterventionError, match="without the bridge having read the prompt"):
        bridge.run_with_hooks(embeds, fwd_hooks=hooks)
    with pytest.raises(InterventionError, match=r"needs a TransformerBridge.*LlavaFor"):
        cl.CLVA().as_hooks(one.hf_model, prompt)
    with pytest.raises(ParameterError, match="site='decoder'"):
        cl.KnockOut(site="qformer").as_hooks(bridge, prompt)
    with pytest.raises(ParameterError, match="0 to 11"):
        cl.KnockOut(layers=(12,)).as_hooks(bridge, prompt)
    bare = {"input_ids": torch.tensor([[1, 8, 9]])}
    with pytest.raises(InterventionError, match="no image tokens"):
        bridge.run_with_hooks(bare["input_ids"], fwd_hooks=cl.CLVA().as_hooks(bridge, bare))


@pytest.mark.parametrize("method", [cl.DeCo(), cl.VCD(noise_step=400)])
def test_methods_that_edit_logits_are_refused(one, bridge_of, ask, method):
    with pytest.raises(InterventionError, match=r"edits logits.*cl\.intervening"):
        method.as_hooks(bridge_of(one), ask(one))
