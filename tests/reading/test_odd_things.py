"""What a public function is given is looked at before it is used, whichever function it is."""

import inspect

import numpy as np
import pytest
import torch
from tiny_models import QUESTIONS, lens_of, picture

import clva_lens as cl
from clva_lens.benchmarks.base import Score
from clva_lens.ground.errors import ClvaLensError
from clva_lens.methods.sae import SparseAutoencoder

pytestmark = pytest.mark.usefixtures("untyped")

ODD = [5, None, "nonsense", [], {}, object(), float("nan"), torch.zeros(()), np.zeros(2)]
# These take any word or nothing, make a thing of their own, or are decorators.
ELSEWHERE = {"compose", "intervene", "observe", "new_record", "register_method"}


def lens():
    return lens_of("full", "sdpa")


def prompt(number=0):
    return lens().prompt(picture(number), QUESTIONS[0])


def score():
    return Score({}, [])  # nothing of it is read before both are known to be scores


def autoencoder():
    width = lens().hf_model.config.get_text_config().hidden_size
    return SparseAutoencoder(
        W_enc=torch.zeros(width, 2),
        W_dec=torch.eye(width)[:2],
        b_enc=torch.zeros(2),
        b_dec=torch.zeros(width),
        layer=4,
    )


def trace():
    return cl.trace_attention(lens(), prompt())


def valid():
    """Return arguments of which every one is looked at, by function."""
    model, one, other = lens(), prompt(), prompt(1)
    mask = np.zeros((32, 32), dtype=bool)
    ones = torch.ones(4, dtype=torch.bool)
    reading = dict.fromkeys(
        [
            "caption_attention",
            "composed_saliency",
            "direct_logit_attribution",
            "explore",
            "generate",
            "image_map",
            "logit_lens",
            "modality_parts",
            "scan",
            "trace_attention",
        ],
        (model, one),
    )
    pair = dict.fromkeys(
        ["attribution_patching", "edge_attribution", "patch_activations"], (model, one, other)
    )
    several = dict.fromkeys(
        ["head_means", "text_centric_heads", "trace_statistics"], (model, [one])
    )
    return {
        **reading,
        **pair,
        **several,
        "attention_drift": (trace(),),
        "classify_heads": (trace().intensity,),
        "compare": (score(), score()),
        "evaluate": (model, "pope/toy/random"),
        "intervening": (model, "clva"),
        "load": ("toy-llava",),
        "observing": (model,),
        "open_record": ("03_drift",),
        "overlay": (one, trace().saliency()[:1]),
        "patch_mask": (model, mask),
        "pointing_game": (trace().saliency(), ones),
        "probe": (model, [one, other], [0, 1]),
        "read": (model, picture(0)),
        "sae_features": (model, one, autoencoder()),
        "score": ("folder",),
        "steering_vector": (model, [(one, other)]),
        "to_transformer_lens": (model,),
        "vti": (model, [(picture(0), "a cup", "a car")]),
    }


def test_every_public_function_is_tried():
    functions = {name for name in cl.__all__ if inspect.isfunction(getattr(cl, name))}
    assert functions - ELSEWHERE == set(valid())


def allowed(name, place, odd):
    """Whether something odd is not: None that stands for a default, and what is open to all."""
    if name == "classify_heads":
        return isinstance(odd, torch.Tensor)
    usual = list(inspect.signature(getattr(cl, name)).parameters.values())[place].default
    return odd is None and (usual is None or (name, place) in {("intervening", 1), ("read", 1)})


def called(name, given):
    """Call a function; a context is entered."""
    found = getattr(cl, name)(*given)
    if hasattr(found, "__enter__"):
        with found:
            pass


CASES = [(name, place) for name, given in valid().items() for place in range(len(given))]


@pytest.mark.parametrize(("name", "place"), CASES, ids=[f"{name}-{at}" for name, at in CASES])
def test_it_is_refused_in_words_of_our_own(name, place):
    """Or, as a method's name is, by what is known."""
    given = list(valid()[name])
    for odd in ODD:
        if allowed(name, place, odd):
            continue
        given[place] = odd
        with pytest.raises(ClvaLensError) as refused:
            called(name, given)
        assert len(str(refused.value)) > 20, odd
