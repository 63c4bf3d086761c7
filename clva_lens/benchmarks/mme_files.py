"""MME's files: questions in the layouts they are published in, and folders of results."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from clva_lens.benchmarks import hub
from clva_lens.benchmarks.base import Answer, Sample, match
from clva_lens.benchmarks.files import locate, read_rows
from clva_lens.ground.errors import BenchmarkError

_FROM = (
    "the MME authors (github.com/BradyFU/Awesome-Multimodal-Large-Language-Models) or "
    "hf://datasets/lmms-lab-encoder/MME"
)
_PLACES = (
    "mme/MME_Benchmark_release_version",
    "MME_Benchmark_release_version",
    "MME_question.jsonl",
    "mme/MME_question.jsonl",
    "mme",
)
_JSON_KEYS = ("image_path", "question", "answer", "category")
_HUB_KEYS = ("question_id", "image", "question", "answer", "category")
_PICTURES = (".jpg", ".jpeg", ".png")


class Questions(NamedTuple):
    """Where questions are: the files that hold them, in what layout, and the folder or file."""

    root: Path
    layout: Literal["json", "parquet", "folders", "lists"]
    files: tuple[Path, ...]


def find_questions(data: str | Path | None) -> Questions:
    """Return where the questions in ``data`` are, or in $CLVA_LENS_DATA.

    Raises:
        BenchmarkError: if there are none.
    """
    if hub.is_hub(data):
        folder = hub.download(str(data))
        return Questions(folder, "parquet", tuple(hub.parquet_files(folder, ("test",))))
    places = _PLACES if data is None else (*_PLACES, ".")
    root = locate(data, places, "the data of MME", _FROM)
    if root.is_file():
        return Questions(root, "json", (root,))
    if hub.has_parquet(root):
        return Questions(root, "parquet", tuple(hub.parquet_files(root, ("test",))))
    texts = [p for p in sorted(root.glob("*/*.txt")) if not p.parent.name.startswith("questions")]
    texts += sorted(root.glob("*/questions_answers_YN/*.txt"))
    if texts:
        return Questions(root, "folders", tuple(texts))
    lists = tuple(sorted(root.glob("*.txt")))
    if lists:
        return Questions(root, "lists", lists)
    raise BenchmarkError(
        f"there are no MME questions in {root}: no task folders, <task>.txt lists, JSON lines or "
        f"parquet files. Get them from {_FROM}."
    )


def image_folder(images: str | Path | None, questions: Questions) -> Path:
    """Return the folder that the pictures' names are relative to."""
    if images is not None:
        return Path(images)
    beside = questions.root if questions.root.is_dir() else questions.root.parent
    inner = [beside / name for name in ("images", "MME_Benchmark_release_version")]
    return next((folder for folder in inner if folder.is_dir()), beside)


def read_questions(questions: Questions, tasks: Sequence[str]) -> list[Sample]:
    """Return every question; the image is a path, a picture, or a file name yet to be found.

    The group is ``task/picture``, the id adds the number of the question about it. Labels are in
    lower case.

    Raises:
        BenchmarkError: if a file is malformed, or a task is none of ``tasks``.
    """
    read = {"json": _json, "parquet": _parquet, "folders": _folders, "lists": _lists}
    seen: Counter[str] = Counter()
    found = []
    for task, name, image, question, answer in read[questions.layout](questions):
        label = answer.strip().lower()
        if task not in tasks or label not in ("yes", "no"):
            raise BenchmarkError(
                f"{questions.root} asks '{question}' about {name} in the task '{task}' with the "
                f"answer '{answer}', but tasks are {', '.join(tasks)} and answers yes or no. Pass "
                "MME's own files."
            )
        group = f"{task}/{PurePosixPath(name).name}"
        seen[group] += 1
        found.append(Sample(f"{group}/{seen[group]}", image, question, label, group, category=task))
    return found


_Row = tuple[str, str, Any, str, str]


def _json(questions: Questions) -> Iterator[_Row]:
    for row in read_rows(questions.files[0], _JSON_KEYS):
        name = row["image_path"]
        yield row["category"], name, name, row["question"], row["answer"]


def _parquet(questions: Questions) -> Iterator[_Row]:
    pictures: dict[str, Any] = {}
    for row in hub.read_parquet(questions.files, _HUB_KEYS):
        name = row["question_id"]
        if name not in pictures:
            pictures[name] = hub.picture(row["image"])
        yield row["category"], name, pictures[name], row["question"], row["answer"]


