# %% [markdown]
# # Does attention drift? (Fig. 2b)
#
# **Question.** The paper says that attention to the picture concentrates on the right place in the
# middle layers and then falls back to the map of the first layer. What do entropy and correlation
# with the two anchors say, layer by layer, over many pictures, and what does CLVA change?
#
# **Method.** One forward pass a question. Eq. 5 is the entropy of the last row's attention over
# the image tokens, Eq. 6 the Pearson correlation of each layer's map (all heads) with the positive
# anchor map (sensitive heads of layer L/2 − 2) and with the negative one (insensitive heads of the
# first layer). Means over questions; intervals are bootstraps over pictures.

# %% tags=["parameters"]
model = "toy-llava"
benchmarks = []
questions = 240
seed = 0

# %%
import numpy as np
from IPython.display import Markdown

import clva_lens as cl
from clva_lens.benchmarks.base import BENCHMARKS
from clva_lens.experiments.measuring import benchmarks_for, mean_interval, trace_samples

record = cl.new_record()
lens = cl.load(model)
record.uses(lens)
asked = BENCHMARKS.get(benchmarks_for(lens, "pope", benchmarks)[-1])
record.data(asked.digests())
samples = asked.samples(questions, seed)
plain = cl.attention_drift(trace_samples(lens, samples, benchmark=asked))
edited = cl.attention_drift(trace_samples(lens, samples, cl.CLVA(), benchmark=asked))

# %% [markdown]
# A map that is the same everywhere has no correlation with anything; such questions are left out,
# and counted.

# %%
names = ("entropy", "toward_positive", "toward_negative")
curves = {name: getattr(plain, name).numpy() for name in names}
curves |= {f"clva_{name}": getattr(edited, name).numpy() for name in names}
whole = np.all([np.isfinite(curve).all(axis=1) for curve in curves.values()], axis=0)
record.excludes("a map is constant at some layer", int((~whole).sum()))
groups = np.array([sample.group for sample in samples])[whole]
record.keep_arrays(
    "drift",
    **{name: curve[whole] for name, curve in curves.items()},
    layers=plain.layers,
    anchors=(plain.positive_layer, plain.negative_layer),
    groups=groups,
)
record.draw("drift")

# %% [markdown]
# ## How far back?
#
# "Regression to the first layer" would be a correlation with the negative anchor that rises again
# after the positive anchor's layer. The rise is the last layer's value less the smallest one from
# the positive anchor on, question by question; it cannot be negative, so the change from the anchor
# layer to the last one, which may have either sign, is what the finding rests on.

# %%
kept = record.arrays("drift")
at = list(plain.layers).index(plain.positive_layer)
rows = []
for run in ("", "clva_"):
    toward = kept[f"{run}toward_negative"]
    found = {
        "change of r(first layer), anchor to last layer": toward[:, -1] - toward[:, at],
        "change of r(positive anchor), anchor to last layer": kept[f"{run}toward_positive"][:, -1]
        - kept[f"{run}toward_positive"][:, at],
        "change of entropy, anchor to last layer (nats)": kept[f"{run}entropy"][:, -1]
        - kept[f"{run}entropy"][:, at],
        "rise of r(first layer) after its minimum": toward[:, -1] - toward[:, at:].min(axis=1),
    }
    for name, values in found.items():
        mean, low, high = mean_interval(values, groups)
        rows.append(
            {
                "run": "CLVA" if run else "greedy",
                "what": name,
                "mean": mean,
                "low": low,
                "high": high,
            }
        )
record.keep_rows("regression", rows)
Markdown(
    "\n".join(
        ["| run | what | mean | 95 % interval |", "|---|---|---|---|"]
        + [
            f"| {r['run']} | {r['what']} | {r['mean']:+.3f} | {r['low']:+.3f} to {r['high']:+.3f} |"
            for r in rows
        ]
    )
)

# %% [markdown]
# ## Finding

# %%
first = {row["what"]: row for row in rows if row["run"] == "greedy"}
back = first["change of r(first layer), anchor to last layer"]
away = first["change of r(positive anchor), anchor to last layer"]
record.keep_metrics(
    toward_first_layer=back["mean"],
    away_from_anchor=away["mean"],
    questions=len(groups),
    entropy_at_anchor=float(kept["entropy"][:, at].mean()),
    entropy_at_last=float(kept["entropy"][:, -1].mean()),
)
regresses = back["low"] > 0
Markdown(
    f"On **{model}**, from the positive anchor's layer {plain.positive_layer} to the last one, the "
    f"correlation with the first layer's map changes by {back['mean']:+.3f} "
    f"({back['low']:+.3f} to {back['high']:+.3f}) and that with the anchor by {away['mean']:+.3f} "
    f"({away['low']:+.3f} to {away['high']:+.3f}). "
    + (
        "The maps do go back towards the first layer's."
        if regresses
        else "The maps leave the anchor, but do not go back to the first layer's."
    )
    + " Where toys look was planted by their training recipe, so for them this says what the "
    "recipe did; analysis 13 takes the question up."
)
