"""The one attention function: it lets sessions look at attention rows and put a bias on them.

Sessions may also edit the residual stream (stream.py) and the logits (logits.py), in the same run.

Multiplying attention weights by w and renormalising is the same as adding log w to the scores:
softmax(s + log w) = w·softmax(s) / Σ w·softmax(s). So every edit of Eqs. 10–11 of
arXiv:2603.25088v1 is a bias, the fused kernels keep working, and no pattern is ever formed. What
methods need to *see* is formed from queries and keys, for the rows in question only.

``clva_sdpa`` and ``clva_eager`` are registered with transformers once, each with the mask builder
of its base kernel. While a ``SiteRun`` is installed its site's configuration names one of them;
modules of no run of this thread or task (models/belonging.py) are passed through. Nothing is stored
on any module, and the last ``remove`` restores everything.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from clva_lens.engine.attend import ACTED, KERNELS, name_in_run
from clva_lens.engine.checkpointing import checkpointed, refuse_checkpoint
from clva_lens.engine.kernels import Acting, Merging
from clva_lens.engine.logits import watch_logits
from clva_lens.engine.session import AttentionCall, Session, is_ahead
from clva_lens.engine.stream import Part, StreamCall, stream_hooks, stream_name
from clva_lens.ground.ambient import exact
from clva_lens.ground.errors import InterventionError
from clva_lens.models.belonging import Owned, found_at, opening
from clva_lens.models.family import Site, find_family, find_site
from clva_lens.models.step import Step


class SiteRun(Owned):
    """One site of a model whose attention goes through sessions, from ``install`` to ``remove``."""

    def __init__(self, site: Site) -> None:
        """Look at the site; nothing is changed before ``install``.

        Raises:
            InterventionError: if its attention kernel cannot be intercepted.
        """
        super().__init__(site.modules)
        self.site = site
        self.passes = site.passes()
        self.sessions: list[Session] = []
        self.acting: dict[nn.Module, Acting] = {}
        other = _other_run(site.config)
        self.kernel = other.kernel if other else site.config._attn_implementation or "eager"
        if self.kernel.startswith("clva_"):
            raise InterventionError(
                "this model is a copy that was made while the model was in a run, so its attention "
                "is routed nowhere. Copy it after the run, or call "
                f"set_attn_implementation('{self.kernel.removeprefix('clva_')}') on the copy."
            )
        if self.kernel not in KERNELS:
            raise InterventionError(
                f"the {site.name} runs attention kernel '{self.kernel}', which cannot be "
                f"intercepted (only {', '.join(sorted(KERNELS))} can). Load the model with "
                "attn_implementation='sdpa', or 'eager'."
            )
        self._layers = dict(zip(site.modules, site.layers, strict=True))
        self.merging = Merging(fused=self.kernel == "sdpa")
        self._hooks: list[RemovableHandle] = []
        self._streams: dict[tuple[Part, int], RemovableHandle] = {}
        self._watches_logits = False
        self._open: tuple[AttentionCall, Acting] | None = None
        self._moved: dict[torch.device, tuple[Step, Step]] = {}

    def install(self) -> None:
        """Route the site's attention through this run, and watch the model's inputs."""
        self._hooks = self.passes.hooks()
        self.enter()
        self.site.config._attn_implementation = name_in_run(self.kernel, self.passes.entry)
        for module in self.site.modules:
            _ACTIVE.setdefault(id(module), []).append(self)

    def remove(self) -> None:
        """Undo ``install``; the kernel's name is changed back after the last run on the model."""
        self.leave()
        for module in self.site.modules:
            _ACTIVE[id(module)].remove(self)
            if not _ACTIVE[id(module)]:
                del _ACTIVE[id(module)]
        _note_acted()
        if _other_run(self.site.config) is None:
            self.site.config._attn_implementation = self.kernel
        for hook in (*self._hooks, *self._streams.values()):
            hook.remove()
        self.passes.end()
        self._streams.clear()

    def follow(self, model: PreTrainedModel) -> None:
        """Have hooks on the residual stream where this run's sessions want them, nowhere else."""
        wanted = {place for session in self.sessions for place in session.streams}
        for place in self._streams.keys() - wanted:
            self._streams.pop(place).remove()
        missing = sorted(wanted - self._streams.keys())
        if missing:
            for place, hook in stream_hooks(model, self.site.name, missing, self.stream):
                self._streams[place] = hook

    def add(self, session: Session) -> None:
        """Let one more session see everything, after those that are there.

        Raises:
            InterventionError: if two would make tokens impossible.
        """
        if session.cuts_off and any(other.cuts_off for other in self.sessions):
            raise InterventionError(
                "two methods of this run cut implausible tokens off (each contrasts the logits "
                "with a second input), and neither could judge by the unedited logits. Use one of "
                "them; methods that edit attention go with each."
            )
        if session.edits_logits and not self._watches_logits:
            self._hooks += watch_logits(self.passes.entry, self.logits)
            self._watches_logits = True
        self.sessions.append(session)
        self._arrange()

    def drop(self, session: Session) -> None:
        """Let a session see nothing any more."""
        self.sessions.remove(session)
        self._arrange()

    def _arrange(self) -> None:
        """Note which modules' attention sessions act on; the others cost nothing."""
        self.merging = Merging(self.merging.fused)
        acting = {at: Acting.at(layer, self.sessions) for at, layer in self._layers.items()}
        self.acting = {at: one for at, one in acting.items() if one is not None}
        _note_acted()

    def step_on(self, device: torch.device) -> Step | None:
        """Return the pass that is running, on the device of the layer that asks."""
        step = self.passes.step
        if step is None or step.text_rows.device == device:
            return step
        return self._moved_to(device, step)

    def _moved_to(self, device: torch.device, step: Step) -> Step:
        """Return a pass on a device; all layers of the device get one object."""
        known = self._moved.get(device)
        if known is None or known[0] is not step:
            known = self._moved[device] = (step, step.to(device))
        return known[1]

    def logits(self, last: Tensor) -> Tensor:
        """Return the logits of a pass's last position as the sessions leave them."""
        step, own = self.step_on(last.device), last
        editing = [session for session in self.sessions if session.edits_logits]
        if step is None or is_ahead(step, editing):
            return last
        if editing and step.drafts:
            raise InterventionError(
                "assisted decoding has several tokens checked in one pass, but a method of this "
                "run edits the logits of the last one only. Generate without assistant_model and "
                "prompt_lookup_num_tokens."
            )
        for session in editing:
            edited = session.logits(step, last)
            last = last if edited is None else edited
        read = None if step is None else step.ids
        if last is not own and (read is None or read.shape[1] > 1) and checkpointed():
            refuse_checkpoint("what the model's head puts out")
        return last

    def edit(
        self,
        acting: Acting,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> AttentionCall | None:
        """Show one layer to the sessions; return it with their biases, None without any.

        Raises:
            InterventionError: if the layer got other rows than the model read.
        """
        self._open = None
        if isinstance(query, FakeTensor):
            return None
        step = self.passes.step
        if step is None:
            raise InterventionError(
                f"layer {acting.layer} ran, but the model around it was not called, so it is "
                "unknown which positions are the image. Call the model as model(**inputs) or "
                "model.generate(**inputs): not its forward function, nor a part of it."
            )
        layer = acting.layer
        if step.text_rows.device != query.device:
            step = self._moved_to(query.device, step)
        if step.number < 1 and is_ahead(step, acting.sessions):
            return None
        if step.ids is not None and step.ids.shape[1] != query.shape[2]:
            raise InterventionError(
                f"the model reads {step.ids.shape[1]} positions, but layer {layer} got "
                f"{query.shape[2]} of them, so they cannot be told apart. Call the model without "
                "logits_to_keep, or with use_cache=False."
            )
        call = AttentionCall(
            layer, step, query, key, mask, None, scaling, value, None, window, softcap, sinks
        )
        inside = checkpointed() if query.shape[2] > 1 else None
        if inside == "again":
            return None
        if inside or torch.is_autocast_enabled(query.device.type):
            with exact(), torch.no_grad() if inside else nullcontext():
                acting.ask(call)
        else:
            acting.ask(call)
        if inside and call.bias is not None:
            refuse_checkpoint("attention")
        self._open = (call, acting) if acting.output else None
        return None if call.bias is None else call

    def output(self, out: Tensor) -> Tensor:
        """Return the output of the layer that ``edit`` was for, as the sessions leave it."""
        opened, self._open = self._open, None
        if opened is not None:
            call, acting = opened
            call.z = out
            if out.shape[1] > 1 and checkpointed():
                refuse_checkpoint("what the heads put out")
            with _surely(out):
                for session in acting.sessions:
                    edited = session.output(call, out) if session.edits_output else None
                    out = out if edited is None else edited
        return out

    def stream(self, part: Part, layer: int, value: Tensor) -> Tensor | None:
        """Show a part of the residual stream to the sessions; return what replaces it, or None."""
        step = None if isinstance(value, FakeTensor) else self.step_on(value.device)
        wanting = [session for session in self.sessions if (part, layer) in session.streams]
        if step is None or is_ahead(step, wanting):
            return None
        call = StreamCall(part, layer, step)
        batch = len(step.text_rows)
        hidden = value if value.ndim > 2 else value.unflatten(0, (batch, -1))  # OPT's MLPs
        found = hidden
        inside = checkpointed() if hidden.shape[1] > 1 else None
        if inside == "again":
            return None
        if inside == "first":
            refuse_checkpoint("the residual stream")
        with _surely(value):
            for session in wanting:
                edited = session.stream(call, found)
                found = found if edited is None else edited
        return None if found is hidden else found.reshape(value.shape)


def _surely(given: Tensor) -> Any:
    """Return what keeps autocast from what sessions compute."""
    return exact() if torch.is_autocast_enabled(given.device.type) else nullcontext()


_ACTIVE: dict[int, list[SiteRun]] = {}
"""The runs that modules, by their ids, are in: those of all threads and tasks."""

_CHANGING = threading.RLock()
"""Held while runs are installed and removed."""


def _note_acted() -> None:
    """Name the modules that any run acts on; meanwhile other threads look them up."""
    acted = {at for runs in _ACTIVE.values() for run in runs for at in run.acting}
    ACTED.update(acted)
    ACTED.intersection_update(acted)


def _other_run(config: Any) -> SiteRun | None:
    """Return a run, anybody's, of a site that has this configuration object."""
    found = (run for runs in _ACTIVE.values() for run in runs if run.site.config is config)
    return next(found, None)


def _runs_here(model: PreTrainedModel) -> list[SiteRun]:
    """Return the runs of this thread or task that a model is in."""
    found = (found_at(site.modules[0]) for site in find_family(model).sites(model))
    return [run for run in found if isinstance(run, SiteRun)]


def edited_streams(model: PreTrainedModel) -> set[str]:
    """Return TransformerLens' names of what sessions of open runs may edit in the stream."""
    return {
        stream_name(run.site.name, *place)
        for run in _runs_here(model)
        for session in run.sessions
        for place in session.streams
    }


def add_sessions(
    model: PreTrainedModel,
    sessions: Sequence[Session],
    frame: FrameType | None = None,
    *,
    traced: bool = False,
) -> Callable[[], None]:
    """Add sessions to the runs of their sites, starting those there are not; return what undoes it.

    The runs are those of this thread or task. ``frame`` is the generator that asks, if one does,
    ``traced`` whether it is for an nnsight trace.

    Raises:
        ModelLoadError: if no family knows the model.
        InterventionError: if a site's attention kernel cannot be intercepted, or this context has a
            run that belongs to another thread, task or generator.
        ParameterError: if a session names a part of the residual stream that there is not.
    """
    joined: list[tuple[SiteRun, Session]] = []

    def close() -> None:
        with _CHANGING:
            for run, session in joined:
                if session in run.sessions:
                    run.drop(session)
                    session.end()
                if frame in run.frames:
                    run.frames.remove(frame)
            for run in {id(run): run for run, _ in joined}.values():
                if run.sessions:
                    run.follow(model)
                elif run in _ACTIVE.get(id(run.site.modules[0]), ()):
                    run.remove()

    with _CHANGING:
        try:
            for session in sessions:
                run = _run_at(find_site(model, session.site))
                joined.append((run, session))
                with opening(run):
                    run.add(session)
                    if session.streams:
                        run.follow(model)
                    session.begin()
                run.frames += [] if frame is None else [frame]
                run.traced = run.traced or traced
        except BaseException:
            close()
            raise
    return close


def _run_at(site: Site) -> SiteRun:
    """Return this context's run of a site; it is started if there is none."""
    run = found_at(site.modules[0])
    if isinstance(run, SiteRun):
        run.check()
        return run
    run = SiteRun(site)
    with opening(run):
        run.install()
    return run


def open_sessions(model: PreTrainedModel) -> list[Session]:
    """Return the sessions of the runs of this thread or task that a model is in."""
    return [session for run in _runs_here(model) for session in run.sessions]


def running_step(model: PreTrainedModel) -> Step:
    """Return the last pass of the decoder's run that this thread or task has open."""
    run = next(run for run in _runs_here(model) if run.site.name == "decoder")
    assert run.passes.step is not None
    return run.passes.step


@contextmanager
def running(
    model: PreTrainedModel, sessions: Sequence[Session], frame: FrameType | None = None
) -> Iterator[None]:
    """Have sessions in the model's run in the ``with`` block; ``frame`` as in ``add_sessions``.

    An error of the model that its family understands is raised as a clearer one.
    """
    close = add_sessions(model, sessions, frame)
    try:
        yield
    except TypeError as error:
        clearer = find_family(model).explain(error)
        if clearer is None:
            raise
        raise clearer from error
    finally:
        close()
