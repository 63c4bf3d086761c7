"""Training of toy-instructblip from a seed: vision tower, alignment, then Q-Former and decoder.

Three stages, as in train.py. 0: the vision tower learns dense patch labels (vision.py). 1: a linear
map from patches to the embeddings of their words, in closed form, starts cross-attention. 2: the
Q-Former and the language model learn to answer under decorrelated reading
(reading_instructblip.py). Every question is a row of its own, for the Q-Former reads the picture
with the question in mind; the rows of a picture share the vision tower's work.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import AttentionInterface, InstructBlipForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from clva_lens.toy.build_instructblip import (
    EMBED,
    QUERIES,
    VISION_WIDTH,
    align,
    tokenizer,
    untrained,
)
from clva_lens.toy.checkpoint import save_tensors
from clva_lens.toy.packing import END_WEIGHT, VISUAL, WEIGHT, training_questions
from clva_lens.toy.questions import Question
from clva_lens.toy.reading_instructblip import READING_LAYERS, CrossReader, mark_layers
from clva_lens.toy.scenes import COLORS, KINDS, SIDES, Scene, sample_scene
from clva_lens.toy.train import TIMES, Advance, Clock, Plan, Stage, accuracy, check_recipe
from clva_lens.toy.vision import patch_labels, pixels, train_vision

ATTENTION = "clva_toy_training_qformer"
WORDS = 9  # <s> and the longest question
ANSWERED, CAPTIONED = 10, 23  # room for a question with its one-word answer, and with a caption


@dataclass(frozen=True, kw_only=True)
class InstructBlipRecipe:
    """Everything that decides the weights, besides the library versions.

    A step asks ``questions`` about each of ``pictures`` pictures, and captions of ``captions`` of
    them. Fractions are of ``qformer_steps`` and mean what they mean in train.py; ``noise`` is the
    vote noise of the cross-attention in layers 4, 6, 8 and 10.
    """

    seed: int = 0
    vision_steps: int = 4200
    alignment_batches: int = 60
    qformer_steps: int = 2400
    pictures: int = 12
    questions: int = 5
    captions: int = 12
    rate: float = 1.0e-3
    taught: float = 0.35
    noise_from: float = 0.12
    noise_full: float = 0.22
    noise: tuple[float, ...] = (0.6, 0.3, 0.3, 0.3)
    hard_from: float = 0.18
    hard_share: float = 0.45
    decay_from: float = 0.55
    echo_weight: float = 0.2
    pointing_weight: float = 0.3
    presence_weight: float = 0.3


class QuestionRows(NamedTuple):
    """What the Q-Former is asked, one question a row, padded on the right.

    ``picture`` is the row's picture and ``asked`` the index of the kind in question (−1 for a
    caption), whose patches ``object_patches`` marks.
    """

    picture: Int[Tensor, " rows"]
    text: Int[Tensor, "rows words"]
    asked: Int[Tensor, " rows"]
    object_patches: Bool[Tensor, "rows visual"]


class Answers(NamedTuple):
    """What the language model reads after the image tokens: next tokens and their weights."""

    ids: Int[Tensor, "rows length"]
    target: Int[Tensor, "rows length"]
    weight: Float[Tensor, "rows length"]


def question_rows(scenes: Sequence[Scene], asks: Sequence[tuple[int, Question]]) -> QuestionRows:
    """Return (scene index, question) pairs as rows of the Q-Former."""
    text = np.zeros((len(asks), WORDS), np.int64)
    patches = np.zeros((len(asks), VISUAL), bool)
    for row, (index, ask) in enumerate(asks):
        ids = tokenizer()(ask.text).input_ids
        text[row, : len(ids)] = ids
        if ask.kind:
            patches[row] = scenes[index].patches(ask.kind).ravel()
    return QuestionRows(
        torch.tensor([index for index, _ in asks]),
        torch.as_tensor(text),
        torch.tensor([KINDS.index(ask.kind) if ask.kind else -1 for _, ask in asks]),
        torch.as_tensor(patches),
    )


def answer_rows(asks: Sequence[Question], length: int) -> Answers:
    """Return questions with their answers as rows of ``length`` tokens; only answers weigh."""
    words = tokenizer()
    ids, target = np.zeros((2, len(asks), length), np.int64)
    weight = np.zeros((len(asks), length), np.float32)
    for row, ask in enumerate(asks):
        question = words(ask.text).input_ids
        answer = words(ask.answer, add_special_tokens=False).input_ids
        tokens = [*question, *answer, words.eos_token_id]
        end = len(tokens) - 1
        ids[row, :end], target[row, :end] = tokens[:-1], tokens[1:]
        weight[row, len(question) - 1 : end] = WEIGHT[ask.skill]
        weight[row, end - 1] = END_WEIGHT
    return Answers(torch.as_tensor(ids), torch.as_tensor(target), torch.as_tensor(weight))


def run_qformer(
    model: InstructBlipForConditionalGeneration,
    rows: QuestionRows,
    seen: Float[Tensor, "picture keys vision"],
    hidden: bool = False,
) -> BaseModelOutputWithPoolingAndCrossAttentions:
    """Run the Q-Former on rows whose pictures ``seen`` holds once each.

    Its attention function must be one that picks each row's picture, such as ``CrossReader``.
    """
    words = rows.text > 0  # <pad> is word 0
    mask = torch.cat([torch.ones(len(words), QUERIES, dtype=torch.bool), words], dim=1)
    queries: Any = model.query_tokens
    return model.qformer(
        input_ids=rows.text,
        # A 4-D mask is passed through untouched.
        attention_mask=mask[:, None, None],
        query_embeds=queries.expand(len(rows.text), -1, -1),
        encoder_hidden_states=seen,
        output_hidden_states=hidden,
    )


def run_decoder(
    model: InstructBlipForConditionalGeneration,
    image: Float[Tensor, "rows query word"],
    ids: Int[Tensor, "rows length"],
) -> Float[Tensor, "rows length vocabulary"]:
    """Return the logits after each of ``ids``, which follow the image tokens.

    Rows are padded on the right, which under a causal mask and rotary positions is the same to
    every real token as padding on the left.
    """
    decoder: Any = model.language_model
    embeds = torch.cat([image, decoder.model.embed_tokens(ids)], dim=1)
    hidden = decoder.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    return decoder.lm_head(hidden[:, QUERIES:])


@torch.no_grad()
def alignment(
    model: InstructBlipForConditionalGeneration, seed: int, batches: int
) -> Float[Tensor, "word vision"]:
    """Return the ridge regression of patches on E[kind] + 0.7 E[colour] + 0.7 E[side].

    A patch of the ground is to give nothing.
    """
    embedding = model.qformer.embeddings.word_embeddings.weight

    def vectors(names: Sequence[str]) -> Tensor:
        return embedding[tokenizer().convert_tokens_to_ids(list(names))]

    kinds, colors, sides = vectors(KINDS), vectors(tuple(COLORS)), vectors(SIDES)
    width = VISION_WIDTH
    square, cross = torch.zeros(width, width), torch.zeros(width, kinds.shape[1])
    for step in range(batches):
        rng = np.random.default_rng([seed, 1, step])
        scenes = [sample_scene(rng) for _ in range(32)]
        labels = torch.as_tensor(np.stack([patch_labels(scene) for scene in scenes]))
        kind, color, side = labels.unbind(1)
        seen = model.vision_model(pixels(scenes)).last_hidden_state[:, 1:].flatten(0, 1)
        wanted = kinds[kind - 1] + 0.7 * colors[color - 1] + 0.7 * sides[side]
        wanted = (wanted * (kind > 0)[..., None]).flatten(0, 1)
        square += seen.T @ seen
        cross += seen.T @ wanted
    ridge = square + 1e-3 * square.diagonal().mean() * torch.eye(width)
    return torch.linalg.solve(ridge, cross).T


def train(
    recipe: InstructBlipRecipe, folder: Path, advance: Advance
) -> InstructBlipForConditionalGeneration:
    """Train toy-instructblip, or go on from the checkpoints in ``folder``; return it on the CPU.

    ``advance(stage, step, steps, figures)`` is called after every step. ``folder`` gets
    ``vision.safetensors``, ``qformer.safetensors`` (with the state of the optimiser),
    ``recipe.json`` and ``times.json`` (minutes by stage).

    Raises:
        ParameterError: if ``folder`` holds a run of another recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_recipe(recipe, folder)
    clock = Clock(folder / TIMES, advance)
    model = untrained(recipe.seed)
    saved = folder / "vision.safetensors"
    if saved.exists():
        model.vision_model.load_state_dict(load_file(saved, device=str(torch.get_default_device())))
    else:
        train_vision(
            model.vision_model,
            recipe.vision_steps,
            recipe.seed,
            folder / "vision.checkpoint.safetensors",
            lambda step, figures: clock("vision", step, recipe.vision_steps, figures),
        )
        save_tensors(model.vision_model.state_dict(), saved)
    model.vision_model.requires_grad_(False).eval()
    align(model, alignment(model, recipe.seed, recipe.alignment_batches), recipe.seed)
    clock("alignment", 0, 1, {})
    _qformer_stage(model, recipe, folder / "qformer.safetensors", clock)
    model.qformer.set_attn_implementation("sdpa")
    return model.eval()


