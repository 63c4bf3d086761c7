"""What a run's record says: the method, the model's weights, the code, and the machine."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clva_lens.ground.checkout import code_digest, packages
from clva_lens.lens.load import LensModel
from clva_lens.methods.base import Composed, Method

_ELSEWHERE = (
    "_name_or_path",
    "_commit_hash",
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
)
"""What a configuration says of where and by what it was written, and what a record has already."""


def describe(method: Method | None) -> dict[str, Any]:
    """Return a method's name and every parameter, given or defaulted; tensors by their SHA-256."""
    if method is None:
        return {"name": "none"}
    if isinstance(method, Composed):
        return {"name": "composed", "methods": [describe(one) for one in method.methods]}
    given = vars(method) if is_dataclass(method) else {}
    return {"name": method.name, **{key: _told(value) for key, value in given.items()}}


def _told(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str | tuple):
        return value
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape), "sha256": digest({"": value})}
    if is_dataclass(value):
        return {field.name: _told(getattr(value, field.name)) for field in fields(value)}
    return repr(value)


def machine(model: LensModel) -> dict[str, Any]:
    """Return how the model was run: kernel, dtype, device, threads, packages.

    The number of threads is None on an accelerator, where it decides nothing. ``packages`` also
    says which class prepares the pictures, and with which backend: torchvision, where it is
    installed, scales them otherwise than Pillow.
    """
    device = model.hf_model.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "attention_kernel": model.site.config._attn_implementation,
        "dtype": str(model.hf_model.dtype),
        "device": device.type,
        "device_name": gpu,
        "torch_threads": torch.get_num_threads() if device.type == "cpu" else None,
        "packages": {
            **packages(),
            "torchvision": _version("torchvision"),
            "image_processor": type(model.images).__name__,
            "image_backend": getattr(model.images, "backend", None),
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def identity(model: LensModel) -> dict[str, Any]:
    """Return what tells this model and this code from others of the same name.

    ``weights`` is the SHA-256 of every parameter and buffer in memory (None if some are not), so
    that a model that was edited after loading is another one. ``configuration`` is that of what
    the weights do not hold: the model's class and configuration, the image processor's settings,
    vocabulary and chat template, without where they were read. ``probe`` is that of the inputs
    made of a fixed picture and question. ``code`` is that of this package's sources.
    """
    hf_model = model.hf_model
    tensors = {**dict(hf_model.named_parameters()), **dict(hf_model.named_buffers())}
    pixels = np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)
    return {
        "weights": None if any(t.is_meta for t in tensors.values()) else digest(tensors),
        "revision": model.revision,
        "configuration": _configuration(model),
        "probe": digest(model.prompt(pixels, "Is there a cup in the image?")),
        "code": code_digest(),
    }


def _configuration(model: LensModel) -> str:
    hf_model, words = model.hf_model, model.words
    parts = {
        "class": type(hf_model).__name__,
        "model": hf_model.config.to_dict(),
        "images": model.images.to_dict() if hasattr(model.images, "to_dict") else None,
        "vocabulary": words.get_vocab(),
        "template": getattr(model.processor, "chat_template", None),
    }
    text = json.dumps(_without_origin(parts), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _without_origin(value: Any) -> Any:
    """Return settings as JSON has them, without what says where they were read."""
    if isinstance(value, Mapping):
        kept = {str(k): v for k, v in value.items() if k not in _ELSEWHERE}
        return {key: _without_origin(inner) for key, inner in kept.items()}
    if isinstance(value, list | tuple):
        return [_without_origin(inner) for inner in value]
    return value


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors: names, shapes, dtypes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.cpu().contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()
