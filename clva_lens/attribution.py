"""Direct logit attribution: what each head, MLP and image token adds to an answer's logit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from clva_lens.attention import open_sessions, running
from clva_lens.errors import InterventionError, ParameterError
from clva_lens.figures import Drawing, head_attribution, patch_maps
from clva_lens.figures.base import evenly
from clva_lens.figures.patch_maps import MOST_MAPS
from clva_lens.generate import answer_tokens
from clva_lens.heads import HeadClasses
from clva_lens.intervene import intervening
from clva_lens.methods.base import Method, shape_of
from clva_lens.models.lens import LensModel
from clva_lens.models.prompt import Prompt
from clva_lens.session import AttentionCall, Session
from clva_lens.trace import Observer


@dataclass(frozen=True, eq=False, repr=False)
class LogitAttribution:
    """What each part of the model adds to a logit difference at the last position, in logits.

    The final norm's scale is that of the pass, frozen, so that parts add up: ``total`` is the sum
    of ``embedding``, ``heads``, ``mlps`` and ``bias`` (all biases of attention, norm and
    unembedding), and is the model's own ``difference``. ``image`` and ``elsewhere`` divide each
    head's part among the image tokens and all other keys. A part that another one undoes later
    still counts: this is what is written, not what is needed.

    ``label`` says which logits; ``classes`` are the heads' (Eqs. 2–3, arXiv:2603.25088v1).
    """

    embedding: Float[Tensor, "*batch"]
    heads: Float[Tensor, "*batch layer head"]
    mlps: Float[Tensor, "*batch layer"]
    bias: Float[Tensor, "*batch"]
    image: Float[Tensor, "*batch layer head visual"]
    elsewhere: Float[Tensor, "*batch layer head"]
    difference: Float[Tensor, "*batch"]
    classes: HeadClasses
    label: str
    batched: bool
    prompt: Prompt

    @property
    def total(self) -> Float[Tensor, "*batch"]:
        """The sum of all parts, in logits."""
        return self.embedding + self.heads.sum(dim=(-2, -1)) + self.mlps.sum(dim=-1) + self.bias

    @property
    def image_tokens(self) -> Float[Tensor, "*batch layer visual"]:
        """What each layer's heads together bring from each image token, in logits."""
        return self.image.sum(dim=-2)

    def on_grid(self) -> Float[Tensor, "*batch layer row column"]:
        """Return ``image_tokens`` on the patch grid.

        Raises:
            PromptError: if the image tokens lie on no grid.
        """
        return self.image_tokens.unflatten(-1, self.prompt.grid_at("decoder"))

    def draw(self) -> Drawing:
        """Return the heat map of layers and heads, with the head classes marked.

        Raises:
            ParameterError: if this is a batch.
        """
        self._single()
        marked = [one.cpu().numpy() for one in (self.classes.sensitive, self.classes.insensitive)]
        return head_attribution(self.heads.cpu().numpy(), *marked, label=self.label)

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
        return patch_maps(maps[chosen].cpu().numpy(), layers=chosen, label=label)

    def _single(self) -> None:
        if self.batched:
            raise ParameterError(
                "this attribution is of a batch. Run the prompts one at a time to draw them."
            )

    def _repr_png_(self) -> bytes | None:
        """Return the picture that a notebook shows; a batch has none."""
        return None if self.batched else self.draw()._repr_png_()

    def __repr__(self) -> str:
        """Return the sums of the kinds of parts, averaged over samples."""

        def mean(values: Tensor) -> str:
            return f"{float(values.mean()):+.2f}"

        return (
            f"LogitAttribution({self.label} {mean(self.difference)} = embedding "
            f"{mean(self.embedding)}, heads {mean(self.heads.sum(dim=(-2, -1)))} (of it image "
            f"{mean(self.image.sum(dim=(-3, -2, -1)))}), MLPs {mean(self.mlps.sum(dim=-1))}, bias "
            f"{mean(self.bias)})"
        )


