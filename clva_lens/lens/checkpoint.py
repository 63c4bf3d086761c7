"""What a checkpoint must be before it is read, and what its weights must be afterwards."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig
from transformers.utils.hub import cached_file

from clva_lens.ground.errors import ModelLoadError

HUB = (
    "revision",
    "cache_dir",
    "token",
    "subfolder",
    "local_files_only",
    "force_download",
)
"""The options that say which files are meant: of weights, configuration and processor alike."""

KERNELS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""The attention kernels that a configuration may name; any other would be fetched, and run."""

# Made by the model itself, and in some checkpoints all the same.
_COMPUTED = ("inv_freq", "position_ids", "masked_bias", "num_batches_tracked")
_INDEX = "model.safetensors.index.json"
_MANY = 10**8  # fewer weights than this are made up in no time, and then named
_ADAPTER = "adapter_config.json"


def check_files(where: str, hub: Mapping[str, Any]) -> Path:
    """Refuse what must not be followed, from small files only; return the folder they are in.

    Raises:
        ModelLoadError: if the configuration names a kernel that would be fetched, if an adapter
            stands for another model, or if a shard index leads out of the folder.
    """
    config, _ = PreTrainedConfig.get_config_dict(where, **hub)
    for kernel in _kernels(config):
        if kernel not in KERNELS:
            raise ModelLoadError(
                f"the config.json of '{where}' asks for the attention kernel {kernel!r}, which "
                f"transformers would fetch and run. Take that line out of it: known are "
                f"{', '.join(KERNELS)}."
            )
    adapter = _read(where, _ADAPTER, hub)
    if adapter is not None:
        base = adapter.get("base_model_name_or_path")
        raise ModelLoadError(
            f"'{where}' has an {_ADAPTER}, which stands for another model ({base!r}). Load that "
            "one and the adapter with peft, and pass (peft_model, processor)."
        )
    index = _read(where, _INDEX, hub)
    if index is not None:
        named = index.get("weight_map")
        files = set(named.values()) if isinstance(named, dict) else {named}
        for file in sorted(files, key=str):
            if not _is_plain(file):
                raise ModelLoadError(
                    f"the {_INDEX} of '{where}' names {file!r}, but shards are .safetensors files "
                    "beside it. Save the model again with save_pretrained(folder)."
                )
    found = _path(where, "config.json", hub)
    assert found is not None, "the configuration was read from it"
    return found.parent


def _kernels(config: Any) -> Iterator[Any]:
    """Yield the attention kernels that a configuration, or a part of it, names."""
    for key, value in config.items():
        if key.strip("_").startswith("attn_implementation") and value is not None:
            yield from value.values() if isinstance(value, dict) else [value]
        elif isinstance(value, dict):
            yield from _kernels(value)


def _is_plain(file: Any) -> bool:
    return (
        isinstance(file, str)
        and file.endswith(".safetensors")
        and not file.startswith(".")
        and not set(file) & set("/\\:\0")
    )


def _path(where: str, file: str, hub: Mapping[str, Any]) -> Path | None:
    found = cached_file(
        where,
        file,
        **hub,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _read(where: str, file: str, hub: Mapping[str, Any]) -> dict[str, Any] | None:
    path = _path(where, file, hub)
    if path is None:
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ModelLoadError(f"the {file} of '{where}' holds no table. Download it again.")
    return found


def check_size(config: PreTrainedConfig, folder: Path) -> None:
    """Refuse a configuration that asks for far more weights than the files hold.

    One whose sizes were lost has those of some published model, whose missing weights would be
    made up in memory first.

    Raises:
        ModelLoadError: with both numbers.
    """
    held = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as opened:
            shapes = [opened.get_slice(name).get_shape() for name in opened.keys()]  # noqa: SIM118
            held += sum(map(math.prod, shapes))
    if not held or getattr(config, "quantization_config", None) is not None:
        return
    try:
        with torch.device("meta"):
            empty = AutoModelForImageTextToText.from_config(config)
    except Exception:  # from_pretrained says it better
        return
    wanted = sum(parameter.numel() for parameter in empty.parameters())
    if wanted > max(2 * held, _MANY):
        raise ModelLoadError(
            f"the configuration asks for {wanted:,} weights, but the files hold {held:,}. Download "
            "or save config.json and the weights of one model."
        )


def check_weights(model: nn.Module, info: Mapping[str, Any], folder: Path) -> None:
    """Refuse weights that are not exactly the model's: any of them would be made up, or lost.

    ``info`` is ``from_pretrained``'s loading info; ``folder`` holds the files. Tied weights, and
    buffers that the model computes, may be absent or left over.

    Raises:
        ModelLoadError: naming what is missing, left over, of another shape, or no floating point.
    """
    missing, left = set(info["missing_keys"]), set(info["unexpected_keys"])
    left = {name for name in left if name.rpartition(".")[2] not in _COMPUTED}
    other = {one[0] for one in info["mismatched_keys"]}
    whole = set() if _is_quantised(model) else _whole_numbers(model, folder)
    for names, fault in (
        (missing - other, "are missing"),
        (other, "have another shape than the configuration says"),
        (left, "are in no part of the model"),
        (whole, "are whole numbers, not floating point"),
    ):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
            raise ModelLoadError(
                f"{len(names)} of the weights {fault}: {shown}. Download or save the whole model "
                "again; if it is meant so, load it with from_pretrained() and pass (hf_model, "
                "processor)."
            )


def _is_quantised(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "quantization_config", None) is not None


def _whole_numbers(model: nn.Module, folder: Path) -> set[str]:
    """Return the parameters that the files hold as whole numbers or truth values."""
    buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                kind = opened.get_slice(name).get_dtype()
                if kind[0] in "IUB" and kind != "BF16":
                    found.add(name)
    return {name for name in found if name.rpartition(".")[2] not in {*buffers, *_COMPUTED}}


def check_finite(model: nn.Module, name: str) -> None:
    """Refuse weights that hold NaN or an infinity.

    Raises:
        ModelLoadError: naming the first such tensor.
    """
    for where, tensor in model.named_parameters():
        if not _is_finite(tensor.detach()):
            raise ModelLoadError(
                f"the weights of '{name}' hold NaN or infinity in '{where}', so every answer would "
                "be noise. Download or save them again, or try dtype='bfloat16' or 'float32'."
            )


def _is_finite(tensor: Tensor) -> bool:
    known = tensor.is_floating_point() and tensor.element_size() > 1 and not tensor.is_meta
    if not known or tensor.numel() == 0:
        return True
    # The extremes are NaN if any number is, and no copy of the weights is made.
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())
