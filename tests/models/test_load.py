"""Models from folders and as they are; what is refused, and the check at the door."""

import json
import shutil
from copy import deepcopy

import pytest
import torch
from tiny_models import QUESTIONS, make_processor, picture, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

import clva_lens as cl
from clva_lens.ground.errors import ModelCheckError, ModelLoadError, PromptError, UnknownName
from clva_lens.lens.check import check_family
from clva_lens.lens.load import LensModel
from clva_lens.models.family import FAMILIES
from clva_lens.models.llava import Llava


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole model as save_pretrained() leaves it."""
    path = tmp_path_factory.mktemp("models") / "tiny-llava"
    tiny_model().save_pretrained(path)
    make_processor().save_pretrained(path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder that a test may damage."""
    return shutil.copytree(folder, tmp_path / "model")


def test_folder_is_the_model(folder):
    """Weights, prompts and answers survive the way through safetensors."""
    loaded = cl.load(str(folder))
    wanted = cl.load((tiny_model(), make_processor()))
    assert isinstance(loaded, LensModel)
    assert loaded.num_layers == 12
    assert loaded.family.name == "llava"
    assert not loaded.hf_model.training
    one, other = (lens.prompt(picture(0), QUESTIONS[0]) for lens in (loaded, wanted))
    assert one.keys() == other.keys() and torch.equal(one["input_ids"], other["input_ids"])
    # A folder does not say that Pillow is to scale the picture; torchvision's is 2 of 255 off.
    same = type(loaded.images) is type(wanted.images)
    most = 0 if same else 2 / 255 / 0.25 + 1e-6
    torch.testing.assert_close(one["pixel_values"], other["pixel_values"], rtol=0, atol=most)
    other = one
    with torch.inference_mode():
        assert torch.equal(loaded.hf_model(**one).logits, wanted.hf_model(**other).logits)
    how = cl.Greedy(max_new_tokens=4)
    assert (
        cl.generate(loaded, one, cl.CLVA(), how).texts
        == cl.generate(wanted, other, cl.CLVA(), how).texts
    )


def test_path_objects(folder):
    assert cl.load(folder, check=False).name == str(folder)


def test_options_pass_through(folder):
    plain = cl.load(folder, check=False)
    assert plain.hf_model.dtype == torch.float32
    assert plain.site.config._attn_implementation == "sdpa"
    half = cl.load(folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert half.hf_model.dtype == torch.bfloat16
    assert half.site.config._attn_implementation == "eager"
    assert half.prompt(picture(0), QUESTIONS[0])["pixel_values"].dtype == torch.bfloat16
    assert half.prompt(picture(0), QUESTIONS[0])["input_ids"].dtype == torch.int64


def test_dtype_is_that_of_the_file(copy):
    tiny_model().bfloat16().save_pretrained(copy)
    assert cl.load(copy, check=False).hf_model.dtype == torch.bfloat16


def test_a_model_in_training_is_put_to_evaluation():
    model = tiny_model().train()
    assert not cl.load((model, make_processor()), check=False).hf_model.training


# ── refusals ──


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-such-model", "no model 'no-such-model': no toy.*no folder.*Check the spelling"),
        ("./no/such/folder", "no model './no/such/folder'"),
        ("", "no model ''|no config.json"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises((ModelLoadError, UnknownName), match=message):
        cl.load(name)


def test_hub_id_without_a_network():
    """HF_HUB_OFFLINE is set for the tests: the error names the model and the way out."""
    with pytest.raises(ModelLoadError, match=r"'nobody/nothing' could not be loaded.*local folder"):
        cl.load("nobody/nothing")


def test_a_file_instead_of_a_folder(folder):
    with pytest.raises(ModelLoadError, match=r"model.safetensors' is a file. Pass the folder"):
        cl.load(folder / "model.safetensors")


def test_folder_without_config(copy):
    (copy / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"has no config.json"):
        cl.load(copy)


def test_folder_without_weights(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"has no weights \(\*.safetensors\)"):
        cl.load(copy)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_refused(copy, name):
    """Not even opened: the file here would fail loudly if it were."""
    (copy / "model.safetensors").unlink()
    (copy / name).write_bytes(b"not a pickle")
    with pytest.raises(ModelLoadError, match=f"pickle .{name}.*refused. Convert it to safetensors"):
        cl.load(copy)


def test_broken_weights(copy):
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ModelLoadError, match=r"could not be loaded: Error while deserializing header"
    ):
        cl.load(copy)


def test_folder_without_processor(copy):
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        (copy / name).unlink(missing_ok=True)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelLoadError, match=r"processor.*save|no image processor"):
        cl.load(copy)


