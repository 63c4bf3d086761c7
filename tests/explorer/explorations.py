"""Explorations of any size without a model, and the colours that a page should give them."""

import math

import numpy as np

from clva_lens.lens.explorer.exploration import Exploration

HUES = {"more": 55, "less": 245}


def synthetic(looks=2, layers=4, heads=3, words=3, grid=(4, 5), seed=0, **changes):
    """An exploration of random numbers; its maps are as peaked as attention is."""
    rng = np.random.default_rng(seed)
    patches = grid[0] * grid[1]

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    maps = np.exp(2 * normal(looks, layers, heads, words, patches))
    mass = rng.uniform(0.05, 0.9, (looks, layers, heads, words)).astype(np.float32)
    maps *= (mass / maps.sum(axis=-1))[..., None]
    sensitive = rng.random((looks, layers, heads)) < 0.3
    fields = {
        "question": "what is in the image?",
        "model": "toy-llava",
        "names": ("no method", "cl.CLVA()", "cl.PAI()")[:looks],
        "answers": ("a cat",) * looks,
        "words": tuple(f"word{place}" for place in range(words)),
        "layers": tuple(range(layers)),
        "depth": layers,
        "anchors": (layers // 2, 0),
        "grid": grid,
        "lens_layers": tuple(range(layers)),
        "lens_words": (("cat",) * layers,) * looks,
        "record": {"left_out": []},
        "photo": rng.integers(0, 255, (64, 80, 3), dtype=np.uint8),
        "maps": maps,
        "mass": mass,
        "probabilities": rng.random((looks, 2, words), dtype=np.float32),
        "margins": normal(looks, 2, words),
        "knocked": normal(looks, layers),
        "sensitive": sensitive,
        "insensitive": ~sensitive & (rng.random(sensitive.shape) < 0.3),
        "curves": np.tanh(normal(looks, 6, layers)),
        "lens": np.abs(normal(looks, layers, 2)),
        "outlines": {"object": np.arange(patches) % grid[1] < 2},
    }
    return Exploration(**{**fields, **changes})


def oklch(lightness, chroma, hue):
    """sRGB of an OKLCH colour (Ottosson 2020), in [0, 255], written from its definition."""
    a, b = (chroma * one(math.radians(hue)) for one in (math.cos, math.sin))
    to_cones = [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728]]
    to_cones.append([1, -0.0894841775, -1.2914855480])
    cones = (np.array(to_cones) @ [lightness, a, b]) ** 3
    to_light = [[4.0767416621, -3.3077115913, 0.2309699292]]
    to_light.append([-1.2684380046, 2.6097574011, -0.3413193965])
    to_light.append([-0.0041960863, -0.7034186147, 1.7076147010])
    light = np.array(to_light) @ cones
    curved = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light.clip(0) ** (1 / 2.4) - 0.055)
    return 255 * curved.clip(0, 1)


def over_photo(value, top):
    """The colour and opacity of a value on the photo: [red, green, blue, alpha], in [0, 255]."""
    t = min(1.0, abs(value) / top)
    hue = HUES["less" if value < 0 else "more"]
    return np.array([*oklch(0.62 + 0.22 * t, 0.17, hue), 255 * t**0.75])
