"""Compare the native Qwen-VL with the code that Qwen published, on tiny random weights.

    python tests/qwen_vl/parity_with_published.py FOLDER --python PYTHON

FOLDER holds the published code (``modeling_qwen.py`` and what it imports; with ``qwen.tiktoken``
the published vocabulary is compared too); PYTHON has transformers 4.37, torch, tiktoken, einops,
matplotlib, requests, Pillow and, best, torchvision. The code is run there, never here. No test:
pytest does not collect it. Leaves with 1 if anything is apart.
"""

import argparse
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import transformers
from PIL import Image
from published_qwen import NEEDED, RUNS_ON
from qwen_models import VISUAL, official_config, picture, publish, ranks, special_id, tensors
from safetensors.torch import load_file

import clva_lens as cl
from clva_lens.lens.load import LensModel
from clva_lens.models.kv_cache import CACHE, cache_of
from clva_lens.models.qwen.tokenizer import make_tokenizer

FILES = (
    *("modeling_qwen.py", "configuration_qwen.py", "visual.py"),
    *("tokenization_qwen.py", "qwen_generation_utils.py"),
)
VOCABULARY = "qwen.tiktoken"
TOLERANCE = 1e-4  # of a logit; they must spread by 0.3
SEQ_LENGTH = 320
RULES = {"log-n": "use_logn_attn", "NTK": "use_dynamic_ntk"}
# The published picture: 32 × 32 patches, whose positions were learned on 16 × 16, and 256 queries.
SEEN = VISUAL | {"image_size": 256, "n_queries": 256}
CONFIG = official_config(seq_length=SEQ_LENGTH, max_position_embeddings=1024, visual=SEEN)
PICTURES = ("a.png", "b.png")
SYSTEM = "You are a helpful assistant."
QUESTIONS = ("is there a cup ?", "what is it ?")
TEXTS = [
    "is there a cup in the image?",
    "Is there a dog in the image? Please answer yes or no.",
    "  two  spaces,\n\nand lines \t\r\n end ",
    "I'll, you've, WE'RE; don't!",
    "1234567890 3.14 10,000",
    "naïve café — ‘quotes’ … “more”",
    "e\u0301 is composed",
    "你好，图片里有什么？",
    "日本語とカタカナ、한국어",
    "🙂🚗 👩‍👩‍👧",
    "العربية हिन्दी ไทย",
    "def f(x):\n    return x ** 2  # code",
    "<|im_start|>user\nthere<|im_end|>",
    "<ref>cup</ref><box>(1,2),(3,4)</box>",
    "<|extra_0|><|extra_204|><|extra_205|>",
]


class Case(NamedTuple):
    """Token ids [batch][position] with a picture each; then tokens with the cache, or an answer."""

    ids: list[list[int]]
    mask: list[list[int]]
    pictures: list[str]
    then: list[int]
    answer: int


def case(length: int, *, then: int = 0, answer: int = 0, pads: tuple[int, ...] = (0,)) -> Case:
    """Return rows of ``length`` ids around a picture, each with its padding on the left."""
    noise = torch.Generator().manual_seed(length)
    shown = [special_id("<img>"), *[special_id("<imgpad>")] * 256, special_id("</img>")]
    rows = []
    for count in pads:
        text = torch.randint(0, len(ranks()), (length - count - len(shown),), generator=noise)
        front, back = text[:3].tolist(), text[3:].tolist()
        rows.append([special_id("<|endoftext|>")] * count + front + shown + back)
    mask = [[0] * count + [1] * (length - count) for count in pads]
    more = torch.randint(0, len(ranks()), (then,), generator=noise).tolist()
    return Case(rows, mask, list(PICTURES[: len(pads)]), more, answer)


def cases() -> dict[str, Case]:
    """Return prompts below, at and beyond seq_length (α = 3, then 7), padded, cached, answered."""
    made = {f"{n} tokens": case(n) for n in (300, 320, 321, 500, 700)}
    made["400 tokens, padded by 40"] = case(400, pads=(0, 40))
    made["310 tokens, 14 cached"] = case(310, then=14)
    made["330 tokens, 4 cached"] = case(330, then=4)
    made["greedy from 316"] = case(316, answer=8)
    made["greedy from 500"] = case(500, answer=8)
    return made


def prompts() -> dict[str, dict]:
    """Return the prompts that the published code is to write, a picture's path between its tags."""
    first, second = PICTURES
    turn = f"Picture 1: <img>{first}</img>\n{QUESTIONS[0]}"
    chat = {"format": "chatml", "system": SYSTEM, "history": [], "query": turn}
    later = f"Picture 2: <img>{second}</img>\n{QUESTIONS[1]}"
    return {
        "chat": chat,
        "chat, two turns": chat | {"history": [[turn, "a cup"]], "query": later},
        "base": {"format": "raw", "query": f"<img>{first}</img>{QUESTIONS[0]} Answer:"},
    }


