"""OPERA is its formulas: penalties, ids and scores of a search written out here, also going back.

The reference is for one prompt: float64, no cache, every sequence read whole with
``output_attentions=True``, products multiplied out, lists instead of tensors.
"""

import copy
import math
from collections import Counter
from dataclasses import replace
from functools import cache, partial

import nnsight
import numpy as np
import pytest
import torch
from test_identity import state
from tiny_models import QUESTIONS, blip_of, lens_of, picture, tiny_model
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput

import clva_lens as cl
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.methods.beams import Beams
from clva_lens.methods.target import Target
from clva_lens.models.kv_cache import CACHE

BEAMS, STEPS = 3, 16
ERROR = 1e-4


@cache
def exact_of(heads):
    """The float64 copy that shows its patterns."""
    return copy.deepcopy(tiny_model(heads, "eager")).double()


def searched(lens, prompt, method, *others, **options):
    """Return what OPERA's search gives in plain transformers code, and its session."""
    given = {"num_beams": BEAMS, "max_new_tokens": STEPS, "do_sample": False} | options
    with torch.inference_mode(), cl.intervening(lens, *others, method) as run:
        search = run.sessions[-1]
        out = lens.hf_model.generate(
            **prompt.inputs, **given, custom_generate=search.decode, return_dict_in_generate=True
        )
    return out, search


def plain(lens, prompt, **options):
    given = {"num_beams": BEAMS, "max_new_tokens": STEPS, "do_sample": False} | options
    with torch.inference_mode():
        return lens.hf_model.generate(
            **prompt.inputs, **given, return_dict_in_generate=True, output_scores=True
        )


# ── the reference ──


def read(model, pixels, sequences, known):
    """Return the last logits of each sequence, and its last layer's pattern [head, query, key].

    ``known`` keeps what was read: a candidate may be a beam of the next step, or be met again.
    """
    new = [sequence for sequence in sequences if tuple(sequence) not in known]
    if new:
        with torch.no_grad():
            out = model(
                input_ids=torch.tensor(new),
                pixel_values=pixels.expand(len(new), -1, -1, -1),
                output_attentions=True,
            )
        for item, sequence in enumerate(new):
            known[tuple(sequence)] = out.logits[item, -1].tolist(), out.attentions[-1][item]
    return zip(*(known[tuple(sequence)] for sequence in sequences), strict=True)


def mode(values):
    counts = Counter(values)
    return min(value for value in counts if counts[value] == max(counts.values()))


def log_softmax(row):
    most = max(row)
    total = most + math.log(sum(math.exp(x - most) for x in row))
    return [x - total for x in row]


def judge(pattern, length, image, generated, method):
    """Return a candidate's penalty and the token that is leant on most."""
    a = pattern.amax(dim=0)
    a = (a / a.sum(dim=1, keepdim=True)).tolist()
    count = len(a) - length
    scores = []
    for column in range(count):
        product = 1e-7
        for row in range(column, count):
            product *= method.scale * a[length + row][length + column]
        scores.append(product)
    counted = [float(np.float16(score)) for score in scores]  # the release's floor
    counted = scores if method.variant == "paper" else counted
    token = counted.index(max(counted))
    if generated < method.early:
        return -sum(a[-1][j] for j in image), token
    return max(scores), token


