# %% [markdown]
# # Nucleus sampling (Table 6)
#
# **Question.** Does CLVA help where the answer is drawn at random?
#
# **Method.** T = 1, top-p = 1, seeded. The answers of one seed are one draw, so the same questions
# are asked with several seeds; changes are paired by question and seed, and bootstrapped over
# pictures within each seed.

# %% tags=["parameters"]
model = "toy-llava"
benchmarks = []
questions = 400
seeds = [0, 1, 2]
batch_size = 32
clva = {}
settings = {}

# %%
import numpy as np
import pandas as pd
from IPython.display import Markdown

import clva_lens as cl
from clva_lens.experiments.measuring import benchmarks_for, configured, measure_methods
from clva_lens.experiments.paper import beside_paper
from clva_lens.lens.asking import Asking

record = cl.new_record()
lens = cl.load(model)
record.uses(lens)
chosen = configured(benchmarks_for(lens, "pope", benchmarks), settings)
asked = [benchmark.name for benchmark in chosen]
for benchmark in chosen:
    record.data(benchmark.digests())
methods = {"sampling": None, "CLVA": cl.CLVA(**clva)}
rows = []
for seed in seeds:
    found = measure_methods(
        lens,
        chosen,
        Asking(decoding=cl.Sampling(seed=seed), limit=questions, batch_size=batch_size).each(
            methods
        ),
        keep=record.ran,
    )
    rows += [{**row, "seed": seed} for row in beside_paper(found, 6, model)]
record.keep_rows("methods", rows)

# %%
record.keep_rows(
    "changes", [{**r, "method": f"CLVA, seed {r['seed']}"} for r in rows if r["method"] == "CLVA"]
)
record.draw(
    "differences",
    table="changes",
    metrics=["accuracy", "yes_ratio", "auc"],
    baseline="sampling with the same seed",
)

# %%
table = pd.DataFrame(rows)
wide = (
    table.groupby(["benchmark", "method", "metric"], sort=False)[["value", "paper"]]
    .mean()
    .unstack()
)
shown = [(kind, name) for kind in ("value", "paper") for name in ("accuracy", "f1")]
wide[[*shown, ("value", "yes_ratio")]].mul([100, 100, 1, 1, 100]).round(1)

# %% [markdown]
# ## Finding

# %%
accuracy = [row for row in rows if row["method"] == "CLVA" and row["metric"] == "accuracy"]
mean = {name: np.mean([r["change"] for r in accuracy if r["benchmark"] == name]) for name in asked}
shown = [row for row in accuracy if row["low"] is not None]
below = sum(row["high"] < 0 for row in shown)
above = sum(row["low"] > 0 for row in shown)
beyond = [row for row in rows if row["method"] == "CLVA" and row["metric"] == "beyond_bias"]
undefined = sum(row["change"] is None for row in beyond)
record.keep_metrics(
    questions=accuracy[0]["n"],
    **{
        f"clva_accuracy_change_{name.rsplit('/', 1)[-1]}": float(value)
        for name, value in mean.items()
    },
)
Markdown(
    f"Of {len(accuracy)} draws (benchmark × seed) of **{model}**, CLVA's change of accuracy has an "
    f"interval above 0 in {above} and below 0 in {below}. Mean changes over seeds: "
    + ", ".join(f"{name} {100 * value:+.1f} points" for name, value in mean.items())
    + f". The gain beyond a moved threshold is undefined in {undefined} of {len(beyond)}: answers that "
    "are drawn have no threshold to move."
)
