"""Many patches of one prompt: each in a pass of its own, or many in one, from where they begin.

What comes before the first patched row is the same under every patch. Where that is a row of text,
the picture is before it: the prompt is read once, and the rest of it again for many patches at a
time, each onto a copy of the keys and values before it. The numbers are those of whole passes, up
to the rounding of another batch size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from clva_lens.engine.run import open_sessions, running
from clva_lens.ground.axes import TokenSpans, last_true
from clva_lens.lens.intervene import intervening
from clva_lens.lens.load import LensModel
from clva_lens.lens.prefix import BY_TOKEN, Prefix, by_token
from clva_lens.lens.sharing import why_unshared
from clva_lens.methods.base import MethodLike
from clva_lens.methods.patching import PatchActivations, span_places
from clva_lens.methods.target import Target
from clva_lens.models.beginning import Beginning
from clva_lens.models.family import transformers_model
from clva_lens.models.kv_cache import CACHE, forked, take_off
from clva_lens.models.prompt import Prompt, readable
from clva_lens.models.weights import weights_state

# So many copies of what was read are held at once: 10 GB at LLaVA-1.5-7B in half precision. It is
# halved where there is no room for them.
ROWS_AT_ONCE = 32

Logits = Float[Tensor, "batch 1 vocabulary"]


def sweep(
    model: Any, prompt: Prompt, patches: Sequence[PatchActivations], method: MethodLike | None
) -> Iterator[tuple[int, Logits]]:
    """Yield the last logits under each patch, with its number (0-based), in any order.

    The first are those of the prompt as it is; their number is −1.
    """
    starts = _first_rows(model, prompt, patches, method)
    if len(starts) < 2:
        starts = {}
        yield -1, _whole(model, prompt, method)
    else:
        read = _read(model, prompt, method)
        yield -1, read.logits
        if read.is_continued():
            for start in dict.fromkeys(starts.values()):
                numbers = [number for number, own in starts.items() if own == start]
                yield from read.under(patches, numbers, start)
        else:
            starts = {}
    for number, patch in enumerate(patches):
        if number not in starts:
            yield number, _whole(model, prompt, method, patch)


def _whole(
    model: Any, prompt: Prompt, method: MethodLike | None, *patch: PatchActivations
) -> Logits:
    found: Any = transformers_model(model)
    with intervening(model, method, *patch), readable(prompt):
        return found(**prompt.inputs, logits_to_keep=1, use_cache=False).logits[:, -1:]


def _first_rows(
    model: Any, prompt: Prompt, patches: Sequence[PatchActivations], method: MethodLike | None
) -> dict[int, tuple[int, ...]]:
    """Return where each patch that begins in the text has a pass begin, for each sample.

    That is the first patched row, or the first row of text where a method reads the text. Empty if
    the model, or the method, has no beginning that is the same whatever follows.
    """
    if not isinstance(model, LensModel) or open_sessions(model.hf_model):
        return {}
    text = prompt.spans.text
    places = {
        number: span_places(patch.span, "decoder", prompt.spans, text.shape)
        for number, patch in enumerate(patches)
    }
    places = {number: at for number, at in places.items() if bool(text.gather(1, at).all())}
    with intervening(model, method):
        untouched = all(one.leaves_prefix for one in open_sessions(model.hf_model))
    if len(places) < 2 or not untouched or why_unshared(model, None) is not None:
        return {}
    begins = last_true(prompt.spans.image) + 1
    return {
        number: tuple((at.amin(dim=1) if method is None else begins).tolist())
        for number, at in places.items()
    }


@dataclass(frozen=True, eq=False)
class _Read:
    """A prompt that was read: its inputs by token, its keys and values, and its last logits."""

    model: LensModel
    prompt: Prompt
    method: MethodLike | None
    inputs: dict[str, Tensor]
    cache: DynamicCache
    logits: Logits

    def is_continued(self) -> bool:
        """Whether its last logits come out again when its text is read onto what is before it.

        They do not where a hook of the caller's own counts on whole passes.
        """
        begins = (last_true(self.prompt.spans.image) + 1).tolist()
        try:
            again = self._onto(self._before(begins), begins, [])
        except (IndexError, RuntimeError):  # of that hook
            return False
        known = self.logits.isfinite()  # methods make tokens impossible
        if not torch.equal(again.isfinite(), known):
            return False
        own, half_the_digits = self.logits[known], torch.finfo(self.logits.dtype).eps ** 0.5
        return bool((again[known] - own).abs().max() <= half_the_digits * own.float().std())

    def under(
        self, patches: Sequence[PatchActivations], numbers: Sequence[int], start: Sequence[int]
    ) -> Iterator[tuple[int, Logits]]:
        """Yield the last logits under these patches, which begin at ``start`` in each sample."""
        before, batch = self._before(start), len(start)
        done, at_once = 0, max(1, ROWS_AT_ONCE // batch)
        while done < len(numbers):
            some = numbers[done : done + at_once]
            try:
                logits = self._onto(before, start, [patches[number] for number in some])
            except torch.OutOfMemoryError:
                if at_once == 1:
                    raise
                at_once //= 2
                continue
            yield from zip(some, logits.split(batch), strict=True)
            done += len(some)

    def _before(self, start: Sequence[int]) -> Prefix:
        """Return what is before a row; what is there but not to be seen is padding."""
        stop, first = max(start), torch.tensor(start, device=self.logits.device)
        cache = forked(self.cache)
        take_off(cache, self.inputs["input_ids"].shape[1] - stop)
        spans = self.prompt.spans.to(first.device).first(stop)
        seen = torch.arange(stop, device=first.device) < first[:, None]
        # Text in it is no text of the pass that follows.
        cut = TokenSpans(
            system=(spans.system | spans.text) & seen,
            image=spans.image & seen,
            text=torch.zeros_like(seen),
            generated=torch.zeros_like(seen),
        )
        columns = {name: values[..., :stop] for name, values in self.inputs.items()}
        inputs = {**self.prompt.inputs, **columns, "attention_mask": cut.real.long()}
        weights = weights_state(self.model.hf_model)
        return Prefix(self.model, self.prompt, Beginning(inputs, cut, cache, weights))

    def _onto(
        self, before: Prefix, start: Sequence[int], patches: Sequence[PatchActivations]
    ) -> Float[Tensor, "row 1 vocabulary"]:
        """Return the last logits of what follows, read for each patch; once without any."""
        found: Any = self.model.hf_model
        batch, copies = len(start), max(1, len(patches))
        target = Target(found, self.model.processor)
        sessions = [
            patch.for_rows(target, slice(number * batch, (number + 1) * batch))
            for number, patch in enumerate(patches)
        ]
        given = _repeated(self._after(before, start), copies)
        cache = before.fork([*range(batch)] * copies)
        with intervening(self.model, self.method), running(found, sessions):
            out = found(**given, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:]

    def _after(self, before: Prefix, start: Sequence[int]) -> dict[str, Tensor]:
        """Return the model's inputs of what follows, padded on the left."""
        rest, ids = min(start), self.inputs["input_ids"]
        first = torch.tensor(start, device=ids.device)[:, None]
        own = torch.arange(rest, ids.shape[1], device=ids.device) >= first
        given = {name: values[..., rest:] for name, values in self.inputs.items()}
        given |= {name: given[name].where(own, 0) for name in BY_TOKEN if name in given}
        mask = torch.cat([before.spans.real.long(), given["attention_mask"]], dim=1)
        return {**given, "attention_mask": mask}


def _repeated(inputs: dict[str, Tensor], copies: int) -> dict[str, Tensor]:
    """Return a batch several times over; before the last two axes there may be one of positions."""
    return {
        name: values.repeat(*[1] * (values.ndim - 2), copies, 1) for name, values in inputs.items()
    }


def _read(model: LensModel, prompt: Prompt, method: MethodLike | None) -> _Read:
    """Return a prompt that was read in one pass."""
    found: Any = model.hf_model
    inputs = {"attention_mask": prompt.spans.real.long(), **prompt.inputs}
    columns = by_token(found, inputs)
    cache = DynamicCache(config=found.config)
    with intervening(model, method), readable(prompt):
        out = found(**inputs | columns, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    return _Read(model, prompt, method, columns, cache, out.logits[:, -1:])
