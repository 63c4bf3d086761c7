"""Contrastive decoding once more, from the formulas alone, one sample at a time, in float64.

Nothing of clva_lens is used: the models are those of reference.py and of queries.py, the second
input is made by hand, and both are read from their first token at every step, without a cache.
"""

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import queries
import reference
import torch
from tiny_models import QUESTIONS, double_of, exact_blip, picture, tokenizer
from torch import Tensor

DISTURBING = "you are near a book"


def noisy(pixels: Tensor, step: int, seed: int) -> Tensor:
    """q-sample of a diffusion model with 1000 sigmoid steps, by a loop."""
    kept = 1.0
    for s in range(step + 1):
        x = -6 + 12 * s / 999
        kept *= 1 - (1 / (1 + math.exp(-x)) * (0.005 - 1e-5) + 1e-5)
    noise = torch.randn(pixels.shape[-3:], generator=torch.Generator().manual_seed(seed))
    return math.sqrt(kept) * pixels.double() + math.sqrt(1 - kept) * noise.double()


def contrast(own: Tensor, other: Tensor, a: float, form: str) -> Tensor:
    """The contrast of two rows of logits, before the cut-off, token by token."""
    rows = []
    for x, y in zip(own, other, strict=True):
        if form == "guidance":
            x, y = x - x.exp().sum().log(), y - y.exp().sum().log()
            rows.append(a * (x - y) + y)
        else:
            rows.append((1 + a) * x - a * y if form == "difference" else x - a * y)
    return torch.stack(rows)


def both(
    family: str,
    inputs: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    item: int,
    answer: Tensor,
    edits: Sequence = (),
    heads: str = "full",
    decoder: Sequence = (),
) -> tuple[Tensor, Tensor]:
    """Return both inputs' logits of the last prompt row and of the answer's: [step, token].

    ``edits`` are at the site of the family's picture, ``decoder`` at a Q-Former model's decoder.
    """
    both = [_rows(family, one, item, answer, edits, heads, decoder) for one in (inputs, second)]
    return both[0], both[1]


def _rows(family, inputs, item, answer, edits, heads, decoder):
    seen = "pixel_values" in inputs
    ids, pixels, _ = reference.rows_of({"pixel_values": torch.zeros(99, 1), **inputs}, item)
    if family == "llava" or not seen:
        whole, model = torch.cat([ids, answer]), double_of(heads)
        if family != "llava":
            blip = exact_blip()
            inner = SimpleNamespace(language_model=blip.language_model.model)
            head = blip.language_model.lm_head
            model = SimpleNamespace(model=inner, lm_head=head, config=blip.config)
        features = None if seen else torch.empty(0, 32, dtype=torch.float64)
        found = reference.run(model, whole, pixels, edits if seen else (), len(ids), features)
        return found.logits[len(ids) - 1 :]
    found = queries.run(exact_blip(), inputs, item, edits, decoder, answer)
    return found.logits[len(ids) - 1 :]


def with_noise(inputs: Mapping[str, Tensor], step: int, seed: int) -> dict[str, Tensor]:
    """VCD's second input."""
    pixels = torch.stack([noisy(one, step, seed) for one in inputs["pixel_values"]])
    return {**inputs, "pixel_values": pixels}


def disturbed(family: str, lens, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ICD's second input, made from texts: LLaVA's system message, InstructBLIP's question."""
    count = len(inputs["input_ids"])
    asked = [QUESTIONS[i % 3] for i in range(count)]
    if family == "llava":
        pictures = [picture(i) for i in range(count)]
        return dict(lens.prompt(pictures, asked, system=DISTURBING))
    rows = [tokenizer()(f"{DISTURBING} {question}").input_ids for question in asked]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {**inputs, "qformer_input_ids": ids, "qformer_attention_mask": mask}


def without_picture(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PAI's text-only input: the image's tokens are gone, the rest moves together."""
    rows = [
        row[real.bool() & (row != 5)].tolist()
        for row, real in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    width = max(map(len, rows))
    ids = np.array([[0] * (width - len(row)) + row for row in rows])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
