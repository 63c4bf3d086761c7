"""Direct logit attribution: what each head, MLP and image token adds to an answer's logit."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from clva_lens.engine.run import open_sessions, running
from clva_lens.engine.session import Session
from clva_lens.figures import Drawing, head_attribution, patch_maps
from clva_lens.figures.base import evenly
from clva_lens.figures.patch_maps import MOST_MAPS
from clva_lens.ground.ambient import undisturbed
from clva_lens.ground.drawn import SelfDrawn
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.ground.parameters import is_integer
from clva_lens.lens.intervene import intervening, join_trace, refuse_in_trace
from clva_lens.lens.logit_parts import LogitParts
from clva_lens.lens.observers import Observer
from clva_lens.methods.base import MethodLike
from clva_lens.methods.target import shape_of
from clva_lens.models.answer_tokens import answer_tokens
from clva_lens.models.family import find_family, transformers_model
from clva_lens.models.prompt import (
    Asked,
    Prompt,
    VisualTokens,
    as_prompt,
    read_tokens,
    readable,
)
from clva_lens.models.readout import CacheModel, token_ids
from clva_lens.science.heads import HeadClasses


@dataclass(frozen=True, eq=False, repr=False)
class LogitAttribution(SelfDrawn):
    """What each part of the model adds to a logit difference at the last position, in logits.

    The final norm's scale is that of the pass, frozen, so that parts add up, and so are those of
    norms between a block and the stream, and what a soft cap takes off a logit. ``total`` is the
    sum of ``embedding`` (what enters the first layer), ``heads``, ``mixers`` (layers without
    softmax attention), ``mlps``, ``edits`` and ``bias`` (all biases of attention, norms and
    unembedding), and is the model's own ``difference``. ``edits`` is
    what the stream after each layer holds beyond the stream before it, its heads and its MLP: what
    a patch or an edit by hand put there, 0 but for rounding without one. ``image`` and
    ``elsewhere`` divide each head's part among the image tokens and all other keys; a head whose
    output a method replaced (an ablation) has all of its part elsewhere. A part that another one
    undoes later still counts: this is what is written, not what is needed.

    ``layers`` are those of ``heads``, which all but hybrid decoders have; the axis depth is of all.
    ``label`` says which logits; ``classes`` are the heads' (Eqs. 2–3, arXiv:2603.25088v1);
    ``visual`` are the image tokens; ``prompt`` is None where a trace was read.
    """

    embedding: Float[Tensor, "*batch"]
    heads: Float[Tensor, "*batch layer head"]
    mixers: Float[Tensor, "*batch depth"]
    mlps: Float[Tensor, "*batch depth"]
    edits: Float[Tensor, "*batch depth"]
    bias: Float[Tensor, "*batch"]
    image: Float[Tensor, "*batch layer head visual"]
    elsewhere: Float[Tensor, "*batch layer head"]
    difference: Float[Tensor, "*batch"]
    layers: tuple[int, ...]
    classes: HeadClasses
    label: str
    batched: bool
    visual: VisualTokens
    prompt: Prompt | None

    @property
    def total(self) -> Float[Tensor, "*batch"]:
        """The sum of all parts, in logits."""
        written = self.heads.sum(dim=(-2, -1)) + self.mlps.sum(dim=-1) + self.edits.sum(dim=-1)
        return self.embedding + written + self.mixers.sum(dim=-1) + self.bias

    @property
    def image_tokens(self) -> Float[Tensor, "*batch layer visual"]:
        """What each layer's heads together bring from each image token, in logits."""
        return self.image.sum(dim=-2)

    def on_grid(
        self, part: str | None = None, picture: int | None = None
    ) -> Float[Tensor, "*batch layer row column"]:
        """Return ``image_tokens`` as maps (``Prompt.on_grid``).

        Raises:
            PromptError: if the image tokens lie on no grid.
        """
        return self.visual.on_grid(self.image_tokens, part, picture)

    def draw(self) -> Drawing:
        """Return the heat map of layers and heads, with the head classes marked.

        Raises:
            ParameterError: if this is a batch.
        """
        self._single()
        marked = [one.cpu().numpy() for one in (self.classes.sensitive, self.classes.insensitive)]
        values = self.heads.cpu().numpy()
        return head_attribution(values, *marked, layers=self.layers, label=self.label)

    def draw_image(self) -> Drawing:
        """Return the image tokens' parts on the patch grid, for up to 12 evenly spaced layers.

        Raises:
            ParameterError: if this is a batch.
            PromptError: if the image tokens lie on no grid.
        """
        self._single()
        maps = self.on_grid()
        chosen = evenly(len(maps), MOST_MAPS)
        label = f"part of {self.label} (logits)"
        numbered = [self.layers[row] for row in chosen]
        return patch_maps(maps[chosen].cpu().numpy(), layers=numbered, label=label)

    def _single(self) -> None:
        if self.batched:
            raise ParameterError(
                "this attribution is of a batch. Run the prompts one at a time to draw them."
            )

    @property
    def drawable(self) -> bool:
        """Whether this is of a single prompt."""
        return not self.batched

    def __repr__(self) -> str:
        """Return the sums of the kinds of parts, averaged over samples."""

        def mean(values: Tensor) -> str:
            return f"{float(values.mean()):+.2f}"

        other = len(self.layers) < self.mixers.shape[-1]
        mixers = f"mixers {mean(self.mixers.sum(dim=-1))}, " if other else ""
        return (
            f"LogitAttribution({self.label} {mean(self.difference)} = embedding "
            f"{mean(self.embedding)}, heads {mean(self.heads.sum(dim=(-2, -1)))} (of it image "
            f"{mean(self.image.sum(dim=(-3, -2, -1)))}), {mixers}MLPs "
            f"{mean(self.mlps.sum(dim=-1))}, edits {mean(self.edits.sum(dim=-1))}, bias "
            f"{mean(self.bias)})"
        )


