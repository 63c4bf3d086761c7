# %% [markdown]
# # Speed and memory (Table 5)
#
# **Question.** What do CLVA, tracing and the contrastive methods cost against plain greedy decoding?
#
# **Method.** `clva_lens.bench`: all cases interleaved in one run after a warm-up, each sample divided
# by the baseline's of the same round; medians over rounds with quartiles. Costs do not depend on
# the weights, so models are random; on a machine without a GPU they are smaller than 7B. The paper's
# own ratios stand below. They were taken on another machine with eager attention, so only the
# order of magnitude can be compared.

# %% tags=["parameters"]
rounds = 5
new_tokens = 10
small = False
device = "cpu"

# %%
from dataclasses import asdict

import pandas as pd
from IPython.display import Markdown

import clva_lens as cl
from clva_lens.bench import bench
from clva_lens.bench_models import random_subjects, toy_subjects
from clva_lens.paper import paper_rows

record = cl.new_record()
subjects = toy_subjects() if small else [*toy_subjects(), *random_subjects()]
report = bench(rounds, device=device, subjects=subjects, new_tokens=new_tokens)
rows = [asdict(row) for row in report.rows]
record.keep_rows("costs", rows)
record.keep_rows("machine", [{"what": k, "value": str(v)} for k, v in report.environment.items()])
record.keep_rows("times", [row for row in rows if row["unit"] == "s"])
record.draw("costs", table="times")

# %%
pd.DataFrame(rows).round(3)

# %% [markdown]
# ## The paper's ratios

# %%
printed = pd.DataFrame(paper_rows(5)).pivot(
    index=["model", "method"], columns="metric", values="value"
)
ratios = printed.div(printed.xs("greedy", level="method"), level="model")
ratios[["seconds", "gib", "seconds_each"]].round(3)

# %% [markdown]
# ## Finding


# %%
def ratio(model: str, case: str) -> dict:
    return next(row for row in rows if row["model"] == model and case in row["case"])


models = list(dict.fromkeys(row["model"] for row in rows))
told = {model: ratio(model, "CLVA") for model in models}
record.keep_metrics(
    **{f"clva_over_greedy, {model}": row["ratio"] for model, row in told.items()},
    missed_targets=sum(row.met is False for row in report.rows),
)
missed = [f"{row.model}: {row.case} ({row.ratio:.2f})" for row in report.rows if row.met is False]
Markdown(
    f"On {report.environment.get('processor', device)}, {report.environment['threads']} thread(s): "
    + "; ".join(
        f"{row['case']} takes {row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f}) of "
        f"{row['over']} on {model}"
        for model, row in told.items()
    )
    + f". Targets missed: {'; '.join(missed) or 'none'}. A quartile range that includes 1 says that the "
    "noise of the machine is as large as the cost."
)
