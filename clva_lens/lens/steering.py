"""Steering vectors from pairs of prompts: with and without a picture, or an object."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from clva_lens.engine.stream import Part
from clva_lens.ground.ambient import undisturbed
from clva_lens.ground.checkout import code_digest, packages
from clva_lens.ground.errors import ParameterError
from clva_lens.ground.parameters import check_several
from clva_lens.lens.intervene import refuse_in_trace
from clva_lens.lens.provenance import digest
from clva_lens.lens.stream_reading import SpanLike, WithoutPicture, span_states, stack_layers_of
from clva_lens.methods.steering_vector import SteeringVector
from clva_lens.methods.stream_rows import Stack
from clva_lens.models.family import transformers_model
from clva_lens.models.prompt import Asked, as_prompt
from clva_lens.models.weights import weights_sample
from clva_lens.science.directions import How, direction, explained
from clva_lens.toy.scenes import render, sample_scenes

Pair = tuple[Asked, Asked | None]
"""A prompt and what it is held against; None is the same prompt without its picture."""

TOY_PAIRS = 16


@undisturbed()
def steering_vector(
    model: Any,
    pairs: Sequence[Pair] | None = None,
    how: How = "mean",
    *,
    layers: Sequence[int] | str = "all",
    part: Part = "resid_post",
    stack: Stack = "decoder",
    span: SpanLike | None = None,
    positions: Literal["mean", "each"] = "mean",
    progress: bool = True,
) -> SteeringVector:
    """Return the direction in which the first prompts of pairs differ from the second, by layer.

    Each prompt is read once, under the methods that are open. Its state is the mean over ``span``
    of a part of the residual stream; the directions are made of the pairs' differences, in float64.

    Args:
        model: the model to steer.
        pairs: (prompt, other prompt), or (prompt, None) for the same one without its picture. None
            are 16 scenes of the toy world, each asked about an object that is there and, in the
            same scene, was taken out: "is it there".
        how: "mean" of the differences, or their principal component ("pca"), as long as the mean
            along it.
        layers: "all", or 0-based indices.
        part: what is read, and steered by default.
        stack: "decoder", or "vision" for the tower.
        span: which positions are averaged: "last", "text", "image", "system", "all", or positions.
            None is "last", and "all" at the tower.
        positions: "each" keeps a direction for each of the tower's tokens.
        progress: whether a progress bar is shown.

    Raises:
        ParameterError: if an argument is none of these, or there is no pair.
        PromptError: if a prompt is none, or the model reads none without a picture.
        InterventionError: inside a trace.

    >>> vector = cl.steering_vector(model, [((image, "is there a cup in the image?"), None)])
    >>> vector.values.shape
    torch.Size([12, 128])
    """
    refuse_in_trace("steering_vector", "")
    _check_positions(positions, stack)
    if pairs is not None:
        check_several("pairs", pairs, "(prompt, other prompt)")
    found = transformers_model(model)
    numbers = stack_layers_of(found, stack, part, layers)
    where = span if span is not None else ("all" if stack == "vision" else "last")
    chosen = toy_pairs(model) if pairs is None else list(pairs)
    each = positions == "each"
    states = pair_differences(model, chosen, numbers, where, part, stack, each, progress)
    values = direction(states, how)
    record = {
        "how": how,
        "span": where if isinstance(where, str) else list(where),
        "positions": positions,
        "pairs": len(states),
        "scenes": "of the toy world, seed 0" if pairs is None else "given",
        "prompts": _digest(model, chosen),
        "explained": _shares(states, values),
        **_made_on(model, found),
    }
    return SteeringVector(values.float(), numbers, part, stack, record, weights_sample(found))


def _check_positions(positions: str, stack: str) -> None:
    if positions not in ("mean", "each") or (positions == "each" and stack != "vision"):
        raise ParameterError(
            f"positions is {positions!r} with stack={stack!r}, but is 'mean', or 'each' for a "
            "vision tower, whose positions are the same for all pictures. Pass positions='mean'."
        )


def _made_on(model: Any, found: Any) -> dict[str, Any]:
    """Return which model, with which code, directions are of."""
    named = getattr(model, "name", None) or found.name_or_path or type(found).__name__
    return {
        "model": str(named),
        "class": type(found).__name__,
        "dtype": str(found.dtype),
        "packages": packages(),
        "code": code_digest(),
    }


def _shares(states: Tensor, values: Tensor) -> list[float]:
    """Return, by layer, the share of the differences that lies along the direction."""
    share = explained(states, values).reshape(len(values), -1).mean(dim=1)
    return [round(float(one), 6) for one in share]


def pair_differences(
    model: Any,
    pairs: Sequence[Pair],
    layers: Sequence[int],
    span: SpanLike,
    part: Part,
    stack: Stack,
    each: bool = False,
    progress: bool = True,
) -> Float[Tensor, "pair layer *position width"]:
    """Return how the states of the first prompts differ from those of the second, in float64.

    Raises:
        ParameterError: if there is no pair, or something that is none.
    """
    if not pairs or not all(isinstance(one, tuple) and len(one) == 2 for one in pairs):
        raise ParameterError(
            "pairs must be a list of (prompt, other prompt), with at least one. Pass "
            "pairs=[(with_it, without_it)], or (prompt, None)."
        )
    first = [as_prompt(model, one) for one, _ in pairs]
    second = [
        WithoutPicture(own) if other is None else as_prompt(model, other)
        for own, (_, other) in zip(first, pairs, strict=True)
    ]
    for number, (own, other) in enumerate(zip(first, second, strict=True)):
        if isinstance(other, WithoutPicture):
            continue
        rows = [len(one.inputs["input_ids"]) for one in (own, other)]
        if rows[0] != rows[1]:
            raise ParameterError(
                f"pair {number} holds {rows[0]} prompts against {rows[1]}, but each is told from "
                "one. Pass batches of the same size, or prompts one by one."
            )
    states = span_states(
        model,
        [*first, *second],
        layers,
        [span],
        part=part,
        stack=stack,
        each=each,
        what="steering pairs",
        progress=progress,
    )[:, 0]
    return states[: len(states) // 2] - states[len(states) // 2 :]


def toy_pairs(model: Any, count: int = TOY_PAIRS, seed: int = 0) -> list[Pair]:
    """Return scenes of the toy world with an object, and the same ones without it."""
    pairs: list[Pair] = []
    for scene in sample_scenes(count, seed):
        kind = scene.things[0].kind
        rest = replace(scene, things=tuple(one for one in scene.things if one.kind != kind))
        question = f"is there a {kind} in the image?"
        pairs.append(tuple(as_prompt(model, (render(one), question)) for one in (scene, rest)))  # pyright: ignore[reportArgumentType]
    return pairs


def _digest(model: Any, pairs: Sequence[Pair]) -> str:
    """Return the SHA-256 of everything that was read."""
    tensors = {
        f"{number}.{side}.{name}": value
        for number, pair in enumerate(pairs)
        for side, asked in enumerate(pair)
        if asked is not None
        for name, value in as_prompt(model, asked).inputs.items()
    }
    if any(asked is None for pair in pairs for asked in pair):
        tensors["without"] = torch.tensor([asked is None for _, asked in pairs])
    return digest(tensors)
