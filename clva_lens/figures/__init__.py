"""Figures: plain arrays and rows in, a drawing out; no model, no download, no global state.

``base`` holds the look, the registry and ``save``, ``layer_map`` a heat map that figures share;
every other file is one figure.

>>> "head_intensity" in cl.figures()
True
"""

from clva_lens.figures.accuracy import method_comparison as method_comparison
from clva_lens.figures.attention_masses import attention_masses as attention_masses
from clva_lens.figures.attribution import head_attribution as head_attribution
from clva_lens.figures.base import FIGURES as FIGURES
from clva_lens.figures.base import Drawing as Drawing
from clva_lens.figures.base import save as save
from clva_lens.figures.costs import costs as costs
from clva_lens.figures.differences import differences as differences
from clva_lens.figures.drift import drift_curves as drift_curves
from clva_lens.figures.head_classes import head_classes as head_classes
from clva_lens.figures.heads import head_intensity as head_intensity
from clva_lens.figures.layer_curves import layer_curves as layer_curves
from clva_lens.figures.logit_lens import logit_lens as logit_lens
from clva_lens.figures.patch_maps import patch_maps as patch_maps
from clva_lens.figures.patching import patching as patching
from clva_lens.figures.photo_maps import photo_maps as photo_maps
from clva_lens.figures.pointing import pointing as pointing
from clva_lens.figures.pointing_heads import pointing_heads as pointing_heads
from clva_lens.figures.radar import radar as radar
from clva_lens.figures.saliency import SaliencyPicture as SaliencyPicture
from clva_lens.figures.saliency import saliency_overlays as saliency_overlays
from clva_lens.figures.scan import scan as scan
from clva_lens.figures.scores import scores as scores
from clva_lens.figures.surface import surface as surface
from clva_lens.figures.task_scores import task_scores as task_scores
from clva_lens.ground.registry import answer_calls

answer_calls(__name__, FIGURES)
