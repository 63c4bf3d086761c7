"""One gate for prompts: what a processor made is a prompt everywhere, and is run as it is."""

from collections.abc import Callable
from typing import Any

import nnsight
import numpy as np
import pytest
import torch
from tiny_models import QUESTIONS, blip_of, lens_of, picture
from transformers import BatchFeature

import clva_lens as cl
from clva_lens.ground.errors import PromptError
from clva_lens.lens.cache import run_with_cache
from clva_lens.models.prompt import as_prompt

LAYER = "blocks.11.hook_resid_post"


def last(model: Any, asked: Any) -> torch.Tensor:
    return run_with_cache(model, asked, LAYER).logits[:, -1]


# Every function that runs prompts, and a number it makes of one.
DOORS: dict[str, Callable[[Any, Any], torch.Tensor]] = {
    "trace_attention": lambda model, asked: cl.trace_attention(model, asked).intensity,
    "composed_saliency": lambda model, asked: cl.composed_saliency(model, asked),
    "head_means": lambda model, asked: cl.head_means(model, [asked]).values,
    "trace_statistics": lambda model, asked: (
        cl.trace_statistics(model, [asked], progress=False).intensity.mean
    ),
    "logit_lens": lambda model, asked: cl.logit_lens(model, asked).probabilities,
    "direct_logit_attribution": lambda model, asked: (
        cl.direct_logit_attribution(model, asked, tokens=[8, 9]).heads
    ),
    "run_with_cache": last,
    "patch_activations": lambda model, asked: (
        cl.patch_activations(
            model,
            asked,
            asked,
            layers=[3],
            spans="last",
            progress=False,
            metric=lambda x: x[:, 0, 8],
        ).values
    ),
}


def handles(lens):
    return {"lens": lens, "handle": nnsight.NNsight(lens.hf_model), "model": lens.hf_model}


@pytest.mark.parametrize("door", DOORS)
def test_every_function_takes_every_prompt_and_every_model(one, door):
    pair = (picture(0), QUESTIONS[0])
    prompt = one.prompt(*pair)
    made = BatchFeature(dict(prompt.inputs))
    wanted = DOORS[door](one, prompt)
    for name, model in handles(one).items():
        for asked in (prompt, made, dict(made), pair, (*pair, None)):
            if isinstance(asked, tuple) and model is not one:
                with pytest.raises(PromptError, match=r"has no processor.*cl.load"):
                    DOORS[door](model, asked)
            else:
                assert torch.equal(DOORS[door](model, asked), wanted), (name, type(asked))


@pytest.mark.filterwarnings("ignore:.*TransformerLens:UserWarning")
def test_a_bridge_takes_every_prompt(one, untyped):
    bridge, pair = cl.to_transformer_lens(one), (picture(0), QUESTIONS[0])
    prompt = one.prompt(*pair)
    for asked in (prompt, BatchFeature(dict(prompt.inputs)), dict(prompt), pair, (*pair, None)):
        found = bridge.inputs(asked)
        assert found.keys() == {"input", "attention_mask", "pixel_values"}
        for name, value in found.items():
            assert torch.equal(value, prompt["input_ids" if name == "input" else name])
        assert torch.equal(bridge.spans(asked).image, prompt.spans.image)
        assert len(cl.CLVA().as_hooks(bridge, asked)) == len(cl.CLVA().as_hooks(bridge, prompt))
    bare = cl.to_transformer_lens(one.hf_model)
    assert torch.equal(bare.inputs(dict(prompt))["input"], prompt["input_ids"])
    for door in (bridge.inputs, bridge.spans, lambda asked: cl.CLVA().as_hooks(bridge, asked)):
        with pytest.raises(PromptError, match="pair, but got str"):
            door("is there a cup ?")
        with pytest.raises(PromptError, match=r"they are list.*return_tensors='pt'"):
            door({"input_ids": [[1, 2]]})
    for door in (bare.inputs, bare.spans):
        with pytest.raises(PromptError, match="has no processor"):
            door(pair)


def test_generate_takes_every_prompt(one):
    """Alone, several in a list, a tuple or as they come, and lists of pictures and questions."""
    pairs = [(picture(i), QUESTIONS[i]) for i in range(3)]
    how = cl.Greedy(max_new_tokens=3)

    def ids(asked):
        found = cl.generate(one, asked, None, how, progress=False).ids
        return [row.tolist() for row in found]

    wanted = [*ids(pairs[0]), *ids(pairs[1]), *ids(pairs[2])]
    pictures = [image for image, _ in pairs]
    made = BatchFeature(dict(one.prompt(*pairs[1]).inputs))
    for asked in (
        pairs,
        tuple(pairs),
        iter(pairs),
        (pictures, QUESTIONS),
        (pictures, QUESTIONS, None),
        one.prompt(pictures, QUESTIONS),
        [one.prompt(*pairs[0]), made, (*pairs[2], None)],
        [pairs[0], (pictures[1:], QUESTIONS[1:])],
    ):
        assert ids(asked) == wanted
    assert ids((pictures[0], QUESTIONS)) == ids([(pictures[0], one) for one in QUESTIONS])
    assert ids((pictures, QUESTIONS[0])) == ids([(one, QUESTIONS[0]) for one in pictures])
    assert ids((pairs[0], pairs[1])) == wanted[:2]


