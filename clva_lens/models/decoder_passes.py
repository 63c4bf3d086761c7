"""Passes of a decoder over one sequence: what a position is, the context says and not the pass.

A pass is a window into its sequence. The prompt may have been read in two pieces, up to the end of
the picture and from there on; tokens may come one by one or several at once (assisted decoding,
which takes some of them back); and a conversation goes on with the text of the next turn. Only a
cut inside a turn's text is refused: methods read that text's last row and edit all of its rows in
later layers of the same pass.
"""

import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import Cache

from clva_lens.ground.axes import TokenSpans
from clva_lens.ground.errors import InterventionError
from clva_lens.models.beginning import read_before
from clva_lens.models.belonging import Owned, hook_after, opening, whose
from clva_lens.models.context import (
    Drafting,
    drafting,
    is_generating,
    known_spans,
    remember,
)
from clva_lens.models.kv_cache import cache_of
from clva_lens.models.passes import TokenPasses, padding_of
from clva_lens.models.step import Step

# Spans are lengthened by this many positions at a time.
ROOM = 256

_NO_TEXT = (
    "a prompt ends with its image (or its prefill is cut into chunks), so there is no text row to "
    "read anchors from. Put the question after the image, and leave prefill_chunk_size unset."
)


class DecoderPasses(TokenPasses):
    """Causal self-attention over a sequence that holds the image tokens."""

    _room: TokenSpans | None = None
    _cache: weakref.ref[Cache] | None = None
    _made: RemovableHandle | None = None
    _owner: Owned | None = None
    _left: frozenset[weakref.ref[Cache]] = frozenset()
    _end = 0

    def hooks(self) -> list[RemovableHandle]:
        """Start watching for the run that opens it; the handles stop it."""
        self._owner, self._left = whose(), frozenset()
        return super().hooks()

    def watch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin with a prompt, go on with a turn of it, or with generated tokens."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            embeds = kwargs.get("inputs_embeds")
            batch, length = (1, None) if embeds is None else embeds.shape[:2]
            ids = self.embedded_ids(batch, length)
        cache = cache_of(kwargs)
        offset = self._position(ids.shape[1], cache)
        follows = self._follows(cache, offset)
        self._end = offset + ids.shape[1]
        if not follows or cache is None or self._cache is None or cache is not self._cache():
            self._turn_to(cache, kwargs.get("use_cache") is not False)
        mask = kwargs.get("attention_mask")
        if offset == 0 and not self.is_rerun(ids, offset, kwargs):
            if self._left:
                self._left = frozenset(one for one in self._left if one() not in (cache, None))
            self._room = None
            self.step = self._first(ids, mask)
            if self.step.number < 0 and not self._is_piece(kwargs):
                raise InterventionError(_NO_TEXT)
        elif offset > 0 and not (follows and ids.shape[1] == 1):
            self.step = self._onto(cache, follows, ids, offset, mask)
        else:
            self.step = self._generated(self.next(ids, offset), ids, offset)

    def end(self) -> None:
        """Leave what the positions are to whoever reads on."""
        self._turn_to(None, makes_one=False)
        super().end()

    def _turn_to(self, cache: Any, makes_one: bool) -> None:
        """Leave what is known of the last cache's positions with it; the passes go on in this one.

        A cache that the model makes in this pass is known when it is over.
        """
        last = None if self._cache is None else self._cache()
        if last is not None and self.step is not None:
            remember(last, self.step.spans)
            self._left |= {weakref.ref(last)}
        self._cache = weakref.ref(cache) if isinstance(cache, Cache) else None
        if self._made is not None:
            self._unhook()
        if cache is None and makes_one:
            with opening(self._owner):
                self._made = hook_after(self.entry, self._take)

    def _take(self, _: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        """Take the cache that the model made in this pass."""
        self._unhook()
        cache = cache_of(out) if isinstance(out, Mapping) else None
        if isinstance(cache, Cache):
            self._cache = weakref.ref(cache)

    def _unhook(self) -> None:
        if self._made is not None:
            self._made.remove()
            self._made = None

    def _follows(self, cache: Any, offset: int) -> bool:
        """Whether a pass goes on with the last one, as far as anybody knows."""
        last = None if self._cache is None else self._cache()
        same = self._cache is None or cache is last or known_spans(cache, offset) is None
        return self.step is not None and same

    def _is_piece(self, kwargs: dict[str, Any]) -> bool:
        """Whether a caller means to read on from what a pass leaves in the cache."""
        kept = kwargs.get("use_cache") is True or cache_of(kwargs) is not None
        return kept and not is_generating()

    def _first(self, ids: Tensor, mask: Any) -> Step:
        """Return the pass that reads a prompt, or all that is before its text."""
        drafts = drafting()
        length = None if drafts is None else drafts.written
        spans = self.begin(ids, ids, mask, length)
        text = spans.text if length is None else spans.text[:, :length]
        return self._prompt_step(ids, spans, text, 0)

    def _prompt_step(self, ids: Tensor, spans: TokenSpans, text: Tensor, offset: int) -> Step:
        """Return the pass that reads a turn's text, the rows in ``text``; its number is 0.

        Where there is no text yet, what is before it; its number is −1.
        """
        visual = spans.visual_index()
        start, stop = int(visual.min()), int(visual.max()) + 1
        some = text.any(dim=1)
        whole = bool(some.all())
        if not whole and bool(some.any()):
            raise InterventionError(_NO_TEXT)
        return Step(
            number=0 if whole else -1,
            offset=offset,
            text_rows=text,
            spans=spans,
            visual=visual,
            causal=True,
            ordered=True,
            ids=ids,
            image_start=start,
            first_text=int(text.any(dim=0).nonzero()[0]) if whole else text.shape[1],
            block=(start, stop) if stop - start == visual.shape[1] else None,
        ).to(ids.device)

    def _onto(self, cache: Any, follows: bool, ids: Tensor, offset: int, mask: Any) -> Step:
        """Return a pass onto a filled cache that is no single token after the last one."""
        drafts = drafting()
        if drafts is not None and not drafts.first:
            return self._generated(self.next(ids, offset), ids, offset)
        known = (
            self.step.spans.first(offset) if follows and self.step else known_spans(cache, offset)
        )
        if known is None or len(known.image) != len(ids) or known.image.shape[1] < offset:
            return self._generated(self.next(ids, offset), ids, offset)  # raises: nobody knows
        self._refuse_onto(known, cache, ids, offset, drafts)
        padding = padding_of(mask, torch.empty(len(ids), self._end))
        real = torch.ones_like(ids, dtype=torch.bool)
        if padding is not None and drafts is None:  # which is of one prompt, and cuts its mask
            real = padding[:, offset:].bool()
        count = ids.shape[1] if drafts is None else min(ids.shape[1], drafts.written)
        text, guessed = real[:, :count], real[:, count:]
        more = (0, ids.shape[1])
        self._room = None
        spans = TokenSpans(
            system=functional.pad(known.system, more),
            image=functional.pad(known.image, more),
            text=torch.cat([known.text, text, torch.zeros_like(guessed)], dim=1),
            generated=torch.cat([known.generated, torch.zeros_like(text), guessed], dim=1),
        )
        self.follow(ids)
        self._left = frozenset(one for one in self._left if one() not in (cache, None))
        step = self._prompt_step(ids, spans, functional.pad(text, (offset, 0)), offset)
        return replace(step, read_before=read_before(cache, len(ids), offset))

    def _refuse_onto(
        self, known: TokenSpans, cache: Any, ids: Tensor, offset: int, drafts: Drafting | None
    ) -> None:
        """Raise InterventionError if a pass onto a filled cache is no turn's whole text."""
        if ids.shape[1] == 1 and any(one() is cache for one in self._left):
            raise InterventionError(
                "a token goes on with a sequence that this run left to read another, whose anchors "
                "and positions it has now. Finish one before the next is begun, or give each its "
                "own cl.intervening() block."
            )
        if (ids == self.image_token_id).any():
            if drafts is not None:
                raise InterventionError(
                    "assisted decoding reads the whole conversation again onto a key-value cache "
                    "that has its beginning. Pass no cache, or no assistant_model and no "
                    "prompt_lookup_num_tokens."
                )
            raise InterventionError(
                "a later turn has a picture of its own, so there would be image tokens of two "
                "kinds. Read the whole conversation in one pass."
            )
        last = known.real.long() * torch.arange(1, offset + 1, device=known.real.device)
        if bool((known.text & (last == last.amax(dim=1, keepdim=True))).any()):
            raise InterventionError(
                f"a pass reads {ids.shape[1]} tokens onto a filled key-value cache that ends "
                "within a question (a prefill cut into chunks), whose rows belong together. Read "
                "all that is after the image in one pass: leave prefill_chunk_size unset."
            )

    def _generated(self, known: Step, ids: Tensor, offset: int) -> Step:
        """Return a pass of generated tokens after one that is known."""
        if known.number < 0:
            raise InterventionError(_NO_TEXT)
        spans, keys = known.spans, offset + ids.shape[1]
        if keys != known.keys:
            spans = self._reaching(spans, keys)
        return known.after(offset, spans, ids)

    def _reaching(self, spans: TokenSpans, keys: int) -> TokenSpans:
        """Return spans of so many keys, the last ones generated: views of ones with more room."""
        if self._room is None or self._room.image.shape[1] < keys:
            self._room = spans.with_room(keys - spans.image.shape[1] + ROOM)
        return self._room.first(keys)

    def _position(self, rows: int, cache: Any) -> int:
        """Return the position of the pass's first row.

        A static cache holds its length on the device. To read it at every token would have the CPU
        wait each time, so single rows onto the cache of the last pass are counted instead.
        """
        if cache is None:
            return 0
        length, last = cache.get_seq_length(), None if self._cache is None else self._cache()
        counted = rows == 1 and self.step is not None and cache is last
        return self._end if counted and isinstance(length, Tensor) else int(length)
