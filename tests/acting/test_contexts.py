"""Whole = read in pieces: what a position is does not depend on the pass that brings it.

A picture that is read before its questions, tokens that come several at once and are taken back,
and turns of a conversation give the numbers of the passes that they stand for, under every method
that leaves the picture's rows alone. The others are refused in words.
"""

import copy
from dataclasses import replace

import pytest
import torch
from tiny_models import QUESTIONS, lens_of, picture
from transformers import DynamicCache
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

import clva_lens as cl
from clva_lens.ground.errors import InterventionError, ParameterError, PromptError
from clva_lens.lens.prefix import read
from clva_lens.models.kv_cache import CACHE, cache_of
from clva_lens.models.weights import weights_state

ATOL = 1e-5
APART = {
    "CLVA": cl.CLVA(tau=1.0),
    "CLVA, the prompt's anchors": cl.CLVA(tau=1.0, refresh="prompt"),
    "knock-out": cl.KnockOut(),
    "ClearSight": cl.ClearSight(),
    "PAI": cl.PAI(),
    "shuffled": cl.Shuffled(cl.CLVA(tau=1.0)),
    "ablation": cl.AblateHeads(heads="sensitive"),
    "composed": cl.compose(cl.CLVA(tau=1.0, layers=(5, 6)), cl.KnockOut(layers=(9,))),
}
LAST_LOGITS = {"DeCo": cl.DeCo(), "ONLY": cl.ONLY()}
TOGETHER = {"MemVR": cl.MemVR(), "edited rows": cl.AblateHeads(heads="sensitive", rows="all")}
# These share a picture that cl.read() has read (tests/contrast/test_contrast_prefixes.py).
READ_ONCE = {"VisFlow": cl.VisFlow(), "VCD": cl.VCD(), "IMCCD": cl.IMCCD()}
one_by_one = pytest.mark.parametrize("name", [*APART, *LAST_LOGITS])
METHODS = {**APART, **LAST_LOGITS}


@pytest.fixture(scope="module", params=["full", "grouped"])
def model(request):
    return lens_of(request.param, "sdpa")


def last(model, method, *passes):
    """Return the last logits of passes that follow each other, each with the cache before it."""
    cache = None
    with torch.inference_mode(), cl.intervening(model.hf_model, *([method] if method else [])):
        for inputs in passes:
            given = {} if cache is None else {CACHE: cache}
            out = model.hf_model(**inputs, **given, use_cache=True)
            cache = cache_of(out)
    return out.logits[:, -1]


def written(model, inputs, method, **options):
    with torch.inference_mode(), cl.intervening(model.hf_model, *([method] if method else [])):
        return model.hf_model.generate(
            **inputs,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **{"max_new_tokens": 10} | options,
        )


def close(found, wanted, plain):
    """The numbers agree, by far less than the method moves them."""
    known = wanted.isfinite()
    assert torch.equal(found.isfinite(), known)
    error = float((found - wanted)[known].abs().max())
    effect = float((wanted - plain)[known].abs().max())
    print(f"error {error:.1e}, effect {effect:.2g}")
    assert error < ATOL < effect / 20


def cut(prompt):
    """The prompt up to the end of its picture, and the rest."""
    end = int(prompt.spans.image[0].nonzero().max()) + 1
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    return (
        {**prompt.inputs, "input_ids": ids[:, :end], "attention_mask": mask[:, :end]},
        {"input_ids": ids[:, end:], "attention_mask": mask},
    )


@one_by_one
def test_a_prompt_may_be_cut_at_the_end_of_its_picture(model, name):
    prompt = model.prompt(picture(0), QUESTIONS[0])
    whole = last(model, METHODS[name], prompt.inputs)
    close(last(model, METHODS[name], *cut(prompt)), whole, last(model, None, prompt.inputs))


