"""What a method costs in passes of the language model, counted while it answers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from clva_lens.ground.errors import ClvaLensError
from clva_lens.lens.decoding import Beam, Decoding, Greedy
from clva_lens.lens.generate import generate
from clva_lens.lens.load import LensModel
from clva_lens.methods.base import METHODS, MethodLike, as_method
from clva_lens.models.family import find_site

TOKENS = 4


class Cost(NamedTuple):
    """An answer, its number of tokens (an end token included), and passes of all layers for it."""

    text: str
    tokens: int
    passes: float

    @property
    def each(self) -> float:
        """Passes a token."""
        return self.passes / self.tokens


@contextmanager
def counting(kind: type[nn.Module]) -> Iterator[Callable[[], int]]:
    """Count how often modules of a class run, those of a model's twins too, in any thread."""
    count = 0

    def note(module: nn.Module, *_: Any) -> None:
        nonlocal count
        count += type(module) is kind

    handle = register_module_forward_hook(note)
    try:
        yield lambda: count
    finally:
        handle.remove()


def measure_passes(
    model: LensModel, asked: Any, method: MethodLike | None, decoding: Decoding | None = None
) -> Cost:
    """Return what one answer under a method costs, whatever second inputs and searches it has.

    A pass is one run of the language model's attention layers, for however many rows: the five
    beams of a search are one. Those that read a prompt count like any other.
    """
    how = decoding or Greedy(max_new_tokens=TOKENS)
    attention = find_site(model.hf_model, "decoder").modules
    with counting(type(attention[0])) as counted:
        made = generate(model, asked, method, how, progress=False)
    ids = made.ids[0]
    tokens = min(len(ids) + 1, how.max_new_tokens)
    return Cost(made.texts[0], tokens, counted() / len(attention))


def methods_table(model: LensModel, asked: tuple[Any, str]) -> Table:
    """Return every registered method's answer to one question, and passes a token as counted."""
    table = Table(
        "method",
        "answer",
        "passes a token",
        title=f"All methods at their defaults: {asked[1]}",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    for name in (None, *METHODS.names()):
        try:
            method = as_method(name)
            greedy = method is None or "greedy" in method.decodings
            how = Greedy(max_new_tokens=TOKENS) if greedy else Beam(max_new_tokens=TOKENS)
            cost = measure_passes(model, asked, method, how)
            table.add_row(name or "none", cost.text, f"{cost.each:.2g}")
        except ClvaLensError as error:
            table.add_row(name or "none", "refused", str(error).split(", ")[0][:60])
    return table
