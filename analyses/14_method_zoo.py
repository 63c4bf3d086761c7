# %% [markdown]
# # All methods on the same questions and captions
#
# **Question.** Does any training-free method gain anything on this model, greedily or sampling, that
# is more than a shift towards *yes* or *no*?
#
# **Method.** Every method at its defaults (PAI also with the guidance of its POPE script) answers the
# same questions of three POPE splits and writes the same captions. Changes are paired against greedy (or sampling with the same seed), with 95 %
# bootstrap intervals over pictures. What is gained beyond a moved threshold is told of greedy answers
# only: those that are drawn have none. Three controls for the attention methods: CLVA on random tokens, with
# its anchors swapped, and with one average over all heads (Eq. 15). ASCD is asked with each prompt's own
# text-centric heads, and with those that lead on most questions of another draw (no label is used); beside how
# far two halves of these agree stands how far they do in untrained twins (random weights). ViCrop shows two
# pictures, which the toys were never shown. Time is that of all answers over the baseline's, one after the other in one
# process, so good to a few tens of percent; passes of the language model are counted, per token of one
# caption, the prompt's included; memory is the largest sum of tensors alive in a batch of
# captions, over the baseline's.

# %% tags=["parameters"]
model = "toy-llava"
questions = 240
captions = 120
seed = 0
batch_size = 32
clva = {}
references = 60  # questions in which ASCD's heads are found
twins = 3
only = []  # names of methods; all, if it is empty
settings = {}

# %%
from dataclasses import replace
from functools import partial

import pandas as pd
from IPython.display import Markdown

import clva_lens as cl
from clva_lens.experiments.drift_nulls import untrained_twin
from clva_lens.experiments.measuring import (
    benchmarks_for,
    configured,
    is_toy,
    measure_methods,
    one,
    points,
)
from clva_lens.experiments.passes import measure_passes
from clva_lens.experiments.speed.bench import peak_memory
from clva_lens.lens.asking import Asking
from clva_lens.methods.averaged import AveragedAnchors
from clva_lens.methods.target import Target
from clva_lens.toy.questions import CAPTION_REQUEST

record = cl.new_record()
lens = cl.load(model)
record.uses(lens)
pope, (chair,) = benchmarks_for(lens, "pope"), benchmarks_for(lens, "chair")
*asked_pope, asked_chair = configured([*pope, chair], settings)
for benchmark in (*asked_pope, asked_chair):
    record.data(benchmark.digests())
acting = cl.CLVA(**clva)
drawn = asked_pope[0].samples(references, seed + 1)
reference = [(asked_pope[0].picture(sample), sample.question) for sample in drawn]
found = {
    name: cl.text_centric_heads(one, reference, progress=False)
    for name, one in {
        "trained": lens,
        **{f"untrained, seed {number}": untrained_twin(lens, number) for number in range(twins)},
    }.items()
}
mined = found["trained"]
votes = [
    {
        "model": name,
        "heads": ", ".join(map(str, one.heads)),
        "least votes": float(one.votes.flatten().sort().values[-len(one.heads)]) / one.prompts,
        "halves agree": one.agreement,
        "chance": one.chance,
        "shared with trained": len({*one.heads} & {*mined.heads}) / len(one.heads),
    }
    for name, one in found.items()
]
record.keep_rows("text_centric", votes)
methods = {
    "CLVA": acting,
    "CLVA, random tokens": cl.Shuffled(acting, seed=seed),
    "CLVA, anchors swapped": replace(acting, alpha=-acting.beta, beta=-acting.alpha),
    "CLVA, one average": AveragedAnchors(),
    "ClearSight": cl.ClearSight(),
    "PAI (attention)": cl.PAI(),
    "PAI, guidance 1.1": cl.PAI(guidance=1.1),
    "VisFlow": cl.VisFlow(),
    "VCD": cl.VCD(),
    "ICD": cl.ICD(),
    "IMCCD": cl.IMCCD(),
    "MemVR": cl.MemVR(),
    "DeCo": cl.DeCo(),
    "ONLY": cl.ONLY(),
    "M3ID": cl.M3ID(),
    "M3ID, cut off": cl.M3ID(variant="avisc"),
    "VDD": cl.VDD(),
    "VDD, post hoc": cl.PostHocDebias(),
    "AGLA": cl.AGLA(),
    "ASCD": cl.ASCD(),
    "ASCD, heads found": cl.ASCD(heads=mined.heads),
    "SID": cl.SID(),
    "ED": cl.ED(),
    "ViCrop": cl.ViCrop(general=CAPTION_REQUEST) if is_toy(lens) else cl.ViCrop(),
    "DLC": cl.DLC(),
    "VISTA": cl.VISTA(strength=0.01),
    "head-guided": cl.HeadGuided(),
    "knock-out": cl.KnockOut(),
}
methods = {name: methods[name] for name in methods if not only or name in only}
unfit = {}
for name, method in list(methods.items()):
    try:
        method.sessions(Target(lens.hf_model, lens.processor))
    except cl.ClvaLensError as error:  # ED needs patches; AGLA and DLC know toy pictures only
        unfit[name] = str(error)
        del methods[name]
searches = {"beam": None, "OPERA": cl.OPERA()}
searches = {name: searches[name] for name in searches if not only or name in only}
beams = {name: cl.Beam(num_beams=5, max_new_tokens=asked_chair.max_new_tokens) for name in searches}
common = Asking(seed=seed, batch_size=batch_size)

# %% [markdown]
# ## Greedy and beams

# %%
greedy = []
for several, limit in ((asked_pope, questions), ([asked_chair], captions)):
    greedy += measure_methods(
        lens,
        several,
        replace(common, limit=limit).each({"greedy": None, **methods, **searches}, beams),
        keep=record.ran,
    )
