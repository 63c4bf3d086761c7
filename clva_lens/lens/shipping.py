"""A loaded model for another process: its class, configuration and tensors, and nothing kept on it.

Modules cannot be sent as they are: nnsight and transformers keep hooks on them that belong to a
process.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from clva_lens.ground.errors import ModelLoadError
from clva_lens.lens.load import LensModel


@dataclass(frozen=True, eq=False)
class Shipped:
    """A model and its processor, made again where this is called."""

    kind: type[PreTrainedModel]
    config: Any
    generation_config: Any
    tensors: dict[str, Tensor]
    device: str
    parts: tuple[Any, str, str | None]

    def __call__(self) -> LensModel:
        """Return the model; its weights are compared with those it had (see ``workers``)."""
        model = self.kind._from_config(self.config)
        made = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        with torch.no_grad():
            for name, tensor in made.items():
                tensor.data = self.tensors[name].to(self.device)
        model.generation_config = self.generation_config
        return LensModel(model.eval(), *self.parts)


def shipped(model: LensModel) -> Shipped:
    """Return a model to be sent.

    Raises:
        ModelLoadError: if it is split over devices, has adapters or is quantized, so that its class
            and tensors are not all there is to it.
    """
    found = model.hf_model
    tensors = {**dict(found.named_parameters()), **dict(found.named_buffers())}
    devices = {one.device for one in tensors.values()}
    adapted = getattr(found, "_hf_peft_config_loaded", False)
    plain = isinstance(found, PreTrainedModel) and not adapted
    if not plain or len(devices) > 1 or getattr(found, "hf_quantizer", None) is not None:
        raise ModelLoadError(
            f"the model '{model.name}' cannot be sent to workers as it is: it has adapters, is "
            "quantized, or lies on several devices. Save it to a folder that all workers can read, "
            "and pass its name: clva-lens run --engine ray --model FOLDER."
        )
    (device,) = devices
    parts = model.processor, model.name, model.revision
    held = {name: one.detach().cpu() for name, one in tensors.items()}
    return Shipped(type(found), found.config, found.generation_config, held, device.type, parts)
