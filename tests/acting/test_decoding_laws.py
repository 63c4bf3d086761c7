"""What decides an answer: the decoding's fields and the token ids, and nothing that is not told."""

from itertools import product

import numpy as np
import pytest
import torch
from tiny_models import QUESTIONS, blip_of, lens_of, picture
from transformers import GenerationConfig

import clva_lens as cl
from clva_lens.ground.errors import LogitsError, ParameterError
from clva_lens.lens.asking import Asking
from clva_lens.lens.decoding import Beam, FromCheckpoint, Greedy, Sampling, _Draw, told
from clva_lens.lens.generate import generate_batches

STEPS = 4
HOW = {
    "greedy": Greedy(max_new_tokens=STEPS),
    "beam": Beam(num_beams=3, max_new_tokens=STEPS),
    "sampling": Sampling(seed=1, max_new_tokens=STEPS),
}
PAIRS = [(picture(i), QUESTIONS[i]) for i in range(3)]

# A value for every setting that a checkpoint can have; those that transformers refuses in
# generate() (assisted, contrastive and guided search) are here too: they must not arrive.
PERTURBED = {
    "max_length": 3, "max_new_tokens": 2, "min_length": 400, "min_new_tokens": STEPS,
    "early_stopping": True, "max_time": 1e-9, "stop_strings": ["a"], "do_sample": True,
    "num_beams": 2, "use_mtp": True, "use_cache": False, "cache_implementation": "static",
    "cache_config": {"batch_size": 1}, "max_cache_len": 500, "temperature": 9.0, "top_k": 1,
    "top_p": 0.01, "min_p": 0.9, "top_h": 0.1, "typical_p": 0.1, "epsilon_cutoff": 0.9,
    "eta_cutoff": 0.9, "repetition_penalty": 50.0, "encoder_repetition_penalty": 50.0,
    "length_penalty": -9.0, "no_repeat_ngram_size": 1, "bad_words_ids": [[i] for i in range(3, 40)],
    "renormalize_logits": True, "forced_bos_token_id": 5, "forced_eos_token_id": 5,
    "remove_invalid_values": True, "exponential_decay_length_penalty": (1, 9.0),
    "suppress_tokens": list(range(3, 40)), "begin_suppress_tokens": list(range(3, 40)),
    "sequence_bias": [[[i], 99.0] for i in (7, 9)], "token_healing": True, "guidance_scale": 3.0,
    "watermarking_config": {"bias": 50.0}, "num_return_sequences": 2, "output_attentions": True,
    "output_hidden_states": True, "output_scores": True, "output_logits": True,
    "return_dict_in_generate": True, "encoder_no_repeat_ngram_size": 1, "is_assistant": True,
    "num_assistant_tokens": 3, "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.9, "prompt_lookup_num_tokens": 3,
    "max_matching_ngram_size": 3, "assistant_early_exit": 1, "assistant_lookbehind": 2,
    "target_lookbehind": 2, "assistant_ensemble_weight": 0.5, "speculation_type": "x",
    "compile_config": {"mode": "default"}, "disable_compile": True,
    "continuous_batching_config": {}, "low_memory": True, "penalty_alpha": 0.9,
    "dola_layers": "high", "diversity_penalty": 9.0, "num_beam_groups": 2, "constraints": [],
    "force_words_ids": [[5]], "prefill_chunk_size": 4,
}  # fmt: skip
GROUPS = 5  # Neighbours are alike and might undo each other, so they are in other groups.
TOKENS = {"eos_token_id": 7, "pad_token_id": 9, "bos_token_id": 9, "decoder_start_token_id": 9}


def answer(lens, how, pairs=PAIRS, size=2):
    made = cl.generate(lens, pairs, None, how, batch_size=size, progress=False)
    return [row.tolist() for row in made.ids], made.margins


def configured(kind):
    """A model, and the generation configurations that its ``generate`` may read."""
    if kind == "llava":
        lens = lens_of("full", "sdpa")
        return lens, [lens.hf_model.generation_config]
    lens = blip_of("sdpa")
    model = lens.hf_model
    return lens, [model.generation_config, model.language_model.generation_config]


