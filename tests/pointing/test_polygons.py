"""Polygons have the pixels that COCO's own tool (pycocotools 2.0.11) gives them."""

import numpy as np
import pytest

from clva_lens.lens.patch_masks import coco_mask, pixel_mask


def polygon(seed):
    """3 to 8 corners, some outside the picture: anywhere, on pixels, on tenths, on halves."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(3, 9))
    corners = rng.uniform(-4, 28, (count, 2))
    if seed % 4 == 1:
        corners = np.round(corners)
    elif seed % 4 == 2:
        corners = np.round(corners, 1)
    elif seed % 4 == 3:
        corners = np.round(corners * 2) / 2
    return [float(one) for one in corners.round(2).flatten()]


def shapes(seed):
    """A size and its polygons: every sixth object has two."""
    several = [polygon(seed), polygon(seed + 5000)] if seed % 6 == 0 else [polygon(seed)]
    return (20 + seed % 7, 24 - seed % 5), several


# Run lengths down the columns, of pixels outside, inside, outside and so on: seeds 0, 1, 2, …
_RUNS = """
6 3 1 10 7 13 4 12 5 6 2 5 16 6 15 1 1 5 14 1 1 6 13 1 1 5 14 1 1 4 15 5 16 4 16 4 17 3 18 2 18 2
18 2 17 3 17 3 17 3 17 3 14 1 1 4 14 6 14 2 1 3 15 1 3 1;
38 1 19 1 20 1 19 1 19 2 19 1 19 2 18 2 19 6 14 10 11 9 11 9 11 9 12 8 12 8 12 8 13 7 13 7 13 7 14
6 14 6 14 6 12;
4 2 8 3 9 2 8 4 8 3 6 6 7 3 5 8 6 4 2 1 1 9 5 4 2 12 4 5 2 11 4 5 3 10 3 6 3 10 3 5 4 10 3 5 2 1 1
10 3 4 3 1 2 9 3 3 4 2 1 9 3 3 4 2 1 9 3 2 5 12 2 2 6 3 1 8 2 2 6 12 2 1 21 1 85;
9 7 16 10 13 9 14 8 15 7 4 1 11 7 2 3 11 6 1 5 11 12 12 2 1 8 11 1 2 9 9 13 8 2 3 10 6 2 5 10 4 1
11 7 20 3 141;
16 1 24 1 24 1 4 1 23 1 19 1 3 1 20 1 1 2 21 3 21 1 1 1 82 2 24 7 19 10 16 8 17 7 19 5 21 3 23 1
24;
0 1 25 1 24 2 24 2 24 2 23 3 4 1 14 3 1 3 4 1 13 4 3 1 3 1 14 4 6 2 14 4 6 2 14 3 6 2 14 4 5 3 14
3 5 3 15 3 5 3 15 3 4 4 15 2 4 4 15 3 4 4 15 3 3 5 15 2 3 5 16 2 2 6 16 1 3 6 16 1 2 6 17 1 1 7 17
9 2;
26 2 25 4 24 5 22 7 21 8 19 10 53 8 18 8 11 1 6 6 13 2 5 5 14 1 6 4 15 1 6 3 16 1 6 2 16 1 25 1
171;
65 1 19 2 18 2 19 2 16 1 3 1 14 2 18 2 5 1 11 3 6 3 8 4 6 7 2 7 4 8 1 8 4 17 4 18 2 19 2 19 2 20 1
41 1 20 1;
61 2 9 12 2 19 2 18 4 16 5 16 2 3 5 10 4 2 8 6 7 1 8 5 17 3 19 2 40 2 19 3 17 6 14 8 13 9 11 10 11
10;
146 1 20 3 19 3 18 4 17 5 16 7 14 8 13 9 12 10 11 12 9 13 9 13 8 14 7 16 3;
17 1 21 2 22 5 18 6 16 7 16 7 16 7 15 8 15 8 16 7 14 2 1 6 14 2 1 6 13 4 1 5 13 4 1 5 13 4 2 4 12
6 2 3 12 6 2 3 12 7 2 2 11 8 2 2 11 8 3 1 10 10 13 10 13 11 13 10 2;
0 4 20 5 19 6 18 7 17 8 16 9 15 10 14 11 13 11 13 12 12 13 11 14 10 14 10 13 11 12 12 11 13 9 15 8
16 7 17 6 18 5 19 3 21 2 22;
23 1 22 1 10 5 7 2 11 13 4 1 7 12 3 2 7 12 3 2 8 10 3 3 9 9 3 3 10 8 2 5 10 7 2 5 10 14 11 13 12
12 13 3 1 7 13 3 1 7 14 2 2 6 19 6 14 1 3 6 12 1 1 2 3 5 13 3 4 4 15 2 3 4 16 2 3 3 16;
22 2 24 1 24 2 23 3 23 2 23 3 4 1 17 4 5 1 16 4 6 2 13 4 8 2 8 8 8 3 8 2 14 3 12 1 11 4 8 3 12 4 4
1 1 4 13 4 5 3 14 4 6 2 15 2 2 2 4 1 15 1 3 3 3 1 13 4 1 5 2 1 11 6 1 9 8 8 1 7 1 1 6;
178 1 19 1 19 1 19 2 18 2 18 2 18 2 18 2 17 2 18 2 18 2 18 1 2;
14 5 15 5 16 3 18 2 18 2 39 1 62 1 20 1 19 3 18 3 18 4 16 5 16 6 15 6 14 8 13 9 12 9 11 11 10 11
10 12 10 3 4 4 2;
20 1 20 1 20 1 20 2 19 2 19 2 19 2 19 1 15 5 11 10 11 10 12 9 13 8 14 7 15 6 16 5 18 3 19 2 20 1
42 2 20 2 42;
3 4 19 5 5 1 11 7 3 2 11 13 10 6 3 4 10 5 4 4 9 4 7 4 8 3 9 3 8 10 3 2 8 11 3 2 6 13 2 2 6 14 2 1
6 16 1 1 5 17 6 19 4 20 5 17 8 15 10 14 10 13 12 11 14 10 2;
17 3 10 1 10 4 10 1 8 5 2 1 7 2 6 6 1 2 4 1 3 2 5 8 5 1 3 3 3 6 7 2 3 4 1 6 9 13 4 1 6 19 5 19 5
19 4 20 4 20 4 14 2 5 3 12 5 4 2 12 7 3 2 11 9 2 2 9 12 1 2 8 15 8 16 7 16;
6 2 23 2 23 3 22 4 21 4 21 5 20 6 19 7 18 7 18 8 17 9 16 3 1 6 14 3 4 4 14 3 5 4 13 5 4 4 12 3 2 2
3 3 12 2 4 4 1 3 11 2 6 7 10 2 7 4 2 1 9 2 9 3 6
"""
RUNS = _RUNS.split(";")


@pytest.mark.parametrize(("seed", "runs"), list(enumerate(RUNS)))
def test_random_polygons(seed, runs):
    size, polygons = shapes(seed)
    wanted = pixel_mask(size, counts=[int(one) for one in runs.split()])
    assert np.array_equal(pixel_mask(size, polygons=polygons), wanted)


def test_the_tool_itself_agrees():
    tool = pytest.importorskip("pycocotools.mask", reason="un-skip with pip install pycocotools")
    for seed in range(400):
        size, polygons = shapes(seed)
        wanted = tool.decode(tool.merge(tool.frPyObjects(polygons, *size))).astype(bool)
        assert np.array_equal(pixel_mask(size, polygons=polygons), wanted), seed


def test_the_tool_agrees_on_run_lengths():
    tool = pytest.importorskip("pycocotools.mask", reason="un-skip with pip install pycocotools")
    for seed in range(200):
        size, polygons = shapes(seed)
        wanted = pixel_mask(size, polygons=polygons)
        packed = tool.encode(np.asfortranarray(wanted.astype(np.uint8)))
        assert np.array_equal(coco_mask({"segmentation": packed}, size), wanted), seed
