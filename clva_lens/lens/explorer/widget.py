"""The explorer in a notebook: the page's module, with heads that come from the kernel."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from clva_lens.ground.errors import ParameterError
from clva_lens.lens.explorer.explored import Explored
from clva_lens.lens.explorer.packing import MOST_LIVE, heads_of, pack
from clva_lens.lens.explorer.page import module, style


@cache
def _widget_class() -> type[Any]:
    """Return the kind of widget, which is made when it is first shown: anywidget is an extra."""
    try:
        import anywidget  # pyright: ignore[reportMissingImports]
        import traitlets
    except ImportError:
        raise ParameterError(
            "show() needs anywidget, which is not installed. Run pip install 'clva-lens[explorer]' "
            "and restart the kernel, or write a page: exploration.to_html('page.html')."
        ) from None

    class ExplorerWidget(anywidget.AnyWidget):  # pyright: ignore[reportUntypedBaseClass]
        """Explorations in a notebook."""

        _esm = module()
        _css = style()
        said = traitlets.List().tag(sync=True)
        data = traitlets.List(traitlets.Bytes()).tag(sync=True)

    return ExplorerWidget


def widget(explorations: Sequence[Explored]) -> Any:
    """Return explorations as a widget.

    Raises:
        ParameterError: if anywidget is not installed.
    """
    packed = [pack(one, MOST_LIVE) for one in explorations]
    shown = _widget_class()(said=[one.said for one in packed], data=[one.data for one in packed])
    shown.on_msg(lambda _, asked, __: answer(shown, explorations, asked))
    return shown


def answer(shown: Any, explorations: Sequence[Explored], asked: Any) -> None:
    """Send the maps of the single heads that the page asks for."""
    which, word, heads = int(asked["which"]), int(asked["word"]), asked["heads"]
    shown.send(dict(asked), buffers=[heads_of(explorations[which], word, heads)])
