"""The command line: the demo from end to end, and errors that say what to do."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import clva_lens as cl
from clva_lens.__main__ import app
from clva_lens.experiments.demo import output_folder
from clva_lens.lens.load import DEVICE, DTYPE, load
from clva_lens.methods.base import METHODS
from clva_lens.toy.build import processor, untrained
from clva_lens.toy.scenes import render, sample_scenes

COCO = Path(__file__).parents[2] / "shared" / "data" / "coco_mini" / "images"
DRAWN = {
    f"{name}.{kind}"
    for name in ("drift", "head_intensity", "saliency")
    for kind in ("pdf", "png", "csv")
}


def run(*args):
    result = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "120"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def random_llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "random-llava"
    untrained(3).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.fromarray(render(sample_scenes(1, 0)[0])).resize((320, 200)).save(path)
    return path


def test_the_demo_draws_and_counts(tmp_path):
    out = tmp_path / "demo"
    result = run("demo", "--out", out, "--questions", 12)
    assert result.exit_code == 0
    files = {path.name for path in out.iterdir()}
    accuracy = {f"accuracy.{kind}" for kind in ("pdf", "png", "csv")}
    assert files == DRAWN | accuracy | {"answers.jsonl", "results.json"}
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 12 * 3 * 3  # questions × splits × conditions
    results = json.loads((out / "results.json").read_text())
    assert {(row["split"], row["method"]) for row in results} == {
        (s, m)
        for s in ("random", "popular", "adversarial")
        for m in ("greedy", "CLVA", "knock-out")
    }
    for row in results:
        assert {"accuracy", "yes_ratio", "auc", "unparsed"} <= row["metrics"].keys()
        assert row["record"]["packages"]["torch"] == torch.__version__
    for word in ("share of yes", "AUC", "knock-out", "same bias", "points at the object"):
        assert word in result.output


def test_a_folder_of_a_demo_is_its_own_to_replace(tmp_path):
    for number in range(2):
        with output_folder(tmp_path / "demo") as folder:
            (folder / "results.json").write_text(f"{number}")
    assert [path.read_text() for path in (tmp_path / "demo").iterdir()] == ["1"]
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_the_demo_of_a_qformer_draws_both_sites(tmp_path):
    out = tmp_path / "demo"
    result = run("demo", "--model", "toy-instructblip", "--out", out, "--questions", 12)
    assert result.exit_code == 0, result.output
    composed = {f"composed.{kind}" for kind in ("pdf", "png", "csv")}
    assert composed | DRAWN <= {path.name for path in out.iterdir()}
    results = json.loads((out / "results.json").read_text())
    assert {row["method"] for row in results} == {"greedy", "CLVA", "CLVA, decoder", "knock-out"}
    assert "6 layers of the qformer, 6 layers of the decoder" in " ".join(result.output.split())


def test_the_demo_takes_a_picture_and_a_model(tmp_path, random_llava, photo):
    out = tmp_path / "mine"
    asked = ("--image", photo, "--question", "Is there a cup in the image?")
    result = run("demo", *asked, "--model", random_llava, "--out", out)
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == DRAWN | {"results.json"}
    answers = json.loads((out / "results.json").read_text())["answers"]
    assert set(answers) == {"greedy", "CLVA", "knock-out"}
    assert len({answer["margin"] for answer in answers.values()}) == 3


@pytest.mark.skipif(
    not COCO.is_dir(), reason="un-skip where the COCO pictures lie beside the project"
)
def test_the_demo_takes_a_coco_photograph(tmp_path, random_llava):
    picture = sorted(COCO.glob("*.jpg"))[0]
    asked = ("--image", picture, "--question", "Is there a person in the image?")
    result = run("demo", *asked, "--model", random_llava, "--out", tmp_path / "coco")
    assert result.exit_code == 0, result.output


def test_an_error_is_one_sentence_and_a_remedy_and_leaves_nothing(tmp_path, photo):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(photo.read_bytes()[: photo.stat().st_size // 2])
    text = tmp_path / "notes.jpg"
    text.write_text("not a picture")
    out = tmp_path / "out"
    ask = ("--question", "Is there a cup in the image?", "--out", out)
    for args, words in (
        (("--image", tmp_path / "none.jpg", *ask), "there is no image file"),
        (("--image", broken, *ask), "broken or truncated"),
        (("--image", text, *ask), "not an image that Pillow can read"),
        (("--image", photo, "--question", " ", "--out", out), "Pass a question that is not empty"),
        (("--image", photo, "--out", out), "--image was given without --question"),
        (
            ("--model", "toy-lava", "--out", out, "--image", photo, *ask),
            "no toy (known: toy-instructblip",
        ),
        (("--model", tmp_path, "--out", out, "--image", photo, *ask), "has no config.json"),
    ):
        result = run("demo", *args)
        assert result.exit_code == 1
        assert words in " ".join(result.stderr.split()), result.stderr
        assert "Traceback" not in result.output + result.stderr
        assert not out.exists()
        assert not out.with_name("out.part").exists()


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter.txt").write_text("the only copy")
    result = run("demo", "--out", precious, "--questions", 12)
    assert result.exit_code == 1
    assert "left alone" in " ".join(result.stderr.split())
    assert [path.name for path in precious.iterdir()] == ["chapter.txt"]


def test_check_model_says_what_it_checked(random_llava):
    result = run("check-model", random_llava)
    assert result.exit_code == 0
    shown = " ".join(result.stdout.split())
    for fact in (
        "LlavaForConditionalGeneration, model type 'llava', family 'llava'",
        "site 'decoder': 12 layers, 8 heads, kernel 'sdpa'",
        "64 at positions",
        "grid at the decoder: 8 × 8",
        "check: rows of every layer sum to 1",
        "a picture is read once for its questions: yes",
        "clva: applies",
        "opera: applies",
    ):
        assert fact in shown, fact
    assert all(f" {name}: " in shown for name in cl.methods())


@pytest.mark.parametrize(
    "command",
    [
        ("check-model", "toy-llava"),
        ("demo", "--out", "never"),
        ("analyse", "03_drift"),
        ("run", "--benchmark", "pope/toy/random", "--out", "never"),
        ("bench", "--quick"),
        ("toy", "train", "--folder", "never"),
    ],
    ids=lambda one: one[0],
)
def test_a_device_that_is_not_there_is_said_before_anything_is_loaded(
    monkeypatch, tmp_path, command
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("clva_lens.lens.load.read_named", lambda *given: 1 / 0)
    result = run(*command, "--device", "cuda:99")
    assert result.exit_code == 1
    assert "the device 'cuda:99' cannot be used here" in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_device_and_dtype_reach_the_model(random_llava):
    result = run("check-model", random_llava, "--device", "cpu", "--dtype", "bfloat16")
    assert result.exit_code == 0
    assert "bfloat16" in result.output


def test_environment_variables_stand_for_device_and_dtype(monkeypatch, random_llava):
    monkeypatch.setenv(DTYPE, "bfloat16")
    monkeypatch.setenv(DEVICE, "cpu")
    assert load(random_llava, check=False).hf_model.dtype == torch.bfloat16
    assert load(random_llava, check=False, dtype="float32").hf_model.dtype == torch.float32


def test_methods_are_listed():
    shown = CliRunner().invoke(app, ["methods"], env={"COLUMNS": "300"}).output.splitlines()
    for name in cl.methods():
        row = next(i for i, line in enumerate(shown) if line.split(" ")[0] == name)
        method = METHODS.get(name)
        assert method.paper in shown[row]
        for fact in (method.kernel, f"{method.forwards:g}", *method.sites):
            assert fact in shown[row + 1]
        for decoding in method.decodings:
            assert f"{decoding} (ours)" * (decoding in method.extended) in shown[row + 2]
            assert decoding in shown[row + 2]
        for field in fields(method):  # pyright: ignore[reportArgumentType]
            assert field.name in shown[row + 3]
    narrow = CliRunner().invoke(app, ["methods"], env={"COLUMNS": "60"}).output
    assert all(name in narrow for name in cl.methods())
    for parameter in ("alpha=14.0", "beta=0.9", "site=None", "mode='zero'"):
        assert parameter in narrow


def test_help_names_every_command():
    shown = run("--help").output
    for command in ("demo", "bench", "methods", "check-model", "toy"):
        assert command in shown
