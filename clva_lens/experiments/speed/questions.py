"""Six questions on a picture: read whole each time, or onto the picture that was read once."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch

from clva_lens.experiments.speed.models import random_prompt
from clva_lens.lens.intervene import intervening
from clva_lens.lens.load import LensModel
from clva_lens.lens.prefix import read_prefix
from clva_lens.methods.base import Method
from clva_lens.methods.clva import CLVA
from clva_lens.methods.imccd import IMCCD
from clva_lens.methods.knockout import KnockOut
from clva_lens.methods.vcd import VCD

QUESTIONS = 6


class Asking(NamedTuple):
    """A way to ask the questions, the one it is compared with, and the call."""

    name: str
    over: str
    call: Callable[[], Any]


def ways_to_ask(handle: LensModel) -> list[Asking]:
    """Return the ways to ask six questions on one picture, with an answer of one token each.

    None where the beginning of a prompt cannot be read by itself.
    """
    model: Any = handle.hf_model
    if handle.site.name != "decoder":
        return []
    prompt = random_prompt(model)
    each = []
    for number in range(QUESTIONS):
        ids = prompt["input_ids"].clone()
        ids[:, -1 - number] += 1
        each.append({**prompt.inputs, "input_ids": ids})
    whole = {name: torch.cat([one[name] for one in each]) for name in prompt.inputs}
    generate = cast(Any, model).generate
    options = {"max_new_tokens": 1, "do_sample": False}

    def unshared(*methods: Method) -> None:
        with intervening(model, *methods):
            generate(**whole, **options)

    def shared(*choices: list[Method]) -> None:
        prefix = read_prefix(handle, prompt)
        asked = prefix.continued([0] * QUESTIONS, each, [""] * QUESTIONS, batched=True)
        asked = asked.for_several_runs()
        for methods in choices:
            with intervening(model, *methods):
                generate(**asked.by_beam(1), **options)

    first, clva = f"{QUESTIONS} questions", f"{QUESTIONS} questions, CLVA"
    return [
        Asking(first, first, unshared),
        Asking(clva, clva, lambda: unshared(CLVA())),
        Asking(f"{first}, picture read once", first, lambda: shared([])),
        Asking(f"{clva}, picture read once", clva, lambda: shared([CLVA()])),
        Asking(f"{first}, VCD, picture read once", first, lambda: shared([VCD()])),
        Asking(f"{first}, IMCCD, picture read once", first, lambda: shared([IMCCD()])),
        Asking(
            f"{first}, greedy + CLVA + KnockOut, picture read once",
            first,
            lambda: shared([], [CLVA()], [KnockOut()]),
        ),
    ]
