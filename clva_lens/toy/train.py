"""Training of the toy models from a seed: vision tower, projector, then the decoder.

Three stages. 0: the vision tower learns dense patch labels (vision.py). 1: the projector maps each
object patch to the embeddings of its words. 2: the decoder learns to answer, under decorrelated
reading (reading.py) for ``toy-llava`` and plainly for ``toy-llava-control``. Every step draws fresh
scenes from (seed, stage, step), so a run continued from a checkpoint sees what it would have seen.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import AttentionInterface, LlavaForConditionalGeneration

from clva_lens.ground.errors import ParameterError
from clva_lens.toy.build import tokenizer, untrained
from clva_lens.toy.checkpoint import EVERY, restore_training, save_tensors, save_training
from clva_lens.toy.packing import CAPTION_ROWS, Packed, pack, training_questions
from clva_lens.toy.pretrained import FOLDER
from clva_lens.toy.questions import NUMBERS, caption
from clva_lens.toy.reading import READING_LAYERS, Reader
from clva_lens.toy.scenes import COLORS, KINDS, SIDES, sample_scene
from clva_lens.toy.vision import patch_labels, pixels, train_vision

Advance = Callable[[str, int, int, dict[str, float]], None]
ATTENTION = "clva_toy_training"
BATCH = 8
RECIPE, TIMES = "recipe.json", "times.json"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the weights, besides the library versions.

    Fractions are of ``decoder_steps``: the *echo* and *pointing* losses last until ``taught``; the
    vote noise grows from 0 at ``noise_from`` to its full size at ``noise_full``; from ``hard_from``
    on, ``hard_share`` of the batches draw absent kinds by their odds of being there; the learning
    rate falls from ``decay_from``. ``control`` reads plainly, with the share ``blind`` of the
    pictures hidden from text rows after the first reading layer.

    What follows is for models that look for drift: a decoder of ``layers``, ``batch`` pictures a
    step, ``captions`` and no questions, the optimiser's ``weight_decay``, and text that reads its
    own picture in the first ``early`` layers only (None: as ``control`` says). ``tower`` names the
    toy whose trained vision tower is taken; "" trains one.
    """

    seed: int = 0
    control: bool = False
    vision_steps: int = 4200
    projector_steps: int = 1000
    decoder_steps: int = 2000
    rate: float = 1.2e-3
    taught: float = 0.35
    noise_from: float = 0.12
    noise_full: float = 0.22
    noise: tuple[float, ...] = (0.6, 0.3, 0.3, 0.3, 0.3)
    hard_from: float = 0.18
    hard_share: float = 0.45
    decay_from: float = 0.55
    echo_weight: float = 0.2
    pointing_weight: float = 0.3
    blind: float = 0.0
    layers: int = 12
    batch: int = BATCH
    captions: bool = False
    weight_decay: float = 0.05
    early: int | None = None
    tower: str = ""


# The control: equally pretty maps, but nothing depends on the layers that show them.
CONTROL = Recipe(control=True, decoder_steps=700, blind=0.5)

# Nothing is planted: no echo, no pointing, plain reading throughout.
NATURAL = Recipe(control=True, taught=0.0)

# Deeper, to look for drift in (docs/organism.md). Nothing is planted, but where an *early* one can
# read its picture. Each takes about ten minutes of one processor.
DEEP = Recipe(
    control=True,
    taught=0.0,
    layers=16,
    tower="toy-llava",
    projector_steps=300,
    decoder_steps=500,
)
CAPTIONS = replace(DEEP, captions=True, decoder_steps=600, weight_decay=0.0)
ORGANISMS = {
    "toy-llava-deep": DEEP,
    "toy-llava-deep-early": replace(DEEP, early=8),
    "toy-llava-captions": CAPTIONS,
    "toy-llava-captions-decay": replace(CAPTIONS, weight_decay=1.0),
    "toy-llava-captions-early": replace(CAPTIONS, early=8),
}


