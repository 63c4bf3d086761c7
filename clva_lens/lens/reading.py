"""A model by its name: where it is read from, and what is read there; no code of it is run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
)
from transformers.utils import logging
from transformers.utils.hub import extract_commit_hash
from transformers.utils.import_utils import is_torchvision_available

from clva_lens.ground.errors import ModelLoadError
from clva_lens.ground.registry import did_you_mean
from clva_lens.lens.checkpoint import HUB, check_files, check_size, check_weights
from clva_lens.models.qwen_files import published_folder, register_classes
from clva_lens.toy import pretrained

VISION = 'Install what processors of pictures need: pip install "clva-lens[vision]".'


def read_named(name: str, options: dict[str, Any]) -> tuple[PreTrainedModel, Any, str | None]:
    """Return model, processor and the snapshot's commit of a toy, a folder or a Hub id."""
    published = published_folder(name, **options)  # Qwen-VL has a reader of its own
    source = _source(name, options.get("subfolder", "")) if published is None else published
    toy = source.parent == pretrained.FOLDER
    options = {"dtype": torch.float32 if toy else "auto"} | options
    with _quiet(toy):
        if published is not None:
            from clva_lens.models.qwen.convert import read_published

            commit = extract_commit_hash(str(published / "config.json"), None)
            rest = {key: value for key, value in options.items() if key not in HUB}
            return *read_published(published, **rest), commit
        if source.is_dir():
            options = {key: value for key, value in options.items() if key not in HUB}
        where = str(source) if source.is_dir() else name
        hub = {key: options.pop(key) for key in HUB if key in options}
        folder = check_files(where, hub)
        register_classes(folder)
        commit = extract_commit_hash(str(folder / "config.json"), None)
        if commit is not None:
            hub["revision"] = commit  # everything from one snapshot, whatever is pushed meanwhile
        config = AutoConfig.from_pretrained(where, trust_remote_code=False, **hub)
        check_size(config, folder)
        processor = None
        if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:  # else from_pretrained refuses
            processor = _processor(name, where, hub | ({"backend": "pil"} if toy else {}))
        made: Any = AutoModelForImageTextToText.from_pretrained(
            where,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            # An adapter is looked for where ``check_files`` found none, not at the root. Sizes that
            # do not match are refused below, by their names.
            **{**hub, **options, "adapter_kwargs": hub, "ignore_mismatched_sizes": True},
        )
        model, info = made
        check_weights(model, info, folder)
        return model, processor, commit


@contextmanager
def _quiet(wanted: bool) -> Iterator[None]:
    """Keep transformers from showing a progress bar for a load of milliseconds."""
    if not (wanted and logging.is_progress_bar_enabled()):
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _source(name: str, subfolder: str = "") -> Path:
    """Return the folder of a toy or a local model, or a Hub id as a path that does not exist."""
    if name in pretrained.names():
        return pretrained.FOLDER / name
    folder = Path(name)
    if folder.is_dir():
        folder = folder / subfolder
    if folder.is_file():
        raise ModelLoadError(
            f"'{name}' is a file. Pass the folder that holds config.json and the weights."
        )
    if not folder.is_dir():
        looks_local = name.count("/") != 1 or name.startswith((".", "~", os.sep))
        if looks_local:
            hint = did_you_mean(name, pretrained.names())
            raise ModelLoadError(
                f"there is no model '{name}': no toy (known: {', '.join(pretrained.names())}), no "
                f"folder, and no Hub id ('owner/name').{hint} Check the spelling."
            )
        return folder
    if not (folder / "config.json").is_file():
        raise ModelLoadError(
            f"the folder '{name}' has no config.json, so it holds no transformers model. Pass the "
            "folder that save_pretrained() wrote."
        )
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if pickles:
            raise ModelLoadError(
                f"the folder '{name}' has its weights as a pickle ({pickles[0]}), which can run "
                "code when it is read, and is refused. Convert it to safetensors: load it where "
                "you trust it, then model.save_pretrained(folder)."
            )
        raise ModelLoadError(
            f"the folder '{name}' has no weights (*.safetensors). Download or save the whole model."
        )
    return folder


def _processor(name: str, where: str, options: dict[str, Any]) -> Any:
    """Return the processor, before any weight is read.

    Of toys, the one that prepares pictures with Pillow: torchvision, where it is installed, scales
    them otherwise.
    """
    try:
        return AutoProcessor.from_pretrained(where, trust_remote_code=False, **options)
    except Exception as error:  # a broken file may raise anything
        said = first_line(error)
        if not is_torchvision_available() and "torchvision" in str(error).lower():
            raise ModelLoadError(
                f"the processor of '{name}' needs torchvision, which is not installed: {said} "
                f"{VISION}"
            ) from error
        if isinstance(error, ImportError):
            raise ModelLoadError(
                f"the processor of '{name}' needs a package that is not installed: {said} {VISION}"
            ) from error
        raise ModelLoadError(
            f"the processor of '{name}' could not be loaded: {said} Save it beside "
            "the weights with processor.save_pretrained(folder), or pass (hf_model, processor)."
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, as whole sentences."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = lines[0].strip()
    if line.endswith((".", "!", "?")):
        return line
    whole = line.rfind(". ") + 1 if len(lines) > 1 else 0  # the last sentence goes on below
    return line[:whole] or f"{line}."