def test_config_that_is_no_json(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"could not be loaded"):
        cl.load(copy)


def test_a_folder_with_another_kind_of_model(tmp_path):
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=r"could not be loaded.*image-text-to-text"):
        cl.load(tmp_path)


def test_remote_code_is_refused(folder):
    with pytest.raises(ModelLoadError, match=r"trust_remote_code=True.*never runs code"):
        cl.load(folder, trust_remote_code=True)


def test_code_in_a_repository_is_not_run(copy):
    """A config that asks for its own code does not get it, and nothing is asked on a terminal."""
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "mine.py").write_text("raise SystemExit('the code was run')")
    with pytest.raises(ModelLoadError, match=r"could not be loaded"):
        cl.load(copy)


def test_bad_tuples(untyped):
    for bad in ((tiny_model(),), (None, None), ("toy-llava", make_processor())):
        with pytest.raises(ModelLoadError, match=r"a tuple must be \(hf_model, processor\)"):
            cl.load(bad)
    with pytest.raises(ModelLoadError, match=r"NoneType but no image processor"):
        cl.load((tiny_model(), None))
    with pytest.raises(ModelLoadError, match=r"no image processor"):
        cl.load((tiny_model(), make_processor().tokenizer))


@pytest.mark.parametrize(
    "option",
    [{"dtype": torch.bfloat16}, {"attn_implementation": "eager"}, {"device_map": "cpu"}],
    ids=lambda option: next(iter(option)),
)
def test_options_for_a_loaded_model_are_not_ignored(option):
    with pytest.raises(ModelLoadError, match=f"{next(iter(option))} was passed with a model"):
        cl.load((tiny_model(), make_processor()), **option)


# ── the check at the door ──


def test_check_returns_how_far_the_logits_move(lens):
    moved = check_family(lens.hf_model, lens.prompt)
    print(f"check_family: {moved:.3f}")
    assert moved > 0.05


def test_check_fails_if_attention_is_not_on_the_path():
    """All-zero output projections: attention is computed, and nothing depends on it."""
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
    with pytest.raises(
        ModelCheckError, match=r"left the logits unchanged.*'llava'.*not on the path"
    ):
        cl.load((model, make_processor()))
    assert cl.load((model, make_processor()), check=False).num_layers == 12
    assert model.config.text_config._attn_implementation == "sdpa"


class _WrongModules(Llava):
    """A family that names modules that are not on the path: copies of the attention."""

    def sites(self, model):
        (right,) = super().sites(model)
        modules = tuple(deepcopy(module) for module in right.modules)
        return (right._replace(modules=modules),)


class _WrongKernelOwner(Llava):
    """A family that names a config that the attention modules do not read."""

    def sites(self, model):
        (right,) = super().sites(model)
        return (right._replace(config=model.config.vision_config),)


@pytest.mark.parametrize("wrong", [_WrongModules, _WrongKernelOwner])
def test_check_fails_if_the_family_is_wrong(monkeypatch, wrong):
    monkeypatch.setitem(FAMILIES._items, "llava", wrong())
    with pytest.raises(ModelCheckError, match=r"no attention was seen.*'llava'.*not on the path"):
        cl.load((tiny_model(), make_processor()))


def test_check_fails_if_the_processor_does_not_fit():
    """A processor with another patch size writes another number of image tokens."""
    processor = make_processor()
    processor.num_additional_image_tokens = 0
    with pytest.raises(ModelCheckError, match=r"has 15 image tokens at .*makes 16.*patch_size"):
        cl.load((tiny_model(), processor))


def test_cls_feature_has_no_grid():
    model, processor = tiny_model(), make_processor()
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(ModelCheckError, match=r"has 16 image tokens at the decoder.*makes 17"):
        cl.load((model, processor))
    processor.vision_feature_select_strategy = "full"
    lens = cl.load((model, processor))
    prompt = lens.prompt(picture(0), "is there a cup ?")
    trace = cl.trace_attention(lens, prompt)
    assert prompt.grid is None
    with pytest.raises(PromptError, match=r"vision_feature_select_strategy is 'full'.*no grid"):
        prompt.on_grid(trace.saliency())


def test_picture_of_another_size_is_found_at_the_door():
    processor = make_processor()
    processor.image_processor.size = {"shortest_edge": 40}
    processor.image_processor.crop_size = {"height": 40, "width": 40}
    with pytest.raises(ModelCheckError, match=r"makes pictures of 40 × 40.*takes 32 × 32"):
        cl.load((tiny_model(), processor))


def test_families_are_registered():
    assert "llava" in cl.models()
    with pytest.raises(UnknownName, match=r"no model family 'lava'. Did you mean 'llava'"):
        FAMILIES.get("lava")