def our_prompts(chat: LensModel, base: LensModel) -> dict[str, dict]:
    """Return the same prompts as this package writes them."""
    asking = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        for question in QUESTIONS
    ]
    turns = [asking[0], {"role": "assistant", "content": "a cup"}, asking[1]]
    text = chat.processor.apply_chat_template(turns, add_generation_prompt=True)
    both = chat.processor(images=[picture(0), picture(1)], text=text, return_tensors="pt")
    return {
        "chat": dict(chat.prompt(picture(0), QUESTIONS[0])),
        "chat, two turns": dict(both),
        "base": dict(base.prompt(picture(0), QUESTIONS[0])),
    }


# ── the two sides ──


def require_folder(folder: Path) -> None:
    """Leave with a sentence if the published code is not in the folder."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        sys.exit(
            f"'{folder}' lacks {', '.join(missing)}. Pass the folder of a published Qwen-VL: "
            "hf download Qwen/Qwen-VL-Chat --include '*.py' qwen.tiktoken --local-dir FOLDER"
        )


def run_published(python: str, folder: Path, work: Path) -> tuple[dict, dict]:
    """Return the published code's logits and what else it said."""
    side = Path(__file__).with_name("published_qwen.py")
    command = [python, "-I", "-B", str(side), str(folder), str(work)]
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    except OSError as error:
        sys.exit(f"'{python}' does not start ({error}). Pass --python the path of one that does.")
    if done.returncode:
        packages = " ".join(name for name in NEEDED if name != "transformers")
        sys.exit(
            f"{done.stderr.strip()}\nThe published code did not run. Pass --python one with "
            f"transformers {RUNS_ON}x: pip install transformers=={RUNS_ON}2 "
            f"{packages.replace('PIL', 'pillow')}"
        )
    return load_file(work / "logits.safetensors"), json.loads((work / "said.json").read_text())


@torch.inference_mode()
def our_logits(model: torch.nn.Module, inputs: dict, then: list[int]) -> torch.Tensor:
    """Return [batch, position, vocabulary]; the tokens of ``then`` are read with the cache."""
    out = model(**inputs, use_cache=True)
    logits = [out.logits]
    for one in then:
        out = model(input_ids=torch.tensor([[one]]), use_cache=True, **{CACHE: cache_of(out)})
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def inputs_of(lens: LensModel, one: Case) -> dict[str, torch.Tensor]:
    pixels = [picture(PICTURES.index(name)) for name in one.pictures]
    return {
        "input_ids": torch.tensor(one.ids),
        "attention_mask": torch.tensor(one.mask),
        "pixel_values": lens.processor.image_processor(pixels, return_tensors="pt")["pixel_values"],
    }


# ── the comparison ──


class Table:
    """Prints rows and remembers whether any of them is apart."""

    failed = False

    def row(self, ok: bool, name: str, *cells: str) -> None:
        self.failed |= not ok
        print(f"{name:28}", *(f"{cell:>10}" for cell in cells), "" if ok else "  <- APART")

    def logits(
        self, name: str, lens: LensModel, inputs: dict, wanted: torch.Tensor, then: list[int]
    ) -> None:
        """Compare logits where the mask is 1, and again with each of our rules switched off.

        Without a rule that acts they must be far apart, or their agreement would say little.
        """
        model, kept = lens.hf_model, inputs["attention_mask"].bool()
        kept = torch.cat([kept, kept.new_ones(len(kept), len(then))], dim=1)
        prompt, rows = inputs["input_ids"].shape[1], kept.shape[1]

        def apart() -> float:
            return float((our_logits(model, inputs, then) - wanted)[kept].abs().max())

        error, spread, without = apart(), float(wanted[kept].std()), {}
        for rule, setting in RULES.items():
            setattr(model.config.text_config, setting, False)
            without[rule] = apart()
            setattr(model.config.text_config, setting, True)
        acts = {"log-n": rows > SEQ_LENGTH, "NTK": prompt > SEQ_LENGTH}
        matters = all(
            without[rule] > 30 * error if acts[rule] else without[rule] == error for rule in RULES
        )
        numbers = (f"{error:.1e}", f"{spread:.2f}", *(f"{one:.1e}" for one in without.values()))
        self.row(error < TOLERANCE and spread > 0.3 and matters, name, str(rows), *numbers)


