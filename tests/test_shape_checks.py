"""The suite's own checks of shapes: a wrong one falls, in every function and dataclass with one."""

import ast
import importlib
import re
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import AbstractArray, Float
from shape_checks import check_shapes
from torch import Tensor

import clva_lens as cl
from clva_lens.science.anchors import VisualAnchors, head_shares

ROOT = Path(cl.__file__).parent
LONE, PAIR, SQUARE = torch.zeros(3), torch.zeros(2), torch.zeros(3, 3)


def test_a_wrong_shape_falls_in_the_package():
    with pytest.raises(BeartypeCallHintViolation):
        head_shares(LONE)  # no booleans
    anchors = {one.name: torch.zeros(1, 4) for one in fields(VisualAnchors)}
    with pytest.raises(BeartypeCallHintViolation):
        VisualAnchors(**anchors | {"positive_map": torch.zeros(1, 5)})


def test_functions_without_a_shape_are_left_alone():
    def plain(tensor: Tensor, number: int) -> list[Tensor]:
        return [tensor * number]

    assert check_shapes(plain) is plain


class Shapes:
    """Every way in which a function can name a shape."""

    @check_shapes
    def given(self, row: Float[Tensor, " key"], other: Float[Tensor, " key"] | None = None):
        return row

    @check_shapes
    def returned(self, row: Tensor, grid: Float[Tensor, "key key"]) -> Float[Tensor, " key"]:
        return row

    @check_shapes
    def inside(self, rows: list[tuple[str, Float[Tensor, " key"]]]) -> None: ...

    @check_shapes
    @classmethod
    def of_class(cls, row: Float[Tensor, " key"]) -> None: ...

    @check_shapes
    @staticmethod
    def of_none(row: Float[Tensor, " key"]) -> None: ...

    @check_shapes
    @property
    def kept(self) -> Float[Tensor, " key"]:
        return self.value


WRONG = {
    "an argument": (lambda s: s.given(LONE), lambda s: s.given(SQUARE)),
    "two arguments": (lambda s: s.given(LONE, LONE), lambda s: s.given(LONE, PAIR)),
    "what is returned": (lambda s: s.returned(LONE, SQUARE), lambda s: s.returned(PAIR, SQUARE)),
    "in a list": (lambda s: s.inside([("", LONE)]), lambda s: s.inside([("", SQUARE)])),
    "class method": (lambda s: s.of_class(LONE), lambda s: s.of_class(SQUARE)),
    "static method": (lambda s: s.of_none(LONE), lambda s: s.of_none(SQUARE)),
}


@pytest.mark.parametrize("way", WRONG)
def test_a_wrong_shape_falls_in_every_way_to_name_it(way):
    right, wrong = WRONG[way]
    right(Shapes())
    with pytest.raises(BeartypeCallHintViolation):
        wrong(Shapes())


def test_properties_and_dataclasses():
    @check_shapes
    @dataclass
    class Kept:
        rows: Float[Tensor, "layer key"]
        keys: Float[Tensor, " key"]

    shapes = Shapes()
    shapes.value = LONE
    assert shapes.kept is LONE
    shapes.value = SQUARE
    with pytest.raises(BeartypeCallHintViolation):
        _ = shapes.kept
    kept = Kept(SQUARE, LONE)
    with pytest.raises(BeartypeCallHintViolation):
        replace(kept, keys=PAIR)


def test_users_checks_are_tested_without(untyped):
    assert head_shares(torch.ones(2)).tolist() == [0.5, 0.5]


def shaped(node):
    text = ast.unparse(node.args) + (ast.unparse(node.returns) if node.returns else "")
    return re.search(r"(Float|Int|Bool|Shaped|Num)\w*\[Tensor, ", text)


def test_every_function_of_the_package_that_names_a_shape_is_checked():
    """By the source: top-level functions, and dataclasses that hold an array."""
    functions = dataclasses = 0
    for path in sorted(ROOT.rglob("*.py")):
        source = path.read_text()
        if "import jaxtyping" not in source and "from jaxtyping" not in source:
            continue
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
        for node in ast.parse(source).body:
            found = getattr(module, getattr(node, "name", ""), None)
            if isinstance(node, ast.FunctionDef) and shaped(node):
                assert hasattr(found, "__wrapped__"), (path, node.name)
                functions += 1
            elif is_dataclass(found) and any(holds_an_array(one.type) for one in fields(found)):
                assert hasattr(found.__init__, "__wrapped__"), (path, node.name)
                dataclasses += 1
    assert functions > 60 and dataclasses > 10, (functions, dataclasses)


def holds_an_array(annotation):
    return isinstance(annotation, type) and issubclass(annotation, AbstractArray)
