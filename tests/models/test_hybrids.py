"""Decoders in which some layers have softmax attention: every default layer is one of these."""

import inspect
import re

import pytest
import tiny_families as tiny
import torch
from survey_table import PROVEN

import clva_lens as cl
from clva_lens.ground.errors import ClvaLensError, ParameterError
from clva_lens.lens.statistics import trace_statistics
from clva_lens.methods.base import METHODS

KINDS = sorted({"glm5_next", "lfm3_vl", "qwen3_5"} & set(PROVEN))
LACKS = {  # by method: what else than a layer it needs
    "agla": "has no processor",
    "ascd": "where its pictures come in",
    "dlc": "has no processor",
    "ed": "so there is no grid",
    "icd": "has no processor",
    "imccd": "where its pictures come in|compresses rotary positions",
    "m3id": "where its pictures come in",
    "memvr": "no 'blocks.4.mlp.hook_in'",  # of several streams
    "only": "has more or others",
    "opera": "beam search of its own",
    "post-hoc-debias": "has no processor",
    "sid": "where its pictures come in",
    "vcd": "where its pictures come in",
    "vdd": "where its pictures come in",
    "vicrop": "has no processor",
    "vista": "no 'blocks.0.hook_mlp_out'|where its pictures come in",
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def attending(model):
    """The layers with softmax attention, by the configuration."""
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or text.block_types
    return [i for i, one in enumerate(kinds) if "linear" not in one and "conv" not in one], len(
        kinds
    )


def logits(model, inputs, *methods):
    with torch.inference_mode(), cl.intervening(model, *methods):
        return model(**inputs).logits[:, -1]


def test_clva_takes_the_nearest_anchors(kind):
    """The first layer with attention, and the nearest to L/2 − 2, the earlier of two."""
    model, inputs = tiny.tiny_model(kind), tiny.sample(kind, 0)
    layers, depth = attending(model)
    wanted = depth // 2 - 2
    distance = {layer: (abs(layer - wanted), layer) for layer in layers[:-1]}
    positive = min(distance, key=distance.get)
    assert len(layers) < depth and layers[0] > 0
    with torch.inference_mode(), cl.intervening(model, cl.CLVA(tau=0.5)) as run:
        edited = model(**inputs).logits[:, -1]
    assert (run.anchors.negative_layer, run.anchors.positive_layer) == (layers[0], positive)
    effect = float((edited - logits(model, inputs)).abs().max())
    print(f"{kind}: anchors {layers[0]} and {positive} of {layers}, logits move by {effect:.3f}")
    assert effect > 0.01
    given = cl.CLVA(tau=0.5, negative_layer=layers[0], positive_layer=positive)
    assert torch.equal(edited, logits(model, inputs, given))


def test_a_layer_that_is_given_is_not_replaced(kind):
    model, inputs = tiny.tiny_model(kind), tiny.sample(kind, 0)
    layers, depth = attending(model)
    other = next(i for i in range(1, depth) if i not in layers)
    listed = ", ".join(map(str, layers))
    for name in ("negative_layer", "positive_layer"):
        with pytest.raises(
            ParameterError, match=rf"{name} names layer {other}, .*layers {listed} "
        ):
            logits(model, inputs, cl.CLVA(**{name: other}))
    with pytest.raises(ParameterError, match=rf"{other}"):
        trace = cl.trace_attention(model, inputs)
        cl.attention_drift(trace, negative_layer=other)


def test_what_is_traced_has_the_same_anchors(kind):
    model, inputs = tiny.tiny_model(kind), tiny.sample(kind, 0)
    layers, depth = attending(model)
    with torch.inference_mode(), cl.intervening(model, cl.CLVA(tau=0.5)) as run:
        model(**inputs)
    anchors = (run.anchors.positive_layer, run.anchors.negative_layer)
    trace = cl.trace_attention(model, inputs)
    drift = cl.attention_drift(trace)
    assert (drift.positive_layer, drift.negative_layer) == anchors
    assert drift.layers == tuple(layers) and trace.num_layers == depth
    assert cl.classify_heads(trace.intensity).sensitive.shape == (len(layers), 4)
    mean, *_ = trace_statistics(model, [inputs, tiny.sample(kind, 1)], progress=False).drift()
    assert (mean.positive_layer, mean.negative_layer) == anchors
    some = cl.trace_attention(model, inputs, layers=layers[1:])
    with pytest.raises(ParameterError, match=rf"negative_layer is {layers[0]}, but the traced"):
        cl.attention_drift(some)


def test_an_attribution_names_the_layers_of_its_heads(kind):
    if kind == "glm5_next":
        return  # it has none: test_every_stream.py
    model, inputs = tiny.tiny_model(kind), tiny.sample(kind, 0)
    layers, _ = attending(model)
    read = cl.direct_logit_attribution(model, inputs, (11, 12))
    assert read.layers == tuple(layers) and "mixers" in repr(read)
    shown = [text.get_text() for text in read.draw().axes[0].get_yticklabels()]
    assert shown == [str(layer) for layer in layers]


def by_default():
    """Methods that are made without arguments."""
    for name in METHODS.names():
        made = METHODS.get(name)
        given = inspect.signature(made).parameters.values()
        if all(one.default is not inspect.Parameter.empty for one in given):
            yield name


@pytest.mark.parametrize("name", sorted(by_default()))
def test_every_method_has_a_default(kind, name):
    """It acts, or says in words what the model lacks; never that a layer has no attention."""
    model, inputs = tiny.tiny_model(kind), tiny.sample(kind, 0)
    method = METHODS.get(name)()
    try:
        found = logits(model, inputs, method)
    except ClvaLensError as error:
        assert re.search(LACKS.get(name, "never"), str(error)), error
    else:
        assert not torch.equal(found, logits(model, inputs))
