"""Qwen's published code on the cases of ``parity_with_published.py``, in a Python that can run it.

``python published_qwen.py FOLDER WORK`` imports the code in FOLDER, takes configuration, weights,
pictures and cases from WORK, and leaves its logits and token ids there. It imports nothing of
clva_lens: that needs another transformers.
"""

import importlib
import json
import os
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NEEDED = ("torch", "transformers", "tiktoken", "einops", "PIL", "numpy", "matplotlib", "requests")
RUNS_ON = "4.37."


def require_packages() -> dict[str, str]:
    """Return the versions that matter; leave with a sentence where this Python cannot do it."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(f"{sys.executable} has no {', '.join(missing)}")
    import torch
    import transformers

    if not transformers.__version__.startswith(RUNS_ON):
        sys.exit(f"{sys.executable} has transformers {transformers.__version__}, not {RUNS_ON}x")
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision_or_pillow(),
    }


def torchvision_or_pillow() -> str:
    """Return torchvision's version; without it, let Pillow do the four steps that are asked of it.

    On a Pillow picture torchvision's own resize is Pillow's.
    """
    try:
        import torchvision
        import torchvision.transforms
    except (ImportError, RuntimeError):  # RuntimeError: built for another torch
        sys.modules |= {"torchvision": pillow_only(), "torchvision.transforms": pillow_only()}
        return "none: its four transforms by Pillow"
    return torchvision.__version__


def pillow_only() -> Any:
    """Return a module with the names that ``visual.py`` imports from torchvision."""
    import numpy as np
    import torch
    from PIL import Image

    def compose(steps):
        def run(image):
            for step in steps:
                image = step(image)
            return image

        return run

    def normalise(mean, std):
        mean, std = (torch.tensor(one)[:, None, None] for one in (mean, std))
        return lambda pixels: (pixels - mean) / std

    made: Any = types.ModuleType("torchvision")
    made.transforms = made
    made.Compose, made.Normalize = compose, normalise
    made.Resize = lambda size, interpolation: lambda image: image.resize(size, interpolation)
    made.ToTensor = lambda: lambda image: torch.tensor(np.array(image)).permute(2, 0, 1) / 255
    made.InterpolationMode = types.SimpleNamespace(BICUBIC=Image.Resampling.BICUBIC)
    return made


def published(folder: Path, module: str) -> Any:
    """Return a module of the published code, imported from where it lies."""
    if "published" not in sys.modules:
        package = types.ModuleType("published")
        package.__path__ = [str(folder)]
        sys.modules["published"] = package
    return importlib.import_module(f"published.{module}")


def prompt_ids(folder: Path, tokenizer: Any, asked: dict) -> list[int]:
    """Return a prompt's ids: ChatML by make_context(), or the text as it is for the base model."""
    if asked["format"] == "raw":
        return tokenizer.encode(asked["query"])
    history = [tuple(turn) for turn in asked["history"]]
    making = published(folder, "qwen_generation_utils").make_context
    return making(tokenizer, asked["query"], history, asked["system"], chat_format="chatml")[1]


def with_paths(rows: list[list[int]], pictures: list[str], start: int) -> list[list[int]]:
    """Return the rows with each picture's path where the code looks for it: after ``<img>``."""
    rows, paths = [list(row) for row in rows], iter(pictures)
    for row in rows:
        for place in [at for at, one in enumerate(row) if one == start]:
            path = next(paths).encode()
            row[place + 1 : place + 1 + len(path)] = path
    return rows


def run(model: Any, case: dict) -> tuple:
    """Return the logits [batch, position, vocabulary], and the answer's ids if one is asked for.

    ``case["then"]`` are tokens read one by one, with the cache; their rows come last.
    """
    import torch
    from transformers import GenerationConfig

    ids, mask = torch.tensor(case["ids"]), torch.tensor(case["mask"])
    out = model(ids, attention_mask=mask, use_cache=True)
    logits = [out.logits]
    for one in case["then"]:
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        past, given = out.past_key_values, torch.tensor([[one]])
        out = model(given, attention_mask=mask, past_key_values=past, use_cache=True)
        logits.append(out.logits)
    answer = []
    if case["answer"]:
        decoding = GenerationConfig(do_sample=False, max_new_tokens=case["answer"], pad_token_id=0)
        whole = model.generate(ids, attention_mask=mask, generation_config=decoding)
        answer = whole[0, ids.shape[1] :].tolist()
    return torch.cat(logits, dim=1).contiguous(), answer


def main(folder: Path, work: Path) -> None:
    """Write ``logits.safetensors`` and ``said.json`` into ``work``."""
    said: dict[str, Any] = {"versions": require_packages()}
    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    os.chdir(work)  # prompts name pictures by short paths
    asked = json.loads(Path("cases.json").read_text())
    qwen, words = published(folder, "modeling_qwen"), published(folder, "tokenization_qwen")
    config = json.loads(Path("chat/config.json").read_text()) | {"fp32": True}
    model = qwen.QWenLMHeadModel(qwen.QWenConfig(**config))
    model.load_state_dict(load_file("chat/model.safetensors"))  # all, and no other
    model.eval()
    tokenizer = words.QWenTokenizer("chat/qwen.tiktoken")
    said["prompts"] = {
        name: prompt_ids(folder, tokenizer, one) for name, one in asked["prompts"].items()
    }
    start, kept, said["answers"] = config["visual"]["image_start_id"], {}, {}
    cases = {
        name: case | {"ids": with_paths(case["ids"], case["pictures"], start)}
        for name, case in asked["cases"].items()
    } | {
        name: {"ids": [ids], "mask": [[1] * len(ids)], "then": [], "answer": 0}
        for name, ids in said["prompts"].items()
    }
    with torch.inference_mode():
        for name, case in cases.items():
            kept[name], said["answers"][name] = run(model, case)
        picture = words.Image.open(asked["picture"]).convert("RGB")
        kept["pixels"] = model.transformer.visual.image_transform(picture)[None].contiguous()
        kept["picture tokens"] = model.transformer.visual.encode([asked["picture"]])
    said["shown"] = tokenizer.from_list_format([{"image": asked["picture"]}, {"text": "?"}])
    said["texts"] = {
        path: [words.QWenTokenizer(path).encode(text) for text in asked["texts"]]
        for path in asked["vocabularies"]
    }
    save_file(kept, "logits.safetensors")
    Path("said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
