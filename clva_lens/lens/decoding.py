"""How tokens are chosen: by these fields and the token ids, whatever else a checkpoint asks for.

A checkpoint's ``generation_config.json`` fills every setting that a call of ``generate`` leaves
open (penalties, suppressed tokens, shortest lengths, nuclei), unseen and in no record. Here it
fills none: only ``FromCheckpoint`` takes them, and writes them out.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from clva_lens.ground.errors import LogitsError, ParameterError
from clva_lens.ground.parameters import Parameters
from clva_lens.ground.registry import Registry
from clva_lens.lens.beam_length import Length, counting_prompt
from clva_lens.methods.base import Method
from clva_lens.models.belonging import Owned, hook_after, opening
from clva_lens.models.family import find_site
from clva_lens.models.prompt import Prompt

# What no answer is read from, or what ``max_new_tokens`` and one answer a prompt take the place of.
_NO_CHOICE = {
    "_from_model_config",
    "transformers_version",
    "max_length",
    "max_new_tokens",
    "num_return_sequences",
    "return_dict_in_generate",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
}
_TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id")


class Decoding(Parameters, ABC):
    """How the next token is chosen: a frozen dataclass with ``max_new_tokens``."""

    max_new_tokens: int

    @abstractmethod
    def options(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return the generation options: all that apply, but for the token ids."""

    def kind(self, model: PreTrainedModel | None) -> str | None:
        """Return the name that methods know the decoding by; None lets it through.

        Without a ``model``, one that depends on it is let through too.
        """
        return next((name for name, kind in DECODINGS.items() if type(self) is kind), None)

    @property
    def draws(self) -> int | None:
        """The seed of what is drawn; None if nothing is."""
        return None


