#!/usr/bin/env bash
# Ovis2's image processor in transformers 5.24.0 takes the (rows, columns) of its tiles for (columns,
# rows): a photo three times as wide as high is cut into four rows of two tiles, each six times as
# wide as high and squashed into a square, and one that is three times as high into two rows of four.
# Seen 2026-11-29 with Pillow's processor: grid [4, 2] for 1200 × 400, [2, 4] for 400 × 1200.
set -euo pipefail
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 pillow==12.0.0
HF_HUB_OFFLINE=1 "$place/env/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import transformers
from PIL import Image
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil

processor = Ovis2ImageProcessorPil(
    size={"height": 64, "width": 64}, do_rescale=False, do_normalize=False
)
grids = {}
for width, height in ((1200, 400), (400, 1200)):
    # Brightness grows from left to right.
    ramp = np.tile(np.linspace(0, 255, width), (height, 1)).astype(np.uint8)
    made = processor(Image.fromarray(ramp).convert("RGB"), crop_to_patches=True, max_patches=9,
                     return_tensors="np")
    tiles = made["pixel_values"][1:, 0]  # the first is the whole photo
    grids[width, height] = made["grids"][0]
    spread = [float(tile[0, -1] - tile[0, 0]) for tile in tiles]
    print(f"transformers {transformers.__version__}: {width} x {height} is cut into "
          f"{[int(one) for one in made['grids'][0]]}; each tile spans {[round(one) for one in spread]} of 255")
    if width > height:
        across = spread
wide, high = grids[1200, 400], grids[400, 1200]
assert wide[0] > wide[1] and high[0] < high[1], "it behaves otherwise now"
assert min(across) > 100, "the tiles of a wide photo lie side by side now"
PYTHON
