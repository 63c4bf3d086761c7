"""An exploration in the hand: shown in a notebook, written as a page, drawn, saved."""

from pathlib import Path
from typing import Any

from clva_lens.figures import Drawing, photo_maps
from clva_lens.figures.photo_maps import Scale
from clva_lens.ground.drawn import SelfDrawn
from clva_lens.ground.errors import ParameterError
from clva_lens.lens.explorer.explored import Explored
from clva_lens.lens.explorer.packing import MOST_BYTES, pack
from clva_lens.lens.explorer.page import page, write_page
from clva_lens.lens.explorer.widget import widget
from clva_lens.science.heads import SomeHeads


class Exploration(SelfDrawn, Explored):
    """One prompt read without and with methods; see ``Explored`` for its arrays."""

    def to_html(self, path: str | Path, *, beside: Explored | None = None) -> Path:
        """Write one page that opens from disk, without a kernel or a network; return its path.

        ``beside`` is a second exploration, shown with it: their cursors are linked. A page has up
        to 3 MB an exploration, where rounder numbers and fewer single heads can keep it there.

        Raises:
            ParameterError: if the name does not end in ``.html``, or ``beside`` is of another
                model.
        """
        told = [pack(one, MOST_BYTES).document for one in self._with(beside)]
        return write_page(path, page(f"{self.question} · {self.model}", told))

    def show(self, *, beside: Explored | None = None) -> Any:
        """Return the explorer as a widget of a notebook, which asks the kernel for single heads.

        Raises:
            ParameterError: if anywidget is not installed, or ``beside`` is of another model.
        """
        return widget(self._with(beside))

    def _with(self, beside: Explored | None) -> list[Explored]:
        """Return what is shown together: explorations of one model's layers and heads.

        Raises:
            ParameterError: if they have others.
        """
        if beside is None:
            return [self]
        sizes = [(one.layers, one.maps.shape[2], len(one.names)) for one in (self, beside)]
        if sizes[0] != sizes[1]:
            raise ParameterError(
                "the two explorations have other layers, heads or numbers of methods, so their "
                "cursors cannot be linked. Explore both prompts with one model and one method."
            )
        return [self, beside]

    def draw(
        self,
        word: int = 0,
        layer: int | None = None,
        heads: SomeHeads | str = "all",
        *,
        scale: Scale = "p99",
        smooth: bool = False,
    ) -> Drawing:
        """Return the map of a word under each look, on one scale, as a matplotlib figure.

        For ``word``, ``layer`` and ``heads`` see ``map``, for the others ``cl.overlay``.

        Raises:
            ParameterError: if there is no such word, layer or head.
        """
        looks = range(len(self.names))
        layer = self.anchors[0] if layer is None else layer
        where = f"layer {layer}, {heads} heads" if isinstance(heads, str) else "chosen heads"
        return photo_maps(
            self.photo / 255,
            [self.map(word, layer, heads, look) for look in looks],
            titles=self.names,
            notes=[f"p = {self.probabilities[look, 0, word]:.2f}" for look in looks],
            scale=scale,
            smooth=smooth,
            label=f"attention as {self.words[word]!r} is written: {where} (fraction)",
        )

    def __repr__(self) -> str:
        """Return the answers, and the sizes."""
        looks, layers, heads, _, _ = self.maps.shape
        pairs = zip(self.names, self.answers, strict=True)
        said = ", ".join(f"{name}: {answer!r}" for name, answer in pairs)
        return (
            f"Exploration({self.question!r}; {said}; {layers} layers × {heads} heads × "
            f"{len(self.words)} words × {self.grid[0]} × {self.grid[1]} patches, {looks} looks)"
        )
