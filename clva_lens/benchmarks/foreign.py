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
PICTURE_KEY = "image"
_PICTURE = re.compile(r"(?:COCO_\w+?_)?0*(?=\w)([^/\\]+?)(?:\.(?:jpe?g|png|txt))?", re.IGNORECASE)


Rows = Mapping[int, Mapping[str, Any]]
"""Rows of a file by their number in it, from 1."""


def numbered(rows: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """Return all rows of a file by their number."""
    return dict(enumerate(rows, start=1))


def id_key(rows: Rows) -> str | None:
    """Return the key that names the questions of a file's rows, None if there is none."""
    first = next(iter(rows.values()), {})
    return next((key for key in ID_KEYS if key in first), None)


def row_id(row: Mapping[str, Any], key: str | None, where: str) -> str:
    """Return the id of a row's question, which it has under ``key``.

    Raises:
        BenchmarkError: if it has none, or one that is neither a number nor a text.
    """
    if key is None or key not in row:
        raise BenchmarkError(
            f"{where} lacks {key or 'question_id'}; it has {', '.join(row)}. Pass a file whose "
            "rows all name their question."
        )
    if not isinstance(row[key], int | str):
        raise BenchmarkError(
            f"{where} has {row[key]!r} as {key}, which names no question. Give its number or name."
        )
    return str(row[key])


def answer_text(row: Mapping[str, Any], where: str, asked: str | None = None) -> str:
    """Return what a row answers, to the letter; ``where`` names the row for the error.

    Beside another text, what repeats the question that was ``asked`` is no answer: a row that was
    made from POPE's or LLaVA's question has that as its text.

    Raises:
        BenchmarkError: if no key of ANSWER_KEYS has a text, or several have different ones, of
            which one may be the right answer.
    """
    found = {key: row[key] for key in ANSWER_KEYS if isinstance(row.get(key), str)}
    if asked is not None and len(found) > 1:
        same = bare_words(asked)
        found = {key: text for key, text in found.items() if bare_words(text) != same} or found
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


def named_answers(path: str | Path, rows: Rows, samples: Sequence[Sample]) -> list[Answer]:
    """Return the answers in rows that name their questions by id, in any order.

    Where a row carries its question or its picture, they must be the sample's.

    Raises:
        BenchmarkError: if a row lacks the id or a text, or carries another question or picture.
    """
    key = id_key(rows)
    known = {sample.id: sample for sample in samples}
    answers = []
    for number, row in rows.items():
        where = f"row {number} of {path}"
        name = row_id(row, key, where)
        answers.append(answer_to(known.get(name), name, row, where))
    return answers


def answer_to(sample: Sample | None, name: str, row: Mapping[str, Any], where: str) -> Answer:
    """Return what a row answers to the sample ``name``, which is None where it is unknown.

    Raises:
        BenchmarkError: if it is about another question or picture, or its answer is not known.
    """
    if sample is not None:
        require_same(where, row, sample)
    margin, error = row.get("margin"), row.get("error") or None
    if not isinstance(margin, float | int | None) or not isinstance(error, str | None):
        raise BenchmarkError(
            f"{where} has the margin {margin!r} and the error {error!r}, but they are a number and "
            "a text. Mend them or leave them out."
        )
    text = answer_text(row, where, None if sample is None else sample.question)
    return Answer(name, text, margin, error)


def require_same(where: str, row: Mapping[str, Any], sample: Sample) -> None:
    """Return silently if the question and the picture that a row carries are the sample's.

    Raises:
        BenchmarkError: naming both, if they are others.
    """
    for told in (row[one] for one in QUESTION_KEYS if isinstance(row.get(one), str)):
        require_same_question(where, told, sample.question)
    told = row.get(PICTURE_KEY)
    if isinstance(told, str) and picture_name(told) != picture_name(sample.group):
        raise BenchmarkError(
            f"{where} is about the picture '{told}', but the sample is about '{sample.group}'. "
            "Pass the question set that was answered: another split= or data=."
        )


def picture_name(path: str) -> str:
    """Return what a picture is called in every release: without folders, ending, COCO's prefix.

    >>> picture_name("val2014/COCO_val2014_000000310196.jpg"), picture_name("310196")
    ('310196', '310196')
    """
    name = path.replace("\\", "/").rpartition("/")[2]
    found = _PICTURE.fullmatch(name)
    return found.group(1) if found else name


def require_same_question(where: str, told: str, asked: str) -> None:
    """Return silently if a row's question is the sample's, whatever a protocol adds to either.

    Case, white space and marks do not count, nor POPE's typo "imange", nor what stands before or
    after the question in the row.

    Raises:
        BenchmarkError: naming both questions.
    """
    if not is_asked(told, asked):
        raise BenchmarkError(
            f"{where} answers '{told}', but the sample asks '{asked}'. Pass the question set that "
            "was answered: another split= or data=."
        )


def is_asked(told: str, asked: str) -> bool:
    """Return whether a row's question holds the words of the one that is asked."""
    return told == asked or f" {bare_words(asked)} " in f" {_words(told)} "


def bare_words(question: str) -> str:
    """Return the words of a question without what registered protocols add to it, or take away."""
    return _words(_bare(question))


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
