# %% [markdown]
# # Which heads look at the picture? (Fig. 1)
#
# **Question.** The paper sees a sparse pattern in LLaVA-1.5: a few heads a layer look at the picture
# (Eqs. 1-3). How much of the attention of each head lies on it, and are the same heads sensitive
# for every question?
#
# **Method.** One forward pass a question. Φ is the share of attention mass that text rows after the
# image put on image tokens. The map shows its mean over questions, with the classes of that mean
# marked. Classes of single questions are compared with these by their Jaccard index: heads in both
# divided by heads in either.

# %% tags=["parameters"]
model = "toy-llava"
benchmarks = []
questions = 240
seed = 0
batch_size = 32
clva = {}
settings = {}

# %%
import numpy as np
import pandas as pd
from IPython.display import Markdown

import clva_lens as cl
from clva_lens.experiments.measuring import (
    benchmarks_for,
    configured,
    mean_interval,
    require_pictures,
    trace_samples,
)

record = cl.new_record()
lens = cl.load(model)
record.uses(lens)
(asked,) = configured(benchmarks_for(lens, "pope", benchmarks)[-1:], settings)
record.data(asked.digests())
samples = asked.samples(questions, seed)
require_pictures(asked.name, samples)
trace = trace_samples(lens, samples, benchmark=asked, batch_size=batch_size)
mean = trace.intensity.mean(dim=0)
rule = cl.CLVA(**clva)
overall, single = (
    cl.classify_heads(one, rule.head_threshold, rule.empty) for one in (mean, trace.intensity)
)
record.keep_arrays(
    "heads",
    intensity=mean,
    sensitive=overall.sensitive,
    insensitive=overall.insensitive,
    layers=trace.layers,
)
record.draw("head_intensity")

# %% [markdown]
# ## Are they the same for every question?

# %%
groups = [sample.group for sample in samples]
rows = []
for name in ("sensitive", "insensitive"):
    fixed, each = (getattr(found, name).numpy() for found in (overall, single))
    for place, layer in enumerate(trace.layers):
        both = (each[:, place] & fixed[place]).sum(axis=-1)
        either = (each[:, place] | fixed[place]).sum(axis=-1)
        value, low, high = mean_interval(both / np.maximum(either, 1), groups)
        rows.append(
            {
                "quantity": f"Jaccard index, {name} heads",
                "run": model,
                "layer": layer,
                "value": value,
                "low": low,
                "high": high,
            }
        )
record.keep_rows("stability", rows)
record.draw("layer_curves", table="stability")

# %%
per_layer = pd.DataFrame(
    {
        "layer": trace.layers,
        "mean Φ": mean.mean(dim=-1).numpy(),
        "largest Φ": mean.amax(dim=-1).numpy(),
        "sensitive heads": overall.sensitive.sum(dim=-1).numpy(),
        "insensitive heads": overall.insensitive.sum(dim=-1).numpy(),
    }
)
per_layer.round(3)

# %% [markdown]
# ## Finding

# %%
looking = (mean > 0.5).float().mean().item()
agreement = float(
    np.mean([row["value"] for row in rows if row["quantity"].endswith(" sensitive heads")])
)
record.keep_metrics(
    questions=len(samples),
    mean_intensity=mean.mean().item(),
    share_of_heads_above_half=looking,
    stability_of_sensitive_heads=agreement,
)
peak = divmod(int(mean.argmax()), mean.shape[1])
Markdown(
    f"On **{model}**, text rows put {mean.mean().item():.0%} of their attention on the picture; "
    f"{looking:.0%} of the heads put more than half there, and head {peak[1]} of layer "
    f"{trace.layers[peak[0]]} the most ({mean.max().item():.0%}). The sensitive heads of a single "
    f"question agree with those of the mean with a Jaccard index of {agreement:.2f}. Intensity "
    "says how much a head looks, and nothing on whether it looks at the right place: see analysis "
    "13."
)
