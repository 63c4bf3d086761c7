#!/usr/bin/env bash
# The same figure, arranged by matplotlib 3.11.2's constrained layout again and again in one process,
# ends with its axes at places that differ in the last bit: kiwisolver 1.5.1 seems to order what it
# solves by addresses in memory. A line that lies between two of the numbers of six decimals that a
# PDF holds can then be printed as either, so equal data need not give equal bytes; we round places.
# Seen 2026-11-29: 60 arrangements of one figure gave 2 sets of places, 1.1e-16 apart.
set -euo pipefail
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet matplotlib==3.11.2 kiwisolver==1.5.1
MPLBACKEND=agg "$place/env/bin/python" - <<'PYTHON'
import random
from collections import Counter

import matplotlib
import numpy as np
from matplotlib.figure import Figure

random.seed(0)


def arranged():
    figure = Figure(figsize=(6.9, 5.05), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[4.6, 0.45])
    axes = upper.subplots(2, 2)
    upper.colorbar(axes[0, 0].pcolormesh(np.arange(8.0).reshape(4, 2)), ax=axes[0, 0])
    axes[0, 1].imshow(np.zeros((4, 4)))
    axes[1, 0].plot([0, 1, 2], label="curve")
    axes[1, 0].legend()
    axes[1, 1].bar(["0-1", "2-3"], [0.9, 0.2])
    for one in axes.flat:
        one.set(title="a title", xlabel="across", ylabel="up")
    lower.text(0.01, 0.98, "words")
    figure.draw_without_rendering()
    return tuple(place for one in upper.axes for place in one.get_position().bounds)


found, kept = Counter(), []
for _ in range(60):
    found[arranged()] += 1
    kept = kept[-5:] + [[bytearray(random.randrange(20, 4000)) for _ in range(3000)]]
places = np.array(list(found))
apart = np.abs(places - places[0]).max()
print(f"matplotlib {matplotlib.__version__}: 60 arrangements of one figure, {len(found)} sets of "
      f"places ({', '.join(map(str, found.values()))} times), at most {apart:.1e} apart")
assert len(found) > 1 and 0 < apart < 1e-12, "it behaves otherwise now"
PYTHON
