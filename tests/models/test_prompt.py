"""Images and questions become inputs, spans and a grid; what cannot is refused by name."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import QUESTIONS, make_processor, picture

import clva_lens as cl
from clva_lens.ground.errors import PromptError
from clva_lens.models.pictures import read_image

QUESTION = QUESTIONS[0]


def words(lens, ids):
    return lens.processor.tokenizer.convert_ids_to_tokens(ids)


def span_words(lens, prompt, span, item=0):
    return words(lens, prompt.inputs["input_ids"][item][getattr(prompt.spans, span)[item]].tolist())


# ── images ──


def test_every_kind_of_image_is_the_same(one, tmp_path):
    pixels = picture(0)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    kinds = {
        "array": pixels,
        "path": path,
        "text path": str(path),
        "PIL": Image.fromarray(pixels),
        "RGBA": np.dstack([pixels, np.full((32, 32), 255, dtype=np.uint8)]),
        "PIL RGBA": Image.fromarray(pixels).convert("RGBA"),
        "floats": pixels.astype(np.float32) / 255,
        "doubles": pixels / 255,
        "tensor": torch.from_numpy(pixels.copy()),
        "float tensor": torch.from_numpy(pixels / 255),
        "view": pixels[::-1][::-1],
    }
    wanted = one.prompt(pixels, QUESTION).inputs["pixel_values"]
    assert wanted.shape == (1, 3, 32, 32)
    for name, image in kinds.items():
        found = one.prompt(image, QUESTION).inputs["pixel_values"]
        assert torch.equal(found, wanted), name


def test_bfloat16_pixels(one):
    pixels = torch.from_numpy(picture(0) / 255).bfloat16()
    found = np.asarray(read_image(pixels)).astype(int)
    assert np.abs(found - picture(0)).max() <= 1  # 8 bits of mantissa


def test_grey_becomes_rgb(one):
    grey = picture(0)[:, :, 0]
    assert np.array_equal(np.asarray(read_image(grey)), np.dstack([grey] * 3))
    palette = Image.fromarray(picture(0)).quantize(4)
    assert read_image(palette).mode == "RGB"


def test_pixels_are_neither_scaled_nor_shifted():
    """0 stays 0, 1.0 becomes 255, and halves round to the nearest."""
    floats = np.array([[0.0, 1.0, 0.5, 1 / 255]])
    assert np.asarray(read_image(floats))[0, :, 0].tolist() == [0, 255, 128, 1]


def test_an_image_is_not_changed(one):
    pixels = picture(0) / 255
    before = pixels.copy()
    one.prompt(pixels, QUESTION)
    assert np.array_equal(pixels, before)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((4, 4, 3), np.nan), "48 pixel values that are NaN or infinite"),
        (np.full((4, 4), np.inf), "16 pixel values that are NaN"),
        (np.full((4, 4, 3), 1.5), r"must be in \[0, 1\], but range from 1.5 to 1.5.*Divide by 255"),
        (np.full((4, 4, 3), -0.1), r"must be in \[0, 1\], but range from -0.1"),
        (np.zeros((4, 4, 3), dtype=np.int64), "uint8, uint16 or floats.*but are int64"),
        (np.zeros((4, 4), dtype=complex), "uint8, uint16 or floats.*but are complex"),
        (np.zeros((3, 8, 8), dtype=np.uint8), r"but is \[3, 8, 8\]. Transpose"),
        (np.zeros((2, 4, 4, 3), dtype=np.uint8), r"but is \[2, 4, 4, 3\]"),
        (np.zeros(4, dtype=np.uint8), r"but is \[4\]"),
        (np.zeros((0, 4, 3), dtype=np.uint8), r"empty \(\[0, 4, 3\]\)"),
        (np.zeros((0, 4, 3)), r"empty \(\[0, 4, 3\]\)"),
        ("no/such/picture.png", "no image file 'no/such/picture.png'"),
    ],
)
def test_bad_images(one, image, message):
    with pytest.raises(PromptError, match=message):
        one.prompt(image, QUESTION)


def test_bad_files(one, tmp_path):
    text = tmp_path / "notes.png"
    text.write_text("this is no picture")
    with pytest.raises(PromptError, match=r"notes.png' is not an image that Pillow can read"):
        one.prompt(text, QUESTION)
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    with pytest.raises(PromptError, match=r"broken.jpg' is broken or truncated"):
        one.prompt(broken, QUESTION)
    with pytest.raises(PromptError, match=r"there is no image file"):
        one.prompt(tmp_path, QUESTION)  # a folder
    empty = tmp_path / "empty.png"
    empty.touch()
    with pytest.raises(PromptError, match=r"empty.png' is not an image"):
        one.prompt(empty, QUESTION)


def test_a_picture_too_large_to_be_safe(one, tmp_path, monkeypatch):
    """Pillow refuses decompression bombs; the refusal names the file."""
    path = tmp_path / "huge.png"
    Image.fromarray(picture(0)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(PromptError, match=r"huge.png' is too large.*Scale"):
        one.prompt(path, QUESTION)


# ── questions ──


@pytest.mark.parametrize("question", ["", "   ", "\n", ["is there a cup ?", ""]])
def test_empty_question(one, question):
    with pytest.raises(
        PromptError, match=r"question \d is '.*'. Pass a question that is not empty"
    ):
        one.prompt(picture(0), question)


def test_question_without_a_picture(one, untyped):
    with pytest.raises(PromptError, match=r"a question but no image"):
        one.prompt(None, QUESTION)
    with pytest.raises(
        PromptError, match=r"must be a path, a PIL image or an array, but got NoneType"
    ):
        one.prompt([picture(0), None], QUESTION)
    with pytest.raises(PromptError, match=r"but got int"):
        one.prompt(3, QUESTION)


def test_lists_that_do_not_fit(one):
    with pytest.raises(PromptError, match=r"got 2 images but 3 questions"):
        one.prompt([picture(0), picture(1)], QUESTIONS)
    with pytest.raises(PromptError, match=r"got 0 images and 1 questions"):
        one.prompt([], QUESTION)
    with pytest.raises(PromptError, match=r"got 1 images and 0 questions"):
        one.prompt(picture(0), [])


def test_image_placeholder_in_the_question(one):
    with pytest.raises(
        PromptError, match=r"question contains '<image>', which stands for an image"
    ):
        one.prompt(picture(0), "what is <image> ?")


# ── spans and grid ──


def test_spans_by_hand(one):
    """<s> system user: 16 × <image> newline question assistant: – and nothing else."""
    prompt = one.prompt(picture(0), "is there a cup ?")
    lead = [
        "<s>",
        *["a", "chat", "between", "a", "curious", "user", "and", "an", "assistant", "."],
        "user:",
    ]
    assert span_words(one, prompt, "system") == lead
    assert span_words(one, prompt, "image") == ["<image>"] * 16
    assert span_words(one, prompt, "text") == ["\n", "is", "there", "a", "cup", "?", "assistant:"]
    assert not prompt.spans.generated.any()
    assert not prompt.batched
    assert "12 system, 16 image (4 × 4 grid), 7 text" in repr(prompt)


def test_batches_are_padded_on_the_left(lens):
    images = [picture(i) for i in range(3)]
    batch = lens.prompt(images, QUESTIONS)
    assert batch.batched
    assert batch.inputs["pixel_values"].shape == (3, 3, 32, 32)
    lengths = []
    for item in range(3):
        alone = lens.prompt(images[item], QUESTIONS[item])
        length = alone.inputs["input_ids"].shape[1]
        lengths.append(length)
        mask = batch.inputs["attention_mask"][item]
        assert mask.tolist() == [0] * (len(mask) - length) + [1] * length
        assert torch.equal(batch.inputs["input_ids"][item, -length:], alone.inputs["input_ids"][0])
        assert torch.equal(batch.inputs["pixel_values"][item], alone.inputs["pixel_values"][0])
        for span in ("system", "image", "text"):
            found = getattr(batch.spans, span)[item]
            assert torch.equal(found[-length:], getattr(alone.spans, span)[0])
            assert not found[:-length].any()
    assert len(set(lengths)) == 3


def test_spans_are_disjoint_and_cover_all_but_padding(lens, ask):
    prompt = ask(lens, 3)
    spans = prompt.spans
    members = torch.stack([spans.system, spans.image, spans.text, spans.generated]).sum(dim=0)
    assert torch.equal(members, prompt.inputs["attention_mask"])


def test_image_tokens_are_the_models_features(lens, ask):
    """Law 7: as many image tokens as the model makes features, and the grid multiplies out."""
    prompt = ask(lens, 2)
    with torch.inference_mode():
        features = lens.hf_model.model.get_image_features(prompt.inputs["pixel_values"])
    features = getattr(features, "pooler_output", features)
    assert [len(one) for one in features] == [16, 16]
    assert prompt.spans.visual_count == 16
    assert prompt.grid == (4, 4)
    assert prompt.grid[0] * prompt.grid[1] == prompt.spans.visual_count


def test_grid_follows_the_picture(one):
    """Token (r, c) of the grid is patch (r, c): a changed patch changes that embedding most."""
    plain = one.prompt(np.zeros((32, 32, 3), dtype=np.uint8), QUESTION)
    tower = one.hf_model.model.vision_tower.embeddings
    for row, column in ((0, 0), (1, 3), (3, 2)):
        pixels = np.zeros((32, 32, 3), dtype=np.uint8)
        pixels[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 255
        changed = one.prompt(pixels, QUESTION)
        with torch.inference_mode():
            gap = tower(changed.inputs["pixel_values"]) - tower(plain.inputs["pixel_values"])
        found = changed.on_grid(gap[0, 1:].norm(dim=-1))
        assert found.shape == (4, 4)
        assert (found > 0).nonzero().tolist() == [[row, column]]


def test_on_grid_misuse(one, ask):
    prompt = ask(one)
    values = torch.arange(32.0).reshape(2, 16)
    assert prompt.on_grid(values).shape == (2, 4, 4)
    assert prompt.on_grid(values)[1, 2, 3] == 16 + 2 * 4 + 3
    with pytest.raises(PromptError, match=r"map has 15 values, but the grid is 4 × 4"):
        prompt.on_grid(torch.zeros(15))


def test_prompt_is_the_models_keyword_arguments(one, ask):
    prompt = ask(one)
    assert set(prompt) == {"input_ids", "attention_mask", "pixel_values"}
    assert len(prompt) == 3
    assert prompt["input_ids"] is prompt.inputs["input_ids"]
    with torch.inference_mode():
        found, wanted = one.hf_model(**prompt).logits, one.hf_model(**prompt.inputs).logits
    assert torch.equal(found, wanted)


def test_one_image_many_questions_and_the_reverse(one):
    asked = one.prompt(picture(0), QUESTIONS)
    assert asked.batched
    assert torch.equal(asked["pixel_values"][0], asked["pixel_values"][2])
    assert asked.questions == tuple(QUESTIONS)
    shown = one.prompt([picture(0), picture(1)], QUESTION)
    assert torch.equal(shown["input_ids"][0], shown["input_ids"][1])
    assert not torch.equal(shown["pixel_values"][0], shown["pixel_values"][1])
    single = one.prompt([picture(0)], [QUESTION])
    assert single.batched
    assert cl.trace_attention(one, single).intensity.shape == (1, 12, 4)


# ── system messages ──


def test_system_messages(one):
    own = one.prompt(picture(0), QUESTION)
    none = one.prompt(picture(0), QUESTION, system="")
    custom = one.prompt(picture(0), QUESTION, system="you see a car .")
    assert span_words(one, own, "system")[1:4] == ["a", "chat", "between"]
    assert span_words(one, none, "system") == ["<s>", "user:"]
    assert span_words(one, custom, "system") == ["<s>", "you", "see", "a", "car", ".", "user:"]
    for prompt in (own, none, custom):
        assert span_words(one, prompt, "text")[1:-1] == QUESTION.split()
        assert span_words(one, prompt, "image") == ["<image>"] * 16
    assert (own.system, none.system, custom.system) == (None, "", "you see a car .")


# The chat template of llava-hf's models, in short: typed parts only, text is rendered as nothing.
TYPED = (
    "<s>{% for m in messages %}{% if m['role'] != 'system' %} {{ m['role'] }}: {% endif %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% elif part['type'] == 'text' %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    " assistant:"
)


def test_system_messages_of_templates_that_take_typed_parts(one):
    lens = cl.load((one.hf_model, make_processor(chat_template=TYPED)), check=False)
    custom = lens.prompt(picture(0), QUESTION, system="you see a car .")
    assert span_words(lens, custom, "system") == ["<s>", "you", "see", "a", "car", ".", "user:"]
    for system in (None, ""):
        none = lens.prompt(picture(0), QUESTION, system=system)
        assert span_words(lens, none, "system") == ["<s>", "user:"]
    deaf = TYPED.replace("{% for part", "{% if m['role'] != 'system' %}{% for part").replace(
        "{% endfor %}{% endfor %}", "{% endfor %}{% endif %}{% endfor %}"
    )
    lens = cl.load((one.hf_model, make_processor(chat_template=deaf)), check=False)
    with pytest.raises(PromptError, match="no place for a system message"):
        lens.prompt(picture(0), QUESTION, system="you see a car .")


def test_without_a_chat_template(one):
    """LLaVA-1.5's own wording, with the one BOS that the tokenizer adds."""
    lens = cl.load((one.hf_model, make_processor(chat_template=None)), check=False)
    prompt = lens.prompt(picture(0), QUESTION)
    assert span_words(lens, prompt, "system") == ["<s>", "user:"]
    assert span_words(lens, prompt, "text") == ["\n", *QUESTION.split(), "assistant:"]
    custom = lens.prompt(picture(0), QUESTION, system="a chat .")
    assert span_words(lens, custom, "system") == ["<s>", "a", "chat", ".", "user:"]


def test_one_bos(one):
    """The template writes the BOS token itself; it must not be doubled."""
    ids = one.prompt(picture(0), QUESTION)["input_ids"][0].tolist()
    assert ids.count(1) == 1
    assert ids[0] == 1
