"""Qwen's tokenizer from the file ``qwen.tiktoken`` that comes with the published checkpoints.

The file has one byte string (base64) and its rank a line. transformers' own converter turns it into
a fast tokenizer: byte-level BPE whose merges are those that the ranks allow. After the ranks come
the special tokens, in the order of Qwen's released ``tokenization_qwen.py``.
"""

import base64
import binascii
from pathlib import Path

from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from clva_lens.ground.errors import ModelLoadError

FILE = "qwen.tiktoken"
END_OF_TEXT = "<|endoftext|>"
IMAGE_START, IMAGE_END, IMAGE_PAD = "<img>", "</img>", "<imgpad>"
SPECIAL = (
    END_OF_TEXT,
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{number}|>" for number in range(205)),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"),
    *(IMAGE_START, IMAGE_END, IMAGE_PAD),
)
# How text is cut before merging; numbers go digit by digit.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Return byte strings and their ranks, which must be 0, 1, 2, … in order.

    Raises:
        ModelLoadError: if the file is missing, or is no list of ranked byte strings.
    """
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except FileNotFoundError:
        raise ModelLoadError(
            f"there is no '{path}', from which the tokenizer is made. Download the whole "
            "repository, with its qwen.tiktoken."
        ) from None
    except (ValueError, binascii.Error) as error:
        raise ModelLoadError(
            f"'{path}' is no list of byte strings (base64) and ranks: {error}. Download it again."
        ) from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or list(ranks.values()) != list(range(len(ranks))):
        raise ModelLoadError(
            f"'{path}' has {len(ranks)} byte strings, {len(missing)} single bytes short, or ranks "
            "out of order. Download it again."
        )
    return ranks


class _Converter(TikTokenConverter):
    """transformers' converter, with the file read here: tiktoken itself need not be installed."""

    def load_tiktoken_bpe(self, tiktoken_url: str) -> dict[bytes, int]:  # pyright: ignore
        return read_ranks(Path(tiktoken_url))


def make_tokenizer(path: Path, longest: int = 8192) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a ``qwen.tiktoken``, which pads on the left with "<|endoftext|>".

    Text is NFC-normalised. Special tokens are recognised wherever they stand in a text, as by the
    released tokenizer.

    Raises:
        ModelLoadError: if the file is missing or broken.
    """
    made = _Converter(str(path), pattern=PIECES, extra_special_tokens=list(SPECIAL)).converted()
    made.normalizer = normalizers.NFC()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )
