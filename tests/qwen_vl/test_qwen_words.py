"""The tokenizer against byte-pair merging written out by hand, and the processor's prompts."""

import base64
import itertools
import unicodedata

import numpy as np
import pytest
import regex
import torch
from PIL import Image
from qwen_models import SPECIAL, picture, ranks, special_id, write_vocabulary

from clva_lens.ground.errors import ModelLoadError, PromptError
from clva_lens.models.qwen.processor import CHAT_TEMPLATE, QwenVLProcessor, image_processor
from clva_lens.models.qwen.tokenizer import make_tokenizer, read_ranks

PIECES = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
TEXTS = [
    "is there a cup in the image?",
    "  two  spaces,\n\nand lines \t",
    "Yes, I'll say: 1234 cups — naïve café 你好 🙂",
    "e\u0301 is composed",
    "<|im_start|>user\nthere<|im_end|>",
    "a<img>b</img><ref>cup</ref><box>(1,2),(3,4)</box>",
    "<|extra_0|><|extra_204|><|extra_205|>",
    "",
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "qwen.tiktoken"
    write_vocabulary(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(file):
    return make_tokenizer(file)


@pytest.fixture(scope="module")
def processor(tokenizer):
    return QwenVLProcessor(image_processor(), tokenizer, num_queries=256)


def merged(text):
    """Ids by hand: cut at special tokens and pieces, then merge the pair of lowest rank."""
    ids = []
    text = unicodedata.normalize("NFC", text)
    for part in regex.split("(" + "|".join(map(regex.escape, SPECIAL)) + ")", text):
        if part in SPECIAL:
            ids.append(len(ranks()) + SPECIAL.index(part))
            continue
        for piece in regex.findall(PIECES, part):
            tokens = [bytes([byte]) for byte in piece.encode()]
            while True:
                pairs = [ranks().get(a + b) for a, b in itertools.pairwise(tokens)]
                known = [rank for rank in pairs if rank is not None]
                if not known:
                    break
                at = pairs.index(min(known))
                tokens[at : at + 2] = [tokens[at] + tokens[at + 1]]
            ids += [ranks()[token] for token in tokens]
    return ids


@pytest.mark.parametrize("text", TEXTS)
def test_ids(tokenizer, text):
    assert tokenizer(text).input_ids == merged(text)


def test_ids_of_random_texts(tokenizer):
    noise = np.random.default_rng(0)
    parts = [*TEXTS, *(token.decode("utf-8", "ignore") for token in ranks()), " ", "\n", "7"]
    shorter = 0
    for _ in range(300):
        text = "".join(noise.choice(parts, size=12))
        found = tokenizer(text).input_ids
        assert found == merged(text), repr(text)
        shorter += len(found) < len(text.encode())
    assert shorter > 250  # that is, something was merged


def test_there_and_back(tokenizer):
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text).input_ids) == unicodedata.normalize("NFC", text)
    kept = tokenizer.decode(tokenizer("<|im_end|>yes").input_ids, skip_special_tokens=True)
    assert kept == "yes"


def test_special_tokens_follow_the_ranks(tokenizer):
    """With the published 151,643 ranks these are 151643, 151644, 151857 and 151859."""
    count = len(ranks())
    wanted = {"<|endoftext|>": 0, "<|im_start|>": 1, "<img>": 214, "<imgpad>": 216}
    for token, place in wanted.items():
        assert tokenizer.convert_tokens_to_ids(token) == count + place
    assert len(tokenizer) == count + 217
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == count
    assert tokenizer.padding_side == "left"
    assert tokenizer.bos_token is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not two parts in a line at all", "is no list of byte strings"),
        ("%%% 0", "is no list of byte strings"),
        (base64.b64encode(b"a").decode() + " 0", "255 single bytes short"),
    ],
)
def test_broken_vocabularies(tmp_path, text, message):
    path = tmp_path / "qwen.tiktoken"
    path.write_text(text)
    with pytest.raises(ModelLoadError, match=message):
        read_ranks(path)