@torch.no_grad()
def direct_logit_attribution(
    model: LensModel,
    prompt: Prompt,
    tokens: str | int | Sequence[str | int] = ("yes", "no"),
    method: Method | None = None,
) -> LogitAttribution:
    """Return what each head, MLP and image token adds to a logit at the prompt's last position.

    ``tokens`` is a token (a text that is one, or an id), or two: the first's logit minus the
    second's. ("yes", "no") takes the likeliest spelling of each, as margins do. Interventions
    that are open hold, and ``method`` beside them. One forward pass; only the last row of each
    pattern is formed.

    Raises:
        ParameterError: if there are not one or two tokens, or one of them is none.
        ModelLoadError: if nobody wrote the names of this model down.
        InterventionError: inside a trace, if the attention kernel cannot be intercepted, or if an
            open method replaces the logits.
    """
    found = model.hf_model
    real = prompt.spans.real
    places = torch.where(real, torch.arange(real.shape[1], device=real.device), -1).amax(dim=1)
    shape = shape_of(found, "decoder")
    last, observer = _LastRow(places), Observer("all", shape)
    layers = range(shape.depth)
    wanted = {"hook_embed", "hook_pos_embed", "ln_final.hook_scale"}
    for i in layers:
        wanted |= {f"blocks.{i}.{one}" for one in ("attn.hook_z", "attn.hook_v", "hook_mlp_out")}
    methods = () if method is None else (method,)
    with intervening(model, *methods), running(found, [last, observer]):
        if any(session.edits_logits for session in open_sessions(found)):
            raise InterventionError(
                "an open method replaces the model's logits (a contrast), so they are no sum over "
                "its parts. Leave that method out."
            )
        logits, cache = model.run_with_cache(prompt, lambda name: name in wanted)
    rows = torch.arange(len(places), device=places.device)
    standing: Any = cache.model
    scores = logits[rows, places].double()
    ids, label = _chosen(standing, model.words, tokens, scores)
    signs = [1, -1][: len(ids)]
    pairs = list(zip(signs, ids, strict=True))
    plain = torch.stack([s * standing.W_U.T[one].double() for s, one in pairs]).sum(dim=0)
    difference = torch.stack([s * scores[rows, one] for s, one in pairs]).sum(dim=0)
    norm: Any = standing.ln_final
    direction = plain * norm.weight.detach().double()
    bias = torch.stack([s * standing.b_U[one].double() for s, one in pairs]).sum(dim=0)
    if isinstance(norm, nn.LayerNorm):
        bias = bias + plain @ norm.bias.detach().double()
        direction = direction - direction.mean(dim=1, keepdim=True)
    direction = direction / cache["ln_final.hook_scale"][rows, places].double()

    def part(name: str) -> Tensor:
        return (cache[name][rows, places].double() * direction).sum(dim=1)

    embedding = part("hook_embed")
    if "hook_pos_embed" in cache:
        embedding = embedding + part("hook_pos_embed")
    heads, image, elsewhere = [], [], []
    for i in layers:
        attention = standing.blocks[i].attn
        asked = torch.einsum("hdm,bm->bhd", attention.W_O.double(), direction)
        bias = bias + direction @ attention.b_O.double()
        z, v = (cache[f"blocks.{i}.attn.hook_{one}"].double() for one in "zv")
        heads.append((z[rows, places] * asked).sum(dim=-1))
        v = v.repeat_interleave(asked.shape[1] // v.shape[2], dim=2)
        from_key = torch.einsum("bkhd,bhd,bhk->bhk", v, asked, last.rows[i].double())
        visual = rearrange(prompt.spans.visual_index(), "b v -> b 1 v")
        image.append(torch.take_along_dim(from_key, visual, dim=2))
        elsewhere.append(from_key.sum(dim=-1) - image[-1].sum(dim=-1))

    def field(value: Tensor | list[Tensor]) -> Tensor:
        whole = torch.stack(value, dim=1) if isinstance(value, list) else value
        return (whole if prompt.batched else whole[0]).float()

    return LogitAttribution(
        embedding=field(embedding),
        heads=field(heads),
        mlps=field([part(f"blocks.{i}.hook_mlp_out") for i in layers]),
        bias=field(bias),
        image=field(image),
        elsewhere=field(elsewhere),
        difference=field(difference),
        classes=observer.trace(prompt.batched).heads(),
        label=label,
        batched=prompt.batched,
        prompt=prompt,
    )


class _LastRow(Session):
    """Edits nothing; keeps each layer's row of the pattern at one position of each sample."""

    site = "decoder"

    def __init__(self, places: Int[Tensor, " batch"]) -> None:
        self._places = places
        self.rows: dict[int, Float[Tensor, "batch head key"]] = {}

    def attention(self, call: AttentionCall) -> None:
        first = int(self._places.min())
        pattern = call.rows(first, int(self._places.max()) + 1)
        index = rearrange(self._places - first, "b -> b 1 1 1")
        self.rows[call.layer] = torch.take_along_dim(pattern, index, dim=2)[:, :, 0]


def _chosen(
    standing: Any, words: Any, tokens: Any, scores: Float[Tensor, "batch vocabulary"]
) -> tuple[list[Int[Tensor, " batch"]], str]:
    """Return the ids of one or two tokens in each sample, and what is made of their logits."""
    wanted = [tokens] if isinstance(tokens, str | int) else list(tokens)
    if len(wanted) not in (1, 2):
        raise ParameterError(f"tokens are {wanted}, but 1 or 2 are needed. Pass ('yes', 'no').")
    label = " − ".join(f"logit({one})" for one in wanted)
    if wanted == ["yes", "no"]:
        spelled = answer_tokens(words)
        if not all(spelled):
            raise ParameterError(
                "the tokenizer has no single token for yes or no. Pass two token ids as tokens=."
            )
        choices = [torch.tensor(one, device=scores.device) for one in spelled]
        return [one[scores[:, one].argmax(dim=1)] for one in choices], label
    ids = [standing.to_single_token(one) if isinstance(one, str) else one for one in wanted]
    if any(not 0 <= one < scores.shape[1] for one in ids):
        raise ParameterError(
            f"tokens are {ids}, but ids are 0 to {scores.shape[1] - 1}. Pass ids like that."
        )
    return [torch.full((len(scores),), one, device=scores.device) for one in ids], label
