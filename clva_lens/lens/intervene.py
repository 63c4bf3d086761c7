"""Methods and observers in a run of a model: inside an nnsight trace, or around plain code."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import nnsight
import torch
from jaxtyping import Float
from nnsight.intervention.interleaver import Interleaver, Mediator, OutOfOrderError
from torch import Tensor
from transformers import PreTrainedModel

from clva_lens.engine.run import open_run, running
from clva_lens.engine.session import Session
from clva_lens.ground.errors import InterventionError
from clva_lens.lens.observers import AttentionTrace, HeadChoice, Observer, QueryObserver
from clva_lens.methods.ablation import HeadMeans, MeanSession, ZRows
from clva_lens.methods.base import Method
from clva_lens.methods.clva import ClvaSession
from clva_lens.methods.target import Target, shape_of
from clva_lens.models.family import transformers_model
from clva_lens.models.prompt import Asked, Prompt, as_prompt
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

    def __init__(self, observer: Observer) -> None:
        """Keep the observer of the run."""
        self._observer = observer

    @property
    def trace(self) -> AttentionTrace:
        """What the prompt's text rows look at: intensities, masses and last-row maps."""
        return self._observer.trace()

    @property
    def steps(self) -> list[Any]:
        """For each later pass, the generated rows' maps: Float["layer batch head row visual"]."""
        return self._observer.steps()


@contextmanager
def intervening(model: Any, *methods: Method) -> Iterator[Intervention]:
    """Apply methods to whatever runs ``model`` inside the ``with`` block; no nnsight is needed.

    ``model`` is a transformers model or an nnsight handle of one. Everything is undone when the
    block ends, also by an exception.

    Raises:
        ModelLoadError: if no family knows the model.
        InterventionError: if its attention kernel cannot be intercepted.
        ParameterError: if a method does not fit the model.
    """
    found = transformers_model(model)
    sessions = _sessions(found, methods, getattr(model, "processor", None))
    with running(found, sessions):
        yield Intervention(sessions)


@contextmanager
def observing(
    model: Any, layers: Sequence[int] | str = "all", site: str | None = None
) -> Iterator[Observation]:
    """Look at the attention of whatever runs ``model`` inside the ``with`` block.

    ``site`` is where, None the family's own; ``layers`` are 0-based.
    """
    found = transformers_model(model)
    observer = Observer(layers, shape_of(found, site))
    with running(found, [observer]):
        yield Observation(observer)


def intervene(*methods: Method) -> Intervention:
    """Apply methods to the nnsight trace this is called in, from its first pass to its last.

    Call it before any value is read in the block: reading waits until the model has computed the
    value, and a method cannot start then. Reads may follow in any order that nnsight allows.

    Raises:
        InterventionError: outside a trace, after the model started, or if the traced model
            contains none that clva_lens knows.
        ParameterError: if a method does not fit the model.
    """

    def make(root: Any, model: PreTrainedModel) -> tuple[list[Session], Intervention]:
        sessions = _sessions(model, methods, getattr(root, "processor", None))
        return sessions, Intervention(sessions)

    return join_trace("intervene", "with cl.intervening(model, method):", make)


def observe(layers: Sequence[int] | str = "all", site: str | None = None) -> Observation:
    """Look at attention during the nnsight trace this is called in; ``layers`` are 0-based.

    ``site`` is where, None the family's own. It shows attention under the interventions opened
    before it.

    Raises:
        InterventionError: outside a trace, after the model started, or on an unknown model.
        ParameterError: if the site or a layer does not exist.
    """

    def make(_: Any, model: PreTrainedModel) -> tuple[list[Session], Observation]:
        observer = Observer(layers, shape_of(model, site))
        return [observer], Observation(observer)

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


class _Guard(Mediator):
    """A worker that does nothing but undo the run when nnsight ends it, in whatever way."""

    def __init__(self, close: Any) -> None:
        super().__init__(code=None, glbls={}, lcls={})
        self._close = close

    def _run(self) -> None:
        try:
            # After tracer.stop() there is no result to wait for.
            with suppress(OutOfOrderError):
                Mediator.value("result")
        finally:
            self._close()


def _attach(model: PreTrainedModel, sessions: Sequence[Session], interleaver: Interleaver) -> None:
    guard = _Guard(open_run(model, sessions))
    interleaver.mediators.append(guard)
    # It is started at once: if the rest of the block fails before the model runs, nnsight only
    # unwinds workers that are waiting. It goes back to whoever runs the model, not to this block.
    guard.start(interleaver)
    block = Mediator.current("result").worker
    assert guard.worker is not None and block is not None and block.parent is not None
    guard.worker.parent = block.parent