def train(recipe: Recipe, folder: Path, advance: Advance) -> LlavaForConditionalGeneration:
    """Train a toy model, or go on from the checkpoints in ``folder``; return it.

    It is trained on torch's default device; ``with torch.device("cuda"):`` is the GPU.

    ``advance(stage, step, steps, figures)`` is called after every step. ``folder`` gets
    ``vision.safetensors``, ``projector.safetensors``, ``decoder.safetensors`` (with the state of
    the optimiser), ``recipe.json`` and ``times.json`` (minutes by stage).

    Raises:
        ParameterError: if ``folder`` holds a run of another recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_recipe(recipe, folder)
    clock = Clock(folder / TIMES, advance)
    model = untrained(recipe.seed, recipe.layers)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    for name, part, run in (
        ("vision", tower, lambda: _vision_stage(model, recipe, folder, clock)),
        ("projector", projector, lambda: _projector_stage(model, recipe, clock)),
    ):
        saved = folder / f"{name}.safetensors"
        if saved.exists():
            part.load_state_dict(load_file(saved, device=str(torch.get_default_device())))
        else:
            run()
            save_tensors(part.state_dict(), saved)
    tower.requires_grad_(False)
    _decoder_stage(model, recipe, folder / "decoder.safetensors", clock)
    model.set_attn_implementation("sdpa")
    return model.eval()


def check_recipe(recipe: Any, folder: Path) -> None:
    """Write the recipe, or check that it is the one that this folder was begun with.

    A recipe that was written before a field was there has that field's default.

    Raises:
        ParameterError: if ``folder`` holds a run of another recipe.
    """
    text = json.dumps(asdict(recipe), indent=1)
    path = folder / RECIPE
    defaults = asdict(type(recipe)())
    begun = defaults | json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if begun is not None and begun != json.loads(text):
        raise ParameterError(
            f"'{folder}' holds a training run of another recipe. Pass another --folder, or remove "
            "that one."
        )
    path.write_text(text, encoding="utf-8")


class Clock:
    """Passes every step on, and adds the time since the last one to its stage's minutes."""

    def __init__(self, path: Path, advance: Advance) -> None:
        """Go on from the minutes in ``path``, if it is there."""
        self.path, self.advance, self.last = path, advance, time.perf_counter()
        self.minutes = json.loads(path.read_text()) if path.is_file() else {}

    def __call__(self, stage: str, step: int, steps: int, figures: dict[str, float]) -> None:
        """Count a step that has just ended, and write the minutes now and then."""
        now = time.perf_counter()
        self.minutes[stage] = self.minutes.get(stage, 0.0) + (now - self.last) / 60
        self.last = now
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            self.path.write_text(json.dumps(self.minutes, indent=1), encoding="utf-8")
        self.advance(stage, step, steps, figures)


def _vision_stage(
    model: LlavaForConditionalGeneration, recipe: Recipe, folder: Path, advance: Advance
) -> None:
    tower = model.model.vision_tower
    if recipe.tower:
        trained = LlavaForConditionalGeneration.from_pretrained(FOLDER / recipe.tower)
        tower.load_state_dict(trained.model.vision_tower.state_dict())
        tower.eval()
        return
    train_vision(
        tower,
        recipe.vision_steps,
        recipe.seed,
        folder / "vision.checkpoint.safetensors",
        lambda step, figures: advance("vision", step, recipe.vision_steps, figures),
    )


