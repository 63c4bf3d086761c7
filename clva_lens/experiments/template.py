"""``clva-lens analyse --new``: an analysis to begin from, which runs as it is."""

import re
from pathlib import Path

from clva_lens.experiments.archive import Archive
from clva_lens.ground.errors import RecordError

TEMPLATE = """# %% [markdown]
# # TITLE
#
# **Question.** What is asked, so that it can be answered with no.
#
# **Method.** What is measured, on what, against what; what would be a null result.

# %% tags=["parameters"]
model = "toy-llava"
benchmarks = []
questions = 60
seed = 0
batch_size = 32
clva = {}
settings = {}

# %%
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
asked = configured(benchmarks_for(lens, "pope", benchmarks)[-1:], settings)
for benchmark in asked:
    record.data(benchmark.digests())
acting = cl.CLVA(**clva)
methods = {
    "greedy": None,
    "CLVA": acting,
    "CLVA, random tokens": cl.Shuffled(acting, seed=seed),
}
rows = measure_methods(
    lens,
    asked,
    Asking(limit=questions, seed=seed, batch_size=batch_size).each(methods),
    keep=record.ran,
)
record.keep_rows("methods", rows)
record.draw("differences", table="methods", metrics=["accuracy", "yes_ratio", "auc", "beyond_bias"])

# %%
table = pd.DataFrame(rows)
table.pivot(index=["benchmark", "method"], columns="metric", values="value").round(3)

# %% [markdown]
# ## Finding

# %%
change = one(rows, method="CLVA", metric="accuracy")
record.keep_metrics(questions=change["n"], clva_accuracy_change=change["change"])
Markdown(
    f"On {change['n']} questions of **{asked[0].name}** CLVA changes the accuracy of "
    f"**{model}** by {points(change)}."
)
"""


def write_template(root: Path, name: str) -> Path:
    """Write a new analysis and return its path; a name without a number gets the next free one.

    Raises:
        RecordError: if the name is no plain word, or one of an analysis that is there.
    """
    archive = Archive(root)
    if not re.fullmatch(r"([0-9]{2}_)?[a-z][a-z0-9_]*", name):
        raise RecordError(
            f"'{name}' is no name of an analysis. Use small letters, digits and '_': my_question."
        )
    known = archive.analyses()
    title = re.sub(r"^[0-9]{2}_", "", name)
    if name == title:
        name = f"{max((int(one[:2]) for one in known), default=0) + 1:02d}_{title}"
    if any(one == name or one[:3] == name[:3] for one in known):
        taken = next(one for one in known if one == name or one[:3] == name[:3])
        raise RecordError(f"there is {taken} already. Pass another name, or one without a number.")
    path = root / "analyses" / f"{name}.py"
    words = title.replace("_", " ").capitalize()
    path.write_text(TEMPLATE.replace("TITLE", words), encoding="utf-8")
    return path