def test_every_setting_is_perturbed():
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert known - {"transformers_version"} <= set(PERTURBED) | set(TOKENS)


@pytest.mark.parametrize("kind", ["llava", "instructblip"])
def test_no_setting_of_the_checkpoint_decides(kind, monkeypatch):
    """Every field, some at a time, each decoding: the same ids and margins to the last bit."""
    lens, configs = configured(kind)
    plain = {name: answer(lens, how) for name, how in HOW.items()}
    groups = [list(PERTURBED)[start::GROUPS] for start in range(GROUPS)]
    for group, name in product(groups, HOW):
        with monkeypatch.context() as patched:
            for config, field in product(configs, group):
                patched.setattr(config, field, PERTURBED[field], raising=False)
            assert answer(lens, HOW[name]) == plain[name], (group, name)
    assert len({str(one) for one in plain.values()}) == 3


@pytest.mark.parametrize("kind", ["llava", "instructblip"])
def test_token_ids_are_told(kind, monkeypatch):
    lens, configs = configured(kind)
    before = told(HOW["greedy"], lens.hf_model, lens.words)
    for field, value in TOKENS.items():
        with monkeypatch.context() as patched:
            for config in configs:
                patched.setattr(config, field, value)
            after = told(HOW["greedy"], lens.hf_model, lens.words)
        assert after["token_ids"][field] == value
        assert after != before


def test_from_checkpoint_takes_its_settings_and_tells_them(monkeypatch):
    lens, (config,) = configured("llava")
    how = FromCheckpoint(max_new_tokens=STEPS, seed=1)
    assert answer(lens, how) == answer(lens, HOW["greedy"])
    plain = told(how, lens.hf_model, lens.words)
    monkeypatch.setattr(config, "no_repeat_ngram_size", 1)
    ids, margins = answer(lens, how)
    assert all(len(set(row)) == len(row) for row in ids)
    assert (ids, margins) != answer(lens, HOW["greedy"])
    assert margins == answer(lens, HOW["greedy"])[1]  # raw logits, whatever is suppressed
    now = told(how, lens.hf_model, lens.words)
    assert now["checkpoint"]["no_repeat_ngram_size"] == 1 and now != plain
    # transformers counts the padding of a batch among what is repeated.
    monkeypatch.setattr(config, "no_repeat_ngram_size", None)
    monkeypatch.setattr(config, "do_sample", True)
    monkeypatch.setattr(config, "min_p", 0.01)
    assert how.kind(lens.hf_model) == "sampling"
    assert answer(lens, how, size=1)[0] == answer(lens, how, size=3)[0] != ids
    with pytest.raises(ParameterError, match=r"'opera' decodes with beam only"):
        cl.generate(lens, PAIRS, cl.OPERA(), how)
    monkeypatch.setattr(config, "num_beams", 2)
    with pytest.raises(ParameterError, match=r"2 sampled beams.*cl\.Beam\(\) or cl\.Sampling\(\)"):
        answer(lens, how)


def test_margins_are_raw_whatever_is_suppressed(monkeypatch):
    lens, (config,) = configured("llava")
    raw = answer(lens, HOW["greedy"])[1]
    monkeypatch.setattr(config, "suppress_tokens", list(range(64)))
    assert answer(lens, HOW["beam"])[1] == pytest.approx(raw, abs=1e-5)


