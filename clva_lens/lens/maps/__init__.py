"""Maps to compare with: what an answer is said to stand on, by others' formulas; a file each.

Importing this folder registers them. One more is its own file and its line here.
"""

from clva_lens.lens.maps import bimodal_relevancy as bimodal_relevancy
from clva_lens.lens.maps import grad_cam as grad_cam
from clva_lens.lens.maps import integrated_gradients as integrated_gradients
from clva_lens.lens.maps import relative_attention as relative_attention
from clva_lens.lens.maps import relevancy as relevancy
from clva_lens.lens.maps import rollout as rollout
from clva_lens.lens.maps import token_activation as token_activation
from clva_lens.lens.maps import visual_ratio as visual_ratio
from clva_lens.lens.maps.base import MAPS as MAPS