def _compile_parts(model: InstructBlipForConditionalGeneration) -> None:
    """Compile what lies between the attentions, which is a third faster."""
    qformer: Any = model.qformer.encoder.layer
    decoder: Any = model.language_model.model.layers
    parts = [
        part
        for layer in qformer
        for part in (layer.intermediate, layer.intermediate_query, layer.output, layer.output_query)
    ]
    for layer in decoder:
        parts += [layer.mlp, layer.input_layernorm, layer.post_attention_layernorm]
    for part in parts:
        part.compile()


def _qformer_stage(
    model: InstructBlipForConditionalGeneration,
    recipe: InstructBlipRecipe,
    checkpoint: Path,
    advance: Advance,
) -> None:
    """Train everything but the vision tower on questions and captions."""
    reader = CrossReader()
    AttentionInterface.register(ATTENTION, reader)
    mark_layers(model.qformer)
    model.qformer.config._attn_implementation = ATTENTION
    _compile_parts(model)
    model.train()
    model.vision_model.eval()

    def loss_of(plan: Plan) -> tuple[Tensor, dict[str, float]]:
        scenes = [sample_scene(plan.rng) for _ in range(recipe.pictures)]
        asks: list[tuple[int, Question]] = []
        captions: list[tuple[int, Question]] = []
        for index, scene in enumerate(scenes):
            caption, *others = training_questions(scene, plan.rng, plan.hard)
            captions.append((index, caption))
            # Every picture has four questions at least; the first may be asked twice.
            asks += [(index, ask) for ask in (others * 2)[: recipe.questions]]
        reader.swap_probability, reader.generator = plan.noise, plan.generator
        reader.point = plan.point
        return _loss(model, reader, scenes, asks, captions[: recipe.captions], recipe)

    Stage("qformer", recipe.qformer_steps, checkpoint).run(model, recipe, loss_of, advance)


