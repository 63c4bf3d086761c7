"""VTI's directions are those of its formulas, and both steerings move answers."""

import numpy as np
import pytest
import torch
from tiny_models import QUESTIONS, lens_of, picture

import clva_lens as cl
from clva_lens.ground.errors import ParameterError
from clva_lens.lens.vti import mask, with_component

FED = 8.0
DEMOS = [(picture(i), "a cup", "a book") for i in range(3)]


def logits(lens, *methods):
    prompt = lens.prompt(picture(5), QUESTIONS[1])
    with torch.inference_mode(), cl.intervening(lens, *methods):
        return lens.hf_model(**prompt).logits[0, -1]


def test_the_text_direction_is_the_mean_and_a_unit_component():
    """Read from the model's own hidden states; numpy's eigenvectors for the component."""
    lens = lens_of("full", "sdpa", FED)
    method = cl.vti(lens, DEMOS, vision=0, question=QUESTIONS[0])
    (steer,) = method.methods
    assert (steer.part, steer.span, steer.keep_norm) == ("mlp_out", "all", True)
    assert steer.strength == pytest.approx(0.09)
    rows = []
    for image, *said in DEMOS:
        states = []
        for one in said:
            prompt = lens.prompt(image, QUESTIONS[0], answer=one)
            with torch.no_grad():
                out = lens.hf_model(**prompt, output_hidden_states=True)
            states.append(torch.stack([each[0, -1] for each in out.hidden_states[1:-1]]).double())
        rows.append((states[0] - states[1]).numpy())
    rows = np.stack(rows)
    # The last of transformers' states is normed: the vector is compared in the layers before it.
    values = steer.vector.values[:-1].double().numpy()
    rest = values - rows.mean(axis=0)
    assert 0.1 < np.linalg.norm(rest) <= 1 + 1e-4
    centred = (rows - rows.mean(axis=0)).reshape(3, -1)
    inside = np.linalg.lstsq(centred.T, rest.ravel(), rcond=None)
    left = np.linalg.norm(centred.T @ inside[0] - rest.ravel())
    print(f"outside of the differences' span: {left:.1e} of {np.linalg.norm(rest):.3f}")
    assert left < 1e-4


def test_the_component_by_hand():
    """Differences along one axis: (1, 0), (3, 0), (2, 0) have mean 2 and component (1, 0)."""
    rows = torch.tensor([[1.0, 0.5], [3.0, 0.5], [2.0, 0.5]]).double()
    assert with_component(rows).tolist() == pytest.approx([3.0, 0.5])
    assert with_component(-rows).tolist() == pytest.approx([-3.0, -0.5])
    assert with_component(rows[:1]).tolist() == [1.0, 0.5]


def test_a_masking():
    shown = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    found = mask(shown, 2, 0.75, np.random.default_rng(0))
    kept = (found == shown).all(axis=2)
    assert kept.sum() in (4, 5)  # one cell of four pixels; a pixel may have the mean's colour
    assert np.array_equal(mask(shown, 2, 0.0, np.random.default_rng(0)), shown)


def test_both_steerings_move_the_logits():
    lens = lens_of("full", "sdpa", FED)
    plain = logits(lens)
    for given in ({"vision": 0}, {"text": 0}, {}):
        method = cl.vti(lens, DEMOS, trials=2, question=QUESTIONS[0], **given)
        change = float((logits(lens, method) - plain).abs().max())
        print(given, change)
        assert change > 0.005
    assert torch.equal(logits(lens, cl.vti(lens, DEMOS, text=0, vision=0)), plain)


def test_refusals():
    lens = lens_of("full", "sdpa", FED)
    with pytest.raises(ParameterError, match=r"masked must be in \[0, 1\] and trials at least 1"):
        cl.vti(lens, DEMOS, trials=0)
    with pytest.raises(ParameterError, match=r"there is no demonstration"):
        cl.vti(lens, [])
