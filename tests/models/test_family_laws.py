"""What every registered family keeps, shown on its own tiny model and inputs."""

from functools import cache

import pytest
import torch
from tiny_families import batch, enliven
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

import clva_lens as cl
from clva_lens.ground.errors import ModelCheckError, ParameterError, PromptError
from clva_lens.lens.check import check_family
from clva_lens.models.family import FAMILIES
from clva_lens.models.llava import Llava
from clva_lens.models.prompt import Prompt, visual_tokens

every_family = pytest.mark.parametrize("name", FAMILIES.names())


@cache
def lively(name):
    """A family and its tiny model, with weights at which attention is peaked."""
    family = FAMILIES.get(name)
    torch.manual_seed(0)
    with torch.inference_mode(False):
        model = family.tiny()
    enliven(model)
    return family, model


def read(model, inputs):
    with torch.inference_mode():
        return model(**inputs).logits[:, -1]


def site_names(family, model):
    return [site.name for site in family.sites(model)]


@every_family
def test_tiny_is_of_the_family(name):
    """The sizes that the tests rely on."""
    family, model = lively(name)
    assert family.matches(model), f"{type(family).__name__}.tiny() makes another family's model"
    for site in family.sites(model):
        assert site.depth == 12
        assert len(site.modules) == len(site.layers) >= 6


@every_family
def test_spans_cover_what_is_no_padding(name):
    family, model = lively(name)
    short, long = (family.tiny_inputs(model, seed, words) for seed, words in ((0, 6), (1, 9)))
    inputs = batch([short, long])
    for site in site_names(family, model):
        spans = family.spans(model, site, inputs)
        parts = torch.stack([spans.system, spans.image, spans.text, spans.generated])
        assert parts.sum(dim=0).max() == 1
        if spans.image.shape == inputs["input_ids"].shape:
            assert torch.equal(spans.real, inputs["attention_mask"].bool())
            assert spans.text.sum(dim=1).tolist() == [6, 9]
        assert spans.visual_count == (family.visual_count(model, site) or spans.visual_count)


@every_family
def test_there_is_a_grid_or_a_reason(name):
    family, model = lively(name)
    inputs = family.tiny_inputs(model)
    for site in site_names(family, model):
        try:
            rows, columns = family.prompt_grid(model, site, inputs)
        except PromptError as error:
            assert len(str(error)) > 40
        else:
            assert rows * columns == family.spans(model, site, inputs).visual_count == 16


@every_family
def test_rows_sum_to_one_and_a_knock_out_moves_the_logits(name):
    family, model = lively(name)
    inputs = family.tiny_inputs(model)

    def prompt(image, question):
        sites = {
            site: visual_tokens(model, site, family.spans(model, site, inputs), inputs)
            for site in site_names(family, model)
        }
        return Prompt(inputs, sites, False, (), (question,), None)

    moved = check_family(model, prompt)
    print(f"{name}: moved by {moved:.3g}")
    assert moved > 0.01


@every_family
def test_a_batch_is_its_singles(name):
    family, model = lively(name)
    asked = [family.tiny_inputs(model, seed, words) for seed, words in ((0, 6), (1, 9))]
    alone = torch.cat([read(model, one) for one in asked])
    assert (alone[0] - alone[1]).abs().max() > 0.05
    torch.testing.assert_close(read(model, batch(asked)), alone, rtol=0, atol=1e-4)


@every_family
def test_what_was_saved_is_what_is_loaded(name, tmp_path):
    family, model = lively(name)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model) and family.matches(loaded)
    inputs = family.tiny_inputs(model)
    assert torch.equal(read(loaded, inputs), read(model, inputs))


def test_what_cannot_be_registered():
    class Nameless(Llava):
        pass

    for item, message in (
        (Llava, r"which is no ModelFamily\. Register an instance"),
        (Nameless(), r"the name it has is 'llava'\. Write name = \"mine\" in the class itself"),
    ):
        with pytest.raises(ParameterError, match=message):
            FAMILIES.register("mine", item)
    assert "mine" not in cl.models()


def test_a_family_that_cannot_say_its_duties_is_found_at_the_door():
    class Forgetful(Llava):
        name = "mine"

        def matches(self, model):
            return isinstance(model, LlavaForConditionalGeneration)

        def visual_count(self, model, site):
            return model.config.nowhere

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FAMILIES, "_items", {"mine": Forgetful()})
        with pytest.raises(
            ModelCheckError, match=r"its visual_count\(\) fails on it \(AttributeError.*Write vis"
        ):
            check_family(Llava().tiny(), lambda *_: pytest.fail("no prompt is made"))
