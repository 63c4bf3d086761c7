"""What is refused at an InstructBLIP, and in which words."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from tiny_models import (
    QUESTIONS,
    blip_processor,
    lens_of,
    make_processor,
    picture,
    tiny_blip,
)

import clva_lens as cl
from clva_lens.ground.errors import (
    InterventionError,
    ModelCheckError,
    ModelLoadError,
    ParameterError,
    PromptError,
)
from clva_lens.lens.check import check_family
from clva_lens.models.family import FAMILIES
from clva_lens.models.instructblip import InstructBlip
from clva_lens.models.kv_cache import CACHE, cache_of

STRONG = {"qformer": cl.CLVA(tau=1.0), "decoder": cl.CLVA(tau=1.0, site="decoder")}


def refused(lens, inputs, method, message, error=InterventionError):
    """Check that a forward pass and generate() are refused, inside and outside of a trace."""
    with pytest.raises(error, match=message), cl.intervening(lens, method):
        lens.hf_model(**inputs)
    with pytest.raises(error, match=message), cl.intervening(lens, method):
        lens.hf_model.generate(**inputs, max_new_tokens=2)
    with pytest.raises(error, match=message), lens.trace(**inputs):
        cl.intervene(method)
        lens.output.logits.save()


# ── a text without a picture, a picture without its text ──


def test_question_without_a_picture(one_blip, untyped):
    with pytest.raises(PromptError, match=r"a question but no image.*model.prompt\(image"):
        one_blip.prompt(None, QUESTIONS[0])
    with pytest.raises(PromptError, match=r"but got NoneType"):
        one_blip.prompt([picture(0), None], QUESTIONS[0])
    with pytest.raises(PromptError, match=r"question 0 is ''"):
        one_blip.prompt(picture(0), "")


def test_text_without_image_tokens(one_blip, ask, site):
    """pixel_values are there, but no token takes what the queries read: no effect could show."""
    inputs = dict(ask(one_blip).inputs)
    inputs["input_ids"] = inputs["input_ids"][:, 8:]
    inputs["attention_mask"] = inputs["attention_mask"][:, 8:]
    refused(one_blip, inputs, STRONG[site], r"no image tokens.*model.prompt\(image, question\)")


def test_no_text_after_the_image(one_blip, ask):
    inputs = dict(ask(one_blip).inputs)
    for name in ("input_ids", "attention_mask"):
        inputs[name] = inputs[name][:, :8]
    refused(one_blip, inputs, STRONG["decoder"], r"ends with its image.*Put the question after")


def test_embeddings_only(one_blip, ask):
    """The image tokens cannot be found among embeddings."""
    inputs = dict(ask(one_blip).inputs)
    embeds = one_blip.hf_model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    with (
        cl.intervening(one_blip, STRONG["decoder"]),
        pytest.raises(InterventionError, match=r"inputs_embeds only.*Pass input_ids"),
    ):
        one_blip.hf_model(**inputs, inputs_embeds=embeds)


def test_a_language_model_without_its_picture(one_blip, ask):
    """The language model alone, on embeddings that nobody saw the ids of."""
    language = one_blip.hf_model.language_model
    embeds = torch.zeros(1, 14, 32)
    with (
        cl.intervening(one_blip, STRONG["decoder"]),
        pytest.raises(InterventionError, match=r"inputs_embeds only.*Pass input_ids"),
    ):
        language(inputs_embeds=embeds)


def test_a_qformer_without_a_picture(one_blip):
    """The Q-Former's text alone, as in retrieval."""
    with (
        cl.intervening(one_blip, STRONG["qformer"]),
        pytest.raises(InterventionError, match=r"without queries or without a picture.*pixel_val"),
    ):
        one_blip.hf_model.qformer(input_ids=torch.tensor([[1, 7]]))


def test_processor_without_a_qformer_tokenizer(one_blip):
    """BLIP-2's processor cannot make qformer_input_ids, which InstructBLIP needs."""
    processor = blip_processor("blip2-opt")
    with pytest.raises(
        PromptError, match=r"Blip2Processor has no qformer_tokenizer.*qformer_input"
    ):
        cl.load((one_blip.hf_model, processor))
    lens = cl.load((one_blip.hf_model, processor), check=False)
    with pytest.raises(PromptError, match=r"Q-Former reads the question too"):
        lens.prompt(picture(0), QUESTIONS[0])


