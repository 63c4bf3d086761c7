"""Patches of text rows go through the model together: the same numbers, by what is read once.

The oracle is a sweep whose passes are whole ones, which the refusal to share them leaves.
"""

from contextlib import contextmanager

import pytest
import torch
from test_patching import pair, patch
from tiny_models import QUESTIONS, picture

import clva_lens as cl
from clva_lens.ground.errors import InterventionError
from clva_lens.lens import patch_sweep
from clva_lens.lens.patch_sweep import ROWS_AT_ONCE
from clva_lens.lens.prefix import read
from clva_lens.models.kv_cache import CACHE, cache_of

ATOL, DEPTH, HEADS = 1e-5, 12, 4
HEADS_OF_LAST = {"spans": "last", "part": "z", "each": "head"}


class Counts:
    """How often the vision tower ran, and how many rows each pass of the decoder read."""

    def __init__(self):
        self.pictures, self.passes = 0, []

    @property
    def rows(self):
        return sum(batch * length for batch, length in self.passes)


@contextmanager
def counting(model):
    counts, inner = Counts(), model.hf_model.model

    def tower(*_):
        counts.pictures += 1

    def layer(_, args, kwargs):
        counts.passes.append(tuple((args[0] if args else kwargs["hidden_states"]).shape[:2]))

    hooks = [
        inner.vision_tower.register_forward_hook(tower),
        inner.language_model.layers[0].register_forward_pre_hook(layer, with_kwargs=True),
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture
def swept(one, monkeypatch):
    """Sweep twice, together and by whole passes; return both results and what each cost."""
    assert patch_sweep.why_unshared(one, None) is None  # the probe is not counted

    def make(source, target, **options):
        found = []
        for shared in (True, False):
            with monkeypatch.context() as change, counting(one) as counts:
                if not shared:
                    change.setattr(patch_sweep, "why_unshared", lambda *_: "not now")
                found.append((cl.patch_activations(one, source, target, **options), counts))
        return found

    return make


def same(found, wanted):
    """The numbers agree, by far less than patches move them."""
    error = max(
        float((getattr(found, name) - getattr(wanted, name)).abs().max())
        for name in ("values", "target", "source")
    )
    effect = float(wanted.effect.abs().max())
    print(f"error {error:.1e}, effect {effect:.2g}, spread {float(wanted.values.std()):.2g}")
    assert error < min(ATOL, effect / 100)
    assert (found.columns, found.layers) == (wanted.columns, wanted.layers)


def test_every_head_for_two_pictures(one, swept):
    """Each head of the last row takes one row, and all layers' fit into two passes."""
    source, target = pair(one)
    length, text = target["input_ids"].shape[1], int(target.spans.text.sum())
    (found, counts), (wanted, whole) = swept(source, target, **HEADS_OF_LAST)
    same(found, wanted)
    assert whole.pictures == 2 + DEPTH * HEADS
    assert counts.pictures == 2
    rest = DEPTH * HEADS - ROWS_AT_ONCE
    reads = [(1, length), (1, length), (1, text), (ROWS_AT_ONCE, 1), (rest, 1)]
    assert counts.passes == reads
    print(f"rows {counts.rows} of {whole.rows}")


def test_under_a_method_that_reads_the_text(one, swept):
    """CLVA reads the text of a pass, so that is not cut."""
    source, target = pair(one)
    length, text = target["input_ids"].shape[1], int(target.spans.text.sum())
    options = HEADS_OF_LAST | {"layers": [6, 8], "method": cl.CLVA(tau=1.0)}
    (found, counts), (wanted, _) = swept(source, target, **options)
    same(found, wanted)
    assert counts.passes == [(1, length), (1, length), (1, text), (2 * HEADS, text)]


def test_one_position_after_the_other(one, swept):
    """Each position is read from itself on."""
    source, target = pair(one)
    (found, counts), (wanted, _) = swept(
        source, target, spans="text", each="position", layers=[1, 4, 7]
    )
    same(found, wanted)
    text = int(target.spans.text.sum())
    assert counts.passes[3:] == [(3, rest) for rest in range(text, 0, -1)]


@pytest.mark.parametrize("part", ["resid_pre", "attn_out", "mlp_out", "resid_post", "z"])
def test_of_a_mixed_sweep_what_begins_in_the_text(one, swept, part):
    """Patches of the picture's rows are whole passes still; all values stand in their places."""
    source, target = pair(one)
    spans, layers = ("last", "image", "text"), [2, 9]
    (found, counts), (wanted, _) = swept(source, target, spans=spans, part=part, layers=layers)
    same(found, wanted)
    assert counts.pictures == 2 + len(layers)
    assert torch.equal(found.values[:, 1], wanted.values[:, 1])


@pytest.mark.parametrize("method", [None, cl.CLVA(tau=1.0)], ids=["plain", "CLVA"])
def test_a_batch_of_questions_of_several_lengths(one, swept, method):
    """A metric that counts on the batch gets it as it is; one source serves all, or one each."""
    _, target = pair(one, 3)

    def metric(logits):
        batch = len(logits)
        return logits[torch.arange(batch), 0, torch.tensor([8, 9, 10])[:batch]]

    for source in (pair(one, 3)[0], pair(one)[0]):
        options = HEADS_OF_LAST | {"layers": [3, 8, 10], "method": method, "metric": metric}
        (found, counts), (wanted, _) = swept(source, target, **options)
        same(found, wanted)
        assert counts.pictures == 2
        assert [batch for batch, _ in counts.passes[3:]] == [30, 6]


def test_impossible_tokens_are_no_reason_to_read_again(one, swept):
    source, target = pair(one)
    options = {"spans": "last", "method": cl.DeCo(), "layers": [3, 10]}
    (found, counts), (wanted, _) = swept(
        source, target, metric=lambda logits: logits[0, 0].exp().topk(1).values.log(), **options
    )
    same(found, wanted)
    assert counts.pictures == 2


def test_fewer_at_once_where_memory_ends(one, swept, monkeypatch):
    """The number is halved until there is room; without any, passes are whole ones."""
    source, target = pair(one)
    fork, most = patch_sweep.Prefix.fork, [8]

    def small(self, pictures):
        if len(pictures) > most[0]:
            raise torch.OutOfMemoryError("no room")
        return fork(self, pictures)

    monkeypatch.setattr(patch_sweep.Prefix, "fork", small)
    (found, counts), (wanted, _) = swept(source, target, **HEADS_OF_LAST)
    same(found, wanted)
    assert counts.passes[3:] == [(8, 1)] * 6
    most[0] = 0
    (found, counts), (wanted, _) = swept(source, target, spans="last", layers=[3, 8])
    assert torch.equal(found.values, wanted.values)


def test_whole_passes_where_the_beginning_is_not_the_same(one, swept):
    """A method that edits it, a block of the caller's own, a hook that counts on whole passes."""
    source, target = pair(one)
    length = target["input_ids"].shape[1]
    options = {"spans": "last", "layers": [3, 9]}

    def check(**more):
        (found, counts), (wanted, _) = swept(source, target, **options | more)
        assert torch.equal(found.values, wanted.values)
        assert counts.passes.count((1, length)) >= 2 + len(options["layers"])
        return found.values

    moved = check(method=cl.MemVR())
    with cl.intervening(one, cl.KnockOut()):
        blocked = check()

    def push(_, args, output):
        output[:, 5:8] += 1.0
        return output

    def pick(_, args, output):
        output[:, length - 1] += 1.0
        return output

    plain = cl.patch_activations(one, source, target, **options).values
    for hook in (push, pick):
        handle = one.hf_model.model.language_model.layers[1].register_forward_hook(hook)
        try:
            hooked = check()
        finally:
            handle.remove()
        assert float((hooked - plain).abs().max()) > 1e-3
    assert float((moved - plain).abs().max()) > 1e-4
    assert float((blocked - plain).abs().max()) > 1e-3


def test_a_model_without_a_processor_is_run_whole(one):
    source, target = pair(one)
    options = {"spans": "last", "layers": [3, 9], "metric": lambda logits: logits[:, 0, 8]}
    found = cl.patch_activations(one.hf_model, source, target, **options)
    same(found, cl.patch_activations(one, source, target, **options))


# ── one patch of text rows, where a picture was read before its question ──


@pytest.mark.parametrize("span", ["text", "last"])
@pytest.mark.parametrize("part", ["resid_pre", "z"])
def test_a_patch_onto_a_picture_that_was_read(one, span, part):
    source, target = pair(one)
    method = patch(one, source, span=span, part=part, layers=[8])
    asked = read(one, picture(0)).ask(QUESTIONS[0])
    with torch.inference_mode(), cl.intervening(one, method):
        whole = one.hf_model(**target).logits[:, -1]
        found = one.hf_model(**asked).logits[:, -1]
    with torch.inference_mode():
        plain = one.hf_model(**target).logits[:, -1]
    assert float((found - whole).abs().max()) < ATOL < float((whole - plain).abs().max()) / 1e3


def test_a_later_turn_is_not_patched(one):
    source, target = pair(one)
    method = patch(one, source, span="last", layers=[8])
    with torch.inference_mode(), cl.intervening(one, method):
        cache = cache_of(one.hf_model(**target, use_cache=True))
        one.hf_model(input_ids=torch.tensor([[10]]), **{CACHE: cache})
        with pytest.raises(InterventionError, match="a later turn of a conversation"):
            one.hf_model(input_ids=torch.tensor([[11, 12]]), **{CACHE: cache})


def test_a_metric_in_float64_keeps_its_digits(one):
    """In float32 numbers near 4,096 are 4.9e-4 apart: a sweep would seem to be off by it."""
    source, target = pair(one)
    options = {"spans": "last", "layers": [3, 8]}

    def metric(logits):
        return logits[:, 0, 8].double()

    near = cl.patch_activations(one, source, target, metric=metric, **options)
    far = cl.patch_activations(one, source, target, metric=lambda x: 4096 + metric(x), **options)
    error = float((far.effect - near.effect).abs().max())
    print(f"error {error:.1e}, effect {float(near.effect.abs().max()):.1e}")
    assert near.values.dtype == far.target.dtype == torch.float64
    assert error < 1e-11 < float(near.effect.abs().max()) / 100
    single = cl.patch_activations(one, source, target, metric=lambda x: x[:, 0, 8], **options)
    assert single.values.dtype == torch.float32
