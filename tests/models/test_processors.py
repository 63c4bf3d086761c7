"""Folders as save_pretrained() leaves them, with real processors, through the generic family.

What prepares the pictures is an input: of toys it is always Pillow; where torchvision is missing,
that is said before weights are read.
"""

import copy
import json

import numpy as np
import pytest
import tiny_families as tiny
import torch
from PIL import Image
from test_survey import apart, write
from tiny_models import QUESTIONS, lens_of, make_processor, tokenizer
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)
from transformers.utils import is_torchvision_available
from typer.testing import CliRunner

import clva_lens as cl
from clva_lens.__main__ import app
from clva_lens.ground.errors import InterventionError, ModelLoadError
from clva_lens.lens import facts, reading
from clva_lens.methods.base import METHODS
from clva_lens.toy import pretrained
from clva_lens.toy.build import image_processor

SIDE = tiny.SIDE
TEMPLATE = (
    "<s>{% for m in messages %}{{ m['role'] }}: {% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %} assistant:"
)


def gemma():
    """One square picture, 16 tokens between two others."""
    named = {"image_token": "<image>", "boi_token": "word1", "eoi_token": "word2"}
    reader = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer()._tokenizer,
        **{"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        padding_side="left",
        extra_special_tokens=named,
    )
    images = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return Gemma3Processor(
        images, reader, image_seq_length=16, chat_template=TEMPLATE.replace("<image>", "word1")
    )


def next_llava():
    """Tiles of 32 × 32, and tokens that end rows."""
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=[[SIDE, 2 * SIDE]],
    )
    return LlavaNextProcessor(
        images,
        tokenizer(),
        patch_size=tiny.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


PROCESSORS = {"gemma3": gemma, "llava_next": next_llava}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for kind, make in PROCESSORS.items():
        found[kind] = tmp_path_factory.mktemp("models") / kind
        model = copy.deepcopy(tiny.tiny_model(kind))
        model.save_pretrained(found[kind])
        make().save_pretrained(found[kind])
    return found


def noise(height, width):
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", PROCESSORS)
def test_from_a_folder(folders, kind):
    lens = cl.load(folders[kind])
    assert lens.family.name == "generic"
    prompt = lens.prompt(noise(32, 64), QUESTIONS[0])
    method = cl.CLVA(positive_layer=1, tau=0.5)
    plain, edited = (write(lens.hf_model, prompt, *one) for one in ((), (method,)))
    assert apart(plain, edited) > 0.05
    assert apart(write(lens.hf_model, prompt, method, use_cache=False), edited) < 1e-4
    trace = cl.trace_attention(lens, prompt)
    assert trace.maps.shape[-1] == prompt.spans.visual_count
    assert torch.isfinite(trace.maps).all()


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (
            "gemma3",
            (
                "Gemma3ForConditionalGeneration, model type 'gemma3', family 'generic'",
                "site 'decoder': 6 layers, 4 heads (2 of keys), kernel 'sdpa'",
                "grid at the decoder: 4 × 4",
                "layers 0, 1, 2, 3, 4 look 64 positions back only",
                "clva: applies",
                "vcd: refused. the family 'generic' does not say where its pictures come in",
            ),
        ),
        (
            "llava_next",
            (
                "LlavaNextForConditionalGeneration, model type 'llava_next', family 'generic'",
                "no grid at the decoder: neither the processor nor the configuration",
                "opera: applies",
            ),
        ),
    ],
)
def test_check_model(folders, kind, told):
    found = CliRunner().invoke(app, ["check-model", str(folders[kind])])
    assert found.exit_code == 0, found.stderr
    shown = " ".join(found.stdout.split())
    for fact in (*told, "check: rows of every layer sum to 1, and hiding the image moves"):
        assert fact in shown, shown
    assert all(f" {name}: " in shown for name in METHODS.names())