@pytest.mark.parametrize("methods", [(), tuple(STRONG.values())])
def test_missing_qformer_input_ids(one_blip, ask, methods):
    """transformers fails somewhere inside; what is said is what is missing."""
    inputs = {k: v for k, v in ask(one_blip, 2).inputs.items() if not k.startswith("qformer")}
    message = r"without qformer_input_ids. Pass them: model.prompt\(image, question\) has them"
    with pytest.raises(PromptError, match=message), cl.intervening(one_blip, *methods):
        one_blip.hf_model.generate(**inputs, max_new_tokens=2)
    with pytest.raises(PromptError, match=message), cl.intervening(one_blip, *methods):
        one_blip.hf_model(**inputs)
    with pytest.raises(PromptError, match=message), cl.observing(one_blip):
        one_blip.hf_model(**inputs)
    with pytest.raises(TypeError, match=r"mine"), cl.intervening(one_blip, *methods):
        raise TypeError("mine")  # another error is passed on as it is


# ── sites, layers, rows ──


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (cl.CLVA(site="vision"), r"no attention site 'vision'; it has 'qformer' and 'decoder'"),
        (cl.KnockOut(site="encoder"), r"no attention site 'encoder'; it has 'qformer' and"),
        (cl.CLVA(layers=(5,)), r"layers names layer 5.*qformer has layers 0, 2, 4, 6, 8, 10"),
        (cl.CLVA(positive_layer=3), r"positive_layer names layer 3.*layers 0, 2, 4, 6, 8, 10"),
        (cl.CLVA(negative_layer=1), r"negative_layer names layer 1.*layers 0, 2, 4"),
        (cl.CLVA(layers=(4, 6)), r"layers names layer 4.*anchors are read at layers 0 and 4"),
        (cl.KnockOut(layers=(11,)), r"layers names layer 11.*layers 0, 2, 4, 6, 8, 10"),
        (cl.CLVA(site="decoder", layers=(12,)), r"layer 12.*decoder has layers 0 to 11"),
        (cl.CLVA(rows="last"), r"rows='last'.*'qformer' are queries without an order.*rows='text'"),
        (cl.KnockOut(rows="last"), r"rows='last'.*'qformer' are queries without an order"),
        (
            cl.CLVA(heads=cl.HeadClasses.from_indices({4: [1]}, {0: [0]}, layers=8, heads=4)),
            r"heads is for \(8, 4\).*model's qformer has \(12, 4\)",
        ),
        (  # row 4 of a table of the site's six layers is layer 8
            cl.CLVA(heads=cl.HeadClasses.from_indices({4: [1]}, {0: [0]}, layers=6, heads=4)),
            r"heads has no sensitive head at layer 4",
        ),
    ],
)
def test_does_not_fit_the_model(one_blip, ask, method, message):
    with pytest.raises(ParameterError, match=message), cl.intervening(one_blip, method):
        pass
    with pytest.raises(ParameterError, match=message):
        cl.generate(one_blip, ask(one_blip), method)
    with pytest.raises(ParameterError, match=message):
        cl.trace_attention(one_blip, ask(one_blip), method)
    with pytest.raises(ParameterError, match=message), one_blip.trace(ask(one_blip)):
        cl.intervene(method)


def test_site_of_a_model_without_a_qformer(one, ask):
    message = r"LlavaFor.* has no attention site 'qformer'; it has 'decoder'.*leave it out"
    for method in (cl.CLVA(site="qformer"), cl.KnockOut(site="qformer")):
        with pytest.raises(ParameterError, match=message), cl.intervening(one, method):
            pass
    with pytest.raises(ParameterError, match=message):
        cl.trace_attention(one, ask(one), site="qformer")
    with pytest.raises(ParameterError, match=message), cl.observing(one, site="qformer"):
        pass
    with pytest.raises(ParameterError, match=message), one.trace(ask(one)):
        cl.observe(site="qformer")


def test_unknown_site_to_look_at(one_blip, ask):
    message = r"no attention site 'vision'; it has 'qformer' and 'decoder'"
    with pytest.raises(ParameterError, match=message):
        cl.trace_attention(one_blip, ask(one_blip), site="vision")
    with pytest.raises(ParameterError, match=r"qformer has layers 0, 2, 4, 6, 8, 10"):
        cl.composed_saliency(one_blip, ask(one_blip), qformer_layers=(1,))
    with pytest.raises(ParameterError, match=r"decoder has layers 0 to 11"):
        cl.composed_saliency(one_blip, ask(one_blip), layers=(12,))


@pytest.mark.parametrize(("where", "limit"), [("qformer", "3.87"), ("decoder", "2.65")])
def test_a_threshold_that_nothing_can_exceed(one_blip, ask, where, limit):
    """√15 over 16 patches, √7 over 8 queries."""
    tau = float(limit)
    method = cl.CLVA(tau=tau + 0.01, site=where)
    with (
        cl.intervening(one_blip, method),
        pytest.raises(ParameterError, match=rf"at most {limit}, so both.*Pass tau below"),
    ):
        one_blip.hf_model(**ask(one_blip, 2).inputs)
    below = cl.CLVA(tau=tau - 0.02, site=where)
    with torch.inference_mode(), cl.intervening(one_blip, below) as run:
        one_blip.hf_model(**ask(one_blip, 2).inputs)
    assert run.anchors.empty_positive <= 2