record.keep_rows("greedy", greedy)
yes_no = ["accuracy", "yes_ratio", "auc", "beyond_bias"]
record.keep_rows("greedy_questions", [row for row in greedy if row["benchmark"] != chair])
record.draw("differences", "greedy_questions", table="greedy_questions", metrics=yes_no)

# %%
record.draw(
    "differences", "greedy_captions", table="greedy", metrics=["chair_s", "chair_i", "recall"]
)

# %% [markdown]
# ## Sampling

# %%
drawn = []
for several, limit in ((asked_pope, questions), ([asked_chair], captions)):
    tokens = several[0].max_new_tokens
    how = cl.Sampling(seed=seed, max_new_tokens=tokens)
    asking = replace(common, decoding=how, limit=limit).each({"sampling": None, **methods})
    drawn += measure_methods(lens, several, asking, keep=record.ran)
record.keep_rows("sampling", drawn)
record.keep_rows("sampling_questions", [row for row in drawn if row["benchmark"] != chair])
record.draw(
    "differences",
    "sampling_questions",
    table="sampling_questions",
    metrics=yes_no[:-1],  # answers that are drawn have no threshold to move
    baseline="sampling with the same seed",
)

# %%
record.draw(
    "differences",
    "sampling_captions",
    table="sampling",
    metrics=["chair_s", "chair_i", "recall"],
    baseline="sampling with the same seed",
)

# %% [markdown]
# ## Time and memory

# %%
samples = asked_chair.samples(min(8, captions), seed)
asked = [(sample.image, sample.question, sample.system) for sample in samples]
cost = []
for name, method in {"greedy": None, **methods, **searches}.items():
    how = beams.get(name, cl.Greedy(max_new_tokens=8))
    answer = partial(cl.generate, lens, asked, method, how, batch_size=8, progress=False)
    peak = peak_memory(answer, lens.hf_model.device)
    seconds = {
        benchmark: one(greedy, benchmark=benchmark, method=name, metric="seconds")["value"]
        / one(greedy, benchmark=benchmark, method="greedy", metric="seconds")["value"]
        for benchmark in (pope[-1], chair)
    }
    cost.append(
        {
            "method": name,
            "time, questions": seconds[pope[-1]],
            "time, captions": seconds[chair],
            "passes a token": measure_passes(lens, asked[0], method, how).each,
            "memory": peak / (cost[0]["peak_bytes"] if cost else peak),
            "peak_bytes": peak,
        }
    )
record.keep_rows("cost", cost)
pd.DataFrame(cost).drop(columns="peak_bytes").round(2)

# %% [markdown]
# ## Finding


# %%
def sure(rows: list, metric: str, better: int) -> str:
    found = [
        f"{row['method']}, {row['benchmark']} ({points(row)})"
        for row in rows
        if row["metric"] == metric
        and row["low"] is not None
        and (row["low"] > 0 if better > 0 else row["high"] < 0)
    ]
    return "; ".join(found) or "none"


def helped(rows: list) -> set:
    """Methods with an interval on the better side, whatever the benchmark."""
    return {
        row["method"]
        for row in rows
        if row["low"] is not None
        and (
            (row["metric"] == "beyond_bias" and row["low"] > 0)
            or (row["metric"] == "chair_s" and row["high"] < 0)
        )
    }


chosen, *null = votes
idle = [name for name in methods if name not in helped(greedy) | helped(drawn)]
record.keep_metrics(helping_nowhere=len(idle))
clva = one(greedy, benchmark=pope[-1], method="CLVA", metric="beyond_bias")
beyond = [row for row in drawn if row["metric"] == "beyond_bias"]
undefined = sum(row["change"] is None for row in beyond)
record.keep_metrics(
    questions=clva["n"],
    captions=one(greedy, benchmark=chair, method="CLVA", metric="chair_s")["n"],
    clva_beyond_bias=clva["change"],
    clva_chair_s_change=one(greedy, benchmark=chair, method="CLVA", metric="chair_s")["change"],
    intervals_above_0=sum(
        row["metric"] == "beyond_bias" and row["low"] is not None and row["low"] > 0
        for row in greedy
    ),
    undefined_beyond_bias_when_drawn=undefined,
    heads_least_votes=chosen["least votes"],
    heads_halves_agree=chosen["halves agree"],
    heads_least_votes_untrained=max(row["least votes"] for row in null),
    heads_halves_agree_untrained=max(row["halves agree"] for row in null),
)
Markdown(
    f"On **{model}**, gains over the baseline with as many yeses, with an interval above 0: greedy: "
    f"{sure(greedy, 'beyond_bias', 1)}; sampling: undefined in {undefined} of {len(beyond)}, where an "
    f"answer was drawn that is not the likelier, else {sure(drawn, 'beyond_bias', 1)}. Fewer captions with an absent object, with an interval below 0: "
    f"greedy: {sure(greedy, 'chair_s', -1)}; sampling: {sure(drawn, 'chair_s', -1)}. None of these intervals "
    f"is corrected for their number. Nothing of this, on questions or captions: {', '.join(idle) or 'none'}."
    + f" ASCD's text-centric heads lead on {chosen['least votes']:.0%} or more of {references} questions, and "
    f"halves of these agree in {chosen['halves agree']:.0%}; in untrained twins on at most "
    f"{max(row['least votes'] for row in null):.0%}, and halves in {min(row['halves agree'] for row in null):.0%} "
    f"to {max(row['halves agree'] for row in null):.0%}."
    + (f" Not asked here: {', '.join(unfit)}." if unfit else "")
)
