"""Attention of a model over questions, without and with CLVA, beside that of random weights."""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clva_lens.benchmarks.base import Benchmark, Sample
from clva_lens.experiments.measuring import mean_interval, trace_samples
from clva_lens.experiments.reproduce.subjects import Subject
from clva_lens.lens.load import LensModel, load
from clva_lens.lens.modality_parts import modality_parts
from clva_lens.methods.clva import CLVA
from clva_lens.methods.target import shape_of
from clva_lens.science.drift import attention_drift
from clva_lens.science.heads import classify_heads

UNTRAINED = "random weights"
BATCH = 8
Row = dict[str, Any]


def untrained(model: LensModel, seed: int = 0) -> LensModel:
    """Return a model of the same configuration with the weights that it is initialised with."""
    own: Any = model.hf_model
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        torch.manual_seed(seed)
        twin = type(own)(copy.deepcopy(own.config))
    twin = twin.to(device=own.device, dtype=own.dtype).eval()
    return load((twin, model.processor), check=False)


def asked(subject: Subject) -> tuple[Benchmark, list[Sample]]:
    """Return the questions that attention is looked at for: adversarial ones."""
    (benchmark,) = subject.pope("adversarial", "coco").values()
    return benchmark, benchmark.samples(subject.limit_of("looks"), subject.seed)


def measure_heads(model: LensModel, subject: Subject) -> dict[str, Any]:
    """Return the mean attention to image, system and text by layer and head, Eq. 1."""
    benchmark, samples = asked(subject)
    trace = trace_samples(model, samples, benchmark=benchmark, batch_size=BATCH, progress=False)
    masses = {name: getattr(trace, name).mean(dim=0) for name in ("intensity", "system", "text")}
    classes = classify_heads(masses["intensity"])
    return {
        "layers": list(trace.layers),
        "questions": len(samples),
        "sensitive": classes.sensitive.tolist(),
        "insensitive": classes.insensitive.tolist(),
        **{name: one.tolist() for name, one in masses.items()},
    }


def _conditions(model: LensModel, subject: Subject) -> dict[str, tuple[LensModel, CLVA | None]]:
    """Return who is looked at under what: the model, and one with random weights."""
    twin = untrained(model, subject.seed)
    return {
        "greedy": (model, None),
        "CLVA": (model, CLVA()),
        UNTRAINED: (twin, None),
        f"{UNTRAINED}, CLVA": (twin, CLVA()),
    }


def measure_drift(model: LensModel, subject: Subject) -> dict[str, Any]:
    """Return entropy and Eq. 6's correlations by layer: the model, CLVA, and random weights."""
    benchmark, samples = asked(subject)
    groups = [sample.group for sample in samples]
    rows: list[Row] = []
    middle = None
    for name, (who, method) in _conditions(model, subject).items():
        trace = trace_samples(
            who, samples, method, benchmark=benchmark, batch_size=BATCH, progress=False
        )
        drift = attention_drift(trace)
        middle = drift.positive_layer
        for quantity, values in (
            ("entropy, sensitive heads (nats)", drift.entropy),
            ("r with the positive anchor", drift.toward_positive),
            ("r with the first layer's map", drift.toward_negative),
        ):
            rows += curve_rows(quantity, name, trace.layers, values, groups)
    return {"rows": rows, "positive_layer": middle, "questions": len(samples)}


def measure_parts(model: LensModel, subject: Subject) -> dict[str, Any]:
    """Return the lengths of O_V and O_P and the visual share by layer (Eq. 12)."""
    benchmark, samples = asked(subject)
    groups = [sample.group for sample in samples]
    rows: list[Row] = []
    for name, (who, method) in _conditions(model, subject).items():
        found: dict[str, list[Tensor]] = {}
        layers: tuple[int, ...] = ()
        for start in range(0, len(samples), BATCH):
            part = samples[start : start + BATCH]
            pictures = [benchmark.picture(one) for one in part]
            prompt = who.prompt(pictures, [one.question for one in part])
            parts = modality_parts(who, prompt, method)
            layers = parts.layers
            for quantity, values in (
                ("visual part, length of O_V", parts.visual_norm),
                ("linguistic part, length of O_P", parts.linguistic_norm),
                ("visual share of the output", parts.visual_share),
            ):
                found.setdefault(quantity, []).append(values.cpu())
        for quantity, pieces in found.items():
            rows += curve_rows(quantity, name, layers, torch.cat(pieces), groups)
    return {"rows": rows, "questions": len(samples), "positive_layer": _middle(model)}


def _middle(model: LensModel) -> int:
    return shape_of(model.hf_model).positive_layer


def curve_rows(
    quantity: str, run: str, layers: tuple[int, ...], values: Tensor, groups: list[str]
) -> list[Row]:
    """Return a row a layer: the mean over questions where it is defined, with its interval."""
    rows = []
    for place, layer in enumerate(layers):
        column = values[:, place].double().cpu().numpy()
        defined = np.isfinite(column)
        kept = [group for group, one in zip(groups, defined, strict=True) if one]
        row = {"quantity": quantity, "run": run, "layer": layer, "n": len(kept)}
        row["pictures"] = len(set(kept))
        if row["pictures"] >= 2:
            mean, low, high = mean_interval(column[defined], kept)
        else:
            mean, low, high = (float(column[defined].mean()) if kept else None), None, None
        rows.append({**row, "value": mean, "low": low, "high": high})
    return [row for row in rows if row["value"] is not None]
