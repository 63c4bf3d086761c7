"""Each model type with the processor that a user has, from a picture to an answer and a folder.

``real_families.py`` says what is real in these processors. What can be held against transformers'
own way is: its ``apply_chat_template(tokenize=True)`` makes the same inputs, its ``generate`` the
same answer.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from real_families import REAL, REASONS, table
from real_processors import TORCHVISION, make_model, make_processor
from survey_table import ABSENT, PROVEN, installed
from test_survey import UNBATCHED, VARIANTS, anchored, apart
from typer.testing import CliRunner

import clva_lens as cl
from clva_lens.__main__ import app
from clva_lens.ground.errors import PromptError, SpanError
from clva_lens.methods.base import METHODS

QUESTION, OTHER, SYSTEM = "Is there a cup in the image?", "What is it?", "You are helpful."
GREEDY = cl.Greedy(max_new_tokens=3)
pytestmark = [
    pytest.mark.filterwarnings(one)
    for one in (
        # numpy 2 of torch's tensors, within transformers' processors
        "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning",
        # transformers 5.22 of the inputs that its own processors make
        "ignore:`.*` is deprecated and will be removed in version v5.23:FutureWarning",
    )
]
APART = UNBATCHED if installed("5.23") else (*UNBATCHED, "minimax_m3_vl")
BEAMLESS = ("granite_docling",)  # transformers' own beam search fails on it, so OPERA does
CLOSED = ("fuyu", "paligemma")  # their processors end the text
# Without torchvision, these are enough.
ALWAYS = ("idefics3", "paligemma", "shieldgemma2")

UNTRIED = {"hy_v4_vl"}
"""Model types that keep the laws, whose processor is not written here yet."""


def photo(height, width, seed=0):
    """A picture of coloured patches of 8 × 8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3))
    return np.kron(coarse, np.ones((8, 8, 1))).astype(np.uint8)


WIDE, HIGH = photo(64, 112), photo(112, 64)


def available(kinds):
    """Return model types as parameters, with what is not run here skipped."""
    found = []
    for kind in sorted(kinds):
        reasons = [
            pytest.mark.skipif(kind in ABSENT, reason=f"un-skip with a transformers with {kind}"),
            pytest.mark.skipif(
                not TORCHVISION and kind not in ALWAYS, reason="un-skip with torchvision"
            ),
        ]
        found.append(pytest.param(kind, marks=reasons))
    return found


def last(model, inputs):
    with torch.inference_mode():
        return model(**inputs).logits[:, -1]


def by_transformers(processor, picture):
    """Return the inputs of a question as transformers' documentation makes them."""
    parts = [
        {"type": "image", "image": Image.fromarray(picture)},
        {"type": "text", "text": QUESTION},
    ]
    return processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


@pytest.mark.parametrize("kind", available(set(REAL) - set(REASONS)))
def test_end_to_end(kind, tmp_path):
    model, processor = make_model(kind, REAL[kind]), make_processor(REAL[kind])
    lens = cl.load((model, processor))
    prompt = lens.prompt(WIDE, QUESTION)
    looked_at(lens, prompt, kind)
    answered(lens, prompt)
    batched(lens, kind)
    led(lens, prompt)
    begun(lens, kind)
    kept(lens, prompt, tmp_path, kind)


def looked_at(lens, prompt, kind):
    """Inputs are transformers' own; attention is read; CLVA moves the logits in a trace."""
    if lens.processor.chat_template is not None:
        wanted = by_transformers(lens.processor, WIDE)
        for name in wanted.keys() & prompt.keys():
            found = torch.as_tensor(wanted[name])  # Llama 4's pixels are bfloat16
            assert torch.equal(prompt[name], found.to(prompt[name].dtype))
        assert {"input_ids", "attention_mask"} <= wanted.keys() & prompt.keys()
    image = prompt["input_ids"][0] == lens.family.image_token_id(lens.hf_model)
    assert torch.equal(prompt.spans.image[0], image) and image.sum() > 1
    grid = prompt.sites["decoder"].grid
    assert len(grid) > 40 if isinstance(grid, str) else grid[0] * grid[1] == image.sum()
    maps = cl.trace_attention(lens, prompt).maps
    assert maps.shape[-1] == image.sum() and 0 < maps.sum(dim=-1).max() <= 1 + 1e-4
    plain = last(lens.hf_model, prompt)
    with lens.trace(prompt):
        cl.intervene(anchored(lens.hf_model))
        logits = lens.output.logits.save()
    moved = apart(logits[:, -1].detach(), plain)
    print(f"{kind}: {int(image.sum())} image tokens, CLVA moves the logits by {moved:.3g}")
    assert moved > 0.05