def reference(model, ids, pixels, method):
    """Return the best ids and score, all penalties, the returns, and the narrowest choice."""
    length, image = len(ids), [i for i, one in enumerate(ids) if one == 5]
    beams = [(list(ids), 0.0 if i == 0 else -1e9) for i in range(BEAMS)]
    past, leant, times, ruled_out, returns, penalties = [], [], Counter(), {}, [], []
    narrow, known = math.inf, {}
    while len(beams[0][0]) < length + STEPS:
        now = len(beams[0][0]) - length
        logits, _ = read(model, pixels, [sequence for sequence, _ in beams], known)
        tries = [sorted(range(64), key=lambda v: -row[v])[: method.candidates] for row in logits]
        ahead = [[*s, v] for (s, _), vs in zip(beams, tries, strict=True) for v in vs]
        patterns = iter([*read(model, pixels, ahead, known)][1])
        found = [[judge(next(patterns), length, image, now, method) for _ in vs] for vs in tries]
        penalties.append([[penalty for penalty, _ in row] for row in found])
        leant.append([mode([token for _, token in row]) for row in found])
        past.append({"beams": beams, "logits": logits})
        rows = []
        for row, vs, judged in zip(logits, tries, found, strict=True):
            left = [-math.inf] * 64
            for v, (penalty, _) in zip(vs, judged, strict=True):
                left[v] = row[v] - method.weight * penalty
            rows.append(left)
        token = mode(leant[-1])
        often = [sum(step[beam] == token for step in leant) for beam in range(BEAMS)]
        if token >= method.early and min(often) > method.threshold:
            places = [p for p in (token + 1, token) if times[p] < method.candidates and p < now]
            if places:
                place = places[0]
                times[place] += 1
                returns.append((now, place))
                ruled_out = {p: out for p, out in ruled_out.items() if p <= place}
                ruled_out.setdefault(place, set()).update(past[place]["chosen"])
                del past[place + 1 :], leant[place + 1 :]
                beams = past[place]["beams"]
                rows = [
                    [-math.inf if (b, v) in ruled_out[place] else x for v, x in enumerate(row)]
                    for b, row in enumerate(past[place]["logits"])
                ]
        every = [
            (score + x, b, v)
            for b, ((_, score), row) in enumerate(zip(beams, rows, strict=True))
            for v, x in enumerate(log_softmax(row))
        ]
        every.sort(key=lambda one: -one[0])
        narrow = min([narrow, *(every[i][0] - every[i + 1][0] for i in range(BEAMS))])
        past[-1]["chosen"] = [(b, v) for _, b, v in every[:BEAMS]]
        beams = [(beams[b][0] + [v], score) for score, b, v in every[:BEAMS]]
    best, score = beams[0]
    return best, score / STEPS, penalties, returns, narrow


CASES = {
    "ten tokens": (cl.OPERA(candidates=3), 0),
    "going back": (cl.OPERA(candidates=3, early=1, threshold=2, variant="paper"), 1),
    "to a place before": (
        cl.OPERA(candidates=3, early=1, threshold=2, weight=2.0, variant="paper"),
        3,
    ),
    "often": (cl.OPERA(candidates=4, early=1, threshold=2, scale=60.0, variant="paper"), 5),
    "above the floor": (cl.OPERA(candidates=3, early=1, threshold=2, scale=100.0), 3),
}


@pytest.mark.parametrize(
    ("heads", "kernel", "name"),
    [
        ("full", "sdpa", "ten tokens"),
        ("grouped", "eager", "ten tokens"),
        ("full", "sdpa", "going back"),
        ("full", "eager", "to a place before"),
        ("grouped", "sdpa", "often"),
        ("full", "sdpa", "above the floor"),
    ],
)
def test_search_is_the_reference(heads, kernel, name):
    method, seed = CASES[name]
    lens = lens_of(heads, kernel)
    prompt = lens.prompt(picture(seed), QUESTIONS[seed % 3])
    out, search = searched(lens, prompt, method)
    ids, pixels = prompt["input_ids"][0].tolist(), prompt["pixel_values"].double()
    best, score, penalties, returns, narrow = reference(exact_of(heads), ids, pixels, method)
    assert search.returns == returns
    assert bool(returns) == (method.early == 1)  # the others do go back
    error = 0.0
    for mine, theirs in zip(search.penalties, map(torch.tensor, penalties), strict=True):
        error = max(error, float(((mine.double() - theirs).abs() / theirs.abs()).max()))
    missed = abs(float(out.sequences_scores[0]) - score)
    # What the penalty does, and the choice of candidates with it.
    cut = searched(lens, prompt, replace(method, weight=1e-12, threshold=STEPS))[0]
    effect = abs(float(cut.sequences_scores[0]) - score)
    print(f"{name}: penalties {error:.1e}, score {missed:.1e} of {effect:.3f}", end=" ")
    print(f"narrowest {narrow:.1e}, returns {returns}")
    assert out.sequences[0].tolist() == best
    assert error < 1e-3
    assert missed < ERROR
    assert effect > max(1e-3, 100 * missed)
    assert out.sequences[0].tolist() != plain(lens, prompt).sequences[0].tolist()


