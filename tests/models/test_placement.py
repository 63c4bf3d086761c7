"""Models whose layers are spread over devices, or offloaded: the same logits as in one place.

accelerate's own hooks are real, with the CPU and the disk as its two places. Two GPUs are made up
(two_devices.py): there it is shown that nothing is ever mixed, and that the numbers stay.
"""

from contextlib import contextmanager

import pytest
import tiny_families as tiny
import torch
from accelerate import dispatch_model
from survey_table import PROVEN
from test_survey import anchored, apart, read
from test_survey import write as write_steps
from tiny_models import QUESTIONS, blip_of, lens_of, make_processor, picture, tiny_model
from two_devices import FIRST, HOST, SECOND, Emulated, place_of, split

import clva_lens as cl
from clva_lens.engine.run import running
from clva_lens.ground.errors import InterventionError, ModelLoadError
from clva_lens.lens.observers import Observer
from clva_lens.methods.base import METHODS
from clva_lens.methods.target import shape_of
from clva_lens.models.family import find_family

# Contrastive methods read a second input with a copy of the model, and refuse a split one; OPERA
# is a search of its own.
METHOD_NAMES = (
    "ablation", "clearsight", "clva", "deco", "knockout", "memvr", "only", "pai", "visflow",
)  # fmt: skip
# What transformers' own code, without clva_lens, does not do on the made-up devices.
COUNTS = "its experts are counted by torch.histc, on whole numbers if the device is a GPU"
MIXES = "its own code mixes tensors of two devices when it is split here"
NOT_EMULATED = {
    "aria": COUNTS,
    "ernie4_5_vl_moe": MIXES,
    "gemma4": MIXES,
    "glm4v_moe": COUNTS,
    "glm5_next": COUNTS,
    "hy_v4_vl": COUNTS,
    "kimi_k25": COUNTS,
    "minimax_m3_vl": COUNTS,
    "qwen2_5_omni_thinker": MIXES,
    "qwen3_5_moe": COUNTS,
    "qwen3_omni_moe_thinker": MIXES,
    "qwen3_vl_moe": COUNTS,
}


def write(model, inputs, *methods):
    """The logits of the prompt, and of a step onto its cache."""
    return write_steps(model, inputs, *methods, steps=2)


def on_first(inputs):
    return {name: one.to(FIRST) for name, one in inputs.items()}


# ── accelerate ──


@pytest.fixture(scope="module")
def wanted():
    """The model in one place, a prompt, and its logits without and with CLVA."""
    lens = cl.load((tiny_model(), make_processor()), check=False)
    prompt = lens.prompt(picture(0), QUESTIONS[0])
    logits = [write(lens.hf_model, prompt, *methods) for methods in ((), (cl.CLVA(),))]
    return lens, prompt, *logits


def dispatched(folder, vision, layers, head, far="disk"):
    """A model of which accelerate has put parts on another place; layers from ``layers`` on."""
    places = {"model.vision_tower": vision, "lm_head": head}
    places["model.multi_modal_projector"] = "cpu"
    for part in ("embed_tokens", "norm", "rotary_emb"):
        places[f"model.language_model.{part}"] = "cpu"
    for index in range(12):
        where = far if index >= layers else "cpu"
        places[f"model.language_model.layers.{index}"] = where
    model = tiny_model()
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("layers", [0, 4, 6])
def test_offloaded_layers(tmp_path, wanted, layers):
    """Negative and positive anchors on both sides of the border, or both offloaded."""
    whole, _, plain, edited = wanted
    model = dispatched(tmp_path, "cpu", layers, "cpu")
    assert next(model.get_decoder().layers[11].parameters()).is_meta
    lens = cl.load((model, make_processor()))
    asked = lens.prompt(picture(0), QUESTIONS[0])
    effect, error = (apart(write(model, asked, cl.CLVA()), one) for one in (plain, edited))
    print(f"effect {effect:.3g}, error {error:.3g}")
    assert effect > 0.5 and error < 1e-6
    seen, known = (cl.trace_attention(one, asked) for one in (lens, whole))
    assert known.maps.std() > 0.05
    assert torch.equal(seen.maps, known.maps) and torch.equal(seen.intensity, known.intensity)
    with torch.no_grad(), lens.trace(asked):
        cl.intervene(cl.CLVA())
        traced = lens.output.logits[:, -1].save()
    assert apart(traced, edited[:, 0]) < 1e-5
    assert torch.equal(cl.logit_lens(lens, asked).margin, cl.logit_lens(whole, asked).margin)


def test_what_needs_weights_is_refused_where_they_are_offloaded(tmp_path):
    lens = cl.load((dispatched(tmp_path, "cpu", 4, "disk"), make_processor()))
    prompt = lens.prompt(picture(0), QUESTIONS[0])
    for read_weights in (cl.logit_lens, cl.direct_logit_attribution):
        with pytest.raises(ModelLoadError, match=r"Linear cannot .* offloaded.*device_map"):
            read_weights(lens, prompt)
    with pytest.raises(InterventionError, match=r"split .*over devices or offloaded"):
        cl.generate(lens, prompt, method=cl.VCD())