@one_by_one
def test_questions_onto_a_picture_that_was_read(model, name):
    """Questions of several lengths, onto two pictures, in one batch; the prefix is used twice."""
    pictures, owners = [picture(0), picture(1)], [0, 1, 1, 0]
    questions = [*QUESTIONS[:2], *reversed(QUESTIONS[:2])]
    asked = read(model, pictures).ask(questions, owners)
    whole = model.prompt([pictures[owner] for owner in owners], questions)
    plain = last(model, None, whole.inputs)
    wanted = last(model, METHODS[name], whole.inputs)
    for _ in range(2):
        close(last(model, METHODS[name], dict(asked)), wanted, plain)


@pytest.mark.parametrize("name", TOGETHER)
def test_who_needs_the_picture_in_the_same_pass_is_refused(one, name):
    prompt, method = one.prompt(picture(0), QUESTIONS[0]), TOGETHER[name]
    asked = read(one, picture(0)).ask(QUESTIONS[0])
    for passes in (cut(prompt), [dict(asked)]):
        with pytest.raises(InterventionError, match="Read the whole prompt in one pass"):
            last(one, method, *passes)
    with pytest.raises(ParameterError, match=r"is not possible: .*Pass share=None"):
        cl.generate(one, (picture(0), QUESTIONS[0]), method, share="picture")


@pytest.mark.parametrize("name", READ_ONCE)
def test_who_has_to_know_what_was_read_is_refused_a_cut_by_hand(one, name):
    with pytest.raises(InterventionError, match="Read the whole prompt in one pass"):
        last(one, READ_ONCE[name], *cut(one.prompt(picture(0), QUESTIONS[0])))


@pytest.mark.parametrize("name", [*APART, "VisFlow", "MemVR"])
@pytest.mark.parametrize("guesses", [2, 5])
def test_assisted_decoding_is_decoding(model, name, guesses):
    """Tokens are checked several at once, the first of them with the prompt, and taken back."""
    prompt = model.prompt(picture(0), QUESTIONS[0])
    method = {**APART, **TOGETHER, **READ_ONCE}[name]
    alone = written(model, prompt.inputs, method)
    guessed = written(model, prompt.inputs, method, prompt_lookup_num_tokens=guesses)
    assert torch.equal(alone.sequences, guessed.sequences)
    assert len(alone.logits) == len(guessed.logits)
    error = max(
        float((one - other.reshape(one.shape)).abs().max())
        for one, other in zip(alone.logits, guessed.logits, strict=True)
    )
    assert error < ATOL


def test_guesses_that_are_read_with_the_prompt(one):
    """An assistant's first guesses come in the pass of the prompt: they are no question."""
    prompt, method = one.prompt(picture(0), QUESTIONS[0]), APART["CLVA"]
    seen = {}
    for name, options in (("alone", {}), ("guessed", {"assistant_model": one.hf_model})):
        with torch.inference_mode(), cl.intervening(one.hf_model, method) as run:
            one.hf_model.generate(**prompt.inputs, do_sample=False, max_new_tokens=6, **options)
        seen[name] = run.anchors
    assert torch.equal(seen["alone"].positive, seen["guessed"].positive)


@pytest.mark.parametrize("name", [*LAST_LOGITS, "VCD", "IMCCD"])
def test_who_edits_the_last_logits_only_is_no_judge_of_guesses(one, name):
    prompt = one.prompt(picture(0), QUESTIONS[0])
    with pytest.raises(InterventionError, match="Generate without assistant_model"):
        written(one, prompt.inputs, {**METHODS, **READ_ONCE}[name], prompt_lookup_num_tokens=4)


