"""A small analysis that needs no model, a checkout with it, and commands that are run there."""

from typer.testing import CliRunner

from clva_lens.__main__ import app

SOURCE = """# %% [markdown]
# # Powers

# %% tags=["parameters"]
power = 2
words = ["a"]
scale = 1.0

# %%
import numpy as np

import clva_lens as cl

record = cl.new_record()
record.data({"numbers.txt": "0" * 64})
record.excludes("zero", 1)
rows = [
    {"x": x, "y": y, "value": scale * x**power - y} for x in (1, 2, 3) for y in (0, 1)
]
record.keep_rows("grid", rows)
record.keep_arrays("numbers", values=np.arange(4.0), names=np.array(words))
record.keep_metrics(largest=max(row["value"] for row in rows))
record.draw("surface", table="grid", across="x", down="y", value="value")
"""


def make_checkout(folder, source=SOURCE):
    (folder / "analyses").mkdir(parents=True)
    (folder / "analyses" / "01_powers.py").write_text(source)
    return folder


def run(*args):
    result = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result
