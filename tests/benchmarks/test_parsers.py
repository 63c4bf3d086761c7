import pytest
from hypothesis import given
from hypothesis import strategies as st

from clva_lens.benchmarks.parsers import PARSERS, parse
from clva_lens.benchmarks.protocols import LLAVA_V1, PROTOCOLS, VICUNA_V1
from clva_lens.ground.errors import BenchmarkError, UnknownName

# Answer, then what it means to official/LLaVA, OPERA, VCD (for the label yes, for the label no; R
# right, W wrong), VLMEvalKit and lmms-eval: the evaluators' own code, run by hand. "?" is other.
TABLE = [
    ("NO", "yes", "no", "WR", "no", "no"),
    ("No\n", "yes", "yes", "WR", "no", "no"),
    ("\nNo", "yes", "yes", "WR", "no", "no"),
    ("There isn't a dog", "yes", "no", "WW", "?", "?"),
    ("Nope", "yes", "yes", "WR", "?", "?"),
    ("none", "yes", "yes", "WR", "?", "?"),
    ("unknown", "yes", "yes", "WR", "?", "?"),
    ("I see only snow", "yes", "yes", "WR", "?", "?"),
    ("Yes, no doubt", "no", "no", "RR", "?", "?"),
    ("Yes. There is no cat though", "yes", "no", "RR", "?", "?"),
    ("Yes.", "yes", "yes", "RW", "yes", "?"),
    ("No.", "no", "no", "WR", "no", "?"),
    ("", "yes", "yes", "WW", "?", "?"),
    ("yes", "yes", "yes", "RW", "yes", "yes"),
    ("no", "no", "no", "WR", "no", "no"),
    ("There is not a dog", "no", "no", "WR", "?", "?"),
    # VQA's punctuation rule, on which VLMEvalKit stands: a sign goes if a space is beside one like
    # it, or if there is a number with a comma, and else becomes a space; a full stop goes unless a
    # digit follows it, and so joins words.
    ("yes/maybe", "yes", "yes", "RW", "yes", "?"),
    ("1,000 yes/maybe", "yes", "yes", "RW", "?", "?"),
    ("yes.maybe", "yes", "yes", "RW", "?", "?"),
]


@pytest.mark.parametrize(("text", "official", "opera", "vcd", "vlmevalkit", "lmms"), TABLE)
def test_parsers_diverge_as_the_table_says(text, official, opera, vcd, vlmevalkit, lmms):
    wanted = {"official": official, "opera": opera, "vlmevalkit": vlmevalkit, "lmms": lmms}
    for parser, word in wanted.items():
        assert parse(text, parser) == ("other" if word == "?" else word), parser
    for label, verdict in zip(("yes", "no"), vcd, strict=True):
        other = {"yes": "no", "no": "yes"}[label]
        assert parse(text, "vcd", label) == (label if verdict == "R" else other)


@pytest.mark.parametrize(
    ("text", "strict"),
    [
        ("Yes.", "yes"),
        ("No, there is not", "no"),
        ("NO", "no"),
        ("\nNo\n", "no"),
        ("There isn't a dog", "other"),
        ("Nope", "other"),
        ("Yes, no doubt", "yes"),
        ("Yes. There is no cat though", "yes"),
        ("", "other"),
        ("  **Yes**, it is", "yes"),
        ("_No_", "no"),
        ("no-one is there", "other"),
        ("yesterday", "other"),
    ],
)
def test_strict_reads_the_first_word(text, strict):
    assert parse(text) == strict


# MME issue 86: the first four characters, white space included.
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Yes", "yes"),
        (" yes", "yes"),
        ("  yes", "other"),
        ("Nope", "no"),
        ("not there", "no"),
        ("I know", "other"),
        ("know", "no"),
        ("none", "no"),
        ("The answer is yes", "other"),
        ("\nno", "no"),
        ("", "other"),
    ],
)
def test_mme_reads_four_characters(text, wanted):
    assert parse(text, "mme") == wanted


@given(st.text(), st.sampled_from(PARSERS.names()), st.sampled_from(["yes", "no"]))
def test_parsers_answer_any_text(text, parser, label):
    assert parse(text, parser, label) in ("yes", "no", "other")
    if not PARSERS.get(parser).needs_label:
        assert parse(text, parser, label) == parse(text, parser)


@given(st.text(), st.sampled_from(["yes", "no"]))
def test_strict_ignores_case_and_what_comes_after(text, word):
    assert parse(f" '{word.upper()}', {text}") == word


@pytest.mark.parametrize("parser", PARSERS.names())
@pytest.mark.parametrize("word", ["yes", "no"])
def test_all_parsers_agree_on_the_bare_word(parser, word):
    for label in ("yes", "no"):
        assert parse(word, parser, label) == word


def test_errors_say_what_to_do():
    with pytest.raises(UnknownName, match="Did you mean 'official'"):
        parse("yes", "oficial")
    for label in (None, "maybe"):
        with pytest.raises(BenchmarkError, match=r"'vcd' looks at the label.*'strict'"):
            parse("yes", "vcd", label)


def test_protocols_ask_as_published():
    question = "Is there a cup? Please answer yes or no."
    asked = {name: PROTOCOLS.get(name).ask(question) for name in PROTOCOLS.names()}
    assert asked == {
        "bare": question,
        "chat": question,
        "opera": question,
        "clearsight": question + " Please just answer yes or no.",
        "llava": "Is there a cup?\nAnswer the question using a single word or phrase.",
        "vcd": question + " Please answer this question with one word.",
    }
    assert "curious human and" in LLAVA_V1 and LLAVA_V1.endswith("to the human's questions.")
    assert LLAVA_V1.replace("human", "user") == VICUNA_V1
    system = {name: PROTOCOLS.get(name).system for name in PROTOCOLS.names()}
    assert (system["vcd"], system["llava"], system["opera"]) == (LLAVA_V1, VICUNA_V1, "")
    tokens = {name: PROTOCOLS.get(name).max_new_tokens for name in ("vcd", "llava", "opera")}
    assert tokens == {"vcd": 1024, "llava": 128, "opera": 10}
