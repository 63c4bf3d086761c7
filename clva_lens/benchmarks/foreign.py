"""Answers of others: rows that name their question by id, and often carry its words as well.

One row of LLaVA's: ``{"question_id": 1, "prompt": "Is there a cup in the image?", "text": "Yes",
"model_id": "llava-v1.5-7b"}``.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from clva_lens.benchmarks.base import Answer, Sample
from clva_lens.benchmarks.protocols import PROTOCOLS
from clva_lens.ground.errors import BenchmarkError

ID_KEYS = ("question_id", "id")
"""Where a row's question is named: a number of its own (id) may stand beside question_id."""
ANSWER_KEYS = ("answer", "response", "caption", "text", "output")
QUESTION_KEYS = ("prompt", "question")


def id_key(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the key that names the questions of a file's rows, None if there is none."""
    return next((key for key in ID_KEYS if rows and key in rows[0]), None)


def answer_text(row: Mapping[str, Any], where: str) -> str:
    """Return what a row answers, to the letter; ``where`` names the row for the error.

    Raises:
        BenchmarkError: if no key of ANSWER_KEYS has a text, or several have different ones, of
            which one may be the question or the right answer.
    """
    found = {key: row[key] for key in ANSWER_KEYS if isinstance(row.get(key), str)}
    if not found:
        raise BenchmarkError(
            f"{where} has no text in any of {', '.join(ANSWER_KEYS)}; it has {', '.join(row)}. "
            "Pass a file whose rows have question_id and text, or question and answer."
        )
    if len(set(found.values())) > 1:
        raise BenchmarkError(
            f"{where} has different texts in {', '.join(found)}, and which is the model's answer "
            "is not known. Leave that one in the file."
        )
    return next(iter(found.values()))


def named_answers(
    path: str | Path, rows: Sequence[Mapping[str, Any]], samples: Sequence[Sample]
) -> list[Answer]:
    """Return the answers in rows that name their questions by id, in any order.

    Where a row carries its question, it must be the sample's.

    Raises:
        BenchmarkError: if a row lacks the id or a text, or carries another question.
    """
    key = id_key(rows)
    asked = {sample.id: sample.question for sample in samples}
    answers = []
    for number, row in enumerate(rows, start=1):
        where = f"row {number} of {path}"
        if key is None or key not in row:
            raise BenchmarkError(
                f"{where} lacks {key or 'question_id'}; it has {', '.join(row)}. Pass a file whose "
                "rows all name their question."
            )
        name = str(row[key])
        for told in (row[one] for one in QUESTION_KEYS if isinstance(row.get(one), str)):
            if name in asked:
                require_same_question(where, told, asked[name])
        answers.append(Answer(name, answer_text(row, where), row.get("margin"), row.get("error")))
    return answers


def require_same_question(where: str, told: str, asked: str) -> None:
    """Return silently if a row's question is the sample's, whatever a protocol adds to either.

    Case, white space and marks do not count, nor POPE's typo "imange", nor what stands before or
    after the question in the row.

    Raises:
        BenchmarkError: naming both questions.
    """
    if f" {_words(_bare(asked))} " not in f" {_words(told)} ":
        raise BenchmarkError(
            f"{where} answers '{told}', but the sample asks '{asked}'. Pass the question set that "
            "was answered: another split= or data=."
        )


def _bare(question: str) -> str:
    """Return a question without what registered protocols add to its end, or take from it."""
    endings = [one for _, p in PROTOCOLS.items() for one in (p.suffix, p.drop)]
    return _stripped(question, tuple(endings))


@lru_cache(maxsize=4096)
def _stripped(question: str, endings: tuple[str, ...]) -> str:
    bare = [one.strip() for one in endings]
    question = question.strip()
    while found := next((one for one in bare if one and question.endswith(one)), None):
        question = question.removesuffix(found).strip()
    return question


@lru_cache(maxsize=4096)
def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold())).replace("imange", "image")
