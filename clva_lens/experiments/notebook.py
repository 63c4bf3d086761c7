"""An analysis' source (jupytext percent) as a notebook: its parameters, and how it is executed."""

import ast
import copy
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from clva_lens.ground.errors import RecordError
from clva_lens.ground.settings import parse_settings

_WARNING = re.compile(r"\S+\.py:\d+: \w*Warning: ")  # as Python writes it
PARAMETERS, INJECTED = "parameters", "injected-parameters"


def read_source(path: Path) -> NotebookNode:
    """Return an analysis as a notebook without outputs.

    Raises:
        RecordError: if it has no parameters cell, or more than one.
    """
    notebook = jupytext.read(path)
    count = sum(_tagged(cell, PARAMETERS) for cell in notebook.cells)
    if count != 1:
        raise RecordError(
            f"'{path.name}' has {count} cells tagged \"{PARAMETERS}\", but one is needed. Begin "
            f'one with: # %% tags=["{PARAMETERS}"]'
        )
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    return notebook


def _tagged(cell: NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def parameters(notebook: NotebookNode) -> dict[str, Any]:
    """Return the defaults that the parameters cell sets.

    Raises:
        RecordError: if a line of it is anything but ``name = literal``.
    """
    cell = next(cell for cell in notebook.cells if _tagged(cell, PARAMETERS))
    found = {}
    for line in ast.parse(cell.source).body:
        try:
            if not isinstance(line, ast.Assign) or len(line.targets) != 1:
                raise ValueError
            found[ast.unparse(line.targets[0])] = ast.literal_eval(line.value)
        except ValueError:
            raise RecordError(
                f"the parameters cell holds '{ast.unparse(line)}'. Write name = value lines with "
                "numbers, text, lists or None only."
            ) from None
    return found


def parse_parameters(slug: str, defaults: Mapping[str, Any], texts: list[str]) -> dict[str, Any]:
    """Return what ``name=value`` texts give, each of the kind that its default has.

    Raises:
        ParameterError: if there is no such parameter, or a value is of another kind.
    """
    hints = [(name, _kind(value)) for name, value in defaults.items()]
    return parse_settings(make_dataclass(slug, hints), texts)


def _kind(value: Any) -> Any:
    if value is None:
        return Any
    if isinstance(value, list):
        return list[_kind(value[0]) if value else Any]
    return float | int if type(value) is float else type(value)


def inject(notebook: NotebookNode, given: Mapping[str, Any]) -> NotebookNode:
    """Return the notebook with a cell after the parameters that sets the given ones."""
    made = copy.deepcopy(notebook)
    if given:
        place = next(i for i, cell in enumerate(made.cells) if _tagged(cell, PARAMETERS))
        lines = "\n".join(f"{name} = {value!r}" for name, value in given.items())
        cell = nbformat.v4.new_code_cell(lines, metadata={"tags": [INJECTED]}, id=INJECTED)
        made.cells.insert(place + 1, cell)
    return made


def code_cells(notebook: NotebookNode) -> str:
    """Return the SHA-256 of the code; prose, outputs and injected parameters do not change it."""
    code = [c.source for c in notebook.cells if c.cell_type == "code" and not _tagged(c, INJECTED)]
    return hashlib.sha256("\n# %%\n".join(code).encode()).hexdigest()


def execute(
    notebook: NotebookNode, folder: Path, environment: Mapping[str, str], advance: Callable
) -> str | None:
    """Run all cells in ``folder``, in place; ``advance(1)`` is called after each.

    Returns the error of the cell that failed, or None. A KeyboardInterrupt ends it.
    """
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        # Errors only: a kernel warns that others on this machine could read its local connection.
        extra_arguments=["--IPKernelApp.log_level=40"],
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
        on_cell_executed=lambda **told: advance(1),
        on_cell_error=lambda **told: None,
    )
    quiet = {
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "JUPYTER_PLATFORM_DIRS": "1",
        # tqdm's, where ipywidgets is not installed; it has the path of whoever ran it.
        "PYTHONWARNINGS": "ignore:IProgress not found",
    }
    try:
        client.execute(env={**os.environ, **quiet, **environment})
    except CellExecutionError as error:
        return f"{error.ename}: {error.evalue}"
    finally:
        notebook.metadata.pop("language_info", None)
    return None


def shown(path: Path) -> bytes:
    """Return an executed notebook for readers: without warnings, written to stderr or displayed.

    They are about the machine that it ran on, with paths of it. Nothing else is changed, and the
    record keeps the notebook whole.
    """
    notebook = nbformat.read(path, 4)
    removed = 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            kept = [one for one in cell.outputs if not _warns(one)]
            removed += len(cell.outputs) - len(kept)
            cell.outputs = kept
    return nbformat.writes(notebook).encode() + b"\n" if removed else path.read_bytes()


def _warns(output: NotebookNode) -> bool:
    said = output.get("data", {}).get("text/plain", "")
    return output.get("name") == "stderr" or _WARNING.match(said) is not None


def write(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook; the same one gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
