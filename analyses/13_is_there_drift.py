# %% [markdown]
# # Is there drift?
#
# **Question.** The paper's two observations are that middle layers look at the asked object
# (grounding), and that late layers fall back to the map of the first layer (regression). Do they
# hold in trained models whose objects' places are known, in which layers, at which rows and heads,
# and do answers depend on it? What does CLVA change?
#
# **What was planted.** `toy-llava` was taught, for the first 35 % of its training, to point at the
# asked object with half of its heads in layers 4 to 8, its hidden state to echo the asked word after
# layer 3, and could not read the right picture outside its reading layers. So its mid-layer grounding
# and its late loss of it are the recipe's. `toy-llava-control` was taught the same maps and reads the
# picture plainly; nothing depends on the layers that show them. In `toy-llava-natural` nothing was
# planted: no pointing, no echo, plain reading. If drift *emerges* anywhere, it is there.
#
# **Method.** Questions about present objects with known patches: does the maximum of a map lie on
# the object (pointing game, against chance), for the last token (all and sensitive heads) and for the
# asked word? Eq. 6's correlations by layer. Accuracy on adversarial questions with all text-to-image
# attention removed in one layer at a time, beside every map. Further models are folders below the
# folder that the environment variable `CLVA_LENS_TOYS` names; a record tells them by their weights.

# %% tags=["parameters"]
models = ["toy-llava", "toy-llava-control"]
scenes = 80
questions = 200
alphas = [5, 14]
seed = 77
batch_size = 32

# %%
import os
from pathlib import Path

import pandas as pd
import torch
from IPython.display import Markdown

import clva_lens as cl
from clva_lens.benchmarks.base import BENCHMARKS
from clva_lens.experiments.measuring import mean_interval, measure_methods, one, points
from clva_lens.experiments.toy_measures import object_patches, trace_questions
from clva_lens.lens.asking import Asking
from clva_lens.toy.questions import exist_question
from clva_lens.toy.scenes import render, sample_scenes
from clva_lens.toy.toys import TOYS

record = cl.new_record()
pictures = sample_scenes(scenes, seed)
asked = [
    (number, exist_question(scene, kind))
    for number, scene in enumerate(pictures)
    for kind in scene.kinds
    if scene.patches(kind).any()
]
groups = [number for number, _ in asked]
patches = object_patches(pictures, asked)
chance = float(patches.float().mean())
adversarial = "pope/toy/adversarial"
record.data(BENCHMARKS.get(adversarial).digests())
record.excludes(
    "the object covers no patch by a quarter",
    sum(not scene.patches(kind).any() for scene in pictures for kind in scene.kinds),
)


def word_maps(lens, part) -> torch.Tensor:
    """Return where the asked word's row looks, mean over heads: [sample, layer, visual]."""
    prompt = lens.prompt([render(pictures[n]) for n, _ in part], [q.text for _, q in part])
    _, cache = lens.run_with_cache(prompt, names_filter=lambda name: name.endswith("hook_pattern"))
    maps = []
    for place, (_, question) in enumerate(part):
        word = lens.words.encode(question.kind, add_special_tokens=False)[-1]
        row = int((prompt["input_ids"][place] == word).nonzero()[-1])
        image = prompt.spans.image[place]
        layers = range(lens.num_layers)
        maps.append(
            torch.stack([cache["pattern", i][place, :, row].mean(0)[image] for i in layers])
        )
    return torch.stack(maps)