def test_the_floor_of_float16():
    """As released, a token that is hardly leant on does not count, and the search stays."""
    lens, (method, seed) = lens_of("full", "sdpa"), CASES["above the floor"]
    prompt = lens.prompt(picture(seed), QUESTIONS[seed % 3])
    released, paper = (
        searched(lens, prompt, replace(method, variant=one))[1].returns
        for one in ("released", "paper")
    )
    assert len(paper) > len(released) > 0


def test_long_answers():
    """104 tokens: it goes back within the last third, several times, and comes to the end."""
    lens = lens_of("full", "sdpa")
    prompt = lens.prompt(picture(3), QUESTIONS[0])
    method = cl.OPERA(candidates=2, scale=100.0, threshold=5)
    out, search = searched(lens, prompt, method, num_beams=2, max_new_tokens=104)
    assert out.sequences.shape[1] - prompt.answer_start == 104
    assert all(now > place >= method.early for now, place in search.returns)
    assert len(search.returns) >= 2 and max(search.returns)[0] > 64
    assert len(search.penalties) == 104 + sum(now - place for now, place in search.returns)


# ── transformers' search ──


def plain_search(model, input_ids, logits_processor, stopping_criteria, generation_config, **kw):
    """Search with ``Beams`` and nothing else: all is read again at each step."""
    beams, kw = Beams.start(input_ids), kw | {"use_cache": False, CACHE: None}
    while not beams.over:
        inputs = model.prepare_inputs_for_generation(beams.ids, is_first_iteration=True, **kw)
        scores = model(**inputs).logits[:, -1].log_softmax(dim=1)
        stops = partial(stopping_criteria, scores=None)
        beams = beams.advance(scores, generation_config, stops).beams
        kw["position_ids"] = None
    sequences, scores = beams.answers(generation_config.num_return_sequences or 1, 1)
    return GenerateBeamDecoderOnlyOutput(sequences=sequences, sequences_scores=scores)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"length_penalty": 0.0},
        {"length_penalty": 2.0, "early_stopping": "never"},
        {"early_stopping": True, "num_return_sequences": 2},
        {"eos_token_id": [53, 28], "num_beams": 4},
    ],
    ids=str,
)
def test_beams_are_transformers(options):
    """The same answers and scores, whether or not they end."""
    lens, lengths = lens_of("full", "sdpa"), set()
    for seed in range(5):
        prompt = lens.prompt(picture(seed), QUESTIONS[seed % 3])
        given = {"max_new_tokens": 8, "eos_token_id": 53, "pad_token_id": 1} | options
        wanted = plain(lens, prompt, **given)
        found = plain(lens, prompt, **given, custom_generate=plain_search)
        assert torch.equal(found.sequences, wanted.sequences)
        error = (found.sequences_scores - wanted.sequences_scores).abs().max()
        assert float(error) < 1e-4
        lengths.add(found.sequences.shape[1] - prompt.answer_start)
    # Some end before the others, unless longer ones could still be better.
    assert len(lengths) > 1 or options.get("early_stopping") == "never"


@pytest.mark.parametrize("seed", range(2))
def test_without_a_penalty_it_is_transformers_search(seed):
    """All tokens are left, and none is penalised."""
    lens = lens_of("full", "sdpa")
    prompt = lens.prompt(picture(seed), QUESTIONS[seed % 3])
    nothing = cl.OPERA(weight=1e-12, candidates=64, threshold=STEPS)
    found, search = searched(lens, prompt, nothing, max_new_tokens=3)
    same_answer(found, plain(lens, prompt, max_new_tokens=3))
    assert search.returns == []
    penalised = searched(lens, prompt, replace(nothing, weight=30.0, early=1), max_new_tokens=3)[0]
    assert float((penalised.sequences_scores - found.sequences_scores).abs()) > 1e-3


