# %% [markdown]
# # Are maps right?
#
# **Question.** Which maps of where an answer comes from lie on the asked object, and does the answer
# need the tokens that they rank highest?
#
# **Method.** Questions about objects that are there, whose places are known; the explained logit is
# *yes* less *no*. *Share*: how much of a map lies on the object, and how often its largest value does,
# against chance. *Lost beyond*: what the logit loses when text may no longer look at the eighth of
# the image tokens that the map ranks highest, less what it loses for as many tokens drawn at random.
# Intervals are 95 % bootstraps over pictures. Maps are at their defaults; relative attention's general
# question is one that the model knows.
#
# **Nulls.** A map that is the same everywhere (chance, and nothing beyond, exactly); the same maps of
# an untrained twin (the model's classes and configuration, random weights), where a map that points
# shows the picture and not what was learned.

# %% tags=["parameters"]
model = "toy-llava"
pictures = 24
untrained = 1
maps = []  # names; all, if it is empty
general = "describe the image."
seed = 77

# %%
from dataclasses import replace

import pandas as pd
import torch
from IPython.display import Markdown

import clva_lens as cl
from clva_lens.experiments.map_judging import EVEN, judge_maps
from clva_lens.experiments.measuring import require_several
from clva_lens.lens.maps import MAPS
from clva_lens.toy.questions import exist_question
from clva_lens.toy.scenes import render, sample_scenes

record = cl.new_record()
require_several("this analysis", pictures, pictures)
lens = cl.load(model)
record.uses(lens)
scenes = [scene for scene in sample_scenes(4 * pictures, seed) if scene.things][:pictures]
questions = [exist_question(scene, scene.kinds[0]) for scene in scenes]
prompts = [
    lens.prompt(render(scene), one.text) for scene, one in zip(scenes, questions, strict=True)
]
objects = torch.stack([torch.from_numpy(scene.patches(scene.kinds[0]).ravel()) for scene in scenes])
asked = {name: MAPS.get(name)() for name in maps or MAPS.names()}
if "relative-attention" in asked:
    asked["relative-attention"] = replace(asked["relative-attention"], general=general)
rows = judge_maps(
    lens,
    prompts,
    objects,
    asked,
    untrained=untrained,
    groups=list(range(len(scenes))),
    seed=seed,
    progress=False,
)
record.keep_rows("maps", rows)
table = pd.DataFrame(rows)
table.round(3)

# %% [markdown]
# ## Finding


# %%
def of(name: str, which: str = "trained") -> dict:
    return next(row for row in rows if row["map"] == name and row["model"] == which)


def needed(row: dict) -> str:
    return f"{row['map']} {row['beyond']:.2f} [{row['beyond low']:.2f}, {row['beyond high']:.2f}]"


def lying(row: dict) -> str:
    return f"{row['map']} {row['share']:.0%} [{row['share low']:.0%}, {row['share high']:.0%}]"


trained = sorted((of(name) for name in asked), key=lambda row: -row["beyond"])
null = [row for row in rows if row["model"] != "trained" and row["map"] != EVEN]
record.keep_metrics(
    pictures=len(scenes),
    chance=of(EVEN)["chance"],
    even_share=of(EVEN)["share"],
    even_beyond=of(EVEN)["beyond"],
    largest_share_untrained=max(row["share"] for row in null),
    largest_beyond_untrained=max(row["beyond"] for row in null),
    **{f"share_{name.replace('-', '_')}": of(name)["share"] for name in asked},
    **{f"beyond_{name.replace('-', '_')}": of(name)["beyond"] for name in asked},
)
Markdown(
    f"On {len(scenes)} pictures and **{model}**, of a map's weight there lies on the object: "
    + "; ".join(lying(row) for row in trained)
    + f"; chance {of(EVEN)['chance']:.0%}. Without the eighth of the tokens that it ranks highest, *yes* less "
    "*no* falls, beyond random tokens, by: "
    + "; ".join(needed(row) for row in trained)
    + f". Untrained: at most {max(row['share'] for row in null):.0%} on the object and "
    f"{max(row['beyond'] for row in null):.2f} beyond random. The even map has chance and 0 exactly: "
    f"{of(EVEN)['share'] == of(EVEN)['chance']}, {of(EVEN)['beyond'] == 0}."
)