@pytest.mark.parametrize(
    "asked", ["is it ?", None, 3, picture(0), torch.zeros(()), [3], ["a", "b"]]
)
def test_generate_of_what_is_no_prompt(one, untyped, asked):
    with pytest.raises(PromptError, match=r"must be a Prompt, a processor's output or an"):
        cl.generate(one, asked)


@pytest.mark.parametrize("door", DOORS)
def test_a_prompt_is_run_as_it_is(one, door):
    """What is in its tensors decides, not what they were made of."""
    prompt = one.prompt(picture(0), QUESTIONS[0])
    before = DOORS[door](one, prompt)
    prompt["pixel_values"].zero_()
    blank = DOORS[door](one, prompt)
    assert (blank - before).abs().max() > 0
    assert torch.equal(DOORS[door](one, dict(prompt.inputs)), blank)


@pytest.mark.parametrize("lens", [lens_of("full", "sdpa"), blip_of("sdpa")], ids=["llava", "blip"])
def test_a_processors_output_is_what_prompt_makes(lens):
    pictures, questions = [picture(i) for i in range(2)], QUESTIONS[:2]
    whole = lens.prompt(pictures, questions)
    found = as_prompt(lens.hf_model, BatchFeature(dict(whole.inputs)))
    assert found.batched and not found.images and not found.questions
    assert found.sites.keys() == whole.sites.keys()
    for site in whole.sites:
        assert torch.equal(found.spans_at(site).image, whole.spans_at(site).image)
        assert found.sites[site].grid == whole.sites[site].grid
    assert "a processor's output" in repr(found)
    half = {
        name: one.half() if one.is_floating_point() else one for name, one in whole.inputs.items()
    }
    assert as_prompt(lens, half)["pixel_values"].dtype == lens.hf_model.dtype


@pytest.mark.parametrize("lens", [lens_of("full", "sdpa"), blip_of("sdpa")], ids=["llava", "blip"])
def test_rows_of_a_batch(lens):
    """One row is the batch's own row, padding included, and is answered as in the batch."""
    whole = lens.prompt([picture(i) for i in range(3)], QUESTIONS)
    together = cl.trace_attention(lens, whole)
    for index in range(3):
        row = whole.row(index)
        assert not row.batched and row.questions == (QUESTIONS[index],) and len(row.images) == 1
        for name, rows in whole.inputs.items():
            assert torch.equal(row[name], rows[index : index + 1])
        alone = cl.trace_attention(lens, row)
        assert (alone.intensity - together.intensity[index]).abs().max() < 1e-5
    single = lens.prompt(picture(0), QUESTIONS[0])
    assert single.row(0).inputs is single.inputs
    for index in (-1, 3):
        with pytest.raises(PromptError, match=rf"no prompt {index} in a batch of 3"):
            whole.row(index)
    whole.inputs["patches"] = torch.zeros(7, 2)
    with pytest.raises(PromptError, match=r"has 3 prompts, but patches has 7 rows.*one by one"):
        whole.row(0)


def test_what_is_no_prompt(one, untyped):
    inputs = one.prompt(picture(0), QUESTIONS[0]).inputs
    for asked, message in {
        "a question": "must be a Prompt, a processor's output or an .* pair, but got str",
        (1, 2, 3, 4): "but got tuple",
        None: "but got NoneType",
    }.items():
        for door in ("trace_attention", "run_with_cache"):
            with pytest.raises(PromptError, match=message):
                DOORS[door](one, asked)
    for change, message in (
        ({"input_ids": inputs["input_ids"].tolist()}, "but they are list.*return_tensors='pt'"),
        ({"input_ids": inputs["input_ids"][0]}, r"but they are of shape \(\d+,\)"),
        ({"input_ids": None}, "but they are NoneType"),
        ({"pixel_values": [np.zeros(3)]}, "'pixel_values' is a list, but.* must be tensors"),
    ):
        with pytest.raises(PromptError, match=message):
            as_prompt(one, inputs | change)


def say(model, asked):
    how = cl.Greedy(max_new_tokens=1)
    return cl.generate(model, asked, None, how, progress=False).ids[0].float()


