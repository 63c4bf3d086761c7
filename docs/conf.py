"""How Sphinx builds these pages: sphinx-build -W -n docs build/site."""

import re
from importlib.metadata import version as version_of
from typing import Any

from sphinx.util.typing import stringify_annotation

from clva_lens.models.pictures import ImageLike
from clva_lens.models.prompt import Asked

project = "clva_lens"
copyright = "the clva_lens authors"
version = release = version_of("clva-lens")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "clva_lens"
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_use_rtype = False
# Types of torch, transformers and Python are names here, not links: nothing is fetched to build.
nitpick_ignore_regex = [("py:(class|obj|exc|data)", ".*")]

LONG = {
    "Asked": stringify_annotation(Asked, "smart"),
    "ImageLike": stringify_annotation(ImageLike, "smart"),
}


def readable(text: str | None) -> str | None:
    """Return a signature with shapes and long unions as written: Float[Tensor, 'layer']."""
    for name, alias in LONG.items():
        text = text and text.replace(alias, name)
    return text and re.sub(r"~?(?:jaxtyping|torch|collections\.abc|typing)\.(?=\w)", "", text)


def signature(
    app: Any, what: str, name: str, obj: Any, options: Any, shown: str, returned: str
) -> tuple[str | None, str | None]:
    """Make a signature readable."""
    return readable(shown), readable(returned)


def docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Show a module's docstring as it stands, since its formulas are laid out by hand."""
    if what == "module":
        lines[:] = ["::", "", *(f"   {line}" for line in lines), ""]


def links(app: Any, name: str, source: list[str]) -> None:
    """Make links to Markdown that is no page of the site (the log, cards) downloads."""
    source[0] = re.sub(r"\]\((\.\./[^)#]+\.md)(#[^)]*)?\)", r"](path:\1)", source[0])


def setup(app: Any) -> None:
    """Connect them, the docstrings' before napoleon's own."""
    app.connect("source-read", links)
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-process-docstring", docstring, priority=100)