def test_ranks_out_of_order(tmp_path, file):
    lines = file.read_text().splitlines()
    path = tmp_path / "qwen.tiktoken"
    path.write_text("\n".join([*lines[:-1], lines[-1].split()[0] + " 99999"]))
    with pytest.raises(ModelLoadError, match="ranks out of order"):
        make_tokenizer(path)


# ── pictures and prompts ──


def test_picture_places(processor):
    made = processor(images=picture(0), text="<img></img>is it ?", return_tensors="pt")
    ids = made["input_ids"][0].tolist()
    assert ids[0] == special_id("<img>")
    assert ids[1:257] == [special_id("<imgpad>")] * 256
    assert ids[257] == special_id("</img>")
    assert ids[258:] == merged("is it ?")
    assert made["attention_mask"].all()
    assert made["pixel_values"].shape == (1, 3, 448, 448)


def test_paths_between_the_tags_are_dropped(processor, tmp_path):
    """The released tokenizer writes the path into the ids; here the picture itself is passed."""
    path = tmp_path / "a picture.png"
    Image.fromarray(picture(1)).save(path)
    named = processor(images=picture(0), text=f"<img>{path}</img>is it ?")
    plain = processor(images=picture(0), text="<img></img>is it ?")
    assert named["input_ids"] == plain["input_ids"]
    with pytest.raises(PromptError, match=r"1 places for pictures.*but 0.*are not opened"):
        processor(text=f"<img>{path}</img>is it ?")


def test_several_pictures(processor):
    text = "Picture 1: <img></img>\nPicture 2: <img></img>\nis it ?"
    made = processor(images=[picture(0), picture(1)], text=text, return_tensors="pt")
    assert int((made["input_ids"] == special_id("<imgpad>")).sum()) == 512
    assert made["pixel_values"].shape == (2, 3, 448, 448)
    with pytest.raises(PromptError, match=r"2 places for pictures .*but 1 pictures"):
        processor(images=picture(0), text=text)


@pytest.mark.parametrize("text", ["<img>is it ?", "is it ?</img>", "<imgpad> ?", "</img><img>"])
def test_loose_tags(processor, text):
    with pytest.raises(PromptError, match=r"of its own.*Write '<img></img>'"):
        processor(images=picture(0), text=text)


def test_no_text(processor):
    with pytest.raises(PromptError, match="there is no text"):
        processor(images=picture(0))


def test_text_alone(processor):
    made = processor(text=["is it ?", "there is a cup in the image"], padding=True)
    assert "pixel_values" not in made
    assert [len(row) for row in made["input_ids"]] == [len(made["input_ids"][1])] * 2
    assert made["attention_mask"][0][0] == 0


def test_pixels_are_pillows_bicubic(processor):
    """Squeezed to a square without a crop, then CLIP's mean and deviation."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    found = processor.image_processor(pixels, return_tensors="pt")["pixel_values"][0]
    square = Image.fromarray(pixels).resize((448, 448), Image.Resampling.BICUBIC)
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    deviation = np.array([0.26862954, 0.26130258, 0.27577711])
    wanted = ((np.asarray(square) / 255 - mean) / deviation).transpose(2, 0, 1)
    assert np.abs(found.numpy() - wanted).max() < 1e-5
    assert torch.is_tensor(found)


def test_chat_template(processor):
    """Two turns, two pictures, a system message of one's own."""
    processor = QwenVLProcessor(
        processor.image_processor, processor.tokenizer, 256, chat_template=CHAT_TEMPLATE
    )
    show = [{"type": "image"}, {"type": "text", "text": "what is it ?"}]
    text = processor.apply_chat_template(
        [
            {"role": "system", "content": "you are"},
            {"role": "user", "content": show},
            {"role": "assistant", "content": "a cup"},
            {"role": "user", "content": show},
        ],
        add_generation_prompt=True,
    )
    assert text == (
        "<|im_start|>system\nyou are<|im_end|>\n"
        "<|im_start|>user\nPicture 1: <img></img>\nwhat is it ?<|im_end|>\n"
        "<|im_start|>assistant\na cup<|im_end|>\n"
        "<|im_start|>user\nPicture 2: <img></img>\nwhat is it ?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
