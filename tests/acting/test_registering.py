"""Methods are registered with what one has to know of them, those of a notebook too."""

import math
from dataclasses import dataclass, fields
from typing import ClassVar, get_args

import pytest
import reference
import torch
from rewrites import VisFlow

import clva_lens as cl
from clva_lens.methods.base import METHODS, BiasSession, Kernel, Method, row_bias


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_says_what_it_is(name):
    method = METHODS.get(name)
    assert vars(method)["name"] == name
    assert len(method.paper) > 10, f"{name} does not say where it comes from. Write its paper."
    assert method.kernel in get_args(Kernel)
    assert method.forwards >= 1
    assert set(method.sites) <= {"decoder", "qformer"}
    # Which site is asked only where there is a choice.
    known = {field.name for field in fields(method)}
    assert ("site" in known) == (len(method.sites) > 1), (
        f"{name} acts at {method.sites}. Give it a parameter site, or sites with the only one."
    )
    assert method.__doc__ is not None
    assert method() == method()  # every parameter has a default


@pytest.fixture
def forget():
    yield
    if "mine" in METHODS.names():
        METHODS.remove("mine")


def define(size: int, where: str = "notebook") -> type[Method]:
    """Run a notebook's cell that defines a method."""

    @dataclass(frozen=True)
    class Mine(Method):
        name: ClassVar[str] = "mine"
        strength: int = size

        def sessions(self, target):
            return []

    Mine.__module__ = where
    return Mine


def test_a_cell_can_be_run_again(forget):
    first = cl.register_method(define(1))
    assert METHODS.get("mine") is first
    assert "mine" in cl.methods()
    second = cl.register_method(define(2))
    assert METHODS.get("mine") is second


def test_a_name_has_one_owner(forget):
    first = cl.register_method(define(1))
    with pytest.raises(cl.ClvaLensError, match=r"method 'mine' is registered twice"):
        cl.register_method(define(1, "another"))
    assert METHODS.get("mine") is first


def test_what_cannot_be_registered(forget):
    class Loose(Method):
        name: ClassVar[str] = "mine"

        def sessions(self, target):
            return []

    @dataclass
    class Thawed(Loose):
        pass

    @dataclass(frozen=True)
    class Another(cl.CLVA):
        pass

    for method in (Loose, Thawed):
        with pytest.raises(cl.ClvaLensError, match=r"is no frozen dataclass.*Put @dataclass"):
            cl.register_method(method)
    with pytest.raises(cl.ClvaLensError, match=r"Another has no name of its own"):
        cl.register_method(Another)
    assert "mine" not in cl.methods()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"paper": None}, r"paper of Odd must be a text, but is None\. Write paper: ClassVar"),
        ({"kernel": "flash"}, r"kernel of Odd has 'flash', which must be one of none, fused"),
        ({"forwards": "2"}, r"forwards of Odd must be a number"),
        ({"sites": "decoder"}, r"sites of Odd must be a tuple of names, but is 'decoder'"),
        ({"sites": ("vision",)}, r"sites of Odd has 'vision'.*decoder, qformer"),
        ({"extended": ("nucleus",)}, r"extended of Odd has 'nucleus'.*greedy, beam, sampling"),
        ({"zero": {"alpha": 0}}, r"zero of Odd has 'alpha', which must be one of strength"),
        ({"zero": 0}, r"zero of Odd must be a dictionary of parameters, or None"),
    ],
)
def test_what_a_method_says_of_itself_is_checked(forget, said, message):
    class Odd(Method):
        name = "mine"
        strength: int = 1

        def sessions(self, target):
            return []

    for name, value in said.items():
        setattr(Odd, name, value)
    with pytest.raises(cl.ClvaLensError, match=message):
        cl.register_method(dataclass(frozen=True)(Odd))
    assert "mine" not in cl.methods()


def test_parameters_have_defaults(forget):
    @dataclass(frozen=True)
    class Bare(Method):
        name: ClassVar[str] = "mine"
        strength: int

        def sessions(self, target):
            return []

    with pytest.raises(cl.ClvaLensError, match=r"without a default: strength\. Give each one"):
        cl.register_method(Bare)


@dataclass(frozen=True)
class Even(Method):
    """As the README's: all image tokens × gain, in the last row and generated ones."""

    name: ClassVar[str] = "mine"
    gain: float = 3.0

    def sessions(self, target):
        return [BiasSession("decoder", (3, 7), self.bias)]

    def bias(self, call):
        return row_bias(call, "last", torch.full(call.step.visual.shape, math.log(self.gain)))


def test_a_method_of_ones_own_is_its_rewrite(one, exact_of, ask, forget):
    """Its logits are those of the patterns rewritten by hand, while it generates too."""
    method = cl.register_method(Even)()
    inputs = ask(one).inputs
    with torch.inference_mode(), cl.intervening(one.hf_model, method):
        out = one.hf_model.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )

    @dataclass(frozen=True)
    class Rewrite(VisFlow):
        def weights(self, pattern, index, result, new):
            weights = torch.ones_like(pattern)
            if index in (3, 7):
                for row in [result.text[-1], *new]:
                    weights[:, row, result.image] = 3.0
            return weights

    ids, length = out.sequences[0, :-1], inputs["input_ids"].shape[1]
    pixels = inputs["pixel_values"][0]
    wanted, plain = (
        reference.run(exact_of("full"), ids, pixels, edits, length).logits[length - 1 :]
        for edits in ([Rewrite()], [])
    )
    error = float((torch.cat(out.logits) - wanted).abs().max())
    effect = float((wanted - plain).abs().amax(dim=1).min())
    print(f"error {error:.1e}, effect {effect:.3f}")
    assert error < 1e-4
    assert effect > max(0.02, 100 * error)