@torch.inference_mode()
def trace_attention(
    model: Any,
    prompt: Asked,
    method: Method | None = None,
    *,
    layers: Sequence[int] | str = "all",
    site: str | None = None,
) -> AttentionTrace:
    """Return what each head's text rows look at, from one forward pass under ``method``.

    ``site`` is "decoder" or, in a model with a Q-Former, "qformer"; None is the family's own.

    Rows of the pattern are formed for the text rows only, one layer at a time, and reduced at
    once. The trace has a batch axis if the prompt was made from lists; its ``logits`` are those of
    the last position.

    Raises:
        ModelLoadError: if no family knows the model.
        ParameterError: if the site or a layer does not exist, or the method does not fit.
        InterventionError: inside a trace; use ``observe`` there.
    """
    refuse_in_trace("trace_attention", ", or cl.observe() in it")
    found, prompt = transformers_model(model), as_prompt(model, prompt)
    observer = Observer(layers, shape_of(found, site))
    methods = () if method is None else (method,)
    with intervening(model, *methods), running(found, [observer]):
        logits = _last_logits(found, prompt)
    return observer.trace(prompt.batched, logits)


@torch.inference_mode()
def head_means(
    model: Any,
    prompts: Sequence[Asked],
    method: Method | None = None,
    *,
    rows: ZRows = "text",
    site: str | None = None,
) -> HeadMeans:
    """Return the mean output z of each head over rows of prompts, for ``AblateHeads``.

    Each prompt (which may be a batch) is read once, under ``method``; only sums are kept. ``rows``
    are those of the prompt: all text after the image, the "last", or "all". In the units of the
    values, before the output projection.

    Raises:
        ModelLoadError: if no family knows the model.
        ParameterError: if the site does not exist, the method does not fit, or there is no prompt.
        InterventionError: inside a trace: it reads prompts of its own, so make the means before,
            and open ``AblateHeads(mode="mean", reference=means)`` there.
    """
    refuse_in_trace("head_means", "")
    found = transformers_model(model)
    session = MeanSession(shape_of(found, site), rows)
    methods = () if method is None else (method,)
    for prompt in prompts:
        with intervening(model, *methods), running(found, [session]):
            _last_logits(found, as_prompt(model, prompt))
    return session.means()


def _last_logits(model: PreTrainedModel, prompt: Prompt) -> Float[Tensor, "batch vocabulary"]:
    # An encoder-decoder's decoder has read one token only.
    keep = {} if "decoder_input_ids" in prompt else {"logits_to_keep": 1}
    return model(**prompt.inputs, **keep).logits[:, -1]


@torch.inference_mode()
def composed_saliency(
    model: Any,
    prompt: Asked,
    method: Method | None = None,
    *,
    heads: HeadChoice = "all",
    layers: Sequence[int] | str = "all",
    qformer_layers: Sequence[int] | str = "all",
) -> Float[Tensor, "*batch layer visual"]:
    """Return where on the picture the language model looks, for each layer of the decoder.

    Where a Q-Former reads the picture, the decoder's image tokens lie nowhere. Its attention to
    each of them (Eq. 4 of arXiv:2603.25088v1, over ``heads``) is passed on to the patches that
    their queries look at, averaged over the heads and over ``qformer_layers``. What mixes the
    queries otherwise (self-attention, residual stream) is left out. In other models it is the
    decoder's saliency map itself. Fractions of attention mass, in [0, 1].

    Raises:
        ModelLoadError: if no family knows the model.
        ParameterError: if a layer does not exist, or the method does not fit the model.
        InterventionError: inside a trace; use ``observe`` of each site there.
    """
    refuse_in_trace("composed_saliency", ", or cl.observe() in it")
    found, prompt = transformers_model(model), as_prompt(model, prompt)
    methods = () if method is None else (method,)
    target = Target(found)
    decoder = Observer(layers, target.at("decoder"))
    queries = None
    if target.at().site != "decoder":
        queries = QueryObserver(qformer_layers, target.at())
    observers: list[Session] = [decoder] if queries is None else [decoder, queries]
    with intervening(model, *methods), running(found, observers):
        _last_logits(found, prompt)
    saliency = decoder.trace(prompt.batched).saliency(heads)
    if queries is None:
        return saliency
    looks = queries.maps().mean(dim=1)
    return saliency @ (looks if prompt.batched else looks[0])
