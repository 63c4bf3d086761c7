"""Methods and observers in a run of a model: inside an nnsight trace, or around plain code."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import Context
from functools import partial
from typing import Any, TypeVar

import nnsight
from greenlet import getcurrent
from jaxtyping import Float, Int
from nnsight.intervention.interleaver import Interleaver, Mediator, OutOfOrderError
from torch import Tensor
from transformers import PreTrainedModel

from clva_lens.engine.run import add_sessions, running
from clva_lens.engine.session import Session
from clva_lens.ground.errors import InterventionError
from clva_lens.lens.attention_trace import AttentionTrace
from clva_lens.lens.observers import Observer
from clva_lens.lens.words import by_word, words_of
from clva_lens.methods.base import Method, MethodLike, as_methods
from clva_lens.methods.clva import ClvaSession
from clva_lens.methods.target import Target, shape_of
from clva_lens.models.belonging import drawn_frame
from clva_lens.models.family import transformers_model
from clva_lens.science.anchors import VisualAnchors

Handle = TypeVar("Handle")


class Intervention:
    """The handle of a running or finished intervention."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        """Keep the sessions of the run."""
        self.sessions = tuple(sessions)

    @property
    def anchors(self) -> VisualAnchors:
        """The anchors that the first CLVA of this run read from the prompt.

        Raises:
            InterventionError: if the run had no CLVA, or read no prompt yet.
        """
        for session in self.sessions:
            if isinstance(session, ClvaSession):
                return session.anchors
        raise InterventionError(
            "this run has no anchors, because none of its methods is CLVA. "
            "Use cl.intervene(cl.CLVA())."
        )

    def __repr__(self) -> str:
        """Return the kinds of sessions."""
        return f"Intervention({', '.join(type(session).__name__ for session in self.sessions)})"


class Observation:
    """Attention as it is under the interventions that were there before it was opened."""

    def __init__(self, observer: Observer, tokenizer: Any = None) -> None:
        """Keep the observer of the run, and what reads its tokens."""
        self._observer, self._tokenizer = observer, tokenizer

    @property
    def trace(self) -> AttentionTrace:
        """What the prompt's text rows look at: intensities, masses and last-row maps."""
        return self._observer.trace()

    @property
    def steps(self) -> list[Any]:
        """For each later pass, the generated rows' maps: Float["layer batch head row visual"]."""
        return self._observer.steps()

    def answers(
        self, ids: Int[Tensor, "answer position"], prompts: int = 1
    ) -> list[Float[Tensor, "layer head token visual"]]:
        """Return where each head looked as each token of an answer was written, for each answer.

        ``ids`` are what ``generate`` returned for ``prompts`` prompts, with the prompt or without.
        Beams are followed, whatever row an answer's tokens stood in, and so are several answers of
        one prompt (``num_return_sequences``).

        Raises:
            InterventionError: if the model has not read these tokens.
        """
        return [one.maps for one in self._observer.answers(ids, prompts)]

    def words(
        self, ids: Int[Tensor, "answer position"], prompts: int = 1
    ) -> list[list[tuple[str, Float[Tensor, "layer head visual"]]]]:
        """Return, for each answer, its words and where each head looked as each was written.

        ``ids`` are those of ``answers``. The map of a word is the mean over its tokens; marks
        between words are left out.

        Raises:
            InterventionError: if the model has not read these tokens, or came without a tokenizer.
        """
        if self._tokenizer is None:
            raise InterventionError(
                "the words are unknown, because the model came without a tokenizer. Observe what "
                "cl.load() returned."
            )
        found = []
        for tokens, maps in self._observer.answers(ids, prompts):
            words = words_of(self._tokenizer, tokens)
            looks = by_word(maps, words).unbind(dim=2)
            found.append([(word.text, look) for word, look in zip(words, looks, strict=True)])
        return found

    def __repr__(self) -> str:
        """Return where it looks, and what was seen so far."""
        observer = self._observer
        return f"Observation({observer.site}, {len(observer.layers)} layers: {observer.seen})"


