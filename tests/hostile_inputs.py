"""Hostile inputs by the thousand, through every door; counts what came of them.

``python tests/hostile_inputs.py [seed] [share]`` prints a table: each input's outcome is **equal**
(to an expectation that is worked out without clva_lens), **refused** (one of its errors), **bare**
(any other exception) or **different** (another result, or one where a refusal was due). The last
two are faults, and are listed. ``share`` scales the numbers of inputs. Not collected by pytest.
"""

import copy
import io
import json
import math
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, GenerationConfig
from transformers.utils import logging

import clva_lens as cl
from clva_lens.ground.errors import ClvaLensError
from clva_lens.methods.base import METHODS
from clva_lens.toy import pretrained
from clva_lens.toy.scenes import render, sample_scenes

REFUSAL = object()
"""The expectation of what must not be accepted."""

QUESTION = "Is there a cup in the image?"
ODD = (
    None,
    -1,
    0,
    1,
    1.5,
    -0.5,
    1e-45,
    1e30,
    math.nan,
    math.inf,
    "x",
    "",
    [],
    [0],
    {},
    True,
    b"x",
    2**70,
)
STEPS = 3


@dataclass
class Case:
    """One input: what is done with it, and what should come out (REFUSAL: nothing)."""

    name: str
    call: Callable[[], Any]
    expected: Callable[[], Any]


@dataclass
class World:
    """The models that are asked."""

    lens: Any
    eager: Any
    image: np.ndarray
    folder: Path


