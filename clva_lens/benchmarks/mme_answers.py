r"""Answers of others to MME: the folder that its own script reads, and LLaVA's rows.

One row of LLaVA's: ``{"question_id": "code_reasoning/0020.png", "prompt": "Is a python code shown
in the picture?\nAnswer the question using a single word or phrase.", "text": "Yes"}``. Pictures are
matched by name without its ending, since LLaVA's folder of results calls that one ``0020.txt``.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clva_lens.benchmarks.base import Answer, Sample
from clva_lens.benchmarks.files import read_rows
from clva_lens.benchmarks.foreign import (
    QUESTION_KEYS,
    answer_to,
    bare_words,
    id_key,
    is_asked,
    named_answers,
    numbered,
    picture_name,
    require_same_question,
    row_id,
)
from clva_lens.benchmarks.mme_files import read_results
from clva_lens.ground.errors import BenchmarkError


def read_mme_answers(
    path: str | Path, samples: Sequence[Sample], tasks: Collection[str]
) -> list[Answer]:
    """Return the answers in a folder of ``<task>.txt`` results, in a file of LLaVA's, or of ours.

    They are matched by picture and right answer (LLaVA's: and question), so their order does not
    matter. Answers to those of MME's ``tasks`` of which there are no samples are left out.

    Raises:
        BenchmarkError: if there are none, one is malformed, or one is about a picture that MME does
            not have or answers another question about it.
    """
    asked = {sample.category for sample in samples}
    elsewhere = {task for task in tasks if task not in asked}
    if Path(path).is_dir():
        return _of_folder(path, samples, elsewhere)
    rows = numbered(read_rows(path))
    if not rows:
        raise BenchmarkError(f"{path} has 0 answers. Pass a file with one answer a question.")
    key = id_key(rows)
    names = {number: row_id(row, key, f"row {number} of {path}") for number, row in rows.items()}
    rows = {n: row for n, row in rows.items() if names[n].partition("/")[0] not in elsewhere}
    ours = {sample.id for sample in samples}
    if any(names[number] in ours for number in rows):
        return named_answers(path, rows, samples)
    pictures: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        pictures.setdefault(_picture(sample.group), []).append(sample)
    answers = []
    for number, row in rows.items():
        where = f"row {number} of {path}"
        sample = _asked(row, pictures.get(_picture(names[number]), []), names[number], where)
        answers.append(answer_to(sample, sample.id, row, where))
    return answers


def _of_folder(
    folder: str | Path, samples: Sequence[Sample], elsewhere: Collection[str]
) -> list[Answer]:
    known = {(*_picture(sample.group), sample.label): sample for sample in samples}
    told = [
        (result, answer, known.get((*_picture(result.group), result.label)))
        for result, answer in zip(*read_results(folder), strict=True)
        if result.category not in elsewhere
    ]
    strange = [result.group for result, _, sample in told if sample is None]
    if strange:
        raise BenchmarkError(
            f"{len(strange)} results in {folder} are about no question of these, the first is "
            f"about {strange[0]}. Pass results of MME, or score what read_results() returns as it "
            "is."
        )
    found = []
    for result, answer, sample in told:
        assert sample is not None, "strange results were refused"
        where = f"the result of {result.group} ({result.label}) in {folder}"
        require_same_question(where, result.question, sample.question)
        found.append(replace(answer, id=sample.id))
    return found


def _picture(name: str) -> tuple[str, str]:
    """Return the task and the picture of ``task/picture`` or ``task/images/picture``."""
    return name.partition("/")[0], picture_name(name)


def _asked(row: Mapping[str, Any], pair: Sequence[Sample], name: str, where: str) -> Sample:
    """Return the one of a picture's two samples that a row answers."""
    told = next((row[key] for key in QUESTION_KEYS if isinstance(row.get(key), str)), "")
    same = [sample for sample in pair if bare_words(sample.question) == bare_words(told)]
    found = same or [sample for sample in pair if is_asked(told, sample.question)]
    if len(found) != 1:
        questions = " or ".join(f"'{sample.question}'" for sample in pair) or "nothing"
        raise BenchmarkError(
            f"{where} answers '{told}' about {name}, of which is asked {questions}. Pass answers "
            "to MME whose rows have question_id (task/picture), prompt and text."
        )
    return found[0]
