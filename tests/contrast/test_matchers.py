"""BLIP and CLIP as second models: real classes of random weights, built here, read from a folder.

Nothing is downloaded. What they say is held against the models' own outputs, and BLIP's map against
a derivative by differences.
"""

import pytest
import torch
from tiny_models import lens_of, picture, tokenizer
from torch.nn import functional
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
)

import clva_lens as cl
from clva_lens.methods.matching import BlipMatcher, ClipMatcher

TEXTS = ["is there a cup ?", "a red plate"]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def pictures(count=2):
    shown = torch.stack([torch.from_numpy(picture(i)) for i in range(count)])
    return shown.permute(0, 3, 1, 2).float() / 255


def grown(kind, config):
    """A model of random weights that tells pictures and texts apart."""
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """A BLIP of 2 layers, 4 × 4 patches and a word list of the tiny tokenizer's."""
    folder = tmp_path_factory.mktemp("blip")
    known = sorted(tokenizer().get_vocab(), key=tokenizer().get_vocab().get)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(w for w in known if w.isalpha()), "?"]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    config = BlipConfig(
        vision_config=SMALL | {"image_size": 32, "patch_size": 8},
        text_config=SMALL
        | {"vocab_size": len(words), "encoder_hidden_size": 32, "max_position_embeddings": 32},
        projection_dim=16,
        image_text_hidden_size=16,
    )
    model = grown(BlipForImageTextRetrieval, config)
    model.save_pretrained(folder)
    images = BlipImageProcessor(size={"height": 32, "width": 32})
    BlipProcessor(images, BertTokenizerFast(str(folder / "vocab.txt"))).save_pretrained(folder)
    return str(folder), model


def test_blip_says_how_alike(blip):
    name, model = blip
    found = BlipMatcher(name, layer=1).similarity(pictures(), TEXTS)
    processor = BlipProcessor.from_pretrained(name)
    for row, image in enumerate(pictures()):
        for column, text in enumerate(TEXTS):
            given = processor(images=image, text=text, do_rescale=False, return_tensors="pt")
            with torch.no_grad():
                wanted = model(**given, use_itm_head=False).itm_score
            assert float(found[row, column]) == pytest.approx(float(wanted), abs=1e-5)
    assert float(found.std()) > 0.01


def test_blips_map_is_its_gradcam(blip):
    """A·relu(dL/dA) of the match's logit, in float64: each of the weights is moved a little."""
    model = BlipForImageTextRetrieval.from_pretrained(blip[0]).eval().double()
    given = BlipProcessor.from_pretrained(blip[0])(
        images=pictures(1)[0], text=TEXTS[0], do_rescale=False, return_tensors="pt"
    )
    given["pixel_values"] = given["pixel_values"].double()
    asked, seen, change = model.text_encoder.encoder.layer[1].crossattention.self, {}, None

    def moved(_, args, out):
        values = seen["values"].view(1, -1, 4, 8).transpose(1, 2)
        seen["weights"] = out[1]
        return (out[0] + (change @ values).transpose(1, 2).reshape(out[0].shape), *out[1:])

    asked.value.register_forward_hook(lambda _, __, out: seen.update(values=out))
    asked.register_forward_hook(moved)
    words, small = given["input_ids"].shape[1], 1e-5
    slope = torch.zeros(1, 4, words, 17, dtype=torch.float64)
    with torch.no_grad():
        for at in torch.cartesian_prod(*(torch.arange(size) for size in (4, words, 17))).tolist():
            ends = []
            for sign in (1, -1):
                change = torch.zeros_like(slope)
                change[0, at[0], at[1], at[2]] = sign * small
                ends.append(model(**given, output_attentions=True).itm_score[0, 1])
            slope[0, at[0], at[1], at[2]] = (ends[0] - ends[1]) / (2 * small)
    wanted = (seen["weights"] * slope.relu())[0, :, :, 1:].mean(dim=(0, 1)).reshape(1, 1, 4, 4)
    wanted = functional.interpolate(wanted, size=(32, 32), mode="bicubic", align_corners=False)
    wanted = wanted[0, 0].relu()
    found = BlipMatcher(blip[0], layer=1).relevance(pictures(1), TEXTS[:1])[0]
    error, largest = float((found - wanted).abs().max()), float(wanted.max())
    print(f"error {error:.1e}, largest {largest:.1e}")
    assert error < 1e-3 * largest
    assert largest > 0


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    config = CLIPConfig(
        text_config=SMALL
        | {"vocab_size": 64, "max_position_embeddings": 32, "eos_token_id": 2, "bos_token_id": 1},
        vision_config=SMALL | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    model = grown(CLIPModel, config)
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    CLIPProcessor(images, tokenizer()).save_pretrained(folder)
    return str(folder), model


def test_clip_says_how_alike(clip):
    name, model = clip
    found = ClipMatcher(name).similarity(pictures(), TEXTS)
    processor = CLIPProcessor.from_pretrained(name)
    given = processor(
        images=list(pictures()), text=TEXTS, do_rescale=False, padding=True, return_tensors="pt"
    )
    given.pop("token_type_ids", None)
    with torch.no_grad():
        wanted = model(**given).logits_per_image / model.logit_scale.exp()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert float(found.std()) > 0.01


def test_agla_and_dlc_ask_them(blip, clip):
    """The methods decode with the real second models, which change what is said."""
    lens, asked = lens_of("full", "sdpa"), (picture(0), TEXTS[0])
    given = lens.prompt(*asked)
    with torch.no_grad():
        plain = lens.hf_model(**given).logits[0, -1]
        for method in (
            cl.AGLA(matcher=BlipMatcher(blip[0], layer=1), beta=0.0),
            cl.DLC(matcher=ClipMatcher(clip[0])),
        ):
            with cl.intervening(lens, method):
                found = lens.hf_model(**given).logits[0, -1]
            print(method.name, float((found - plain).abs().max()))
            assert float((found - plain).abs().max()) > 0.01
            assert cl.generate(lens, asked, method).texts
