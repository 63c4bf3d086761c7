"""Text from prompts, with or without a method: batches, greedy, beams, sampling, progress."""

import time
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, groupby
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clva_lens.ground.ambient import undisturbed
from clva_lens.ground.batching import batches
from clva_lens.ground.errors import (
    InterventionError,
    LogitsError,
    ModelLoadError,
    ParameterError,
    PromptError,
)
from clva_lens.ground.progress import progress_bar
from clva_lens.lens.asking import Asking, Share
from clva_lens.lens.compiled import generate_compiled
from clva_lens.lens.decoding import Decoding, Watch, drawing, settled
from clva_lens.lens.faults import machine_fault
from clva_lens.lens.intervene import intervening, refuse_in_trace
from clva_lens.lens.load import LensModel
from clva_lens.lens.margins import yes_margins
from clva_lens.lens.prefix import Continued, Prefix
from clva_lens.lens.sharing import Prefixes, picture_keys, shared
from clva_lens.lens.towers import pictures_read_once
from clva_lens.methods.base import MethodLike, as_method
from clva_lens.models.answer_tokens import answer_tokens
from clva_lens.models.pictures import ImageLike
from clva_lens.models.prompt import Prompt, as_prompt, readable

Asked = tuple[ImageLike, str] | tuple[ImageLike, str, str | None]
"""Image, question and, perhaps, the system message of a prompt."""

Unit = Prompt | list[tuple[Any, str, str | None]]
"""What is run at once: a prompt as it is, or pictures and questions to make one of."""

# Faults of the settings: another sample would not fare better.
_OF_SETTINGS = (ParameterError, InterventionError, ModelLoadError)


@dataclass(frozen=True, eq=False, repr=False)
class Generation:
    """Answers, one a prompt, in the order of the prompts.

    ``ids`` are the generated tokens up to the end token. ``margins`` are logit(yes) − logit(no) at
    the first generated position, in nats: the larger of each word's spellings, before a method
    cuts tokens off; None where the tokenizer knows no yes or no. ``seconds`` is the time in the
    model. ``errors`` say why a prompt has no answer, where that was asked to be recorded (see
    ``generate_batches``). ``likeliest`` are the likeliest first tokens, from the same logits as the
    margins; None without an answer.
    """

    texts: list[str]
    ids: list[Int[Tensor, " _"]]
    margins: list[float | None]
    seconds: float
    errors: list[str | None] = field(default_factory=list)
    likeliest: list[int | None] = field(default_factory=list)

    def __repr__(self) -> str:
        """Return the first answers and the time."""
        shown = ", ".join(repr(text) for text in self.texts[:3])
        more = f", … {len(self.texts) - 3} more" if len(self.texts) > 3 else ""
        return f"Generation([{shown}{more}], {self.seconds:.2f} s)"


def generate(
    model: LensModel,
    prompts: Any,
    method: MethodLike | None = None,
    decoding: Decoding | None = None,
    *,
    batch_size: int = 8,
    share: Share | None = None,
    compiled: bool = False,
    progress: bool = True,
) -> Generation:
    """Return the model's answers to ``prompts``, under ``method`` if one is given.

    ``prompts`` are a prompt (possibly a batch) or what a processor made, a tuple (image, question)
    with the system message as a third item if there is one, or a list of these. Tuples are asked
    ``batch_size`` at a time; a prompt is run as it is, by itself. In the place of the image may
    stand what ``read`` returned. With ``share="picture"`` neighbours with the same picture are
    asked together, and it is read once for them, with a Q-Former by the vision tower. With
    ``compiled`` a decoding step is one graph: greedy only, and methods that are a bias on
    attention. Runs of several batches show a progress bar.

    ``model``: what ``cl.load`` returned; ``decoding``: None is greedy, 32 tokens; ``progress``:
    whether a bar may be shown.

    Raises:
        PromptError: if there are no prompts, or one is malformed.
        ParameterError: if the method, with this decoding too, or the batch size does not fit, or
            nothing can be shared or compiled.
        LogitsError: if the model's logits are not finite.
        InterventionError: inside a trace; ``with model.generate(prompt):`` is one.

    >>> answers = cl.generate(model, prompt, method=cl.CLVA())
    >>> answers.texts, len(answers.margins)
    (['no'], 1)
    """
    refuse_in_trace("generate", ", or trace with model.generate(prompt)")
    asking = Asking(
        method=as_method(method),
        decoding=decoding,
        batch_size=batch_size,
        share=share,
        compiled=compiled,
    ).fitted(model)
    kind, reason = shared(model, asking.method, share)
    if share is not None and kind is None:
        raise ParameterError(f"share='{share}' is not possible: {reason}. Pass share=None.")
    asking = replace(asking, share=kind)
    with closing(generate_batches(model, prompts, asking, progress=progress)) as answered:
        return _joined(list(answered))


