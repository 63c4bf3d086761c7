"""Checkpoints that are not whole, lead elsewhere or are broken are refused in words."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import clva_lens as cl
from clva_lens.__main__ import app
from clva_lens.ground.errors import ClvaLensError, ModelCheckError, ModelLoadError, ParameterError
from clva_lens.lens.provenance import identity
from clva_lens.toy import pretrained

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DOWN = "layers.5.mlp.down_proj"


@pytest.fixture
def folder(tmp_path) -> Path:
    target = tmp_path / "model"
    shutil.copytree(pretrained.FOLDER / "toy-llava", target)
    return target


def rewrite(folder: Path, change) -> None:
    """Change the tensors of a folder: ``change(tensors, name)`` of one layer's weight."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors, next(one for one in tensors if DOWN in one))
    save_file(tensors, file, metadata={"format": "pt"})


def configure(folder: Path, file: str = "config.json", **values) -> None:
    found = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(found | values))


def put(tensors, name, value):
    tensors[name] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, n: t.pop(n), rf"1 of the weights are missing: .*{DOWN}"),
        (lambda t, n: t.clear() or put(t, "x", torch.ones(1)), "of the weights are missing"),
        (lambda t, n: put(t, n + "_two", t[n].clone()), rf"in no part of the model: .*{DOWN}"),
        (lambda t, n: put(t, n, t[n][:-1].clone()), DOWN),
        (lambda t, n: put(t, n, t[n].to(torch.int32)), rf"whole numbers.*{DOWN}"),
        (lambda t, n: t[n].view(-1)[3:4].fill_(float("nan")), rf"hold NaN.*{DOWN}"),
        (lambda t, n: t[n].view(-1)[3:4].fill_(-float("inf")), rf"hold NaN.*{DOWN}"),
    ],
    ids=["missing", "none", "unexpected", "mismatched", "integers", "nan", "inf"],
)
def test_weights_that_are_not_the_models(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ModelLoadError, match=message):
        cl.load(folder)


def test_a_buffer_that_the_model_computes_may_be_left_over(folder):
    rewrite(folder, lambda t, n: put(t, "model.language_model.rotary_emb.inv_freq", torch.ones(4)))
    cl.load(folder, check=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: configure(f, attn_implementation="someone/kernel"), "kernel 'someone/kernel'"),
        (lambda f: configure(f, text_config={"_attn_implementation": "a/b"}), "kernel 'a/b'"),
        (
            lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}'),
            "another model.*'a/b'",
        ),
        *(
            (
                lambda f, file=file: (f / "model.safetensors.index.json").write_text(
                    json.dumps({"metadata": {}, "weight_map": {"x": file}})
                ),
                "model.safetensors.index.json.*shards are .safetensors files beside it",
            )
            for file in ("../model.safetensors", "/x.safetensors", "model.bin", 3, ".safetensors")
        ),
    ],
)
def test_what_leads_elsewhere_is_refused_before_weights_are_read(
    folder, monkeypatch, change, message
):
    change(folder)
    monkeypatch.setattr(
        "clva_lens.lens.reading.AutoModelForImageTextToText.from_pretrained", lambda *a, **k: 1 / 0
    )
    with pytest.raises(ModelLoadError, match=message):
        cl.load(folder)


# ── the Hub's cache ──


@pytest.mark.parametrize("subfolder", ["", "inner"])
def test_a_snapshot_is_read_whole_and_recorded(folder, tmp_path, subfolder):
    """A cache as the Hub's library lays it out, whose main branch is another, broken commit."""
    repo = tmp_path / "cache" / "models--someone--toy"
    for commit in (COMMIT, "f" * 40):
        shutil.copytree(folder, repo / "snapshots" / commit / subfolder)
    for name in ("config.json", "processor_config.json", "tokenizer.json"):
        (repo / "snapshots" / ("f" * 40) / subfolder / name).unlink(missing_ok=True)
    if subfolder:  # what is not in the folder that is meant decides nothing
        elsewhere = repo / "snapshots" / COMMIT / "adapter_config.json"
        elsewhere.write_text('{"base_model_name_or_path": "someone/else"}')
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("f" * 40)
    (repo / "refs" / "v1").write_text(COMMIT)
    where = {"cache_dir": str(tmp_path / "cache"), "subfolder": subfolder}
    lens = cl.load("someone/toy", revision="v1", **where)
    assert identity(lens)["revision"] == COMMIT
    assert identity(lens)["probe"] == identity(cl.load(folder))["probe"]
    with pytest.raises(ModelLoadError, match="someone/toy"):
        cl.load("someone/toy", **where)


HUB = {"revision": "v1", "cache_dir": "here", "token": "hf_x", "subfolder": "inner"}


