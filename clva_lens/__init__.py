"""clva_lens: look inside vision-language models, and act on what you see.

>>> import clva_lens as cl
>>> "clva" in cl.methods()
True
"""

from clva_lens import benchmarks as _benchmarks  # noqa: F401  (registers the benchmarks)
from clva_lens import figures as _figures  # noqa: F401  (registers the figures)
from clva_lens import methods as _methods  # noqa: F401  (registers the methods)
from clva_lens import models as _models  # noqa: F401  (registers the model families)
from clva_lens.anchors import VisualAnchors as VisualAnchors
from clva_lens.attribution import direct_logit_attribution as direct_logit_attribution
from clva_lens.axes import TokenSpans as TokenSpans
from clva_lens.benchmarks.base import BENCHMARKS as _BENCHMARKS
from clva_lens.benchmarks.comparison import compare as compare
from clva_lens.bridge import to_transformer_lens as to_transformer_lens
from clva_lens.drift import attention_drift as attention_drift
from clva_lens.errors import ClvaLensError as ClvaLensError
from clva_lens.evaluate import evaluate as evaluate
from clva_lens.experiments.archive import open_record as open_record
from clva_lens.experiments.draft import new_record as new_record
from clva_lens.figures.base import FIGURES as _FIGURES
from clva_lens.game import pointing_game as pointing_game
from clva_lens.generate import Beam as Beam
from clva_lens.generate import Greedy as Greedy
from clva_lens.generate import Sampling as Sampling
from clva_lens.generate import generate as generate
from clva_lens.heads import HeadClasses as HeadClasses
from clva_lens.heads import classify_heads as classify_heads
from clva_lens.intervene import composed_saliency as composed_saliency
from clva_lens.intervene import head_means as head_means
from clva_lens.intervene import intervene as intervene
from clva_lens.intervene import intervening as intervening
from clva_lens.intervene import observe as observe
from clva_lens.intervene import observing as observing
from clva_lens.intervene import trace_attention as trace_attention
from clva_lens.logit_lens import logit_lens as logit_lens
from clva_lens.masks import patch_mask as patch_mask
from clva_lens.methods.ablation import AblateHeads as AblateHeads
from clva_lens.methods.base import METHODS as _METHODS
from clva_lens.methods.base import compose as compose
from clva_lens.methods.base import register_method as register_method
from clva_lens.methods.clearsight import ClearSight as ClearSight
from clva_lens.methods.clva import CLVA as CLVA
from clva_lens.methods.controls import Shuffled as Shuffled
from clva_lens.methods.deco import DeCo as DeCo
from clva_lens.methods.icd import ICD as ICD
from clva_lens.methods.imccd import IMCCD as IMCCD
from clva_lens.methods.knockout import KnockOut as KnockOut
from clva_lens.methods.memvr import MemVR as MemVR
from clva_lens.methods.only import ONLY as ONLY
from clva_lens.methods.opera import OPERA as OPERA
from clva_lens.methods.pai import PAI as PAI
from clva_lens.methods.patching import PatchActivations as PatchActivations
from clva_lens.methods.vcd import VCD as VCD
from clva_lens.methods.visflow import VisFlow as VisFlow
from clva_lens.models.family import FAMILIES as _FAMILIES
from clva_lens.models.lens import load as load
from clva_lens.patching import patch_activations as patch_activations
from clva_lens.runs import score as score
from clva_lens.trace_statistics import trace_statistics as trace_statistics


def methods() -> tuple[str, ...]:
    """Return the names of the registered methods."""
    return _METHODS.names()


def benchmarks() -> tuple[str, ...]:
    """Return the names of the registered benchmarks."""
    return _BENCHMARKS.names()


def models() -> tuple[str, ...]:
    """Return the names of the registered model families."""
    return _FAMILIES.names()


def figures() -> tuple[str, ...]:
    """Return the names of the registered figures."""
    return _FIGURES.names()


__all__ = [
    "CLVA",
    "ICD",
    "IMCCD",
    "ONLY",
    "OPERA",
    "PAI",
    "VCD",
    "AblateHeads",
    "Beam",
    "ClearSight",
    "ClvaLensError",
    "DeCo",
    "Greedy",
    "HeadClasses",
    "KnockOut",
    "MemVR",
    "PatchActivations",
    "Sampling",
    "Shuffled",
    "TokenSpans",
    "VisFlow",
    "VisualAnchors",
    "attention_drift",
    "benchmarks",
    "classify_heads",
    "compare",
    "compose",
    "composed_saliency",
    "direct_logit_attribution",
    "evaluate",
    "figures",
    "generate",
    "head_means",
    "intervene",
    "intervening",
    "load",
    "logit_lens",
    "methods",
    "models",
    "new_record",
    "observe",
    "observing",
    "open_record",
    "patch_activations",
    "patch_mask",
    "pointing_game",
    "register_method",
    "score",
    "to_transformer_lens",
    "trace_attention",
    "trace_statistics",
]