@contextmanager
def intervening(model: Any, *methods: MethodLike | None) -> Iterator[Intervention]:
    """Apply methods to whatever runs ``model`` inside the ``with`` block; no nnsight is needed.

    ``model`` is a transformers model or an nnsight handle of one. A method may be given by its
    registered name, with its default parameters. Everything is undone when the block ends, also by
    an exception. The methods are for the thread and the asyncio task that opened the block; in
    others the model is plain, so what runs in a thread of its own opens the block itself.

    ``methods``: applied left to right.

    Raises:
        ModelLoadError: if no family knows the model.
        InterventionError: if its attention kernel cannot be intercepted, or a half-finished
            generator has a block open on the model.
        ParameterError: if a method does not fit the model.

    >>> with cl.intervening(model, cl.KnockOut()):
    ...     blind = model.hf_model(**prompt).logits
    >>> bool((blind == model.hf_model(**prompt).logits).all())
    False
    """
    found = transformers_model(model)
    sessions = _sessions(found, as_methods(methods), getattr(model, "processor", None))
    _share_context()
    with running(found, sessions, drawn_frame()):
        yield Intervention(sessions)


@contextmanager
def observing(
    model: Any, layers: Sequence[int] | str = "all", site: str | None = None
) -> Iterator[Observation]:
    """Look at the attention of whatever runs ``model`` inside the ``with`` block.

    ``site`` is where, None the family's own; ``layers`` are 0-based. Where gradients are recorded
    they flow through what is observed, so run the model under ``torch.no_grad()`` if you need none.

    >>> with cl.observing(model, layers=[4, 5]) as seen:
    ...     _ = model.hf_model(**prompt)
    >>> seen.trace.intensity.shape
    torch.Size([2, 8])
    """
    found = transformers_model(model)
    observer = Observer(layers, shape_of(found, site), differentiable=True)
    observer.follow(found)
    _share_context()
    with running(found, [observer], drawn_frame()):
        yield Observation(observer, getattr(model, "tokenizer", None))


def intervene(*methods: MethodLike | None) -> Intervention:
    """Apply methods to the nnsight trace this is called in, from its first pass to its last.

    Call it before any value is read in the block: reading waits until the model has computed the
    value, and a method cannot start then. Reads may follow in any order that nnsight allows.

    Args:
        *methods: applied left to right; a name stands for a method as it is by default.

    Raises:
        InterventionError: outside a trace, after the model started, or if the traced model
            contains none that clva_lens knows.
        ParameterError: if a method does not fit the model.

    Example::

        with model.trace(prompt):
            run = cl.intervene(cl.CLVA(), cl.PAI())
            logits = model.output.logits.save()
        run.anchors
    """

    def make(root: Any, model: PreTrainedModel) -> tuple[list[Session], Intervention]:
        sessions = _sessions(model, as_methods(methods), getattr(root, "processor", None))
        return sessions, Intervention(sessions)

    return join_trace("intervene", "with cl.intervening(model, method):", make)


def observe(layers: Sequence[int] | str = "all", site: str | None = None) -> Observation:
    """Look at attention during the nnsight trace this is called in; ``layers`` are 0-based.

    ``site`` is where, None the family's own. It shows attention under the interventions opened
    before it.

    Raises:
        InterventionError: outside a trace, after the model started, or on an unknown model.
        ParameterError: if the site or a layer does not exist.

    Example::

        with model.trace(prompt):
            seen = cl.observe(layers=[4, 5])
        seen.trace.intensity
    """

    def make(root: Any, model: PreTrainedModel) -> tuple[list[Session], Observation]:
        observer = Observer(layers, shape_of(model, site))
        observer.follow(model)
        return [observer], Observation(observer, getattr(root, "tokenizer", None))

    return join_trace("observe", "with cl.observing(model):", make)


