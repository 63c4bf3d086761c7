"""Text from prompts, with or without a method: batches, greedy, beams, sampling, progress."""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from clva_lens.ground.errors import InterventionError, ModelLoadError, ParameterError, PromptError
from clva_lens.ground.parameters import Parameters, check_arguments
from clva_lens.ground.progress import progress_bar
from clva_lens.ground.registry import Registry
from clva_lens.lens.intervene import intervening, refuse_in_trace
from clva_lens.lens.load import LensModel
from clva_lens.methods.base import Method, MethodLike, as_method
from clva_lens.models.prompt import ImageLike, Prompt

YES = ("yes", "Yes", "YES", " yes", " Yes")
NO = ("no", "No", "NO", " no", " No")


@dataclass(frozen=True, kw_only=True)
class Greedy(Parameters):
    """The likeliest token at each step."""

    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        """Check the length."""
        _check_length(self.max_new_tokens)

    def options(self) -> dict[str, Any]:
        """Return the generation options."""
        return {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1}


@dataclass(frozen=True, kw_only=True)
class Beam(Parameters):
    """Beam search; the paper's has 5 beams."""

    num_beams: int = 5
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        """Check the number of beams and the length."""
        _check_length(self.max_new_tokens)
        if self.num_beams < 1:
            raise ParameterError(f"num_beams must be >= 1, but is {self.num_beams}. Pass 5.")

    def options(self) -> dict[str, Any]:
        """Return the generation options."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": False,
            "num_beams": self.num_beams,
        }


@dataclass(frozen=True, kw_only=True)
class Sampling(Parameters):
    """Nucleus sampling, repeatable for the same seed, prompts and batch size."""

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

    def options(self) -> dict[str, Any]:
        """Return the generation options."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True,
            "num_beams": 1,
            "temperature": float(self.temperature),
            "top_p": float(self.top_p),
            "top_k": 0,
        }


Decoding = Greedy | Beam | Sampling
Asked = tuple[ImageLike, str] | tuple[ImageLike, str, str | None]
DECODINGS = Registry[type[Decoding]]("decoding")
DECODINGS.register("greedy", Greedy)
DECODINGS.register("beam", Beam)
DECODINGS.register("sampling", Sampling)

# Faults of the settings or of the machine: another sample would not fare better. After an
# AcceleratorError (torch 2.8 and later) every call on the device fails.
_FATAL: tuple[type[Exception], ...] = (
    ParameterError,
    InterventionError,
    ModelLoadError,
    MemoryError,
    torch.OutOfMemoryError,
    getattr(torch, "AcceleratorError", torch.OutOfMemoryError),
)


