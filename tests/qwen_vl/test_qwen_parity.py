"""The native model against the reference in float64, with the same published weights in both."""

import math

import pytest
import torch
from qwen_models import official_config, picture, publish, ranks, special_id, tensors
from qwen_reference import FACTS, logits, picture_tokens, stretch
from transformers import StaticCache

import clva_lens as cl
from clva_lens.models.family import FAMILIES
from clva_lens.models.kv_cache import CACHE, cache_of
from clva_lens.models.qwen.configuration import QwenVLConfig
from clva_lens.models.qwen.convert import native_tensors
from clva_lens.models.qwen.model import QwenVLForConditionalGeneration, ntk_alpha
from clva_lens.models.qwen.vision import on_another_grid, sine_cosine_positions

CONFIG = official_config()
WEIGHTS = tensors(CONFIG)
PAD = special_id("<|endoftext|>")


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def lens(request, tmp_path_factory):
    folder = publish(tmp_path_factory.mktemp("qwen"), weights=WEIGHTS)
    return cl.load(folder, attn_implementation=request.param)


def ids_of(length, seed=0):
    """A prompt of text around one picture's places."""
    noise = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, len(ranks()), (length,), generator=noise).tolist()
    picture = [special_id("<img>"), *[special_id("<imgpad>")] * 16, special_id("</img>")]
    ids[3 : 3 + len(picture)] = picture
    return ids[:length]


def pixels_of(lens, *seeds):
    made = lens.processor.image_processor([picture(seed) for seed in seeds], return_tensors="pt")
    return made["pixel_values"]


KNOWN = {}


def wanted_of(ids, pixels, **more):
    """The reference's logits, once for both kernels."""
    key = tuple(ids), None if pixels is None else pixels.numpy().tobytes(), *more.items()
    if key not in KNOWN:
        KNOWN[key] = logits(WEIGHTS, CONFIG, ids, pixels, **more)
    return KNOWN[key]


def close(found, wanted, what):
    """Return the error; it must be small beside the logits' spread."""
    error = float((found - wanted).abs().max())
    print(f"{what}: error {error:.1e} (spread {wanted.std():.2f})")
    assert wanted.std() > 0.3
    assert error < 1e-4
    return error


@torch.inference_mode()
def run(lens, ids, pixels, **more):
    return lens.hf_model(input_ids=torch.tensor([ids]), pixel_values=pixels, **more).logits[0]


# 128 is seq_length: below it, at it, beyond it (α = 3), and beyond twice of it (α = 7).
@pytest.mark.parametrize("length", [40, 128, 129, 200, 270])
def test_logits(lens, length):
    ids, pixels = ids_of(length), pixels_of(lens, 0)
    close(run(lens, ids, pixels), wanted_of(ids, pixels), f"{length} tokens")


@pytest.fixture(scope="module")
def whole(lens):
    """A prompt beyond seq_length, the model's logits, and their error beside the reference's."""
    ids, pixels = ids_of(140), pixels_of(lens, 0)
    found = run(lens, ids, pixels)
    return ids, pixels, found, close(found, wanted_of(ids, pixels), "whole")


@pytest.mark.parametrize("fact", FACTS)
@pytest.mark.parametrize("lens", ["sdpa"], indirect=True)
def test_every_fact_matters(lens, whole, fact):
    """Without it the reference is far from the model, so none of them is checked vacuously."""
    ids, pixels, found, error = whole
    effect = float((found - wanted_of(ids, pixels, broken=fact)).abs().max())
    print(f"without {fact}: {effect:.3f}")
    assert effect > 300 * error


def test_rules_for_long_sequences_are_off_below(lens):
    ids, pixels = ids_of(128), pixels_of(lens, 0)
    whole = wanted_of(ids, pixels)
    for fact in ("log-n", "ntk"):
        assert torch.equal(whole, wanted_of(ids, pixels, broken=fact))


@pytest.mark.parametrize(("prompt", "more"), [(120, 14), (140, 4)])
def test_decoding_with_a_cache(lens, prompt, more):
    """α stays the prompt's while the answer grows past seq_length; log-n goes by position."""
    ids, pixels = ids_of(prompt + more), pixels_of(lens, 0)
    wanted = wanted_of(ids, pixels, prompt=prompt)
    with torch.inference_mode():
        out = lens.hf_model(
            input_ids=torch.tensor([ids[:prompt]]), pixel_values=pixels, use_cache=True
        )
        rows = [out.logits[0, -1]]
        for one in ids[prompt:]:
            out = lens.hf_model(
                input_ids=torch.tensor([[one]]), **{CACHE: cache_of(out)}, use_cache=True
            )
            rows.append(out.logits[0, -1])
    error = close(torch.stack(rows), wanted[prompt - 1 :], "cached")
    if prompt < 128:  # α of the whole sequence would be 3
        other = wanted_of(ids, pixels)[prompt - 1 :]
        assert (other - wanted[prompt - 1 :]).abs().max() > 300 * error


