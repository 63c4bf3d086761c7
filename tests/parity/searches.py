"""Beam searches beside those of released programs: the part of ``methods.py`` that compares them.

A search is what it looks at in every round: what its beams said so far, best first, and the
log-probabilities that it goes on from; and its answer. A search that goes back shows it by beams
that are no longer than before. Both are seen as a processor of logits sees them, which leaves them
as they are.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import torch

import clva_lens as cl
from clva_lens.lens.beam_length import PromptCounted
from clva_lens.methods.base import Method

BEAMS = 5
FILLER = -300.0  # the release's "impossible" is a logit of -999


@dataclass
class Search:
    """An answer, the beams of each round, the log-probabilities, and each beam's penalties."""

    answer: list[int]
    beams: list[list[list[int]]] = field(default_factory=list)
    log_probs: list[torch.Tensor] = field(default_factory=list)
    penalties: list[torch.Tensor] = field(default_factory=list)

    @property
    def returns(self) -> list[tuple[int, int]]:
        """The rounds whose beams are no longer than those before, and their length."""
        lengths = [len(beams[0]) for beams in self.beams]
        pairs = enumerate(pairwise(lengths))
        return [(number + 1, after) for number, (before, after) in pairs if after <= before]


class Watched:
    """A processor of logits that notes what it is given."""

    def __init__(self, prompt_rows: int) -> None:
        self.prompt_rows = prompt_rows
        self.beams: list[list[list[int]]] = []
        self.log_probs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.beams.append(input_ids[:, self.prompt_rows :].tolist())
        self.log_probs.append(scores.clone())
        return scores


def read(found: dict[str, torch.Tensor], label: str) -> Search:
    """Return what ``released.py`` wrote of a search."""
    count = sum(1 for name in found if name.startswith(f"{label}.beams"))
    rounds = [found[f"{label}.beams{number}"].tolist() for number in range(count)]
    log_probs = [found[f"{label}.log_probs{number}"] for number in range(count)]
    return Search(found[f"{label}.answer"].tolist(), rounds, log_probs)


@torch.no_grad()
def ours(lens: Any, method: Method | None, given: dict, settings: dict, image: int) -> Search:
    """Return this package's search, a finished beam's length being counted as the release does."""
    ids = given["input_ids"]
    watched, count = Watched(ids.shape[1]), int((ids != image).sum()) + 1
    with cl.intervening(lens, *([] if method is None else [method])) as run:
        search = run.sessions[-1] if run.sessions else None
        out = lens.hf_model.generate(
            **given,
            num_beams=BEAMS,
            max_new_tokens=settings["steps"],
            do_sample=False,
            eos_token_id=settings["end"],
            pad_token_id=0,
            length_penalty=PromptCounted(count),
            logits_processor=[watched],
            **({} if search is None else {"custom_generate": search.decode}),
        )
    penalties = [] if search is None else [method.weight * x for x in search.penalties]
    answer = out[0, ids.shape[1] :].tolist()
    return Search(answer, watched.beams, watched.log_probs, penalties)


def compared(found: list[Search], mine: list[Search], plain: list[Search], label: str) -> str:
    """Return a line for one setting: of answers, rounds and log-probabilities.

    Rounds are compared up to the first one whose best beam is another.
    """
    equal = sum(a.answer == b.answer for a, b in zip(found, mine, strict=True))
    changed = sum(a.answer != b.answer for a, b in zip(mine, plain, strict=False))
    error, beams, rows, spread = 0.0, 0, 0, [0.0]
    for theirs, own in zip(found, mine, strict=True):
        for old, new, old_scores, new_scores in zip(
            theirs.beams, own.beams, theirs.log_probs, own.log_probs, strict=False
        ):
            for one, other, old_row, new_row in zip(old, new, old_scores, new_scores, strict=True):
                rows += 1
                if one == other:
                    beams += 1
                    kept = new_row.isfinite() & (old_row > FILLER)
                    error = max([error, *(old_row - new_row)[kept].abs().tolist()])
            if old[0] != new[0]:
                break
        spread += [float(x.max() - x.min()) for step in own.penalties for x in step]
    back = [search.returns for search in mine]
    same = sum(a.returns == b.returns for a, b in zip(found, mine, strict=True))
    lengths = sorted(len(search.answer) for search in found)
    return (
        f"{label}: difference {error:.1e}, penalties differ by {median(spread):.2g} to "
        f"{max(spread):.2g}; {equal} of {len(found)} answers equal ({lengths[0]} to {lengths[-1]} "
        f"tokens), {changed} not the plain search's; {beams} of {rows} beams; "
        f"{sum(map(len, back))} returns, {same} of {len(found)} alike"
    )
