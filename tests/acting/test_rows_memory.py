"""The memory law of looking: rows × keys of one layer at a time, and never query × key."""

import pytest
import torch

from clva_lens.engine import session
from clva_lens.engine.row_reading import read_prompt_rows
from clva_lens.engine.session import AttentionCall
from clva_lens.experiments.speed.bench import peak_memory
from clva_lens.experiments.speed.models import random_llava, random_prompt
from clva_lens.ground.axes import TokenSpans
from clva_lens.lens.trace import trace_attention
from clva_lens.models.step import Step

CPU, HEADS = torch.device("cpu"), 4


def reading(keys, text):
    """Return the peak, in bytes, of reading ``text`` rows over ``keys`` keys of one layer."""
    ids = torch.full((1, keys), 5)
    ids[:, -text:] = 7
    spans = TokenSpans.from_ids(ids, 5)
    visual, start = spans.visual_index(), keys - text
    step = Step(0, 0, spans.text, spans, visual, causal=True, ordered=True, first_text=start)
    query, key = torch.randn(2, 1, HEADS, keys, 8)
    call = AttentionCall(0, step, query, key, None, None, 1.0)
    return peak_memory(lambda: read_prompt_rows(call), CPU)


def test_it_grows_with_the_keys_not_with_their_square():
    small, large = reading(512, 16), reading(4096, 16)
    matrix = HEADS * 4096 * 4096 * 4
    print(
        f"512 keys: {small / 2**20:.2f} MiB, 4096: {large / 2**20:.2f}, a pattern: {matrix >> 20}"
    )
    assert 4 * small < large < 10 * small  # 8 times as many keys
    assert large < matrix / 50


def test_many_rows_are_read_in_pieces(monkeypatch):
    whole = reading(2048, 1024)
    monkeypatch.setattr(session, "SCORES_AT_ONCE", 2**18)
    pieces = reading(2048, 1024)
    # A piece's scores, their mask and softmax; and what is linear in the keys.
    assert pieces < 4 * 2**18 * 4 + 2048 * HEADS * 4 * 40
    assert whole > 4 * pieces


@pytest.mark.parametrize("layers", [4, 12])
def test_a_trace_keeps_maps_only(layers):
    model = random_llava(layers, 32, HEADS, 576)
    prompt = random_prompt(model)
    with torch.inference_mode():
        plain = peak_memory(lambda: model(**prompt.inputs, logits_to_keep=1), CPU)
        traced = peak_memory(lambda: trace_attention(model, prompt), CPU)
    # 16 text rows over 600 keys, a few times over, and 576 numbers a head of every layer.
    one = 16 * 600 * HEADS * 4
    assert traced - plain < 6 * one + layers * HEADS * 700 * 4 * 4
    assert one < HEADS * 600 * 600 * 4 / 30
