"""Head ablation against forward hooks on the input of each output projection."""

from contextlib import contextmanager

import pytest
import torch
from test_state import state
from tiny_models import QUESTIONS, blip_of, lens_of, picture

import clva_lens as cl
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.models.kv_cache import CACHE, cache_of

HEADS = {3: [0, 2], 6: [1], 9: [0, 1, 2, 3]}
MASK = torch.zeros(12, 4, dtype=torch.bool)
for _layer, _heads in HEADS.items():
    MASK[_layer, _heads] = True
STEPS = 4


def same_length(lens, count=3):
    """A batch of prompts of one length: one question, several pictures."""
    return lens.prompt([picture(i) for i in range(count)], [QUESTIONS[0]] * count)


def rows_of(prompt, rows):
    """The prompt's rows that are meant, from the token ids alone."""
    ids, mask = prompt.inputs["input_ids"], prompt.inputs["attention_mask"].bool()
    last_image = torch.where(ids == 5, torch.arange(ids.shape[1]), -1).amax(dim=1)
    text = (torch.arange(ids.shape[1]) > last_image[:, None]) & mask
    if rows == "all":
        return mask
    if rows == "last":
        text[:, :-1] = False
    return text


@contextmanager
def by_hand(lens, change):
    """Change z [batch, query, head, width] in front of o_proj: ``change(layer, z)`` in place."""
    handles = []
    for layer, block in enumerate(lens.hf_model.get_decoder().layers):

        def hook(module, args, layer=layer):
            z = args[0].clone().unflatten(-1, (4, -1))
            change(layer, z)
            return (z.flatten(-2),)

        handles.append(block.self_attn.o_proj.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits(lens, prompt, *methods):
    with torch.inference_mode(), cl.intervening(lens.hf_model, *methods):
        return lens.hf_model(**prompt.inputs).logits


def decode(lens, prompt, *methods, **options):
    with torch.inference_mode(), cl.intervening(lens.hf_model, *methods):
        out = lens.hf_model.generate(
            **prompt.inputs,
            max_new_tokens=STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
    return torch.stack(out.logits, dim=1)


def replacing(rows, value):
    """A change that puts ``value(layer, head, z)`` into the chosen heads and rows."""

    def change(layer, z):
        before = z.clone()
        for head in HEADS.get(layer, ()):
            new = value(layer, head, before)
            where = rows if z.shape[1] > 1 else torch.ones(z.shape[:2], dtype=torch.bool)
            z[:, :, head][where] = new.expand_as(before[:, :, head])[where]

    return change


@pytest.fixture(scope="module")
def means():
    made = {}

    def make(lens, ask):
        if id(lens) not in made:
            made[id(lens)] = cl.head_means(lens, [ask(lens, 3), ask(lens, first=1)])
        return made[id(lens)]

    return make


def donors_of(seed, batch):
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed)).tolist()
    return [order[order.index(i) - 1] for i in range(batch)]


def case(lens, ask, means, mode, rows):
    """Return (prompt, method, the same by hand)."""
    prompt = same_length(lens) if mode == "resample" else ask(lens, 3)
    reference = means(lens, ask) if mode == "mean" else None
    method = cl.AblateHeads(heads=MASK, mode=mode, rows=rows, reference=reference, seed=5)
    value = {
        "zero": lambda layer, head, z: torch.zeros(()),
        "mean": lambda layer, head, z: reference.values[layer, head],
        "resample": lambda layer, head, z: z[donors_of(5, len(z)), :, head],
    }[mode]
    return prompt, method, replacing(rows_of(prompt, rows), value)


@pytest.mark.parametrize("rows", ["text", "last", "all"])
@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
def test_is_a_hook_on_the_output_projection(lens, ask, means, mode, rows):
    prompt, method, change = case(lens, ask, means, mode, rows)
    real = prompt.inputs["attention_mask"].bool()
    found, plain = logits(lens, prompt, method)[real], logits(lens, prompt)[real]
    with by_hand(lens, change):
        expected = logits(lens, prompt)[real]
    error, effect = float((found - expected).abs().max()), float((found - plain).abs().max())
    print(f"{mode}, {rows}: error {error:.1e}, effect {effect:.3f}")
    assert error < 1e-5
    assert effect > 0.05


@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
def test_decoding(lens, ask, means, mode):
    """At each step the new row is replaced too, with and without a cache."""
    prompt, method, change = case(lens, ask, means, mode, "text")
    found = decode(lens, prompt, method)
    with by_hand(lens, change):
        expected = decode(lens, prompt)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    uncached = decode(lens, prompt, method, use_cache=False)
    torch.testing.assert_close(uncached, found, rtol=0, atol=1e-4)


def test_with_clva_in_one_run(lens, ask):
    """CLVA reads and edits attention, the ablation what comes of it: hooks around CLVA agree."""
    prompt, clva = ask(lens, 3), cl.CLVA(tau=1.0)
    method = cl.AblateHeads(heads=MASK)
    change = replacing(rows_of(prompt, "text"), lambda layer, head, z: torch.zeros(()))
    found = logits(lens, prompt, cl.compose(clva, method))
    with by_hand(lens, change):
        expected = logits(lens, prompt, clva)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert torch.equal(logits(lens, prompt, method, clva), found)
    for alone in (clva, method):
        assert float((found - logits(lens, prompt, alone)).abs().max()) > 0.02