def test_a_method_that_fails_is_refused(monkeypatch):
    """With what the model's code says; faults of the machine are raised."""
    lens = lens_of("full", "sdpa")
    prompt = lens.prompt(noise(32, 32), QUESTIONS[0])

    def fail(error):
        def raises(*given, **options):
            raise error

        monkeypatch.setattr(facts, "generate", raises)

    fail(TypeError("crop() takes 1\npositional argument"))
    found = dict(facts.refusals(lens, prompt))
    assert set(found) == set(METHODS.names())
    assert set(found.values()) == {"it does not run here (TypeError: crop() takes 1.)"}
    fail(MemoryError())
    with pytest.raises(MemoryError):
        dict(facts.refusals(lens, prompt))


def test_a_cache_that_does_not_go_back():
    """OPERA looks ahead; layers without softmax attention forget what was before."""
    lens = cl.load((tiny.tiny_model("qwen3_5"), make_processor()), check=False)
    how = cl.Beam(num_beams=2, max_new_tokens=2)
    with pytest.raises(InterventionError, match=r"keeps no past to go back to.*another method"):
        cl.generate(lens, tiny.sample("qwen3_5", 0), cl.OPERA(), how)


# ── torchvision ──


@pytest.mark.parametrize("name", pretrained.names())
def test_toys_prepare_pictures_with_pillow(name, monkeypatch):
    """The same pixels, whatever is installed; torchvision's differ by up to 2 of 255."""
    asked = []
    load = AutoProcessor.from_pretrained

    def spy(*args, **options):
        asked.append(options.get("backend"))
        return load(*args, **options)

    monkeypatch.setattr(AutoProcessor, "from_pretrained", spy)
    lens = cl.load(name, check=False)
    picture = noise(97, 143)
    pixels = lens.prompt(picture, "is there a cup ?")["pixel_values"]
    wanted = image_processor()(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, wanted) and pixels.std() > 0.1
    assert asked == ["pil"]
    assert lens.images.backend == "pil"


MISSING = """
Qwen2VLVideoProcessor requires the Torchvision library but it was not found in your environment. \
Check out the instructions on the
installation page: https://pytorch.org/get-started/locally/ and follow the ones that match.
"""
NO_CLASS = "Could not load any image processor class for x. Missing optional dependencies: {}."


@pytest.fixture
def unreadable(tmp_path, monkeypatch):
    """A Qwen2-VL whose weights must not be read, as it is saved where torchvision is installed."""
    copy.deepcopy(tiny.tiny_model("qwen2_vl")).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    saved = {
        "processor_class": "Qwen2VLProcessor",
        "image_processor": {"image_processor_type": "Qwen2VLImageProcessor"},
        "video_processor": {"video_processor_type": "Qwen2VLVideoProcessor"},
    }
    (tmp_path / "processor_config.json").write_text(json.dumps(saved))
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *a, **k: 1 / 0)
    return tmp_path


def processor_raises(monkeypatch, error):
    def refuse(*args, **options):
        raise error

    monkeypatch.setattr(AutoProcessor, "from_pretrained", refuse)


def test_without_torchvision(unreadable, monkeypatch):
    """In a whole sentence, with the remedy; by check-model too."""
    if is_torchvision_available():
        monkeypatch.setattr(reading, "is_torchvision_available", lambda: False)
        processor_raises(monkeypatch, ImportError(MISSING))
    said = (
        r"needs torchvision, which is not installed: Qwen2VLVideoProcessor requires the "
        r"Torchvision library but it was not found in your environment\. Install what .*: pip "
        r'install "clva-lens\[vision\]"\.$'
    )
    with pytest.raises(ModelLoadError, match=said):
        cl.load(unreadable)
    found = CliRunner().invoke(app, ["check-model", str(unreadable)])
    assert found.exit_code == 1
    assert 'pip install "clva-lens[vision]"' in " ".join(found.stderr.split())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError(NO_CLASS.format("torchvision")), r"needs torchvision.*torchvision\. Install"),
        (ImportError("Package `num2words` is required."), r"needs a package.*required\. Install"),
        (ValueError(NO_CLASS.format("pillow")), r"could not be loaded.*pillow\. Save it beside"),
    ],
    ids=["no class", "another package", "another fault"],
)
def test_what_a_processor_lacks(unreadable, monkeypatch, error, message):
    monkeypatch.setattr(reading, "is_torchvision_available", lambda: False)
    processor_raises(monkeypatch, error)
    with pytest.raises(ModelLoadError, match=message):
        cl.load(unreadable)
