"""From published folders to the model: what is read, what is refused, and that no code is run."""

import json
import pickle
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
import transformers
from qwen_models import official_config, picture, publish, special_id, tensors
from safetensors.torch import save_file

import clva_lens as cl
from clva_lens.ground.errors import ModelLoadError
from clva_lens.models.qwen.configuration import (
    QwenVLConfig,
    QwenVLTextConfig,
    QwenVLVisionConfig,
)
from clva_lens.models.qwen.convert import convert, native_tensors, targets
from clva_lens.models.qwen.model import QwenVLForConditionalGeneration
from clva_lens.models.qwen_files import is_official, published_folder

CONFIG = official_config(num_hidden_layers=6)
WEIGHTS = tensors(CONFIG)
PROMPT = "is there a cup ?"

# The published config.json of Qwen-VL-Chat, as far as it describes the architecture.
PUBLISHED = {
    "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 8192,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "visual": {
        "heads": 16,
        "image_size": 448,
        "image_start_id": 151857,
        "layers": 48,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "patch_size": 14,
        "width": 1664,
    },
    "vocab_size": 151936,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("published") / "Qwen-VL", weights=WEIGHTS)


@pytest.fixture
def copy(whole, tmp_path):
    """A published folder that a test may damage."""
    return shutil.copytree(whole, tmp_path / "Qwen-VL")


@pytest.fixture(scope="module")
def wanted(whole):
    return logits_of(cl.load(whole, check=False))


def logits_of(lens):
    with torch.inference_mode():
        return lens.hf_model(**lens.prompt(picture(0), PROMPT)).logits


def reweigh(folder, weights):
    """Replace a folder's weights by one file."""
    for path in folder.glob("model*"):
        path.unlink()
    save_file(
        {name: one.contiguous() for name, one in weights.items()}, folder / "model.safetensors"
    )


# ── what is read ──


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_form_of_weights(tmp_path, wanted, kind, shards):
    folder = publish(tmp_path / "model", kind=kind, shards=shards, weights=WEIGHTS)
    lens = cl.load(folder)
    assert torch.equal(logits_of(lens), wanted)
    assert lens.name == str(folder)
    assert not lens.hf_model.training
    assert lens.num_layers == 6


def test_classes_are_known_when_a_folder_needs_them(whole, tmp_path):
    """In a fresh interpreter, of a published folder and of a native one."""
    native = tmp_path / "native"
    convert(whole, native)
    code = """
import sys
import clva_lens as cl
import clva_lens.models.qwen_vl
assert "clva_lens.models.qwen" not in sys.modules
print(type(cl.load(sys.argv[1], check=False).hf_model).__name__)
"""
    for folder in (whole, native):
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder)], capture_output=True, text=True
        )
        assert done.stdout.strip() == "QwenVLForConditionalGeneration", done.stderr


def test_safetensors_are_preferred(copy, wanted):
    (copy / "pytorch_model.bin").write_bytes(b"not a pickle")
    assert torch.equal(logits_of(cl.load(copy, check=False)), wanted)


def test_every_tensor_is_in_its_place():
    """Each number of the checkpoint is in the model once: as many, and the same sorted values."""
    config = QwenVLConfig.from_official(CONFIG)
    made = native_tensors(WEIGHTS, config)
    assert made.keys() == QwenVLForConditionalGeneration(config).state_dict().keys()
    before, after = (torch.cat([x.flatten() for x in t.values()]) for t in (WEIGHTS, made))
    assert torch.equal(before.sort().values, after.sort().values)
    assert len({x.data_ptr() for x in made.values()}) == len(made)


def test_options(whole):
    half = cl.load(whole, dtype=torch.bfloat16, attn_implementation="eager", device_map="cpu")
    assert half.hf_model.dtype == torch.bfloat16
    assert half.hf_model.model.resampler.positions.dtype == torch.bfloat16
    assert half.site.config._attn_implementation == "eager"
    assert half.prompt(picture(0), PROMPT)["pixel_values"].dtype == torch.bfloat16


def test_dtype_is_that_of_the_files(copy):
    reweigh(copy, {name: one.bfloat16() for name, one in WEIGHTS.items()})
    assert cl.load(copy, check=False).hf_model.dtype == torch.bfloat16


def test_computed_buffers_may_be_there(copy, wanted):
    """The released code leaves these out too when it loads a checkpoint."""
    more = {
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        "transformer.h.1.attn.rotary_emb.inv_freq": torch.ones(32),
    }
    reweigh(copy, WEIGHTS | more)
    assert torch.equal(logits_of(cl.load(copy, check=False)), wanted)