def compare_answer(table: Table, name: str, lens: LensModel, one: Case, wanted: list[int]) -> None:
    """Compare greedy tokens, and again without the NTK rule."""
    model: Any = lens.hf_model

    def equal() -> int:
        options = {"do_sample": False, "max_new_tokens": one.answer, "disable_compile": True}
        made = model.generate(**inputs_of(lens, one), **options)[0, len(one.ids[0]) :].tolist()
        return sum(a == b for a, b in zip(made, wanted, strict=True))

    found = equal()
    model.config.text_config.use_dynamic_ntk = False
    without = equal()
    model.config.text_config.use_dynamic_ntk = True
    told = f"{found} of {one.answer} tokens equal, {without} without NTK"
    table.row(found == one.answer, name, told)


def compare_prompts(
    table: Table, said: dict, logits: dict, chat: LensModel, made: dict[str, dict]
) -> None:
    """Compare prompts' ids, but for those in the pictures, and the logits that they give."""
    start, pad = special_id("<img>"), special_id("<imgpad>")
    for name, inputs in made.items():
        ids = list(said["prompts"][name])
        for place in [at for at, one in enumerate(ids) if one == start]:
            ids[place + 1 : place + 257] = [pad] * 256
        if ids != inputs["input_ids"][0].tolist():
            table.row(False, name, "token ids differ")
            continue
        table.logits(name, chat, inputs, logits[name], [])


def compare_texts(table: Table, said: dict, work: Path) -> None:
    """Compare the ids of texts, by the tests' vocabulary and by the published one."""
    for kind, (path, wanted) in zip(("tiny", "published"), said["texts"].items(), strict=False):
        tokenizer = make_tokenizer(work / path)
        found = [tokenizer(text).input_ids for text in TEXTS]
        equal = sum(a == b for a, b in zip(found, wanted, strict=True))
        size = f"of {sum(map(len, wanted))} tokens, vocabulary of {len(tokenizer):,}"
        alike = f"{equal} of {len(TEXTS)} alike, {size}"
        table.row(equal == len(TEXTS), f"texts, {kind} vocabulary", alike)


def compare(folder: Path, python: str, work: Path) -> bool:
    """Print the table; return whether both sides agree."""
    weights = tensors(CONFIG)
    for kind in ("chat", "base"):
        publish(work / kind, chats=kind == "chat", shards=1, config=CONFIG, weights=weights)
    for seed, name in enumerate(PICTURES):
        Image.fromarray(picture(seed)).save(work / name)
    paths = ["chat/qwen.tiktoken"]
    if (folder / VOCABULARY).is_file():
        paths.append(str(folder / VOCABULARY))
    asked = {
        "cases": {name: one._asdict() for name, one in cases().items()},
        "prompts": prompts(),
        "picture": PICTURES[0],
        "texts": TEXTS,
        "vocabularies": paths,
    }
    (work / "cases.json").write_text(json.dumps(asked))
    logits, said = run_published(python, folder, work)
    transformers.utils.logging.disable_progress_bar()
    chat, base = (cl.load(work / kind) for kind in ("chat", "base"))
    chat.hf_model.generation_config.eos_token_id = None

    theirs = ", ".join(f"{name} {version}" for name, version in said["versions"].items())
    print(f"{datetime.now(UTC):%Y-%m-%d}. Published code: {theirs}")
    print(f"clva_lens: transformers {transformers.__version__}, torch {torch.__version__}\n")
    table = Table()
    heads = ("tokens", "error", "spread", *(f"no {rule}" for rule in RULES))
    print(f"{'':28}", *(f"{head:>10}" for head in heads))
    for name, one in cases().items():
        table.logits(name, chat, inputs_of(chat, one), logits[name], one.then)
        if one.answer:
            compare_answer(table, name, chat, one, said["answers"][name])
    compare_prompts(table, said, logits, chat, our_prompts(chat, base))
    pixels = inputs_of(chat, case(300))["pixel_values"]
    with torch.inference_mode():
        seen = torch.stack(chat.hf_model.get_image_features(pixels).pooler_output)
    for name, found in {"pixels": pixels, "picture tokens": seen}.items():
        error, spread = float((found - logits[name]).abs().max()), float(found.std())
        table.row(error < TOLERANCE, name, "", f"{error:.1e}", f"{spread:.2f}")
    compare_texts(table, said, work)
    if len(paths) == 1:
        print(f"No {VOCABULARY} in '{folder}': the published vocabulary was not compared.")
    print(f"Its from_list_format() writes {said['shown']!r}; ours 'Picture 1: <img></img>\\n?'.")
    return not table.failed


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare with Qwen's published code.")
    parser.add_argument("folder", type=Path, help="the published code")
    parser.add_argument("--python", required=True, help=f"one with transformers {RUNS_ON}x")
    given = parser.parse_args()
    require_folder(given.folder)
    with TemporaryDirectory() as work:
        agree = compare(given.folder.resolve(), given.python, Path(work))
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