def main(seed: int = 0, share: float = 1.0) -> int:
    """Run all doors, print the counts and the faults; return their number."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        lens = cl.load("toy-llava")
        eager = cl.load("toy-llava", attn_implementation="eager", check=False)
        image = np.array(render(sample_scenes(1, seed=7)[0]))
        world = World(lens, eager, image, Path(folder))
        before = [parameter.sum().item() for parameter in lens.hf_model.parameters()]
        total: Counter = Counter()
        for door, (made, count) in DOORS.items():
            counted, bad, began = Counter(), [], time.perf_counter()
            draws = random.Random(f"{seed} {door}")
            for _ in range(round(count * share)):
                case = made(draws, world)
                outcome, said = outcome_of(case)
                counted[outcome] += 1
                if outcome in ("bare", "different"):
                    bad.append(f"    {outcome}: {case.name}: {said}")
            total += counted
            show(door, counted, time.perf_counter() - began)
            print("\n".join(bad), flush=True) if bad else None
            faults += len(bad)
        show("all", total, 0)
        after = [parameter.sum().item() for parameter in lens.hf_model.parameters()]
        print("the model is as it was" if before == after else "THE MODEL HAS CHANGED")
    return faults + (before != after)


def show(door: str, counted: Counter, seconds: float) -> None:
    """Print one line of the table."""
    kinds = ("equal", "refused", "bare", "different")
    told = ", ".join(f"{counted[kind]} {kind}" for kind in kinds)
    print(f"{door}: {sum(counted.values())} inputs: {told} ({seconds:.0f} s)", flush=True)


def outcome_of(case: Case) -> tuple[str, str]:
    """Run one input; return what came of it, and the fault in words."""
    try:
        found = case.call()
    except ClvaLensError as error:
        whole = len(str(error)) > 30
        return ("refused", "") if whole else ("bare", f"no sentence: {error}")
    except Exception as error:  # what is looked for
        return "bare", f"{type(error).__name__}: {str(error)[:160]!r}"
    try:
        wanted = case.expected()
    except Exception as error:  # outside software refuses it
        return "different", f"was accepted, but {type(error).__name__}: {str(error)[:120]!r}"
    if wanted is REFUSAL:
        return "different", f"was accepted: {str(found)[:80]}"
    return (
        ("equal", "") if same(found, wanted) else ("different", f"{found!s:.80} != {wanted!s:.80}")
    )


def same(found: Any, wanted: Any) -> bool:
    """Whether two results agree; numbers to 1e-3."""
    if isinstance(wanted, torch.Tensor):
        if found.shape != wanted.shape:
            return False
        gap = (found.double() - wanted.double()).abs()
        return bool((gap <= 1e-3).all())
    if isinstance(wanted, list | tuple):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    if isinstance(wanted, float):
        return abs(found - wanted) <= 1e-3
    return found == wanted


# ── pictures ──

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I", "F", "PA")
FORMATS = {"PNG": MODES, "JPEG": ("L", "RGB", "CMYK"), "TIFF": MODES, "WEBP": ("RGB", "RGBA")}


def a_picture(draws: random.Random, world: World) -> Case:
    """A picture of any mode, size, turn and kind of source, whole or damaged."""
    if draws.random() < 0.3:
        return an_array(draws, world)
    mode = draws.choice(MODES)
    pixels = np.random.default_rng(draws.randrange(2**32))
    size = (draws.choice((1, 7, 40, 64, 130)), draws.choice((1, 16, 64, 90)))
    deep = {"I;16": (np.uint16, 65536), "I": (np.int32, 70000), "F": (np.float32, 2)}
    kind, top = deep.get(mode, (np.uint8, 256))
    if kind is np.uint8:
        colours = Image.fromarray(pixels.integers(0, 256, (*size[::-1], 4), dtype=np.uint8), "RGBA")
        made = colours.convert(mode) if mode in ("LA", "RGBA") else colours.convert("RGB")
        made = made.convert("LAB" if mode == "LAB" else mode) if mode not in ("LAB", "PA") else made
    else:
        made = Image.fromarray((pixels.random(size[::-1]) * draws.choice((1, top))).astype(kind))
    if mode == "P" and draws.random() < 0.5:
        made.info["transparency"] = 3
    way = draws.choice(("image", "bytes", "file", "path", "Path"))
    turn = draws.choice((None, 1, 2, 3, 4, 5, 6, 7, 8, 0, 9))
    suited = [name for name, modes in FORMATS.items() if made.mode in modes]
    if way == "image" or not suited:
        if turn is not None:
            made.getexif()[0x0112] = turn
        return picture_case(f"{mode} {size} turned {turn}", world, lambda: made)
    data, exif = io.BytesIO(), Image.Exif()
    if turn is not None:
        exif[0x0112] = turn
    try:
        made.save(data, format=draws.choice(suited), exif=exif)
    except (OSError, ValueError):
        made.convert("RGB").save(data, format="PNG", exif=exif)
    raw, harm = (
        bytearray(data.getvalue()),
        draws.choice(("none", "none", "cut", "flip", "head", "zeros")),
    )
    if harm == "cut":
        del raw[draws.randrange(len(raw)) :]
    elif harm == "flip":
        raw[draws.randrange(len(raw) // 3, len(raw))] ^= 1 << draws.randrange(8)
    elif harm == "head":
        raw[draws.randrange(8)] ^= 0xFF
    elif harm == "zeros":
        start = draws.randrange(len(raw))
        raw[start : start + 20] = bytes(len(raw[start : start + 20]))
    whole = bytes(raw)
    path = world.folder / "picture"
    path.write_bytes(whole)
    ways = {"bytes": lambda: whole, "file": lambda: io.BytesIO(whole)}
    ways |= {"path": lambda: str(path), "Path": lambda: path}
    return picture_case(
        f"{mode} {size} turned {turn}, {harm}, as {way}",
        world,
        ways[way],
        lambda: io.BytesIO(whole),
    )


def picture_case(name: str, world: World, given: Any, source: Any = None) -> Case:
    """The pixels of a prompt against those that the processor makes of what Pillow reads."""

    def wanted() -> Any:
        opened = Image.open(source()) if source else given()
        return world.lens.processor.image_processor(
            images=by_the_book(opened), return_tensors="pt"
        )["pixel_values"]

    return Case(name, lambda: world.lens.prompt(given(), QUESTION)["pixel_values"], wanted)


def by_the_book(opened: Image.Image) -> Image.Image:
    """Return a picture upright, on white, in eight bits: written out once more, in NumPy."""
    opened.load()
    turned = ImageOps.exif_transpose(opened)
    values = np.asarray(turned)
    if turned.mode in ("I", "F") or turned.mode.startswith("I;16"):
        if turned.mode == "I":
            raise ValueError("32 bits have no known range")
        if turned.mode == "F" and not (values.min() >= 0 and values.max() <= 1):
            raise ValueError("out of range")
        scaled = np.round(values * 255.0) if turned.mode == "F" else values // 256
        return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
    if turned.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in turned.info:
        layers = np.asarray(turned.convert("RGBA")).astype(float)
        alpha = layers[..., 3:] / 255
        return Image.fromarray(
            np.round(layers[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
        )
    return turned.convert("RGB")


def an_array(draws: random.Random, world: World) -> Case:
    """An array or a tensor of any type, range and number of axes."""
    kinds = (
        np.uint8,
        np.uint16,
        np.int64,
        np.float32,
        np.float64,
        np.float16,
        bool,
        object,
        complex,
    )
    kind = draws.choice(kinds)
    shape = draws.choice(
        (
            (8, 9),
            (8, 9, 1),
            (8, 9, 2),
            (8, 9, 3),
            (8, 9, 4),
            (3, 8, 9),
            (8, 9, 5),
            (0, 9, 3),
            (8,),
            (),
            (1, 8, 9, 3),
            (1, 900, 3),
        )
    )
    values = np.random.default_rng(draws.randrange(2**32)).random(shape)
    values = np.asarray(values * draws.choice((1, 1, 255, -1, math.nan, 60000)))
    with np.errstate(all="ignore"):
        array = values.astype(kind)
    tensor = draws.random() < 0.4 and kind is not object
    given = torch.as_tensor(array) if tensor else array

    def wanted() -> Any:
        channels = array.shape[2] if array.ndim == 3 else 1
        usual = array.ndim in (2, 3) and channels in (1, 2, 3, 4) and array.size
        if not usual or max(array.shape[:2]) > 200 * min(array.shape[:2]):
            return REFUSAL
        flat = array[:, :, 0] if array.ndim == 3 and channels == 1 else array
        if kind is bool:
            eight = flat.astype(np.uint8) * 255
        elif kind in (np.uint8, np.uint16):
            eight = flat if kind is np.uint8 else (flat // 256).astype(np.uint8)
        elif kind in (np.float16, np.float32, np.float64):
            if not (flat.min() >= 0 and flat.max() <= 1):
                return REFUSAL
            finer = flat.astype(np.promote_types(kind, np.float32))
            eight = np.round(finer * 255).astype(np.uint8)
        else:
            return REFUSAL
        return world.lens.processor.image_processor(
            images=by_the_book(Image.fromarray(eight)), return_tensors="pt"
        )["pixel_values"]

    name = f"{'tensor' if tensor else 'array'} {array.dtype} {shape}"
    return Case(name, lambda: world.lens.prompt(given, QUESTION)["pixel_values"], wanted)


# ── texts ──

PIECES = (
    "is there a cup ?", "<image>", "</s>", "<s>", "<unk>", "<pad>", "< image >", "\n", "\0", "\u202e",
    "\ud800", "é", "e\u0301", "猫", "🙂", "zebra", " ", "\t", "USER:", "ASSISTANT:", "{{ x }}", "{% if %}",
    "%s", "\\n", "a" * 300, "CUP", "<|im_end|>", "\ufeff", "\u00a0", "0", "is " * 200,
)  # fmt: skip


def a_text(draws: random.Random, world: World) -> Case:
    """A question, a system message and earlier turns of odd pieces, or of no text at all."""
    lens, words = world.lens, world.lens.words

    def odd() -> Any:
        if draws.random() < 0.08:
            return draws.choice((None, 3, b"x", ["a", 3], {}, [], math.nan, object()))
        return draws.choice(("", " ")).join(draws.choices(PIECES, k=draws.randrange(0, 4)))

    question, options = odd(), {}
    if draws.random() < 0.3:
        options["system"] = odd()
    if draws.random() < 0.3:
        options["turns"] = [(odd(), odd())] if draws.random() < 0.8 else odd()
    if draws.random() < 0.2:
        options["answer"] = odd()

    def wanted() -> Any:
        texts = [question, *options.get("turns", [()])[0]]
        texts += [options[name] for name in ("system", "answer") if options.get(name) is not None]
        if not all(isinstance(one, str) for one in texts):
            return REFUSAL
        if any(token in one for one in texts for token in words.all_special_tokens):
            return REFUSAL
        turns = options.get("turns", [])
        said = [(text, role) for turn in turns for text, role in zip(turn, ("user", "assistant"))]
        said.append((question, "user"))
        messages = [{"role": role, "content": text} for text, role in said]
        picture = [{"type": "image"}, {"type": "text", "text": said[0][0]}]
        messages[0] = {"role": "user", "content": picture}
        if options.get("system") is not None:
            messages.insert(0, {"role": "system", "content": options["system"]})
        text = lens.processor.apply_chat_template(messages, add_generation_prompt=True)
        if options.get("answer") is not None:
            begun = options["answer"]
            text += begun if begun[:1].isspace() or text[-1:].isspace() else f" {begun}"
        found = lens.processor(images=Image.fromarray(world.image), text=text, return_tensors="pt")
        return found["input_ids"] if found["input_ids"].shape[1] <= 512 else REFUSAL

    return Case(
        f"{question!r:.80} {options!r:.80}",
        lambda: lens.prompt(world.image, question, **options)["input_ids"],
        wanted,
    )


# ── what a processor made, edited ──


def an_edited_prompt(draws: random.Random, world: World) -> Case:
    """One input of a prompt changed, left out, or of another type; answered as it is, or refused."""
    lens = world.lens
    inputs = {name: one.clone() for name, one in lens.prompt(world.image, QUESTION).items()}
    name = draws.choice((*inputs, "position_ids", "labels", "junk"))
    ids = inputs["input_ids"]
    value = inputs.get(name, ids)
    where = draws.randrange(value.shape[-1])
    edits: dict[str, Callable[[], Any]] = {
        "left out": lambda: None,
        "a list": lambda: value.tolist(),
        "NumPy": lambda: value.numpy(),
        "a word": lambda: "x",
        "zeros": lambda: torch.zeros_like(value),
        "cut": lambda: value[..., :-1],
        "no batch": lambda: value[0],
        "two of a batch": lambda: torch.cat([value, value]),
        "empty": lambda: value[:0],
        "float": lambda: value.double(),
        "half": lambda: value.half(),
        "int32": lambda: value.int(),
        "negated": lambda: -value,
        "one changed": lambda: value.index_fill(-1, torch.tensor([where]), 3),
        "out of range": lambda: value.index_fill(-1, torch.tensor([where]), 10**6),
        "an image token more": lambda: value.index_fill(-1, torch.tensor([where]), 5),
        "not finite": lambda: value.double().index_fill(-1, torch.tensor([where]), math.nan),
        "bool": lambda: value.bool(),
    }
    edit = draws.choice(tuple(edits))
    changed = edits[edit]()
    inputs = {key: one for key, one in inputs.items() if key != name}
    if edit != "left out":
        inputs[name] = changed
    door = draws.choice(("generate", "trace_attention", "run_with_cache"))

    def call() -> Any:
        if door == "generate":
            how = cl.Greedy(max_new_tokens=1)
            found = cl.generate(lens, inputs, decoding=how, progress=False)
            return found.ids[0].tolist()
        if door == "trace_attention":
            return cl.trace_attention(lens, inputs).logits
        return lens.run_with_cache(inputs, "blocks.0.hook_resid_pre").logits[:, -1]

    def wanted() -> Any:
        given = {key: one for key, one in inputs.items() if isinstance(one, torch.Tensor)}
        given.pop("labels", None)
        ints = given["input_ids"].dtype in (torch.int32, torch.int64)
        mask = given.get("attention_mask", given["input_ids"])
        if "junk" in inputs or any(
            isinstance(one, str | list | np.ndarray) for one in inputs.values()
        ):
            return REFUSAL
        if not ints or given["input_ids"].ndim != 2 or mask.shape != given["input_ids"].shape:
            return REFUSAL
        given["pixel_values"] = given["pixel_values"].to(lens.hf_model.dtype)
        with torch.no_grad():
            last = lens.hf_model(**given).logits[:, -1]
        last = last[0] if len(last) == 1 and door == "trace_attention" else last
        if not last.isfinite().all():
            return REFUSAL
        ends = (lens.words.eos_token_id, lens.words.pad_token_id)
        answer = [token for token in [int(last[0].argmax())] if token not in ends]
        return answer if door == "generate" else last

    return Case(f"{door}: {name} {edit}", call, wanted)


# ── decodings, methods, places ──


def a_decoding(draws: random.Random, world: World) -> Case:
    """A decoding with odd values, against transformers' own search or sampling written out."""
    lens, model = world.lens, world.lens.hf_model
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
    kind = METHODS.get(draws.choice([name for name in METHODS.names() if name != "opera"]))
    field = draws.choice(fields(kind)).name
    value = draws.choice((*ODD, 11, 12, "first", "qformer", (1, 2), range(3), torch.ones(12, 8)))

    def logits(lens: Any) -> Any:
        with torch.no_grad(), cl.intervening(lens, kind(**{field: value})):
            last = lens.hf_model(**lens.prompt(world.image, QUESTION)).logits[:, -1]
        return last.clamp(min=-1e4)

    return Case(
        f"{kind.__name__}({field}={value!r:.60})",
        lambda: logits(world.lens),
        lambda: logits(world.eager),
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
            return logits("sensitive", world.eager)
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


DOORS: dict[str, tuple[Callable[[random.Random, World], Case], int]] = {
    "pictures": (a_picture, 900),
    "texts": (a_text, 500),
    "edited prompts": (an_edited_prompt, 400),
    "decodings": (a_decoding, 200),
    "methods": (a_method, 400),
    "heads": (a_place, 150),
    "checkpoints": (a_checkpoint, 150),
}

if __name__ == "__main__":
    given = [float(one) for one in sys.argv[1:]]
    sys.exit(main(*(int(one) if i == 0 else one for i, one in enumerate(given))) > 0)
