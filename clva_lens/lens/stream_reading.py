"""The residual stream of many prompts, averaged over spans as it is read; no activation is kept."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from clva_lens.engine.stream import Part, stream_hooks
from clva_lens.ground.axes import TokenSpans
from clva_lens.ground.errors import LogitsError, ParameterError, PromptError
from clva_lens.ground.parameters import check_several
from clva_lens.ground.progress import progress_bar
from clva_lens.lens.observers import chosen_layers
from clva_lens.methods.contrast import text_only
from clva_lens.methods.stream_rows import Stack, tower_depth
from clva_lens.methods.target import Shape, shape_of
from clva_lens.models.family import find_family
from clva_lens.models.prompt import Asked, Prompt, as_prompt, readable

SpanLike = str | Sequence[int]


def stack_layers_of(
    model: PreTrainedModel, stack: str, part: str, layers: Sequence[int] | str
) -> tuple[int, ...]:
    """Return the layers of a stack that "all" or 0-based indices name.

    Raises:
        ParameterError: if there is no such stack or layer.
    """
    if stack not in ("decoder", "vision"):
        raise ParameterError(
            f"stack must be 'decoder' or 'vision', but is {stack!r}. Pass stack='decoder'."
        )
    if stack == "decoder":
        shape = shape_of(model, "decoder")
        shape = shape._replace(layers=tuple(range(shape.depth)))
    else:
        depth = tower_depth(model, part)
        shape = Shape("vision tower", tuple(range(depth)), depth, 0)
    return chosen_layers(layers, shape)


def span_states(
    model: Any,
    prompts: Sequence["Asked | WithoutPicture"],
    layers: Sequence[int],
    spans: Sequence[SpanLike],
    *,
    part: Part = "resid_post",
    stack: Stack = "decoder",
    each: bool = False,
    what: str = "prompts",
    progress: bool = True,
) -> Float[Tensor, "prompt span layer *position width"]:
    """Return the mean over each span of a part of the stream, at layers, in float64.

    A batch gives a row for each of its prompts. Where a prompt is a ``WithoutPicture``, its picture
    is taken out. ``each`` keeps the positions apart; the tower has all of its tokens in "all".

    Raises:
        ParameterError: if a span is not in a prompt, or a part or layer not in the model, or there
            is nothing to read.
        LogitsError: if what is read is not finite.
        PromptError: if a prompt is none.
    """
    check_several("prompts", prompts, "prompts")
    if not prompts or not spans:
        raise ParameterError("there is no prompt or no span to read. Pass some.")
    found: Any = getattr(model, "hf_model", model)
    rows = []
    with progress_bar(what, len(prompts), wanted=progress and len(prompts) > 1) as advance:
        for one in prompts:
            rows.append(_read(model, found, one, tuple(layers), spans, part, stack, each))
            advance(1)
    states = torch.cat(rows)
    if not bool(states.isfinite().all()):
        raise LogitsError(
            f"what was read of '{part}' is not finite in {found.dtype} (not a number, or "
            "infinite). Load the model with dtype='bfloat16' or 'float32', and check its weights "
            "and what methods add."
        )
    return states


class WithoutPicture:
    """A prompt whose picture is taken out: its image tokens and its pixels."""

    def __init__(self, prompt: Prompt) -> None:
        """Keep the prompt with its picture."""
        self.prompt = prompt


def _read(
    model: Any,
    found: Any,
    asked: Any,
    layers: tuple[int, ...],
    spans: Sequence[SpanLike],
    part: Part,
    stack: Stack,
    each: bool,
) -> Float[Tensor, "prompt span layer *position width"]:
    if stack == "vision" and isinstance(asked, WithoutPicture):
        raise ParameterError(
            "the vision tower reads nothing of a prompt without its picture. Pass pairs of prompts "
            "with pictures."
        )
    inputs, known = _inputs(model, found, asked)
    places = None if stack == "vision" else [known.places(span) for span in spans]
    kept: dict[int, Tensor] = {}

    def keep(_: Part, layer: int, value: Tensor) -> None:
        value = value if value.ndim > 2 else value.unflatten(0, (len(inputs["input_ids"]), -1))
        kept[layer] = torch.stack([_of(value, at, each) for at in places or _tower(spans, value)])

    hooks = [hook for _, hook in stream_hooks(found, stack, [(part, i) for i in layers], keep)]
    try:
        keeping = {"use_cache": False, "logits_to_keep": 1}
        if isinstance(asked, WithoutPicture):
            _run_without(found, inputs, keeping)
        else:
            with readable(as_prompt(model, asked)):
                found(**inputs, **keeping)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([kept[layer] for layer in layers], dim=2).transpose(0, 1)


def _inputs(model: Any, found: Any, asked: Any) -> tuple[dict[str, Tensor], TokenSpans]:
    token = find_family(found).image_token_id(found)
    if not isinstance(asked, WithoutPicture):
        prompt = as_prompt(model, asked)
        return dict(prompt.inputs), prompt.spans
    prompt = asked.prompt
    given = {"attention_mask": prompt.spans.real.long(), **prompt.inputs}
    inputs = dict(text_only(token)(given))
    return inputs, TokenSpans.from_ids(inputs["input_ids"], token, inputs["attention_mask"])


def _run_without(found: Any, inputs: dict[str, Tensor], keeping: dict[str, Any]) -> None:
    try:
        found(**inputs, **keeping)
    except (TypeError, ValueError, AttributeError) as error:
        raise PromptError(
            f"this {type(found).__name__} does not read a prompt without a picture ({error}). Pass "
            "pairs of prompts with pictures: another one, or a grey one."
        ) from None


def _of(
    value: Float[Tensor, "batch row width"], places: Int[Tensor, "batch position"], each: bool
) -> Float[Tensor, "batch *position width"]:
    at = places.to(value.device)
    rows = value[torch.arange(len(at), device=value.device)[:, None], at].double()
    return rows.cpu() if each else rows.mean(dim=1).cpu()


def _tower(spans: Sequence[SpanLike], value: Tensor) -> list[Tensor]:
    """Return the places of spans among a tower's tokens, the same for each picture."""
    every = torch.ones(value.shape[:2], dtype=torch.bool)
    none = ~every
    tokens = TokenSpans(every, none, none, none)
    for span in spans:
        if isinstance(span, str) and span != "all":
            raise ParameterError(
                f"span is {span!r}, but the rows of a vision tower are its own tokens. Pass "
                "span='all', or positions."
            )
    return [tokens.places(span) for span in spans]
