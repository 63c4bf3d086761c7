"""Where a model looks in one picture, without and with CLVA: what Figs. 2a, 6 and 7 draw."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from clva_lens.benchmarks.base import Benchmark, Sample
from clva_lens.benchmarks.coco_instances import Instances, asked_name, read_instances
from clva_lens.benchmarks.files import locate
from clva_lens.experiments.asked_object import asked_object
from clva_lens.experiments.reproduce.items import Measured, Part
from clva_lens.experiments.reproduce.needs import Measure
from clva_lens.experiments.reproduce.subjects import Subject
from clva_lens.figures import saliency_overlays
from clva_lens.figures.saliency import SaliencyPicture
from clva_lens.ground.errors import BenchmarkError
from clva_lens.lens.attention_trace import AttentionTrace
from clva_lens.lens.intervene import intervening
from clva_lens.lens.load import LensModel
from clva_lens.lens.side_by_side import Look, look_at, saliency_picture, shown_layers
from clva_lens.lens.trace import trace_attention
from clva_lens.methods.clva import CLVA
from clva_lens.methods.controls import Shuffled

_PLACES = tuple(
    f"{folder}instances_val2014.json" for folder in ("annotations/", "coco/annotations/", "")
)
_MAPS = ("before", "after", "positive", "negative", "objects")
OVERLAYS, PASSES = "image", 9
"""The key of a kept picture's pixels; passes of a picture: four looks, three short answers."""


def instances() -> Instances | None:
    """Return COCO's instances, if the folder of the data has them."""
    try:
        return read_instances(locate(None, _PLACES, "COCO's instances", "cocodataset.org"))
    except BenchmarkError:
        return None


def first_about(benchmark: Benchmark, kind: str, count: int = 1) -> list[Sample]:
    """Return the first questions about a kind that is there, each of another picture.

    If no question asks for such a kind (a toy has no backpacks), they are about any.
    """
    present = [one for one in benchmark.samples() if one.label == "yes"]
    about = [one for one in present if asked_name(one.question) == kind] or present
    return list({one.group: one for one in reversed(about)}.values())[::-1][:count]


def measure_maps(model: LensModel, subject: Subject, *, kind: str) -> dict[str, Any]:
    """Return the maps of one picture's question about ``kind``, under CLVA too, as JSON."""
    (benchmark,) = subject.pope("random", "coco").values()
    (sample,) = first_about(benchmark, kind)
    prompt = model.prompt(benchmark.picture(sample), sample.question, system=sample.system)
    look = look_at(model, prompt)
    place = asked_object(model, benchmark, sample, prompt, instances())
    shown = saliency_picture(model, look, label=sample.label, objects=place)
    told: dict[str, Any] = {"question": sample.question, "label": sample.label}
    told["sample"] = sample.id
    told |= {"answers": {name: list(one) for name, one in shown.answers.items()}}
    told |= {"layers": shown_layers(look.plain.layers), OVERLAYS: packed(shown.image)}
    for name in _MAPS:
        values = getattr(shown, name)
        told[name] = None if values is None else np.asarray(values).tolist()
    told["on_object"] = None if place is None else _on_object(model, look, place, subject.seed)
    return told


def _on_object(
    model: LensModel, look: Look, place: np.ndarray, seed: int
) -> dict[str, float | None]:
    """Return how much of the attention to the picture is on the object, after the anchor layer.

    The mean over those layers, all heads; ``area`` is the object's share of the picture.
    """
    with intervening(model, Shuffled(CLVA(), seed=seed)):
        control = trace_attention(model, look.prompt)

    def share(trace: AttentionTrace) -> float | None:
        after = [at for at, layer in enumerate(trace.layers) if layer > look.anchors.positive_layer]
        maps = look.prompt.on_grid(trace.saliency("all")[after]).double().cpu().numpy()
        return float((maps * place).sum() / maps.sum()) if after else None

    return {
        "greedy": share(look.plain),
        "CLVA": share(look.edited),
        "CLVA on random tokens": share(control),
        "area": float(place.mean()),
    }


def packed(image: Any) -> str:
    """Return a picture, in [0, 1], as the text of a PNG."""
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        pixels = (255 * pixels).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def unpacked(text: str) -> np.ndarray:
    """Return the picture in a text that ``packed`` made."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


class Overlays(Measured):
    """Maps of one picture at several layers, without and with CLVA, about one kind of object."""

    kind: str

    def measure(self, subject: Subject) -> Measure:
        """Return the measurement."""
        return Measure(subject, "maps", measure_maps, PASSES, {"kind": self.kind})

    def shown(self, subject: Subject, told: dict[str, Any]) -> Part:
        """Return the maps, and how much of them is on the object."""
        arrays = {name: None if told[name] is None else np.array(told[name]) for name in _MAPS}
        picture = SaliencyPicture(
            image=unpacked(told[OVERLAYS]),
            question=told["question"],
            label=told["label"],
            answers={name: (text, margin) for name, (text, margin) in told["answers"].items()},
            **arrays,
        )
        drawn = saliency_overlays([picture], told["layers"])
        return Part(drawings={"maps": drawn}, notes=[self._said(subject, told)])

    def _said(self, subject: Subject, told: dict[str, Any]) -> str:
        """Return which picture it is, and the object's share of the attention to it."""
        about = asked_name(told["question"])
        other = "" if about == self.kind else f" (no question asks for a {self.kind})"
        where = told["on_object"]
        if where is None:
            share = "where the object lies is not known, so nothing is measured"
        else:
            parts = [f"{name} {where[name]:.0%}" for name in where if name != "area"]
            share = (
                "of the attention to the picture after the anchor layer, on the object: "
                f"{', '.join(parts)}; it covers {where['area']:.0%} of the picture"
            )
        return f"{subject.model}, sample {told['sample']}, asked for a {about}{other}: {share}."
