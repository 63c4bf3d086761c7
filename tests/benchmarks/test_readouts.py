"""Where an answer is read is a setting: its tokens are found, recorded, and watched."""

import json

import pytest
import torch
from tiny_models import QUESTIONS, lens_of, picture
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import clva_lens as cl
from clva_lens.benchmarks.base import BENCHMARKS, Answer
from clva_lens.benchmarks.readouts import FIRST, LEGACY, READOUTS, TEXT
from clva_lens.benchmarks.run_folder import score
from clva_lens.ground.errors import BenchmarkError, ParameterError
from clva_lens.lens.answering import warn_of_others
from clva_lens.lens.asking import Asking
from clva_lens.lens.generate import generate_batches
from clva_lens.lens.margins import readout_tokens
from clva_lens.models.answer_tokens import AnswerTokens, answer_tokens

WITH_READOUT = sorted(
    name for name, one in BENCHMARKS.items() if "readout" in one.settings and "toy" in name
)


def llama_like():
    """A tokenizer that marks spaces as LLaVA-1.5's does, before a word that stands alone."""
    pieces = ["<unk>", ":", "▁:", "▁Is", "▁it", "yes", "no", "Yes", "No", "▁yes", "▁no", "▁Yes"]
    pieces += ["▁No", "▁", "Y", "e", "s", "N", "o"]
    scores = [(piece, -float(len(pieces) - len(piece))) for piece in pieces]
    made = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=False))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def test_spellings_are_found_alone_and_after_the_end_of_a_prompt():
    words = llama_like()
    ids = words.get_vocab()
    alone = {words(one, add_special_tokens=False).input_ids[0] for one in ("yes", "Yes")}
    assert alone == {ids["▁yes"], ids["▁Yes"]}, "alone, a word has the mark of a space"
    tokens = answer_tokens(words, "Is it:")
    assert tokens.yes == sorted(ids[one] for one in ("yes", "Yes", "▁yes", "▁Yes"))
    assert tokens.no == sorted(ids[one] for one in ("no", "No", "▁no", "▁No"))
    assert readout_tokens(words, FIRST, "Is it:") == tokens
    assert readout_tokens(words, LEGACY, "Is it:") == ([ids["yes"]], [ids["no"]])


def test_a_tokenizer_without_them_is_refused_where_they_are_read():
    made = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    words = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    assert readout_tokens(words, TEXT, ":") == ([], [])
    for readout in (FIRST, LEGACY):
        with pytest.raises(ParameterError, match="no single token for yes or for no"):
            readout_tokens(words, readout, ":")


@pytest.mark.parametrize("name", WITH_READOUT)
@pytest.mark.parametrize("readout", READOUTS)
def test_a_readout_decides_the_prediction_and_nothing_else(name, readout):
    benchmark = BENCHMARKS.get(name)
    chosen = type(benchmark)(**{**benchmark.settings, "readout": readout})
    samples = chosen.samples(limit=12)
    # What is said is the opposite of what is likelier.
    answers = [
        Answer(one.id, "no" if place % 2 else "yes", 1.0 if place % 2 else -1.0)
        for place, one in enumerate(samples)
    ]
    said = {row["id"]: row["prediction"] for row in chosen.score(samples, answers).rows}
    for answer in answers:
        opposite = {"yes": "no", "no": "yes"}[answer.text]
        assert said[answer.id] == (answer.text if readout == TEXT else opposite)
    bare = [Answer(one.id, "yes") for one in samples]
    if readout == TEXT:
        assert chosen.score(samples, bare).rows
    else:
        with pytest.raises(BenchmarkError, match="has no margin"):
            chosen.score(samples, bare)


def test_a_tie_is_a_no():
    """As pope-audit has it: yes only if it is larger."""
    chosen = BENCHMARKS.get("pope/toy/random")
    chosen = type(chosen)(**{**chosen.settings, "readout": FIRST})
    (sample,) = chosen.samples(limit=1)
    assert chosen.score([sample], [Answer(sample.id, "yes", 0.0)]).rows[0]["prediction"] == "no"


@pytest.mark.parametrize("name", WITH_READOUT)
def test_another_readout_is_refused(name):
    benchmark = BENCHMARKS.get(name)
    with pytest.raises(ParameterError, match=r"readout.*second token"):
        type(benchmark)(**{**benchmark.settings, "readout": "second token"})


@pytest.fixture(scope="module")
def toy():
    return cl.load("toy-llava")


def readout_of(readout, split="adversarial"):
    benchmark = BENCHMARKS.get(f"pope/toy/{split}")
    return type(benchmark)(**{**benchmark.settings, "readout": readout})


def test_the_tokens_stand_in_the_record_and_decide_whether_a_run_goes_on(toy, tmp_path):
    out = tmp_path / "run"
    given = {"limit": 6, "progress": False, "out": out}
    report = cl.evaluate(toy, readout_of(FIRST), **given)
    told = json.loads((out / "run.json").read_text())
    assert told["settings"]["readout"] == FIRST
    names = {**told["margin"]["yes"], **told["margin"]["no"]}
    assert names == {name: toy.words.convert_tokens_to_ids(name) for name in names} != {}
    assert "yes" in told["margin"]["yes"] and "no" in told["margin"]["no"]
    for row in report.rows:
        assert row["prediction"] == ("yes" if row["margin"] > 0 else "no")
    assert score(out, readout=TEXT).rows[0]["margin"] == report.rows[0]["margin"]
    with pytest.raises(BenchmarkError, match=r"recorded for readout='first token'.*legacy"):
        score(out, readout=LEGACY)
    with pytest.raises(BenchmarkError, match=r"settings\.readout"):
        cl.evaluate(toy, readout_of(LEGACY), resume=True, **given)


def test_margins_are_of_the_readouts_own_tokens():
    lens = lens_of("full", "sdpa")
    prompts = [lens.prompt(picture(0), QUESTIONS[0])]
    with torch.inference_mode():
        logits = lens.hf_model(**prompts[0].inputs).logits[0, -1]
    asking = Asking(margin=AnswerTokens([7, 9], [8])).fitted(lens)
    (made,) = generate_batches(lens, prompts, asking, progress=False)
    expected = float(max(logits[7], logits[9]) - logits[8])
    assert made.margins[0] == pytest.approx(expected, abs=1e-5) and abs(expected) > 1e-3
    assert made.likeliest == [int(logits.argmax())]


def test_first_tokens_that_are_neither_are_told(toy, recwarn):
    """A caption does not begin with a yes; a toy's answers to yes-no questions do."""
    cl.evaluate(toy, readout_of(FIRST), limit=6, progress=False)
    assert not recwarn.list

    yes, no = (toy.words.convert_tokens_to_ids(one) for one in ("yes", "no"))
    tokens = AnswerTokens([yes], [no])
    warn_of_others([yes, no, None], tokens, toy.words)
    with pytest.warns(UserWarning, match=r"1 of 3 .*neither a yes nor a no.*'red'.*readout"):
        warn_of_others([yes, no, toy.words.convert_tokens_to_ids("red")], tokens, toy.words)
