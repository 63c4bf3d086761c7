"""One prompt looked at from all sides, what is notable in sentences, each beside its null."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clva_lens.figures import Drawing
from clva_lens.figures import scan as draw_scan
from clva_lens.ground.ambient import undisturbed
from clva_lens.ground.drawn import SelfDrawn
from clva_lens.ground.errors import ClvaLensError, ModelLoadError, PromptError
from clva_lens.ground.progress import progress_bar
from clva_lens.lens.attention_trace import AttentionTrace
from clva_lens.lens.attribution import direct_logit_attribution
from clva_lens.lens.intervene import refuse_in_trace
from clva_lens.lens.load import LensModel
from clva_lens.lens.logit_lens import logit_lens
from clva_lens.lens.overlay import under_map
from clva_lens.lens.trace import trace_attention
from clva_lens.methods.knockout import KnockOut
from clva_lens.models.prompt import Asked, Prompt, as_prompt
from clva_lens.science.drift import AttentionDrift, attention_drift, correlation
from clva_lens.science.pointing import pointing

PIXELS = "pixel_values"
_DRAWS, _SHUFFLES, _BLOCKS = 3, 200, 4


class Finding(NamedTuple):
    """A sentence, the number in it, and what the number is where there is nothing to find."""

    sentence: str
    value: float
    null: float


@dataclass(frozen=True, eq=False, repr=False)
class Scan(SelfDrawn):
    """What is notable about one prompt: ``findings``, those furthest from their null first.

    ``answer`` is the likeliest first token and ``probability`` its probability; ``blank`` is that
    of the same token where the picture is of one colour, the mean of the processor's.
    ``knock_outs`` are (first layer, last layer, probability without their attention to the image),
    ``drawn`` the least probability in as many draws of as many heads at random.
    ``left_out`` says what this model does not let one look at.
    """

    prompt: Prompt
    answer: str
    probability: float
    blank: float
    trace: AttentionTrace
    drift: AttentionDrift
    knock_outs: tuple[tuple[int, int, float], ...]
    drawn: float
    findings: tuple[Finding, ...]
    left_out: tuple[str, ...]

    def draw(self) -> Drawing:
        """Return one page: heads, the photo where most is looked at, curves, knock-outs, findings.

        Raises:
            PromptError: if it is unknown where on the photo the image tokens lie.
        """
        mass = self.trace.intensity.mean(dim=-1)
        peak = int(mass.argmax())
        image, box, values = under_map(self.prompt, self.trace.saliency()[peak])
        drift = self.drift
        return draw_scan(
            self.trace.intensity.float().cpu().numpy(),
            layers=self.trace.layers,
            photo=image,
            saliency=values,
            box=box,
            peak=self.trace.layers[peak],
            toward_positive=drift.toward_positive.float().cpu().numpy(),
            toward_negative=drift.toward_negative.float().cpu().numpy(),
            knock_outs=self.knock_outs,
            probability=self.probability,
            drawn=self.drawn,
            answer=self.answer,
            sentences=[one.sentence for one in self.findings],
        )

    @property
    def drawable(self) -> bool:
        """Whether it is known where on the photo the image tokens lie."""
        return not isinstance(self.prompt.tokens_at(self.trace.site).pieces, str)

    def __repr__(self) -> str:
        """Return the findings."""
        first = f"Scan: the answer begins with {self.answer!r} (p = {self.probability:.2f})"
        lines = [f"  {one.sentence}" for one in self.findings]
        return "\n".join([first, *lines, *(f"  left out: {one}" for one in self.left_out)])


@undisturbed()
def scan(
    model: Any,
    prompt: Asked,
    *,
    objects: Bool[Tensor, " visual"] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Scan:
    """Return what is notable about one prompt, in sentences with numbers, each beside its null.

    Head classes, saliency, drift, logit lens, attribution and knock-out, at the model's own site;
    answers are measured by the probability of the likeliest first token. The nulls: the same with a
    picture of one colour; with the image tokens of maps shuffled (and layers chosen again); with as
    many heads blind, drawn at random. ``objects`` are the patches of what is asked for
    (``cl.patch_mask``). About twenty passes. A finding on one prompt is about that prompt: many of
    them, with intervals, are ``cl.pointing_game``, ``cl.trace_statistics`` and ``cl.evaluate``.

    ``model``: what ``cl.load`` returned; ``prompt``: a single one, with its pixels; ``seed``: of
    what is shuffled or drawn; ``progress``: whether a bar may be shown.

    Raises:
        PromptError: if the prompt is a batch or has no pixels.
        ModelLoadError: if it is a bare model, without its tokenizer.
        InterventionError: inside a trace.

    >>> scanned = cl.scan(model, prompt, progress=False)
    >>> scanned.answer, scanned.findings[0]._fields
    ('no', ('sentence', 'value', 'null'))
    """
    refuse_in_trace("scan", "")
    if not isinstance(model, LensModel):
        raise ModelLoadError("scan() needs the tokenizer. Pass cl.load((hf_model, processor)).")
    asked = as_prompt(model, prompt)
    if len(asked["input_ids"]) > 1 or PIXELS not in asked:
        raise PromptError(
            "one prompt with its pixels is scanned. Pass model.prompt(image, question), or "
            "prompt.row(index) of a batch."
        )
    asked = asked.row(0)
    with progress_bar("looks", None, wanted=progress) as advance:
        looks = _Looks(model, asked, objects, torch.Generator().manual_seed(seed))
        found, left_out = [], []
        for look in (looks.mass, looks.pointing, looks.drifting, looks.lens, looks.parts):
            try:
                found += look()
            except ClvaLensError as error:
                left_out.append(f"{look.__name__}: {error}")
            advance(1)
        found += looks.blinded()
        advance(1)
    ranked = sorted(found, key=lambda one: -abs(one.value - one.null))
    return Scan(
        asked,
        model.words.decode([looks.token]).strip(),
        looks.probability,
        looks.blank_probability,
        looks.trace,
        looks.drift,
        tuple(looks.knocked),
        looks.drawn,
        tuple(ranked),
        tuple(left_out),
    )


class _Looks:
    """What is read of a prompt, and of the same with a picture of one colour."""

    def __init__(
        self,
        model: LensModel,
        prompt: Prompt,
        objects: Bool[Tensor, " visual"] | None,
        generator: torch.Generator,
    ) -> None:
        self.model, self.prompt, self.generator = model, prompt, generator
        self.objects = objects
        flat = {**prompt.inputs, PIXELS: torch.zeros_like(prompt[PIXELS])}
        self.blank = replace(prompt, inputs=flat)
        self.trace, self.blank_trace = (trace_attention(model, p) for p in (prompt, self.blank))
        assert self.trace.logits is not None and self.blank_trace.logits is not None
        chances = self.trace.logits.float().softmax(dim=-1)
        self.token, self.probability = int(chances.argmax()), float(chances.max())
        blank = self.blank_trace.logits.float().softmax(dim=-1)
        self.blank_probability = float(blank[self.token])
        self.drift = attention_drift(self.trace)
        self.knocked: list[tuple[int, int, float]] = []
        self.drawn = self.probability

    @property
    def word(self) -> str:
        return repr(self.model.words.decode([self.token]).strip())

    def mass(self) -> Iterator[Finding]:
        """How much is looked at the image, where most is."""
        by_layer, blank = (one.intensity.mean(dim=-1) for one in (self.trace, self.blank_trace))
        peak = int(by_layer.argmax())
        value, null = float(by_layer[peak]), float(blank[peak])
        yield Finding(
            f"layer {self.trace.layers[peak]} looks most at the image: {value:.2f} of its "
            f"attention ({null:.2f} where the picture is blank)",
            value,
            null,
        )

    def pointing(self) -> Iterator[Finding]:
        """Where the object is looked at."""
        if self.objects is None:
            return
        maps, mask = self.trace.saliency().float().cpu(), self.objects.cpu()
        shares = pointing(maps, mask).share
        best = int(shares.argmax())
        first, last = _around(shares, best, float(mask.float().mean()))
        value = float(shares[first : last + 1].mean())
        draws = torch.stack([pointing(self._shuffled(maps), mask).share for _ in range(50)])
        null = float(draws.max(dim=1).values.mean())
        yield Finding(
            f"{self._named(first, last)} at the object: {value:.2f} of what falls on the "
            f"image ({null:.2f} in the best layer of shuffled maps)",
            value,
            null,
        )

    def drifting(self) -> Iterator[Finding]:
        """How like the positive anchor's map the last layer's is."""
        maps = self.trace.saliency().float().cpu()
        anchor = self.trace.saliency("sensitive").float().cpu()
        positive = anchor[self.trace.layers.index(self.drift.positive_layer)]
        value = float(self.drift.toward_positive[-1])
        draws = torch.stack(
            [correlation(self._shuffled(maps[-1]), positive).abs() for _ in range(_SHUFFLES)]
        )
        null = float(draws.quantile(0.95))
        yield Finding(
            f"the last layer's map has r = {value:.2f} with the anchor of layer "
            f"{self.drift.positive_layer} (95 % of shuffled maps: within ±{null:.2f})",
            abs(value),
            null,
        )

    def lens(self) -> Iterator[Finding]:
        """From which layer on the answer is the likeliest token."""
        since = [self._decided(prompt) for prompt in (self.prompt, self.blank)]
        depth = self.model.hf_model.config.get_text_config().num_hidden_layers
        said = [f"from layer {one} on" if one < depth else "never" for one in since]
        yield Finding(
            f"{self.word} is the likeliest next token {said[0]} in the logit lens ({said[1]} where "
            "the picture is blank)",
            1 - since[0] / depth,
            1 - since[1] / depth,
        )

    def _decided(self, prompt: Prompt) -> int:
        read = logit_lens(self.model, prompt, span="last")
        right = (read.top[..., -1, 0] == self.token).tolist()
        wrong = [layer for layer, one in zip(read.layers, right, strict=True) if not one]
        return wrong[-1] + 1 if wrong else read.layers[0]

    def parts(self) -> Iterator[Finding]:
        """What the image tokens write into the answer's logit, of all that heads do."""
        made = [
            direct_logit_attribution(self.model, prompt, self.token)
            for prompt in (self.prompt, self.blank)
        ]
        image = [float(one.image.sum()) for one in made]
        size = float(made[0].heads.abs().sum())
        yield Finding(
            f"attention to the image adds {image[0]:+.2f} to the logit of {self.word} "
            f"({image[1]:+.2f} where the picture is blank)",
            image[0] / size,
            image[1] / size,
        )

    def blinded(self) -> Iterator[Finding]:
        """What the answer loses where layers, or the sensitive heads, do not see the image."""
        layers, heads = self.trace.layers, self.trace.intensity.shape[-1]
        blocks = torch.tensor(layers).tensor_split(min(_BLOCKS, len(layers)))
        self.drawn = min(self._drawn(len(blocks[0]) * heads, len(blocks)))
        for block in blocks:
            left = self._without(KnockOut(layers=block.tolist()))
            self.knocked.append((int(block[0]), int(block[-1]), left))
        first, last, left = min(self.knocked, key=lambda one: one[2])
        yield self._cost(f"hiding the image from layers {first}–{last}", left, self.drawn)
        sensitive = self.trace.heads().sensitive.cpu()
        chosen = [(layers[row], head) for row, head in sensitive.nonzero().tolist()]
        left = self._without(KnockOut(heads=chosen))
        what = f"hiding it from the {len(chosen)} sensitive heads alone"
        draws = self._drawn(len(chosen), _DRAWS)
        yield self._cost(what, left, sum(draws) / len(draws))

    def _cost(self, what: str, left: float, null: float) -> Finding:
        lost, other = self.probability - left, self.probability - null
        return Finding(
            f"{what} costs {self.word} {100 * lost:.0f} points of probability "
            f"({100 * other:.0f} with as many heads drawn at random)",
            lost,
            other,
        )

    def _drawn(self, count: int, draws: int) -> list[float]:
        """Return the probabilities with so many heads blind, drawn at random."""
        layers, heads = self.trace.layers, self.trace.intensity.shape[-1]
        found = []
        for _ in range(draws):
            drawn = torch.randperm(len(layers) * heads, generator=self.generator)[:count]
            pairs = [(layers[one // heads], one % heads) for one in drawn.tolist()]
            found.append(self._without(KnockOut(heads=pairs)))
        return found

    def _without(self, method: KnockOut) -> float:
        logits = trace_attention(
            self.model, self.prompt, method, layers=self.trace.layers[:1]
        ).logits
        assert logits is not None
        return float(logits.float().softmax(dim=-1)[self.token])

    def _shuffled(self, maps: Float[Tensor, "*axes visual"]) -> Float[Tensor, "*axes visual"]:
        return maps[..., torch.randperm(maps.shape[-1], generator=self.generator)]

    def _named(self, first: int, last: int) -> str:
        ends: Sequence[Any] = self.trace.layers[first], self.trace.layers[last]
        return f"layer {ends[0]} looks" if first == last else f"layers {ends[0]}–{ends[1]} look"


def _around(shares: Float[Tensor, " layer"], best: int, chance: float) -> tuple[int, int]:
    """Return the first and last of the layers around the best that are half as far from chance."""
    enough = (float(shares[best]) + chance) / 2
    first = last = best
    while first > 0 and float(shares[first - 1]) >= enough:
        first -= 1
    while last + 1 < len(shares) and float(shares[last + 1]) >= enough:
        last += 1
    return first, last