def test_a_weight_of_zero_is_no_method():
    lens, how = lens_of("full", "sdpa"), cl.Beam(num_beams=BEAMS, max_new_tokens=6)
    pairs = [(picture(seed), QUESTIONS[seed % 3]) for seed in range(3)]
    none, zero, normal = (
        cl.generate(lens, pairs, method, how, progress=False)
        for method in (None, cl.OPERA(weight=0), cl.OPERA())
    )
    assert [row.tolist() for row in zero.ids] == [row.tolist() for row in none.ids]
    assert zero.margins == none.margins
    changed = [not torch.equal(a, b) for a, b in zip(none.ids, normal.ids, strict=True)]
    assert any(changed)


# ── caches, batches, other models, other methods ──


def same_answer(one, other):
    assert torch.equal(one.sequences, other.sequences)
    torch.testing.assert_close(one.sequences_scores, other.sequences_scores, rtol=0, atol=1e-4)


def test_cached_is_uncached():
    method, seed = CASES["often"]
    lens = lens_of("grouped", "sdpa")
    prompt = lens.prompt(picture(seed), QUESTIONS[seed % 3])
    cached, search = searched(lens, prompt, method)
    uncached, again = searched(lens, prompt, method, use_cache=False)
    same_answer(cached, uncached)
    assert search.returns == again.returns != []


@pytest.mark.parametrize("language", ["llama", "opt"])
def test_instructblip(language):
    """The Q-Former is read once; prompts of several lengths are answered one by one."""
    lens = blip_of("sdpa", language)
    method = cl.OPERA(candidates=3, early=2, threshold=2, weight=30.0)
    how = cl.Beam(num_beams=BEAMS, max_new_tokens=6)
    pairs = [(picture(i), QUESTIONS[i]) for i in range(3)]
    together = cl.generate(lens, pairs, method, how, progress=False)
    without = cl.generate(lens, pairs, None, how, progress=False)
    for item, pair in enumerate(pairs):
        alone = cl.generate(lens, [pair], method, how)
        assert torch.equal(alone.ids[0], together.ids[item])
        assert alone.margins == together.margins[item : item + 1]
    assert any(not torch.equal(a, b) for a, b in zip(together.ids, without.ids, strict=True))


def test_it_sees_attention_under_other_methods():
    """Without image attention the first penalties are 0; the anchored one is CLVA's."""
    lens = lens_of("full", "sdpa")
    prompt, method = lens.prompt(picture(0), QUESTIONS[0]), cl.OPERA(candidates=3)
    own, blind, anchored = (
        searched(lens, prompt, method, *others, max_new_tokens=3)[1].penalties[0]
        for others in ((), (cl.KnockOut(),), (cl.CLVA(tau=1.0),))
    )
    assert float(own.amax()) < -1e-3
    assert float(blind.abs().max()) < 1e-6
    assert float((anchored - own).abs().max()) > 1e-3


def test_a_method_goes_back_with_it():
    """CLVA's anchors are read anew in rows that are read again: as without a cache."""
    lens = lens_of("full", "sdpa")
    prompt = lens.prompt(picture(1), QUESTIONS[1])
    method = cl.OPERA(candidates=3, early=1, threshold=2)
    others = cl.CLVA(tau=1.0), cl.MemVR(gamma=0.5)
    cached, search = searched(lens, prompt, method, *others)
    uncached, again = searched(lens, prompt, method, *others, use_cache=False)
    same_answer(cached, uncached)
    assert search.returns == again.returns != []


def test_margins_are_those_of_the_first_step():
    lens = lens_of("full", "sdpa")
    pair, how = (picture(0), QUESTIONS[0]), cl.Beam(num_beams=BEAMS, max_new_tokens=2)
    vocabulary = lens.words.get_vocab()
    with torch.inference_mode():
        logits = lens.hf_model(**lens.prompt(*pair).inputs).logits[0, -1]
    wanted = float(logits[vocabulary["yes"]] - logits[vocabulary["no"]])
    slight = cl.generate(lens, [pair], cl.OPERA(weight=1e-9), how).margins[0]
    whole = cl.generate(lens, [pair], cl.OPERA(candidates=64), how).margins[0]
    assert slight == pytest.approx(wanted, abs=1e-5)
    assert whole != pytest.approx(wanted, abs=1e-4)


