"""Kernels without a mask of rows and keys: FlexAttention itself, FlashAttention 2 by a stand-in.

FlexAttention runs without being compiled. FlashAttention runs on no CPU: a function of its
signature that computes the attention exactly stands for it, so that all but the kernel is tested.
"""

import copy

import pytest
import tiny_families as tiny
import torch
from transformers import modeling_flash_attention_utils as flash

import clva_lens as cl
from clva_lens.ground.errors import InterventionError, ModelLoadError

KIND = "internvl"
CLVA = {"negative_layer": 0, "positive_layer": 1, "tau": 0.5}


def attention(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), **_):
    """[batch, row, head, width], as flash_attn_func: the last row is the last key's."""
    groups = q.shape[2] // k.shape[2]
    k, v = (one.repeat_interleave(groups, dim=2) for one in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
    row = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    key = torch.arange(k.shape[1])[None]
    if causal:
        scores = scores.masked_fill(key > row, -torch.inf)
    if window_size[0] >= 0:
        scores = scores.masked_fill(key < row - window_size[0], -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), v)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0
):
    return attention(q, k, v, softmax_scale, causal, window_size)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
):
    made = []
    for sample in range(len(cu_seqlens_q) - 1):
        rows = slice(int(cu_seqlens_q[sample]), int(cu_seqlens_q[sample + 1]))
        keys = slice(int(cu_seqlens_k[sample]), int(cu_seqlens_k[sample + 1]))
        one = (q[None, rows], k[None, keys], v[None, keys])
        made.append(attention(*one, softmax_scale, causal, window_size)[0])
    return torch.cat(made)


@pytest.fixture(params=["flash_attention_2", "flex_attention"])
def kernel(request, monkeypatch):
    if request.param == "flash_attention_2":
        stand_in = {
            "_flash_fn": flash_attn_func,
            "_flash_varlen_fn": flash_attn_varlen_func,
            "_pad_fn": flash._pad_input,
            "_unpad_fn": flash._unpad_input,
            "_process_flash_kwargs_fn": flash._lazy_define_process_function(flash_attn_varlen_func),
            "_loaded_implementation": "flash_attention_2",
        }
        for name, one in stand_in.items():
            monkeypatch.setattr(flash, name, one)
        yield request.param
    else:
        with torch.compiler.set_stance("force_eager"):
            yield request.param


def with_kernel(kernel):
    model = copy.deepcopy(tiny.tiny_model(KIND))
    model.get_decoder().config._attn_implementation_internal = kernel
    return model


def prompts():
    """Two of different length, padded; and the first by itself."""
    one, other = tiny.sample(KIND, 0), tiny.sample(KIND, 1, words=9)
    return tiny.batch([one, other]), one


@torch.inference_mode()
def read(model, inputs, *methods):
    with cl.intervening(model, *methods):
        return model(**inputs).logits[:, -1]


@torch.inference_mode()
def write(model, inputs, *methods):
    with cl.intervening(model, *methods):
        out = model.generate(
            **inputs,
            max_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.stack(out.logits, dim=1)


pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, of what flex imports
]


def test_clva_under_the_kernel_is_that_under_sdpa(kernel):
    """A padded batch and a single prompt; the prompt, and decoding with a cache."""
    fused, model = tiny.tiny_model(KIND), with_kernel(kernel)
    pair, one = prompts()
    clva, off = cl.CLVA(**CLVA), cl.CLVA(**CLVA, alpha=0.0, beta=0.0)
    for inputs in (pair, one):
        wanted, plain = write(fused, inputs, clva), write(fused, inputs)
        effect = float((wanted - plain).abs().max())
        error = float((write(model, inputs, clva) - wanted).abs().max())
        print(f"{kernel}: error {error:.1e}, effect {effect:.3f}")
        assert effect > 0.05 and error < effect / 1000
        assert torch.equal(read(model, inputs, off), read(model, inputs))
    assert model.get_decoder().config._attn_implementation == kernel


def test_rows_under_the_kernel_are_those_under_sdpa(kernel):
    fused, model = tiny.tiny_model(KIND), with_kernel(kernel)
    pair, _ = prompts()
    for method in (None, cl.CLVA(**CLVA), cl.KnockOut(layers=[2])):
        wanted, found = (cl.trace_attention(one, pair, method) for one in (fused, model))
        torch.testing.assert_close(found.maps, wanted.maps, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.intensity, wanted.intensity, rtol=0, atol=1e-5)
    assert float(wanted.maps.std()) > 1e-3


def test_what_cannot_be_folded_says_which_kernel_to_take(kernel):
    """PAI's edit differs between rows."""
    model, (_, one) = with_kernel(kernel), prompts()
    match = r"differs between rows or heads.*attn_implementation='sdpa', or 'eager'"
    with pytest.raises(InterventionError, match=match):
        read(model, one, cl.PAI(alpha=0.5))
    assert float((read(model, one) - read(tiny.tiny_model(KIND), one)).abs().max()) < 1e-4


def test_a_layer_with_a_window(kernel):
    """The kernel keeps its window, in the prompt and with a cache that holds the last keys only."""
    fused, model = (copy.deepcopy(tiny.tiny_model("mistral3")) for _ in range(2))
    for one in (fused, model):
        one.get_decoder().config.sliding_window = 12
        for layer in one.get_decoder().layers:
            layer.self_attn.sliding_window = 12
    model.get_decoder().config._attn_implementation_internal = kernel
    inputs = tiny.sample("mistral3", 0)
    wide = write(tiny.tiny_model("mistral3"), inputs)
    method = cl.KnockOut(layers=[2, 4])
    wanted, plain = write(fused, inputs, method), write(fused, inputs)
    effect = float((wanted - plain).abs().max())
    assert float((wide - plain).abs().max()) > 0.05 and effect > 0.05
    assert float((write(model, inputs) - plain).abs().max()) < effect / 1000
    assert float((write(model, inputs, method) - wanted).abs().max()) < effect / 1000
    found, shown = (cl.trace_attention(one, inputs) for one in (model, fused))
    torch.testing.assert_close(found.maps, shown.maps, rtol=0, atol=1e-5)


def test_a_kernel_that_is_not_there_names_those_that_are():
    for name in ("flash_attention_2", "nonsense"):
        with pytest.raises(ModelLoadError, match=r"attn_implementation='sdpa', or 'eager', which"):
            cl.load("toy-llava", attn_implementation=name)
