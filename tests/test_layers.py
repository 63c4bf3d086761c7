"""The order of the rooms: nothing imports what comes after it, and no files import in a circle."""

import ast
from functools import cache
from itertools import pairwise
from pathlib import Path

import clva_lens as cl

ROOT = Path(cl.__file__).parent
ORDER = (
    {"ground"},
    {"science", "models", "toy"},
    {"engine", "benchmarks"},
    {"methods", "figures"},
    {"lens"},
    {"experiments"},
    {""},  # the doors: the public names, and the command line
    {"__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}
NNSIGHT = ("lens", "experiments.speed")
TRANSFORMER_LENS = {"models.transformerlens", "lens.cache"}
NO_TORCH = ("ground.errors", "ground.registry", "benchmarks", "figures")
NAMELESS = ("utils", "common", "helpers", "manager")


def files(root=ROOT):
    """Every module of the package by its path: ``lens.load``; a room's own file by the room's."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = files()


def room(name):
    return name.split(".")[0]


def within(name, places):
    return any(name == place or name.startswith(f"{place}.") for place in places)


@cache
def imports(path):
    """(module, name) of everything that a file imports, at its top or inside a function."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [(node.module, alias.name) for alias in node.names]
    return found


def own_imports(known):
    """The modules of the package that each of its modules imports."""
    used = {}
    for name, path in known.items():
        used[name] = set()
        for module, imported in imports(path):
            if room(module) != "clva_lens":
                continue
            short = module.removeprefix("clva_lens").lstrip(".")
            inner = f"{short}.{imported}".lstrip(".")
            target = inner if inner in known else short
            assert target in known, f"{name} imports {module}, which is not there"
            used[name].add(target)
    return used


def against_the_order(used):
    return [
        f"{name} imports {other}"
        for name, others in used.items()
        for other in sorted(others)
        if room(name) != room(other) and FLOOR[room(other)] >= FLOOR[room(name)]
    ]


def circle(used):
    """A circle of imports, as the names along it; none is an empty list."""
    finished = set()

    def walk(name, trail):
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in finished:
            return []
        for other in sorted(used[name]):
            if found := walk(other, [*trail, name]):
                return found
        finished.add(name)
        return []

    return next((found for name in sorted(used) if (found := walk(name, []))), [])


def functions(path):
    """Functions and how long they are, without the examples that end their docstrings."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            _, example, lines = (ast.get_docstring(node) or "").partition("\n\n>>> ")
            examples = lines.count("\n") + 2 if example else 0
            yield node.name, node.end_lineno - node.lineno + 1 - examples


def test_the_house_has_ten_rooms_and_two_doors():
    assert {path.name for path in ROOT.iterdir() if path.name != "__pycache__"} == {
        *(room for rooms in ORDER[:-2] for room in rooms),
        *("__init__.py", "__init__.pyi", "__main__.py", "py.typed"),
    }
    assert set(cl.ROOMS) == {room for rooms in ORDER[:-2] for room in rooms}
    assert {room(name) for name in FILES} == set(FLOOR)


def test_nothing_imports_what_comes_after_it():
    assert against_the_order(own_imports(FILES)) == []


def test_no_files_import_in_a_circle():
    assert circle(own_imports(FILES)) == []


def test_the_checks_see_a_circle_and_an_upward_import():
    used = own_imports(FILES)
    used["science.heads"] = {*used["science.heads"], "lens.load"}
    assert against_the_order(used) == ["science.heads imports lens.load"]
    seen = circle({**own_imports(FILES), "ground.axes": {"lens.load"}})
    assert seen[0] == seen[-1] and ("ground.axes", "lens.load") in pairwise(seen)


def test_each_upstream_stays_in_its_rooms():
    wrong = []
    for name, path in FILES.items():
        for module, _ in imports(path):
            top = room(module)
            if top == "nnsight" and not within(name, NNSIGHT):
                wrong.append(f"{name} imports nnsight")
            if top == "transformer_lens" and name not in TRANSFORMER_LENS:
                wrong.append(f"{name} imports transformer_lens")
            if within(name, NO_TORCH) and top in ("torch", "transformers"):
                wrong.append(f"{name} imports {top}")
            if within(name, ("science",)) and top in ("transformers", "nnsight", "pathlib"):
                wrong.append(f"{name} imports {top}")
    assert wrong == []


def test_every_room_says_what_it_is_for():
    for name in cl.ROOMS:
        said = ast.get_docstring(ast.parse(FILES[name].read_text(encoding="utf-8")))
        assert said and said.splitlines()[0].endswith((".", ";", ":")), name


def test_files_and_functions_are_short_enough_to_read():
    lines = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    assert {name: count for name, count in lines.items() if count > 400} == {}
    long = [
        f"{name}.{function}: {count} lines"
        for name, path in FILES.items()
        for function, count in functions(path)
        if count > 60
    ]
    assert long == []
    assert not {name for name in FILES if name.rpartition(".")[2] in NAMELESS}