def test_knock_out_and_ablation_in_one_trace(one, ask):
    prompt = ask(one, 3)
    both = (cl.KnockOut(heads=MASK), cl.AblateHeads(heads=MASK))
    with one.trace(prompt):
        cl.intervene(*both)
        found = one.output.logits.save()
    torch.testing.assert_close(found, logits(one, prompt, *both), rtol=0, atol=1e-6)
    # What a head looks at does not matter once all its output is gone in the same rows.
    alone, real = logits(one, prompt, both[1]), prompt.inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], alone[real], rtol=0, atol=1e-5)


def test_no_heads_is_bit_identical(lens, ask):
    prompt = ask(lens, 3)
    none = cl.AblateHeads(heads=torch.zeros(12, 4, dtype=torch.bool))
    assert torch.equal(logits(lens, prompt, none), logits(lens, prompt))
    nowhere = cl.AblateHeads(layers=())
    assert torch.equal(logits(lens, prompt, nowhere), logits(lens, prompt))


@pytest.mark.parametrize("kind", ["sensitive", "insensitive"])
def test_a_class_is_the_mask_of_the_trace(lens, ask, kind):
    prompt = ask(lens)
    heads = getattr(cl.trace_attention(lens, prompt).heads(), kind)
    by_class = logits(lens, prompt, cl.AblateHeads(heads=kind, layers=(6,)))
    by_mask = logits(lens, prompt, cl.AblateHeads(heads=heads, layers=(6,)))
    assert torch.equal(by_class, by_mask)
    assert not torch.equal(by_class, logits(lens, prompt))


def test_means_by_hand(lens, ask):
    """The means over the text rows of all prompts, from the inputs of the output projections."""
    prompts, kept = [ask(lens, 3), ask(lens, first=1)], [[] for _ in range(12)]
    for prompt in prompts:
        rows = rows_of(prompt, "text")
        with by_hand(lens, lambda layer, z, rows=rows: kept[layer].append(z[rows])):
            logits(lens, prompt)
    means = cl.head_means(lens, prompts)
    expected = torch.stack([torch.cat(layer).mean(dim=0) for layer in kept])
    torch.testing.assert_close(means.values, expected, rtol=0, atol=1e-5)
    assert means.rows == sum(len(one) for one in kept[0])
    assert repr(means) == (
        f"HeadMeans(decoder: 12 layers × 4 heads of width 8, over {means.rows} rows)"
    )


@pytest.mark.parametrize("site", ["qformer", "decoder"])
def test_in_an_instructblip(site, ask):
    lens = blip_of("sdpa")
    prompt = ask(lens, 3)
    means = cl.head_means(lens, [prompt], site=site)
    assert means.values.shape == ((6, 4, 8) if site == "qformer" else (12, 4, 8))
    plain = logits(lens, prompt)
    for more in ({"mode": "zero"}, {"mode": "mean", "reference": means}):
        moved = logits(lens, prompt, cl.AblateHeads(site=site, **more)) - plain
        assert float(moved.abs().max()) > 0.01


def test_state_after_an_error(lens, ask):
    before = state(lens.hf_model)
    method = cl.AblateHeads(heads=MASK, mode="resample")
    with pytest.raises(ParameterError, match=r"batch has 1.*Pass several"):
        logits(lens, ask(lens), method)
    with pytest.raises(InterventionError, match=r"different places.*same length.*rows='last'"):
        logits(lens, ask(lens, 3), method)
    assert state(lens.hf_model) == before
    logits(lens, ask(lens, 3), cl.AblateHeads(heads=MASK, mode="resample", rows="last"))


def test_nobody_is_their_own_donor():
    for seed in range(20):
        for batch in (2, 3, 5):
            donors = donors_of(seed, batch)
            assert sorted(donors) == list(range(batch))
            assert all(i != donor for i, donor in enumerate(donors))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"mode": "none"}, r"mode must be 'zero'.*'none'"),
        ({"rows": "image"}, r"rows must be 'text', 'last' or 'all'"),
        ({"mode": "mean"}, r"the mean needs its reference.*head_means\(model, prompts\)"),
        ({"heads": "all"}, r"heads must be 'sensitive'"),
    ],
)
def test_refused(untyped, parameters, message):
    with pytest.raises(ParameterError, match=message):
        cl.AblateHeads(**parameters)


def test_does_not_fit(one, ask):
    means = cl.head_means(blip_of("sdpa"), [ask(blip_of("sdpa"))])
    for method, message in (
        (cl.AblateHeads(mode="mean", reference=means), r"\(6, 4\).*'qformer'.*decoder has"),
        (cl.AblateHeads(heads=torch.ones(2, 4, dtype=torch.bool)), r"heads is for \(2, 4\)"),
    ):
        with pytest.raises(ParameterError, match=message):
            logits(one, ask(one), method)
    with pytest.raises(ParameterError, match="Pass some prompts"):
        cl.head_means(one, [])


def test_a_class_that_joins_after_the_prompt(ask):
    lens = lens_of("full", "sdpa")
    inputs = ask(lens).inputs
    with torch.inference_mode(), cl.intervening(lens.hf_model, cl.KnockOut(layers=[9])):
        cache = cache_of(lens.hf_model(**inputs, use_cache=True))
        with (
            cl.intervening(lens.hf_model, cl.AblateHeads()),
            pytest.raises(InterventionError, match=r"read already.*pass a mask"),
        ):
            lens.hf_model(input_ids=inputs["input_ids"][:, -1:], **{CACHE: cache})
