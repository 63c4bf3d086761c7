"""What a prompt may hold: several pictures, tokens that end rows, no videos; layers left out."""

import pytest
import tiny_families as tiny
import torch
from survey_table import PROVEN
from test_survey import anchored, apart, read

import clva_lens as cl
from clva_lens.engine.run import running
from clva_lens.ground.errors import InterventionError, ParameterError, PromptError
from clva_lens.lens.observers import Observer
from clva_lens.methods.target import shape_of
from clva_lens.models.family import find_family

SOFTMAX = ("full_attention", "sliding_attention")


def two_pictures(kind):
    """BOS, a picture, words, another picture, words."""
    one, other = tiny.sample(kind, 0), tiny.sample(kind, 1, words=9)
    joined = {name: torch.cat([one[name], other[name]]) for name in tiny.pictures(one)}
    for name in one.keys() - joined.keys():
        joined[name] = torch.cat([one[name], other[name][:, 1:]], dim=1)
    return joined, one["input_ids"].shape[1]


@pytest.mark.parametrize(
    "kind", ["gemma3", "internvl", "llava_next", "mistral3", "paligemma", "qwen2_5_vl", "qwen3_vl"]
)
def test_several_pictures(kind):
    """All image tokens count, wherever they lie; rows between pictures are no text after them."""
    model, (inputs, first) = tiny.tiny_model(kind), two_pictures(kind)
    family = find_family(model)
    spans = family.spans(model, "decoder", inputs)
    places = spans.image[0].nonzero()[:, 0]
    assert (places < first).sum() * 2 == len(places)
    after = torch.arange(inputs["input_ids"].shape[1]) > places[-1]
    assert torch.equal(spans.text[0], after)
    assert spans.system[0, first - 6 : first].all()
    with pytest.raises(PromptError, match=r"several pictures|says where its|sizes"):
        family.prompt_grid(model, "decoder", inputs)
    plain, fused = read(model, inputs), read(model, inputs, anchored(model))
    observer, seen = Observer("all", shape_of(model)), {}
    (site,) = family.sites(model)
    model.set_attn_implementation("eager")
    hook = site.modules[0].register_forward_hook(lambda *given: seen.update(weights=given[2][1]))
    try:
        with torch.inference_mode(), running(model, [observer]):
            model(**inputs)
        hook.remove()
        eager = read(model, inputs, anchored(model))
    finally:
        model.set_attn_implementation("sdpa")
    maps = observer.trace(batched=True).maps[0, 0]
    torch.testing.assert_close(maps, seen["weights"][0, :, -1, places])
    effect, error = apart(fused, plain), apart(fused, eager)
    print(f"effect {effect:.3g}, error {error:.3g}")
    assert effect > 0.05 and error < effect / 100


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
def test_tokens_that_end_rows_are_image_tokens(kind):
    """The learned newline stands once behind each row of the picture, and is in the span."""
    model, inputs = tiny.tiny_model(kind), tiny.sample(kind, 0)
    spans = find_family(model).spans(model, "decoder", inputs)
    seen = {}
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    try:
        read(model, inputs)
    finally:
        hook.remove()
    found = seen["inputs_embeds"][0]
    newline = (found == model.model.image_newline).all(dim=1)
    assert newline.sum() == 4  # rows of 8 patches, in the picture of 4 × 8 that tiles make
    assert (newline & ~spans.image[0]).sum() == 0
    ends = newline.nonzero()[:, 0]
    assert set(ends.diff().tolist()) == {9}


@pytest.mark.parametrize(
    "kind", ["llava_next_video", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "video_llava"]
)
def test_videos_are_refused(kind):
    """Where spans are made, and in a run of a prompt that was made elsewhere."""
    model, inputs = tiny.tiny_model(kind), tiny.sample(kind, 0)
    inputs["input_ids"][0, -2] = tiny.VIDEO
    with pytest.raises(PromptError, match=r"has video tokens.*Pass pictures only"):
        find_family(model).spans(model, "decoder", inputs)
    with pytest.raises(InterventionError, match=r"has video tokens.*Pass pictures only"):
        read(model, inputs, anchored(model))


@pytest.mark.parametrize("kind", sorted({"lfm3_vl", "qwen3_5", "qwen3_5_moe"} & set(PROVEN)))
def test_layers_without_softmax_attention_are_left_out_with_a_note(kind):
    model = tiny.tiny_model(kind)
    (site,) = find_family(model).sites(model)
    left_out = [layer for layer in range(site.depth) if layer not in site.layers]
    assert left_out and site.layers
    kinds = model.config.get_text_config().layer_types
    assert left_out == [i for i, one in enumerate(kinds) if one not in SOFTMAX]
    note, *_ = find_family(model).notes(model)
    listed = ", ".join(map(str, left_out))
    assert note.startswith(f"layers {listed} have no softmax attention and are left out; depth")
    with pytest.raises(ParameterError, match=rf"layer {left_out[1]}, but .* has layers"):
        read(model, tiny.sample(kind, 0), cl.CLVA(negative_layer=left_out[1]))


def test_windows_are_in_a_note():
    model = tiny.tiny_model("gemma3")
    assert any("look 64 positions back only" in one for one in find_family(model).notes(model))


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "gemma3"])
def test_a_model_that_is_not_called_itself(kind):
    """Its forward function, or a part of it: nothing would be edited, so that is said."""
    model, inputs = tiny.tiny_model(kind), tiny.sample(kind, 0)
    with (
        pytest.raises(InterventionError, match=r"the model around it was not called.*model\(\*\*"),
        torch.inference_mode(),
        cl.intervening(model, anchored(model)),
    ):
        model.forward(**inputs)
