"""Hostile decodings, methods, heads and checkpoints (hostile_inputs.py)."""

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile_doors import QUESTION, REFUSAL, Case, World
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, GenerationConfig

import clva_lens as cl
from clva_lens.methods.base import METHODS
from clva_lens.toy import pretrained

ODD = (
    None, -1, 0, 1, 1.5, -0.5, 1e-45, 1e30, math.nan, math.inf, "x", "", [], [0], {}, True, b"x",
    2**63,
)  # fmt: skip
STEPS = 3


# ── decodings, methods, places ──


def a_decoding(draws: random.Random, world: World) -> Case:
    """A decoding with odd values, against transformers' own search or sampling written out."""
    lens, _ = draws.choice(world.toys)
    model = lens.hf_model
    kind = draws.choice((cl.Greedy, cl.Beam, cl.Sampling, cl.FromCheckpoint))
    usual = {"max_new_tokens": STEPS}
    odd = draws.choice([one.name for one in fields(kind)])
    more = {
        "max_new_tokens": (2, 500),
        "num_beams": (1, 2, 7, 100),
        "top_p": (1e-12, 0.5),
        "seed": (-2, 2**63),
    }
    values = usual | {odd: draws.choice((*ODD, *more.get(odd, (0.3, 7.0))))}
    prompt = lens.prompt(world.image, QUESTION)

    def call() -> Any:
        found = cl.generate(lens, prompt, None, kind(**values), progress=False)
        return found.ids[0].tolist()

    def wanted() -> Any:
        ids = {"eos_token_id": lens.words.eos_token_id, "pad_token_id": lens.words.pad_token_id}
        length, beams = values["max_new_tokens"], values.get("num_beams", 5)
        if kind is cl.Sampling:
            return sampled(lens, prompt, **values)
        config = GenerationConfig(
            max_new_tokens=length, num_beams=beams if kind is cl.Beam else 1, do_sample=False, **ids
        )
        row = model.generate(**prompt.inputs, generation_config=config)[0, prompt.answer_start :]
        return [token for token in row.tolist() if token not in ids.values()]

    return Case(f"{kind.__name__} {values}", call, wanted)


def sampled(
    lens: Any,
    prompt: Any,
    max_new_tokens: int,
    seed: int = 0,
    temperature: float = 1,
    top_p: float = 1,
) -> list[int]:
    """Nucleus sampling by whole passes, in float64."""
    numbers = np.random.Generator(np.random.Philox(key=seed % 2**64)).random(max_new_tokens)
    inputs, answer = dict(prompt.inputs), []
    for number in numbers:
        with torch.no_grad():
            logits = lens.hf_model(**inputs).logits[0, -1].double()
        share = ((logits - logits.max()) / temperature).softmax(dim=-1)
        order = share.argsort(descending=True)
        before = share[order].cumsum(0) - share[order]
        share[order[before >= top_p]] = 0
        token = int((share.cumsum(0) > number * share.sum()).nonzero()[0])
        if token in (lens.words.eos_token_id, lens.words.pad_token_id):
            break
        answer.append(token)
        ids = torch.cat([inputs["input_ids"], torch.tensor([[token]])], dim=1)
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return answer


def a_method(draws: random.Random, world: World) -> Case:
    """A method with an odd parameter: the fused kernel against the eager one."""
    fused, eager = draws.choice(world.toys)
    kind = METHODS.get(draws.choice([name for name in METHODS.names() if name != "opera"]))
    field = draws.choice(fields(kind)).name
    value = draws.choice(
        (*ODD, 0.3, 0.9, 2, 7.0, 11, 12, "first", "qformer", (1, 2), range(3), torch.ones(12, 8))
    )

    def logits(lens: Any) -> Any:
        with torch.no_grad(), cl.intervening(lens, kind(**{field: value})):
            last = lens.hf_model(**lens.prompt(world.image, QUESTION)).logits[:, -1]
        return last.clamp(min=-1e4)

    return Case(
        f"{kind.__name__}({field}={value!r:.60})",
        lambda: logits(fused),
        lambda: logits(eager),
    )