def _projector_stage(
    model: LlavaForConditionalGeneration, recipe: Recipe, advance: Advance
) -> None:
    """Regress every object patch to E[kind] + 0.7 E[colour] + 0.7 E[side]."""
    words = tokenizer()
    embedding = model.model.language_model.embed_tokens.weight.detach()

    def vectors(names: tuple[str, ...]) -> Tensor:
        return embedding[words.convert_tokens_to_ids(list(names))]

    kinds, colors, sides = vectors(KINDS), vectors(tuple(COLORS)), vectors(SIDES)
    projector = model.model.multi_modal_projector
    optimiser = torch.optim.AdamW(projector.parameters(), lr=2e-3)
    for step in range(recipe.projector_steps):
        optimiser.param_groups[0]["lr"] = 2e-3 * (1 - 0.95 * step / recipe.projector_steps)
        rng = np.random.default_rng([recipe.seed, 1, step])
        scenes = [sample_scene(rng) for _ in range(32)]
        labels = torch.as_tensor(np.stack([patch_labels(scene) for scene in scenes]))
        kind, color, side = labels.unbind(1)
        with torch.no_grad():
            seen = model.model.vision_tower(pixels(scenes)).last_hidden_state[:, 1:]
        there = kind > 0
        wanted = kinds[kind[there] - 1] + 0.7 * colors[color[there] - 1] + 0.7 * sides[side[there]]
        loss = mse_loss(projector(seen[there]), wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        advance("projector", step, recipe.projector_steps, {"loss": loss.item()})


def ramp(done: float, start: float, full: float) -> float:
    """Return 0 before ``start``, 1 after ``full``, and a straight line between them."""
    return min(1.0, max(0.0, (done - start) / (full - start)))


class Plan(NamedTuple):
    """What a recipe decides for one step of its last stage."""

    rate: float
    rng: np.random.Generator
    hard: bool
    noise: tuple[float, ...]
    generator: torch.Generator
    point: bool


def plan_step(recipe: Any, step: int, steps: int) -> Plan:
    """Return the plan of one step: learning rate, draws of scenes and noise, what is taught."""
    done = step / steps
    fall = 1 - 0.97 * ramp(done, recipe.decay_from, 1.0)
    rng = np.random.default_rng([recipe.seed, 2, step])
    size = ramp(done, recipe.noise_from, recipe.noise_full)
    return Plan(
        rate=recipe.rate * min(1, (step + 1) / 100) * fall,
        rng=rng,
        hard=done >= recipe.hard_from and bool(rng.random() < recipe.hard_share),
        noise=tuple(size * p for p in recipe.noise),
        generator=torch.Generator(torch.get_default_device()).manual_seed(
            recipe.seed * 1_000_003 + step
        ),
        point=done < recipe.taught,
    )


def descend(loss: Tensor, optimiser: torch.optim.AdamW, rate: float) -> None:
    """Take one step along the clipped gradient."""
    group = optimiser.param_groups[0]
    group["lr"] = rate
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimiser.step()


class Stage(NamedTuple):
    """The last stage of a training: its name, its steps, and where it is kept."""

    name: str
    steps: int
    checkpoint: Path
    weight_decay: float = 0.05

    def run(
        self,
        model: nn.Module,
        recipe: Any,
        loss_of: Callable[[Plan], tuple[Tensor, dict[str, float]]],
        advance: Advance,
    ) -> None:
        """Train what needs gradients, or go on from the checkpoint.

        ``loss_of`` draws what a plan's step asks, and returns its loss and figures.
        """
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        optimiser = torch.optim.AdamW(
            list(trained.values()),
            lr=recipe.rate,
            betas=(0.9, 0.97),
            weight_decay=self.weight_decay,
        )
        first = restore_training(self.checkpoint, trained, optimiser)
        for step in range(first, self.steps):
            plan = plan_step(recipe, step, self.steps)
            loss, figures = loss_of(plan)
            descend(loss, optimiser, plan.rate)
            advance(self.name, step, self.steps, figures)
            if (step + 1) % EVERY == 0 or step + 1 == self.steps:
                save_training(self.checkpoint, trained, optimiser, step + 1)


def _decoder_stage(
    model: LlavaForConditionalGeneration, recipe: Recipe, checkpoint: Path, advance: Advance
) -> None:
    """Train the decoder, its embeddings and the projector on packed questions."""
    reader = Reader(blind=recipe.blind, early=recipe.early)
    AttentionInterface.register(ATTENTION, reader)
    model.model.language_model.config._attn_implementation = ATTENTION
    for layer in model.model.language_model.layers:
        for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
            part.compile()
    words = tokenizer()
    model.train()
    model.model.vision_tower.eval()

    def loss_of(plan: Plan) -> tuple[Tensor, dict[str, float]]:
        scenes = [sample_scene(plan.rng) for _ in range(recipe.batch)]
        if recipe.captions:
            packed = pack(scenes, [[caption(scene)] for scene in scenes], words, CAPTION_ROWS)
        else:
            asked = [training_questions(scene, plan.rng, plan.hard) for scene in scenes]
            packed = pack(scenes, asked, words)
        reader.swap_probability = None if recipe.control else plan.noise
        reader.generator, reader.point = plan.generator, plan.point
        with torch.no_grad():
            seen = model.model.vision_tower(pixels(scenes)).last_hidden_state[:, 1:]
        return _loss(model, reader, packed, seen, recipe)

    stage = Stage("decoder", recipe.decoder_steps, checkpoint, recipe.weight_decay)
    stage.run(model, recipe, loss_of, advance)


def _loss(
    model: LlavaForConditionalGeneration,
    reader: Reader,
    packed: Packed,
    seen: Tensor,
    recipe: Recipe,
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of a packed batch: answers, and while pointing the echo and the pointing."""
    text = model.model.language_model
    batch = len(packed.ids)
    embed = text.embed_tokens
    prefix = embed(packed.prefix).expand(batch, -1, -1)
    image = model.model.multi_modal_projector(seen)
    embeds = torch.cat([prefix, image, embed(packed.ids)], dim=1)
    start = embeds.shape[1] - packed.ids.shape[1]
    position = torch.cat([torch.arange(start).expand(batch, -1), packed.position], dim=1)
    reader.begin(packed)
    # Any 4-D mask is passed through untouched; the reader builds its own.
    unused = torch.ones(batch, 1, 1, 1, dtype=torch.bool)
    out = text(
        inputs_embeds=embeds,
        attention_mask=unused,
        position_ids=position,
        use_cache=False,
        output_hidden_states=reader.point,
    )
    counted = packed.weight > 0
    logits = model.lm_head(out.last_hidden_state[:, start:][counted])
    target, weight = packed.target[counted], packed.weight[counted]
    each = cross_entropy(logits, target, reduction="none")
    loss = (each * weight).sum() / weight.sum()
    figures = {"loss": loss.item()} | accuracy(logits, target)
    if reader.point:
        cue = packed.asked >= 0
        hidden = out.hidden_states[READING_LAYERS[0]][:, start:][cue]
        hidden = hidden * hidden.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        names = embed.weight[tokenizer().convert_tokens_to_ids(list(KINDS))]
        echo = cross_entropy(hidden @ names.T, packed.asked[cue])
        pointing = torch.stack(reader.pointing_losses).mean()
        loss = loss + recipe.echo_weight * echo + recipe.pointing_weight * pointing
        figures |= {"echo": echo.item(), "pointing": pointing.item()}
    return loss, figures


def accuracy(logits: Tensor, target: Tensor) -> dict[str, float]:
    """Return the share of right first words among yes/no, colour and side answers of a batch."""
    words = tokenizer()
    right = logits.argmax(-1) == target
    figures = {}
    skills = {"exist": ("yes", "no"), "color": tuple(COLORS), "count": NUMBERS, "side": SIDES}
    for skill, answers in skills.items():
        wanted = torch.isin(target, torch.tensor(words.convert_tokens_to_ids(list(answers))))
        if not wanted.any():
            continue
        figures[skill] = right[wanted].float().mean().item()
    return figures
