"""Judging: from saved answers to scores and to comparisons of scores; no model is needed here.

``base`` holds samples, answers and the registry; ``statistics`` the intervals and controls that a
comparison of two methods is reported with; every other file is one benchmark. Importing this room
registers them.

>>> "pope/toy/random" in cl.benchmarks()
True
"""

from clva_lens.benchmarks import chair_coco as chair_coco
from clva_lens.benchmarks import llava_bench as llava_bench
from clva_lens.benchmarks import mme as mme
from clva_lens.benchmarks import pope_sets as pope_sets
from clva_lens.benchmarks import toy_chair as toy_chair
from clva_lens.benchmarks import toy_mme as toy_mme
from clva_lens.benchmarks import toy_pope as toy_pope
from clva_lens.benchmarks import toy_skills as toy_skills
from clva_lens.benchmarks.base import BENCHMARKS as BENCHMARKS
from clva_lens.ground.registry import answer_calls

answer_calls(__name__, BENCHMARKS)