def a_place(draws: random.Random, world: World) -> Case:
    """Heads and layers, in any format, against all heads named one by one."""
    lens, depth, heads = world.lens, 12, world.lens.site.config.num_attention_heads
    pairs = [(draws.randrange(-1, depth + 1), draws.randrange(-1, heads + 1)) for _ in range(3)]
    if draws.random() < 0.6:
        pairs = [(layer % depth, head % heads) for layer, head in pairs]
    table = {layer: [head for at, head in pairs if at == layer] for layer, _ in pairs}
    flags = torch.zeros(depth, heads, dtype=torch.bool)
    for layer, head in pairs:
        flags[layer % depth, head % heads] = True
    within = all(0 <= layer < depth and 0 <= head < heads for layer, head in pairs)
    forms = {
        "pairs": pairs, "arrays": np.array(pairs), "tensor": torch.tensor(pairs), "table": table,
        "lists": [list(pair) for pair in pairs], "flags": flags, "flag lists": flags.tolist(),
        "NumPy flags": flags.numpy(), "floats": flags.float(), "short flags": flags[:, :-1],
        "triples": [(*pair, 0) for pair in pairs], "words": ["x"], "numbers": [1, 2], "None": None,
        "nothing": [], "class": "sensitive", "no class": "visual", "text keys": {"1": [0]},
        "a number": 3, "a set": set(pairs), "text": "3.1",
    }  # fmt: skip
    form = draws.choice(tuple(forms))

    def logits(heads: Any, asked: Any = lens) -> Any:
        method = () if heads is Ellipsis else (cl.AblateHeads(heads=heads),)
        with torch.no_grad(), cl.intervening(asked, *method):
            return asked.hf_model(**lens.prompt(world.image, QUESTION)).logits[:, -1]

    def wanted() -> Any:
        if form == "class":
            return logits("sensitive", world.toys[0][1])
        if form == "nothing":
            return logits(...)
        known = form in ("pairs", "arrays", "tensor", "table", "lists", "a set") and within
        if not known and form not in ("flags", "flag lists", "NumPy flags"):
            return REFUSAL
        return logits([divmod(int(i), heads) for i in flags.flatten().nonzero()[:, 0]])

    return Case(f"heads as {form}: {forms[form]!r:.80}", lambda: logits(forms[form]), wanted)


# ── checkpoints ──


def a_checkpoint(draws: random.Random, world: World) -> Case:
    """The toy's folder with one thing changed, against transformers' own reading of it."""
    folder = world.folder / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pretrained.FOLDER / "toy-llava", folder)
    if draws.random() < 0.5:
        name = edit_table(draws, folder)
    else:
        tensors = load_file(folder / "model.safetensors")
        key, edit = draws.choice(list(tensors)), draws.choice(tuple(TENSORS))
        TENSORS[edit](tensors, key)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        name = f"{key} {edit}"

    def call() -> Any:
        made = cl.load(folder)
        inputs = made.prompt(world.image, QUESTION)
        with torch.no_grad():
            return made.hf_model(**inputs).logits[:, -1]

    def wanted() -> Any:
        model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        if any(info[kind] for kind in ("missing_keys", "mismatched_keys", "unexpected_keys")):
            return REFUSAL
        inputs = cl.load((model, cl.load(folder, check=False).processor), check=False).prompt(
            world.image, QUESTION
        )
        with torch.no_grad():
            last = model(**inputs).logits[:, -1]
        return last if last.isfinite().all() else REFUSAL

    return Case(name, call, wanted)


def renamed(tensors: dict[str, Any], key: str) -> None:
    """Give a tensor another name."""
    tensors[f"{key}.old"] = tensors.pop(key)


def put(change: Callable[[Any], Any]) -> Callable[[dict[str, Any], str], None]:
    """Return the edit that replaces a tensor."""

    def edit(tensors: dict[str, Any], key: str) -> None:
        tensors[key] = change(tensors[key].clone()).contiguous()

    return edit


TENSORS: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "missing": lambda tensors, key: tensors.pop(key),
    "renamed": renamed,
    "NaN": put(lambda one: one.fill_(math.nan)),
    "infinite": put(lambda one: one.fill_(math.inf)),
    "short": put(lambda one: one[:-1]),
    "flat": put(lambda one: one.flatten()),
    "whole numbers": put(lambda one: one.int()),
    "truth values": put(lambda one: one.bool()),
    "half": put(lambda one: one.half()),
    "bfloat16": put(lambda one: one.bfloat16()),
    "double": put(lambda one: one.double()),
    "zeros": put(torch.zeros_like),
}


def edit_table(draws: random.Random, folder: Path) -> str:
    """Change one value of one of the JSON files, at any depth; return what."""
    file = draws.choice(
        (
            "config.json",
            "config.json",
            "processor_config.json",
            "tokenizer_config.json",
            "generation_config.json",
            "tokenizer.json",
        )
    )
    table = json.loads((folder / file).read_text())
    place, path = table, [file]
    while True:
        key = draws.choice(list(place) if isinstance(place, dict) else range(len(place)))
        path.append(str(key))
        inner = place[key]
        if isinstance(inner, dict | list) and inner and draws.random() < 0.8:
            place = inner
            continue
        break
    value = draws.choice((None, -1, 0, "x", [], {}, 1.5, 2, True, False))
    if value is None and draws.random() < 0.5 and isinstance(place, dict):
        del place[key]
    else:
        place[key] = value
    (folder / file).write_text(json.dumps(table))
    return f"{'.'.join(path)} = {value!r}"
