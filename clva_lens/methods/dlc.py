"""DLC, dynamic logits calibration (arXiv:2506.21509; JiaheChen2002/DLC at ee51afd, its formulas).

At each step a second model, which knows how well texts fit the picture, is asked about the
likeliest tokens v, each written after the last few ones:

    c_v = ½·cos(picture, recent text + v) + ½·cos(picture, v),
    r_v = (c_v − b) / (1 − b),   L = s·(1 − b)²,   l_v ← l_v · exp(L·σ(r_v)),

for the 50 likeliest tokens that are no blank. b is cos(picture, recent text), the mean of its last
8 values once there are more than 3. s = 3 as released for questions, where the recent text begins
with the question; 1 for captions, which are left alone for their first 8 tokens
(``task="caption"``).

**As released**, logits are multiplied, which is not the same for logits that are shifted, and
raises none that are negative. As r is near 0, all 50 get about exp(L/2): most of it is another
temperature.

**Departs from the release**: samples of a batch, and beams, keep their own values of b. Recent
text is at most 8 generated tokens, after the question where that counts. No licence: from the
formulas. One pass for each token, and 100 texts for the second model. s = 0 edits nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from clva_lens.engine.beams import Reordering
from clva_lens.engine.session import Session, required_read_before
from clva_lens.ground.ambient import without_gradients
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.methods.base import Kernel, Method, register_method
from clva_lens.methods.matching import Matcher, Shown, as_matcher
from clva_lens.methods.target import Target
from clva_lens.models.family import Inputs, find_family, find_site
from clva_lens.models.norms import wide
from clva_lens.models.step import Step
from clva_lens.toy.matching import Pictures

CANDIDATES, RECENT, MEAN_OF, AT_LEAST = 50, 8, 8, 3
STRENGTHS = {"question": 3.0, "caption": 1.0}

Logits = Float[Tensor, "batch vocabulary"]


@register_method
@dataclass(frozen=True, kw_only=True)
class DLC(Method):
    """Logits multiplied by how well each token fits the picture.

    Args:
        strength: s, finite and >= 0; 0 edits nothing. None: 3 for questions, 1 for captions.
        task: what is asked for, a "question" or a "caption" (see above).
        matcher: the second model: a ``Matcher``, or "toy" for toy pictures.

    Raises:
        ParameterError: if a parameter is out of range.

    >>> cl.generate(model, prompt, cl.DLC()).texts
    ['no']
    """

    name: ClassVar[str] = "dlc"
    paper: ClassVar[str] = "DLC, arXiv:2506.21509"
    kernel: ClassVar[Kernel] = "none"
    sites: ClassVar[tuple[str, ...]] = ()
    extended: ClassVar[tuple[str, ...]] = ("beam",)
    zero: ClassVar[Mapping[str, Any] | None] = {"strength": 0.0}
    strength: float | int | None = None
    task: Literal["question", "caption"] = "question"
    matcher: Matcher | str = "toy"

    def __post_init__(self) -> None:
        """Check the ranges."""
        as_matcher(self.matcher)
        if self.strength is not None and not (math.isfinite(self.strength) and self.strength >= 0):
            raise ParameterError(
                f"strength must be a finite number >= 0, but is {self.strength}. Pass strength=3."
            )

    def sessions(self, target: Target) -> list[Session]:
        """Return what asks the second model; nothing for s = 0.

        Raises:
            InterventionError: if the model came without its processor.
        """
        strength = STRENGTHS[self.task] if self.strength is None else self.strength
        if strength == 0:
            return []
        image = find_family(target.model).image_token_id(target.model)
        shown = Shown(target.processor, as_matcher(self.matcher), image, "DLC")
        return [_Calibrating(target, shown, strength, self.task == "question")]


class _Calibrating(Session):
    site = "decoder"
    edits_logits = True
    leaves_prefix = True
    prompt_only = True  # a second input's logits are its own

    def __init__(self, target: Target, shown: Shown, strength: float, asked: bool) -> None:
        self.model, self.shown, self.strength, self.asked = target.model, shown, strength, asked
        self._seen: Inputs = {}
        self._handles: list[RemovableHandle] = []
        entry = find_site(self.model, "decoder").passes().entry
        self._reordering = Reordering(entry, self._reorder)
        self._pictures: Pictures | None = None
        self._questions: list[str] = []
        self._ids: Int[Tensor, "batch generated"] | None = None
        self._known: dict[tuple[int, str], float] = {}
        self._owner: Int[Tensor, " batch"] | None = None

    def begin(self) -> None:
        """Watch the pictures that come in, and the beams."""
        self._handles = find_family(self.model).watch(self.model, self._seen)
        self._reordering.begin()

    def end(self) -> None:
        """Let go of the model and the pictures."""
        for handle in self._handles:
            handle.remove()
        self._reordering.end()
        self._seen.clear()
        self._known.clear()
        self._pictures = self._ids = self._owner = None

    def _reorder(self, rows: Int[Tensor, " batch"]) -> None:
        if self._ids is not None and self._owner is not None:
            self._ids, self._owner = (one[rows.to(one.device)] for one in (self._ids, self._owner))

    @without_gradients
    def _read(self, step: Step) -> None:
        """Take note of a pass's tokens, and first of the prompt and its picture."""
        assert step.ids is not None
        if step.number == 0:
            if step.offset > 0:
                before, rows = required_read_before(step)
                pixels = before.inputs["pixel_values"][
                    rows.to(before.inputs["pixel_values"].device)
                ]
                inputs = {"input_ids": step.ids}
                inputs["attention_mask"] = step.spans.real[:, step.offset :]
            else:
                pixels = self._seen.get("pixel_values")
                inputs = {"input_ids": step.ids, "attention_mask": step.spans.real}
            if pixels is None:
                raise InterventionError(
                    "DLC saw no pixels before the prompt was read (the picture's features were "
                    "passed instead), so there is nothing to compare with. Pass pixel_values."
                )
            self._pictures, self._questions = self.shown.pictures(pixels), []
            old = step.prompt_rows - step.offset
            asked = {name: one[:, :old] for name, one in inputs.items()}
            self._questions = self.shown.questions(asked)
            count = len(step.ids)
            self._owner = torch.arange(count) // max(1, count // len(self._pictures))
            self._known.clear()
        new = step.ids[:, max(0, step.prompt_rows - step.offset) :]
        whole = step.number == 0 or step.offset == 0
        known = new if whole or self._ids is None else torch.cat([self._ids, new], dim=1)
        self._ids = known

    def logits(self, step: Step, logits: Logits) -> Logits:
        """Return the logits, those of the likeliest tokens multiplied."""
        self._read(step)
        assert self._ids is not None and self._owner is not None
        own = wide(logits)
        return torch.stack(
            [
                self._calibrated(row, int(owner), ids, self._question(number))
                for number, (row, owner, ids) in enumerate(
                    zip(own, self._owner.tolist(), self._ids.tolist(), strict=True)
                )
            ]
        )

    def _question(self, row: int) -> str:
        """Return what a row was asked; beams of a prompt were asked the same."""
        assert self._owner is not None
        return self._questions[row] if self.asked else ""

    def _calibrated(
        self, own: Float[Tensor, " vocabulary"], picture: int, ids: list[int], question: str
    ) -> Float[Tensor, " vocabulary"]:
        if not self.asked and len(ids) < RECENT:
            return own
        recent = self._recent(ids, question)
        candidates = own.topk(min(CANDIDATES, len(own))).indices.tolist()
        words = {one: self.shown.words([one]) for one in candidates}
        words = {one: word for one, word in words.items() if word}
        if not words:
            return own
        asked = [*(f"{recent} {word}".strip() for word in words.values()), *words.values()]
        alike = self._similar(picture, asked)
        fits = [(one + other) / 2 for one, other in zip(alike, alike[len(words) :], strict=False)]
        base = self._base(picture, ids, question)
        room = max(1 - base, 1e-6)
        rel = torch.tensor([(one - base) / room for one in fits], dtype=own.dtype)
        factor = (self.strength * room**2 * rel.sigmoid()).exp().to(own.device)
        places = torch.tensor(list(words), device=own.device)
        return own.scatter(0, places, own[places] * factor)

    def _recent(self, ids: Sequence[int], question: str) -> str:
        return f"{question} {self.shown.words(ids[-RECENT:])}".strip()

    def _base(self, picture: int, ids: list[int], question: str) -> float:
        """Return b: of the recent text, or the mean of its last values."""
        first = 0 if self.asked else RECENT
        texts = [self._recent(ids[:end], question) for end in range(first, len(ids) + 1)]
        found = self._similar(picture, texts[-MEAN_OF:])
        return sum(found) / len(found) if len(texts) > AT_LEAST else found[-1]

    def _similar(self, picture: int, texts: Sequence[str]) -> list[float]:
        """Return cosines of a picture with texts; what was asked before is known."""
        assert self._pictures is not None
        new = list(dict.fromkeys(one for one in texts if (picture, one) not in self._known))
        if new:
            found = self.shown.matcher.similarity(self._pictures[picture : picture + 1], new)
            pairs = zip(new, found[0].tolist(), strict=True)
            self._known.update({(picture, text): value for text, value in pairs})
        return [self._known[picture, one] for one in texts]