def generate_batches(
    model: LensModel,
    prompts: Any,
    asking: Asking,
    *,
    progress: bool = True,
    first: int = 0,
    record_errors: bool = False,
    prefixes: Prefixes | None = None,
    keys: Sequence[Hashable] | None = None,
) -> Generator[Generation, None, None]:
    """Yield what ``generate`` returns, batch by batch, as it comes; images are read as needed.

    ``asking`` fits the model (``Asking.fitted``). ``first`` is the place of the first prompt among
    all there are, on which depends what is drawn for it. With ``record_errors`` a batch that fails
    is asked again one by one, and a prompt that fails alone is answered by "" and its error. A
    method that does not fit and faults of the machine (see ``faults``) are no prompt's own, and are
    raised. ``prefixes`` are kept between the batches, and by several of these that run side by
    side. ``keys`` are what the prompts' pictures are known by.

    Raises:
        PromptError: if there are no prompts, or one is malformed.
        ParameterError: if the method does not fit.
    """
    each = _each(model, prompts)
    count = sum(_rows(one) for one in each)
    if not count:
        raise PromptError("there are 0 prompts to answer. Pass at least one.")
    if len({one[0][2] for one in each if isinstance(one, list)}) > 1:
        raise PromptError(
            "the prompts have different system messages. Call generate() once for each of them."
        )
    answer = partial(
        _answer_or_error if record_errors else _answer, prefixes=prefixes or Prefixes()
    )
    wanted = progress and count > asking.batch_size
    with progress_bar("answers", first + count, done=first, wanted=wanted) as advance:
        for place, unit in _units(each, asking, keys):
            yield answer(model, unit, first + place, asking)
            advance(_rows(unit))


def _each(model: LensModel, prompts: Any) -> list[Unit]:
    """Return every prompt by itself: as it is, or as a list of one picture and question."""
    one = isinstance(prompts, Mapping | str | Tensor) or not isinstance(prompts, Iterable)
    alone = one or _is_question(prompts)
    return [_one(model, asked) for asked in ([prompts] if alone else prompts)]


def _one(model: LensModel, asked: Any) -> Unit:
    if _is_question(asked) and isinstance(asked[1], str) and not isinstance(asked[0], list | tuple):
        return [(asked[0], asked[1], asked[2] if len(asked) == 3 else None)]
    return as_prompt(model, asked, continued=True)


def _is_question(asked: Any) -> bool:
    """Whether it is an (image, question), or one of lists, and not a few prompts."""
    if not isinstance(asked, tuple) or len(asked) not in (2, 3):
        return False
    questions = asked[1] if isinstance(asked[1], list) else [asked[1]]
    return all(isinstance(question, str) for question in questions)


def _rows(unit: Unit) -> int:
    return len(unit) if isinstance(unit, list) else len(unit["input_ids"])


def _units(
    each: Sequence[Unit], asking: Asking, known: Sequence[Hashable] | None
) -> Iterator[tuple[int, Unit]]:
    """Yield what is run at once, with the place of its first prompt."""
    place = 0
    for made, group in groupby(each, key=_made_of):
        units = list(group)
        if made is not None:
            pairs: Any = [pair for unit in units for pair in unit]
            keys = None
            if asking.share is not None:
                keys = known or picture_keys([pair[0] for pair in pairs])
            parts = batches(len(pairs), asking.batch_size, keys)
            units = [pairs[part.start : part.stop] for part in parts]
        for unit in units:
            yield place, unit
            place += _rows(unit)


def _made_of(unit: Unit) -> int | None:
    """Return what tells apart units that no batch may mix; None for a prompt, run by itself."""
    if not isinstance(unit, list):
        return None
    return id(unit[0][0]) if isinstance(unit[0][0], Prefix) else 0


def _prompt(model: LensModel, unit: Unit, asking: Asking, prefixes: Prefixes) -> Prompt:
    """Return what a batch is asked."""
    if not isinstance(unit, list):
        return unit
    images, questions, systems = zip(*unit, strict=True)
    if isinstance(images[0], Prefix):
        if systems[0] not in (None, images[0].prompt.system):
            raise PromptError(
                "the picture was read under another system message than the question has. Pass it "
                "to read(): cl.read(model, image, system=...)."
            )
        return as_prompt(model, images[0].ask(list(questions)), continued=True)
    return prefixes.ask(model, images, questions, systems[0], asking.share)


@undisturbed()
def _answer(
    model: LensModel, unit: Unit, place: int, asking: Asking, prefixes: Prefixes
) -> Generation:
    """Return the answers to one batch, whose first prompt has this place among all."""
    began = time.perf_counter()
    prompt = _prompt(model, unit, asking, prefixes)
    if asking.share is None:  # otherwise the model has read pictures
        began = time.perf_counter()
    generated = generate_batch(model, prompt, place, asking)
    if generated is None:
        return _one_by_one(model, unit, place, asking, partial(_answer, prefixes=prefixes))
    ids, scores = generated
    seconds = time.perf_counter() - began
    texts = [one.strip() for one in model.words.batch_decode(ids, skip_special_tokens=True)]
    margins = yes_margins(scores, asking.margin or answer_tokens(model.words))
    likeliest = scores.argmax(dim=1).tolist()
    return Generation(texts, ids, margins, seconds, [None] * len(ids), likeliest)