@pytest.mark.parametrize("name", APART)
def test_another_turn(model, name):
    """In the same run or the next, by hand or in generate(): its own text, and its own anchors."""
    prompt, method = model.prompt(picture(0), QUESTIONS[0]), APART[name]
    more = torch.randint(10, 50, (1, 6), generator=torch.Generator().manual_seed(3))
    found = {}
    for how in ("plain", "same run", "next run", "generate"):
        given = [] if how == "plain" else [method]
        with torch.inference_mode(), cl.intervening(model.hf_model, *given) as run:
            out = written(model, prompt.inputs, None, max_new_tokens=4)
            cache, ids = cache_of(out), torch.cat([out.sequences, more], dim=1)
            turn = {"input_ids": ids[:, cache.get_seq_length() :], CACHE: cache}
            before = run.anchors if given and "CLVA" in name else None
            if how in ("plain", "same run"):
                found[how] = model.hf_model(**turn).logits[:, -1]
            elif how == "generate":
                mask = torch.ones_like(ids)
                again = {"input_ids": ids, "attention_mask": mask, CACHE: cache}
                found[how] = written(model, again, None, max_new_tokens=1).logits[0]
            if before is not None and how == "same run":
                assert not torch.equal(before.positive, run.anchors.positive)
        if how == "next run":
            with torch.inference_mode(), cl.intervening(model.hf_model, method):
                found[how] = model.hf_model(**turn).logits[:, -1]
    for how in ("next run", "generate"):
        close(found[how], found["same run"], found["plain"])


def test_what_stays_refused(one):
    prompt, method = one.prompt(picture(0), QUESTIONS[0]), APART["CLVA"]
    first, rest = cut(prompt)
    ids, mask = rest["input_ids"], rest["attention_mask"]
    inside = [
        first,
        {"input_ids": ids[:, :2], "attention_mask": mask[:, : 2 - ids.shape[1]]},
        {"input_ids": ids[:, 2:], "attention_mask": mask},
    ]
    with pytest.raises(InterventionError, match="ends within a question"):
        last(one, method, *inside)
    for run in (
        lambda: written(one, first, method, max_new_tokens=1),
        lambda: last(one, method, first, {"input_ids": ids[:, :1], "attention_mask": None}),
        lambda: cl.trace_attention(one, first, method),
    ):
        with pytest.raises(InterventionError, match="a prompt ends with its image"):
            run()
    with pytest.raises(InterventionError, match="a later turn has a picture of its own"):
        last(one, method, first, {"input_ids": first["input_ids"], "attention_mask": None})


def test_a_prefix_where_a_whole_prompt_is_needed(one, one_blip):
    prefix = read(one, [picture(0), picture(1)])
    with pytest.raises(PromptError, match="say which one each question is about"):
        prefix.ask("Is there a cup?")
    asked = read(one, picture(0)).ask(QUESTIONS[0])
    with pytest.raises(PromptError, match="continues a picture that was read before"):
        one.run_with_cache(asked)
    with pytest.raises(PromptError, match="the Q-Former of this model reads the question"):
        read(one_blip, picture(0))


def test_who_may_continue_what_was_read(one):
    """The model that read it, as it was then: other numbers would look like any."""
    prefix = read(one, picture(0))
    asked = prefix.ask(QUESTIONS[0])
    twin = cl.load((copy.deepcopy(one.hf_model), one.processor), check=False)
    for run in (
        lambda: cl.generate(twin, [(prefix, QUESTIONS[0])]),
        lambda: cl.generate(twin, asked),
        lambda: cl.trace_attention(twin, asked),
    ):
        with pytest.raises(PromptError, match="continues what another model has read"):
            run()
    with pytest.raises(PromptError, match="read under another system message"):
        cl.generate(one, [(prefix, QUESTIONS[0], "see you")])
    own = read(twin, picture(0))
    with torch.no_grad():
        twin.hf_model.lm_head.weight.mul_(1.5)
    with pytest.raises(PromptError, match=r"weights or its adapters were changed.*Read it again"):
        cl.generate(twin, [(own, QUESTIONS[0])])


def test_switched_adapters_are_other_weights():
    class Tuned(torch.nn.Linear):  # what PEFT's layers have
        active_adapters, merged_adapters, disable_adapters, scaling = ["a"], [], False, {"a": 1.0}

    layer = torch.nn.Sequential(Tuned(2, 2))
    known = weights_state(layer)
    assert weights_state(layer) == known
    layer[0].disable_adapters = True
    assert weights_state(layer) != known


