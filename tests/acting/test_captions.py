"""Answers word by word: tokens meet their words, maps their rows, chances their passes."""

import pytest
import torch
from test_observed_answers import LAYERS, expected
from tiny_models import QUESTIONS, blip_of, lens_of, picture
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import clva_lens as cl
from clva_lens.benchmarks.chair_reading import Reader
from clva_lens.benchmarks.chair_vocabulary import vocabulary
from clva_lens.benchmarks.toy_chair import ToyChair
from clva_lens.ground.errors import InterventionError, ParameterError, PromptError
from clva_lens.lens.captions import unseen_objects
from clva_lens.lens.words import Word, words_of

TEXTS = {
    "there's a well-lit naïve café.": "there's a well-lit naïve café",
    " A dog , (two) dogs!": "A dog two dogs",
    "红色的车, ok": "红 色 的 车 ok",
    "…?!": "",
    "a\n\nb": "a b",
}


def tokenizers():
    """One by bytes, whose tokens end within signs, and one by parts of words."""
    for decoder, cut, size in (
        (decoders.ByteLevel(), pre_tokenizers.ByteLevel(add_prefix_space=False), 262),
        (decoders.Metaspace(), pre_tokenizers.Metaspace(), 45),
    ):
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
        made.pre_tokenizer, made.decoder = cut, decoder
        letters = pre_tokenizers.ByteLevel.alphabet() if size > 256 else []
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<unk>"], initial_alphabet=letters, show_progress=False
        )
        made.train_from_iterator(TEXTS, trainer)
        yield PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


@pytest.mark.parametrize("text", TEXTS)
def test_words_are_made_of_their_tokens(text):
    for tokenizer in tokenizers():
        ids = tokenizer(text, add_special_tokens=False).input_ids
        words = words_of(tokenizer, ids)
        assert " ".join(word.text for word in words) == TEXTS[text]
        for word in words:
            own = tokenizer.decode([ids[place] for place in word.tokens])
            assert word.text in own and len(own.strip()) <= len(word.text) + 3, (word, own)
            assert list(word.tokens) == list(range(word.tokens[0], word.tokens[-1] + 1))
        starts = [word.tokens[0] for word in words]
        assert starts == sorted(starts)


def chances_of(lens, prompt, ids, method):
    """The tokens' probabilities, each from an uncached pass over all before it."""
    found = []
    for count, token in enumerate(ids):
        inputs = dict(prompt.inputs)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids[None, :count]], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad(), cl.intervening(lens, method):
            last = lens.hf_model(**inputs, use_cache=False).logits[0, -1]
        found.append(last.softmax(dim=-1)[token])
    return torch.stack(found)


@pytest.mark.parametrize("decoding", ["greedy", "beam", "sampling"])
@pytest.mark.parametrize("method", [None, cl.KnockOut(layers=(6,))], ids=["none", "knock-out"])
def test_maps_and_chances_are_those_of_uncached_passes(decoding, method):
    lens = lens_of("full", "sdpa")
    how = {
        "greedy": cl.Greedy(max_new_tokens=6),
        "beam": cl.Beam(num_beams=4, max_new_tokens=6),
        "sampling": cl.Sampling(temperature=3.0, seed=1, max_new_tokens=6),
    }[decoding]
    prompt = lens.prompt(picture(0), QUESTIONS[0])
    seen = cl.caption_attention(lens, prompt, method, how, layers=LAYERS)
    assert torch.equal(seen.ids, cl.generate(lens, prompt, method, how).ids[0])
    maps = expected(lens, prompt, 0, seen.ids, method)
    chances = chances_of(lens, prompt, seen.ids, method)
    assert len(seen.words) >= 3
    for place, word in enumerate(seen.words):
        own = list(word.tokens)
        assert torch.allclose(seen.maps[:, :, place], maps[:, :, own].mean(dim=2), atol=1e-5)
        assert float(seen.probabilities[place]) == pytest.approx(
            float(chances[own].prod()), abs=1e-5
        )
    spread = (seen.maps[:, :, 0] - seen.maps[:, :, -1]).abs().max()
    assert spread > 1e-3 and float(seen.probabilities.min()) < 0.9


