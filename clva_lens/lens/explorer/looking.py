"""What is read of one prompt under one method: maps by word, chances, blindness, curves, lens."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clva_lens.ground.errors import ClvaLensError, InterventionError
from clva_lens.lens.attention_trace import AttentionTrace
from clva_lens.lens.decoding import Greedy
from clva_lens.lens.explorer.forcing import Read, answer_of, read_given
from clva_lens.lens.intervene import intervening
from clva_lens.lens.load import LensModel
from clva_lens.lens.logit_lens import logit_lens
from clva_lens.lens.margins import yes_margins
from clva_lens.lens.trace import trace_attention
from clva_lens.lens.words import Word, by_word, words_of
from clva_lens.methods.base import Method, compose
from clva_lens.methods.knockout import KnockOut
from clva_lens.models.answer_tokens import answer_tokens
from clva_lens.models.prompt import Prompt
from clva_lens.science.anchors import VisualAnchors
from clva_lens.science.drift import CURVES, attention_drift

Numbers = Float[np.ndarray, "..."]


class Look(NamedTuple):
    """One prompt under one method; the axes are those of ``Explored``, without ``look``."""

    answer: str
    maps: Float[Tensor, "layer head word visual"]
    mass: Numbers
    probabilities: Numbers
    margins: Numbers
    knocked: Numbers
    sensitive: Bool[np.ndarray, "layer head"]
    insensitive: Bool[np.ndarray, "layer head"]
    curves: Numbers
    lens: Numbers
    lens_words: tuple[str, ...]
    lens_layers: tuple[int, ...]
    anchors: tuple[int, int]
    marked: VisualAnchors | None


class Looker:
    """Reads the words that the model alone answers to a prompt, under any method."""

    def __init__(
        self, model: LensModel, prompt: Prompt, decoding: Greedy, advance: Callable[[int], None]
    ) -> None:
        """Have the model answer."""
        self.model, self.prompt, self.decoding, self.advance = model, prompt, decoding, advance
        self.tokens = answer_tokens(model.words)
        self.left_out: list[str] = []
        self.text, ids = answer_of(model, prompt, None, decoding)
        self.ids = ids if len(ids) else torch.tensor([_end(model)])
        advance(1)
        self.words = words_of(model.words, self.ids.tolist()) or [
            Word(model.words.decode([one]), (place,)) for place, one in enumerate(self.ids.tolist())
        ]

    def look(self, method: Method | None, *, knock_outs: bool) -> Look:
        """Return what is read under one method.

        Raises:
            ParameterError: if the method does not fit, or searches for its answer.
        """
        model, prompt = self.model, self.prompt
        read = read_given(model, prompt, method, self.ids, self.tokens)
        self.advance(1)
        with intervening(model, method) as run:
            trace = trace_attention(model, prompt)
        self.advance(1)
        answer = self.text if method is None else answer_of(model, prompt, method, self.decoding)[0]
        self.advance(1)
        blind = self._blind(method, trace)
        heads, drift = trace.heads(), attention_drift(trace)
        maps, mass = self._maps(read, trace)
        chances = [self._chances(one) for one in (read, blind)]
        lens, words, layers = self._lens(method)
        return Look(
            answer=answer,
            maps=maps,
            mass=_plain(mass),
            probabilities=np.stack([one[0] for one in chances]),
            margins=np.stack([one[1] for one in chances]),
            knocked=self._knocked(method, trace, knock_outs),
            sensitive=heads.sensitive.cpu().numpy(),
            insensitive=heads.insensitive.cpu().numpy(),
            curves=np.stack([_plain(getattr(drift, name)) for name in CURVES]),
            lens=lens,
            lens_words=words,
            lens_layers=layers,
            anchors=(drift.positive_layer, drift.negative_layer),
            marked=_anchors(run),
        )

    def _maps(
        self, read: Read, trace: AttentionTrace
    ) -> tuple[Float[Tensor, "layer head word visual"], Float[Tensor, "layer head word"]]:
        """Return the maps of the words, and their masses on the image."""
        if trace.site != "decoder":  # it reads the picture before there is a word
            return trace.maps[:, :, None], trace.intensity[..., None]
        maps = by_word(read.maps, self.words)
        return maps, maps.sum(dim=-1)

    def _chances(self, read: Read | None) -> tuple[Numbers, Numbers]:
        """Return each word's probability, and the margin where it begins."""
        if read is None:
            unknown = np.full(len(self.words), np.nan, np.float32)
            return unknown, unknown
        chances = [read.chances[list(word.tokens)].prod() for word in self.words]
        first = [word.tokens[0] for word in self.words]
        return _plain(torch.stack(chances)), _plain(read.margins[first])

    def _blind(self, method: Method | None, trace: AttentionTrace) -> Read | None:
        """Return how the words are read without any attention to the image."""
        try:
            blind = compose(method, KnockOut(layers=trace.layers))
            return read_given(self.model, self.prompt, blind, self.ids, self.tokens)
        except ClvaLensError as error:
            self.left_out.append(f"knock-out: {error}")
            return None
        finally:
            self.advance(1)

    def _knocked(self, method: Method | None, trace: AttentionTrace, wanted: bool) -> Numbers:
        """Return the margin where one layer does not look at the image, for each layer."""
        found = np.full(len(trace.layers), np.nan, np.float32)
        if not wanted or not all(self.tokens):
            return found
        for place, layer in enumerate(trace.layers):
            without = compose(method, KnockOut(layers=(layer,)))
            try:
                logits = trace_attention(
                    self.model, self.prompt, without, layers=trace.layers[:1]
                ).logits
            except ClvaLensError as error:
                self.left_out.append(f"knock-out by layer: {error}")
                return found
            assert logits is not None
            (margin,) = yes_margins(logits[None].float(), self.tokens)
            found[place] = np.nan if margin is None else margin
            self.advance(1)
        return found

    def _lens(self, method: Method | None) -> tuple[Numbers, tuple[str, ...], tuple[int, ...]]:
        """Return what each layer of the decoder would answer first."""
        try:
            read = logit_lens(self.model, self.prompt, span="last", method=method, k=1)
        except ClvaLensError as error:
            self.left_out.append(f"logit lens: {error}")
            return np.zeros((0, 2), np.float32), (), ()
        chance = read.probabilities[:, -1, 0]
        margin = torch.full_like(chance, torch.nan) if read.margin is None else read.margin[:, -1]
        words = tuple(row[-1].strip() for row in read.words())
        return _plain(torch.stack([margin, chance], dim=-1)), words, read.layers


def _end(model: LensModel) -> int:
    """Return a token that ends an answer."""
    end: Any = model.words.eos_token_id
    return 0 if end is None else int(end)


def _anchors(run: Any) -> VisualAnchors | None:
    try:
        return run.anchors
    except InterventionError:  # it is no CLVA
        return None


def _plain(tensor: Tensor) -> Numbers:
    return tensor.detach().float().cpu().numpy()
