"""Figures of records: the same registry pattern, drawing what a record keeps and nothing else."""

from collections.abc import Callable
from typing import Any

from clva_lens.figures.base import Drawing, look
from clva_lens.ground.registry import Registry

RECORD_FIGURES = Registry[Callable[..., Drawing]]("figure of records")


def record_figure(name: str) -> Callable[[Callable[..., Drawing]], Callable[..., Drawing]]:
    """Return a decorator that registers ``draw(record, **options)``.

    ``record`` has ``rows(name)``, ``arrays(name)`` and ``metrics``, of a record or of a draft.
    """

    def decorate(draw: Callable[..., Drawing]) -> Callable[..., Drawing]:
        def styled(record: Any, **options: Any) -> Drawing:
            with look():
                return draw(record, **options)

        RECORD_FIGURES.register(name, styled)
        return draw

    return decorate
