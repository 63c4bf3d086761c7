"""ClearSight, PAI, VisFlow and others from their formulas alone, for the loops of reference.py.

Nothing of clva_lens is used. One sample at a time, the prompt and what was generated in one pass;
``result`` has the positions of image keys and text rows. ``rescore`` returns new scores before the
softmax, [head, query, key]; ``weights`` what patterns are multiplied by after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClearSight:
    """l · c at image keys and at the keys before them, for text rows."""

    enhance: float = 1.15
    suppress: float = 0.95
    half: bool = False
    layers: Sequence[int] = (3, 4, 5)

    def rescore(
        self, scores: Tensor, raw: Tensor, pattern: Tensor, index: int, result: Any, new: list[int]
    ) -> Tensor:
        if index not in self.layers:
            return scores
        heads = range(len(scores))
        if self.half:
            mass = [
                sum(float(pattern[h, row, result.image].sum()) for row in result.text)
                for h in heads
            ]
            ranked = sorted(heads, key=lambda h: -mass[h])
            middle = len(ranked) // 2
            gap = (mass[ranked[middle - 1]] - mass[ranked[middle]]) / len(result.text)
            result.margin = min(result.margin, gap)
            heads = ranked[:middle]
        scores = scores.clone()
        for head in heads:
            for row in result.text + new:
                for key in result.image:
                    scores[head, row, key] += raw[head, row, key] * self.enhance
                    scores[head, row, key] -= raw[head, row, key]
                for key in range(result.image[0]):
                    scores[head, row, key] += raw[head, row, key] * self.suppress
                    scores[head, row, key] -= raw[head, row, key]
        return scores


@dataclass(frozen=True)
class Pai:
    """l + α·|l| at image keys, for the last prompt row and generated ones (or all rows)."""

    alpha: float = 0.2
    layers: Sequence[int] = tuple(range(2, 12))
    prompt: str = "last"

    def rescore(
        self, scores: Tensor, raw: Tensor, pattern: Tensor, index: int, result: Any, new: list[int]
    ) -> Tensor:
        if index not in self.layers:
            return scores
        scores = scores.clone()
        rows = {"last": result.text[-1:], "all": result.text, "none": []}[self.prompt]
        for row in rows + new:
            for key in result.image:
                scores[:, row, key] += self.alpha * raw[:, row, key].abs()
        return scores


@dataclass(frozen=True)
class VisFlow:
    """Salient tokens × k, sinks × δ; system and text keys × (1 − α) in their heads."""

    salient: float = 20.0
    sink: float = 0.5
    system: float = 0.5
    text: float = 0.5
    system_threshold: float = 0.5
    text_threshold: float = 0.5
    tokens: bool = True

    def weights(self, pattern: Tensor, index: int, result: Any, new: list[int]) -> Tensor:
        image, text = result.image, result.text
        factors = torch.ones(len(pattern), pattern.shape[2], dtype=pattern.dtype)
        gaps = [1.0]
        if self.tokens and index >= 1:
            mean = sum(pattern) / len(pattern)
            received = [sum(float(mean[i, j]) for i in image if i != j) for j in image]
            for key, value in zip(image, received, strict=True):
                share = value / max(received)
                gaps += [abs(share - 1 / 2), abs(share - 1 / 20)]
                if share > 1 / 2:
                    factors[:, key] *= self.sink
                elif share > 1 / 20:
                    factors[:, key] *= self.salient
        for head in range(len(pattern)):
            before = sum(float(pattern[head, row, : image[0]].sum()) for row in text) / len(text)
            after = sum(float(pattern[head, row, text].sum()) for row in text) / len(text)
            gaps.append(abs(before - self.system_threshold))
            if before > self.system_threshold:
                factors[head, : image[0]] *= 1 - self.system
            if index < 3:  # 8 of 32 layers are 3 of 12
                gaps.append(abs(after - self.text_threshold))
                if after > self.text_threshold:
                    factors[head, text + new] *= 1 - self.text
        result.margin = min(result.margin, *gaps)
        weights = torch.ones_like(pattern)
        weights[:, text + new] = factors[:, None]
        return weights


@dataclass(frozen=True)
class HeadGuided:
    """l_h + α · the mean over heads of |l| at image keys, for rows that predict a token."""

    alpha: float = 0.5
    layers: Sequence[int] = (2, 3, 4, 5, 6)

    def rescore(
        self, scores: Tensor, raw: Tensor, pattern: Tensor, index: int, result: Any, new: list[int]
    ) -> Tensor:
        if index not in self.layers:
            return scores
        scores = scores.clone()
        for row in result.text[-1:] + new:
            for key in result.image:
                sizes = [abs(float(raw[head, row, key])) for head in range(len(raw))]
                scores[:, row, key] += self.alpha * sum(sizes) / len(sizes)
        return scores


@dataclass(frozen=True)
class Raised:
    """ASCD's first pass: l + p·|l| at image keys in some heads, by layer."""

    heads: dict[int, Sequence[int]]
    positive: float = 0.625

    def rescore(
        self, scores: Tensor, raw: Tensor, pattern: Tensor, index: int, result: Any, new: list[int]
    ) -> Tensor:
        scores = scores.clone()
        for head in self.heads.get(index, ()):
            for row in result.text[-1:] + new:
                for key in result.image:
                    scores[head, row, key] += self.positive * raw[head, row, key].abs()
        return scores


@dataclass(frozen=True)
class Lowered:
    """ASCD's second pass: l − n·|l| at a row's largest scores of the image, a tenth of them."""

    negative: float = 1.0

    def rescore(
        self, scores: Tensor, raw: Tensor, pattern: Tensor, index: int, result: Any, new: list[int]
    ) -> Tensor:
        scores = scores.clone()
        for head in range(len(raw)):
            for row in result.text[-1:] + new:
                ranked = sorted(result.image, key=lambda key: -float(raw[head, row, key]))
                for key in ranked[: max(1, len(ranked) // 10)]:
                    scores[head, row, key] -= self.negative * raw[head, row, key].abs()
        return scores


@dataclass
class LeastSeen:
    """SID's second pass: from a layer on, only the least attended image tokens are seen."""

    kept: int
    layer: int = 2
    chosen: dict[int, list[int]] | None = None

    def rescore(
        self, scores: Tensor, raw: Tensor, pattern: Tensor, index: int, result: Any, new: list[int]
    ) -> Tensor:
        if index == self.layer - 1:
            self.chosen = {}
            last = result.text[-1]
            for row in range(pattern.shape[1]):
                source = row if row in new else last
                mass = {key: float(pattern[:, source, key].mean()) for key in result.image}
                ranked = sorted(mass.values())
                gap = ranked[self.kept] - ranked[self.kept - 1]
                result.margin = min(result.margin, gap)
                self.chosen[row] = sorted(mass, key=lambda key: mass[key])[: self.kept]
        if index < self.layer:
            return scores
        scores = scores.clone()
        assert self.chosen is not None
        for row, kept in self.chosen.items():
            for key in set(result.image) - set(kept):
                scores[:, row, key] = -torch.inf
        return scores


Rescore = ClearSight | Pai | HeadGuided | Raised | Lowered | LeastSeen
