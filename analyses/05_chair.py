# %% [markdown]
# # CHAIR (Table 2)
#
# **Question.** Do captions name fewer absent objects under CLVA, and at what cost in recall?
#
# **Method.** CHAIR_s is the share of captions with an absent object, CHAIR_i the share of named
# objects that are absent, recall the share of present objects that are named. Changes against
# greedy are paired by picture. In the paper's table the headers CHAIR_i and CHAIR_s are swapped
# (analysis 12), so its numbers are put under the header that they fit.

# %% tags=["parameters"]
model = "toy-llava"
benchmarks = []
captions = 300
seed = 0
batch_size = 32
clva = {}
settings = {}

# %%
from dataclasses import replace

import pandas as pd
from IPython.display import Markdown

import clva_lens as cl
from clva_lens.experiments.measuring import (
    benchmarks_for,
    configured,
    measure_methods,
    one,
    points,
)
from clva_lens.experiments.paper import beside_paper
from clva_lens.lens.asking import Asking

record = cl.new_record()
lens = cl.load(model)
record.uses(lens)
(asked,) = configured(benchmarks_for(lens, "chair", benchmarks), settings)
record.data(asked.digests())
acting = cl.CLVA(**clva)
methods = {
    "greedy": None,
    "beam": None,
    "MemVR": cl.MemVR(),
    "ClearSight": cl.ClearSight(),
    "IMCCD": cl.IMCCD(),
    "CLVA": acting,
    "CLVA, anchors of the prompt": replace(acting, refresh="prompt"),
    "CLVA, random tokens": cl.Shuffled(acting, seed=seed),
    "CLVA, anchors swapped": replace(acting, alpha=-acting.beta, beta=-acting.alpha),
}
beam = cl.Beam(num_beams=5, max_new_tokens=asked.max_new_tokens)
rows = measure_methods(
    lens,
    [asked],
    Asking(limit=captions, seed=seed, batch_size=batch_size).each(methods, {"beam": beam}),
    keep=record.ran,
)
rows = beside_paper(rows, 2, model)
record.keep_rows("methods", rows)
record.draw("differences", table="methods", metrics=["chair_s", "chair_i", "recall"])

# %%
shown = ["chair_s", "chair_i", "recall", "length"]
table = pd.DataFrame(rows)
wide = table.pivot(index="method", columns="metric", values="value")[shown].reindex(list(methods))
wide[shown[:3]] *= 100
printed = table.pivot(index="method", columns="metric", values="paper")
for name in shown[:3]:
    wide[f"paper: {name}"] = printed[name]
wide.round(1)

# %% [markdown]
# ## Finding

# %%
clva = {row["metric"]: row for row in rows if row["method"] == "CLVA"}
record.keep_metrics(
    captions=clva["chair_s"]["n"],
    greedy_chair_s=one(rows, method="greedy", metric="chair_s")["value"],
    **{f"clva_{name}_change": clva[name]["change"] for name in shown[:3]},
)
fewer = [
    f"{row['method']} ({points(row)})"
    for row in rows
    if row["metric"] == "chair_s" and row["high"] is not None and row["high"] < 0
]
Markdown(
    f"CLVA changes CHAIR_s of **{model}** by {points(clva['chair_s'])} on {clva['chair_s']['n']} captions, "
    f"CHAIR_i by {points(clva['chair_i'])} and recall by {points(clva['recall'])}. Methods whose interval "
    f"of CHAIR_s lies below 0: {', '.join(fewer) or 'none'}."
)
