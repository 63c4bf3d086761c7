r"""Answers of others to POPE, in the layouts that they lie about in.

LLaVA keeps the three splits of COCO in one file of 8,910 answers, of which one is ``{"question_id":
20000001, "prompt": "Is there a snowboard in the image?\nAnswer the question using a single word or
phrase.", "text": "Yes", "model_id": "llava-v1.5-13b"}``, the first of the popular split.
"""

from collections.abc import Sequence
from pathlib import Path

from clva_lens.benchmarks.base import Answer, Sample
from clva_lens.benchmarks.files import read_rows
from clva_lens.benchmarks.foreign import (
    ID_KEYS,
    QUESTION_KEYS,
    Rows,
    answer_to,
    id_key,
    named_answers,
    numbered,
    row_id,
)
from clva_lens.ground.errors import BenchmarkError

LLAVA_NUMBERS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
"""What is added to the numbers of a split in LLaVA's file of all three.

playground/data/eval/pope/llava_pope_test.jsonl of github.com/haotian-liu/LLaVA, commit 32cebc38:
1 to 3000, 10000001 to 10002910 (of the old random split), and 20000001 to 20003000.
"""
_APART = 10_000_000


def read_pope_answers(path: str | Path, samples: Sequence[Sample]) -> list[Answer]:
    """Return the answers in a file of POPE's own layout, of LLaVA's and VCD's, or of our own runs.

    POPE's: ``{"question": …, "answer": …}`` in the order of the samples, which must be all of
    the set's (``Pope.questions``). LLaVA's: ``{"question_id": …, "text": …}``, in any order, one
    split or all three (see ``of_split``). Our own: ``{"id": …, "text": …, "margin": …, "error":
    …}``. The answer may be under any of ``foreign.ANSWER_KEYS``; a question and a picture that a
    row carries are compared. Texts are kept to the letter, since parsers mind white space.

    Raises:
        BenchmarkError: if the file is neither, is corrupted, or does not fit the samples.
    """
    rows = numbered(read_rows(path))
    if not rows:
        raise BenchmarkError(f"{path} has 0 answers. Pass a file with one answer a sample.")
    if id_key(rows) is not None:
        split = samples[0].category if samples else ""
        return named_answers(path, of_split(path, rows, split), samples)
    for number, row in rows.items():
        if not any(isinstance(row.get(key), str) for key in QUESTION_KEYS):
            raise BenchmarkError(
                f"row {number} of {path} lacks question_id or question; it has {', '.join(row)}. "
                "Pass an answer file: POPE's (question, answer) or LLaVA's (question_id, text)."
            )
    if len(rows) != len(samples):
        raise BenchmarkError(
            f"{path} has {len(rows)} answers in order, but there are {len(samples)} samples. Pass "
            "the question set that was answered, whole: old copies of COCO-random have 2,910 rows."
        )
    return [
        answer_to(sample, sample.id, row, f"row {number} of {path}")
        for sample, (number, row) in zip(samples, rows.items(), strict=True)
    ]


def read_question_ids(path: str | Path, split: str) -> set[str]:
    """Return the questions of a split that a file's rows name, such as one of answers to some.

    Raises:
        BenchmarkError: if the file is corrupted, or a row names no question.
    """
    rows = of_split(path, numbered(read_rows(path)), split)
    key = id_key(rows)
    return {row_id(row, key, f"row {number} of {path}") for number, row in rows.items()}


def of_split(path: str | Path, rows: Rows, split: str) -> Rows:
    """Return the rows of a split, its questions numbered from 1; all if the file has no other.

    It has others if the numbers are LLaVA's (``LLAVA_NUMBERS``), or each row names its category.

    Raises:
        BenchmarkError: if a row names no question, or none is of the split.
    """
    key = id_key(rows) or ID_KEYS[0]
    ids = {number: row_id(row, key, f"row {number} of {path}") for number, row in rows.items()}
    llavas = any(name.isdecimal() and int(name) > _APART for name in ids.values())
    named = all(row.get("category") in LLAVA_NUMBERS for row in rows.values())
    if split not in LLAVA_NUMBERS or not (llavas or named):
        return rows
    if named:
        rows = {number: row for number, row in rows.items() if row["category"] == split}
    if llavas:
        first = LLAVA_NUMBERS[split]
        places = {number: int(ids[number]) - first for number in rows if ids[number].isdecimal()}
        inside = {number: place for number, place in places.items() if 0 < place <= _APART}
        rows = {number: {**rows[number], key: place} for number, place in inside.items()}
    if not rows:
        raise BenchmarkError(
            f"{path} has {len(ids)} answers, none of them to the split {split}. Pass split= the "
            "one that was answered."
        )
    return rows