def edited(inputs, **changes):
    """A processor's output with other inputs; those that are None are left out."""
    return {name: one for name, one in {**inputs, **changes}.items() if one is not None}


@pytest.mark.parametrize("door", [*DOORS, "generate"])
def test_an_edited_output_is_run_as_it_is_or_refused(one, untyped, door):
    ask = {**DOORS, "generate": say}[door]
    inputs = one.prompt(picture(0), QUESTIONS[0]).inputs
    ids, pixels, mask = (inputs[name] for name in ("input_ids", "pixel_values", "attention_mask"))
    wanted = ask(one, inputs)
    for same in ({"labels": ids}, {"labels": ids[:, :3]}, {"inputs_embeds": None}):
        assert torch.equal(ask(one, {**inputs, **same}), wanted)
    hole = pixels.clone()
    hole[0, 0, 3, 3] = float("nan")
    for changes, message in (
        ({"pixel_value": pixels}, r"takes no input 'pixel_value'\. Did you mean 'pixel_values'"),
        ({"token_type_ids": ids}, r"takes no input 'token_type_ids'.*Take it out"),
        ({"pixel_values": None}, "none of input_ids, attention_mask is a picture"),
        ({"pixel_values": pixels.int()}, "is a picture .in floating point."),
        ({"pixel_values": hole}, "'pixel_values' has values that are NaN"),
        ({"attention_mask": mask[:, :-1]}, r"must be \[1, \d+\], as input_ids, of 0 and 1"),
        ({"attention_mask": mask * 2}, "of 0 and 1"),
        ({"attention_mask": mask - 0.5}, "of 0 and 1"),
        # What only the model itself knows
        ({"pixel_values": torch.cat([pixels, pixels])}, "cannot run this processor's output: "),
        ({"pixel_values": pixels[..., :-1]}, "cannot run this processor's output: "),
        ({"pixel_values": pixels[0]}, "cannot run this processor's output: |as many pictures"),
        ({"input_ids": ids.index_fill(1, torch.tensor([3]), 10**6)}, "cannot run this"),
        ({"input_ids": ids.double()}, "cannot run this processor's output: "),
        ({"position_ids": ids[:, :0]}, "cannot run this processor's output: "),
    ):
        with pytest.raises(PromptError, match=message) as caught:
            ask(one, edited(inputs, **changes))
        if "cannot run" in str(caught.value):
            assert caught.value.__cause__ is not None


@pytest.mark.parametrize("door", ["trace_attention", "run_with_cache", "generate"])
def test_what_a_model_needs_is_asked_for(door):
    """InstructBLIP's generate would answer without what the Q-Former reads."""
    lens = blip_of("sdpa")
    inputs = lens.prompt(picture(0), QUESTIONS[0]).inputs
    with pytest.raises(PromptError, match=r"has no 'qformer_input_ids', which the model needs"):
        {**DOORS, "generate": say}[door](lens, edited(inputs, qformer_input_ids=None))


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, ZeroDivisionError])
def test_what_is_no_fault_of_the_inputs_is_raised(one, error):
    """Memory that runs out; and anything that comes of a prompt that was made here."""
    prompt = one.prompt(picture(0), QUESTIONS[0])

    def fail(*_: Any) -> None:
        raise error

    handle = one.hf_model.get_input_embeddings().register_forward_pre_hook(fail)
    try:
        for asked in (prompt, dict(prompt)):
            foreign = error is ZeroDivisionError and asked is not prompt
            with pytest.raises(PromptError if foreign else error):
                cl.trace_attention(one, asked)
    finally:
        handle.remove()


@pytest.mark.parametrize("door", DOORS)
def test_too_long_is_the_same_error_everywhere(one, door):
    longest = one.hf_model.config.text_config.max_position_embeddings
    question = "is there a cup ? " * 60
    with pytest.raises(PromptError, match=rf"has \d+ tokens, but the model has {longest} posit"):
        one.prompt(picture(0), question)
    inputs = one.prompt(picture(0), QUESTIONS[0]).inputs
    more = torch.full((1, longest), 9)
    ids = torch.cat([inputs["input_ids"], more], dim=1)
    long = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(PromptError, match=rf"tokens, but the model has {longest} positions"):
        DOORS[door](one, long)
    padded = long | {"attention_mask": torch.cat([torch.zeros_like(more), torch.ones_like(ids)], 1)}
    padded["input_ids"] = torch.cat([torch.zeros_like(more), inputs["input_ids"]], dim=1)
    padded["attention_mask"] = padded["attention_mask"][:, : padded["input_ids"].shape[1]]
    assert as_prompt(one, padded)["input_ids"].shape[1] > longest  # padding has no position