def test_a_contrast_is_what_tokens_are_chosen_by():
    """Under a method with a cut-off, chances are those that are left."""
    lens = lens_of("full", "sdpa")
    prompt = lens.prompt(picture(0), QUESTIONS[0])
    plain, method = (
        cl.Greedy(max_new_tokens=4),
        cl.VCD(beta=1.0),
    )  # nothing but the likeliest is left
    seen = cl.caption_attention(lens, prompt, method, plain)
    assert torch.equal(seen.probabilities, torch.ones(len(seen.words)))
    assert float(cl.caption_attention(lens, prompt, None, plain).probabilities.min()) < 0.99


def test_words_of_a_trace_are_the_same():
    lens = lens_of("full", "sdpa")
    prompt = lens.prompt(picture(0), QUESTIONS[0])
    alone = cl.caption_attention(lens, prompt, decoding=cl.Greedy(max_new_tokens=5))
    with lens.generate(prompt, max_new_tokens=5, do_sample=False) as tracer:
        seen = cl.observe()
        ids = tracer.result.save()
    (words,) = seen.words(ids)
    assert [text for text, _ in words] == [word.text for word in alone.words]
    for place, (_, look) in enumerate(words):
        assert torch.allclose(look, alone.maps[:, :, place], atol=1e-6)
    assert "5 generated" in repr(seen) or "4 generated" in repr(seen)
    with torch.no_grad(), cl.observing(lens.hf_model) as bare:
        made = lens.hf_model.generate(**prompt, max_new_tokens=3, do_sample=False)
    with pytest.raises(InterventionError, match=r"without a tokenizer. Observe what cl.load"):
        bare.words(made)


def test_objects_that_are_not_there_are_marked():
    sample = ToyChair().samples(limit=2)[0]
    toy = cl.load("toy-llava", check=False)
    there = sample.label.split(",")
    all_there = cl.caption_attention(toy, (sample.image, sample.question), objects=there)
    named = [word.text for word in all_there.words if word.text in there]
    assert named and not any(all_there.unseen)
    without = [one for one in there if one != named[0]]
    less = cl.caption_attention(toy, (sample.image, sample.question), objects=without)
    marked = {word.text for word, wrong in zip(less.words, less.unseen, strict=True) if wrong}
    assert marked == {named[0]}
    reds = [ax.get_title() for ax in less.draw().axes if ax.title.get_color() != "black"]
    assert set(reds) == marked
    assert f"{named[0]}(not there)" in repr(less) and less._repr_png_() is not None


def test_two_words_may_name_one_object():
    reader = Reader(vocabulary("builtin"), "builtin")
    words = [Word(text, (at,)) for at, text in enumerate(["a", "hot", "dog", "and", "two", "dogs"])]
    assert unseen_objects(reader, words, ["hot dog"]) == (False,) * 5 + (True,)
    assert unseen_objects(reader, words, ["dog"]) == (False, True, True, False, False, False)
    with pytest.raises(ParameterError, match=r"objects has 'unicorn', which .* does not know"):
        unseen_objects(reader, words, ["dog", "unicorn"])


def test_what_has_no_strip_is_refused():
    lens = lens_of("full", "sdpa")
    both = lens.prompt([picture(0)] * 2, list(QUESTIONS[:2]))
    with pytest.raises(PromptError, match=r"a batch of 2. Pass prompt.row"):
        cl.caption_attention(lens, both)
    one = cl.caption_attention(lens, both.row(0), layers=(2,), decoding=cl.Greedy(max_new_tokens=2))
    with pytest.raises(ParameterError, match=r"layer 3 was not read. Pass one of 2"):
        one.draw(3)
    with pytest.raises(ParameterError, match=r"heads is 'best'. Pass 'all'"):
        one.saliency("best")
    inside = pytest.raises(InterventionError, match=r"caption_attention was called inside a trace")
    with inside, lens.trace(both):
        cl.caption_attention(lens, both.row(0))
    blip = blip_of("sdpa")
    asked = blip.prompt(picture(0), QUESTIONS[0])
    queries = cl.caption_attention(blip, asked, decoding=cl.Greedy(max_new_tokens=3))
    assert queries.maps.shape[-1] == asked.spans.visual_count
    assert not queries.drawable and queries._repr_png_() is None
