"""The words of a prompt: what may stand in them, and the turns of a conversation before them."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from clva_lens.ground.errors import PromptError

Message = dict[str, Any]
"""A chat message as chat templates take it: a role, and parts that are text or an image."""


def check_words(processor: Any, texts: Sequence[str], system: str | None = None) -> None:
    """Refuse control tokens in texts; warn of words that a tokenizer does not know.

    A control token would end a turn or stand for a picture, where a text is meant to be read. Of
    the system message, unknown words are let pass: it is a protocol's, not about the picture.

    Raises:
        PromptError: naming the control token, or what is no text.
    """
    for text in (*texts, "" if system is None else system):
        _refuse_no_text(text)
    readers = (getattr(processor, "tokenizer", processor), _second(processor))
    for tokenizer in readers:
        if tokenizer is None:
            continue
        for text in (*texts, system or ""):
            _refuse_control(tokenizer, text)
        unknown = {word: None for text in texts for word in _unknown(tokenizer, text)}
        if unknown:
            listed = ", ".join(repr(word) for word in unknown)
            warnings.warn(
                f"the tokenizer does not know {listed}: the model reads '{tokenizer.unk_token}' "
                "there, as for any unknown word.",
                UserWarning,
                stacklevel=3,
            )


def _second(processor: Any) -> Any:
    """Return the tokenizer of a Q-Former, if there is one."""
    return getattr(processor, "qformer_tokenizer", None)


def _refuse_no_text(text: Any) -> None:
    if not isinstance(text, str):
        raise PromptError(f"a text is {text!r}. Pass a string as question, system and answer.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the text {text!r} has half of a character (a lone surrogate) at position "
            f"{error.start}, which no tokenizer reads. Take it out."
        ) from None


def _refuse_control(tokenizer: Any, text: str) -> None:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    names = {number: one.content for number, one in added.items() if one.special}
    names |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=False))
    for number in set(tokenizer(text, add_special_tokens=False).input_ids) & names.keys():
        name = names[number]
        if number != tokenizer.unk_token_id or name in text:
            raise PromptError(
                f"the text {text!r} contains '{name}', a control token of the model, which would "
                "be read as one. Take it out, or pass the output of a processor that you called "
                "with the whole text."
            )


def _unknown(tokenizer: Any, text: str) -> Iterator[str]:
    unknown = tokenizer.unk_token_id

    def has(words: str) -> bool:
        return unknown in tokenizer(words, add_special_tokens=False).input_ids

    if unknown is not None and has(text):
        yield from (word for word in text.split() if has(word))


def conversation(turns: Sequence[Any], question: str) -> tuple[list[Message], list[Any]]:
    """Return the messages of earlier turns and a question, and the pictures of the turns.

    A turn is (question, answer), (picture, question, answer) or a chat message with ``role`` and
    ``content``. The last question's picture comes first if no turn has one, else with the question.

    Raises:
        PromptError: if a turn is none of these.
    """
    messages: list[Message] = []
    pictures: list[Any] = []
    if not isinstance(turns, Sequence):
        raise _no_turn(turns)
    for turn in turns:
        if isinstance(turn, Mapping):
            messages.append(_message(turn, pictures))
        elif isinstance(turn, tuple) and len(turn) in (2, 3) and _are_texts(turn[-2:]):
            pictures += turn[:-2]
            shown = [{"type": "image"} for _ in turn[:-2]]
            messages.append({"role": "user", "content": [*shown, _text(turn[-2])]})
            messages.append({"role": "assistant", "content": [_text(turn[-1])]})
        else:
            raise _no_turn(turn)
    messages.append({"role": "user", "content": [_text(question)]})
    place = messages[-1 if pictures else 0]
    place["content"].insert(0, {"type": "image"})
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise PromptError(
            f"the turns have the roles {', '.join(roles[:-1])}, but user and assistant must take "
            "turns, the user first and the assistant last. The question is asked after them."
        )
    return messages, pictures


def texts_of(messages: Sequence[Message]) -> list[str]:
    """Return all texts of messages, in their order."""
    return [part["text"] for one in messages for part in one["content"] if part["type"] == "text"]


def _are_texts(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) and value.strip() for value in values)


def _text(text: str) -> Message:
    return {"type": "text", "text": text}


def _message(turn: Mapping[str, Any], pictures: list[Any]) -> Message:
    """Return a chat message in parts; its pictures are added to ``pictures``."""
    content, role = turn.get("content"), turn.get("role")
    parts = [_text(content)] if isinstance(content, str) else content
    if role not in ("user", "assistant") or not isinstance(parts, Sequence):
        raise _no_turn(turn)
    written: list[Message] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and _are_texts([part.get("text")]):
            written.append(_text(part["text"]))
        elif kind == "image" and part.get("image") is not None:
            pictures.append(part["image"])
            written.append({"type": "image"})
        else:
            raise _no_turn(turn)
    return {"role": role, "content": written}


def _no_turn(turn: Any) -> PromptError:
    return PromptError(
        f"a turn must be (question, answer), (picture, question, answer) or a chat message of the "
        f"user or the assistant, with texts that are not empty, but is {str(turn)[:200]!r}. Pass "
        "turns=[(question, answer)], and the system message as system=."
    )


def continued(text: str, answer: str) -> str:
    """Return a prompt with the beginning of its answer, a space between them if there is none."""
    return text + ("" if text[-1:].isspace() or answer[:1].isspace() else " ") + answer


def write_by_template(processor: Any, messages: list[Message], system: str | None) -> str:
    """Return the prompt that a processor's chat template makes of messages.

    Raises:
        PromptError: if the template drops the system message or the text of a turn.
    """
    # Some templates take texts as they are (and would print typed parts), llava-hf's drop those
    # and take typed parts.
    plain = [
        one | {"content": one["content"][0]["text"]} if one["role"] == "assistant" else one
        for one in messages
    ]
    for body in (plain, messages) if plain != messages else (messages,):
        for lead in [None] if system is None else [system, [_text(system)]]:
            led = [] if lead is None else [{"role": "system", "content": lead}]
            text = processor.apply_chat_template([*led, *body], add_generation_prompt=True)
            earlier = texts_of(messages)[:-1]
            if (system or "") in text and all(one in text for one in earlier):
                return text
    if len(messages) == 1:
        raise PromptError(
            "the model's chat template has no place for a system message. Leave system= out."
        )
    raise PromptError(
        "the model's chat template leaves out an earlier turn or the system message. Pass the "
        "output of the processor for the whole text."
    )