def test_state_is_restored_after_an_error():
    lens = lens_of("full", "sdpa")
    prompt, before = lens.prompt(picture(0), QUESTIONS[0]), state(lens_of("full", "sdpa").hf_model)

    def stop(ids, scores):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        searched(lens, prompt, cl.OPERA(), stopping_criteria=[stop])
    assert state(lens.hf_model) == before
    searched(lens, prompt, cl.OPERA(), max_new_tokens=2)
    assert state(lens.hf_model) == before


# ── what it refuses ──


def test_it_is_no_edit_of_somebody_elses_pass(one, ask):
    prompt, how = ask(one), {"max_new_tokens": 2, "do_sample": False}
    remedy = r"beam search of its own.*cl\.generate\(model, prompt, method=cl\.OPERA\(\)"
    for options in ({}, {"num_beams": 3}):
        with (
            torch.inference_mode(),
            pytest.raises(InterventionError, match=remedy),
            cl.intervening(one, cl.OPERA()),
        ):
            one.hf_model.generate(**prompt.inputs, **how, **options)
    with pytest.raises(InterventionError, match=remedy):
        cl.trace_attention(one, prompt, cl.OPERA())
    with pytest.raises(InterventionError, match=remedy):
        cl.OPERA().as_hooks(None, prompt)
    handle = nnsight.NNsight(one.hf_model)
    with pytest.raises(Exception, match=remedy), handle.trace(**prompt):  # nnsight's own class
        cl.intervene(cl.OPERA())


@pytest.mark.parametrize("decoding", [None, cl.Greedy(), cl.Sampling()])
def test_generate_refuses_other_decodings(one, ask, decoding):
    match = r"'opera' decodes with beam only.*Pass decoding=cl\.Beam\(\)"
    for method in (cl.OPERA(), cl.compose(cl.CLVA(), cl.OPERA())):
        with pytest.raises(ParameterError, match=match):
            cl.generate(one, ask(one), method, decoding)


@pytest.mark.parametrize(
    ("options", "count", "match"),
    [
        ({"do_sample": True}, None, r"does not sample.*do_sample=False"),
        ({}, 2, r"6 rows for 3 beams.*cl\.generate"),
        ({"cache_implementation": "static", "disable_compile": True}, None, r"a StaticCache"),
    ],
)
def test_search_misuse(one, ask, options, count, match):
    with pytest.raises(ParameterError, match=match):
        searched(one, ask(one, count), cl.OPERA(), **options)


@pytest.mark.parametrize("other", [cl.VCD(), cl.DeCo(), cl.OPERA()])
def test_one_owner_of_the_cut_off(one, other):
    with (
        pytest.raises(InterventionError, match=r"cut implausible tokens off"),
        cl.intervening(one, cl.OPERA(), other),
    ):
        pass


def test_no_encoder_decoder():
    with pytest.raises(InterventionError, match=r"encoder-decoder \(T5\)"):
        cl.OPERA().sessions(Target(blip_of("sdpa", "t5").hf_model))


@pytest.mark.parametrize(
    "parameters",
    [
        {"scale": -1.0},
        {"weight": math.inf},
        {"threshold": 1},
        {"candidates": 0},
        {"early": 0},
        {"window": 0},
    ],
)
def test_refused(untyped, parameters):
    with pytest.raises(ParameterError, match=next(iter(parameters))):
        cl.OPERA(**parameters)


def test_window():
    """Tokens further back than the window are not leant on: the search goes back no more."""
    method, seed = CASES["going back"]
    lens = lens_of("full", "sdpa")
    prompt = lens.prompt(picture(seed), QUESTIONS[seed % 3])
    assert searched(lens, prompt, method)[1].returns
    assert not searched(lens, prompt, replace(method, window=2))[1].returns