class Attributing:
    """The attribution of a run that is traced; ``parts`` is there once the prompt was read."""

    def __init__(self, reading: "_Reading") -> None:
        """Keep what the run is read by."""
        self._reading = reading

    @property
    def parts(self) -> LogitAttribution:
        """What each part added to the logits, with a batch axis if the run was a batch.

        Raises:
            InterventionError: if no prompt was read yet.
        """
        return self._reading.attribution()


@overload
def direct_logit_attribution(
    model: Any,
    prompt: Asked,
    tokens: str | int | Sequence[str | int] = ...,
    method: MethodLike | None = ...,
) -> LogitAttribution: ...


@overload
def direct_logit_attribution(*, tokens: str | int | Sequence[str | int] = ...) -> Attributing: ...


def direct_logit_attribution(
    model: Any = None,
    prompt: Asked | None = None,
    tokens: str | int | Sequence[str | int] = ("yes", "no"),
    method: MethodLike | None = None,
) -> LogitAttribution | Attributing:
    """Return what each head, MLP and image token adds to a logit at the prompt's last position.

    ``tokens`` is a token (a text that is one, or an id), or two: the first's logit minus the
    second's. ("yes", "no") takes the likeliest spelling of each, as margins do. Interventions
    that are open hold, and ``method`` beside them. One forward pass; only the last row of a
    layer's pattern is formed, and reduced to its parts at once.

    In an nnsight trace, leave ``model`` and ``prompt`` out: the trace's own run is read, under the
    methods opened before, and what is returned has the attribution as ``parts`` after the block.
    Of a ``model.generate`` the prompt's pass is read. A bare nnsight handle has no tokenizer, so
    ``tokens`` are ids there.

    Raises:
        ParameterError: if there are not one or two tokens, or one of them is none.
        ModelLoadError: if the logits are no sum over heads and MLPs, saying why.
        InterventionError: if the attention kernel cannot be intercepted, an open method edits the
            logits, the prompt is padded on the right, or the arguments are those of the other
            form: none in a trace, both outside.

    >>> parts = cl.direct_logit_attribution(model, prompt)
    >>> parts.heads.shape, parts.image_tokens.shape
    (torch.Size([12, 8]), torch.Size([12, 64]))
    """
    if model is None and prompt is None and method is None:

        def make(root: Any, found: PreTrainedModel) -> tuple[list[Session], Attributing]:
            reading = _Reading(found, getattr(root, "words", None), tokens)
            return reading.sessions, Attributing(reading)

        outside = "cl.direct_logit_attribution(model, prompt)"
        return join_trace("direct_logit_attribution", outside, make)
    refuse_in_trace(
        "direct_logit_attribution(model, prompt)",
        ", or direct_logit_attribution() in it, after cl.intervene(method)",
    )
    if model is None or prompt is None:
        raise InterventionError(
            "direct_logit_attribution was called outside a trace without a model and a prompt. "
            "Pass both."
        )
    found, prompt = transformers_model(model), as_prompt(model, prompt)
    with undisturbed(), intervening(model, method):
        reading = _Reading(found, getattr(model, "words", None), tokens)
        with running(found, reading.sessions), readable(prompt):
            found(**prompt.inputs, logits_to_keep=1, use_cache=False)
        return reading.attribution(prompt)