def answered(lens, prompt):
    """Answers are those of the model's own generate; with CLVA their margins are others."""
    plain = cl.generate(lens, prompt, None, GREEDY)
    edited = cl.generate(lens, prompt, anchored(lens.hf_model), GREEDY)
    with torch.inference_mode():
        wanted = lens.hf_model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert plain.ids[0].tolist() == wanted[0, prompt.answer_start :].tolist()
    assert abs(edited.margins[0] - plain.margins[0]) > 1e-3


def batched(lens, kind):
    """Two questions, and two pictures of different shape, are asked as one by one."""
    for pictures, questions in ((WIDE, [QUESTION, OTHER]), ([WIDE, HIGH], QUESTION)):
        several = pictures if isinstance(pictures, list) else [pictures] * 2
        texts = questions if isinstance(questions, list) else [questions] * 2
        alone = [lens.prompt(*one) for one in zip(several, texts, strict=True)]
        counts = {one.spans.visual_count for one in alone}
        if len(counts) > 1:
            with pytest.raises(SpanError, match="different numbers of image tokens"):
                lens.prompt(pictures, questions)
            continue
        singles = torch.cat([last(lens.hf_model, one) for one in alone])
        together = apart(last(lens.hf_model, lens.prompt(pictures, questions)), singles)
        between = apart(singles[:1], singles[1:])
        assert between > 0.01
        assert together < between / 50 or kind in APART


def led(lens, prompt):
    """A system message is read before the question, and moves the logits."""
    told = lens.prompt(WIDE, QUESTION, system=SYSTEM)
    text = lens.words.decode(told["input_ids"][0])
    assert text.index(SYSTEM) < text.index(QUESTION)
    assert told.spans.visual_count == prompt.spans.visual_count
    assert apart(last(lens.hf_model, told), last(lens.hf_model, prompt)) > 1e-3


def begun(lens, kind):
    """The beginning of an answer is the last that is read, or there is no place for it."""
    if kind in CLOSED:
        with pytest.raises(PromptError, match=r"ends every text with something of its own"):
            lens.prompt(WIDE, QUESTION, answer="Yes")
        return
    asked = lens.prompt(WIDE, QUESTION, answer="Yes")
    assert lens.words.decode(asked["input_ids"][0, -6:]).endswith("Yes")


def kept(lens, prompt, folder, kind):
    """From a folder, all is the same; check-model says of every method whether it applies."""
    lens.hf_model.save_pretrained(folder)
    lens.processor.save_pretrained(folder)
    again = cl.load(folder)
    asked = again.prompt(WIDE, QUESTION)
    assert asked.keys() == prompt.keys()
    assert all(torch.equal(asked[name], one) for name, one in prompt.items())
    assert torch.equal(last(again.hf_model, asked), last(lens.hf_model, prompt))
    found = CliRunner().invoke(app, ["check-model", str(folder)])
    assert found.exit_code == 0, found.stderr
    shown = " ".join(found.stdout.split())
    assert "hiding the image moves" in shown
    assert "does not run here" not in shown or kind in BEAMLESS or not installed("5.24")
    assert all(re.search(rf" {name}: (applies|refused\. )", shown) for name in METHODS.names())


@pytest.mark.parametrize("kind", available(REASONS))
def test_reasons_hold(kind):
    reason = REASONS[kind]
    pair = make_model(kind, REAL[kind]), make_processor(REAL[kind])
    with pytest.raises(reason.error, match=reason.message):
        cl.load(pair)


def test_every_model_type_has_a_processor_here():
    assert set(REAL) - ABSENT == {*PROVEN, *VARIANTS, *(REASONS.keys() - PROVEN)} - UNTRIED


def test_the_page_shows_the_table():
    """That of docs/models.md is of one version, which it names."""
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    (version,) = re.findall(r"with their real processors: transformers (\d+\.\d+)", page)
    if not transformers.__version__.startswith(f"{version}."):
        pytest.skip(f"un-skip with transformers {version}")
    assert table() in page
