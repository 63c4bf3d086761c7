"""A part of a run that is asked apart: whole batches, at their places in the order of the samples.

Batches decide the last digits of the margins, so a shard is never cut inside one. A shard lies in
``shards/NUMBER`` of the folder of its run and has that run's ``run.json`` and ``samples.jsonl``,
its own answers, and ``shard.json``: which one it is and, once it is finished, the SHA-256 of its
answers.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clva_lens.benchmarks.lines import sha256_of_lines
from clva_lens.benchmarks.run_folder import ANSWERS, ANSWERS_SHA256, RUN
from clva_lens.ground.errors import BenchmarkError, ParameterError

SHARDS, SHARD = "shards", "shard.json"
NOTHING = hashlib.sha256().hexdigest()
"""The SHA-256 of no answers: there may be more shards than batches."""


@dataclass(frozen=True)
class Shard:
    """The part ``number`` of a run that is cut into ``of`` parts, counted from 1."""

    number: int
    of: int

    def __post_init__(self) -> None:
        """Check that there is such a part."""
        if not 1 <= self.number <= self.of:
            raise ParameterError(
                f"there is no shard {self.number} of {self.of}. Pass one from 1/{self.of} to "
                f"{self.of}/{self.of}."
            )

    def __str__(self) -> str:
        """Return it as the command line takes it."""
        return f"{self.number}/{self.of}"

    def part(self, batches: Sequence[range]) -> list[range]:
        """Return the shard's batches: neighbours, as many as any other shard's or one fewer.

        >>> [Shard(n, 3).part([range(0, 4), range(4, 8), range(8, 9)]) for n in (1, 3)]
        [[range(0, 4)], [range(8, 9)]]
        """
        start, stop = (len(batches) * place // self.of for place in (self.number - 1, self.number))
        return list(batches[start:stop])

    def told(self, answers: str | None) -> dict[str, Any]:
        """Return what its folder says of it; ``answers`` is their SHA-256 once it is finished."""
        return {"shard": self.number, "of": self.of, ANSWERS_SHA256: answers}

    def folder(self, run: Path) -> Path:
        """Return where it lies in the folder of its run."""
        return run / SHARDS / str(self.number)


def parse_shard(text: str) -> Shard:
    """Return the shard that is written as 3/8.

    Raises:
        ParameterError: if it is none.
    """
    number, sign, of = text.partition("/")
    if not (sign and number.strip().isdecimal() and of.strip().isdecimal()):
        raise ParameterError(f"'{text}' is no shard. Write it as 3/8: the third of eight.")
    return Shard(int(number), int(of))


def shard_of(folder: Path) -> tuple[Shard, str | None] | None:
    """Return which shard a folder is and the SHA-256 of its answers, None while it is unfinished.

    Raises:
        BenchmarkError: if what it says of itself is damaged.
    """
    path = folder / SHARD
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_bytes())
        return Shard(int(told["shard"]), int(told["of"])), told.get(ANSWERS_SHA256)
    except (OSError, ValueError, KeyError, TypeError, ParameterError) as error:
        raise BenchmarkError(
            f"{path} is damaged ({error}). Remove the folder, and run the shard again."
        ) from None


def require_as_finished(folder: Path) -> None:
    """Return silently if the answers of a shard are those that it was finished with.

    Raises:
        BenchmarkError: if they are others.
    """
    found = shard_of(folder)
    if found is None or found[1] is None:
        return
    now = sha256_of_lines(folder / ANSWERS) if (folder / ANSWERS).is_file() else NOTHING
    if now != found[1]:
        raise BenchmarkError(
            f"{folder / ANSWERS} was changed after shard {found[0]} was finished: its SHA-256 is "
            f"{now}, and {SHARD} says {found[1]}. Restore the file, or remove the folder and run "
            "the shard again."
        )


def check_sharded(folder: Path) -> None:
    """Raise if a shard cannot be written below a folder, because a whole run was begun in it.

    Raises:
        BenchmarkError: naming the folder.
    """
    if (folder / RUN).is_file() and not (folder / SHARDS).is_dir():
        raise BenchmarkError(
            f"'{folder}' holds a run that was not cut into shards. Continue it without --shard, or "
            "pass another folder."
        )
