"""Contrasts in every way of decoding: caches, batches, beams, sampling, traces, two methods."""

import contrasting
import pytest
import torch
from test_contrast_reference import TextGuidance, decode, lens_for, lens_inputs
from tiny_models import QUESTIONS, lens_of, picture

import clva_lens as cl
from clva_lens.engine.run import _ACTIVE
from clva_lens.models.kv_cache import CACHE, cache_of

STEPS = 4
ATOL = 1e-4
METHODS = {
    "vcd": cl.VCD(noise_step=400),
    "icd": cl.ICD(instruction=contrasting.DISTURBING),
    "guidance": TextGuidance(),
    "pai": cl.PAI(alpha=0.5, guidance=1.7),
    "clva and vcd": cl.compose(cl.CLVA(tau=1.0), cl.VCD(noise_step=400)),
}
CASES = [("llava", name) for name in METHODS] + [("instructblip", n) for n in ("vcd", "icd", "pai")]


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    family, name = request.param
    return lens_for(family), METHODS[name]


DECODED = {}


def decoded(case):
    """What a method decodes of the batch, which several laws compare with: once a case."""
    lens, method = case
    key = lens.hf_model, method.name, str(method)
    if key not in DECODED:
        DECODED[key] = decode(lens, lens_inputs(lens), method)
    return DECODED[key]


def close(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=ATOL)


def single(inputs, item):
    """Return one sample of a batch as a batch of one, without its padding."""
    alone = {name: value[item : item + 1] for name, value in inputs.items()}
    for ids, mask in (
        ("input_ids", "attention_mask"),
        ("qformer_input_ids", "qformer_attention_mask"),
    ):
        if ids in inputs:
            keep = alone[mask][0].bool()
            alone[ids], alone[mask] = alone[ids][:, keep], alone[mask][:, keep]
    return alone


def test_batch_is_singles_at_every_step(case):
    lens, method = case
    inputs = lens_inputs(lens)
    ids, found = decoded(case)
    for item in range(3):
        alone, logits = decode(lens, single(inputs, item), method)
        assert torch.equal(alone[0], ids[item])
        close(logits[0], found[item])


@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}],
    ids=["none", "static"],
)
def test_any_cache(case, options):
    lens, method = case
    inputs = lens_inputs(lens)
    ids, found = decoded(case)
    others, logits = decode(lens, inputs, method, **options)
    assert torch.equal(ids, others)
    close(found, logits)


def test_one_beam_is_greedy(case):
    lens, method = case
    prompt = lens.prompt([picture(i) for i in range(3)], QUESTIONS)
    greedy = cl.generate(lens, prompt, method, cl.Greedy(max_new_tokens=STEPS))
    beam = cl.generate(lens, prompt, method, cl.Beam(num_beams=1, max_new_tokens=STEPS))
    assert [x.tolist() for x in greedy.ids] == [x.tolist() for x in beam.ids]


def test_beams_of_a_batch_are_those_of_singles(case):
    lens, method = case
    inputs = lens_inputs(lens)
    ids, _ = decode(lens, inputs, method, num_beams=4)
    plain, _ = decode(lens, inputs, num_beams=4)
    assert not torch.equal(ids, plain)
    for item in range(3):
        alone, _ = decode(lens, single(inputs, item), method, num_beams=4)
        assert torch.equal(alone[0], ids[item])


def beam_search(lens, inputs, method, **options):
    with torch.inference_mode(), cl.intervening(lens, method):
        return lens.hf_model.generate(
            **inputs,
            max_new_tokens=STEPS,
            do_sample=False,
            num_beams=4,
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )


@pytest.mark.parametrize("family", ["llava", "instructblip"])
def test_beam_scores_are_the_references(family):
    """The score of each best beam is the sum of its tokens' log-probabilities, read from scratch.

    A second cache whose rows were not reordered with the model's would be another beam's.
    """
    lens = lens_for(family)
    inputs = lens_inputs(lens)
    method = cl.VCD(alpha=1.0, beta=0.05, noise_step=400)
    out = beam_search(lens, inputs, method)
    moved = out.beam_indices != torch.arange(3)[:, None] * 4
    assert moved[:, 1:].any()  # the best beams changed places
    second = contrasting.with_noise(inputs, 400, 0)
    for item in range(3):
        ids = out.sequences[item, inputs["input_ids"].shape[1] :]
        own, other = contrasting.both(family, inputs, second, item, ids[:-1])
        room = own - own.amax(dim=1, keepdim=True) - torch.tensor(0.05).double().log()
        logits = contrasting.contrast(own, other, 1.0, "difference")
        scores = logits.masked_fill(room < 0, -torch.inf).log_softmax(dim=1)
        wanted = scores[torch.arange(len(ids)), ids].sum() / len(ids)
        assert float(out.sequences_scores[item]) == pytest.approx(float(wanted), abs=ATOL)


def test_beams_need_the_second_cache_in_order(monkeypatch):
    """The comparison above is not blind: without the reordering, scores are others."""
    from clva_lens.methods.branch import Branch

    lens = lens_for("llava")
    inputs, method = lens_inputs(lens), cl.VCD(alpha=1.0, beta=0.05, noise_step=400)
    right = beam_search(lens, inputs, method).sequences_scores
    monkeypatch.setattr(Branch, "reorder", lambda *_: None)
    wrong = beam_search(lens, inputs, method).sequences_scores
    assert float((right - wrong).abs().max()) > 100 * ATOL


