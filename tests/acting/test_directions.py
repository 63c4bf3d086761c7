"""Directions are those of their formulas, in float64 from transformers' own hidden states.

VTI's of the vision tower, principal components of pairs, and one direction for each of a tower's
tokens, whose steering is compared on logits with plain hooks that add each token's own.
"""

import numpy as np
import pytest
import torch
from tiny_models import QUESTIONS, double_of, lens_of, picture

import clva_lens as cl

FED = 8.0
DEMOS = [(picture(i), "a cup", "a book") for i in range(4)]
PAIRS = [(i, i + 4) for i in range(4)]


def tower_states(lens, shown):
    """[layer, token, width] after each layer of the tower, for one picture."""
    pixels = lens.prompt(shown, QUESTIONS[0]).inputs["pixel_values"].double()
    tower = double_of("full", FED).model.vision_tower
    with torch.no_grad():
        out = tower(pixel_values=pixels, output_hidden_states=True)
    return torch.stack([one[0] for one in out.hidden_states[1:]]).numpy()


def first_component(rows):
    """The eigenvector of the largest eigenvalue, by numpy, of rows as they are."""
    return np.linalg.eigh(rows.T @ rows)[1][:, -1]


def masked_by_hand(shown, cells, share, noise):
    """A share of a grid's cells in the picture's mean colour, pixel by pixel."""
    gone = set(noise.permutation(cells * cells)[: round(share * cells * cells)].tolist())
    mean = [round(float(shown[..., channel].mean())) for channel in range(3)]
    found = shown.copy()
    for y in range(shown.shape[0]):
        for x in range(shown.shape[1]):
            if (y * cells // shown.shape[0]) * cells + x * cells // shown.shape[1] in gone:
                found[y, x] = mean
    return found


def test_vtis_vision_direction():
    """Each token's mean over pictures of (mean of maskings − original), and its component."""
    lens = lens_of("full", "sdpa", FED)
    share, trials = 0.75, 3
    method = cl.vti(lens, DEMOS, text=0, masked=share, trials=trials, question=QUESTIONS[0], seed=5)
    (steer,) = method.methods
    assert (steer.stack, steer.part, steer.span) == ("vision", "mlp_out", "all")
    noise, differences = np.random.default_rng(5), []
    for shown, *_ in DEMOS:
        own = tower_states(lens, shown)
        several = [
            tower_states(lens, masked_by_hand(shown, 4, share, noise)) for _ in range(trials)
        ]
        differences.append(np.mean(several, axis=0) - own)
    rows = np.stack(differences)  # [demo, layer, token, width]
    mean = rows.mean(axis=0)
    wanted = mean.copy()
    for token in range(mean.shape[1]):
        centred = (rows - mean)[:, :, token].reshape(len(rows), -1)
        unit = first_component(centred).reshape(mean.shape[0], -1)
        wanted[:, token] += unit * np.sign((unit * mean[:, token]).sum())
    found = steer.vector.values.double().numpy()
    error, size = np.abs(found - wanted).max(), np.abs(wanted).max()
    print(f"vti: error {error:.1e} of {size:.2f}; the mean alone is {np.abs(mean).max():.2f}")
    assert found.shape == wanted.shape
    assert error < 1e-3
    assert np.abs(found - mean).max() > 100 * error


@pytest.mark.parametrize("how", ["mean", "pca"])
def test_directions_of_pairs(how):
    """The principal component is of the differences as they are, as long as their mean along it."""
    lens = lens_of("full", "sdpa", FED)
    asked = [tuple(lens.prompt(picture(i), QUESTIONS[1]) for i in pair) for pair in PAIRS]
    vector = cl.steering_vector(lens, asked, how, progress=False)
    rows = []
    for pair in asked:
        states = []
        for prompt in pair:
            given = {**prompt.inputs, "pixel_values": prompt.inputs["pixel_values"].double()}
            with torch.no_grad():
                out = double_of("full", FED)(**given, output_hidden_states=True)
            # The last of transformers' states is normed, so the last layer is left out.
            states.append(torch.stack([one[0, -1] for one in out.hidden_states[1:-1]]).numpy())
        rows.append(states[0] - states[1])
    rows = np.stack(rows)
    wanted = rows.mean(axis=0)
    if how == "pca":
        for layer in range(rows.shape[1]):
            unit = first_component(rows[:, layer])
            wanted[layer] = (rows[:, layer] @ unit).mean() * unit
    found = vector.values[:-1].double().numpy()
    error = np.abs(found - wanted).max()
    print(f"{how}: error {error:.1e} of {np.abs(wanted).max():.2f}")
    assert error < 1e-3 * np.abs(wanted).max()
    if how == "pca":
        assert np.abs(wanted - rows.mean(axis=0)).max() > 100 * error


def test_a_direction_for_each_token_of_the_tower():
    """The directions, and the logits of a model whose tokens each get their own."""
    lens = lens_of("full", "sdpa", FED)
    asked = [tuple(lens.prompt(picture(i), QUESTIONS[1]) for i in pair) for pair in PAIRS]
    vector = cl.steering_vector(lens, asked, stack="vision", positions="each", progress=False)
    wanted = np.mean(
        [tower_states(lens, picture(i)) - tower_states(lens, picture(j)) for i, j in PAIRS], axis=0
    )
    found = vector.values.double().numpy()
    assert found.shape == wanted.shape == (2, 17, 24)
    error = np.abs(found - wanted).max()
    assert error < 1e-4 * np.abs(wanted).max()
    assert np.abs(wanted - wanted.mean(axis=1, keepdims=True)).max() > 1000 * error
    prompt, strength = lens.prompt(picture(9), QUESTIONS[2]), 2.0
    model = double_of("full", FED)
    given = {**prompt.inputs, "pixel_values": prompt.inputs["pixel_values"].double()}

    def added(layer):
        more = strength * torch.from_numpy(wanted[layer])

        def hook(_, __, out):
            return (out[0] + more, *out[1:]) if isinstance(out, tuple) else out + more

        return hook

    layers = model.model.vision_tower.encoder.layers
    # Before the hooks by which the model itself reads its tower's layers.
    handles = [one.register_forward_hook(added(i), prepend=True) for i, one in enumerate(layers)]
    with torch.no_grad():
        reference = model(**given).logits[0, -1]
        for handle in handles:
            handle.remove()
        plain = model(**given).logits[0, -1]
        with cl.intervening(lens, cl.Steer(vector=vector, strength=strength)):
            steered = lens.hf_model(**prompt).logits[0, -1]
    error, effect = (float((one - reference).abs().max()) for one in (steered, plain))
    print(f"each token: error {error:.1e}, effect {effect:.2f}")
    assert error < 1e-3 < 0.05 < effect
