"""ClearSight, PAI, VisFlow and the shuffled control: what the laws and the reference leave open."""

from dataclasses import replace

import pytest
import reference
import torch
from test_reference import compare
from tiny_models import lens_of

import clva_lens as cl
from clva_lens.methods.scores import released_layer
from clva_lens.methods.target import Shape, Target
from clva_lens.models.kv_cache import CACHE, cache_of

CLVA = cl.CLVA(tau=1.0)


def logits(model, inputs, *methods):
    with torch.inference_mode(), cl.intervening(model, *methods):
        return model(**inputs).logits


class Deep(Target):
    """A decoder of some depth, and a Q-Former with a layer of the picture in every second one."""

    model = None  # what VisFlow reads pictures again with

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def at(self, site: str | None = None) -> Shape:
        if site == "qformer":
            return Shape("qformer", tuple(range(0, self.depth, 2)), self.depth, 4, ordered=False)
        return Shape("decoder", tuple(range(self.depth)), self.depth, 4)


def layers(method, depth):
    return list(method.sessions(Deep(depth))[0].layers)


def test_layers_of_the_releases():
    """LLaVA-1.5-7B has 32 layers, 13B has 40: hard-coded layers stay; fewer layers scale."""
    assert layers(cl.ClearSight(), 32) == layers(cl.ClearSight(), 40) == [9, 10, 11, 12, 13, 14]
    assert layers(cl.ClearSight(), 12) == [3, 4, 5]  # 9/32 and 15/32 of 12: 3.4 and 5.6
    assert layers(cl.ClearSight(site="qformer"), 12) == [4]
    assert layers(cl.ClearSight(), 2) == [1]
    assert layers(cl.PAI(), 32) == list(range(2, 32))
    assert layers(cl.PAI(site="qformer"), 12) == [2, 4, 6, 8, 10]
    whole = cl.VisFlow().sessions(Deep(32))[0]
    assert whole.token_layers == list(range(1, 32))
    assert whole.system_layers == list(range(32))
    assert whole.text_layers == list(range(8))
    assert [released_layer(8, depth) for depth in (12, 32, 40)] == [3, 8, 8]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cl.ClearSight(variant="published"), r"variant must be 'released' or 'paper'"),
        (lambda: cl.ClearSight(enhance=-1), r"enhance must be a finite factor >= 0, but is -1"),
        (lambda: cl.ClearSight(suppress=float("inf")), r"suppress must be a finite factor"),
        (lambda: cl.PAI(guidance=-1), r"guidance must be a finite number >= 0, but is -1\. Pass"),
        (lambda: cl.PAI(guidance=float("inf")), r"guidance must be a finite number"),
        (lambda: cl.PAI(beta=1.5), r"beta must be in \[0, 1\], but is 1\.5"),
        (lambda: layers(cl.PAI(layers=[12], guidance=1.1), 12), r"layers names layer 12.*0 to 11"),
        (
            lambda: cl.Shuffled(cl.PAI(guidance=1.1)).sessions(
                Target(lens_of("full", "sdpa").hf_model)
            ),
            r"'pai' does not act by biases",
        ),
        (lambda: cl.PAI(alpha=float("nan")), r"alpha must be finite, but is nan"),
        (lambda: cl.VisFlow(salient=0), r"salient must be a finite factor > 0, but is 0"),
        (lambda: cl.VisFlow(sink=-1), r"sink must be a finite factor > 0"),
        (lambda: cl.VisFlow(text=1), r"text must be in \[0, 1\), but is 1"),
        (lambda: cl.VisFlow(system=-0.1), r"system must be in \[0, 1\)"),
        (lambda: cl.VisFlow(text_threshold=float("nan")), r"text_threshold must be a fraction"),
        (lambda: layers(cl.ClearSight(layers=[40]), 32), r"layers names layer 40.*0 to 31"),
        (lambda: layers(cl.PAI(layers=[3], site="qformer"), 12), r"layers names layer 3.*0, 2"),
        (lambda: layers(cl.Shuffled(cl.AblateHeads()), 12), r"'ablation' does not act by biases"),
        (
            lambda: cl.Shuffled(cl.VCD()).sessions(Target(lens_of("full", "sdpa").hf_model)),
            r"'vcd' does not act by biases",
        ),
        (lambda: layers(cl.Shuffled(cl.compose()), 12), r"'composed' does not act by biases"),
    ],
)
def test_misuse(untyped, make, message):
    with pytest.raises(cl.ClvaLensError, match=message):
        make()