class _Reading:
    """The sessions that read a run which is open with its methods, and what they found."""

    def __init__(self, model: PreTrainedModel, words: Any, tokens: Any) -> None:
        for session in open_sessions(model):
            if session.edits_logits and not isinstance(session, LogitParts):
                raise InterventionError(
                    "an open method replaces the model's logits (a contrast), so they are no sum "
                    "over its parts. Leave that method out."
                )
        readout = find_family(model).activations(model).readout
        standing = CacheModel(readout, words, model.config.get_text_config(), "")
        groups, self.label = chosen_tokens(standing, words, tokens)
        self.model = model
        self.parts = LogitParts(standing, readout, groups)
        self.observer = Observer("all", shape_of(model, "decoder"))
        self.sessions: list[Session] = [self.parts, self.observer]

    def attribution(self, prompt: Prompt | None = None) -> LogitAttribution:
        parts, step = self.parts.parts(), self.parts.step
        assert step is not None
        batched = len(parts["difference"]) > 1 if prompt is None else prompt.batched
        return LogitAttribution(
            **{name: (one if batched else one[0]).float() for name, one in parts.items()},
            layers=self.parts.layers,
            classes=self.observer.trace(batched).heads(),
            label=self.label,
            batched=batched,
            visual=read_tokens(self.model, step.spans, prompt),
            prompt=prompt,
        )


def chosen_tokens(standing: CacheModel, words: Any, tokens: Any) -> tuple[list[list[int]], str]:
    """Return the ids of one or two tokens, in each of their spellings, and what is made of them.

    Raises:
        ParameterError: if there are not one or two tokens, or one of them is none.
    """
    plain = tokens.tolist() if hasattr(tokens, "tolist") else tokens
    several = isinstance(plain, Iterable) and not isinstance(plain, str | bytes)
    wanted: list[Any] = list(plain) if several else [plain]
    if len(wanted) not in (1, 2) or len(set(map(repr, wanted))) < len(wanted):
        raise ParameterError(
            f"tokens are {wanted}, but 1 or 2 are needed, each once. Pass ('yes', 'no')."
        )
    if not all(isinstance(one, str) or is_integer(one) for one in wanted):
        raise ParameterError(
            f"tokens are {wanted}, but each is a text or the id of a token. Pass ('yes', 'no')."
        )
    label = " − ".join(f"logit({one})" for one in wanted)
    if wanted == ["yes", "no"] and words is not None:
        spelled = answer_tokens(words)
        if not all(spelled):
            raise ParameterError(
                "the tokenizer has no single token for yes or no. Pass two token ids as tokens=."
            )
        return list(spelled), label
    return [[one] for one in token_ids(standing.cfg.d_vocab, words, wanted)], label