def test_decoding_ends(whole, tmp_path):
    """A chat ends at the end of its message, the base model at the end of the text."""
    ends = [special_id(one) for one in ("<|endoftext|>", "<|im_end|>", "<|im_start|>")]
    chat = cl.load(whole, check=False).hf_model.generation_config
    assert chat.eos_token_id == ends
    base = publish(tmp_path / "base", chats=False, weights=WEIGHTS)
    alone = cl.load(base, check=False).hf_model.generation_config
    assert alone.eos_token_id == ends[:1]
    assert chat.pad_token_id == alone.pad_token_id == ends[0]
    assert not chat.do_sample


def test_converted_folder(whole, wanted, tmp_path):
    """Written once, it loads as any native model: safetensors, no remote code, no tiktoken file."""
    convert(whole, tmp_path / "native")
    names = {path.name for path in (tmp_path / "native").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".py", ".bin", ".tiktoken"))]
    found = json.loads((tmp_path / "native" / "config.json").read_text())
    assert found["model_type"] == "qwen_vl"
    assert "auto_map" not in found
    lens = cl.load(tmp_path / "native")
    assert torch.equal(logits_of(lens), wanted)
    again = cl.load(whole, check=False)
    one, other = (x.prompt(picture(0), PROMPT) for x in (lens, again))
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert torch.equal(one["pixel_values"], other["pixel_values"])
    ours, theirs = (x.hf_model.generation_config.eos_token_id for x in (lens, again))
    assert ours == theirs


def test_the_published_sizes():
    """Nothing is allocated: the published configuration gives 9.66 billion parameters."""
    config = QwenVLConfig.from_official(PUBLISHED)
    defaults = QwenVLConfig(text_config=QwenVLTextConfig(), vision_config=QwenVLVisionConfig())
    for part in ("text_config", "vision_config"):
        found, wanted = (getattr(one, part).to_dict() for one in (config, defaults))
        assert found.pop("rope_parameters", None) == wanted.pop("rope_parameters", None)
        assert found == wanted
    assert config.image_token_id == 151859
    with torch.device("meta"):
        model = QwenVLForConditionalGeneration(config)
    assert sum(one.numel() for one in model.parameters()) == 9_656_935_168
    eyes = [*model.model.vision_tower.parameters(), *model.model.resampler.parameters()]
    assert round(sum(one.numel() for one in eyes) / 1e9, 3) == 1.936
    named = [name for target in targets(config).values() for name in target.names]
    assert sorted(named) == sorted(model.state_dict())


# ── no code ──


def test_code_of_the_repository_is_not_run(whole, monkeypatch):
    """The folder's Python files would end the process, and transformers is not asked for them."""

    def refuse(*args, **kwargs):
        raise AssertionError("remote code was asked for")

    monkeypatch.setattr(transformers.dynamic_module_utils, "get_class_from_dynamic_module", refuse)
    for module in ("configuration_auto", "auto_factory", "tokenization_auto", "processing_auto"):
        monkeypatch.setattr(
            sys.modules[f"transformers.models.auto.{module}"],
            "get_class_from_dynamic_module",
            refuse,
        )
    lens = cl.load(whole)
    assert lens.family.name == "qwen-vl"
    assert "modeling_qwen" in (whole / "config.json").read_text()
    assert not {name.rpartition(".")[2] for name in sys.modules} & {
        "configuration_qwen",
        "modeling_qwen",
        "tokenization_qwen",
    }


def test_trust_is_refused(whole):
    with pytest.raises(ModelLoadError, match=r"trust_remote_code=True.*never runs code"):
        cl.load(whole, trust_remote_code=True)


class _Bomb:
    def __reduce__(self):
        return (sys.exit, ("the pickle was run",))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_pickles_make_tensors_only(tmp_path, how):
    folder = publish(tmp_path / "model", kind="bin", shards=1, weights=WEIGHTS)
    path = folder / "pytorch_model.bin"
    if how == "torch":
        torch.save(WEIGHTS | {"lm_head.weight": _Bomb()}, path)
    else:
        path.write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(ModelLoadError, match=r"pytorch_model.bin' (holds more than tensors|is no)"):
        cl.load(folder)


# ── what is refused ──


def test_a_missing_tensor(copy):
    name = "transformer.h.3.attn.c_attn.bias"
    reweigh(copy, {one: tensor for one, tensor in WEIGHTS.items() if one != name})
    with pytest.raises(ModelLoadError, match=rf"1 \({name}\) missing, none left over"):
        cl.load(copy)


