"""Training checkpoints as safetensors: weights, the optimiser's state, and the steps done."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clva_lens.ground.files import taking_place

EVERY = 100
_STATE = ("exp_avg", "exp_avg_sq")


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors so that an interrupted write leaves the old file whole."""
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with taking_place(path) as part:
        save_file(whole, part)


def save_training(
    path: Path, trained: Mapping[str, nn.Parameter], optimiser: torch.optim.AdamW, step: int
) -> None:
    """Write the trained parameters and their optimiser state after ``step`` steps."""
    tensors: dict[str, Tensor] = {"step": torch.tensor(step)}
    for name, parameter in trained.items():
        tensors[f"model.{name}"] = parameter
        # A parameter that no loss reaches has no state.
        known = optimiser.state.get(parameter, {})
        tensors |= {f"{key}.{name}": known[key] for key in _STATE if key in known}
    save_tensors(tensors, path)


def restore_training(
    path: Path, trained: Mapping[str, nn.Parameter], optimiser: torch.optim.AdamW
) -> int:
    """Load what ``save_training`` wrote; return the steps done, 0 if there is no checkpoint."""
    if not path.is_file():
        return 0
    tensors = load_file(path, device=str(torch.get_default_device()))
    step = tensors["step"].cpu()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[f"model.{name}"])
            state = {k: tensors[f"{k}.{name}"] for k in _STATE if f"{k}.{name}" in tensors}
            if state:
                optimiser.state[parameter] = {"step": step.float().clone(), **state}
    return int(step)
