"""Adapters of PEFT around a model, and weights that bitsandbytes has quantised.

Both change linear layers only, so what they must leave right is attention under edits, and what
they make impossible is reading weights: that is refused.
"""

import copy
import warnings
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from test_survey import apart, write
from tiny_models import QUESTIONS, make_processor, picture, tiny_model
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.integrations.peft import MIN_PEFT_VERSION

import clva_lens as cl
from clva_lens.ground.errors import ModelLoadError
from clva_lens.lens.check import check_family


@pytest.fixture(autouse=True)
def quiet():
    """Both packages use what transformers deprecates; bitsandbytes says that it casts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ── PEFT ──


def adapted(targets=("q_proj", "v_proj"), task=None):
    """The tiny LLaVA with random LoRA adapters; with a task PEFT wraps it in another class."""
    torch.manual_seed(7)
    config = LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, task_type=task)
    return get_peft_model(tiny_model(), config).eval()


@pytest.fixture(scope="module")
def prompt():
    return cl.load((tiny_model(), make_processor()), check=False).prompt(picture(0), QUESTIONS[0])


def called(model, prompt, *methods):
    with torch.inference_mode(), cl.intervening(model, *methods):
        return model(**prompt).logits[:, -1]


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("how", [write, called])
def test_lora_is_its_merged_weights(prompt, task, how):
    """Around the PEFT model itself: adapters act, CLVA acts, both as with merged weights."""
    model, merged = adapted(task=task), adapted(task=task).merge_and_unload()
    plain, edited = how(merged, prompt), how(merged, prompt, cl.CLVA())
    adapter, effect = apart(how(tiny_model(), prompt), plain), apart(edited, plain)
    error = apart(how(model, prompt, cl.CLVA()), edited)
    print(f"adapter moves {adapter:.3g}, CLVA {effect:.3g}, error {error:.3g}")
    assert adapter > 1 and effect > 1 and error < 1e-4
    assert apart(how(model, prompt), plain) < 1e-4


REFUSED = pytest.mark.skipif(
    Version(version("peft")) < Version(MIN_PEFT_VERSION),
    reason=f"un-skip with PEFT {MIN_PEFT_VERSION}: this transformers' add_adapter asks for it",
)


@pytest.mark.parametrize("wrapped", [True, pytest.param(False, marks=REFUSED)])
def test_a_lens_of_lora(prompt, wrapped):
    """A PEFT model, or transformers' own ``add_adapter`` on a model."""
    merged = cl.load((adapted().merge_and_unload(), make_processor()))
    if wrapped:
        model = adapted()
    else:
        model = tiny_model()
        model.add_adapter(adapted().peft_config["default"])
        given = adapted().get_base_model().state_dict()
        model.load_state_dict(given)
    lens = cl.load((model, make_processor()))
    seen, wanted = (cl.trace_attention(one, prompt) for one in (lens, merged))
    assert wanted.maps.std() > 0.05
    assert apart(seen.maps, wanted.maps) < 1e-5
    with torch.no_grad(), lens.trace(prompt):
        cl.intervene(cl.CLVA())
        traced = lens.output.logits[:, -1].save()
    assert apart(traced, called(merged, prompt, cl.CLVA())) < 1e-4
    assert apart(cl.logit_lens(lens, prompt).margin, cl.logit_lens(merged, prompt).margin) < 1e-4
    parts, known = (cl.direct_logit_attribution(one, prompt) for one in (lens, merged))
    assert apart(parts.heads, known.heads) < 1e-4


def test_weights_beside_an_adapter_are_not_read(prompt):
    """Direct attribution would leave out what an adapter adds to the heads' output."""
    lens = cl.load((adapted(["o_proj"]), make_processor()))
    with pytest.raises(ModelLoadError, match=r"an adapter adds to it. Merge it first"):
        cl.direct_logit_attribution(lens, prompt)
    merged = cl.load((adapted(["o_proj"]).merge_and_unload(), make_processor()))
    assert cl.direct_logit_attribution(merged, prompt).heads.abs().max() > 0.1
    lens = cl.load((adapted(["down_proj"]), make_processor()))  # an MLP's output is not divided
    merged = cl.load((adapted(["down_proj"]).merge_and_unload(), make_processor()))
    parts, known = (cl.direct_logit_attribution(one, prompt) for one in (lens, merged))
    assert apart(parts.mlps, known.mlps) < 1e-4


def test_adapters_that_are_no_weights():
    model = get_peft_model(
        tiny_model(), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    )
    with pytest.raises(ModelLoadError, match=r"virtual tokens before the prompt.*such as LoRA"):
        cl.load((model, make_processor()))


# ── bitsandbytes ──

SKIPPED = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
QUANTISED = {
    "int8": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=SKIPPED),
    "nf4": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=SKIPPED
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-llava"
    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(path)
    make_processor().save_pretrained(path)
    return path


@pytest.mark.parametrize(("kind", "held"), [("int8", torch.int8), ("nf4", torch.uint8)])
def test_quantised_weights(folder, kind, held):
    """The error is that of eager attention in the same quantised model, edited or not."""
    lens = cl.load(folder, quantization_config=copy.deepcopy(QUANTISED[kind]))
    model = lens.hf_model
    assert model.get_decoder().layers[3].self_attn.q_proj.weight.dtype == held
    asked = lens.prompt(picture(0), QUESTIONS[0])
    assert asked["pixel_values"].dtype == model.dtype == torch.float32
    plain, edited = called(model, asked), called(model, asked, cl.CLVA())
    assert torch.equal(called(model, asked, cl.CLVA(alpha=0.0, beta=0.0)), plain)
    seen = cl.trace_attention(lens, asked)
    model.set_attn_implementation("eager")
    rounding = apart(called(model, asked), plain)
    effect, error = apart(edited, plain), apart(called(model, asked, cl.CLVA()), edited)
    again = cl.trace_attention(lens, asked)
    print(f"effect {effect:.3g}, error {error:.3g}, of plain logits {rounding:.3g}")
    assert effect > 0.5 and error < 0.1
    assert seen.maps.std() > 0.05 and apart(seen.maps, again.maps) < 0.02
    assert check_family(model, lens.prompt) > 0.1
    assert cl.logit_lens(lens, asked).margin.isfinite().all()
    with pytest.raises(ModelLoadError, match=rf"it is quantised \({held}\)"):
        cl.direct_logit_attribution(lens, asked)


def test_the_configuration_arrives(folder, monkeypatch):
    """``quantization_config`` goes to transformers as it is."""
    given, config = {}, QUANTISED["nf4"]
    own = AutoModelForImageTextToText.from_pretrained

    def keep(*args, **options):
        given.update(options)
        return own(*args, **(options | {"quantization_config": None}))

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", keep)
    cl.load(folder, quantization_config=config, check=False)
    assert given["quantization_config"] is config
