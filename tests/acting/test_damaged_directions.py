"""Directions and autoencoders from files: what is damaged, or of two, is refused in words."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import QUESTIONS, lens_of, picture

import clva_lens as cl
from clva_lens.ground.errors import ParameterError
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
