"""Maps over the image tokens by other people's formulas, asked for by name."""

from dataclasses import dataclass, fields, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from clva_lens.engine.run import running
from clva_lens.figures import Drawing
from clva_lens.ground.ambient import undisturbed
from clva_lens.ground.drawn import SelfDrawn
from clva_lens.ground.errors import ParameterError
from clva_lens.lens.intervene import intervening, refuse_in_trace
from clva_lens.lens.maps import MAPS
from clva_lens.lens.maps.base import MapFormula, Reading, values_of
from clva_lens.lens.observers import QueryObserver
from clva_lens.lens.overlay import overlay
from clva_lens.lens.trace import last_logits
from clva_lens.methods.base import MethodLike
from clva_lens.methods.target import shape_of
from clva_lens.models.prompt import Asked, Prompt, as_prompt

NO_LOGIT = "attention alone, whatever the answer"
"""The label of a map that explains no logit."""


@dataclass(frozen=True, eq=False, repr=False)
class ImageMap(SelfDrawn):
    """What each image token is for an answer, by the formula ``by``.

    ``values`` are over the image tokens, in the formula's own unit; ``signed`` ones may be below 0,
    which speaks against the answer. ``label`` says which logit is explained, if one is. ``prompt``
    is what was asked. With ``batched`` there is a batch axis first.
    """

    values: Float[Tensor, "*batch visual"]
    by: MapFormula
    label: str
    signed: bool
    prompt: Prompt
    batched: bool

    def saliency(self) -> Float[Tensor, "*batch visual"]:
        """Return what speaks for the answer, at least 0: what ``cl.pointing_game`` plays with."""
        return self.values.clamp(min=0)

    def draw(self, **options: Any) -> Drawing:
        """Return the map on the photo of its prompt.

        Args:
            **options: those of ``cl.overlay``.

        Raises:
            ParameterError: if it is of a batch.
            PromptError: if it is unknown where on the photo the image tokens lie.
        """
        if self.batched:
            raise ParameterError("the maps are of a batch. Draw one of them: maps[0].draw().")
        told = {"titles": [self.by.name], "notes": [self.label], "label": self.by.name}
        return overlay(self.prompt, self.values, **(told | options))

    @property
    def drawable(self) -> bool:
        """Whether it is of a single prompt, and known where on the photo its image tokens lie."""
        site = self.prompt.site_of(self.values.shape[-1])
        known = site is not None and not isinstance(self.prompt.sites[site].pieces, str)
        return known and not self.batched

    def __getitem__(self, item: int) -> "ImageMap":
        """Return the map of one sample of a batch."""
        if not self.batched:
            raise ParameterError("this map is of a single prompt. Use it as it is.")
        one = self.prompt.row(item)
        return replace(self, values=self.values[item], prompt=one, batched=False)

    def __repr__(self) -> str:
        """Return the formula, and how much of the map its largest tenth holds."""
        saliency = self.saliency().flatten(0, -2) if self.batched else self.saliency()[None]
        tenth = max(1, saliency.shape[-1] // 10)
        total = saliency.sum(dim=-1).clamp(min=1e-30)
        share = float((saliency.topk(tenth, dim=-1).values.sum(dim=-1) / total).mean())
        return (
            f"ImageMap({self.by!r} of {self.label}: {self.values.shape[-1]} image tokens, "
            f"{tenth} of them hold {share:.0%})"
        )


@undisturbed()
def image_map(
    model: Any,
    prompt: Asked,
    by: str | MapFormula = "relevancy",
    *,
    tokens: Any = None,
    method: MethodLike | None = None,
    **settings: Any,
) -> ImageMap:
    """Return which image tokens an answer stands on, by one of the formulas people compare with.

    Where a Q-Former reads the picture, the decoder's image tokens lie nowhere: what a formula gives
    each of them is passed on to the patches that their queries look at, as ``composed_saliency``
    does, averaged over the heads and layers of the Q-Former. What mixes the queries otherwise is
    left out; "bi-modal-relevancy" follows all of it by itself.

    Args:
        model: what ``cl.load`` returned, or a transformers model.
        prompt: what is asked; lists make a batch.
        by: a formula's name, or an instance of one: "relevancy" (gradient × attention),
            "bi-modal-relevancy" (through a Q-Former too), "rollout", "grad-cam" (on the projector),
            "integrated-gradients", "relative-attention", "visual-ratio", "token-activation".
        tokens: a token (a text that is one, or an id) whose logit is explained, or two, the first's
            logit minus the second's; ("yes", "no") takes the likeliest spelling of each. None is
            the likeliest token. Rollout and the two attention maps ask for none.
        method: what acts meanwhile.
        **settings: of the formula, where it is named.

    Raises:
        UnknownName: if no formula has this name.
        ParameterError: if a setting or token is none, or the formula does not fit the model.
        PromptError: if the formula needs a photo or pixels that the prompt does not have.
        InterventionError: inside a trace.

    >>> found = cl.image_map(model, there, "relevancy", tokens=("yes", "no"))
    >>> found.values.shape, bool((found.values >= 0).all())
    (torch.Size([64]), True)
    """
    refuse_in_trace("image_map", "")
    formula = _formula(by, settings)
    asked = as_prompt(model, prompt)
    reading = Reading(model, asked, tokens, method)
    values = values_of(formula, reading)
    own = shape_of(reading.model)
    if own.site != "decoder" and not formula.on_patches:
        queries = QueryObserver("all", own)
        with intervening(model, method), running(reading.model, [queries]):
            last_logits(reading.model, asked)
        values = (values[:, None] @ queries.maps().mean(dim=1).to(values))[:, 0]
    return ImageMap(
        values if asked.batched else values[0],
        formula,
        reading.label if formula.explains else NO_LOGIT,
        formula.signed,
        asked,
        asked.batched,
    )


def _formula(by: str | MapFormula, settings: dict[str, Any]) -> MapFormula:
    if isinstance(by, MapFormula):
        if settings:
            raise ParameterError(
                f"by is a {type(by).__name__} with settings of its own, but {', '.join(settings)} "
                "was passed too. Pass them to it."
            )
        return by
    kind = MAPS.get(by)
    known = [one.name for one in fields(kind)]
    for name in settings:
        if name not in known:
            has = ", ".join(known) or "none"
            raise ParameterError(f"the map '{kind.name}' has no setting '{name}'. It has: {has}.")
    return kind(**settings)