def test_a_cache_that_is_used_again(lens):
    """α belongs to the prompt that is in the cache now, also in a static one that was emptied."""
    cache = StaticCache(lens.hf_model.config.text_config, max_cache_len=160)
    pixels, model = pixels_of(lens, 0), lens.hf_model
    with torch.inference_mode():
        for length, more in ((140, 3), (60, 3)):
            ids = ids_of(length + more, seed=length)
            cache.reset()
            rows, kept = [], {CACHE: cache, "use_cache": True}
            first = {"input_ids": torch.tensor([ids[:length]]), "pixel_values": pixels}
            for given in (first, *({"input_ids": torch.tensor([[one]])} for one in ids[length:])):
                rows.append(model(**given, **kept).logits[0, -1])
            wanted = wanted_of(ids, pixels, prompt=length)[length - 1 :]
            close(torch.stack(rows), wanted, f"{length} tokens in the same cache")


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_generate(lens, cache):
    """transformers' own loop, with each kind of cache: the likeliest tokens of the reference."""
    ids, pixels = ids_of(124), pixels_of(lens, 0)
    options = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    if cache == "dynamic":
        options = {}
    lens.hf_model.generation_config.eos_token_id = None
    given = {"input_ids": torch.tensor([ids]), "pixel_values": pixels}
    out = lens.hf_model.generate(
        **given, attention_mask=torch.ones(1, 124), max_new_tokens=8, do_sample=False,
        disable_compile=True, **options,
    )  # fmt: skip
    answer = out[0].tolist()
    assert len(answer) == 132
    if cache is not None:  # with a cache, α stays the prompt's, so one pass tells every step
        wanted = wanted_of(answer[:-1], pixels, prompt=124)[123:]
        assert wanted.argmax(dim=-1).tolist() == answer[124:]
        return
    for step in (0, 3, 7):  # without one, each step is a prompt
        wanted = wanted_of(answer[: 124 + step], pixels)[-1]
        assert int(wanted.argmax()) == answer[124 + step]


def test_left_padded_batch(lens):
    """Positions count padding, as in the released code: of the sample in the batch, not alone."""
    pixels = pixels_of(lens, 0, 1)
    for length, alone_too in ((100, True), (160, False)):
        rows = [ids_of(length, seed=1), [PAD] * 30 + ids_of(length - 30, seed=2)]
        mask = torch.ones(2, length, dtype=torch.long)
        mask[1, :30] = 0
        with torch.inference_mode():
            found = lens.hf_model(
                input_ids=torch.tensor(rows), attention_mask=mask, pixel_values=pixels
            ).logits
        wanted = wanted_of(rows[1], pixels[1:], pads=30)
        close(found[0], wanted_of(rows[0], pixels[:1]), "long")
        error = close(found[1, 30:], wanted[30:], "padded")
        alone = wanted_of(rows[1][30:], pixels[1:])
        apart = (alone - wanted[30:]).abs().max()
        assert apart < 1e-10 if alone_too else apart > 300 * error


def test_several_pictures(lens):
    ids = ids_of(60)
    ids[30:48] = ids_of(60)[3:21]
    pixels = pixels_of(lens, 0, 1)
    found = run(lens, ids, pixels)
    close(found, wanted_of(ids, pixels), "two pictures")
    assert (found - run(lens, ids, pixels.flip(0))).abs().max() > 0.1


def test_picture_tokens(lens):
    pixels = pixels_of(lens, 0)
    with torch.inference_mode():
        (found,) = lens.hf_model.get_image_features(pixels).pooler_output
    double = {name: tensor.double() for name, tensor in WEIGHTS.items()}
    close(found, picture_tokens(double, CONFIG, pixels[0].double()), "picture")


def test_half_precision():
    """bfloat16 stays near: rotary angles are float32, so position 250 is still told from 251."""
    torch.manual_seed(0)
    config = QwenVLConfig.from_official(CONFIG)
    model = QwenVLForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=native_tensors(WEIGHTS, config), dtype=torch.bfloat16
    )
    ids = ids_of(40)
    pixels = torch.randn(1, 3, 48, 48)
    with torch.inference_mode():
        found = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0].float()
    wanted = wanted_of(ids, pixels)
    assert (found - wanted).abs().mean() < 0.05 * wanted.std()
    cos, _ = model.model.language_model.rotary_emb(found[None].bfloat16(), torch.tensor([[250]]))
    assert cos.dtype == torch.float32


# ── the parts, by hand ──


def test_ntk_alpha():
    """2^⌈log2(n/2048) + 1⌉ − 1: just over once, twice and four times 2,048."""
    lengths = (1, 1000, 2048, 2049, 4096, 4097, 8192, 8193)
    assert [ntk_alpha(n, 2048) for n in lengths] == [1, 1, 1, 3, 3, 7, 7, 15]


def test_sine_cosine_positions():
    """Cell (row 1, column 2) of a 3 × 3 grid, width 8: column's sines, cosines, then the row's."""
    found = sine_cosine_positions(3, 8)[1 * 3 + 2]
    wanted = []
    for place in (2, 1):
        wanted += [math.sin(place), math.sin(place * 0.01)]  # ω = 1 and 10000^(−1/2)
        wanted += [math.cos(place), math.cos(place * 0.01)]
    assert torch.allclose(found, torch.tensor(wanted))
    assert sine_cosine_positions(16, 4096).shape == (256, 4096)


@pytest.mark.parametrize(("old", "new"), [(16, 32), (16, 6), (4, 6), (4, 4)])
def test_positions_on_another_grid(old, new):
    positions = torch.randn(old * old, 5, generator=torch.Generator().manual_seed(0))
    found = on_another_grid(positions, new * new)
    wanted = stretch(positions.double(), new)
    error = float((found - wanted).abs().max())
    assert error < 1e-5
    turned = wanted.reshape(new, new, 5).transpose(0, 1).reshape(new * new, 5)
    assert (found - turned).abs().max() > 1000 * max(error, 1e-7)


def test_a_fresh_model_has_the_published_positions():
    """A model made from its configuration has them by formula, and every weight is filled."""
    model = FAMILIES.get("qwen-vl").tiny()
    assert torch.equal(model.model.resampler.positions, sine_cosine_positions(4, 32))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert 0.01 < model.model.resampler.query.std() < 0.03
