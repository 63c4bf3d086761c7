"""One page that opens from disk: arrays, module and style in one file; nothing else is asked."""

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from clva_lens.ground.errors import ParameterError
from clva_lens.ground.files import taking_place

DATA = "clva-lens-data"
NONE = "'none'"


def module() -> str:
    """Return the explorer's ES module."""
    return _text("explorer.js")


def style() -> str:
    """Return the explorer's style sheet."""
    return _text("explorer.css")


def _text(name: str) -> str:
    return (files("clva_lens.lens.explorer") / name).read_text(encoding="utf-8")


def page(title: str, explorations: Sequence[dict[str, Any]]) -> str:
    """Return a page that shows one exploration, or two side by side."""
    # "</script>" and "<!--" would end or change the element, wherever they stand.
    told = json.dumps({"explorations": list(explorations)}, ensure_ascii=False)
    told, script = told.replace("<", "\\u003c"), module()
    body = (
        '<main id="clva-lens"></main>\n'
        "<noscript>This page draws itself with JavaScript, from the numbers in it.</noscript>\n"
        f'<script type="application/json" id="{DATA}">{told}</script>\n'
        f'<script type="module">{script}</script>\n'
    )
    return framed(title, style(), body, script)


def framed(title: str, css: str, body: str, script: str | None = None) -> str:
    """Return a page whose policy lets run what stands in it, and lets nothing be loaded.

    Text in ``body`` is markup: whoever made it has escaped what is not.
    """
    policy = (
        "default-src 'none'; img-src data: blob:; base-uri 'none'; form-action 'none'; "
        f"style-src {_hash(css)}; script-src {_hash(script) if script else NONE}"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{html.escape(title)}</title>\n<style>{css}</style>\n"
        f'<body class="clva-lens-page">\n{body}</body>\n</html>\n'
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def write_page(path: str | Path, text: str) -> Path:
    """Write a page, whole or not at all, and return its path.

    Raises:
        ParameterError: if the name does not end in ``.html``.
    """
    path = html_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with taking_place(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def html_path(path: str | Path) -> Path:
    """Return a path that ends in ``.html``, or raise ParameterError."""
    path = Path(path)
    if path.suffix not in (".html", ".htm"):
        raise ParameterError(f"'{path}' does not end in .html. Name the file so.")
    return path
