"""CHAIR: how much of what captions mention is not there (Rohrbach et al., arXiv:1809.02156).

One row of a caption file: ``{"image_id": 310196, "caption": "The image features a snowboarder"}``;
its label here: "person,snowboard", the objects that are there, by node word and sorted.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clva_lens.benchmarks.base import Answer, Sample, Score, match, require_known
from clva_lens.benchmarks.chair_reading import Reader
from clva_lens.benchmarks.comparison import ROW_KINDS, RowKind
from clva_lens.benchmarks.metrics import Metric, ratio
from clva_lens.ground.errors import BenchmarkError

PROMPT = "Please describe this image in detail."
KIND = "caption"
TRUNCATIONS = ("keep", "drop_unfinished")
# A sentence ends with a mark and what closes after it, before a space or at the end.
_SENTENCE_END = re.compile(r"""[.!?]+["'”’)\]]*(?=\s|$)""")


@dataclass(frozen=True)
class Captions:
    """The columns of a run that CHAIR is computed from, one entry a caption.

    ``mentioned`` and ``hallucinated`` count mentions with repeats, ``found`` and ``present`` count
    objects once; ``wrong`` is 1 for a caption with a hallucination or with none at all because the
    model failed, ``length`` its number of tokens, ``answered`` 0 where the model failed.
    """

    mentioned: np.ndarray
    hallucinated: np.ndarray
    wrong: np.ndarray
    found: np.ndarray
    present: np.ndarray
    length: np.ndarray
    answered: np.ndarray

    @classmethod
    def from_rows(cls, rows: Sequence[dict[str, Any]]) -> "Captions":
        """Return the columns of a score's rows."""

        def column(values: Sequence[float | int]) -> np.ndarray:
            return np.array(values, dtype=float)

        failed = column([row["failed"] for row in rows])
        hallucinated = column([len(row["hallucinated"]) for row in rows])
        return cls(
            mentioned=column([len(row["mentioned"]) for row in rows]),
            hallucinated=hallucinated,
            wrong=np.maximum(hallucinated > 0, failed),
            found=column([len(set(row["mentioned"]) - set(row["hallucinated"])) for row in rows]),
            present=column([len(truth(row["label"])) for row in rows]),
            length=column([row["length"] for row in rows]),
            answered=1 - failed,
        )

    @property
    def correct(self) -> np.ndarray:
        """1 where a caption has no hallucination."""
        return 1 - self.wrong


def _chair_s(run: Captions, weights: np.ndarray) -> np.ndarray:
    return ratio(weights @ run.wrong, weights.sum(axis=1))


def _chair_i(run: Captions, weights: np.ndarray) -> np.ndarray:
    return ratio(weights @ run.hallucinated, weights @ run.mentioned)


def _recall(run: Captions, weights: np.ndarray) -> np.ndarray:
    return ratio(weights @ run.found, weights @ run.present)


def _f1(run: Captions, weights: np.ndarray) -> np.ndarray:
    precision, recall = 1 - _chair_i(run, weights), _recall(run, weights)
    total = precision + recall
    # All mentions wrong and nothing found: both are defined, and so is F1.
    return np.where(total == 0, 0.0, ratio(2 * precision * recall, total))


def _length(run: Captions, weights: np.ndarray) -> np.ndarray:
    return ratio(weights @ run.length, weights @ run.answered)


CAPTION_METRICS: dict[str, Metric] = {
    "chair_s": _chair_s,
    "chair_i": _chair_i,
    "recall": _recall,
    "f1": _f1,
    "length": _length,
}
ROW_KINDS.register(KIND, RowKind(Captions.from_rows, CAPTION_METRICS, ("label", "group", "reader")))


def label(objects: Sequence[str] | set[str] | frozenset[str]) -> str:
    """Return the label of an image with these objects, given by node word."""
    return ",".join(sorted(set(objects)))


def truth(text: str) -> list[str]:
    """Return the objects of a label."""
    return text.split(",") if text else []


def truncate(caption: str, rule: str) -> str:
    """Return the caption as it is ("keep"), or without an unfinished last sentence.

    A limit of tokens cuts captions within a sentence; OPERA's numbers at 64 tokens leave that
    sentence out (github.com/shikiw/OPERA, issue 30). A caption that has no finished sentence
    becomes empty.

    >>> truncate("A dog runs. It has a", "drop_unfinished")
    'A dog runs.'
    """
    if rule == "keep":
        return caption
    ends = [found.end() for found in _SENTENCE_END.finditer(caption)]
    return caption[: ends[-1]] if ends else ""


def is_finished(caption: str) -> bool:
    """Return whether a caption ends where a sentence does."""
    return truncate(caption.strip(), "drop_unfinished") == caption.strip()


def score_captions(
    samples: Sequence[Sample],
    answers: Sequence[Answer],
    reader: Reader,
    truncation: str = "keep",
) -> Score:
    """Return the CHAIR score of captions; a sample's label has the objects of its image.

    Fractions in [0, 1]: ``chair_s`` (captions with a hallucinated object / captions), ``chair_i``
    (hallucinated mentions / mentions, both with repeats, summed over captions), ``recall`` (objects
    mentioned and there / objects there, summed over images; from the port to Python 3,
    github.com/Maxlinn/CHAIR-metric-standalone, commit 471eb753) and ``f1`` of 1 − ``chair_i`` and
    ``recall``. ``length`` is the mean number of words and marks, merged pairs as one. Counts:
    ``failed`` samples, ``empty`` captions, ``unfinished`` ones (they end within a sentence), ``n``.

    An empty caption has no hallucination, as officially. A failed sample counts as a caption with
    one, misses all objects of its image, and has no length. A zero denominator gives nan, where the
    official script crashes.

    Raises:
        BenchmarkError: if samples and answers do not have the same ids, or the labels were made
            with another reader.
        ParameterError: if there is no such truncation.
    """
    require_known("truncation", truncation, TRUNCATIONS)
    rows: list[dict[str, Any]] = []
    failed_count = empty = unfinished = 0
    for sample, answer in match(samples, answers):
        present = _present(sample, reader)
        failed = answer.error is not None
        text = "" if failed else truncate(answer.text, truncation)
        objects = reader.read(text)
        failed_count += failed
        empty += not failed and not text.strip()
        unfinished += not failed and not is_finished(answer.text)
        rows.append(
            {
                "kind": KIND,
                "id": sample.id,
                "group": sample.group,
                "question": sample.question,
                "label": sample.label,
                "answer": answer.text,
                "mentioned": objects.nodes,
                "hallucinated": [node for node in objects.nodes if node not in present],
                "length": objects.length,
                "failed": failed,
                "reader": f"{reader.name}, truncation {truncation}",
            }
        )
    columns, one = Captions.from_rows(rows), np.ones((1, len(rows)))
    metrics = {name: float(metric(columns, one)[0]) for name, metric in CAPTION_METRICS.items()}
    counts = {
        "failed": failed_count,
        "empty": empty,
        "unfinished": unfinished,
        "n": len(rows),
    }
    return Score(metrics | {name: float(count) for name, count in counts.items()}, rows)


def _present(sample: Sample, reader: Reader) -> set[str]:
    if sample.category != reader.name:
        raise BenchmarkError(
            f"the objects of '{sample.id}' were read with {sample.category or 'nothing known'}, "
            f"but its caption is to be read with {reader.name}. Make the samples again with these "
            "settings."
        )
    return set(truth(sample.label))
