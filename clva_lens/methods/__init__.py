"""The methods: one file each; importing this room registers them.

>>> "clva" in cl.methods()
True
"""

from clva_lens.ground.registry import answer_calls
from clva_lens.methods import ablation as ablation
from clva_lens.methods import agla as agla
from clva_lens.methods import ascd as ascd
from clva_lens.methods import averaged as averaged
from clva_lens.methods import clearsight as clearsight
from clva_lens.methods import clva as clva
from clva_lens.methods import deco as deco
from clva_lens.methods import dlc as dlc
from clva_lens.methods import ed as ed
from clva_lens.methods import headguided as headguided
from clva_lens.methods import icd as icd
from clva_lens.methods import imccd as imccd
from clva_lens.methods import knockout as knockout
from clva_lens.methods import m3id as m3id
from clva_lens.methods import memvr as memvr
from clva_lens.methods import only as only
from clva_lens.methods import opera as opera
from clva_lens.methods import pai as pai
from clva_lens.methods import patching as patching
from clva_lens.methods import post_hoc as post_hoc
from clva_lens.methods import sid as sid
from clva_lens.methods import steering as steering
from clva_lens.methods import vcd as vcd
from clva_lens.methods import vdd as vdd
from clva_lens.methods import vicrop as vicrop
from clva_lens.methods import visflow as visflow
from clva_lens.methods import vista as vista
from clva_lens.methods.base import METHODS as METHODS

answer_calls(__name__, METHODS)
