"""Post-hoc debiasing is the released formula, written out in float64 with matrices, on logits."""

from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from test_contrast_reference import decode, lens_inputs
from tiny_models import QUESTIONS, blip_of, double_of, lens_of, picture

import clva_lens as cl
from clva_lens.benchmarks.base import BENCHMARKS
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.lens.prefix import read
from clva_lens.lens.sharing import why_unshared
from clva_lens.methods.post_hoc import FLOOR, _Divided, _words
from clva_lens.methods.target import Target
from clva_lens.models.answer_tokens import AnswerTokens

WAYS = ("nothing", "unknown", "both")
ERROR = 2e-4


@pytest.fixture(scope="module")
def asked():
    """The tiny LLaVA, three prompts of two lengths, and their plain ids and logits."""
    lens = lens_of("full", "sdpa")
    inputs = lens_inputs(lens)
    return lens, inputs, *decode(lens, inputs)


@pytest.fixture(scope="module")
def words(asked):
    found = _words(Target(asked[0].hf_model, asked[0].processor))
    tokenizer = asked[0].processor.tokenizer
    assert found == tuple([tokenizer.convert_tokens_to_ids(word)] for word in ("yes", "no"))
    return found


def row(ids, pixels=None):
    """A prompt's last row of logits, in float64, by the reference."""
    features = None if pixels is not None else torch.empty(0, 32, dtype=torch.float64)
    given = torch.zeros(3, 1, 1) if pixels is None else pixels
    return reference.run(double_of("full"), ids, given, (), len(ids), features).logits[-1]


def logits_of(asked, item, way=None):
    """The logits of one prompt with its picture, or of each prompt without."""
    lens, inputs = asked[:2]
    ids, pixels, _ = reference.rows_of(inputs, item)
    if way is None:
        return row(ids, pixels)
    unknown = ids.new_tensor([lens.processor.tokenizer.unk_token_id])
    first, none = ids.tolist().index(5), ids[ids != 5]
    made = {"nothing": none, "unknown": torch.cat([none[:first], unknown, none[first:]])}
    return [row(made[one]) for one in (WAYS[:2] if way == "both" else [way])]


def released(own, others, temperature, words):
    """Log-odds of yes as eval_pope_calibrate.py has them: W = diag(c + 1e-4)⁻¹ on p, normalised."""

    def both(logits):
        chances = np.exp(logits.numpy() / temperature - np.max(logits.numpy() / temperature))
        chances /= chances.sum()
        return np.array([max(chances[i] for i in ids) for ids in words])

    p = both(own)
    c = sum(both(one) for one in others)
    c = c / c.sum() + 1e-4
    calibrated = np.linalg.inv(np.identity(2) * c) @ (p / p.sum())[:, None]
    calibrated /= calibrated.sum()
    return float(np.log(calibrated[0, 0] / calibrated[1, 0]))


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("way", WAYS)
def test_it_is_the_released_formula(asked, words, way, temperature):
    lens, inputs, ids, plain = asked
    method = cl.PostHocDebias(without=way, temperature=temperature)
    found_ids, found = decode(lens, inputs, method)
    error, effect, bound = 0.0, [], 0.0
    most = temperature * np.log((1 + FLOOR) / FLOOR)
    for item in range(len(ids)):
        others = logits_of(asked, item, way)
        wanted = temperature * released(logits_of(asked, item), others, temperature, words)
        ((yes,), (no,)) = words
        margin = float(found[item, 0, yes] - found[item, 0, no])
        before = float(plain[item, 0, yes] - plain[item, 0, no])
        error = max(error, abs(margin - wanted))
        effect.append(abs(margin - before))
        bound = max(bound, effect[-1] / most)
        rest = [i for i in range(64) if i not in (yes, no)]
        assert torch.equal(found[item, 0, rest], plain[item, 0, rest])
        same = found_ids[item, 0] == ids[item, 0]
        assert not same or torch.equal(found_ids[item], ids[item])
        if same:
            assert float((found[item, 1:] - plain[item, 1:]).abs().max()) < 1e-5
    print(f"{way}, T={temperature}: error {error:.1e}, effect up to {max(effect):.2f}")
    assert error < ERROR
    assert max(effect) > 1000 * error
    assert bound < 1 + 1e-5


def test_a_prior_of_one_half_changes_nothing(words):
    generator = torch.Generator().manual_seed(0)
    own, other = (torch.randn(5, 64, generator=generator) * 3 for _ in range(2))
    ((yes,), (no,)) = words
    other[:, yes] = other[:, no]
    for temperature in (0.2, 1.0):
        rule = _Divided(words, temperature)
        assert torch.equal(rule.uncut(own, other), own)
        assert torch.equal(rule.uncut(own, other, token=2), own)
        other[0, yes] += 1
        assert not torch.equal(rule.uncut(own, other), own)
        assert torch.equal(rule.uncut(own, other)[1:], own[1:])
        other[0, yes] -= 1