def test_empty_masks_are_a_counted_no_op(one_blip, ask):
    inputs = ask(one_blip, 3).inputs
    with torch.inference_mode():
        plain = one_blip.hf_model(**inputs).logits
        with cl.intervening(one_blip, cl.CLVA(tau=3.86)) as run:
            found = one_blip.hf_model(**inputs).logits
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)
    assert (run.anchors.empty_positive, run.anchors.empty_negative) == (3, 3)


def test_a_method_that_joins_after_the_prompt(one_blip, ask):
    inputs = ask(one_blip).inputs
    with torch.inference_mode():
        cache = cache_of(one_blip.hf_model(**inputs, use_cache=True).language_model_outputs)
        token = inputs["input_ids"][:, -1:]
        with (
            cl.intervening(one_blip, STRONG["decoder"]),
            pytest.raises(InterventionError, match=r"filled key-value cache.*Start the run before"),
        ):
            one_blip.hf_model.language_model(input_ids=token, **{CACHE: cache})


# ── at the door ──


def test_picture_of_another_size_is_found_at_the_door(one_blip):
    processor = blip_processor()
    processor.image_processor.size = {"shortest_edge": 40}
    processor.image_processor.crop_size = {"height": 40, "width": 40}
    with pytest.raises(ModelCheckError, match=r"makes pictures of 40 × 40.*takes 32 × 32"):
        cl.load((one_blip.hf_model, processor))


def test_old_checkpoint_without_an_image_token():
    model = tiny_blip()
    model.config.image_token_index = None
    message = r"no image_token_index.*old checkpoint.*<image>.*resize.*image_token_index"
    with pytest.raises(ModelLoadError, match=message):
        cl.load((model, blip_processor()))
    with pytest.raises(ModelLoadError, match=message):
        cl.load((model, blip_processor()), check=False).prompt(picture(0), QUESTIONS[0])


def test_unsupported_language_model():
    model = tiny_blip()
    model.language_model.config.model_type = "mamba"
    message = r"language model is a 'mamba'.*it knows llama, opt, t5"
    with pytest.raises(ModelLoadError, match=message):
        cl.load((model, blip_processor()))
    with pytest.raises(ModelLoadError, match=message), cl.intervening(model, STRONG["decoder"]):
        pass


class _WrongModules(InstructBlip):
    """A family that names modules of the Q-Former that are never called."""

    def sites(self, model):
        reading, answering = super().sites(model)
        wrong = tuple(deepcopy(module) for module in reading.modules)
        return reading._replace(modules=wrong), answering


class _WrongConfig(InstructBlip):
    """A family that names a configuration that the decoder's modules do not read."""

    def sites(self, model):
        reading, answering = super().sites(model)
        return reading, answering._replace(config=model.config.vision_config)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (_WrongModules, r"no attention was seen in some layers of the qformer.*'instructblip'"),
        (_WrongConfig, r"no attention was seen in some layers of the decoder.*'instructblip'"),
    ],
)
def test_check_fails_if_the_family_is_wrong(monkeypatch, wrong, message):
    monkeypatch.setitem(FAMILIES._items, "instructblip", wrong())
    with pytest.raises(ModelCheckError, match=message):
        cl.load((tiny_blip(), blip_processor()))


def test_check_looks_at_both_sites(one_blip, ask, monkeypatch):
    """A decoder that ignores what the queries read fails at the door too."""
    assert check_family(one_blip.hf_model, one_blip.prompt) > 0
    model = tiny_blip()
    with torch.no_grad():
        for layer in model.language_model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    with pytest.raises(ModelCheckError, match=r"left the logits unchanged"):
        cl.load((model, blip_processor()))


def test_another_models_processor(one_blip):
    with pytest.raises((PromptError, ModelLoadError), match=r"qformer_tokenizer"):
        cl.load((one_blip.hf_model, make_processor()))
    bare = SimpleNamespace(tokenizer=one_blip.words)
    with pytest.raises(ModelLoadError, match=r"no image processor"):
        cl.load((one_blip.hf_model, bare))


def test_two_models_of_two_families_at_once(one_blip, ask):
    """Each has its own runs, one of them at two sites."""
    llava = lens_of("full", "sdpa")
    both = cl.compose(*STRONG.values())
    with torch.inference_mode():
        with cl.intervening(one_blip, both):
            wanted = one_blip.hf_model(**ask(one_blip).inputs).logits
        with cl.intervening(llava, cl.CLVA(tau=1.0)):
            other = llava.hf_model(**ask(llava).inputs).logits
            with cl.intervening(one_blip, both):
                assert torch.equal(one_blip.hf_model(**ask(one_blip).inputs).logits, wanted)
            assert torch.equal(llava.hf_model(**ask(llava).inputs).logits, other)
