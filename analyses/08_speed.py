# %% [markdown]
# # Speed and memory (Table 5)
#
# **Question.** What do CLVA, tracing and the contrastive methods cost against plain greedy decoding?
#
# **Method.** `clva_lens.experiments.speed.bench`: all cases interleaved in one run after a warm-up, each sample divided
# by the baseline's of the same round; medians over rounds with quartiles. Costs do not depend on
# the weights, so models are random; on a machine without a GPU they are smaller than 7B. With
# `measured`, a folder of reports that `clva-lens bench --out` wrote on another machine (a GPU node
# without Jupyter, say) takes the place of measuring here. The paper's own ratios stand below. They were
# taken on another machine with eager attention, so only the order of magnitude can be compared.

# %% tags=["parameters"]
rounds = 5
new_tokens = 10
small = False
device = "cpu"
measured = ""

# %%
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from IPython.display import Markdown

import clva_lens as cl
from clva_lens.experiments.paper import paper_rows
from clva_lens.experiments.record import sha256
from clva_lens.experiments.speed.bench import BenchReport, bench
from clva_lens.experiments.speed.models import random_subjects, toy_subjects

record = cl.new_record()
if measured:
    # The folder is named from the checkout, in which analyses/ lies above where this runs.
    root = next(above for above in Path.cwd().parents if (above / "analyses").is_dir())
    files = sorted((root / measured).glob("*.json"))
    record.data({f"{measured}/{file.name}": sha256(file) for file in files})
    reports = {file.stem: BenchReport.read(file) for file in files}
else:
    few = ("generate, CLVA", "prefill, CLVA", "trace_attention", "output_attentions")
    subjects = [*toy_subjects(), *random_subjects()]
    if small:
        subjects = [subjects[0]._replace(only=few)]
    reports = {"here": bench(rounds, device=device, subjects=subjects, new_tokens=new_tokens)}
rows = [
    {"report": name, **asdict(row), "met": row.met}
    for name, report in reports.items()
    for row in report.rows
]
record.keep_rows("costs", rows)
record.keep_rows(
    "machine",
    [
        {"report": name, "rounds": report.rounds}
        | {k: str(v) for k, v in report.environment.items()}
        for name, report in reports.items()
    ],
)
for name in reports:
    record.keep_rows(
        f"times-{name}",
        [row for row in rows if row["report"] == name and row["unit"] == "s"],
    )
    record.keep_rows(
        f"memory-{name}",
        [row for row in rows if row["report"] == name and row["unit"] != "s"],
    )

# %%
pd.DataFrame(record.rows("machine"))

# %% [markdown]
# ## Times

# %%
for name in reports:
    display(record.draw("costs", f"times{name and '-'}{name}", table=f"times-{name}"))

# %% [markdown]
# ## Peaks of memory, without the weights

# %%
memory = pd.DataFrame([row for row in rows if row["unit"] == "peak"])
memory[["report", "model", "case", "over", "value", "ratio"]].round(3)

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
edited = [
    row
    for row in rows
    if row["unit"] == "s" and row["case"] in ("generate, CLVA", "prefill, CLVA", "trace_attention")
]
record.keep_metrics(
    **{
        f"{row['case']} over {row['over']}, {row['report']}, {row['model']}": row["ratio"]
        for row in edited
    },
    missed_targets=sum(row["met"] is False for row in rows),
)
missed = [
    f"{row['report']}, {row['model']}: {row['case']} ({row['ratio']:.2f}, aim {row['target']:g})"
    for row in rows
    if row["met"] is False
]
machines = {
    f"{report.environment.get('gpu', report.environment['processor'])}, "
    f"{report.environment['threads']} thread(s)"
    for report in reports.values()
}
Markdown(
    f"On {'; '.join(sorted(machines))}: "
    + "; ".join(
        f"{row['case']} takes {row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f}) of "
        f"{row['over']} ({row['report']}, {row['model']})"
        for row in edited
    )
    + f". Targets missed: {'; '.join(missed) or 'none'}. A quartile range that includes 1 says that the "
    "noise of the machine is as large as the cost."
)
