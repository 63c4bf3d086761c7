"""The methods: one file each; importing this room registers them."""

from clva_lens.methods import ablation as ablation
from clva_lens.methods import clva as clva
from clva_lens.methods import icd as icd
from clva_lens.methods import knockout as knockout
from clva_lens.methods import patching as patching
from clva_lens.methods import vcd as vcd
