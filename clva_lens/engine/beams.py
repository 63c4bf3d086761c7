"""Beam search in a run: which row of the pass before each row continues.

transformers tells nobody but the key-value cache, whose rows it reorders between two passes.
"""

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clva_lens.ground.errors import InterventionError
from clva_lens.models.belonging import hook_after
from clva_lens.models.kv_cache import cache_of
from clva_lens.models.step import Step

Told = Callable[[Int[Tensor, " row"]], None]

_LISTENERS: WeakKeyDictionary[Any, list[Told]] = WeakKeyDictionary()
"""Who is told when the rows of a cache are reordered."""


class Histories:
    """What each row of each pass has read since the prompt, through all reordering of beams."""

    def __init__(self) -> None:
        """Begin before any pass."""
        self.prompt: Int[Tensor, "row prompt"] | None = None
        self.places: list[tuple[int, int]] = []
        self._passes: list[Int[Tensor, " row"]] = []
        self._positions: list[int] = []
        self._twice = False
        self._parents: dict[int, Int[Tensor, " row"]] = {}

    def read(self, step: Step) -> None:
        """Take note of the tokens that a pass reads; what was guessed in vain is forgotten.

        ``places`` has, for each token that was kept, the number of the pass that read it, and its
        place among that pass's generated rows.
        """
        if step.ids is None:
            return
        count = step.ids.shape[1]
        old = step.old_rows(count)
        if step.number == 0:
            self.prompt, self._passes, self._parents = step.ids[:, :old], [], {}
            self.places, self._positions, self._twice = [], [], False
        while self._positions and self._positions[-1] >= step.offset + old:
            again = self._positions[-1] == step.offset and torch.equal(
                self._passes[-1], step.ids[:, 0]
            )
            self._twice = self._twice or (again and step.offset > 0)
            for known in (self._positions, self._passes, self.places):
                known.pop()
        for row in range(old, count):
            self._passes.append(step.ids[:, row])
            self._positions.append(step.offset + row)
            self.places.append((step.number, row - old))

    def reorder(self, rows: Int[Tensor, " row"]) -> None:
        """Take note that each row of the next pass continues one of these of the pass before."""
        self._parents[len(self._passes) + 1] = rows

    def rows_of(self, ids: Int[Tensor, "answer position"], prompts: int) -> list[list[int]]:
        """Return, for each answer, the row of each pass that has read it so far, the prompt first.

        Raises:
            InterventionError: if no row of an answer's prompt read its first token, or two read
                the same sequence.
        """
        if self._twice:
            raise InterventionError(
                "the model read its answer twice, as its own assistant, so it is unknown which of "
                "the two was seen. Generate without assistant_model and assistant_early_exit."
            )
        assert self.prompt is not None
        size, count = len(self.prompt) // prompts, len(ids) // prompts
        new = self.new(ids, prompts)
        histories = self._histories()
        found = []
        for number, tokens in enumerate(new):
            group = range(number // count * size, (number // count + 1) * size)
            rows = [group[0]]
            for length, histories_then in enumerate(histories[1 : len(tokens)], start=1):
                row = next((r for r in group if histories_then[r] == tokens[:length]), None)
                if row is None:
                    break
                rows.append(row)
            if len(rows) == 1 < min(len(tokens), len(histories)):
                raise InterventionError(
                    f"answer {number} begins with token {tokens[0]}, which no row read after its "
                    "prompt. Pass the ids that generate() returned under this observation, and "
                    "prompts= their number."
                )
            found.append(rows)
        return found

    def new(self, ids: Int[Tensor, "answer position"], prompts: int) -> list[list[int]]:
        """Return the answers without the prompt, if they have it."""
        assert self.prompt is not None
        size, count = len(self.prompt) // prompts, len(ids) // prompts
        start = self.prompt.shape[1]
        whole = ids.shape[1] >= start and torch.equal(
            ids[::count, :start].cpu(), self.prompt[::size].cpu()
        )
        return (ids[:, start:] if whole else ids).tolist()

    def _histories(self) -> list[list[list[int]]]:
        """Return what each row had read after each pass."""
        assert self.prompt is not None
        known: list[list[list[int]]] = [[[] for _ in self.prompt]]
        for number, tokens in enumerate(self._passes, start=1):
            parents = self._parents.get(number)
            before = range(len(tokens)) if parents is None else parents.tolist()
            pairs = zip(before, tokens.tolist(), strict=True)
            known.append([[*known[-1][row], token] for row, token in pairs])
        return known


class Reordering:
    """Tells of the rows that a beam search keeps, from ``begin`` to ``end``."""

    def __init__(self, entry: nn.Module, told: Told) -> None:
        """Name the module that hands out the cache, and who is told."""
        self.entry, self.told = entry, told
        self._cache: Any = None
        self._handle: RemovableHandle | None = None

    def begin(self) -> None:
        """Watch the caches of the passes to come."""
        self._handle = hook_after(self.entry, self._follow)

    def end(self) -> None:
        """Let go of the model and its cache."""
        if self._handle is not None:
            self._handle.remove()
        self._release()

    def _follow(self, _: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        cache = cache_of(out) if isinstance(out, Mapping) else None
        if cache is None or cache is self._cache:
            return
        self._release()
        self._cache = cache
        if cache not in _LISTENERS:
            listeners = _LISTENERS[cache] = []
            reorder = cache.reorder_cache

            def reorder_and_tell(beam_idx: Int[Tensor, " row"]) -> None:
                reorder(beam_idx)
                for told in listeners:
                    told(beam_idx)

            cache.reorder_cache = reorder_and_tell
        _LISTENERS[cache].append(self.told)

    def _release(self) -> None:
        if self._cache is None:
            return
        listeners = _LISTENERS[self._cache]
        listeners.remove(self.told)
        if not listeners:
            del self._cache.reorder_cache, _LISTENERS[self._cache]
        self._cache = None