def test_sampling_stays_above_the_cut_off(case):
    """Every sampled token is one that the prompt's own logits allow."""
    lens, method = case
    inputs = lens_inputs(lens)
    torch.manual_seed(0)
    ids, logits = decode(lens, inputs, method, do_sample=True, top_k=0)
    assert logits.gather(2, ids[:, :, None]).isfinite().all()
    assert logits.isinf().any()


def test_generate_samples_by_seed(case):
    lens, method = case
    prompt = lens.prompt([picture(i) for i in range(3)], QUESTIONS)

    def sample(seed):
        how = cl.Sampling(seed=seed, max_new_tokens=5)
        return [x.tolist() for x in cl.generate(lens, prompt, method, how).ids]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_in_traces(case):
    """A trace shows the contrast where the model's output is, and only the model's own pass."""
    lens, method = case
    prompt = lens.prompt([picture(i) for i in range(3)], QUESTIONS)
    with torch.inference_mode(), cl.intervening(lens, method):
        wanted = lens.hf_model(**prompt.inputs).logits
    # As above without gradients, for which torch takes another kernel where there is a mask.
    with torch.inference_mode(), lens.trace(prompt):
        cl.intervene(method)
        logits = lens.output.logits.save()
    assert torch.equal(logits, wanted)
    ids, _ = decoded(case)
    with lens.generate(prompt, max_new_tokens=STEPS, do_sample=False) as tracer:
        cl.intervene(method)
        result = tracer.result.save()
    assert torch.equal(result[:, prompt.answer_start :], ids)


def test_a_lens_in_a_trace_is_let_through():
    """What a user sends through the unembedding is no output of the model."""
    lens, method = lens_of("full", "sdpa"), METHODS["vcd"]
    prompt = lens.prompt(picture(0), QUESTIONS[0])
    found = []
    for methods in ((), (method,)):
        with lens.trace(prompt):
            cl.intervene(*methods)
            hidden = lens.model.language_model.layers[6].output
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            found.append(lens.lm_head(lens.model.language_model.norm(hidden)).save())
            lens.output.logits.save()
    assert torch.equal(*found)


@pytest.mark.parametrize("name", METHODS)
def test_a_loop_by_hand(name):
    """Without generate: the cache comes from the model's output."""
    lens, method = lens_for("llava"), METHODS[name]
    inputs = lens_inputs(lens)
    ids, wanted = decode(lens, inputs, method)
    mask, found = inputs["attention_mask"], []
    with torch.inference_mode(), cl.intervening(lens, method):
        out = lens.hf_model(**inputs, use_cache=True)
        for step in range(STEPS):
            found.append(out.logits[:, -1])
            mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
            out = lens.hf_model(
                input_ids=ids[:, step : step + 1],
                attention_mask=mask,
                **{CACHE: cache_of(out)},
            )
    close(torch.stack(found, dim=1), wanted)


def test_margins_are_those_before_the_cut_off():
    """Where "yes" or "no" is cut off, the margin stays a number."""
    lens = lens_of("full", "sdpa")
    prompt = lens.prompt([picture(i) for i in range(3)], QUESTIONS)
    strict, loose = cl.VCD(noise_step=400, beta=1.0), cl.VCD(noise_step=400, beta=0)
    how = cl.Greedy(max_new_tokens=2)
    cut, uncut = (cl.generate(lens, prompt, m, how).margins for m in (strict, loose))
    plain = cl.generate(lens, prompt, None, how).margins
    assert cut == pytest.approx(uncut, abs=ATOL)
    assert max(abs(a - b) for a, b in zip(cut, plain, strict=True)) > 0.05


def test_the_strictest_cut_off_is_greedy(case):
    """β = 1 leaves the likeliest token of the unedited logits alone."""
    lens, _ = case
    inputs = lens_inputs(lens)
    plain, _ = decode(lens, inputs)
    for method in (cl.VCD(beta=1.0), cl.ICD(instruction="you are near", beta=1.0)):
        assert torch.equal(decode(lens, inputs, method)[0], plain)


def test_strength_0_has_no_cut_off_either(case):
    lens, _ = case
    inputs = lens_inputs(lens)
    _, plain = decode(lens, inputs)
    for method in (cl.VCD(alpha=0), cl.ICD(alpha=0), cl.compose(cl.VCD(alpha=0), cl.ICD(alpha=0))):
        assert torch.equal(decode(lens, inputs, method)[1], plain)


def test_two_prompts_in_one_block(case):
    lens, method = case
    inputs = lens_inputs(lens)
    other = single(inputs, 1)
    with torch.inference_mode():
        with cl.intervening(lens, method):
            lens.hf_model.generate(**inputs, max_new_tokens=2, do_sample=False)
            found = lens.hf_model(**other).logits
        with cl.intervening(lens, method):
            wanted = lens.hf_model(**other).logits
    assert torch.equal(found, wanted)
    assert not _ACTIVE


def test_seeds_are_other_noise():
    lens = lens_of("full", "sdpa")
    inputs = lens_inputs(lens)
    one, same, other = (
        decode(lens, inputs, cl.VCD(seed=seed, beta=0), max_new_tokens=1)[1] for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert float((one - other).abs().max()) > 0.05