def test_a_model_that_begins_offloaded(tmp_path, wanted):
    """nnsight puts inputs where the first parameter is; without nnsight there is no such limit."""
    _, prompt, plain, edited = wanted
    model = dispatched(tmp_path, "disk", 0, "disk")
    assert model.device.type == "meta"
    with pytest.raises(ModelLoadError, match=r"first weights .* on the device 'meta'.*intervening"):
        cl.load((model, make_processor()))
    effect, error = (apart(write(model, prompt, cl.CLVA()), one) for one in (plain, edited))
    assert effect > 0.5 and error < 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="un-skip when there is a CUDA device")
@pytest.mark.parametrize("layers", [1, 4, 6])
def test_a_cpu_and_a_gpu(tmp_path, wanted, layers):
    """Two real devices, both of which compute; the kernels differ by rounding."""
    _, prompt, plain, edited = wanted
    model = dispatched(tmp_path, "cpu", layers, "cpu", far=0)
    assert next(model.get_decoder().layers[11].parameters()).is_cuda
    lens = cl.load((model, make_processor()))
    effect, error = (apart(write(model, prompt, cl.CLVA()).cpu(), one) for one in (plain, edited))
    print(f"effect {effect:.3g}, error {error:.3g}")
    assert effect > 0.5 and error < effect / 1e3
    assert cl.trace_attention(lens, prompt).maps.std() > 0.05


# ── two devices that are made up ──


def test_the_emulation_refuses_what_torch_refuses():
    with Emulated() as devices:
        one, other = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1")
        for bad in (lambda: one + other, lambda: one @ torch.ones(3), lambda: other[one > 0]):
            with pytest.raises(RuntimeError, match="different devices"):
                bad()
        assert (one + other.to(one.device)).device == (one * torch.tensor(2.0)).device == FIRST
        assert one[None].mT.device == torch.zeros_like(one).device == FIRST
        assert one.cpu().device == HOST
    assert devices.crossings == 2


@contextmanager
def halved(model, at):
    """Have a model on two devices, in a block that knows devices."""
    with split(model, at), Emulated():
        yield


@pytest.mark.parametrize("at", [1, 4, 6])
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_methods_on_two_devices(name, at):
    lens = lens_of("full", "sdpa")
    model, method = lens.hf_model, METHODS.get(name)()
    inputs = dict(lens.prompt(picture(0), QUESTIONS[0]))
    plain, alone = write(model, inputs), write(model, inputs, method)
    with halved(model, at):
        found = write(model, on_first(inputs), method)
    assert not torch.equal(alone, plain)
    assert torch.equal(found, alone)


@pytest.mark.parametrize("kind", sorted(set(PROVEN) - set(NOT_EMULATED)))
def test_every_family_on_two_devices(kind):
    """The negative anchor is on the first device, the positive one on the second."""
    model, inputs = tiny.tiny_model(kind), tiny.sample(kind, 0)
    plain, alone = write(model, inputs), write(model, inputs, anchored(model))
    with halved(model, find_family(model).sites(model)[0].layers[1]):
        found = write(model, on_first(inputs), anchored(model))
    assert apart(alone, plain) > 0.05
    assert torch.equal(found, alone)


@pytest.mark.parametrize("kind", NOT_EMULATED)
def test_what_is_not_emulated_fails_by_itself(kind):
    model, inputs = tiny.tiny_model(kind), tiny.sample(kind, 0)
    message = "histogram_cpu" if NOT_EMULATED[kind] is COUNTS else "different devices"
    with (
        halved(model, find_family(model).sites(model)[0].layers[1]),
        pytest.raises(RuntimeError, match=message),
    ):
        write(model, on_first(inputs))


def test_what_is_read_on_two_devices():
    """A trace and CLVA's anchors come to one device, unchanged."""
    lens = lens_of("full", "sdpa")
    model, prompt = lens.hf_model, lens.prompt(picture(0), QUESTIONS[0])

    def everything(inputs):
        observer = Observer("all", shape_of(model))
        with cl.intervening(model, cl.CLVA()) as run, running(model, [observer]):
            read(model, inputs)
        trace, found = observer.trace(), run.anchors
        masks = (found.positive, found.negative, found.positive_map, found.negative_map)
        return [trace.maps, trace.intensity, *masks, found.heads.sensitive]

    alone = everything(prompt)
    with halved(model, 4):
        found = everything(on_first(prompt))
        places = {place_of(one) for one in found}
    assert places == {FIRST}
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))


@pytest.mark.parametrize("site", ["qformer", "decoder"])
def test_a_qformer_model_on_two_devices(site):
    lens = blip_of("sdpa")
    model, inputs = lens.hf_model, dict(lens.prompt(picture(0), QUESTIONS[0]))
    plain, alone = read(model, inputs), read(model, inputs, cl.CLVA(site=site))
    with halved(model, 5):
        found = read(model, on_first(inputs), cl.CLVA(site=site))
        assert place_of(found) in (FIRST, SECOND)
    assert apart(alone, plain) > 1e-3
    assert torch.equal(found, alone)
