"""Ways to ask about a picture beside ours: by hand, of two questions, under thirty strengths."""

from typing import Any

import torch
from transformers import DynamicCache

from clva_lens.experiments.speed.models import random_prompt
from clva_lens.experiments.speed.questions import QUESTIONS, Asking
from clva_lens.lens.intervene import intervening
from clva_lens.lens.load import LensModel
from clva_lens.lens.prefix import read_prefix
from clva_lens.methods.clva import CLVA
from clva_lens.models.kv_cache import CACHE
from clva_lens.models.prompt import Prompt

ALPHAS, BETAS = (2.0, 5.0, 8.0, 11.0, 14.0), (0.0, 0.2, 0.4, 0.6, 0.8, 0.9)
FEW = 2
"""MME's questions a picture."""


def other_ways_to_ask(handle: LensModel) -> list[Asking]:
    """Return transformers' own way to share a beginning, MME's two questions, and a surface.

    None where the beginning of a prompt cannot be read by itself.
    """
    model: Any = handle.hf_model
    if handle.site.name != "decoder":
        return []
    prompt = random_prompt(model)
    options = {"max_new_tokens": 1, "do_sample": False}
    many, few = (_questions(prompt, count) for count in (QUESTIONS, FEW))

    def whole(each: list[dict[str, Any]]) -> None:
        model.generate(**_batch(each), **options)

    def shared(each: list[dict[str, Any]], *methods: CLVA) -> None:
        prefix = read_prefix(handle, prompt)
        asked = prefix.continued([0] * len(each), each, [""] * len(each), batched=True)
        asked = asked.for_several_runs()
        for method in methods or (None,):
            with intervening(model, method):
                model.generate(**asked.by_beam(1), **options)

    def by_hand() -> None:
        """As transformers' documentation has it: the cache of a beginning is copied."""
        end = int(prompt.spans.image[0].nonzero().max()) + 1
        cache = DynamicCache(config=model.config)
        first = {name: prompt[name][:, :end] for name in ("input_ids", "attention_mask")}
        model(**first, pixel_values=prompt["pixel_values"], **{CACHE: cache}, logits_to_keep=1)
        cache.batch_repeat_interleave(QUESTIONS)
        asked = _batch(many)
        del asked["pixel_values"]
        model.generate(**asked, **{CACHE: cache}, **options)

    six, two = f"{QUESTIONS} questions", f"{FEW} questions"
    surface = [CLVA(alpha=alpha, beta=beta) for alpha in ALPHAS for beta in BETAS]
    return [
        Asking(f"{six}, cache copied by hand", six, by_hand),
        Asking(
            f"{six}, {len(surface)} CLVA, picture read once", six, lambda: shared(many, *surface)
        ),
        Asking(two, two, lambda: whole(few)),
        Asking(f"{two}, picture read once", two, lambda: shared(few)),
    ]


def _questions(prompt: Prompt, count: int) -> list[dict[str, Any]]:
    """Return the inputs of prompts that differ in one word."""
    each = []
    for number in range(count):
        ids = prompt["input_ids"].clone()
        ids[:, -1 - number] += 1
        each.append({**prompt.inputs, "input_ids": ids})
    return each


def _batch(each: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: torch.cat([one[name] for one in each]) for name in each[0]}
