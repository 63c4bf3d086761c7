"""Directions and autoencoders from files: what is damaged, or of two, is refused in words."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import QUESTIONS, lens_of, picture

import clva_lens as cl
from clva_lens.ground.errors import ModelLoadError, ParameterError
from clva_lens.lens.explorer.explored import Explored
from clva_lens.methods.sae import SETTINGS, SetFeatures, SparseAutoencoder
from clva_lens.methods.steering_vector import FORMAT

pytestmark = pytest.mark.usefixtures("untyped")
GOOD = {"layers": [1, 2], "part": "resid_post", "stack": "decoder", "record": {}}


def read(folder, told, values=None):
    path = folder / "vector.safetensors"
    tensors = {"values": torch.ones(2, 8) if values is None else values}
    save_file(tensors, path, metadata={"clva_lens": json.dumps(told)})
    return cl.SteeringVector.load(path)


@pytest.mark.parametrize("key", GOOD)
@pytest.mark.parametrize("bad", [None, 7, "x", [1.5, 2.5], [5, 5], [-1, 6], ["a", "b"]])
def test_a_damaged_vector_is_refused(tmp_path, key, bad):
    assert read(tmp_path, {"format": FORMAT, **GOOD}).layers == (1, 2)
    with pytest.raises(ParameterError):
        read(tmp_path, {"format": FORMAT, **GOOD, key: bad})
    without = {name: one for name, one in GOOD.items() if name != key}
    with pytest.raises(ParameterError, match="no steering vector"):
        read(tmp_path, {"format": FORMAT, **without})


def test_other_metadata_and_values(tmp_path):
    for told in ([], None, 3, "text"):
        with pytest.raises(ParameterError, match="no steering vector"):
            read(tmp_path, told)
    with pytest.raises(ParameterError, match="int32"):
        read(tmp_path, {"format": FORMAT, **GOOD}, torch.ones(2, 8, dtype=torch.int32))
    whole = read(tmp_path, {"format": FORMAT, **GOOD})
    with pytest.raises(ParameterError, match="is a folder"):
        whole.save(tmp_path)
    assert not list(tmp_path.parent.glob("*.part"))
    for seed in (1.5, "a"):
        with pytest.raises(ParameterError, match="seed must be an integer"):
            whole.random(seed)


@pytest.mark.parametrize(
    ("values", "layers", "match"),
    [
        (torch.ones(2, 8), (6, 6), "each once"),
        (torch.ones(1, 8), (-1,), "from 0"),
        (torch.ones(0, 8), (), "one or more"),
        (torch.ones(1, 8), (1.5,), "layers must be"),
        (torch.ones(1, 8, device="meta"), (1,), "on meta"),
        (torch.ones(1, 8).numpy(), (1,), "values must be"),
    ],
)
def test_a_vector_has_a_direction_for_each_layer(values, layers, match):
    with pytest.raises(ParameterError, match=match):
        cl.SteeringVector(values, layers)


def autoencoder(**given):
    weight = torch.linspace(-1, 1, 32).reshape(8, 4)
    usual = {"W_enc": weight, "W_dec": weight.T.contiguous(), "b_enc": torch.zeros(4)}
    return SparseAutoencoder(**{**usual, "b_dec": torch.zeros(8), "layer": 1, **given})


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"W_enc": torch.full((8, 4), torch.nan)}, "W_enc has values that are not finite"),
        ({"kind": "topk", "k": 0}, "k is 0"),
        ({"kind": "topk", "k": 5}, "k is 5"),
        ({"kind": "topk", "k": 1.5}, "k must be"),
        ({"kind": "jumprelu", "threshold": torch.zeros(3)}, "threshold is"),
        ({"kind": "jumprelu", "threshold": torch.full((4,), torch.nan)}, "threshold has"),
        ({"layer": "1"}, "layer must be an integer"),
        ({"b_dec": None}, "b_dec must be"),
    ],
)
def test_an_autoencoder_is_whole(given, match):
    with pytest.raises(ParameterError, match=match):
        autoencoder(**given)


@pytest.mark.parametrize("features", [{1.5: 1.0}, {"1": 1.0}, {True: 1.0}, {1: "a"}, {1: None}])
def test_features_are_numbers_of_numbers(features):
    """1.5 set feature 1, without a word."""
    with pytest.raises(ParameterError, match="feature"):
        SetFeatures(sae=autoencoder(), features=features)


@pytest.mark.parametrize(
    ("told", "match"),
    [
        ([], "holds no settings"),
        (None, "holds no settings"),
        ({"metadata": [1]}, "holds no settings"),
        ({"d_sae": 9}, "not of one autoencoder"),
        ({"d_in": 7}, "not of one autoencoder"),
        ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input must be"),
    ],
)
def test_settings_of_another_autoencoder(tmp_path, told, match):
    folder = autoencoder().save(tmp_path)
    good = json.loads((folder / SETTINGS).read_text())
    assert SparseAutoencoder.load(folder).kind == "standard"
    told = {**good, **told} if isinstance(told, dict) else told
    (folder / SETTINGS).write_text(json.dumps(told))
    with pytest.raises(ParameterError, match=match):
        SparseAutoencoder.load(folder)
    assert "W_enc" in load_file(folder / "sae_weights.safetensors")


def test_one_row_has_no_variance_to_explain():
    lens = lens_of("full", "sdpa")
    width = lens.config.text_config.hidden_size
    eye = torch.eye(width)
    sae = SparseAutoencoder(eye, eye, torch.zeros(width), torch.zeros(width), layer=1)
    asked = lens.prompt(picture(0), QUESTIONS[0])
    found = cl.sae_features(lens, asked, sae, span="last")
    assert found.explained != found.explained
    assert "no variance" in repr(found)
    on_image = cl.sae_features(lens, asked, sae)
    for features in ([width], [-1], [1.5], []):
        with pytest.raises(ParameterError, match="features are"):
            on_image.draw(features)


def test_what_is_no_path_and_no_model_is_said(tmp_path):
    """It was another library's AttributeError or TypeError, or passed without a word."""
    read(tmp_path, {"format": FORMAT, **GOOD})
    path = tmp_path / "vector.safetensors"
    for model in ("text", 5, torch.nn.Linear(2, 2)):
        with pytest.raises(ModelLoadError):
            cl.SteeringVector.load(path, model)
    assert cl.SteeringVector.load(path, lens_of("full", "sdpa")).layers == (1, 2)
    assert cl.SteeringVector.load(path, lens_of("full", "sdpa").hf_model).layers == (1, 2)
    for opened in (cl.SteeringVector.load, SparseAutoencoder.load, Explored.load, cl.score):
        for wrong in (None, 5, [path]):
            with pytest.raises(ParameterError, match=r"(path|folder) must be"):
                opened(wrong)