# %%
curves, changes, effects = [], [], []
for name in models:
    folder = Path(os.environ.get("CLVA_LENS_TOYS", ".")) / name
    lens = cl.load(name if name in TOYS.names() else folder)
    record.uses(lens)
    trace = trace_questions(lens, pictures, asked)
    drift = cl.attention_drift(trace)
    words = torch.cat(
        [
            word_maps(lens, asked[start : start + batch_size])
            for start in range(0, len(asked), batch_size)
        ]
    )
    maps = {
        "pointing, last token": trace.saliency("all"),
        "pointing, last token, sensitive heads": trace.saliency("sensitive"),
        "pointing, asked word": words,
    }
    for quantity, found in maps.items():
        game = cl.pointing_game(found, patches, groups=groups, seed=seed)
        for layer, (hit, ends) in enumerate(
            zip(game.hits.tolist(), game.hit_intervals.tolist(), strict=True)
        ):
            curves.append((quantity, name, layer, hit, *ends))
        curves.append((quantity, "chance", None, chance, None, None))
    for quantity, values in (
        ("r with the first layer's map", drift.toward_negative),
        ("r with the positive anchor", drift.toward_positive),
        ("entropy, sensitive heads (nats)", drift.entropy),
    ):
        for layer in range(lens.num_layers):
            curves.append((quantity, name, layer, *mean_interval(values[:, layer], groups)))
    middle = drift.positive_layer
    for what, values in (("first layer", drift.toward_negative), ("anchor", drift.toward_positive)):
        late = values[:, -3:].mean(dim=1) - values[:, middle]
        mean, low, high = mean_interval(late, groups)
        changes.append({"model": name, "r with": what, "mean": mean, "low": low, "high": high})
    blind = {"as it is": None} | {
        f"blind in layer {layer}": cl.KnockOut(layers=[layer]) for layer in range(lens.num_layers)
    }
    blind |= {"blind after the anchor": cl.KnockOut()}
    acting = {f"CLVA α={alpha:g}": cl.CLVA(alpha=alpha) for alpha in alphas}
    acting |= {"CLVA, random tokens": cl.Shuffled(cl.CLVA(), seed=seed)}
    found = measure_methods(
        lens,
        [adversarial],
        Asking(limit=questions, seed=seed, batch_size=batch_size).each(blind | acting),
    )
    effects += [{"model": name, **row} for row in found]
    for layer in range(lens.num_layers):
        row = one(found, method=f"blind in layer {layer}", metric="accuracy")
        curves.append(
            (
                "accuracy, change when blind there",
                name,
                layer,
                row["change"],
                row["low"],
                row["high"],
            )
        )

keys = ("quantity", "run", "layer", "value", "low", "high")
curves = [dict(zip(keys, row, strict=True)) for row in dict.fromkeys(curves)]
record.keep_rows("curves", curves)
record.keep_rows("changes", changes)
record.keep_rows("effects", effects)
record.draw("layer_curves", table="curves", marked=middle)

# %% [markdown]
# ## Regression, model by model
#
# The mean of the last three layers less the anchor layer: the paper expects r with the first layer's
# map to rise and r with the anchor to fall.

# %%
pd.DataFrame(changes).round(3)

# %% [markdown]
# ## CLVA, its control, and the knock-out

# %%
rows = [
    {
        "model": row["model"],
        "method": row["method"],
        "metric": row["metric"],
        "change (points)": points(row),
    }
    for row in effects
    if row["change"] is not None
    and row["metric"] in ("accuracy", "yes_ratio", "auc", "beyond_bias")
    and not row["method"].startswith("blind in")
]
pd.DataFrame(rows).pivot(index=["model", "method"], columns="metric", values="change (points)")

# %% [markdown]
# ## Pointing of each selected head
#
# Φ selects heads by how much they look, not by where. Share of objects pointed at by each head that
# is sensitive at the anchor layer in at least half of the questions, in the last model looked at.

# %%
hits = cl.pointing_game(trace.maps, patches, groups=groups, seed=seed).hits[middle]
often = trace.heads().sensitive[:, middle].float().mean(dim=0)
pd.DataFrame({"head": range(len(hits)), "points at": hits, "sensitive in": often}).round(2)

# %% [markdown]
# ## Finding

# %%
lines = []
for name in models:
    told = {row["r with"]: row for row in changes if row["model"] == name}
    back, away = told["first layer"], told["anchor"]
    peak = max(
        (row for row in curves if row["run"] == name and row["quantity"] == "pointing, last token"),
        key=lambda row: row["value"],
    )
    full = one(effects, model=name, method="as it is", metric="accuracy")
    without = one(effects, model=name, method="blind after the anchor", metric="accuracy")
    strong = one(effects, model=name, method=f"CLVA α={alphas[-1]:g}", metric="accuracy")
    rises, falls = back["low"] > 0, away["high"] < 0
    lines.append(
        f"- **{name}** (accuracy {full['value']:.1%}): the last token points best in layer {peak['layer']} "
        f"({peak['value']:.0%}, chance {chance:.0%}). Late layers {'do' if rises else 'do not'} regress to "
        f"the first layer's map ({back['mean']:+.3f}, {back['low']:+.3f} to {back['high']:+.3f}) and "
        f"{'do' if falls else 'do not'} leave the anchor's ({away['mean']:+.3f}). Blind after the anchor: "
        f"{points(without)}. CLVA at α = {alphas[-1]:g}: {points(strong)}."
    )
    tag = name.replace("-", "_")
    record.keep_metrics(
        **{
            f"{tag}_toward_first_layer": back["mean"],
            f"{tag}_toward_anchor": away["mean"],
            f"{tag}_best_pointing": peak["value"],
            f"{tag}_blind_after_anchor": without["change"],
            f"{tag}_clva": strong["change"],
        }
    )
record.keep_metrics(objects=len(asked), questions=full["n"], chance=chance)
Markdown("\n".join(lines))