def test_a_prompt_draws_by_its_place():
    """Batches, resuming and what else is drawn change nothing; seeds and places do."""
    lens, how = lens_of("full", "sdpa"), HOW["sampling"]
    asked = [PAIRS[0]] * 5
    torch.manual_seed(0)
    before = torch.get_rng_state()
    ids, _ = answer(lens, how, asked, size=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert len({str(row) for row in ids}) > 1
    torch.manual_seed(1)
    for size in (1, 2, 3):
        assert answer(lens, how, asked, size)[0] == ids
    resumed = generate_batches(
        lens, asked[2:], Asking(decoding=how, batch_size=2), first=2, progress=False
    )
    assert [row.tolist() for batch in resumed for row in batch.ids] == ids[2:]
    other = Sampling(seed=2, max_new_tokens=STEPS)
    assert answer(lens, other, asked)[0] != ids


def test_draws_follow_the_probabilities():
    """Shares of 40,000 draws lie within five standard errors; what has no chance is never drawn."""
    scores = torch.tensor([1.0, -torch.inf, 0.0, 2.0, -1.0])
    numbers = np.random.default_rng(0).random((40_000, 1))
    drawn = _Draw(numbers)(torch.zeros(40_000, 1, dtype=torch.long), scores.expand(40_000, -1))
    assert (drawn.exp().sum(dim=1) == 1).all()
    shares, chances = drawn.exp().mean(dim=0), scores.softmax(dim=0)
    assert ((shares - chances).abs() <= 5 * (chances * (1 - chances) / 40_000).sqrt()).all()
    assert shares[1] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("after", [0, 2])
def test_logits_that_are_not_finite(value, after):
    lens, passes = lens_of("full", "sdpa"), []

    def spoil(module, args, out):
        passes.append(1)
        return out.index_fill(-1, torch.tensor([3]), value) if len(passes) > after else out

    handle = lens.hf_model.lm_head.register_forward_hook(spoil)
    try:
        with pytest.raises(LogitsError, match=r"not finite in torch\.float32.*dtype='bfloat16'"):
            answer(lens, HOW["greedy"])
        passes.clear()
        report = cl.evaluate(lens, "pope/toy/random", None, HOW["greedy"], limit=2, progress=False)
    finally:
        handle.remove()
    assert report.metrics["failed"] == 2


def test_a_prompt_is_run_as_it_is():
    lens = lens_of("full", "sdpa")
    prompt = lens.prompt(*PAIRS[0])
    plain = cl.generate(lens, prompt, decoding=HOW["greedy"])
    encoded = dict(prompt.inputs)
    same = cl.generate(lens, encoded, decoding=HOW["greedy"])
    assert same.margins == plain.margins and same.texts == plain.texts
    assert cl.generate(lens, PAIRS[0], decoding=HOW["greedy"]).margins == plain.margins
    prompt["pixel_values"].zero_()
    blank = cl.generate(lens, [prompt, PAIRS[0]], decoding=HOW["greedy"], progress=False)
    assert abs(blank.margins[0] - plain.margins[0]) > 1e-3
    assert blank.margins[1] == plain.margins[0]


def test_every_seed_has_numbers_of_its_own():
    """Negative ones and those of 64 bits too, without a warning."""
    lens = lens_of("full", "sdpa")
    seeds = (0, 1, -1, -2, -(2**63), 2**63 - 1, 2**63 - 2)
    texts = [
        cl.generate(lens, PAIRS[0], None, Sampling(seed=seed, temperature=9.0)).texts[0]
        for seed in seeds
    ]
    assert len(set(texts)) == len(seeds)


def test_a_temperature_that_divides_by_nothing_is_said():
    lens = lens_of("full", "sdpa")
    with pytest.raises(LogitsError, match=r"tiny temperature divides them.*cl\.Greedy"):
        cl.generate(lens, PAIRS[0], None, Sampling(temperature=1e-45))
    cold = Sampling(temperature=1e-30, max_new_tokens=STEPS)
    assert answer(lens, cold)[0] == answer(lens, HOW["greedy"])[0]


def test_a_batch_is_taken_apart_for_a_search():
    lens, five = lens_of("full", "sdpa"), Beam(num_beams=5, max_new_tokens=3)
    batch = lens.prompt([image for image, _ in PAIRS[:2]], [asked for _, asked in PAIRS[:2]])
    together = cl.generate(lens, batch, cl.OPERA(), five)
    alone = cl.generate(lens, PAIRS[:2], cl.OPERA(), five, progress=False)
    assert [row.tolist() for row in together.ids] == [row.tolist() for row in alone.ids]
    assert together.margins == pytest.approx(alone.margins, abs=1e-4)