def test_an_autoencoder_of_another_model_is_told(tmp_path):
    """Its features at a model of the same width would be numbers without a meaning."""
    lens, eye = lens_of("full", "sdpa"), torch.eye(32)
    sae = SparseAutoencoder(eye, eye, torch.zeros(32), torch.zeros(32), layer=3)
    folder, prompt = sae.save(tmp_path / "sae"), lens.prompt(picture(0), QUESTIONS[0])
    quiet = SparseAutoencoder.load(folder)
    cl.sae_features(lens, prompt, quiet)
    names = lens.name, "somebody/" + lens.name.upper()
    for name in (*names, "gpt2-small"):
        told = json.loads((folder / SETTINGS).read_text())
        told["metadata"]["model_name"] = name
        (folder / SETTINGS).write_text(json.dumps(told))
        loud = SparseAutoencoder.load(folder)
        assert SparseAutoencoder.load(loud.save(tmp_path / "again")).record["model_name"] == name
        if name in names:
            read_at = cl.sae_features(lens, prompt, loud)
        else:
            with pytest.warns(UserWarning, match="say that it is of 'gpt2-small', but this model"):
                read_at = cl.sae_features(lens, prompt, loud)
        assert torch.equal(read_at.values, cl.sae_features(lens, prompt, quiet).values)
