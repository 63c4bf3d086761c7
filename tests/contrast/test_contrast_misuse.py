"""What goes wrong is said before it happens, and leaves nothing behind."""

import copy

import pytest
import torch
from test_contrast_reference import TextGuidance, lens_for, lens_inputs
from tiny_models import QUESTIONS, blip_of, lens_of, picture, tiny_model

import clva_lens as cl
from clva_lens.engine.run import _ACTIVE
from clva_lens.ground.errors import InterventionError, ParameterError, PromptError
from clva_lens.methods.contrast import ContrastRule
from clva_lens.models.kv_cache import CACHE, cache_of
from clva_lens.models.twin import twin

VCD = cl.VCD(noise_step=400)
ICD = cl.ICD(instruction="you are near")


@pytest.mark.parametrize("pair", [(VCD, ICD), (ICD, VCD), (VCD, VCD), (TextGuidance(), VCD)])
def test_two_cut_offs(pair):
    """Each would judge by logits that the other has edited."""
    lens = lens_for("llava")
    with (
        pytest.raises(InterventionError, match=r"cut implausible tokens off.*Use one of them"),
        cl.intervening(lens, cl.compose(*pair)),
    ):
        pass
    assert not _ACTIVE
    inputs = lens_inputs(lens)
    with torch.inference_mode(), cl.intervening(lens, pair[0]):
        with pytest.raises(InterventionError, match=r"cut"), cl.intervening(lens, pair[1]):
            pass
        kept = lens.hf_model(**inputs).logits
    with torch.inference_mode(), cl.intervening(lens, pair[0]):
        assert torch.equal(lens.hf_model(**inputs).logits, kept)
    assert not _ACTIVE


def test_one_after_the_other():
    """A run that lost its contrast may get another, which then edits once."""
    lens = lens_for("llava")
    inputs = lens_inputs(lens)
    with torch.inference_mode(), cl.intervening(lens, ICD):
        wanted = lens.hf_model(**inputs).logits
    with torch.inference_mode(), cl.intervening(lens, cl.KnockOut(layers=())):
        with cl.intervening(lens, VCD):
            lens.hf_model(**inputs)
        with cl.intervening(lens, ICD):
            assert torch.equal(lens.hf_model(**inputs).logits, wanted)


@pytest.mark.parametrize("language", ["t5", "blip2-t5"])
def test_encoder_decoders_are_refused(language):
    lens = blip_of("sdpa", language)
    with pytest.raises(InterventionError, match=r"T5.*Llama or OPT"), cl.intervening(lens, VCD):
        pass


@pytest.mark.parametrize("language", ["opt", "blip2-opt"])
def test_opt_works(language):
    """Absolute positions, counted from the mask: padding must not move them."""
    lens = blip_of("sdpa", language)
    prompt = lens.prompt([picture(i) for i in range(3)], QUESTIONS)
    how = cl.Greedy(max_new_tokens=4)
    plain, found = (cl.generate(lens, prompt, m, how) for m in (None, VCD))
    alone = [cl.generate(lens, lens.prompt(picture(i), QUESTIONS[i]), VCD, how) for i in range(3)]
    assert found.margins == pytest.approx([one.margins[0] for one in alone], abs=1e-4)
    assert found.margins != pytest.approx(plain.margins, abs=0.02)


def test_icd_needs_a_processor():
    lens = lens_for("llava")
    with (
        pytest.raises(InterventionError, match=r"no processor.*cl\.load"),
        cl.intervening(lens.hf_model, ICD),
    ):
        pass


def test_icd_needs_a_reader():
    """BLIP-2's Q-Former reads no text, so there is no place for an instruction."""
    lens = blip_of("sdpa", "blip2-opt")
    with (
        torch.inference_mode(),
        cl.intervening(lens, ICD),
        pytest.raises(PromptError, match=r"this model's reads none"),
    ):
        lens.hf_model(**lens_inputs(lens))
    assert not _ACTIVE


def test_icd_refuses_left_padded_questions():
    lens = lens_for("instructblip")
    inputs = dict(lens_inputs(lens))
    for name in ("qformer_input_ids", "qformer_attention_mask"):
        inputs[name] = inputs[name].flip(1)
    with (
        torch.inference_mode(),
        cl.intervening(lens, ICD),
        pytest.raises(PromptError, match=r"padded on the left.*on the right"),
    ):
        lens.hf_model(**inputs)


def test_features_instead_of_pixels():
    lens = lens_for("llava")
    inputs = dict(lens_inputs(lens))
    with torch.inference_mode():
        pixels = inputs.pop("pixel_values")
        seen = lens.hf_model.get_image_features(pixels, return_dict=True)
        with (
            cl.intervening(lens, VCD),
            pytest.raises(InterventionError, match=r"saw no pixels.*Pass pixel_values"),
        ):
            lens.hf_model(**inputs, mm_encoder_outputs={"image": seen})


