# %% [markdown]
# # How strong? (Fig. 5)
#
# **Question.** The paper finds accuracy to fall when α exceeds 14 and when β is small. What does
# the surface over α and β look like, and how much of it is a shift towards *yes*?
#
# **Method.** The same questions under each pair. Drawn are the change of accuracy against greedy
# (α = β = 0) and the change of the yes-ratio; the table keeps every metric with its interval.

# %% tags=["parameters"]
model = "toy-llava"
benchmarks = []
alphas = [0, 2, 6, 14, 20, 40]
betas = [0.0, 0.3, 0.6, 0.9, 1.0]
questions = 300
seed = 0
batch_size = 32

# %%
import pandas as pd
from IPython.display import Markdown

import clva_lens as cl
from clva_lens.benchmarks.base import BENCHMARKS
from clva_lens.experiments.measuring import benchmarks_for, measure_methods, points
from clva_lens.lens.asking import Asking

record = cl.new_record()
lens = cl.load(model)
record.uses(lens)
asked = benchmarks_for(lens, "pope", benchmarks)[-1]
record.data(BENCHMARKS.get(asked).digests())
pairs = {(alpha, beta): f"α={alpha:g} β={beta:g}" for beta in betas for alpha in alphas}
methods = {"greedy": None} | {
    name: cl.CLVA(alpha=alpha, beta=beta) for (alpha, beta), name in pairs.items()
}
rows = measure_methods(
    lens,
    [asked],
    Asking(limit=questions, seed=seed, batch_size=batch_size).each(methods),
    keep=record.ran,
)
back = {name: pair for pair, name in pairs.items()}
rows = [
    {**row, "alpha": back[row["method"]][0], "beta": back[row["method"]][1]}
    for row in rows
    if row["method"] in back
]
record.keep_rows("grid", rows)

# %%
for metric in ("accuracy", "yes_ratio"):
    chosen = [{**r, "points": 100 * r["change"]} for r in rows if r["metric"] == metric]
    record.keep_rows(metric, chosen)
    drawn = record.draw(
        "surface",
        metric,
        table=metric,
        across="alpha",
        down="beta",
        value="points",
        label=f"change of {metric.replace('_', '-')} (points)",
    )
    display(drawn)

# %% [markdown]
# ## Finding

# %%
found = {(row["alpha"], row["beta"]): row for row in rows if row["metric"] == "accuracy"}
best = max(found, key=lambda pair: found[pair]["change"])
worst = min(found, key=lambda pair: found[pair]["change"])
sure = sum(row["low"] > 0 or row["high"] < 0 for row in found.values())
yes = pd.DataFrame([row for row in rows if row["metric"] == "yes_ratio"])
slope = yes[yes.alpha == max(alphas)].change.mean() - yes[yes.alpha == min(alphas)].change.mean()
record.keep_metrics(
    questions=found[best]["n"],
    best_change=found[best]["change"],
    worst_change=found[worst]["change"],
    intervals_without_zero=sure,
    yes_ratio_from_smallest_to_largest_alpha=float(slope),
)
Markdown(
    f"On **{asked}**, the best pair of {len(found)} is α = {best[0]:g}, β = {best[1]:g} "
    f"({points(found[best])}), the worst α = {worst[0]:g}, β = {worst[1]:g} ({points(found[worst])}); "
    f"{sure} of {len(found)} intervals leave out 0. The best of so many is chosen after the fact, and its "
    f"interval does not allow for that. From α = {min(alphas):g} to {max(alphas):g} the yes-ratio moves by "
    f"{100 * slope:+.1f} points."
)
