"""Text of models and of data in HTML and LaTeX: whatever it holds, it is shown and never obeyed."""

import html
from collections.abc import Sequence

_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "'": r"\textquotesingle{}",
    "`": r"\textasciigrave{}",
    "-": "-{}",
    "−": r"$-$",
    "×": r"$\times$",
    "±": r"$\pm$",
    "α": r"$\alpha$",
    "β": r"$\beta$",
    "τ": r"$\tau$",
    "Φ": r"$\Phi$",
    "‖": r"$\Vert$",
    "§": r"\S{}",
    "–": "--{}",
    "—": "---{}",
    "…": r"\ldots{}",
    "‘": "`{}",
    "’": "'{}",
    "“": r"\textquotedblleft{}",
    "”": r"\textquotedblright{}",
}
_LAST_LATIN = 0x17F
_ABSENT = "ĦħĸĿŀŉŦŧſ"  # which LaTeX's T1 fonts do not have of these


def in_html(text: object) -> str:
    """Return text for HTML, in elements and in quoted attributes; control characters become "�"."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in str(text))
    return html.escape(shown, quote=True)


def in_latex(text: object) -> str:
    r"""Return text for LaTeX on one line; what its fonts may not have becomes "?".

    >>> in_latex("50% of a_b & <c>")
    '50\\% of a\\_b \\& \\textless{}c\\textgreater{}'
    """
    line = " ".join(str(text).split())
    return "".join(_LATEX.get(c) or (c if _is_latin(c) else "?") for c in line)


def _is_latin(c: str) -> bool:
    return c.isprintable() and ord(c) <= _LAST_LATIN and c not in _ABSENT


def marked(text: str, spans: Sequence[tuple[int, int]], escape, before: str, after: str) -> str:
    """Return text with ``before`` and ``after`` around (start, end) pieces, each piece escaped."""
    made, place = [], 0
    for start, end in sorted(spans):
        made += [escape(text[place:start]), before, escape(text[start:end]), after]
        place = end
    return "".join([*made, escape(text[place:])])