@dataclass(frozen=True, kw_only=True)
class Greedy(Decoding):
    """The likeliest token at each step.

    Args:
        max_new_tokens: the most tokens of an answer.

    >>> cl.generate(model, prompt, decoding=cl.Greedy(max_new_tokens=4)).texts
    ['no']
    """

    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        """Check the length."""
        _check_length(self.max_new_tokens)

    def options(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return the generation options."""
        return {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1}


@dataclass(frozen=True, kw_only=True)
class Beam(Decoding):
    """Beam search; the paper's has 5 beams.

    Args:
        num_beams: how many beams are kept; ``max_new_tokens`` is the most tokens of an answer.
        length: what a finished beam's score is divided by: its "generated" length, as transformers
            5 does, or that "with prompt", as 4.29 and 4.31 do, on which OPERA's, DeCo's, IMCCD's
            and VCD's releases stand. With the prompt, answers that meet an end token are shorter.

    >>> cl.generate(model, prompt, decoding=cl.Beam(num_beams=2, max_new_tokens=4)).texts
    ['no']
    """

    num_beams: int = 5
    max_new_tokens: int = 32
    length: Length = "generated"

    def __post_init__(self) -> None:
        """Check both."""
        _check_length(self.max_new_tokens)
        if self.num_beams < 1:
            raise ParameterError(f"num_beams must be >= 1, but is {self.num_beams}. Pass 5.")

    def options(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return the generation options."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": False,
            "num_beams": self.num_beams,
        }


@dataclass(frozen=True, kw_only=True)
class Sampling(Decoding):
    """Nucleus sampling: a prompt's tokens depend on the seed and on its place among the prompts.

    Each prompt has random numbers of its own, one a step, so batches, resuming and threads change
    nothing (but for ties that rounding decides).

    Args:
        temperature: what the logits are divided by, above 0.
        top_p: the likeliest tokens that hold this much probability may be drawn; 1 is all.
        seed: of the random numbers.
        max_new_tokens: the most tokens of an answer.

    >>> dice = cl.Sampling(seed=0, max_new_tokens=4)
    >>> one, two = (cl.generate(model, prompt, decoding=dice).texts for _ in range(2))
    >>> one == two
    True
    """

    temperature: float | int = 1.0
    top_p: float | int = 1.0
    seed: int = 0
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check_length(self.max_new_tokens)
        if not self.temperature > 0:
            raise ParameterError(
                f"temperature must be above 0, but is {self.temperature}. Use Greedy() for 0."
            )
        if not 0 < self.top_p <= 1:
            raise ParameterError(f"top_p must be in (0, 1], but is {self.top_p}. Pass top_p=1.0.")

    @property
    def draws(self) -> int | None:
        """The seed."""
        return self.seed

    def options(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return the generation options."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True,
            "num_beams": 1,
            "temperature": float(self.temperature),
            "top_p": float(self.top_p),
            "top_k": 0,
        }


@dataclass(frozen=True, kw_only=True)
class FromCheckpoint(Decoding):
    """What the checkpoint's own ``generation_config`` asks for, but for the length.

    A record has its settings written out. If it samples, it draws as ``Sampling`` does.

    Args:
        seed: of what is drawn, where the checkpoint samples.
        max_new_tokens: the most tokens of an answer.

    >>> cl.generate(model, prompt, decoding=cl.FromCheckpoint(max_new_tokens=4)).texts
    ['no']
    """

    seed: int = 0
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        """Check the length."""
        _check_length(self.max_new_tokens)

    @property
    def draws(self) -> int | None:
        """The seed."""
        return self.seed

    def kind(self, model: PreTrainedModel | None) -> str | None:
        """Return the name of the decoding that the checkpoint asks for; None without a model.

        Raises:
            ParameterError: if it draws beams, which no seed repeats.
        """
        if model is None:
            return None
        options = self.options(model)
        sampled, beams = options.get("do_sample", False), options.get("num_beams") or 1
        if sampled and beams > 1:
            raise ParameterError(
                f"the checkpoint asks for {beams} sampled beams, which are not offered. Pass "
                "cl.Beam() or cl.Sampling()."
            )
        return "sampling" if sampled else "beam" if beams > 1 else "greedy"

    def options(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return the generation options: the checkpoint's, of the module that generates."""
        asked = answering_module(model).generation_config.to_diff_dict()
        kept = {n: v for n, v in asked.items() if n not in _NO_CHOICE and n not in _TOKENS}
        return {**kept, "max_new_tokens": self.max_new_tokens}


DECODINGS = Registry[type[Decoding]]("decoding")
DECODINGS.register("greedy", Greedy)
DECODINGS.register("beam", Beam)
DECODINGS.register("sampling", Sampling)
DECODINGS.register("checkpoint", FromCheckpoint)


def _check_length(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ParameterError(
            f"max_new_tokens must be >= 1, but is {max_new_tokens}. Pass max_new_tokens=32."
        )


def check_decoding(
    method: Method | None, decoding: Decoding, model: PreTrainedModel | None = None
) -> None:
    """Raise ParameterError unless the method works with the decoding.

    A decoding that is not registered is the caller's own, and is let through; so is, without a
    ``model``, one that depends on it.

    Raises:
        ParameterError: if they do not fit, or the checkpoint asks for what is not offered.
    """
    name = decoding.kind(model)
    if method is not None and name is not None:
        method.check_decoding(name)


def told(decoding: Decoding, model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """Return all that decides the choice of tokens, for a record: fields, options, token ids."""
    named = {"name": type(decoding).__name__, **asdict(decoding)}  # pyright: ignore
    if isinstance(decoding, FromCheckpoint):
        named["checkpoint"] = decoding.options(model)
    return {**named, "token_ids": token_ids(model, tokenizer)}


def answering_module(model: PreTrainedModel) -> Any:
    """Return the module whose logits ``generate`` reads: the model, or its language model."""
    return find_site(model, "decoder").passes().entry


def token_ids(model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """Return the ids that begin, end and pad an answer: the checkpoint's, else the tokenizer's."""
    configs = [model.generation_config, answering_module(model).generation_config]

    def first(name: str) -> Any:
        given = [getattr(one, name, None) for one in (*configs, tokenizer)]
        return next((value for value in given if value is not None), None)

    found = {name: first(name) for name in _TOKENS}
    if found["pad_token_id"] is None:
        end = found["eos_token_id"]
        found["pad_token_id"] = end[0] if isinstance(end, list) else end
    return found


class _Settled(GenerationConfig):
    """Settings that a checkpoint's own do not fill."""

    def update(
        self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Take what is given, and transformers' own defaults where something is open.

        ``generate`` fills what is open twice: from the checkpoint, the only time that entries of
        any name are allowed, and then from these defaults.
        """
        if defaults_only and allow_custom_entries:
            return {}
        return super().update(defaults_only, allow_custom_entries, **kwargs)


def settled(
    decoding: Decoding, model: PreTrainedModel, tokenizer: Any, prompt: Prompt
) -> GenerationConfig:
    """Return what ``generate`` is to do: the decoding's options and the token ids, nothing else.

    Raises:
        ParameterError: if beams are to be divided by the length of a prompt that has none.
    """
    options = decoding.options(model)
    if isinstance(decoding, Beam) and decoding.length == "with prompt":
        options["length_penalty"] = counting_prompt(prompt)
    return _Settled(**options, **token_ids(model, tokenizer))


class _Draw(LogitsProcessor):
    """Leaves one token a row, drawn by the row's number of this step: where the sum passes it."""

    def __init__(self, numbers: Float[np.ndarray, "row step"]) -> None:
        self.numbers = torch.as_tensor(numbers)
        self.step = 0

    def __call__(
        self, input_ids: Tensor, scores: Float[Tensor, "row vocabulary"]
    ) -> Float[Tensor, "row vocabulary"]:
        self.numbers = self.numbers.to(scores.device)
        number, self.step = self.numbers[:, self.step, None], self.step + 1
        sums = scores.double().softmax(dim=-1).cumsum(dim=-1)
        if not sums.isfinite().all():
            raise LogitsError(
                "what tokens are drawn from is not finite: the model's logits are not, or a tiny "
                "temperature divides them. Load it with dtype='bfloat16' or 'float32', and use "
                "cl.Greedy() for a temperature of 0."
            )
        token = (sums > number * sums[:, -1:]).int().argmax(dim=-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def drawing(seed: int, places: Sequence[int], steps: int) -> Any:
    """Return a search for ``generate(custom_generate=...)`` that samples, repeatably.

    ``places`` are the prompts' among all: with the seed, they decide each row's random numbers.
    """
    keys = [np.array([seed % 2**64, place], dtype=np.uint64) for place in places]
    streams = [np.random.Philox(key=key) for key in keys]
    numbers = np.stack([np.random.Generator(stream).random(steps) for stream in streams])

    def search(
        model: Any,
        input_ids: Int[Tensor, "row sequence"],
        logits_processor: LogitsProcessorList,
        generation_config: GenerationConfig,
        **options: Any,
    ) -> Any:
        processors = LogitsProcessorList([*logits_processor, _Draw(numbers)])
        generation_config.do_sample = False  # what is drawn is all that is left
        return model._sample(
            input_ids,
            logits_processor=processors,
            generation_config=generation_config,
            **options,
        )

    return search


class Watch(Owned):
    """Looks at the last row of logits in each pass of the answering module, as ``generate`` does.

    ``first`` are the first pass's, float32; ``finite`` is whether no pass had NaN or ∞ in them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Name the model; nothing is watched outside of a ``with`` block."""
        self.module = answering_module(model)
        super().__init__([self.module])
        self.first: Float[Tensor, "row vocabulary"] | None = None
        self._top: Tensor | None = None

    def __enter__(self) -> "Watch":
        """Begin to watch."""
        self.enter()
        with opening(self):
            self._handle = hook_after(self.module, self._see)
        return self

    def __exit__(self, *_: Any) -> None:
        """Stop."""
        self._handle.remove()
        self.leave()

    def _see(self, *call: Any) -> None:
        self.look(call[-1].logits[:, -1])

    def look(self, last: Float[Tensor, "row vocabulary"]) -> None:
        """Look at the last row of logits of a pass."""
        last = last.detach().float()
        if self.first is None:
            self.first = last
        top = last.amax()  # −∞ is what methods cut off; NaN and ∞ stay in a maximum
        self._top = top if self._top is None else self._top.to(top.device) + top

    @property
    def finite(self) -> bool:
        """Whether all logits so far were."""
        return self._top is None or bool(self._top.isfinite())