def _folders(questions: Questions) -> Iterator[_Row]:
    for file in questions.files:
        folder = questions.root / file.relative_to(questions.root).parts[0]
        name = _picture_beside(folder, file.stem)
        for question, answer in _fields(file, 2):
            yield folder.name, name, f"{folder.name}/{name}", question, answer


def _picture_beside(folder: Path, stem: str) -> str:
    """Return the picture of a question file, by its name inside the task's folder."""
    for inner in ("images", ".", "images/toy_dataset"):
        for ending in _PICTURES:
            if (folder / inner / f"{stem}{ending}").is_file():
                return (PurePosixPath(inner) / f"{stem}{ending}").as_posix()
    return f"{stem}{_PICTURES[0]}"


def _lists(questions: Questions) -> Iterator[_Row]:
    for file in questions.files:
        for name, question, answer in _fields(file, 3):
            yield file.stem, name, name, question, answer


def _fields(file: Path, count: int) -> Iterator[list[str]]:
    """Yield the tab-separated fields of each line that is not blank."""
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        fields = line.rstrip("\r").split("\t")
        if len(fields) != count:
            raise BenchmarkError(
                f"line {number} of {file} has {len(fields)} fields between tabs, but must have "
                f"{count}. A tab or line break inside an answer does that: replace it."
            )
        yield fields


class Written(NamedTuple):
    """What was written: the files, and how many answers had tabs or line breaks replaced."""

    files: tuple[Path, ...]
    replaced: int


def write_results(
    folder: str | Path, samples: Sequence[Sample], answers: Sequence[Answer]
) -> Written:
    r"""Write ``<task>.txt`` files as MME's calculation.py reads them.

    A line is picture, question, right answer and response between tabs; the two questions of a
    picture follow each other, as the script takes consecutive lines for a pair. A tab or line break
    inside a field would break the line, and becomes a space; how many responses that happened to
    is returned. A failed sample has an empty response, which the script counts as wrong. The script
    wants all 14 files; for fewer, shorten its list of tasks.

    Raises:
        BenchmarkError: if ids differ, or a picture has not two questions.
    """
    pairs: dict[tuple[str, str], list[tuple[Sample, Answer]]] = {}
    for sample, answer in match(samples, answers):
        pairs.setdefault((sample.category, sample.group), []).append((sample, answer))
    lines: dict[str, list[str]] = {}
    replaced = 0
    for (task, group), pair in pairs.items():
        if len(pair) != 2:
            raise BenchmarkError(
                f"the picture '{group}' has {len(pair)} questions, but calculation.py reads two "
                "a picture. Write a whole run, or a limit that cuts no picture."
            )
        for sample, answer in pair:
            text = "" if answer.error is not None else answer.text
            replaced += text != _one_line(text)
            fields = (
                PurePosixPath(group).name,
                _one_line(sample.question),
                sample.label.capitalize(),
                _one_line(text),
            )
            lines.setdefault(task, []).append("\t".join(fields) + "\n")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    files = [target / f"{task}.txt" for task in lines]
    for file, task in zip(files, lines, strict=True):
        file.write_text("".join(lines[task]), encoding="utf-8")
    return Written(tuple(files), replaced)


def _one_line(text: str) -> str:
    return text.translate({ord(sign): " " for sign in "\t\n\r"})


def read_results(folder: str | Path) -> tuple[list[Sample], list[Answer]]:
    """Return samples (without pictures) and answers from a folder of ``<task>.txt`` results.

    Questions are paired by picture, whatever their order in the file.

    Raises:
        BenchmarkError: if there are no such files or a line is malformed, naming it.
    """
    files = sorted(Path(folder).glob("*.txt"))
    if not files:
        raise BenchmarkError(f"there are no <task>.txt files in {folder}. Pass a results folder.")
    samples, answers = [], []
    seen: Counter[str] = Counter()
    for file in files:
        for name, question, label, text in _fields(file, 4):
            group = f"{file.stem}/{PurePosixPath(name).name}"
            seen[group] += 1
            one = f"{group}/{seen[group]}"
            samples.append(
                Sample(one, None, question, label.strip().lower(), group, category=file.stem)
            )
            answers.append(Answer(one, text))
    return samples, answers
