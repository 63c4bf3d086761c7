"""Floating-point operations, counted on a model without weights: what is too large to be run here.

Tensors on the device "meta" have shapes and no values, so a pass of a published model's shape takes
no memory and a second; torch's own counter adds up what each operator would do.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from clva_lens.experiments.speed.models import full_size, random_prompt
from clva_lens.experiments.speed.questions import QUESTIONS
from clva_lens.lens.towers import TowerPrompt, TowerReadings, pictures_read_once
from clva_lens.models.prompt import Prompt


class _NoPadding(TorchDispatchMode):
    """Answers whether masks are all ones, which a tensor without values cannot say, with yes."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True
        return func(*args, **(kwargs or {}))


def flops(model: Any, prompt: Prompt) -> int:
    """Return the floating-point operations of one pass over a batch of prompts, no answer."""
    counted = FlopCounterMode(display=False)
    with torch.no_grad(), _NoPadding(), counted, pictures_read_once(model, prompt):
        model(**prompt, logits_to_keep=1)
    return counted.get_total_flops()


def tower_flops(name: str = "instructblip-7b", questions: int = QUESTIONS) -> dict[str, float]:
    """Return what some questions about one picture cost with its tower read once, over unshared.

    "again" is the same batch under another method, for which the tower was run already.
    """
    model = full_size(name, "meta", torch.bfloat16)
    prompt = random_prompt(model, questions)
    once = TowerPrompt.of(prompt, ["picture"] * questions, TowerReadings())
    whole = flops(model, prompt)
    return {name: flops(model, once) / whole for name in ("once", "again")}
