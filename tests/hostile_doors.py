"""Hostile pictures, texts and processor outputs, and what should come of them (hostile_inputs.py).

What should come out is worked out with transformers, Pillow and NumPy alone.
"""

import io
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

import clva_lens as cl

REFUSAL = object()
"""The expectation of what must not be accepted."""

QUESTION = "Is there a cup in the image?"


@dataclass
class Case:
    """One input: what is done with it, and what should come out (REFUSAL: nothing)."""

    name: str
    call: Callable[[], Any]
    expected: Callable[[], Any]


@dataclass
class World:
    """The toys with both kernels, (fused, eager); a picture, and a folder to write in."""

    toys: tuple[tuple[Any, Any], ...]
    image: np.ndarray
    folder: Path

    @property
    def lens(self) -> Any:
        """The first toy."""
        return self.toys[0][0]


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
    raw = bytearray(data.getvalue())
    harm = draws.choice(("none", "none", "cut", "flip", "head", "zeros"))
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
    "is there a cup ?", "what is it ?", "yes", "no", "a red cup", "a car", "is", "?", "<image>",
    "</s>", "<unk>", "< image >", "\n", "\0", "\u202e", "\ud800", "é", "e\u0301", "猫", "🙂",
    "zebra", " ", "\t", "USER:", "ASSISTANT:", "{{ x }}", "{% if %}", "%s", "\\n", "a" * 300, "CUP",
    "<|im_end|>", "\ufeff", "\u00a0", "0", "is " * 200,
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
        turns = options.get("turns") or []
        texts = [question, *(text for turn in turns for text in turn)]
        texts += [options[name] for name in ("system", "answer") if options.get(name) is not None]
        if not all(isinstance(one, str) for one in texts):
            return REFUSAL
        if any(token in one for one in texts for token in words.all_special_tokens):
            return REFUSAL
        said = [
            (text, role)
            for turn in turns
            for text, role in zip(turn, ("user", "assistant"), strict=True)
        ]
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
    """One input of a prompt changed, left out, or of another type."""
    lens, _ = draws.choice(world.toys)
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