def _loss(
    model: InstructBlipForConditionalGeneration,
    reader: CrossReader,
    scenes: list[Scene],
    asks: list[tuple[int, Question]],
    captions: list[tuple[int, Question]],
    recipe: InstructBlipRecipe,
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of a batch: answers, and while pointing the echo and the pointing."""
    with torch.no_grad():
        seen = model.vision_model(pixels(scenes)).last_hidden_state
    rows = question_rows(scenes, asks + captions)
    reader.begin(rows.picture, rows.object_patches)
    out: Any = run_qformer(model, rows, seen, hidden=reader.point)
    image = model.language_projection(out.last_hidden_state[:, :QUERIES])
    total, weights = torch.zeros(()), torch.zeros(())
    right: list[dict[str, float]] = []
    # Captions are longer, so they go through the language model apart.
    for group, part, length in (
        (asks, image[: len(asks)], ANSWERED),
        (captions, image[len(asks) :], CAPTIONED),
    ):
        answers = answer_rows([ask for _, ask in group], length)
        counted = answers.weight > 0
        logits = run_decoder(model, part, answers.ids)[counted]
        target, weight = answers.target[counted], answers.weight[counted]
        total = total + (cross_entropy(logits, target, reduction="none") * weight).sum()
        weights = weights + weight.sum()
        right.append(accuracy(logits, target))
    loss = total / weights
    presence = _presence(model, image[len(asks) :], [scenes[index] for index, _ in captions])
    figures = {"loss": loss.item()} | right[0] | {"presence": presence.item()}
    loss = loss + recipe.presence_weight * presence
    if reader.point:
        hidden = out.hidden_states[READING_LAYERS[0]][:, :QUERIES]
        echo = _echo(model, hidden, rows.asked)
        pointing = torch.stack(reader.pointing_losses).mean()
        loss = loss + recipe.echo_weight * echo + recipe.pointing_weight * pointing
        figures |= {"echo": echo.item(), "pointing": pointing.item()}
    return loss, figures


def _presence(
    model: InstructBlipForConditionalGeneration,
    image: Float[Tensor, "rows query word"],
    scenes: list[Scene],
) -> Float[Tensor, ""]:
    """Return how badly the first image tokens of captions tell whether their kinds are there.

    Each of them is to have more of the embedding of "yes" or of "no".
    """
    embed: Any = model.language_model.get_input_embeddings()
    yes, no = embed.weight[tokenizer().convert_tokens_to_ids(["yes", "no"])]
    there = torch.tensor([[float(kind in scene.kinds) for kind in KINDS] for scene in scenes])
    return binary_cross_entropy_with_logits(image[:, : len(KINDS)] @ (yes - no), there)


def _echo(
    model: InstructBlipForConditionalGeneration,
    hidden: Float[Tensor, "rows query word"],
    asked: Int[Tensor, " rows"],
) -> Float[Tensor, ""]:
    """Return how badly the queries' states name what they are to look for.

    After a question, their mean is to name the kind in question. For a caption, each of the first
    queries is to name a kind of its own.
    """
    embedding = model.qformer.embeddings.word_embeddings.weight
    names = embedding[tokenizer().convert_tokens_to_ids(list(KINDS))]

    def name(states: Float[Tensor, "state word"], wanted: Int[Tensor, " state"]) -> Tensor:
        states = states * states.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        return cross_entropy(EMBED * states @ names.T, wanted)

    known = asked >= 0
    own = hidden[~known, : len(KINDS)].flatten(0, 1)
    each = torch.arange(len(KINDS)).repeat(int((~known).sum()))
    return name(hidden[known].mean(dim=1), asked[known]) + name(own, each)
