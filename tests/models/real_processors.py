"""A real processor for each model type: its own classes, with small pictures and few words.

What is real: the classes of processor, image and video processor. Special tokens and chat templates
have the published ones' shape. What is made small: pictures, and the vocabulary, a byte-level one
trained here on a few words. Pictures and words fit the tiny models
(``tiny_families.py``), whose image token has id 5. ``real_families.py`` has the table.
"""

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import tiny_families as tiny
import torch
import transformers
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

TORCHVISION = find_spec("torchvision") is not None
SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>", "<|spare|>")
VOCABULARY = 512
POSITIONS = 2048
WORDS = (
    "Is there a cup in the image? Yes No yes no what is it : yes, no. Answer user assistant system "
    "You are a helpful assistant. What can you see?"
)


class Real(NamedTuple):
    """A model type's processor.

    ``images`` is the image processor's class, without "Pil", and ``sizes`` its settings; ``videos``
    the class of the video processor, if there must be one. ``tokens`` are the texts of the special
    tokens, from id 5 on: the image token, those of a video, of the picture's start and end, and any
    others; ``start`` names those of beginning, end and padding where the template writes them.
    ``named`` are attributes of the tokenizer that name tokens. ``settings`` are the processor's.
    ``begins``: the tokenizer puts a BOS token before what it reads. ``pieces``: the special tokens
    are words of its vocabulary, and a space is put before every text (sentencepiece). ``model`` is
    what the model has that the tiny one of random pixels has not, by part ("text", "vision",
    "top"). ``parts`` are other parts of the processor: their classes and settings.
    """

    processor: str
    images: str
    sizes: Mapping[str, Any]
    tokens: tuple[str, ...]
    template: str | None
    named: Mapping[str, str] = {}
    settings: Mapping[str, Any] = {}
    videos: str | None = None
    start: tuple[str, ...] = ()
    begins: bool = False
    pieces: bool = False
    model: Mapping[str, Mapping[str, Any]] = {}
    parts: Mapping[str, tuple[str, Mapping[str, Any]]] = {}


def turns(
    opening: str, image: str, closing: str, cue: str, lead: str = "", role: str = "m['role']"
) -> str:
    """Return a chat template: each message between an opening and a closing, then the cue.

    ``opening`` has ``ROLE`` where the role stands. A system message is written as any other.
    """
    opening = opening.replace("ROLE", "{{ " + role + " }}")
    return (
        lead + "{% for m in messages %}" + opening + "{% if m['content'] is string %}"
        "{{ m['content'] }}{% else %}{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% elif part['type'] == 'text' %}"
        "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}" + closing + "{% endfor %}"
        "{% if add_generation_prompt %}" + cue + "{% endif %}"
    )


def chatml(image: str, lead: str = "") -> str:
    """Return the template of Qwen and of many others."""
    return turns("<|im_start|>ROLE\n", image, "<|im_end|>\n", "<|im_start|>assistant\n", lead)


@cache
def _words(tokens: tuple[str, ...], bos: str | None, pieces: bool) -> str:
    """Return a byte-level tokenizer, trained on a few words, as JSON."""
    core = Tokenizer(models.BPE(ignore_merges=pieces))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(tokens) + 256 + 64,
        special_tokens=list(tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator([WORDS] * 4, trainer)
    if bos is not None:
        core.post_processor = processors.TemplateProcessing(
            f"{bos} $A", special_tokens=[(bos, tokens.index(bos))]
        )
    if not pieces:
        return core.to_str()
    core.normalizer = normalizers.Prepend(" ")
    between = Regex("|".join(re.escape(token) for token in tokens))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(between, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return json.dumps({**json.loads(core.to_str()), "added_tokens": []})


def special_tokens(real: Real) -> tuple[str, ...]:
    """Return all special tokens of a model type, by their ids."""
    begin = (*real.start, *SPECIAL[len(real.start) :])
    return (*begin, *real.tokens)


def tokenizer(real: Real) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the special tokens of a model type."""
    tokens = special_tokens(real)
    pad, bos, eos, unk, _ = tokens[:5]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(
            _words(tokens, bos if real.begins else None, real.pieces)
        ),
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        padding_side="left",
        extra_special_tokens=dict(real.named),
        additional_special_tokens=[] if real.pieces else list(real.tokens),
    )


def image_processor(real: Real) -> Any:
    """Return the image processor, on torchvision where it is installed, else on Pillow."""
    name = real.images if TORCHVISION or real.images.endswith("Pil") else f"{real.images}Pil"
    return getattr(transformers, name)(**real.sizes)


def make_processor(real: Real) -> Any:
    """Return the processor of a model type.

    Raises:
        ImportError: if it needs torchvision, and it is not installed.
    """
    given: dict[str, Any] = {
        "image_processor": image_processor(real),
        "tokenizer": tokenizer(real),
        **real.settings,
    }
    if real.template is not None:
        given["chat_template"] = real.template
    videos = {} if real.videos is None else {"video_processor": (real.videos, {})}
    for part, (name, settings) in {**videos, **real.parts}.items():
        given[part] = getattr(transformers, name)(**settings)
    return getattr(transformers, real.processor)(**given)


def make_configuration(kind: str, real: Real) -> PreTrainedConfig:
    """Return a tiny configuration that fits the processor."""
    own = tiny.TINY.get(kind, tiny.Tiny())
    more = {part: dict(real.model.get(part, {})) for part in ("text", "vision", "top")}
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS}
    return tiny.configuration(
        kind,
        own._replace(
            text={**own.text, **sizes, **more["text"]},
            vision={**own.vision, **more["vision"]},
            top={**own.top, **more["top"]},
        ),
    )


@torch.no_grad()
def make_model(kind: str, real: Real) -> PreTrainedModel:
    """Return the tiny model that fits the processor."""
    model = tiny.lively_model(make_configuration(kind, real))
    head: Any = model.get_output_embeddings()
    if head is not None:  # special tokens are never the likeliest
        head.weight[: len(special_tokens(real))] = 0
    return model
