# %% [markdown]
# # What does a direction do?
#
# **Question.** Can it be read off the residual stream whether an object is there, does adding that
# direction change answers about it, and does VTI, which steers towards true captions, help?
#
# **Method.** *Probe*: linear probes for "is the asked object there" by layer, at the last row and
# at the mean of the image rows, cross-validated with both prompts of a picture in one fold. Image
# rows come before the question and are the same for both: a control. *Steering*: the
# direction is the mean difference between pictures with and without an object (`cl.steering_vector`,
# of scenes that are asked nothing here), added at one layer to the last row with both signs. *VTI*
# at its released strengths. All answer the same questions (POPE's adversarial split) and write the
# same captions; changes are paired against greedy, with 95 % bootstrap intervals over pictures.
#
# **Nulls.** Probes of the same states on shuffled labels; random directions of the same lengths in
# the place of every direction; gains beyond a moved threshold (a direction towards *yes* is one).

# %% tags=["parameters"]
model = "toy-llava"
questions = 120
captions = 40
scenes = 40
layers = [10]
strength = 1.0
trials = 50
seed = 0
batch_size = 32
settings = {}

# %%
from dataclasses import replace

from IPython.display import Markdown

import clva_lens as cl
from clva_lens.experiments.measuring import (
    benchmarks_for,
    configured,
    measure_methods,
    one,
    points,
    require_pictures,
    require_several,
)
from clva_lens.lens.asking import Asking
from clva_lens.methods.base import compose
from clva_lens.toy.scenes import KINDS, render, sample_scenes

record = cl.new_record()
lens = cl.load(model)
record.uses(lens)
pope, chair = configured(
    [benchmarks_for(lens, "pope")[-1], *benchmarks_for(lens, "chair")], settings
)
for benchmark, limit in ((pope, questions), (chair, captions)):
    require_pictures(benchmark.name, benchmark.samples(limit, seed))
    record.data(benchmark.digests())
require_several("the probes", 2 * scenes, scenes)

# %% [markdown]
# ## What can be read

# %%
prompts, labels, groups = [], [], []
for number, scene in enumerate(sample_scenes(scenes, seed=seed + 100)):
    absent = next(kind for kind in KINDS[number % len(KINDS) :] + KINDS if kind not in scene.kinds)
    for kind, label in ((scene.kinds[0], "there"), (absent, "absent")):
        prompts.append(lens.prompt(render(scene), f"is there a {kind} in the image?"))
        labels.append(label)
        groups.append(number)
probe = cl.probe(
    lens,
    prompts,
    labels,
    span=("last", "image"),
    groups=groups,
    shuffles=10,
    seed=seed,
    progress=False,
)
reading = []
for place, span in enumerate(probe.spans):
    for row, layer in enumerate(probe.layers):
        null = probe.shuffled[row, place]
        for run, value, low, high in (
            ("labels", probe.accuracy, probe.low, probe.high),
            ("shuffled labels", None, null.min(), null.max()),
        ):
            reading.append(
                {
                    "quantity": f"accuracy of a probe, span “{span}”",
                    "run": run,
                    "layer": layer,
                    "value": float(null.mean() if value is None else value[row, place]),
                    "low": float(low if value is None else low[row, place]),
                    "high": float(high if value is None else high[row, place]),
                }
            )
record.keep_rows("probes", reading)
record.keep_rows("probes_last", [row for row in reading if "last" in row["quantity"]])
record.draw("layer_curves", table="probes_last")

# %% [markdown]
# ## What it does to add it

# %%
vector = cl.steering_vector(lens, progress=False)
noise = vector.random(seed=seed)
methods = {}
for layer in layers:
    for name, direction, sign in (
        ("towards there", vector, 1),
        ("towards gone", vector, -1),
        ("random", noise, 1),
    ):
        methods[f"layer {layer}, {name}"] = cl.Steer(
            vector=direction, layers=[layer], span="last", strength=sign * strength
        )
vti = cl.vti(lens, trials=trials, seed=seed, progress=False)
methods["VTI"] = vti
methods["VTI, random"] = compose(
    *(replace(part, vector=part.vector.random(seed=seed)) for part in vti.methods)
)
rows = []
for benchmark, limit in ((pope, questions), (chair, captions)):
    some = {
        name: method
        for name, method in methods.items()
        if benchmark is pope or name.startswith("VTI")
    }
    asking = Asking(limit=limit, seed=seed, batch_size=batch_size)
    rows += measure_methods(
        lens, [benchmark], asking.each({"greedy": None, **some}), keep=record.ran
    )
record.keep_rows("steered", rows)
record.keep_rows("steered_questions", [row for row in rows if row["benchmark"] == pope.name])
record.draw(
    "differences",
    table="steered_questions",
    metrics=["accuracy", "yes_ratio", "beyond_bias"],
)

# %% [markdown]
# ## Finding


# %%
def told(name: str, metric: str, benchmark=pope) -> str:
    return points(one(rows, benchmark=benchmark.name, method=name, metric=metric))


best = int(probe.accuracy[:, 0].argmax())
last = layers[-1]
record.keep_metrics(
    questions=one(rows, benchmark=pope.name, method="VTI", metric="accuracy")["n"],
    probe_best=float(probe.accuracy[best, 0]),
    probe_null=float(probe.null[best, 0]),
    yes_ratio_towards_there=one(rows, method=f"layer {last}, towards there", metric="yes_ratio")[
        "change"
    ],
    yes_ratio_random=one(rows, method=f"layer {last}, random", metric="yes_ratio")["change"],
    vti_accuracy_change=one(rows, benchmark=pope.name, method="VTI", metric="accuracy")["change"],
    vti_chair_s_change=one(rows, benchmark=chair.name, method="VTI", metric="chair_s")["change"],
)
Markdown(
    f"In **{model}** a probe of the last row after layer {probe.layers[best]} says whether the asked object is "
    f"there with an accuracy of {probe.accuracy[best, 0]:.0%} "
    f"[{probe.low[best, 0]:.0%}, {probe.high[best, 0]:.0%}]; on shuffled labels "
    f"{probe.null[best, 0]:.0%}. Image rows, which come before the question: "
    f"{probe.accuracy[:, 1].min():.0%} to {probe.accuracy[:, 1].max():.0%} in all layers. "
    + " ".join(
        f"Its mean difference added after layer {layer} changes the share of yeses by "
        f"{told(f'layer {layer}, towards there', 'yes_ratio')}, taken away by "
        f"{told(f'layer {layer}, towards gone', 'yes_ratio')}; a random direction as long: "
        f"{told(f'layer {layer}, random', 'yes_ratio')}."
        for layer in layers
    )
    + f" VTI changes the accuracy by {told('VTI', 'accuracy')} (random directions "
    f"{told('VTI, random', 'accuracy')}), beyond a moved threshold by {told('VTI', 'beyond_bias')}, and "
    f"captions with an absent object by {told('VTI', 'chair_s', chair)} (random "
    f"{told('VTI, random', 'chair_s', chair)}). No interval is corrected for their number."
)
