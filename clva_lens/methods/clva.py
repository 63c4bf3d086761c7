"""CLVA, Cross-Layer Visual Anchors: Eqs. 1–11 of arXiv:2603.25088v1.

Two layers are read: the *positive anchor*, where the sensitive heads of a middle layer look, and
the *negative anchor*, where the insensitive heads of the first layer look. In the layers after
them, text rows look at the image tokens that stand out in the positive map with (1 + α) times the
weight, and at those that stand out in the negative map with (1 − β) times, renormalised.

In a Q-Former (Eq. 14) the same is done to the cross-attention of the learned queries to the
picture: layers 0 and 4 are read and 6, 8 and 10 edited, the map is the mean over the queries, and
the CLS token is not an image token (with it, Φ would be 1 for every head). It runs once a picture,
so nothing happens at decoding steps.

**Departs from the paper** only where it is silent: see the parameters of ``CLVA``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clva_lens.engine.bias import Bias, at
from clva_lens.engine.row_reading import read_generated_rows, read_prompt_rows
from clva_lens.engine.session import AttentionCall, Session
from clva_lens.ground.ambient import without_gradients
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.methods.base import (
    Kernel,
    Method,
    Rows,
    check_layers,
    check_order,
    check_rows,
    register_method,
    row_bias,
    single_row_bias,
)
from clva_lens.methods.target import Shape, Target
from clva_lens.models.step import Step
from clva_lens.science.anchors import (
    VisualAnchors,
    anchor_mask,
    check_strengths,
    head_shares,
    mean_of_heads,
    reanchor_log_weights,
    saliency_map,
)
from clva_lens.science.heads import (
    EmptyPolicy,
    HeadClasses,
    SomeHeads,
    check_rule,
    classify_heads,
    named_heads,
)


@register_method
@dataclass(frozen=True, kw_only=True)
class CLVA(Method):
    """Cross-Layer Visual Anchors; layer indices are 0-based.

    Args:
        alpha: α of Eq. 10, the gain on positively anchored tokens.
        beta: β of Eq. 10, the loss on negatively anchored tokens.
        tau: τ of Eq. 9, in standard deviations of the map over the V image tokens; below
            √(V − 1), which no z-score exceeds. A mask that is empty all the same is a no-op.
        head_threshold: λ of Eqs. 2–3, in standard deviations over a layer's heads.
        negative_layer: the layer of the negative anchor; 0 is "the first layer", that is, the first
            that has attention.
        positive_layer: the layer of the positive anchor; None is L/2 − 2, or the nearest that has
            attention (the earlier of two; not the last, after which nothing is edited).
            ``run.anchors`` says which layers these were.
        layers: the edited layers; None is every layer after both anchors.
        rows: edited prompt rows: all text after the image, or the "last"; generated rows always.
        refresh: anchors are read from every new row ("step"), or once, at the "prompt".
        empty: what an empty head set becomes, see ``classify_heads``.
        heads: the heads of both anchors, given explicitly instead of by Eqs. 2–3: classes with a
            row for each layer of the stack, or for each that the site has, as a trace's
            ``heads()``; or pairs (layer, head), {layer: [heads]} or a mask, of which each anchor
            takes those of its layer.
        site: where; None is the family's choice: the cross-attention of a Q-Former (Eq. 14) if the
            model has one, else the "decoder".

    Raises:
        ParameterError: if a parameter is out of range, or a weight 1 ± … could be negative.

    >>> cl.generate(model, prompt, cl.CLVA(alpha=14, beta=0.9, tau=2)).texts
    ['no']
    """

    name: ClassVar[str] = "clva"
    paper: ClassVar[str] = "Cross-Layer Visual Anchors, arXiv:2603.25088"
    kernel: ClassVar[Kernel] = "fused + rows"
    zero: ClassVar[Mapping[str, Any] | None] = {"alpha": 0.0, "beta": 0.0}
    alpha: float | int = 14.0
    beta: float | int = 0.9
    tau: float | int = 2.0
    head_threshold: float | int = 1.0
    negative_layer: int = 0
    positive_layer: int | None = None
    layers: Sequence[int] | None = None
    rows: Rows = "text"
    refresh: Literal["step", "prompt"] = "step"
    empty: EmptyPolicy = "tail"
    heads: HeadClasses | SomeHeads | None = None
    site: str | None = None

    def __post_init__(self) -> None:
        """Check everything that can be checked without a model."""
        check_strengths(self.alpha, self.beta)
        check_rows(self.rows)
        if not (math.isfinite(self.tau) and self.tau >= 0):
            raise ParameterError(
                f"tau must be a finite number >= 0, but is {self.tau}. Pass tau=2.0."
            )
        if self.refresh not in ("step", "prompt"):
            raise ParameterError(
                f"refresh must be 'step' or 'prompt', but is {self.refresh!r}. Pass refresh='step'."
            )
        if not (self.heads is None or isinstance(self.heads, HeadClasses)):
            object.__setattr__(self, "heads", named_heads(self.heads))
        check_rule(self.head_threshold, self.empty)

    def sessions(self, target: Target) -> list[Session]:
        """Return one session, with the site and every layer resolved."""
        shape = target.at(self.site)
        check_order(self.rows, shape)
        positive = self.positive_layer
        if positive is None:
            positive = shape.positive_layer
        negative = shape.first(self.negative_layer)
        check_layers("positive_layer", (positive,), shape)
        check_layers("negative_layer", (negative,), shape)
        allowed = shape.after(max(positive, negative))
        edited = allowed if self.layers is None else check_layers("layers", self.layers, shape)
        if not set(edited) <= set(allowed):
            raise ParameterError(
                f"layers names layer {edited[0]}, but the anchors are read at layers "
                f"{negative} and {positive}, so only later layers can be edited. "
                f"Pass layers from {max(positive, negative) + 1} on, or earlier anchor layers."
            )
        heads = self.heads
        if not (heads is None or isinstance(heads, HeadClasses)):
            mask = shape.head_mask(heads)
            size = {"layers": len(shape.layers), "heads": shape.heads}
            heads = HeadClasses.from_indices(mask, mask, **size)
        if heads is not None:
            self._check_heads(heads, shape, (positive, negative))
        return [ClvaSession(self, shape, (positive, negative), edited, heads)]

    def _check_heads(self, heads: HeadClasses, shape: Shape, anchors: tuple[int, int]) -> None:
        """Check that explicit heads are for this site, and that both anchors have some."""
        found = tuple(heads.sensitive.shape[-2:])
        if found not in ((shape.depth, shape.heads), (len(shape.layers), shape.heads)):
            raise ParameterError(
                f"heads is for {found} (layers, heads), but the model's {shape.site} has "
                f"{(shape.depth, shape.heads)}. Make it with HeadClasses.from_indices(..., "
                f"layers={shape.depth}, heads={shape.heads})."
            )
        for word, classes, layer in (
            ("sensitive", heads.sensitive, anchors[0]),
            ("insensitive", heads.insensitive, anchors[1]),
        ):
            if not classes[..., shape.row(layer, found[0]), :].any():
                raise ParameterError(
                    f"heads has no {word} head at layer {layer}, where CLVA reads an anchor from "
                    "them. Name one, or choose the anchor's layer."
                )


class _LayerReading(NamedTuple):
    """What one anchor layer gave: its heads' intensity, and where the prompt's last row looks."""

    intensity: Float[Tensor, "batch head"]
    map: Float[Tensor, "batch head visual"]


class ClvaSession(Session):
    """One run of CLVA: the anchors of the prompt, and those of the rows generated since."""

    leaves_prefix = True
    compiles = True

    def __init__(
        self,
        method: CLVA,
        shape: Shape,
        anchors: tuple[int, int],
        edited: tuple[int, ...],
        heads: HeadClasses | None = None,
    ) -> None:
        """Keep the resolved layers, positive and negative; the anchors come with the first pass."""
        self.method, self.shape, self.site = method, shape, shape.site
        self.positive_layer, self.negative_layer = anchors
        self.heads = heads
        self.steady = () if method.alpha == method.beta == 0 else edited
        self.layers = (self.negative_layer, self.positive_layer, *self.steady)
        self._read: dict[int, _LayerReading] = {}
        self._generated: dict[int, Float[Tensor, "batch row head visual"]] = {}
        self._home = torch.device("cpu")  # both anchors', that of the layer that is read first
        self._bias: tuple[Step, Bias] | None = None
        self._prompt_weights: Float[Tensor, "batch visual"] | None = None
        self._shares: Float[Tensor, "anchor batch head"] | None = None
        self._found: HeadClasses | None = None

    @without_gradients  # masks are steps, whose slope is 0
    def attention(self, call: AttentionCall) -> Bias | None:
        """Read the anchor layers; return the bias of Eq. 10 at the edited ones."""
        if call.layer in (self.negative_layer, self.positive_layer):
            self._read_layer(call)
        if call.layer not in self.steady:
            return None
        if self._bias is None or self._bias[0] is not call.step:
            self._bias = (call.step, self._make_bias(call))
        return self._bias[1]

    def compiled_step(self, call: AttentionCall, seen: dict[Any, Any]) -> Bias | None:
        """Return the bias of the only row, from its own anchors or the prompt's."""
        anchors, weights = (self.positive_layer, self.negative_layer), self._prompt_weights
        if self.method.refresh == "step" and call.layer in anchors:
            seen[call.layer] = read_generated_rows(call).transpose(1, 2)
        if call.layer in self.steady and "bias" not in seen:
            if self.method.refresh == "step":
                weights = self._log_weights(*(seen[layer] for layer in anchors))[:, 0]
            assert weights is not None  # the prompt was read
            seen["bias"] = single_row_bias(call, weights)
        return seen["bias"] if call.layer in self.steady else None

    def _check_sight(self, call: AttentionCall) -> None:
        """Refuse an anchor layer whose window leaves image tokens out."""
        if call.sees_image:
            return
        word = "negative" if call.layer == self.negative_layer else "positive"
        remedy = f"Pass {word}_layer= a layer with full attention"
        if call.step.number:
            remedy += ", or refresh='prompt'"
        raise InterventionError(
            f"layer {call.layer} looks {call.window} positions back, so its last row does not see "
            f"the whole image, and no {word} anchor can be read there. {remedy} (clva-lens "
            "check-model lists the windows)."
        )

    def _read_layer(self, call: AttentionCall) -> None:
        step = call.step
        reads_new = self.method.refresh == "step" and call.new_rows > 0
        if call.window is not None and (step.number == 0 or reads_new):
            self._check_sight(call)
        if step.number == 0:
            if call.layer == self.negative_layer:
                self._check_tau(step.visual.shape[1])
            self._shares = self._found = None
            rows = read_prompt_rows(call)
            if not self._read:
                self._home = rows.map.device
            image, found = at(rows.image, self._home), at(rows.map, self._home)
            self._read[call.layer] = _LayerReading(image, found)
        if call.layer not in self._read:
            raise InterventionError(
                "CLVA joined a run whose prompt had been read already, so it has no anchors. Start "
                "it before the prompt is read."
            )
        if reads_new:
            self._generated[call.layer] = at(read_generated_rows(call), self._home).transpose(1, 2)

    def _check_tau(self, visual: int) -> None:
        """Refuse a τ that no token of this prompt could ever exceed."""
        limit = math.sqrt(visual - 1)
        if self.method.tau >= limit:
            raise ParameterError(
                f"tau is {self.method.tau}, but the z-score of one of {visual} image tokens is at "
                f"most {limit:.2f}, so both anchors would always be empty. Pass tau below that."
            )

    @property
    def _classes(self) -> HeadClasses:
        """The head classes of the prompt, in a table of two layers: positive and negative anchor.

        Both are classified at once, since on a GPU many small operators cost more than large ones.
        """
        if self._found is None:
            anchors = self.positive_layer, self.negative_layer
            intensity = torch.stack([self._read[layer].intensity for layer in anchors], dim=1)
            given = self.heads
            if given is None:
                method = self.method
                # A GPU is not waited for; what is not finite shows in the logits.
                check = not intensity.is_cuda
                self._found = classify_heads(
                    intensity, method.head_threshold, method.empty, check=check
                )
            else:
                self._found = self._given(given, anchors, intensity)
        return self._found

    def _given(
        self,
        given: HeadClasses,
        anchors: tuple[int, int],
        intensity: Float[Tensor, "batch anchor head"],
    ) -> HeadClasses:
        """Return explicit classes at the two anchors, for each sample."""
        rows = [self.shape.row(layer, given.sensitive.shape[-2]) for layer in anchors]
        size = intensity.shape

        def pick(mask: Tensor, axis: int) -> Tensor:
            index = torch.tensor(rows, device=mask.device)
            chosen = mask.index_select(axis % mask.ndim, index).to(intensity.device)
            return chosen.expand(size if axis == -2 else size[:2])

        return HeadClasses(
            pick(given.sensitive, -2),
            pick(given.insensitive, -2),
            pick(given.sensitive_fallback, -1),
            pick(given.insensitive_fallback, -1),
            given.threshold,
            given.empty,
        )

    def _heads(self, positive: bool) -> Bool[Tensor, "batch head"]:
        return self._classes.sensitive[:, 0] if positive else self._classes.insensitive[:, 1]

    def _log_weights(
        self,
        positive: Float[Tensor, "batch *row head visual"],
        negative: Float[Tensor, "batch *row head visual"],
    ) -> Float[Tensor, "batch *row visual"]:
        method, rows = self.method, torch.stack([positive, negative])
        if self._shares is None:
            heads = torch.stack([self._heads(True), self._heads(False)])
            self._shares = head_shares(heads)
        shares = self._shares if rows.ndim == 4 else self._shares[:, :, None]
        masks = anchor_mask(mean_of_heads(rows, shares), method.tau)
        return reanchor_log_weights(masks[0], masks[1], method.alpha, method.beta)

    def _make_bias(self, call: AttentionCall) -> Bias:
        anchors, here = (self.positive_layer, self.negative_layer), call.query.device
        if call.step.number == 0 or self._prompt_weights is None:
            maps = [self._read[layer].map for layer in anchors]
            self._prompt_weights = self._log_weights(*maps)
        prompt, generated = at(self._prompt_weights, here), None
        if self.method.refresh == "step" and call.new_rows > 0:
            positive, negative = self._generated[anchors[0]], self._generated[anchors[1]]
            generated = at(self._log_weights(positive, negative), here)
        return row_bias(call, self.method.rows, prompt, generated)

    @property
    def anchors(self) -> VisualAnchors:
        """The anchors of the prompt's last row; without a batch axis if there was one sample.

        Raises:
            InterventionError: if no prompt was read yet.
        """
        if not {self.positive_layer, self.negative_layer} <= self._read.keys():
            raise InterventionError(
                "the anchors are not known yet: the model has not read a prompt. Read "
                "run.anchors after the block that runs the model."
            )
        positive, negative = self._read[self.positive_layer], self._read[self.negative_layer]
        maps = [
            saliency_map(positive.map, self._heads(True)),
            saliency_map(negative.map, self._heads(False)),
        ]
        masks = [anchor_mask(one, self.method.tau) for one in maps]
        whole = self._all_layers()
        if len(maps[0]) == 1:
            maps, masks = [one[0] for one in maps], [one[0] for one in masks]
        return VisualAnchors(
            masks[0],
            masks[1],
            maps[0],
            maps[1],
            whole,
            self.positive_layer,
            self.negative_layer,
        )

    def _all_layers(self) -> HeadClasses:
        """Return both anchor layers' classes in a table of all layers; other layers are empty."""
        found = self._classes
        batch, layers, device = len(found.sensitive), len(self.shape.layers), found.sensitive.device
        size = (batch, layers, self.shape.heads)
        sets = [torch.zeros(size, dtype=torch.bool, device=device) for _ in range(2)]
        flags = [torch.zeros(batch, layers, dtype=torch.bool, device=device) for _ in range(2)]
        for anchor, layer in enumerate((self.positive_layer, self.negative_layer)):
            row = self.shape.layers.index(layer)
            sets[0][:, row] = found.sensitive[:, anchor]
            sets[1][:, row] = found.insensitive[:, anchor]
            flags[0][:, row] = found.sensitive_fallback[:, anchor]
            flags[1][:, row] = found.insensitive_fallback[:, anchor]
        if batch == 1:
            sets, flags = [one[0] for one in sets], [one[0] for one in flags]
        return HeadClasses(*sets, *flags, threshold=found.threshold, empty=found.empty)
