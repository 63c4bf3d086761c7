"""The tables and figures of the paper that can be made again: one file, and one line here, each."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from clva_lens.experiments.reproduce.cells import Cell
from clva_lens.experiments.reproduce.found import Found, Missing
from clva_lens.experiments.reproduce.needs import Measure, Need
from clva_lens.experiments.reproduce.subjects import Subject
from clva_lens.figures.base import Drawing
from clva_lens.ground.registry import Registry


@dataclass(frozen=True)
class Answered:
    """One question with the answers of several methods; ``marked`` are (start, end) in a text."""

    model: str
    sample: str
    question: str
    answers: Mapping[str, str]
    marked: Mapping[str, Sequence[tuple[int, int]]]
    told: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """What an item says of one model: cells, drawings by name, answers and sentences."""

    cells: Sequence[Cell] = ()
    drawings: Mapping[str, Drawing] = field(default_factory=dict)
    answers: Sequence[Answered] = ()
    notes: Sequence[str] = ()


class Item(ABC):
    """A table or figure of the paper: what it needs of a model, and how that becomes its cells."""

    name: ClassVar[str]
    title: ClassVar[str]
    method: ClassVar[str]
    """What is measured, and where it departs from the paper, in a few sentences."""

    @abstractmethod
    def needs(self, subject: Subject) -> Sequence[Need]:
        """Return the runs and measurements that are needed of a model."""

    @abstractmethod
    def part(self, subject: Subject, found: Found) -> Part:
        """Return what is said of a model, from what lies in the folder."""


class Measured(Item):
    """A table or figure that one measurement of a model says all of."""

    @abstractmethod
    def measure(self, subject: Subject) -> Measure:
        """Return the measurement."""

    @abstractmethod
    def shown(self, subject: Subject, told: dict[str, Any]) -> Part:
        """Return what is said of a model, from what was measured."""

    def needs(self, subject: Subject) -> Sequence[Need]:
        """Return one measurement."""
        return [self.measure(subject)]

    def part(self, subject: Subject, found: Found) -> Part:
        """Return what is shown, or why it is missing."""
        try:
            told = found.measured(self.measure(subject))
        except Missing as missing:
            return Part(notes=[f"{subject.model}: {missing}."])
        return self.shown(subject, told)


ITEMS = Registry[Item]("table or figure")


def register(item: type[Item]) -> type[Item]:
    """Register a table or figure under its name."""
    ITEMS.register(item.name, item())
    return item


def chosen(only: Sequence[str]) -> dict[str, Item]:
    """Return the items that are named, or all, in the paper's order.

    Raises:
        UnknownName: if there is no such item.
    """
    names = [ITEMS.spelled(one) for one in only] or list(ITEMS.names())
    return {name: ITEMS.get(name) for name in sorted(set(names), key=_place)}


def _place(name: str) -> tuple[Any, ...]:
    kind, _, number = name.partition(" ")
    order = ("table", "figure", "figures", "equation", "claim")
    first = re.match(r"\d*", number)
    return order.index(kind), int(first[0]) if first and first[0] else 0, number
