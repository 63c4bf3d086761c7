"""What an answer means: yes, no or other, by the rules that evaluators in use really have."""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from clva_lens.benchmarks.base import Answer, Sample, match
from clva_lens.benchmarks.readouts import TEXT, read_margin
from clva_lens.ground.errors import BenchmarkError
from clva_lens.ground.registry import Registry


class Parser(NamedTuple):
    """A rule from a raw answer to "yes", "no" or "other".

    ``needs_label`` marks a rule that looks at the right answer first; it is called with (text,
    label), any other with the text alone.
    """

    read: Callable[..., str]
    needs_label: bool = False


PARSERS = Registry[Parser]("parser")


def parse(text: str, parser: str = "strict", label: str | None = None) -> str:
    """Return "yes", "no" or "other" for a raw answer.

    ``strict``: the first word is yes or no, in any case and after any punctuation; else "other".

    The rules of others, with their quirks:

    - ``official``: POPE's evaluate.py (github.com/AoiDragon/POPE, commit 08d957b9; LLaVA's
      eval_pope.py is the same). "no" if No, no or not is a word of the first sentence, else "yes".
    - ``opera``: OPERA's pope_eval.py (github.com/shikiw/OPERA, 61426efe). "no" if No, no, NO, not
      or a word that ends in n't occurs anywhere, else "yes".
    - ``vcd``: VCD's eval_pope.py (github.com/DAMO-NLP-SG/VCD, d6568ff8). It looks at the label
      first: the answer is right if the label occurs in it as a substring, so "Yes, no doubt" is
      right whatever the label, and "I know it is" is a no. The result is the column of the
      confusion table that it is booked in: the label if right, the other word if wrong.
    - ``lmms``: lmms-eval (75571cfe), tasks/pope: exact match in lower case, so "Yes." is "other".
    - ``vlmevalkit``: VLMEvalKit (e8e78f05), YOrN_Extraction without a judge: the words contain one
      of yes and no, and not both.
    - ``mme``: MME's calculation.py: yes or no within the first four characters, in lower case.

    >>> parse("Yes, it is."), parse("nope"), parse("NO", parser="official")
    ('yes', 'other', 'yes')
    >>> parse("Yes, no doubt", "vcd", "yes"), parse("Yes, no doubt", "vcd", "no")
    ('yes', 'no')

    Raises:
        UnknownName: if there is no such parser.
        BenchmarkError: if the parser needs the label, and it is not yes or no.
    """
    rule = PARSERS.get(parser)
    if not rule.needs_label:
        return rule.read(text)
    if label not in ("yes", "no"):
        raise BenchmarkError(
            f"the parser '{parser}' looks at the label, which is {label!r}. Pass label='yes' or "
            "label='no', or use a parser that does not need it, such as 'strict'."
        )
    return rule.read(text, label)


# The first word, after anything that is neither a letter nor a digit. An apostrophe or a hyphen
# belongs to its word, so that "no-one" is not "no".
_FIRST_WORD = re.compile(r"[\W_]*([\w'’-]+)")


def _strict(text: str) -> str:
    found = _FIRST_WORD.match(text)
    word = found.group(1).strip("_'’-").lower() if found else ""
    return word if word in ("yes", "no") else "other"


def _official(text: str) -> str:
    # Every quirk is theirs: case-sensitive, only the part before the first full stop, split at
    # single spaces (so "No\n" is not "No"), and "yes" for whatever is not a "no".
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def _opera(text: str) -> str:
    words = text.replace(".", "").replace(",", "").split(" ")
    negative = {"No", "no", "NO", "not"} & set(words)
    return "no" if negative or any(word.endswith("n't") for word in words) else "yes"


def _vcd(text: str, label: str) -> str:
    return label if label in text.lower() else {"yes": "no", "no": "yes"}[label]


def _lmms(text: str) -> str:
    word = text.lower().strip()
    return word if word in ("yes", "no") else "other"


# The signs that VQA evaluation takes out of an answer, in its order.
_VQA_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")


def _vlmevalkit(text: str) -> str:
    lower = text.lower()
    cleaned = lower
    for sign in _VQA_SIGNS:
        beside_space = f"{sign} " in lower or f" {sign}" in lower
        drop = beside_space or _NUMBER_COMMA.search(lower) is not None
        cleaned = cleaned.replace(sign, "" if drop else " ")
    # Theirs passes re.UNICODE, which is 32, as the number of full stops to take out.
    words = set(_FULL_STOP.sub("", cleaned, count=32).split())
    found = words & {"yes", "no"}
    return found.pop() if len(found) == 1 else "other"


def _mme(text: str) -> str:
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


PARSERS.register("strict", Parser(_strict))
PARSERS.register("official", Parser(_official))
PARSERS.register("opera", Parser(_opera))
PARSERS.register("vcd", Parser(_vcd, needs_label=True))
PARSERS.register("lmms", Parser(_lmms))
PARSERS.register("vlmevalkit", Parser(_vlmevalkit))
PARSERS.register("mme", Parser(_mme))


def judge_rows(
    samples: Sequence[Sample], answers: Sequence[Answer], parser: str, readout: str = TEXT
) -> list[dict[str, Any]]:
    """Return one row a sample, in their order: the raw answer, what it means, whether it is right.

    ``prediction`` is by ``parser`` from the text, or by the margin with another ``readout``, and
    ``strict`` by the strict parser, whichever is asked. A failed sample (``Answer.error``) has the
    prediction "other", which is wrong.

    Raises:
        BenchmarkError: if samples and answers do not have the same ids, or a margin that is to be
            read is missing.
    """
    read = lru_cache(maxsize=4096)(parse)  # most answers are the same few words

    def predict(sample: Sample, answer: Answer) -> str:
        if readout != TEXT:
            return read_margin(answer)
        return read(answer.text, parser, sample.label)

    return [vars(_Row(*pair, parser, predict, read)) for pair in match(samples, answers)]


class _Row:
    """A row as its own ``vars``: the keys of a million of them are kept once."""

    def __init__(
        self,
        sample: Sample,
        answer: Answer,
        parser: str,
        predict: Callable[[Sample, Answer], str],
        read: Callable[..., str],
    ) -> None:
        failed = answer.error is not None
        self.id = sample.id
        self.group = sample.group
        self.category = sample.category
        self.question = sample.question
        self.label = sample.label
        self.answer = answer.text
        self.prediction = "other" if failed else predict(sample, answer)
        self.right = self.prediction == sample.label
        self.strict = "other" if failed else read(answer.text)
        self.margin = answer.margin
        self.parser = parser
        self.error = answer.error


def count_failures(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the number of ``unparsed`` rows, "other" to the strict parser, and of ``failed`` ones.

    A failed sample has no answer, so it is not among the unparsed.
    """
    failed = [row["error"] is not None for row in rows]
    other = [row["strict"] == "other" for row in rows]
    unparsed = sum(o and not f for o, f in zip(other, failed, strict=True))
    return {"unparsed": float(unparsed), "failed": float(sum(failed))}
