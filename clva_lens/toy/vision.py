"""Stage 0 of the toy's training: a vision tower that knows, for every patch, what lies there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import CLIPVisionModel, InstructBlipVisionModel

from clva_lens.toy.checkpoint import EVERY, restore_training, save_training
from clva_lens.toy.scenes import COLORS, GRID, KINDS, Scene, render, sample_scene

BATCH = 32


def pixels(scenes: list[Scene]) -> Float[Tensor, "batch 3 height width"]:
    """Return rendered scenes, normalised as the toy's image processor does."""
    stack = torch.as_tensor(np.stack([render(scene) for scene in scenes]))
    return (stack.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25


def patch_labels(scene: Scene) -> Int[np.ndarray, "3 visual"]:
    """Return kind, colour (0 = ground) and half (0 left, 1 right) of every patch."""
    labels = np.zeros((3, GRID, GRID), np.int64)
    labels[2] = np.arange(GRID) >= GRID // 2
    for thing in scene.things:
        alone = Scene(scene.place, (thing,), 0).patches(thing.kind)
        labels[0][alone] = 1 + KINDS.index(thing.kind)
        labels[1][alone] = 1 + list(COLORS).index(thing.color)
    return labels.reshape(3, -1)


def train_vision(
    tower: CLIPVisionModel | InstructBlipVisionModel,
    steps: int,
    seed: int,
    checkpoint: Path,
    advance: Callable[[int, dict[str, float]], None],
) -> None:
    """Train ``tower`` in place on dense labels, going on from ``checkpoint`` if it is there.

    ``advance`` is told each step and its figures.
    """
    torch.manual_seed(seed)
    width = tower.config.hidden_size
    sizes = (1 + len(KINDS), 1 + len(COLORS), 2)
    dense = nn.Linear(width, sum(sizes))
    whole = nn.Linear(width, len(KINDS))
    parts = {"tower": tower, "dense": dense, "whole": whole}
    trained = {
        f"{part}.{name}": parameter
        for part, module in parts.items()
        for name, parameter in module.named_parameters()
    }
    parameters = list(trained.values())
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    layers: Any = tower.encoder.layers
    for layer in layers:
        layer.mlp.compile()
    tower.train()
    for step in range(restore_training(checkpoint, trained, optimiser), steps):
        rate = min(1, (step + 1) / 200) * min(1, 0.03 + 1.6 * (1 - step / steps))
        optimiser.param_groups[0]["lr"] = 1e-3 * rate
        rng = np.random.default_rng([seed, 0, step])
        scenes = [sample_scene(rng) for _ in range(BATCH)]
        labels = torch.as_tensor(np.stack([patch_labels(scene) for scene in scenes]))
        hidden = tower(pixels(scenes)).last_hidden_state
        kind, color, half = dense(hidden[:, 1:]).split(sizes, dim=-1)
        present = torch.stack(
            [torch.tensor([float(kind in scene.kinds) for kind in KINDS]) for scene in scenes]
        )
        loss = cross_entropy(kind.flatten(0, 1), labels[:, 0].flatten())
        loss = loss + 0.7 * cross_entropy(color.flatten(0, 1), labels[:, 1].flatten())
        loss = loss + 0.1 * cross_entropy(half.flatten(0, 1), labels[:, 2].flatten())
        loss = loss + 0.3 * binary_cross_entropy_with_logits(whole(hidden[:, 0]), present)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        if (step + 1) % EVERY == 0:
            save_training(checkpoint, trained, optimiser, step + 1)
        object_patch = labels[:, 0] > 0
        right = (kind.argmax(-1) == labels[:, 0])[object_patch].float().mean()
        hue = (color.argmax(-1) == labels[:, 1])[object_patch].float().mean()
        advance(step, {"loss": loss.item(), "kind": right.item(), "color": hue.item()})
    tower.eval()