def test_rows_of_questions_onto_pictures(one):
    """Each row has its own picture; counts that do not fit are refused in words."""
    prefix = read(one, [picture(0), picture(1)])
    asked = prefix.ask(QUESTIONS, [0, 1, 1])
    together = last(one, None, dict(asked))
    alone = torch.cat([last(one, None, dict(asked.row(row))) for row in range(3)])
    assert (alone - together).abs().max() < ATOL
    positions = torch.arange(9).reshape(3, 3, 1)  # [axis, batch, position], as M-RoPE has them
    turned = replace(asked, inputs={**asked.inputs, "position_ids": positions})
    assert turned.row(1)["position_ids"].flatten().tolist() == [1, 4, 7]
    for wrong in ([0], [0, 1, 2], [-1, 0, 0], []):
        with pytest.raises(PromptError, match="Pass one for each question"):
            prefix.ask(QUESTIONS, wrong)


@pytest.mark.parametrize("given", [True, False], ids=["cache given", "cache made"])
def test_a_run_that_left_a_sequence(one, given):
    """A token onto it would be read with the positions and anchors of the other."""
    first = one.prompt(picture(0), QUESTIONS[0])
    second = one.prompt(picture(1), QUESTIONS[2], system="see you")
    token = torch.tensor([[30]])
    with torch.inference_mode(), cl.intervening(one.hf_model, cl.KnockOut()):
        caches = [{CACHE: DynamicCache()} if given else {} for _ in range(2)]
        out = one.hf_model(**first.inputs, use_cache=True, **caches[0])
        one.hf_model(**second.inputs, use_cache=True, **caches[1])  # nobody keeps its cache
        with pytest.raises(InterventionError, match="this run left to read another"):
            one.hf_model(input_ids=token, **{CACHE: cache_of(out)})


def test_guesses_onto_a_picture_that_was_read(one, monkeypatch):
    """The first of them come with the question, and are none of its text."""
    prompt, method = one.prompt(picture(0), QUESTIONS[0]), APART["CLVA"]

    def guess(self, ids):
        return torch.cat([ids, torch.tensor([[17, 30]])], dim=1), None

    monkeypatch.setattr(PromptLookupCandidateGenerator, "get_candidates", guess)
    anchors, ids = [], []
    for inputs, options in (
        (prompt.inputs, {}),
        (read(one, picture(0)).ask(QUESTIONS[0]), {"prompt_lookup_num_tokens": 2}),
    ):
        with torch.inference_mode(), cl.intervening(one.hf_model, method) as run:
            out = one.hf_model.generate(**inputs, do_sample=False, max_new_tokens=4, **options)
        anchors.append(run.anchors.positive)
        ids.append(out[0, -4:].tolist())
    assert torch.equal(*anchors)
    assert ids[0] == ids[1]


def test_guesses_in_a_later_turn_are_refused(one):
    """transformers reads the whole conversation again, onto the cache that has its beginning."""
    prompt, method = one.prompt(picture(0), QUESTIONS[0]), APART["CLVA"]
    with torch.inference_mode(), cl.intervening(one.hf_model, method):
        out = written(one, prompt.inputs, None, max_new_tokens=4)
        ids = torch.cat([out.sequences, torch.tensor([[30, 31, 32, 33]])], dim=1)
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE: cache_of(out)}
        with pytest.raises(InterventionError, match="reads the whole conversation again"):
            written(one, again, None, prompt_lookup_num_tokens=3)


def test_where_an_answer_looked_that_was_guessed(one):
    """The rows of tokens that were taken back are none of the answer's."""
    prompt, found = one.prompt(picture(0), QUESTIONS[0]), []
    for options in ({}, {"prompt_lookup_num_tokens": 4}, {"assistant_model": one.hf_model}):
        with torch.inference_mode(), cl.observing(one.hf_model) as seen:
            given = {"do_sample": False, "max_new_tokens": 10, **options}
            ids = one.hf_model.generate(**prompt.inputs, **given)
        if "assistant_model" in options:
            with pytest.raises(InterventionError, match="read its answer twice"):
                seen.answers(ids)
        else:
            found.append(seen.answers(ids)[0])
            passes = len(seen.steps)
    assert passes < 9 < found[0].shape[2], "tokens were guessed"
    assert found[0].shape == found[1].shape
    assert (found[0] - found[1]).abs().max() < ATOL < found[0].std(dim=2).max() / 20
