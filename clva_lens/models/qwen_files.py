"""Whether files are a Qwen-VL's. Only then its classes are imported.

They lean on more of transformers than the rest of the package.
"""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from clva_lens.ground.errors import ModelLoadError

PUBLISHED = ("Qwen/Qwen-VL", "Qwen/Qwen-VL-Chat")


def is_official(found: Mapping[str, Any]) -> bool:
    """Return whether a ``config.json`` is that of the published Qwen-VL, which has remote code."""
    return found.get("model_type") == "qwen" and isinstance(found.get("visual"), Mapping)


def published_folder(name: str, **where: Any) -> Path | None:
    """Return the folder of a published Qwen-VL: ``name``, or its download in the Hub's cache.

    None if ``name`` is another model. Nothing is downloaded. ``where`` are ``from_pretrained``'s
    options, of which ``revision`` and ``cache_dir`` say which download is meant.

    Raises:
        ModelLoadError: if ``name`` is a published Qwen-VL that is not on this machine.
    """
    folder = Path(name)
    if not folder.is_dir():
        try:
            cached = try_to_load_from_cache(
                name,
                "config.json",
                cache_dir=where.get("cache_dir"),
                revision=where.get("revision"),
            )
        except HFValidationError:
            return None
        if not isinstance(cached, str):
            if name not in PUBLISHED:
                return None
            raise ModelLoadError(
                f"'{name}' is published with Python code of its own, which is never run. clva_lens "
                "has the model and converts the published weights, but they are not on this "
                "machine. "
                f"Download them (about 19 GB): hf download {name} --exclude '*.py', and load it "
                "again, or pass the folder."
            )
        folder = Path(cached).parent
    return folder if is_official(_configuration(folder)) else None


def register_classes(folder: Path) -> None:
    """Let transformers know the native Qwen-VL, if that is what a folder holds."""
    if _configuration(folder).get("model_type") == "qwen_vl":
        importlib.import_module("clva_lens.models.qwen")


def _configuration(folder: Path) -> dict[str, Any]:
    """Return what is in a folder's ``config.json``, nothing if it cannot be read."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