def test_joining_after_the_prompt():
    lens = lens_for("llava")
    inputs = lens_inputs(lens)
    with torch.inference_mode(), cl.intervening(lens, cl.KnockOut()):
        cache = cache_of(lens.hf_model(**inputs, use_cache=True))
        with (
            cl.intervening(lens, VCD),
            pytest.raises(InterventionError, match=r"had been read already.*Start it before"),
        ):
            lens.hf_model(input_ids=torch.full((3, 1), 7), **{CACHE: cache})


def test_a_cut_cache():
    """Positions that the second input does not have."""
    lens = lens_for("llava")
    inputs, token = lens_inputs(lens), torch.full((3, 1), 7)
    with torch.inference_mode(), cl.intervening(lens, VCD):
        cache = cache_of(lens.hf_model(**inputs, use_cache=True))
        lens.hf_model(input_ids=token, **{CACHE: cache})
        cache.crop(-1)
        with pytest.raises(InterventionError, match=r"second input has been read with 1 generated"):
            lens.hf_model(input_ids=token, **{CACHE: cache})


def test_the_cache_is_left_as_it_was():
    lens = lens_for("llava")
    inputs = lens_inputs(lens)
    with torch.inference_mode():
        plain = cache_of(lens.hf_model(**inputs, use_cache=True))
        with cl.intervening(lens, VCD):
            cache = cache_of(lens.hf_model(**inputs, use_cache=True))
            assert "reorder_cache" in vars(cache)
        with pytest.raises(KeyError), cl.intervening(lens, VCD):
            other = cache_of(lens.hf_model(**inputs, use_cache=True))
            raise KeyError
    assert set(vars(cache)) == set(vars(other)) == set(vars(plain))


def test_a_patched_forward():
    model = tiny_model()
    head = model.lm_head
    head.forward = lambda x: torch.nn.functional.linear(x, head.weight)
    inputs = lens_inputs(lens_for("llava"))
    with (
        torch.inference_mode(),
        cl.intervening(model, VCD),
        pytest.raises(InterventionError, match=r"Linear runs a forward function.*one device"),
    ):
        model(**inputs)
    assert not _ACTIVE


def test_a_twin_shares_weights_and_nothing_else():
    lens = lens_for("llava")
    model, calls = lens.hf_model, []
    inputs = lens_inputs(lens)
    hook = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    try:
        with torch.inference_mode(), cl.intervening(model, cl.CLVA()):
            other = twin(model)
    finally:
        hook.remove()
    with torch.inference_mode():
        assert torch.equal(other(**inputs).logits, model(**inputs).logits)
    assert calls == []
    pairs = list(zip(model.named_parameters(), other.named_parameters(), strict=True))
    assert all(one is same for (_, one), (_, same) in pairs)
    assert not {id(m) for m in model.modules()} & {id(m) for m in other.modules()}
    assert other.config._attn_implementation == "sdpa"
    assert other.model.language_model.config._attn_implementation == "sdpa"


def test_no_hooks_without_a_contrast():
    """Attention methods alone pay nothing for it."""
    model = lens_of("full", "sdpa").hf_model
    hooks = [model.lm_head._forward_hooks, model._forward_hooks]
    before = [len(one) for one in hooks]
    with cl.intervening(model, cl.CLVA()):
        assert [len(one) for one in hooks] == before
        with cl.intervening(model, VCD):
            assert [len(one) for one in hooks] != before


def test_as_hooks_is_refused():
    lens = lens_for("llava")
    bridge = cl.to_transformer_lens(lens)
    with pytest.raises(InterventionError, match=r"edits logits.*cl\.intervening"):
        VCD.as_hooks(bridge, lens.prompt(picture(0), QUESTIONS[0]))


def test_attribution_is_refused():
    lens = lens_for("llava")
    prompt = lens.prompt(picture(0), QUESTIONS[0])
    with pytest.raises(InterventionError, match=r"no sum over its parts"):
        cl.direct_logit_attribution(lens, prompt, method=VCD)
    assert not _ACTIVE


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cl.VCD(alpha=-1), r"strength of a contrast must be .* >= 0, but is -1"),
        (lambda: cl.VCD(alpha=float("inf")), r"finite number"),
        (lambda: cl.VCD(beta=1.5), r"beta must be in \[0, 1\], but is 1.5"),
        (lambda: cl.VCD(noise_step=1000), r"noise_step must be in 0 to 999, but is 1000"),
        (lambda: cl.VCD(variant="mine"), r"variant must be 'released' or 'paper', but is 'mine'"),
        (lambda: cl.ICD(alpha=-0.1), r"strength of a contrast"),
        (lambda: cl.ICD(beta=-0.1), r"beta must be"),
        (lambda: cl.ICD(instruction="  "), r"instruction is empty"),
        (lambda: ContrastRule(strength=1, beta=0.1, form="product"), r"form must be one of"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_out_of_range(make, message):
    with pytest.raises(ParameterError, match=message):
        make()


def test_methods_can_be_copied():
    assert copy.deepcopy(VCD) == VCD != ICD
