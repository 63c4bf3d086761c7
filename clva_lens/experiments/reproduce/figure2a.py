"""Figure 2a: maps of both anchors and of the layers, and how often maps point at the object."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from clva_lens.experiments.asked_object import asked_object
from clva_lens.experiments.measuring import trace_samples
from clva_lens.experiments.reproduce.intervals import FEW
from clva_lens.experiments.reproduce.items import Measured, Part, register
from clva_lens.experiments.reproduce.looks import BATCH, UNTRAINED, curve_rows, untrained
from clva_lens.experiments.reproduce.maps import (
    OVERLAYS,
    first_about,
    instances,
    packed,
    unpacked,
)
from clva_lens.experiments.reproduce.needs import Measure
from clva_lens.experiments.reproduce.subjects import LOOKS, Subject
from clva_lens.figures import layer_curves, photo_maps
from clva_lens.lens.attention_trace import AttentionTrace
from clva_lens.lens.load import LensModel
from clva_lens.lens.side_by_side import drawn_over, look_at, shown_layers
from clva_lens.methods.target import shape_of
from clva_lens.models.prompt import Prompt
from clva_lens.science.pointing import pointing

_QUANTITY = "maximum on the asked object (share of questions)"


def measure_grounding(model: LensModel, subject: Subject) -> dict[str, Any]:
    """Return the maps of one picture, and by layer how often maxima lie on the asked object."""
    (benchmark,) = subject.pope("random", "coco").values()
    limit, known = subject.limit_of("looks") or LOOKS, instances()
    kept, masks, example, shape = [], [], None, None
    for sample in first_about(benchmark, "", limit):
        prompt = model.prompt(benchmark.picture(sample), sample.question, system=sample.system)
        place = asked_object(model, benchmark, sample, prompt, known)
        if example is None:
            example = _maps(model, prompt, place)
        if place is not None:
            kept.append(sample)
            shape = prompt
            masks.append(torch.from_numpy(place))
    rows = []
    groups = [one.group for one in kept]
    for name, who in (("greedy", model), (UNTRAINED, untrained(model, subject.seed))):
        if shape is None:
            break
        trace = trace_samples(who, kept, benchmark=benchmark, batch_size=BATCH, progress=False)
        hit = _hits(trace, shape, masks)
        rows += curve_rows(_QUANTITY, name, trace.layers, hit, groups)
    chance = float(torch.stack(masks).double().mean()) if masks else None
    middle = shape_of(model.hf_model).positive_layer
    return {"rows": rows, "example": example, "chance": chance, "positive_layer": middle}


def _hits(trace: AttentionTrace, prompt: Prompt, masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return whether each map's maximum lies on its object: [sample, layer]."""
    maps = prompt.on_grid(trace.saliency("all")).flatten(-2).cpu().float()
    return pointing(maps, torch.stack(list(masks)).flatten(1)).hit.double()


def _maps(model: LensModel, prompt: Prompt, place: np.ndarray | None) -> dict[str, Any]:
    look = look_at(model, prompt)
    plain, anchors = look.plain, look.anchors
    first, middle = anchors.negative_layer, anchors.positive_layer
    shown = [
        (f"layer {first}, insensitive", plain.saliency("insensitive")[plain.layers.index(first)]),
        (f"layer {middle}, sensitive", plain.saliency("sensitive")[plain.layers.index(middle)]),
    ]
    every = plain.saliency("all")
    shown += [
        (f"layer {layer}, all heads", every[plain.layers.index(layer)])
        for layer in shown_layers(plain.layers)[1:]
    ]
    maps = [prompt.on_grid(values).float().cpu().numpy() for _, values in shown]
    return {
        "question": prompt.questions[0],
        "titles": [title for title, _ in shown],
        "maps": np.stack(maps).tolist(),
        "objects": None if place is None else place.tolist(),
        OVERLAYS: packed(drawn_over(model, look)),
    }


@register
class Figure2a(Measured):
    """Grounding."""

    name = "figure 2a"
    title = "maps of the anchors and of the layers (a)"
    method = (
        "Eq. 4 at the last row: the insensitive heads of the first layer and the sensitive ones "
        "of the middle layer (the two anchors), and all heads layer by layer, on the first "
        "picture that is asked for something that it has. One picture shows what maps look like; "
        "whether they find the object is counted over questions about present objects whose "
        "place is known (COCO's instances_val2014.json in the data folder, or the toy world), "
        "beside random weights and beside chance, the objects' share of the picture."
    )

    def measure(self, subject: Subject) -> Measure:
        """Return the measurement."""
        passes = 2 + 2 * (subject.limit_of("looks") or LOOKS)
        return Measure(subject, "grounding", measure_grounding, passes)

    def shown(self, subject: Subject, told: dict[str, Any]) -> Part:
        """Return the maps, the share of objects that maxima lie on, and a sentence."""
        one = told["example"]
        place = one["objects"]
        drawn = photo_maps(
            unpacked(one[OVERLAYS]) / 255,
            np.array(one["maps"]),
            titles=one["titles"],
            notes=[f"sum {np.sum(values):.2f}" for values in one["maps"]],
            outlines=None if place is None else {"objects": np.array(place)},
        )
        drawings = {"maps": drawn}
        if told["rows"]:
            rows = [
                row if row["pictures"] >= FEW else {**row, "low": None, "high": None}
                for row in told["rows"]
            ]
            rows.append(
                {"quantity": _QUANTITY, "run": "chance", "layer": None, "value": told["chance"]}
                | {"low": None, "high": None}
            )
            drawings["pointing"] = layer_curves(rows, marked=told["positive_layer"])
        asked = f"{subject.model}, the maps are of: {one['question']}"
        return Part(drawings=drawings, notes=[asked, _said(subject, told)])


def _said(subject: Subject, told: dict[str, Any]) -> str:
    """Return where maps point best, and what random weights and the last layer do."""
    if not told["rows"]:
        return f"{subject.model}: where objects lie is not known, so pointing is not counted."
    curve = {(row["run"], row["layer"]): row["value"] for row in told["rows"]}
    own = {layer: value for (run, layer), value in curve.items() if run == "greedy"}
    best, last = max(own, key=own.__getitem__), max(own)
    return (
        f"{subject.model}, {told['rows'][0]['n']} objects: the maximum lies on the object most "
        f"often in layer {best} ({own[best]:.0%}; {UNTRAINED} {curve[UNTRAINED, best]:.0%}; chance "
        f"{told['chance']:.0%}), in the last layer in {own[last]:.0%}."
    )
