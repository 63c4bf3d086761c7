"""The words of a prompt: control tokens, unknown words, earlier turns, and a begun answer."""

import pytest
import torch
from tiny_models import QUESTIONS, blip_of, picture

import clva_lens as cl
from clva_lens.ground.errors import ParameterError, PromptError

TURN = ("is there a cup ?", "no")


def text_of(lens, prompt, item=0):
    kept = prompt["attention_mask"][item].bool()
    return " ".join(lens.words.convert_ids_to_tokens(prompt["input_ids"][item][kept]))


@pytest.mark.parametrize("token", ["</s>", "<s>", "<pad>", "<unk>"])
def test_control_tokens_are_refused_wherever_they_stand(one, token):
    text = f"is there {token} a cup ?"
    for given in (
        {"question": text},
        {"question": QUESTIONS[0], "system": text},
        {"question": QUESTIONS[0], "answer": text},
        {"question": QUESTIONS[0], "turns": [(text, "no")]},
        {"question": QUESTIONS[0], "turns": [(QUESTIONS[1], text)]},
    ):
        with pytest.raises(PromptError, match=f"contains '{token}', a control token"):
            one.prompt(picture(0), **given)
    with pytest.raises(PromptError, match=f"contains '{token}', a control token"):
        blip_of("sdpa").prompt(picture(0), text)


def test_unknown_words_warn_and_are_refused_as_tokens(one):
    with pytest.warns(UserWarning, match=r"does not know 'zebra', 'quokka\?'.*reads '<unk>'"):
        one.prompt(picture(0), "is there a zebra quokka? yes")
    prompt = one.prompt(picture(0), QUESTIONS[0])
    for read in (cl.logit_lens, cl.direct_logit_attribution):
        with pytest.raises(ParameterError, match="'zebra' is a word that the tokenizer does not"):
            read(one, prompt, tokens="zebra")


def test_earlier_turns(one):
    prompt = one.prompt(picture(0), "what is it ?", turns=[TURN])
    assert text_of(one, prompt).count("<image>") == 16
    assert prompt.grid == (4, 4)
    said = text_of(one, prompt).split("<image> ")[-1].replace("</s> ", "")
    assert said == "\n is there a cup ? assistant: no user: what is it ? assistant:"
    chat = [
        {"role": "user", "content": "is there a cup ?"},
        {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
    ]
    same = one.prompt(picture(0), "what is it ?", turns=chat)
    assert torch.equal(same["input_ids"], prompt["input_ids"])
    plain = one.prompt(picture(0), "what is it ?")
    told = [cl.trace_attention(one, asked).logits for asked in (plain, prompt)]
    assert not torch.equal(*told)


def test_turns_with_their_own_pictures(one):
    prompt = one.prompt(picture(1), "what is it ?", turns=[(picture(0), *TURN)])
    assert prompt["pixel_values"].shape[0] == 2
    assert int(prompt.spans.image.sum()) == 32
    swapped = one.prompt(picture(0), "what is it ?", turns=[(picture(1), *TURN)])
    assert torch.equal(swapped["pixel_values"].flip(0), prompt["pixel_values"])
    told = [cl.trace_attention(one, asked).logits for asked in (prompt, swapped)]
    assert not torch.equal(*told)


def test_turns_in_a_batch(one):
    batch = one.prompt([picture(0), picture(1)], QUESTIONS[:2], turns=[TURN])
    for item in range(2):
        alone = one.prompt(picture(item), QUESTIONS[item], turns=[TURN])
        assert text_of(one, batch, item) == text_of(one, alone)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (["is there a cup ?"], "a turn must be"),
        ([("", "no")], "a turn must be"),
        ([(1, 2, 3, 4)], "a turn must be"),
        ([{"role": "system", "content": "a chat ."}], "system message as system="),
        ([{"role": "user", "content": "is there a cup ?"}], "the roles user, but.*take turns"),
    ],
)
def test_turns_that_are_none(one, turns, message):
    with pytest.raises(PromptError, match=message):
        one.prompt(picture(0), QUESTIONS[0], turns=turns)


NO_TEXTS = (3, b"x", float("nan"), ["is it ?"], {}, object(), "is \ud800 it ?", "\udc80")


@pytest.mark.parametrize("value", NO_TEXTS, ids=repr)
@pytest.mark.parametrize("where", ["question", "system", "answer", "turn", "said", "turns"])
def test_what_is_no_text(one, untyped, where, value):
    """In every place of a prompt; half of a character is none either."""
    asked = {"question": QUESTIONS[0]}
    if where in ("turn", "said"):
        asked["turns"] = [(value, "no") if where == "turn" else (QUESTIONS[1], value)]
    elif (where, value) in (("question", ["is it ?"]), ("turns", {})):
        return  # a list of one; and nothing said before
    else:
        asked[where] = value
    for lens in (one, blip_of("sdpa")):
        with pytest.raises(PromptError, match=r"[^ ]\."):
            lens.prompt(picture(0), **asked)


@pytest.mark.parametrize("language", ["llama", "opt", "t5", "blip2-opt", "blip2-t5"])
@pytest.mark.parametrize("turns", [[TURN], [(picture(0), *TURN)]])
def test_turns_of_a_model_that_has_no_place_for_them(language, turns):
    said = r"one question about one picture.*Leave turns= out, or write them into the question\.$"
    with pytest.raises(PromptError, match=said):
        blip_of("sdpa", language).prompt(picture(0), QUESTIONS[0], turns=turns)


def test_a_begun_answer_is_continued(one):
    """The model goes on as if it had written the beginning itself."""
    plain = one.prompt(picture(0), QUESTIONS[0])
    begun = one.prompt(picture(0), QUESTIONS[0], answer="no")
    added = one.words("no", add_special_tokens=False).input_ids
    assert begun["input_ids"][0].tolist() == [*plain["input_ids"][0].tolist(), *added]


@pytest.mark.parametrize("language", ["llama", "opt", "t5"])
def test_a_begun_answer_is_not_the_q_formers(language):
    lens = blip_of("sdpa", language)
    plain = lens.prompt([picture(0)] * 2, QUESTIONS[:2])
    begun = lens.prompt([picture(0)] * 2, QUESTIONS[:2], answer="no")
    added = lens.words("no", add_special_tokens=False).input_ids
    where = "decoder_input_ids" if language == "t5" else "input_ids"
    for item in range(2):
        assert begun[where][item].tolist() == [*plain[where][item].tolist(), *added]
    assert torch.equal(begun["qformer_input_ids"], plain["qformer_input_ids"])