def join_trace(
    name: str,
    instead: str,
    make: Callable[[Any, PreTrainedModel], tuple[Sequence[Session], Handle]],
) -> Handle:
    """Add sessions to the nnsight trace this is called in; return what outlives it.

    ``make`` gets the traced handle and its transformers model, and returns the sessions and the
    object that shows what they found. ``name`` is the public function's, ``instead`` what to write
    outside a trace.

    Raises:
        InterventionError: outside a trace, after the model started, or on an unknown model.
    """
    root, interleaver = _running(name, instead)
    _share_context()
    model = transformers_model(root)
    sessions, handle = make(root, model)
    _attach(model, sessions, interleaver)
    return nnsight.save(handle)


def refuse_in_trace(name: str, instead: str) -> None:
    """Raise InterventionError within an nnsight trace, whose model must not be run once more.

    ``name`` is the function that runs it, ``instead`` a sentence that says what to do.
    """
    try:
        Mediator.current(name)
    except ValueError:
        return
    raise InterventionError(
        f"{name} was called inside a trace, but it runs the model itself. Call it before or after "
        f"the block{instead}."
    )


def _sessions(model: PreTrainedModel, methods: Sequence[Method], processor: Any) -> list[Session]:
    """Return the sessions of all methods; each knows how to be made again for another model."""
    sessions = []
    for method in methods:
        for index, session in enumerate(method.sessions(Target(model, processor))):
            if not session.prompt_only:
                session.again = partial(_again, method, processor, index)
            sessions.append(session)
    return sessions


def _again(method: Method, processor: Any, index: int, model: PreTrainedModel) -> Session:
    return method.sessions(Target(model, processor))[index]


def _running(name: str, instead: str) -> tuple[nnsight.Envoy, Interleaver]:
    """Return the traced handle and the interleaver of the trace that is being run."""
    try:
        mediator = Mediator.current(name)
    except ValueError:
        raise InterventionError(
            f"cl.{name}() was called outside a trace. Call it inside "
            f"'with model.trace(prompt):', or use '{instead}' around plain code."
        ) from None
    interleaver = mediator.interleaver
    started = dict(mediator.counts_at_start)
    if any(count > started.get(place, 0) for place, count in interleaver.counts.items()):
        raise InterventionError(
            f"cl.{name}() was called after the model started (a value was read before it, or it "
            "is inside a loop over steps). Make it the first statement of the block."
        )
    root = next((e for e in interleaver.envoys.values() if e._parent is None), None)
    if root is None:
        raise InterventionError(
            f"cl.{name}() found no model in the running trace. Trace an nnsight handle of a "
            "transformers model."
        )
    return root, interleaver


def _share_context() -> None:
    """Have an nnsight worker, if this is one, run in the context of whoever runs the model.

    What a block of a trace opens is for the model, which runs beside it in the same thread.
    """
    worker = getcurrent()
    runner = worker.parent
    if getattr(worker, "mediator", None) is None or runner is None:
        return
    if runner.gr_context is None:
        runner.gr_context = Context()
    worker.gr_context = runner.gr_context


class _Guard(Mediator):
    """A worker that does nothing but undo the run when nnsight ends it, in whatever way."""

    def __init__(self, close: Any) -> None:
        super().__init__(code=None, glbls={}, lcls={})
        self._close = close

    def _run(self) -> None:
        _share_context()
        try:
            # After tracer.stop() there is no result to wait for.
            with suppress(OutOfOrderError):
                Mediator.value("result")
        finally:
            self._close()


def _attach(model: PreTrainedModel, sessions: Sequence[Session], interleaver: Interleaver) -> None:
    guard = _Guard(add_sessions(model, sessions, traced=True))
    interleaver.mediators.append(guard)
    # It is started at once: if the rest of the block fails before the model runs, nnsight only
    # unwinds workers that are waiting. It goes back to whoever runs the model, not to this block.
    guard.start(interleaver)
    block = Mediator.current("result").worker
    assert guard.worker is not None and block is not None and block.parent is not None
    guard.worker.parent = block.parent