def _one_by_one(
    model: LensModel, unit: Unit, place: int, asking: Asking, answer: Callable[..., Generation]
) -> Generation:
    """Return the answers to one batch, each prompt asked alone."""
    rows = range(_rows(unit))
    parts = [[unit[row]] if isinstance(unit, list) else unit.row(row) for row in rows]
    return _joined([answer(model, one, place + row, asking) for row, one in enumerate(parts)])


def _by_picture(unit: Unit, asking: Asking) -> list[Unit]:
    """Return the parts of a batch that share a picture, if there are several."""
    if asking.share is None or not isinstance(unit, list):
        return []
    owned = zip(picture_keys([pair[0] for pair in unit]), unit, strict=True)
    parts: list[Unit] = [
        [pair for _, pair in group] for _, group in groupby(owned, key=lambda one: one[0])
    ]
    return parts if len(parts) > 1 else []


def _answer_or_error(
    model: LensModel, unit: Unit, place: int, asking: Asking, prefixes: Prefixes
) -> Generation:
    """Return the answers to one batch, and errors for the prompts that have none."""
    try:
        return _answer(model, unit, place, asking, prefixes)
    except _OF_SETTINGS:
        raise
    except Exception as error:
        if machine_fault(error) is not None:
            raise
        again = partial(_answer_or_error, prefixes=prefixes)
        if parts := _by_picture(unit, asking):
            starts = accumulate(map(_rows, parts), initial=place)
            pairs = zip(parts, starts, strict=False)
            return _joined([again(model, part, start, asking) for part, start in pairs])
        if _rows(unit) > 1:
            return _one_by_one(model, unit, place, asking, again)
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return Generation([""], [torch.zeros(0, dtype=torch.long)], [None], 0.0, [said], [None])


def _joined(parts: Sequence[Generation]) -> Generation:
    return Generation(
        [text for part in parts for text in part.texts],
        [row for part in parts for row in part.ids],
        [margin for part in parts for margin in part.margins],
        sum(part.seconds for part in parts),
        [error for part in parts for error in part.errors],
        [token for part in parts for token in part.likeliest],
    )


def generate_batch(
    model: LensModel,
    prompt: Prompt,
    place: int,
    asking: Asking,
    watching: AbstractContextManager[Any] | None = None,
) -> tuple[list[Tensor], Float[Tensor, "batch vocabulary"]] | None:
    """Return ids and the first logits, or None if the method searches for one prompt at a time.

    ``watching`` is entered once the method acts, around what runs the model.
    """
    hf_model, decoding, count = model.hf_model, asking.how, len(prompt["input_ids"])
    config = settled(decoding, hf_model, model.words, prompt)
    with (
        intervening(model, asking.method) as run,
        watching or nullcontext(),
        Watch(hf_model) as seen,
        readable(prompt),
        pictures_read_once(hf_model, prompt),
    ):
        searches = [session.decode for session in run.sessions if session.decode is not None]
        if searches and count > 1:
            return None
        if config.do_sample:
            assert decoding.draws is not None, f"{type(decoding).__name__} samples without a seed"
            places = range(place, place + count)
            searches.append(drawing(decoding.draws, places, decoding.max_new_tokens))
        answer: Any = hf_model.generate  # transformers declares it on a mixin that hides the call
        if asking.compiled:
            answer = partial(generate_compiled, hf_model, repr(asking.method), run.sessions, seen)
        out = answer(
            **(prompt.by_beam(config.num_beams) if isinstance(prompt, Continued) else prompt),
            generation_config=config,
            **({"custom_generate": searches[0]} if searches else {}),
        )
    assert isinstance(out, Tensor) and seen.first is not None
    if not seen.finite:
        raise LogitsError(
            f"the model's logits are not finite in {hf_model.dtype} (not a number, or infinite). "
            "Load it with dtype='bfloat16' or 'float32', and check its weights."
        )
    eos = config.eos_token_id
    ends = {*(eos if isinstance(eos, list) else [eos]), config.pad_token_id}
    new = [_until(row, ends) for row in out[:, prompt.answer_start :].cpu()]
    scores = seen.first
    for session in run.sessions:
        scores = scores if session.uncut is None else session.uncut
    return new, scores[:: len(scores) // len(new)].float()


def _until(row: Int[Tensor, " step"], ends: set[int | None]) -> Int[Tensor, " generated"]:
    for index, token in enumerate(row.tolist()):
        if token in ends:
            return row[:index]
    return row
