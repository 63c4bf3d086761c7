"""Methods are registered with what one has to know of them, those of a notebook too."""

from dataclasses import dataclass, fields
from typing import ClassVar, get_args

import pytest

import clva_lens as cl
from clva_lens.methods.base import METHODS, Kernel, Method


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_says_what_it_is(name):
    method = METHODS.get(name)
    own = vars(method)
    assert own["name"] == name
    assert len(own["paper"]) > 10
    assert own["kernel"] in get_args(Kernel)
    assert method.forwards >= 1
    assert set(method.sites) <= {"decoder", "qformer"}
    known = {field.name for field in fields(method)}
    assert ("site" in known) == bool(method.sites)
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

        def sessions(self, shapes):
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

        def sessions(self, shapes):
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