def test_a_surplus_tensor(copy):
    reweigh(copy, WEIGHTS | {"transformer.h.6.ln_1.weight": torch.ones(256)})
    with pytest.raises(
        ModelLoadError, match=r"none missing, 1 \(transformer.h.6.ln_1.weight\) left over"
    ):
        cl.load(copy)


@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.visual.proj"])
def test_another_shape(copy, name):
    reweigh(copy, WEIGHTS | {name: torch.ones(7, 9)})
    with pytest.raises(ModelLoadError, match=r"is \[\d, \d\], but its config.json needs \["):
        cl.load(copy)


def test_a_joint_projection_that_cannot_be_cut(copy):
    name = "transformer.visual.transformer.resblocks.0.attn.in_proj.weight"
    reweigh(copy, WEIGHTS | {name: torch.ones(73, 24)})
    with pytest.raises(ModelLoadError, match=r"has 73 rows, which are no queries, keys and values"):
        cl.load(copy)


def test_a_missing_shard(copy):
    (copy / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"lacks 1 of 3 weight files, such as model-00002-of"):
        cl.load(copy)


def test_a_broken_shard(copy):
    path = copy / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelLoadError, match=r"model-00002-of-00003.safetensors' is broken"):
        cl.load(copy)


def test_a_tensor_twice(copy):
    (copy / "model.safetensors.index.json").unlink()
    save_file({"lm_head.weight": WEIGHTS["lm_head.weight"]}, copy / "model-extra.safetensors")
    with pytest.raises(ModelLoadError, match=r"'lm_head.weight' is in .* and in another file"):
        cl.load(copy)


def test_an_index_that_leads_out_of_the_folder(copy):
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../../elsewhere.safetensors"}}))
    with pytest.raises(ModelLoadError, match=r"lacks 1 of 1 weight files, such as elsewhere"):
        cl.load(copy)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen.tiktoken", "no '.*qwen.tiktoken', from which the tokenizer is made"),
        ("generation_config.json", "generation_config.json' cannot be read"),
        ("weights", "has no weights"),
    ],
)
def test_a_missing_file(copy, name, message):
    for path in copy.glob("model*") if name == "weights" else [copy / name]:
        path.unlink()
    with pytest.raises(ModelLoadError, match=message):
        cl.load(copy)


def test_a_vocabulary_of_another_model(copy):
    lines = (copy / "qwen.tiktoken").read_text().splitlines()
    (copy / "qwen.tiktoken").write_text("\n".join(lines[:-5]))
    with pytest.raises(ModelLoadError, match=r"gives <imgpad> the id \d+, but config.json means"):
        cl.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": {"bits": 4}}, "quantised .*Int4.*not supported"),
        ({"rotary_pct": 0.25}, "rotary_pct is 0.25, but every published"),
        ({"no_bias": False}, "no_bias is False"),
    ],
)
def test_other_configurations(copy, change, message):
    (copy / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(ModelLoadError, match=message):
        cl.load(copy)


def test_qwen_without_eyes(copy):
    """Qwen-7B has the same model_type; it is no vision-language model, and its code is not run."""
    config = {name: value for name, value in CONFIG.items() if name != "visual"}
    (copy / "config.json").write_text(json.dumps(config))
    assert not is_official(config)
    with pytest.raises(ModelLoadError, match="could not be loaded"):
        cl.load(copy)
    with pytest.raises(ModelLoadError, match="is no published Qwen-VL"):
        convert(copy, copy / "native")


# ── by name ──


@pytest.mark.parametrize("name", ["Qwen/Qwen-VL", "Qwen/Qwen-VL-Chat"])
def test_a_name_without_its_files(name, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ModelLoadError,
        match=rf"'{name}' is published with Python code.*never run.*hf download {name} --exclude",
    ):
        cl.load(name)


def test_a_name_with_its_files(monkeypatch, tmp_path, wanted):
    """A download in the Hub's cache is found by the name."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "f57cfbd358cb56b710d963669ad1bcfb44cdcdd8"
    home = tmp_path / "models--Qwen--Qwen-VL"
    publish(home / "snapshots" / commit, kind="bin", weights=WEIGHTS)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    lens = cl.load("Qwen/Qwen-VL")
    assert lens.name == "Qwen/Qwen-VL"
    assert torch.equal(logits_of(lens), wanted)
    assert torch.equal(logits_of(cl.load("Qwen/Qwen-VL", revision=commit)), wanted)
    with pytest.raises(ModelLoadError, match="not on this machine"):
        cl.load("Qwen/Qwen-VL", revision="0" * 40)


def test_other_names_are_left_alone():
    assert published_folder("toy-llava") is None
    assert published_folder("nobody/nothing") is None
    assert published_folder("no such/na me") is None
