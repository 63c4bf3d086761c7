# %% [markdown]
# # Do the paper's numbers fit together?
#
# **Question.** Which of the numbers printed in arXiv:2603.25088v1 contradict each other?
#
# **Method.** Arithmetic on the tables as printed (`clva_lens/experiments/paper.py`); no model is run. POPE's
# splits have 3,000 questions, half of them about present objects, the same ones in every split. So
# F1 and accuracy decide the counts: with TP + FN = TN + FP = N/2, accuracy a and F1 f give
# TP = f·N·(1 − a) / (2·(1 − f)) and FP = N/2 − (a·N − TP).

# %% tags=["parameters"]
questions = 3000

# %%
import pandas as pd
from IPython.display import Markdown

import clva_lens as cl
from clva_lens.experiments.paper import SPLITS, paper_rows

record = cl.new_record()


def table(number: int, *index: str) -> pd.DataFrame:
    return pd.DataFrame(paper_rows(number)).pivot(
        index=list(index), columns="metric", values="value"
    )


findings = []

# %% [markdown]
# ## Table 1: averages, and recall across splits
#
# The average of three splits is their mean, and recall is the same in all three, because the present
# objects are. One digit of rounding moves recall by well under a point.


# %%
def counts(f1: pd.Series, accuracy: pd.Series) -> pd.DataFrame:
    f, a = f1 / 100, accuracy / 100
    hits = f * questions * (1 - a) / (2 * (1 - f))
    wrong = questions / 2 - (a * questions - hits)
    return pd.DataFrame({"TP": hits, "FP": wrong, "recall": 200 * hits / questions})


pope = table(1, "model", "method", "split")
mean = pope.drop(index="average", level="split").groupby(["model", "method"], sort=False).mean()
gap = (pope.xs("average", level="split") - mean).round(2)
findings += [
    {
        "where": "Table 1",
        "what": f"average {metric} of {method} on {model} is not the mean of its splits",
        "printed": float(pope.loc[(model, method, "average"), metric]),
        "computed": round(float(mean.loc[(model, method), metric]), 2),
    }
    for (model, method), row in gap.iterrows()
    for metric in gap.columns
    if abs(row[metric]) > 0.02
]
recall = counts(pope.f1, pope.accuracy).recall.drop(index="average", level="split").unstack()
recall["spread"] = recall.max(axis=1) - recall.min(axis=1)
recall.round(1)

# %%
findings += [
    {
        "where": "Table 1",
        "what": f"recall of {method} on {model} differs between splits with the same positives",
        "printed": round(float(row[SPLITS[0]]), 1),
        "computed": round(float(row[SPLITS[2]]), 1),
    }
    for (model, method), row in recall.iterrows()
    if row.spread > 1
]

# %% [markdown]
# ## Table 2: which header is whose?
#
# CHAIR_i counts mentions and CHAIR_s captions. A caption is counted once however many absent objects
# it names, among several mentions, so on ordinary captions CHAIR_s is the larger one.

# %%
chair = table(2, "model", "method")
swapped = chair.chair_i > chair.chair_s
findings.append(
    {
        "where": "Table 2",
        "what": "cells in which CHAIR_i as printed exceeds CHAIR_s: headers swapped",
        "printed": float(swapped.sum()),
        "computed": float(len(chair)),
    }
)
chair

# %% [markdown]
# ## Table 3: sums, and a constant answer
#
# 50 points a task is what "yes" to everything gets: accuracy 50, accuracy + 0.

# %%
mme = table(3, "model", "method")
total = mme[["existence", "count", "position", "color"]].sum(axis=1)
findings += [
    {
        "where": "Table 3",
        "what": f"sum of {method} on {model}",
        "printed": float(mme.hallucination[model, method]),
        "computed": round(float(total[model, method]), 2),
    }
    for model, method in mme.index[(total - mme.hallucination).abs() > 0.05]
]
constant = mme[(mme == 50.0).any(axis=1)]
findings.append(
    {
        "where": "Table 3",
        "what": "rows with a task at exactly the score of a constant answer (50)",
        "printed": float(len(constant)),
        "computed": 0.0,
    }
)
constant

# %% [markdown]
# ## Table 4: negative false positives

# %%
anchors = table(4, "method").reindex(["none", "positive", "negative", "both", "swapped"])
implied = counts(anchors.f1, anchors.accuracy)
findings += [
    {
        "where": "Table 4",
        "what": f"false positives that F1 and accuracy of '{method}' imply",
        "printed": 0.0,
        "computed": round(float(row.FP), 1),
    }
    for method, row in implied.iterrows()
    if row.FP < 0
]
implied.round(1)

# %% [markdown]
# The printed rule for the swapped anchors, 1 − α·Z_pos with α = 14, is a negative weight, which no
# attention can have; what was run must have been another one.

# %% [markdown]
# ## Table 5: speed, memory, and accuracies that stand in Table 1 too

# %%
cost = table(5, "model", "method")
for model, method in cost.index:
    other = pope.accuracy[model, method, "average"]
    if abs(cost.accuracy[model, method] - other) > 0.005:
        findings.append(
            {
                "where": "Tables 1 and 5",
                "what": f"average accuracy of {method} on {model}",
                "printed": float(other),
                "computed": float(cost.accuracy[model, method]),
            }
        )
against = cost.xs("CLVA", level="method") / cost.xs("IMCCD", level="method")
slower = cost.xs("CLVA", level="method") / cost.xs("greedy", level="method")
findings.append(
    {
        "where": "Table 5 and text",
        "what": "CLVA's memory over IMCCD's, smallest of three; the text says half",
        "printed": 0.5,
        "computed": round(float(against.gib.min()), 2),
    }
)
pd.concat({"CLVA / IMCCD": against, "CLVA / greedy": slower}, axis=1).round(3)

# %% [markdown]
# ## Finding

# %%
record.keep_rows("findings", findings)
record.keep_metrics(
    contradictions=len(findings),
    splits_with_other_recall=sum("recall" in one["what"] for one in findings),
    slower_than_greedy_at_most=float(slower.seconds.max()),
    faster_than_imccd_at_least=float(1 / against.seconds.max()),
)
display(
    Markdown(
        f"{len(findings)} contradictions, with what is printed and what follows from the rest:"
    )
)
with pd.option_context("display.max_colwidth", None, "display.max_rows", None):
    display(pd.DataFrame(findings))

# %% [markdown]
# What arithmetic cannot show, from other published work: LLaVA-1.5's greedy score on MME's hallucination
# subset (514.99) is about 130 points below other published greedy baselines, and InstructBLIP's "greedy"
# POPE scores look like sampling. So the paper's gains are no target; methods have to be measured side
# by side.
