"""Law 1, and the laws that every registered method has to keep, whatever it does.

They hold wherever a method can act: in LLaVA's decoder, in a Q-Former, and in the decoder behind
one.
"""

from dataclasses import fields, replace

import pytest
import torch
from test_state import state
from tiny_models import HEADS, KERNELS, SITES, blip_of, lens_of

import clva_lens as cl
from clva_lens.engine.session import Session
from clva_lens.methods.base import METHODS, Method
from clva_lens.methods.target import Target

STEPS = 3
PLACES = [("llava", heads, kernel, "decoder") for heads in HEADS for kernel in KERNELS]
PLACES += [("instructblip", "grouped", kernel, site) for kernel in KERNELS for site in SITES]
# Parameters under which a method does something on 16 image tokens.
STRONG = {
    "clva": {"tau": 1.0},
    "clearsight": {"enhance": 1.5, "variant": "paper"},
    "memvr": {"ratio": 0.5, "gamma": 0.5},
    "m3id": {"decay": 1.0, "variant": "avisc"},
    "vista": {"strength": 0.5},
}
# Methods that refuse models whose image tokens lie on no part of the picture, where they say so.
PLACED = {"ed", "vicrop"}
# Methods whose laws are asked in a few places, since they stand on the parts of those before them.
LATER = {"agla", "ascd", "dlc", "ed", "head-guided", "m3id", "post-hoc-debias"}
LATER |= {"sid", "vdd", "vicrop", "vista"}
# Methods that edit FFNs, and by how much those are scaled for them.
FED = {"memvr": 8.0, "vista": 8.0}


def logits(lens, inputs, *methods):
    with torch.inference_mode(), cl.intervening(lens, *methods):
        return lens.hf_model(**inputs).logits


