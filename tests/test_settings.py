"""Parameters as text get the types of the fields they are for."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

import clva_lens as cl
from clva_lens.benchmarks.base import BENCHMARKS
from clva_lens.ground.errors import ParameterError
from clva_lens.ground.settings import parse_settings, restore_settings
from clva_lens.methods.base import METHODS


@dataclass(frozen=True)
class Inner:
    depth: int


@dataclass(frozen=True)
class Kinds:
    whole: int = 0
    real: float = 0.0
    either: float | int = 0
    word: str = ""
    place: str | Path = ""
    flag: bool = False
    choice: Literal["a", "b"] = "a"
    several: tuple[int, ...] | None = None
    inner: Inner | None = None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("whole=10", 10),
        ("whole=-3", -3),
        ("real=1e-3", 0.001),
        ("either=10", 10),
        ("either=0.5", 0.5),
        ("word=vcd", "vcd"),
        ("word=10", "10"),
        ("word=none", "none"),
        ("word= One word.", " One word."),
        ("word=a=b", "a=b"),
        ("word=", ""),
        ("place=../data/pope", "../data/pope"),
        ("flag=true", True),
        ("flag=False", False),
        ("choice=b", "b"),
        ("several=5,6", (5, 6)),
        ("several=[5, 6]", (5, 6)),
        ("several=5", (5,)),
        ("several=none", None),
    ],
)
def test_values_are_of_the_fields_type(text, value):
    (found,) = parse_settings(Kinds, [text]).values()
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["whole"], r"'whole' is no setting\. Write it as name=value"),
        (["whole=1", "whole=2"], "'whole' is set twice"),
        (["whole=1.5"], r"whole='1\.5' does not fit Kinds, where whole is int"),
        (["whole=true"], "does not fit Kinds"),
        (["choice=c"], r"does not fit Kinds, where choice is Literal\['a', 'b'\]"),
        (["hole=1"], r"Kinds has no 'hole'\. Did you mean 'whole'\? It has: whole, real"),
        (["flag=maybe"], "does not fit"),
        (["whole=__import__('os').getpid()"], "does not fit"),
    ],
)
def test_what_does_not_fit_is_refused(texts, message):
    with pytest.raises(ParameterError, match=message):
        parse_settings(Kinds, texts)


def test_settings_come_back_from_json():
    values = {"several": [1, 2], "inner": {"depth": 3}, "real": 1, "place": "x"}
    back = restore_settings(Kinds, values)
    assert Kinds(**back) == Kinds(several=(1, 2), inner=Inner(3), real=1.0, place="x")
    with pytest.raises(ParameterError, match="cannot have whole='x'"):
        restore_settings(Kinds, {"whole": "x"})


def test_methods_take_their_parameters_as_text():
    given = parse_settings(cl.CLVA, ["alpha=10", "layers=5,6", "positive_layer=none", "rows=last"])
    assert cl.CLVA(**given) == cl.CLVA(alpha=10, layers=(5, 6), rows="last")
    assert cl.KnockOut(**parse_settings(cl.KnockOut, ["heads=sensitive"])).heads == "sensitive"
    with pytest.raises(ParameterError, match="Write a value of that kind, or pass it in Python"):
        parse_settings(cl.CLVA, ["heads=4"])


@pytest.mark.parametrize("name", METHODS.names())
def test_every_methods_plain_defaults_can_be_written_as_text(name):
    kind = METHODS.get(name)
    plain = [f for f in fields(kind) if isinstance(f.default, int | float | str)]
    texts = [f"{field.name}={field.default}" for field in plain]
    assert kind(**parse_settings(kind, texts)) == kind()


@pytest.mark.parametrize("name", BENCHMARKS.names())
def test_every_benchmarks_settings_come_back(name):
    one = BENCHMARKS.get(name)
    assert type(one)(**restore_settings(type(one), one.settings)) == one
