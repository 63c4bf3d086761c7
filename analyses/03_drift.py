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
# first layer). Means over questions; intervals are bootstraps over pictures, and none is shown of
# fewer than ten.
#
# **Nulls.** A peak at the anchor's layer and a fall after it follow from the definition, as that
# layer's map holds the anchor's own heads; a return under CLVA follows from the edit, as it puts
# attention on the anchor's tokens. So beside the model stand *untrained twins* in grey (the same
# classes and configuration, seeded random weights, the mean of several seeds): what they show as
# well, training did not do. Shuffled image tokens would be no such null, since trained weights keep
# what they learned of places. Beside CLVA stands CLVA on as many random tokens, and beside r over
# all image tokens r over those that no mask marks.

# %% tags=["parameters"]
model = "toy-llava"
benchmarks = []
questions = 240
seed = 0
twins = 3
batch_size = 32
clva = {}
settings = {}

# %%
import pandas as pd
from IPython.display import Markdown

import clva_lens as cl
from clva_lens.experiments.drift_nulls import (
    drift_rows,
    drift_sentences,
    measure_drift,
    untrained_twin,
)
from clva_lens.experiments.measuring import benchmarks_for, configured, require_pictures

record = cl.new_record()
lens = cl.load(model)
record.uses(lens)
untrained = [untrained_twin(lens, seed + number) for number in range(twins)]
for twin in untrained:
    record.uses(twin)
(asked,) = configured(benchmarks_for(lens, "pope", benchmarks)[-1:], settings)
record.data(asked.digests())
samples = asked.samples(questions, seed)
require_pictures(asked.name, samples)
drift = measure_drift(
    lens,
    samples,
    cl.CLVA(**clva),
    twins=untrained,
    benchmark=asked,
    batch_size=batch_size,
    seed=seed,
)

# %% [markdown]
# A map that is the same everywhere has no correlation with anything; such questions are left out,
# and counted.

# %%
record.excludes("a map is constant at some layer", drift.left_out)
record.keep_arrays("drift", **drift.arrays())
record.draw("drift")

# %% [markdown]
# ## How far back?
#
# "Regression to the first layer" would be a correlation with the negative anchor that rises from
# the positive anchor's layer to the last one; "leaving the anchor" one with the positive anchor that
# falls. Both are told of the twins too, and the difference is paired by question.

# %%
rows = drift_rows(drift)
record.keep_rows("regression", rows)
pd.DataFrame(rows).round(3)

# %% [markdown]
# ## Finding

# %%
found = {(row["run"], row["what"]): row["mean"] for row in rows}
record.keep_metrics(
    questions=len(drift.groups),
    pictures=len(set(drift.groups)),
    **{
        f"{run}: {what}": value
        for (run, what), value in found.items()
        if run in ("greedy", "untrained") or what.startswith("CLVA")
    },
)
Markdown(
    f"On **{model}**, {len(drift.groups)} questions about {len(set(drift.groups))} pictures, "
    f"{twins} untrained twins:\n\n"
    + "\n".join(f"- {sentence}" for sentence in drift_sentences(rows))
    + "\n\nWhere toys look was planted by their training recipe, so for them this says what the "
    "recipe did; analysis 13 takes the question up."
)