def test_what_is_meant_reaches_every_reader(folder, monkeypatch):
    """Whatever is fetched: weights, configuration, adapter, processor, tokenizer and template."""
    asked: dict[str, list[dict]] = {}

    def fetch(path_or_repo_id, filenames, **given):
        for file in filenames:
            asked.setdefault(file, []).append(given)
        return [str(folder / file) for file in filenames if (folder / file).is_file()] or None

    def listed(repository, **given):
        asked.setdefault("templates", []).append({**given, "subfolder": "inner"})
        return []

    monkeypatch.setattr("transformers.utils.hub.cached_files", fetch)
    for room in ("processing_utils", "tokenization_utils_base"):
        monkeypatch.setattr(f"transformers.{room}.list_repo_templates", listed)
    cl.load("someone/toy", **HUB, check=False)
    read = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"}
    assert asked.keys() >= read | {"adapter_config.json", "chat_template.jinja", "templates"}
    for file, calls in asked.items():
        for given in calls:
            assert {name: given.get(name) for name in HUB} == HUB, file


def test_a_folder_has_no_commit(folder):
    assert identity(cl.load(folder, check=False))["revision"] is None
    inner = folder.parent / "outer"
    shutil.copytree(folder, inner / "inner")
    assert cl.load(inner, subfolder="inner", check=False).num_layers == 12


# ── broken files ──

FILES = sorted(path.name for path in (pretrained.FOLDER / "toy-llava").glob("*.json"))
FILES.append("model.safetensors")
DAMAGE = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "list": lambda data: b"[1, 2]",
    "number": lambda data: b"3",
    "null": lambda data: b"null",
    "empty table": lambda data: b"{}",
    "no text": lambda data: b"\xff\xfe\x00",
}
VALUES = (None, -1, 0, "x", [], {}, 1.5)


def load_or_say(folder: Path) -> None:
    """Load a folder: it works, or one of our own errors says a sentence."""
    try:
        cl.load(folder)
    except ClvaLensError as error:
        assert len(str(error)) > 30
        assert str(error).rstrip().endswith((".", ")"))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.filterwarnings("ignore")
def test_a_broken_file_is_said(untyped, folder, file, damage):
    path = folder / file
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    load_or_say(folder)


CONFIG = json.loads((pretrained.FOLDER / "toy-llava" / "config.json").read_text())
FIELDS = [(None, key) for key in CONFIG]
FIELDS += [(part, key) for part in ("text_config", "vision_config") for key in CONFIG[part]]


@pytest.mark.parametrize("number", range(len(FIELDS)), ids=lambda number: str(FIELDS[number]))
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_value_in_the_configuration_is_said(untyped, folder, number):
    """One value a field, in turn."""
    (part, key), value = FIELDS[number], VALUES[number % len(VALUES)]
    whole = json.loads(json.dumps(CONFIG))
    (whole if part is None else whole[part])[key] = value
    (folder / "config.json").write_text(json.dumps(whole))
    load_or_say(folder)


@pytest.mark.filterwarnings("ignore")
def test_a_configuration_without_its_sizes_is_refused_before_it_fills_the_memory(folder):
    """Without its text configuration, a LLaVA is one of seven billion weights."""
    (folder / "config.json").write_text(json.dumps(CONFIG | {"text_config": None}))
    with pytest.raises(
        ModelLoadError, match=r"asks for 6,\d{3},\d{3},\d{3} weights, but the files"
    ):
        cl.load(folder)


def test_whatever_the_check_raises_is_said(folder, monkeypatch):
    monkeypatch.setattr("clva_lens.lens.check.check_family", lambda *given: {}["gone"])
    with pytest.raises(ModelCheckError, match=r"does not run: 'gone'"):
        cl.load(folder)


def absent(*shape, device):
    """Stands for ``torch.empty`` where there is no GPU, with the kinds of errors that it raises."""
    if isinstance(device, int) or str(device).startswith("cuda"):
        raise AssertionError("Torch not compiled with CUDA enabled")
    raise RuntimeError(f"Expected one of cpu, cuda, ... device type, but got {device}")


@pytest.mark.parametrize("device", ["cuda", "cuda:3", "nowhere", 7, {"": "cuda:3"}])
def test_a_device_that_is_not_there(monkeypatch, device):
    monkeypatch.setattr("clva_lens.lens.load.read_named", lambda *given: 1 / 0)
    monkeypatch.setattr("torch.empty", absent)
    with pytest.raises(ParameterError, match=r"cannot be used here.*device_map='cpu'"):
        cl.load("toy-llava", device_map=device)
    with pytest.raises(ParameterError, match=r"takes it as from_pretrained does.*device_map="):
        cl.load("toy-llava", device=device)
    if isinstance(device, str):
        said = CliRunner().invoke(app, ["check-model", "toy-llava", "--device", device])
        assert said.exit_code == 1
        assert f"the device '{device}' cannot be used here" in " ".join(said.stderr.split())


def test_a_toy_in_another_case_is_the_toy():
    assert cl.load("Toy-LLaVA", check=False).name == "toy-llava"
    with pytest.raises(ModelLoadError, match="Did you mean 'toy-llava'"):
        cl.load("toy-lava")