@pytest.mark.parametrize(
    "method", [cl.ClearSight(variant="paper"), cl.VisFlow()], ids=["clearsight", "visflow"]
)
def test_joining_after_the_prompt_is_refused(one, ask, method):
    model, inputs = one.hf_model, ask(one).inputs
    with torch.inference_mode(), cl.intervening(model, cl.KnockOut()):
        first = model(**inputs, use_cache=True)
        with (
            cl.intervening(model, method),
            pytest.raises(cl.ClvaLensError, match=r"prompt had been read already"),
        ):
            model(input_ids=inputs["input_ids"][:, -1:], **{CACHE: cache_of(first)})


def test_small_pieces_of_rows_change_nothing(one, ask, monkeypatch):
    methods = (cl.ClearSight(variant="paper"), cl.PAI(), cl.VisFlow())
    inputs = ask(one, 3).inputs
    expected = logits(one.hf_model, inputs, *methods)
    monkeypatch.setattr("clva_lens.engine.session.SCORES_AT_ONCE", 1)
    found = logits(one.hf_model, inputs, *methods)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_score_edits_add_up_in_any_order(one, ask):
    """They scale what the model forms, so neither sees the other's bias at the same layer."""
    clear, pai = cl.ClearSight(layers=(4,), enhance=1.5), cl.PAI(layers=(4,))
    inputs = ask(one, 3).inputs
    both = logits(one.hf_model, inputs, clear, pai)
    other = logits(one.hf_model, inputs, pai, clear)
    torch.testing.assert_close(both, other, rtol=0, atol=2e-5)
    for alone in (clear, pai):
        assert float((both - logits(one.hf_model, inputs, alone)).abs().max()) > 0.02


@pytest.mark.parametrize("other", [cl.ClearSight(), cl.PAI(), cl.VisFlow()], ids=lambda m: m.name)
def test_composition_with_clva_is_neither_alone(one, ask, other):
    """Both take part, also in one nnsight trace; an edit at an anchor layer counts by the order."""
    prompt = ask(one, 3)
    inputs = prompt.inputs
    both = logits(one.hf_model, inputs, cl.compose(CLVA, other))
    for alone in (CLVA, other):
        assert float((both - logits(one.hf_model, inputs, alone)).abs().max()) > 0.02
    with torch.inference_mode(), one.trace(prompt):
        cl.intervene(CLVA)
        cl.intervene(other)
        traced = one.output.logits.save()
    torch.testing.assert_close(traced, both, rtol=0, atol=1e-5)
    strong = {"clearsight": {"enhance": 0.0, "layers": (4,)}, "pai": {"alpha": 5.0}}
    changed = replace(other, **strong.get(other.name, {}))
    before = logits(one.hf_model, inputs, changed, CLVA)
    after = logits(one.hf_model, inputs, CLVA, changed)
    assert float((before - after).abs().max()) > 1e-2


@pytest.mark.parametrize("heads", ["full", "grouped"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_shuffled_clva_is_the_references(heads, kernel, exact_of, ask):
    """Each image token gets another one's factor, in the prompt's rows of every layer."""
    lens = lens_of(heads, kernel)
    inputs = ask(lens, 3).inputs
    method = cl.Shuffled(CLVA, seed=3)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3)).tolist()
    assert order != sorted(order)
    edit = reference.Clva(tau=1.0, order=tuple(order))
    error, effect, results = compare(lens.hf_model, exact_of(heads), inputs, [(method, edit)])
    print(f"shuffled: error {error:.1e}, effect {effect:.3f}")
    assert min(result.margin for result in results) > 1e-4
    assert error < 1e-4
    assert effect > max(0.05, 100 * error)
    whole = logits(lens.hf_model, inputs, method)
    others = (CLVA, cl.Shuffled(CLVA, seed=4))
    assert all(float((whole - logits(lens.hf_model, inputs, m)).abs().max()) > 0.05 for m in others)


@pytest.mark.parametrize("method", [cl.PAI(), cl.ClearSight(), cl.VisFlow()], ids=lambda m: m.name)
def test_other_methods_can_be_shuffled(one, ask, method):
    inputs = ask(one, 3).inputs
    bare, whole = logits(one.hf_model, inputs), logits(one.hf_model, inputs, method)
    shuffled = logits(one.hf_model, inputs, cl.Shuffled(method, seed=1))
    for other in (bare, whole):
        assert float((shuffled - other).abs().max()) > 0.02


def test_shuffling_an_even_bias_changes_nothing(one, ask):
    inputs = ask(one, 3).inputs
    even = cl.KnockOut(rows="last")
    with pytest.warns(UserWarning, match="same bias on all image tokens") as told:
        found = logits(one.hf_model, inputs, cl.Shuffled(even))
    assert len(told) == 1
    assert torch.equal(found, logits(one.hf_model, inputs, even))