def decode(lens, inputs, method, **options):
    with torch.inference_mode(), cl.intervening(lens, method):
        out = lens.hf_model.generate(
            **inputs,
            max_new_tokens=STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
    return torch.stack(out.logits, dim=1)


@pytest.fixture(scope="module", params=PLACES, ids="-".join)
def place(request):
    return request.param


@pytest.fixture
def lens(place, request):
    family, heads, kernel, _ = place
    fed = FED.get(request.node.callspec.params.get("name"), 1)
    return lens_of(heads, kernel, fed) if family == "llava" else blip_of(kernel, "llama", fed)


@pytest.fixture
def site(place):
    return place[-1]


@pytest.fixture
def clva(site):
    return cl.CLVA(tau=1.0, site=site)


BARE = {}


@pytest.fixture
def bare(lens, ask):
    """The logits of the model as transformers runs it, once a model."""
    if lens.hf_model not in BARE:
        with torch.inference_mode():
            BARE[lens.hf_model] = lens.hf_model(**ask(lens, 3).inputs).logits
    return BARE[lens.hf_model]


@pytest.mark.parametrize(
    "methods",
    [
        (),
        (cl.compose(),),
        (cl.compose(cl.compose()), cl.compose()),
        (cl.CLVA(alpha=0, beta=0),),
        (cl.KnockOut(layers=()),),
        (cl.CLVA(layers=()),),
    ],
    ids=["none", "identity", "nested identity", "strength 0", "knock-out nowhere", "CLVA nowhere"],
)
def test_no_effect_is_bit_identical(lens, ask, site, bare, methods):
    sited = [replace(m, site=site) if hasattr(m, "site") else m for m in methods]
    assert torch.equal(logits(lens, ask(lens, 3).inputs, *sited), bare)


def test_observing_is_bit_identical(lens, ask, site, bare):
    with torch.inference_mode(), cl.observing(lens.hf_model, site=site):
        assert torch.equal(lens.hf_model(**ask(lens, 3).inputs).logits, bare)


def test_composing_with_the_identity(lens, ask, clva, bare):
    inputs = ask(lens, 3).inputs
    edited = logits(lens, inputs, clva)
    assert float((edited - bare).abs().max()) > 0.05
    for composed in (
        cl.compose(clva),
        cl.compose(clva, cl.compose()),
        cl.compose(cl.compose(), clva),
        cl.compose(clva, replace(clva, alpha=0, beta=0)),
    ):
        assert torch.equal(logits(lens, inputs, composed), edited)


def test_composing_is_opening_one_after_the_other(lens, ask, site, clva):
    inputs = ask(lens, 3).inputs
    rows = "text" if site == "qformer" else "last"
    other = cl.KnockOut(layers=(2, 8), rows=rows, site=site)
    composed = logits(lens, inputs, cl.compose(clva, other))
    assert torch.equal(logits(lens, inputs, clva, other), composed)
    with cl.intervening(lens.hf_model, clva):
        assert torch.equal(logits(lens, inputs, other), composed)
    # Order counts: the knock-out at layer 2 is there before the anchors are read either way, but
    # an edit at an anchor layer is seen only by the methods after it.
    at_anchor = cl.KnockOut(layers=(4,), rows=rows, site=site)
    before = logits(lens, inputs, at_anchor, clva)
    after = logits(lens, inputs, clva, at_anchor)
    assert float((before - after).abs().max()) > 1e-3


def test_bare_generation_is_bit_identical(lens, ask, site):
    inputs = ask(lens, 3).inputs
    options = {"max_new_tokens": STEPS, "do_sample": False, "output_logits": True}
    with torch.inference_mode():
        out = lens.hf_model.generate(**inputs, **options, return_dict_in_generate=True)
    wanted = torch.stack(out.logits, dim=1)
    for method in (cl.compose(), cl.CLVA(alpha=0, beta=0, site=site)):
        assert torch.equal(decode(lens, inputs, method), wanted)


# ── every registered method ──


def acts_at(name, site):
    """Whether a method acts on any pass there; a beam search of its own does not (test_opera)."""
    sites = METHODS.get(name).sites
    if "greedy" not in METHODS.get(name).decodings:
        return False
    return site in sites or (not sites and site == "decoder")


def asked_at(place, name):
    """Whether the laws of a method are asked there; of contrasts in every second place only.

    What a kernel or grouped heads change is not theirs: their second inputs go through the same
    sessions as those of VCD and IMCCD, which are asked everywhere.
    """
    if not acts_at(name, place[-1]) or (name in PLACED and place[0] != "llava"):
        return False
    return name not in LATER or place in (PLACES[0], PLACES[-1], PLACES[3])


PAIRS = [(place, name) for place in PLACES for name in METHODS.names() if asked_at(place, name)]
every_method = pytest.mark.parametrize(
    ("place", "name"),
    PAIRS,
    indirect=["place"],
    ids=["-".join((*place, name)) for place, name in PAIRS],
)


def make(name, site, **parameters):
    """Return a registered method at a site; some have one only, or none."""
    kind = METHODS.get(name)
    has_site = "site" in {field.name for field in fields(kind)}
    return kind(**parameters, **({"site": site} if has_site else {}))


@pytest.fixture
def method(name, site):
    return make(name, site, **STRONG.get(name, {}))


@every_method
def test_method_moves_the_logits(lens, ask, bare, name, method):
    """Without this the laws below would hold for a method that does nothing."""
    change = (logits(lens, ask(lens, 3).inputs, method) - bare).abs()
    moved = float(change[change.isfinite()].max())  # tokens that are cut off are at −∞
    print(f"{name}: effect {moved:.3f}")
    assert moved > 0.05


@every_method
def test_zero_strength(lens, ask, site, bare, name):
    off = METHODS.get(name).zero
    if off is None:
        pytest.skip(f"{name} has no strength; un-skip when it gets one, by writing it as its zero")
    zero = make(name, site, **off)
    assert torch.equal(logits(lens, ask(lens, 3).inputs, zero), bare)


@every_method
def test_batch_is_singles(lens, ask, method):
    together = logits(lens, ask(lens, 3).inputs, method)[:, -1]
    for item in range(3):
        alone = logits(lens, ask(lens, first=item).inputs, method)[0, -1]
        torch.testing.assert_close(together[item], alone, rtol=0, atol=1e-4)


@every_method
def test_cached_is_uncached(lens, ask, method):
    inputs = ask(lens, 2).inputs
    cached = decode(lens, inputs, method)
    uncached = decode(lens, inputs, method, use_cache=False)
    torch.testing.assert_close(cached, uncached, rtol=0, atol=1e-4)


@every_method
def test_state_is_restored(lens, ask, method):
    before = state(lens.hf_model)
    decode(lens, ask(lens).inputs, method)
    assert state(lens.hf_model) == before


@every_method
def test_a_method_has_fresh_sessions(lens, site, name, method):
    """Nothing of one run is in the next: a method makes new sessions each time."""
    first, second = (method.sessions(Target(lens.hf_model, lens.processor)) for _ in range(2))
    assert method.name == name
    assert first
    assert all(isinstance(session, Session) for session in first)
    if method.sites:
        assert all(session.site == site for session in first)
    assert not {id(session) for session in first} & {id(session) for session in second}


@every_method
def test_a_method_is_frozen(name, method):
    assert isinstance(method, Method)
    field = next(iter(vars(method)))
    with pytest.raises(AttributeError, match=r"cannot assign"):
        setattr(method, field, 1)
    assert method == type(method)(**vars(method))


@pytest.mark.parametrize("name", METHODS.names())
def test_a_site_the_model_has_not(one, name):
    kind = METHODS.get(name)
    if "qformer" in kind.sites:
        with pytest.raises(cl.ClvaLensError, match=r"has no attention site 'qformer'"):
            kind(site="qformer").sessions(Target(one.hf_model))
    else:
        assert "site" not in {field.name for field in fields(kind)}


def test_layers_may_be_a_list_or_a_range():
    assert cl.CLVA(layers=[5, 6, 7]) == cl.CLVA(layers=range(5, 8)) == cl.CLVA(layers=(5, 6, 7))
    assert cl.KnockOut(layers=[9]) == cl.KnockOut(layers=range(9, 10))
