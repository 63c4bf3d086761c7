"""Pictures and text for Qwen-VL: pixels, and 256 ``<imgpad>`` between ``<img>`` and ``</img>``.

The released tokenizer writes a picture's *path* between the two tags, as byte tokens, pads it to
256 tokens, and the model reads the path back and opens the file. Here pictures are given as
pictures: what stands between the tags is dropped, all 256 tokens are ``<imgpad>``, and no file that
a prompt names is ever opened. The picture's tokens take the place of all 256 in both cases.
"""

import re
from collections.abc import Sequence
from typing import Any, no_type_check

from transformers import BatchFeature, CLIPImageProcessorPil, ProcessorMixin

from clva_lens.ground.errors import PromptError
from clva_lens.models.qwen.tokenizer import IMAGE_END, IMAGE_PAD, IMAGE_START

SYSTEM = "You are a helpful assistant."
"""What the released ``model.chat`` says where nothing else is given."""

# ChatML as in Qwen-VL-Chat's qwen_generation_utils.py; a picture as in its from_list_format(),
# which in an Int4 release has no space after "Picture 1:". make_context() makes the tokens of each
# message by itself: "<|im_end|>" in a message is plain text there, and a newline at its start is a
# token of its own; here both are read with the rest of the prompt.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    "{% set shown = namespace(count=0) %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{% set shown.count = shown.count + 1 %}Picture {{ shown.count }}: <img></img>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_PICTURE = re.compile(f"{IMAGE_START}(.*?){IMAGE_END}", flags=re.DOTALL)


def image_processor(size: int = 448) -> CLIPImageProcessorPil:
    """Return what makes pixels: bicubic to ``size`` × ``size``, no crop, normalised as for CLIP."""
    return CLIPImageProcessorPil(
        size={"height": size, "width": size}, do_center_crop=False, do_resize=True
    )


@no_type_check  # transformers reads the signature of __init__
class QwenVLProcessor(ProcessorMixin):
    """Makes ``input_ids``, ``attention_mask`` and ``pixel_values``.

    Each ``<img>…</img>`` of a text stands for one picture, in order. Qwen-VL-Chat has a
    ``chat_template``, the base model none.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_queries: int = 256,
        chat_template: str | None = None,
    ) -> None:
        """Take the parts; ``num_queries`` is how many tokens a picture has."""
        self.num_queries = num_queries
        self.image_token = IMAGE_PAD
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_PAD)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def expand(self, text: str) -> tuple[str, int]:
        """Return a text with the tokens of its pictures written out, and how many pictures it has.

        Raises:
            PromptError: if a tag has no partner, or there is an ``<imgpad>`` outside of a picture.
        """
        rest = _PICTURE.sub("", text)
        if any(tag in rest for tag in (IMAGE_START, IMAGE_END, IMAGE_PAD)):
            raise PromptError(
                f"the text has an '{IMAGE_START}', '{IMAGE_END}' or '{IMAGE_PAD}' of its own. "
                f"Write '{IMAGE_START}{IMAGE_END}' where a picture goes, and pass the picture."
            )
        written = f"{IMAGE_START}{IMAGE_PAD * self.num_queries}{IMAGE_END}"
        return _PICTURE.subn(written, text)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Return the model's inputs; ``options`` go to the tokenizer.

        Raises:
            PromptError: if the texts do not have a place for each picture.
        """
        if text is None:
            raise PromptError("there is no text. Pass text=, with '<img></img>' for each picture.")
        texts = [text] if isinstance(text, str) else list(text)
        expanded = [self.expand(one) for one in texts]
        pictures = (
            [] if images is None else images if isinstance(images, list | tuple) else [images]
        )
        places = sum(count for _, count in expanded)
        if places != len(pictures):
            raise PromptError(
                f"the text has {places} places for pictures ('<img>…</img>'), but {len(pictures)} "
                "pictures were passed. Pass one picture for each place; files that a text names "
                "are not opened."
            )
        kind = options.pop("return_tensors", None)
        made: dict[str, Any] = dict(self.tokenizer([one for one, _ in expanded], **options))
        if pictures:
            made |= self.image_processor(images=pictures)
        return BatchFeature(made, tensor_type=kind)
