"""Statistics over prompts are those of all traces; a trace's memory is rows × keys of one layer."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import clva_lens as cl
from clva_lens.engine import session
from clva_lens.experiments.speed.models import random_llava, random_prompt
from clva_lens.ground.errors import ParameterError
from clva_lens.lens.statistics import trace_statistics

FIELDS = ("entropy", "entropy_normalised", "toward_positive", "toward_negative")


def test_statistics_are_those_of_all_traces(one, ask):
    prompts = [ask(one, 2), ask(one, first=2), ask(one, 3)]
    found = trace_statistics(one, prompts, progress=False)
    traces = [cl.trace_attention(one, prompt) for prompt in prompts]
    maps = torch.cat([t.saliency() if t.batched else t.saliency()[None] for t in traces]).double()
    assert found.maps.count == 6
    torch.testing.assert_close(found.maps.mean, maps.mean(dim=0))
    for layer in (0, 11):
        torch.testing.assert_close(found.maps.covariance[layer], maps[:, layer].mT.cov())
    assert maps.std(dim=0).max() > 0.01
    mean, low, high = found.drift()
    for field in FIELDS:
        each = [getattr(cl.attention_drift(trace), field) for trace in traces]
        every = torch.cat([x if x.ndim == 2 else x[None] for x in each]).double()
        half = 1.959964 * every.std(dim=0) / 6**0.5
        torch.testing.assert_close(getattr(mean, field), every.mean(dim=0))
        torch.testing.assert_close(getattr(high, field) - getattr(mean, field), half)
        torch.testing.assert_close(getattr(mean, field) - getattr(low, field), half)
    assert (mean.positive_layer, mean.negative_layer) == (4, 0)


def test_no_prompts_are_refused(one):
    with pytest.raises(ParameterError, match="no prompts"):
        trace_statistics(one, [], progress=False)


class Largest(TorchDispatchMode):
    """Records the most rows of any tensor [batch, head, row, key]; keys transposed have 12."""

    def __init__(self, heads, keys):
        super().__init__()
        self.heads, self.keys, self.rows = heads, keys, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.ndim == 4 and x.shape[-1] == self.keys:
                self.rows = max(self.rows, x.shape[2])
        return out


def traced(image_tokens, text):
    model = random_llava(layers=4, width=24, heads=2, image_tokens=image_tokens)
    prompt = random_prompt(model, text=text)
    with torch.inference_mode(), Largest(2, prompt.inputs["input_ids"].shape[1]) as seen:
        trace = cl.trace_attention(model, prompt)
    return seen, trace


def test_a_trace_forms_the_text_rows_only_however_long_the_prompt():
    short, _ = traced(36, 16)
    long, _ = traced(400, 16)
    assert short.rows == long.rows == 16


def test_long_texts_are_read_in_pieces(monkeypatch):
    whole, expected = traced(36, 200)
    keys = 8 + 36 + 200
    monkeypatch.setattr(session, "SCORES_AT_ONCE", 2 * keys * 20)
    pieces, found = traced(36, 200)
    assert (whole.rows, pieces.rows) == (200, 20)
    torch.testing.assert_close(found.intensity, expected.intensity)
    torch.testing.assert_close(found.maps, expected.maps)
