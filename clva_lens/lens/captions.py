"""Where a model looks as it writes each word of an answer, and how sure it is of the word."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clva_lens.benchmarks.chair_reading import Reader
from clva_lens.benchmarks.chair_vocabulary import vocabulary
from clva_lens.benchmarks.toy_chair import READER as TOY_READER
from clva_lens.engine.run import running
from clva_lens.engine.session import Session
from clva_lens.figures import Drawing
from clva_lens.figures.photo_maps import Scale
from clva_lens.ground.ambient import undisturbed
from clva_lens.ground.drawn import SelfDrawn
from clva_lens.ground.errors import ParameterError, PromptError
from clva_lens.lens.asking import Asking
from clva_lens.lens.decoding import Decoding, Greedy
from clva_lens.lens.generate import generate_batch
from clva_lens.lens.intervene import refuse_in_trace
from clva_lens.lens.load import LensModel
from clva_lens.lens.observers import Observer
from clva_lens.lens.overlay import overlay
from clva_lens.lens.words import Word, by_word, words_of
from clva_lens.methods.base import MethodLike, as_method
from clva_lens.methods.target import shape_of
from clva_lens.models.prompt import Asked, Prompt, as_prompt
from clva_lens.models.step import Step
from clva_lens.science.anchors import default_anchor_layers, saliency_map
from clva_lens.science.heads import SomeHeads, head_mask
from clva_lens.toy.toys import of_toy_world

_MOST = 24
_COLUMNS = 6


@dataclass(frozen=True, eq=False, repr=False)
class CaptionAttention(SelfDrawn):
    """An answer word by word: where each head looked as the word was written.

    ``maps`` are fractions of attention mass, of the rows that wrote the word's tokens, averaged
    over these. ``probabilities`` of the words are the products of their tokens': as they stood
    under the method when the token was chosen, before a temperature or nucleus. ``unseen`` says
    which words name an object that is not in the picture; None where that was not given. Marks
    between words are in ``text`` only. ``layers`` are 0-based, of a stack of ``num_layers``.
    """

    prompt: Prompt
    text: str
    ids: Int[Tensor, " token"]
    words: tuple[Word, ...]
    maps: Float[Tensor, "layer head word visual"]
    probabilities: Float[Tensor, " word"]
    unseen: tuple[bool, ...] | None
    layers: tuple[int, ...]
    num_layers: int

    def saliency(self, heads: SomeHeads | str = "all") -> Float[Tensor, "layer word visual"]:
        """Return where a set of heads looked, averaged over them (Eq. 4, arXiv:2603.25088v1).

        ``heads`` is "all", a mask [layer, head], pairs (layer, head) or {layer: [heads]}.

        Raises:
            ParameterError: if there is no such head.
        """
        count = self.maps.shape[1]
        if isinstance(heads, str):
            if heads != "all":
                raise ParameterError(f"heads is {heads!r}. Pass 'all', or name heads.")
            chosen = torch.ones(len(self.layers), count, dtype=torch.bool)
        else:
            chosen = head_mask(heads, self.layers, count, depth=self.num_layers, of="the caption")
        rows = self.maps.transpose(1, 2)
        return saliency_map(rows, chosen[:, None].to(rows.device))

    def draw(
        self,
        layer: int | None = None,
        heads: SomeHeads | str = "all",
        *,
        scale: Scale = "p99",
        smooth: bool = False,
        columns: int = _COLUMNS,
    ) -> Drawing:
        """Return a strip of the photo with the map of each word (at most 24) and its probability.

        ``layer`` is 0-based; None is that of CLVA's positive anchor, L/2 − 2, or the nearest that
        was read. Words that name an object which is not in the picture are red. For the rest see
        ``overlay``.

        Raises:
            ParameterError: if the layer was not read.
            PromptError: if there is no word, or it is unknown where on the photo the tokens lie.
        """
        if not self.words:
            raise PromptError(f"the answer {self.text!r} has no words to draw.")
        if layer is None:
            layer = default_anchor_layers(self.layers, self.num_layers)[0]
        if layer not in self.layers:
            raise ParameterError(
                f"layer {layer} was not read. Pass one of {', '.join(map(str, self.layers))}."
            )
        shown = slice(_MOST)
        return overlay(
            self.prompt,
            self.saliency(heads)[self.layers.index(layer), shown],
            titles=[word.text for word in self.words[shown]],
            notes=[f"p = {float(one):.2f}" for one in self.probabilities[shown]],
            marked=None if self.unseen is None else self.unseen[shown],
            scale=scale,
            smooth=smooth,
            label=f"attention in layer {layer} (fraction)",
            columns=columns,
        )

    @property
    def drawable(self) -> bool:
        """Whether there is a word, and a photo whose place is known."""
        site = self.prompt.site_of(self.maps.shape[-1])
        known = site is not None and not isinstance(self.prompt.sites[site].pieces, str)
        return bool(self.words) and known

    def __repr__(self) -> str:
        """Return the words with their probabilities."""
        unseen = self.unseen or [False] * len(self.words)
        said = " ".join(
            f"{word.text}{'(not there)' if wrong else ''} {float(one):.2f}"
            for word, one, wrong in zip(self.words, self.probabilities, unseen, strict=True)
        )
        layers, heads = self.maps.shape[:2]
        return f"CaptionAttention({layers} layers × {heads} heads; {said})"


@undisturbed()
def caption_attention(
    model: LensModel,
    prompt: Asked,
    method: MethodLike | None = None,
    decoding: Decoding | None = None,
    *,
    layers: Sequence[int] | str = "all",
    site: str | None = None,
    objects: Collection[str] | None = None,
    reader: Reader | None = None,
) -> CaptionAttention:
    """Return the answer to one prompt with, for each word, where the model looked as it wrote it.

    ``decoding`` is greedy with 32 tokens by default; under beams the rows of the answer's own beam
    are followed. ``objects`` name what is in the picture: words that name another object are marked
    as unseen, as CHAIR reads them (``reader``, by default with our list of COCO's words; for the
    toys with their own). In a model with a Q-Former the decoder's maps lie on no photo; they are
    read at ``site="decoder"``, and are not drawn.

    ``model``: what ``cl.load`` returned; ``prompt``: a single one; ``method``: what acts meanwhile;
    ``layers``: those that are read, 0-based, or "all".

    Raises:
        PromptError: if the prompt is a batch.
        ParameterError: if the method or the decoding does not fit, or there is no such layer.
        InterventionError: inside a trace; use ``cl.observe()`` and its ``words`` there.

    >>> told = cl.caption_attention(model, (image, "describe the image."))
    >>> [word.text for word in told.words][:3], told.maps.shape
    (['there', 'is', 'a'], torch.Size([12, 8, 13, 64]))
    """
    refuse_in_trace("caption_attention", ", or cl.observe() in it")
    asked = as_prompt(model, prompt, continued=True)
    if len(asked["input_ids"]) > 1:
        raise PromptError(
            f"the prompt is a batch of {len(asked['input_ids'])}. Pass prompt.row(index)."
        )
    asking = Asking(method=as_method(method), decoding=decoding or Greedy()).fitted(model)
    observer = Observer(layers, shape_of(model.hf_model, site or "decoder"))
    observer.follow(model.hf_model)
    told = TokenChances(observer)
    made = generate_batch(model, asked, 0, asking, running(model.hf_model, [observer, told]))
    assert made is not None  # a single prompt
    ids = made[0][0]
    maps, chances = observer.answers(ids[None])[0].maps, told.of_answer(ids)
    words = words_of(model.words, ids.tolist())
    if reader is None:
        toy = of_toy_world(model.name)
        reader = TOY_READER if toy else Reader(vocabulary("builtin"), "builtin")
    return CaptionAttention(
        asked,
        model.words.decode(ids, skip_special_tokens=True).strip(),
        ids,
        tuple(words),
        by_word(maps, words),
        torch.stack([chances[list(word.tokens)].prod() for word in words])
        if words
        else torch.zeros(0),
        None if objects is None else unseen_objects(reader, words, objects),
        observer.layers,
        observer.shape.depth,
    )


def unseen_objects(
    reader: Reader, words: Sequence[Word], objects: Collection[str]
) -> tuple[bool, ...]:
    """Return which words name an object that is not among ``objects``.

    A word is read with the one before and the one after it, since two may name one object.

    Raises:
        ParameterError: if an object is none that the reader knows.
    """
    unknown = [one for one in objects if not reader.read(one).nodes]
    if unknown:
        raise ParameterError(
            f"objects has {', '.join(map(repr, sorted(unknown)))}, which {reader.name} does not "
            "know. Pass names of objects, or a reader= of other words."
        )
    there = {node for one in objects for node in reader.read(one).nodes}
    texts = [word.text for word in words]
    wrong = [bool(set(reader.read(text).nodes) - there) for text in texts]
    for at in range(len(texts) - 1):
        both = reader.read(" ".join(texts[at : at + 2]))
        if both.length == 1:
            wrong[at] = wrong[at + 1] = bool(set(both.nodes) - there)
    return tuple(wrong)


class TokenChances(Session):
    """Keeps the probabilities of each pass's last position, as all methods left them."""

    site = "decoder"
    edits_logits = True

    def __init__(self, observer: Observer) -> None:
        """Follow the rows that ``observer`` follows."""
        self.observer = observer
        self._kept: dict[int, Float[Tensor, "row vocabulary"]] = {}

    def logits(self, step: Step, logits: Float[Tensor, "batch vocabulary"]) -> None:
        """Keep them, by the number of the pass."""
        if step.number == 0:
            self._kept = {}
        self._kept[step.number] = logits.detach().float().softmax(dim=-1).cpu()

    def of_answer(self, ids: Int[Tensor, " token"]) -> Float[Tensor, " token"]:
        """Return the probability that each token of an answer had when it was chosen."""
        rows = self.observer.rows_of(ids[None])[0]
        chances = [
            self._kept[number][row, token] for (number, row), token in zip(rows, ids, strict=False)
        ]
        return torch.stack(chances) if chances else torch.zeros(0)
