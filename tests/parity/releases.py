"""The releases that ``methods.py`` knows, and the settings under which it compares them.

A setting is what ``released.py`` is told, and the method of this package that says the same. END is
a token that ends most answers early, LATE_END one that does so late, if at all.
"""

from dataclasses import dataclass
from typing import Any

import clva_lens as cl
from clva_lens.methods.base import Method

PROMPTS, END, LATE_END = 4, 72, 93
Setting = tuple[dict[str, Any], Method | None]


@dataclass(frozen=True)
class Release:
    """A release, what it stands on, and what is compared: its arguments and our method."""

    repository: str
    transformers: str
    file: str
    settings: list[Setting]
    layers: int = 32

    def __post_init__(self) -> None:
        """Prepend no method, beside which the effects are measured, unless a search has its own."""
        if "steps" not in self.settings[0][0]:
            self.settings.insert(0, ({"run": "plain"}, None))


def contrast(kind: type, alpha: float, beta: float, **more: Any) -> Setting:
    return {"alpha": alpha, "beta": beta} | more, kind(alpha=alpha, beta=beta, **more)


def impaired(
    alpha: float, mode: str, search: str, gate: Any = None, marks: bool = False
) -> Setting:
    """IMCCD; with ``marks``, the release takes this package's for which image tokens stand out."""
    given = {"alpha": alpha, "beta": 0.2, "mode": mode, "search": search, "gated": bool(gate)}
    given["marks"] = marks
    compression = 3 if mode == "imccd" else 1
    return given, cl.IMCCD(alpha=alpha, beta=0.2, compression=compression, gate=gate)


def looked_ahead(
    steps: int, end: int | None = None, prompts: int = PROMPTS, **given: Any
) -> Setting:
    """OPERA's search; with a weight of 0 it is the plain one, which comes before the others."""
    method = cl.OPERA(**given)
    said = {name: getattr(method, name) for name in ("scale", "threshold", "candidates", "weight")}
    return {"steps": steps, "end": end, "prompts": prompts} | said, method


RELEASES = {
    "vcd": Release(
        "DAMO-NLP-SG/VCD",
        "4.31",
        "vcd_utils/vcd_sample.py",
        [
            contrast(cl.VCD, 1, 0.2, noise_step=500),
            contrast(cl.VCD, 1, 0.1, noise_step=999),
            contrast(cl.VCD, 0.5, 0.1, noise_step=500),
        ],
    ),
    "icd": Release(
        "p1k0pan/ICD",
        "4.31",
        "icd_utils/icd_sample_llava.py",
        [contrast(cl.ICD, 1, 0.1), contrast(cl.ICD, 0.5, 0.3)],
    ),
    "pai": Release(
        "LALBJ/PAI",
        "4.37",
        "attention.py",
        [
            ({"alpha": alpha, "guidance": guidance}, cl.PAI(alpha=alpha, guidance=guidance))
            for alpha, guidance in ((0.2, 1), (0.5, 1), (0.2, 1.1), (0.5, 2))
        ],
    ),
    "clearsight": Release(
        "ustc-hyin/ClearSight",
        "4.31",
        "visaug/inference/AttnAdapter.py",
        [({"enhance": 1.15, "suppress": 0.95}, cl.ClearSight())],
    ),
    "memvr": Release(
        "1zhou-Wang/MemVR",
        "4.40",
        "memvr.py",
        [
            (
                {"start": 5, "end": 16, "gamma": gamma, "ratio": ratio},
                cl.MemVR(ratio=ratio, gamma=gamma),
            )
            for ratio, gamma in ((0.12, 0.75), (0.28, 0.6))
        ],
    ),
    "deco": Release(
        "zjunlp/Deco",
        "4.31",
        "transformers/generation/utils.py",
        [({"alpha": 0.6, "top_p": 0.9, "top_k": 20}, cl.DeCo(alpha=0.6))],
    ),
    "only": Release(
        "zifuwan/ONLY",
        "4.31",
        "only_utils/only_sample.py",
        [
            (
                {"agreeing": 3, "alpha": 1, "beta": beta, "gamma": gamma},
                cl.ONLY(beta=beta, gamma=gamma),
            )
            for beta, gamma in ((0.1, 0.2), (0.4, 0.25), (0.1, 2))
        ],
    ),
    "imccd": Release(
        "lijm48/IMCCD",
        "4.31",
        "vcd_utils/vcd_sample.py",
        [
            impaired(0, "imccd", "greedy_search"),
            impaired(3, "ved", "greedy_search"),
            impaired(3, "imccd", "greedy_search"),
            impaired(3, "imccd", "sample"),
            impaired(3, "imccd", "greedy_search", marks=True),
            impaired(1, "imccd", "greedy_search", "last"),
            impaired(1, "imccd", "sample", "first"),
        ],
    ),
    "opera": Release(
        "shikiw/OPERA",
        "4.29",
        "transformers-4.29.2/src/transformers/generation/utils.py",
        [
            looked_ahead(40, weight=0),
            looked_ahead(40),
            looked_ahead(40, prompts=2, weight=5),
            looked_ahead(40, scale=600, threshold=2),
            looked_ahead(40, prompts=2, threshold=25, candidates=1),
            looked_ahead(40, END, weight=0),
            looked_ahead(40, END),
            looked_ahead(110, LATE_END, 2, weight=0),
            looked_ahead(110, LATE_END, 2),
            looked_ahead(110, None, 2, weight=0),
            looked_ahead(110, None, 2),
            looked_ahead(110, None, 2, scale=600, threshold=3),
        ],
        layers=4,  # it reads the last one alone, and takes long
    ),
}