def test_each_word_is_read_in_its_likeliest_spelling():
    """All spellings move by the same, so which is the likeliest does not change."""
    tokens = AnswerTokens([3, 4], [7, 8, 9])
    own, other = torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(1)).double()
    found = _Divided(tokens, 0.5).uncut(own, other)
    margin = found[0, [3, 4]].max() - found[0, [7, 8, 9]].max()
    assert float(margin) == pytest.approx(0.5 * released(own[0], [other[0]], 0.5, tokens), abs=1e-9)
    moved = found - own
    assert len(set(moved[0, [3, 4]].tolist())) == 1
    assert len({round(one, 12) for one in moved[0, [7, 8, 9]].tolist()}) == 1


def test_a_sure_prior_does_not_overflow():
    """At T = 0.2 a difference of 60 nats is e^-300: in float32 that would be 0 by 0."""
    own, other = torch.zeros(1, 4), torch.tensor([[60.0, 0.0, 0.0, 200.0]])
    found = _Divided(AnswerTokens([0], [1]), 0.2).uncut(own, other)
    assert bool(found.isfinite().all())
    assert float(found[0, 0] - found[0, 1]) == pytest.approx(-0.2 * np.log(1.0001 / 1e-4), rel=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_questions_share_a_picture(asked, way):
    lens, method = asked[0], cl.PostHocDebias(without=way)
    assert why_unshared(lens, method) is None
    whole = lens.prompt([picture(0)] * 2, QUESTIONS[:2])
    wanted = decode(lens, whole.inputs, method, max_new_tokens=2)[1]
    asked_of = dict(read(lens, picture(0)).ask(QUESTIONS[:2]))
    found = decode(lens, asked_of, method, max_new_tokens=2)[1]
    assert float((found - wanted).abs().max()) < 1e-4


@pytest.mark.parametrize("readout", ["first token", "text"])
def test_a_run_records_it_and_is_read_by_it(readout):
    """The margins of a run are those without it less the prior, asked without pictures by hand."""
    model = cl.load("toy-llava")
    bench = replace(BENCHMARKS.get("pope/toy/adversarial"), readout=readout)
    options = {"limit": 24, "progress": False, "batch_size": 8}
    method = cl.PostHocDebias(temperature=1.0)
    plain, debiased = cl.evaluate(model, bench, methods=[None, method], **options)
    described = {"name": "post-hoc-debias", "without": "nothing", "temperature": 1.0}
    assert described.items() <= debiased.record["method"].items()
    words = _words(Target(model.hf_model, model.processor))
    samples = {one.id: one for one in bench.samples(24, 0)}
    priors, error, changed = [], 0.0, 0
    for before, after in zip(plain.rows, debiased.rows, strict=True):
        sample = samples[before["id"]]
        inputs = model.prompt(sample.image, sample.question).inputs
        ids = inputs["input_ids"][:, inputs["input_ids"][0] != model.config.image_token_index]
        with torch.inference_mode():
            said = model.hf_model.model.language_model(input_ids=ids).last_hidden_state
            logits = model.hf_model.lm_head(said)[0, -1].double()
        c = np.array([float(logits.softmax(dim=0)[one].max()) for one in words])
        c = c / c.sum() + FLOOR
        priors.append(float(np.log(c[0] / c[1])))
        error = max(error, abs(after["margin"] - (before["margin"] - priors[-1])))
        changed += (after["margin"] > 0) != (before["margin"] > 0)
        if readout == "first token":
            assert after["prediction"] == ("yes" if after["margin"] > 0 else "no")
    print(f"priors {min(priors):.2f} to {max(priors):.2f}, error {error:.1e}, {changed} changed")
    assert error < 1e-3
    assert max(map(abs, priors)) > 0.1


def test_refusals(asked):
    lens = asked[0]
    with (
        pytest.raises(InterventionError, match="has no processor"),
        cl.intervening(lens.hf_model, cl.PostHocDebias()),
    ):
        pass
    with pytest.raises(InterventionError, match="second"):
        cl.generate(lens, (picture(0), QUESTIONS[0]), cl.compose(cl.VDD(), cl.PostHocDebias()))
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ParameterError, match="temperature must be a finite number > 0"):
            cl.PostHocDebias(temperature=wrong)


def test_a_qformers_model_is_debiased_too():
    lens = blip_of("sdpa")
    prompt = (picture(0), QUESTIONS[0])
    one, other = (cl.generate(lens, prompt, m, progress=False) for m in (None, cl.PostHocDebias()))
    print(one.margins, other.margins)
    assert one.margins != other.margins