def _check_length(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ParameterError(
            f"max_new_tokens must be >= 1, but is {max_new_tokens}. Pass max_new_tokens=32."
        )


@dataclass(frozen=True, eq=False, repr=False)
class Generation:
    """Answers, one a prompt, in the order of the prompts.

    ``ids`` are the generated tokens up to the end token. ``margins`` are logit(yes) − logit(no) at
    the first generated position, in nats: the larger of each word's spellings, before a method
    cuts tokens off; None where the tokenizer knows no yes or no. ``seconds`` is the time in the
    model. ``errors`` say why a prompt has no answer, where that was asked to be recorded (see
    ``generate_batches``).
    """

    texts: list[str]
    ids: list[Int[Tensor, " _"]]
    margins: list[float | None]
    seconds: float
    errors: list[str | None] = field(default_factory=list)

    def __repr__(self) -> str:
        """Return the first answers and the time."""
        shown = ", ".join(repr(text) for text in self.texts[:3])
        more = f", … {len(self.texts) - 3} more" if len(self.texts) > 3 else ""
        return f"Generation([{shown}{more}], {self.seconds:.2f} s)"


class _FirstLogits(LogitsProcessor):
    """Keeps the scores of the first generated position and changes nothing."""

    scores: Tensor | None = None

    def __call__(
        self, input_ids: Tensor, scores: Float[Tensor, "batch vocabulary"]
    ) -> Float[Tensor, "batch vocabulary"]:
        if self.scores is None:
            self.scores = scores.detach().float()
        return scores


Triple = tuple[Any, str, str | None]
"""Image, question and system message of a prompt."""


def check_decoding(method: Method | None, decoding: Decoding) -> None:
    """Raise ParameterError unless the method works with the decoding.

    A decoding that is not registered is the caller's own, and is let through.
    """
    for name, kind in DECODINGS.items():
        if method is not None and type(decoding) is kind:
            method.check_decoding(name)


def generate(
    model: LensModel,
    prompts: Prompt | Sequence[Prompt] | Sequence[Asked],
    method: MethodLike | None = None,
    decoding: Decoding | None = None,
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> Generation:
    """Return the model's answers to ``prompts``, under ``method`` if one is given.

    ``prompts`` are a prompt (possibly a batch), several, or tuples (image, question), with the
    system message as a third item if there is one. Runs of several batches show a progress bar.

    Raises:
        PromptError: if there are no prompts, or one is malformed.
        ParameterError: if the method, with this decoding too, or the batch size does not fit.
        InterventionError: inside a trace; ``with model.generate(prompt):`` is one.
    """
    options = {"batch_size": batch_size, "progress": progress}
    with closing(generate_batches(model, prompts, method, decoding, **options)) as batches:
        return _joined(list(batches))


def generate_batches(
    model: LensModel,
    prompts: Prompt | Sequence[Prompt] | Sequence[Asked],
    method: MethodLike | None = None,
    decoding: Decoding | None = None,
    *,
    batch_size: int = 8,
    progress: bool = True,
    done: int = 0,
    record_errors: bool = False,
) -> Generator[Generation, None, None]:
    """Yield what ``generate`` returns, batch by batch, as it comes; images are read as needed.

    The first ``done`` prompts are passed over. With ``record_errors`` a batch that fails is asked
    again one by one, and a prompt that fails alone is answered by "" and its error. So is a
    prompt that is longer than the model's positions. A method that does not fit, memory that runs
    out and a broken device are no fault of a prompt, and are raised.

    Raises:
        PromptError: if there are no prompts, or one is malformed.
        ParameterError: if the method or the batch size does not fit.
    """
    refuse_in_trace("generate", ", or trace with model.generate(prompt)")
    method, decoding = as_method(method), decoding or Greedy()
    check_arguments(generate, batch_size=batch_size)
    if batch_size < 1:
        raise ParameterError(f"batch_size must be >= 1, but is {batch_size}. Pass batch_size=8.")
    check_decoding(method, decoding)
    pairs = list(_pairs(prompts))
    if not pairs:
        raise PromptError("there are 0 prompts to answer. Pass at least one.")
    if len({system for _, _, system in pairs}) > 1:
        raise PromptError(
            "the prompts have different system messages. Call generate() once for each of them."
        )
    answer = _answer_or_error if record_errors else _answer
    wanted = progress and len(pairs) - done > batch_size
    with progress_bar("answers", len(pairs), done=done, wanted=wanted) as advance:
        for start in range(done, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            yield answer(model, batch, method, decoding)
            advance(len(batch))


@torch.inference_mode()
def _answer(
    model: LensModel,
    batch: Sequence[Triple],
    method: Method | None,
    decoding: Decoding,
    longest: int | None = None,
) -> Generation:
    """Return the answers to one batch, unless it has more than ``longest`` tokens."""
    images, questions, systems = zip(*batch, strict=True)
    prompt = model.prompt(list(images), list(questions), system=systems[0])
    length = prompt["input_ids"].shape[1]
    if longest is not None and length > longest:
        raise PromptError(
            f"the prompt has {length} tokens, but the model has {longest} positions. Shorten it."
        )
    began = time.perf_counter()
    generated = _generate_batch(model, prompt, method, decoding)
    if generated is None:
        return _joined([_answer(model, [one], method, decoding, longest) for one in batch])
    ids, margins = generated
    seconds = time.perf_counter() - began
    texts = model.words.batch_decode(ids, skip_special_tokens=True)
    return Generation([t.strip() for t in texts], ids, margins, seconds, [None] * len(ids))


def _answer_or_error(
    model: LensModel, batch: Sequence[Triple], method: Method | None, decoding: Decoding
) -> Generation:
    """Return the answers to one batch, and errors for the prompts that have none."""
    words = model.hf_model.config.get_text_config()
    try:
        longest = getattr(words, "max_position_embeddings", None)
        return _answer(model, batch, method, decoding, longest)
    except _FATAL:
        raise
    except Exception as error:
        if "DefaultCPUAllocator" in str(error):  # out of memory, as a bare RuntimeError
            raise MemoryError(str(error)) from error
        if len(batch) > 1:
            return _joined([_answer_or_error(model, [one], method, decoding) for one in batch])
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return Generation([""], [torch.zeros(0, dtype=torch.long)], [None], 0.0, [said])


def _joined(parts: Sequence[Generation]) -> Generation:
    return Generation(
        [text for part in parts for text in part.texts],
        [row for part in parts for row in part.ids],
        [margin for part in parts for margin in part.margins],
        sum(part.seconds for part in parts),
        [error for part in parts for error in part.errors],
    )


def _pairs(
    prompts: Prompt | Sequence[Prompt] | Sequence[Asked],
) -> Iterator[Triple]:
    """Yield (image, question, system) of every prompt."""
    for one in [prompts] if isinstance(prompts, Prompt) else prompts:
        if isinstance(one, Prompt):
            for image, question in zip(one.images, one.questions, strict=True):
                yield image, question, one.system
        elif isinstance(one, tuple) and len(one) in (2, 3):
            yield one[0], one[1], one[2] if len(one) == 3 else None
        else:
            raise PromptError(
                f"a prompt must be a Prompt or an (image, question) pair, but got "
                f"{type(one).__name__}. Make it with model.prompt(image, question)."
            )


def _generate_batch(
    model: LensModel, prompt: Prompt, method: Method | None, decoding: Decoding
) -> tuple[list[Tensor], list[float | None]] | None:
    """Return ids and margins, or None if the method searches for one prompt at a time."""
    hf_model, tokenizer = model.hf_model, model.words
    own = hf_model.generation_config
    eos = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    pad = next(
        (i for i in (own.pad_token_id, tokenizer.pad_token_id) if i is not None),
        eos[0] if isinstance(eos, list) else eos,
    )
    config = GenerationConfig(
        **decoding.options(), eos_token_id=eos, pad_token_id=pad, bos_token_id=own.bos_token_id
    )
    first = _FirstLogits()
    methods = () if method is None else (method,)
    devices = [hf_model.device] if hf_model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), intervening(model, *methods) as run:
        searches = [session.decode for session in run.sessions if session.decode is not None]
        if searches and prompt["input_ids"].shape[0] > 1:
            return None
        if isinstance(decoding, Sampling):
            torch.manual_seed(decoding.seed)
        answer: Any = hf_model.generate  # transformers declares it on a mixin that hides the call
        out = answer(
            **prompt.inputs,
            generation_config=config,
            logits_processor=LogitsProcessorList([first]),
            **({"custom_generate": searches[0]} if searches else {}),
        )
    assert isinstance(out, Tensor) and first.scores is not None
    ends = set(eos if isinstance(eos, list) else [eos]) | {pad}
    new = [_until(row, ends) for row in out[:, prompt.answer_start :].cpu()]
    scores = first.scores
    for session in run.sessions:
        scores = scores if session.uncut is None else session.uncut
    return new, yes_margins(scores[:: len(scores) // len(new)].float(), tokenizer)


def _until(row: Int[Tensor, " step"], ends: set[int | None]) -> Int[Tensor, " generated"]:
    for index, token in enumerate(row.tolist()):
        if token in ends:
            return row[:index]
    return row


def yes_margins(scores: Float[Tensor, "batch vocabulary"], tokenizer: Any) -> list[float | None]:
    """Return logit(yes) − logit(no) of each row, in nats, over the spellings that are one token."""
    yes, no = answer_tokens(tokenizer)
    if not yes or not no:
        return [None] * len(scores)
    difference = scores[:, yes].amax(dim=1) - scores[:, no].amax(dim=1)
    return difference.tolist()


def answer_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids of the spellings of yes, and of no, that are one token each."""
    yes, no = (sorted(_single_tokens(tokenizer, words)) for words in (YES, NO))
    return yes, no


def _single_tokens(tokenizer: Any, words: Sequence[str]) -> set[int]:
    encoded = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
    return {ids[0] for ids in encoded if len(ids) == 1 and ids[0] != tokenizer.unk_token_id}
