"""The models: families are facts; importing this room registers them.

>>> "llava" in cl.models()
True
"""

from clva_lens.ground.registry import answer_calls
from clva_lens.models import generic as generic
from clva_lens.models import instructblip as instructblip
from clva_lens.models import llava as llava
from clva_lens.models import qwen_vl as qwen_vl
from clva_lens.models.family import FAMILIES as FAMILIES

answer_calls(__name__, FAMILIES)
