# %% [markdown]
# # What the paper leaves open: how much does each choice matter?
#
# **Question.** The paper does not say how layers are counted, what happens where a head set is
# empty, which rows are edited, or whether anchors are read again at every step. How much do answers
# depend on that, and on τ?
#
# **Method.** One choice at a time is changed from CLVA's defaults, and compared with the defaults,
# paired, on questions and on captions (one-word answers have no second step, so `refresh` can act on
# captions only).

# %% tags=["parameters"]
model = "toy-llava"
questions = 400
captions = 150
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
from clva_lens.lens.asking import Asking

record = cl.new_record()
lens = cl.load(model)
record.uses(lens)
pope, (chair,) = benchmarks_for(lens, "pope")[-1], benchmarks_for(lens, "chair")
chosen = configured([pope, chair], settings)
for benchmark in chosen:
    record.data(benchmark.digests())
acting = cl.CLVA(**clva)
# Layers are positions among those that the site has; at a Q-Former, every second layer.
places = list(lens.site.layers)
anchor = lens.site.depth // 2 - 2
before = max(layer for layer in places if layer < anchor)
variants = {
    "CLVA": acting,
    "without a method": None,
    f"positive layer {before}": replace(acting, positive_layer=before),
    "τ = 1": replace(acting, tau=1),
    "τ = 1.5": replace(acting, tau=1.5),
    "τ = 3": replace(acting, tau=3),
    "λ = 0.5": replace(acting, head_threshold=0.5),
    "λ = 1.5": replace(acting, head_threshold=1.5),
    'empty="skip"': replace(acting, empty="skip"),
    'rows="last"': replace(acting, rows="last"),
    'refresh="prompt"': replace(acting, refresh="prompt"),
}
if lens.site.name != "decoder":  # rows and steps are the decoder's
    for name in ('rows="last"', 'refresh="prompt"'):
        del variants[name]
rows = []
for benchmark, limit in zip(chosen, (questions, captions), strict=True):
    rows += measure_methods(
        lens,
        [benchmark],
        Asking(limit=limit, seed=seed, batch_size=batch_size).each(variants),
        keep=record.ran,
    )
record.keep_rows("variants", rows)

# %%
record.draw(
    "differences",
    "questions",
    table="variants",
    metrics=["accuracy", "yes_ratio", "auc", "beyond_bias"],
    baseline="CLVA's defaults",
)

# %%
record.draw(
    "differences",
    "captions",
    table="variants",
    metrics=["chair_s", "chair_i", "recall"],
    baseline="CLVA's defaults",
)

# %%
table = pd.DataFrame(rows)
wide = table.pivot(index=["benchmark", "method"], columns="metric", values="value")
shown = ["accuracy", "yes_ratio", "auc", "chair_s", "chair_i", "recall"]
(100 * wide[shown].reindex(list(variants), level="method")).round(1)

# %% [markdown]
# ## Finding

# %%
named = [
    f"{row['method']} on {row['metric']} ({points(row)})"
    for row in rows
    if row["metric"] in ("accuracy", "chair_s")
    and row["low"] is not None
    and (row["low"] > 0 or row["high"] < 0)
]
accuracy = [
    row["change"] for row in rows if row["metric"] == "accuracy" and row["change"] is not None
]
record.keep_metrics(
    questions=one(rows, benchmark=pope, method="CLVA", metric="accuracy")["n"],
    captions=one(rows, benchmark=chair, method="CLVA", metric="chair_s")["n"],
    largest_accuracy_change=max(map(abs, accuracy)),
    layer_before_accuracy_change=one(
        rows, benchmark=pope, method=f"positive layer {before}", metric="accuracy"
    )["change"],
)
Markdown(
    f"Changes from CLVA's defaults on **{model}** whose interval leaves out 0: "
    f"{'; '.join(named) or 'none'}. The largest change of accuracy is {100 * max(map(abs, accuracy)):.1f} "
    "points."
)
