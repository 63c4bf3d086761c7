"""The procedural world: small pictures whose every object is known.

A picture is 64 × 64 pixels of one of four scenes, with two to six glyphs on a noisy ground. Each
scene has three *core* kinds that are usually there; two *popular* kinds turn up anywhere; all
others are rare. A third of the glyphs are *faint*. So a model that cannot quite see an object has a
good reason to guess it from the company it keeps, as large models do on COCO: the hallucinations
are planted, and every one can be checked, since the truth comes with a mask.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

IMAGE_SIZE = 64
PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE

SCENES = ("kitchen", "street", "park", "office")
CORE = (
    ("cup", "plate", "kettle"),
    ("car", "sign", "bicycle"),
    ("tree", "bench", "kite"),
    ("lamp", "laptop", "book"),
)
POPULAR = ("person", "ball")
KINDS = tuple(kind for core in CORE for kind in core) + POPULAR
COLORS = {
    "red": (225, 45, 40),
    "green": (40, 170, 60),
    "blue": (45, 85, 225),
    "yellow": (240, 205, 30),
    "purple": (150, 55, 190),
    "white": (245, 245, 245),
}
SIDES = ("left", "right")
MAX_OBJECTS = 6

# Probability that a kind is present, given the scene.
P_CORE, P_POPULAR, P_OTHER = 0.72, 0.45, 0.055
P_FAINT, FAINT_OPACITY, SOLID_OPACITY = 0.35, (0.17, 0.42), (0.85, 1.0)
P_REPEAT = (0.72, 0.18, 0.10)  # one, two or three instances of a kind that is present
TINTS = np.array([(122, 108, 96), (98, 104, 116), (96, 118, 96), (116, 112, 122)], dtype=np.float32)

_BITMAPS = {
    "cup": "........ ######.. ######## ######.# ######.# ######## ######.. .####...",
    "plate": "..####.. .######. ##....## #......# #......# ##....## .######. ..####..",
    "kettle": "...##... ..####.. .######. ######## #.###### #.###### ..#####. ..#####.",
    "car": "........ ..####.. .##..##. ######## ######## ######## .##..##. .##..##.",
    "sign": "######## #......# #.####.# #......# ######## ...##... ...##... ...##...",
    "bicycle": "....##.. .....#.. .######. .##..#.. #..##..# #..##..# .##..##. ........",
    "tree": "...##... ..####.. ..####.. .######. .######. ######## ...##... ...##...",
    "bench": "........ ######## ........ ######## ######## ##....## ##....## ##....##",
    "kite": "...#.... ..###... .#####.. ..###... ...#.... ....#... ...#.... ....##..",
    "lamp": "..####.. .######. ######## ######## ...#.... ...#.... ...#.... .#####..",
    "laptop": ".######. .#....#. .#....#. .#....#. .######. ........ ######## ########",
    "book": "###..### #..##..# #..##..# #..##..# #..##..# #..##..# ###..### ...##...",
    "person": "..###... ..###... ...#.... .#####.. #.###.#. ..###... ..#.#... .##.##..",
    "ball": "..####.. .##.###. ##.##### #.###### ######## ######## .######. ..####..",
}
GLYPHS: dict[str, Bool[np.ndarray, "8 8"]] = {
    kind: np.array([[cell == "#" for cell in row] for row in rows.split()])
    for kind, rows in _BITMAPS.items()
}


class Thing(NamedTuple):
    """One glyph: what it is and where (pixels, top-left corner)."""

    kind: str
    color: str
    x: int
    y: int
    size: int
    opacity: float

    @property
    def faint(self) -> bool:
        """Whether the glyph is one of the hard-to-see ones."""
        return self.opacity < 0.5

    @property
    def side(self) -> str | None:
        """``left`` or ``right``, or None for a glyph across the middle."""
        centre = self.x + self.size / 2
        if centre < IMAGE_SIZE / 2 - 4:
            return "left"
        return "right" if centre > IMAGE_SIZE / 2 + 4 else None


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn: scene index, glyphs, and the seed of its noise."""

    place: int
    things: tuple[Thing, ...]
    noise_seed: int

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds present, each once, in the order of ``KINDS``."""
        present = {thing.kind for thing in self.things}
        return tuple(kind for kind in KINDS if kind in present)

    def of_kind(self, kind: str) -> tuple[Thing, ...]:
        """Return the glyphs of one kind."""
        return tuple(thing for thing in self.things if thing.kind == kind)

    def patches(self, kind: str) -> Bool[np.ndarray, "rows columns"]:
        """Return the patches of the grid that objects of ``kind`` cover by a quarter or more."""
        covered = np.zeros((IMAGE_SIZE, IMAGE_SIZE))
        for thing in self.of_kind(kind):
            covered[thing.y : thing.y + thing.size, thing.x : thing.x + thing.size] = 1
        share = covered.reshape(GRID, PATCH_SIZE, GRID, PATCH_SIZE).mean(axis=(1, 3))
        return share >= 0.25


def presence(place: int) -> np.ndarray:
    """Return each kind's probability of being present in a scene, in the order of ``KINDS``."""
    probability = np.full(len(KINDS), P_OTHER)
    probability[3 * place : 3 * place + 3] = P_CORE
    probability[-len(POPULAR) :] = P_POPULAR
    return probability


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw one scene: two to six glyphs, placed with little overlap."""
    place = int(rng.integers(len(SCENES)))
    kinds: list[str] = []
    while not 2 <= len(kinds) <= 5:
        kinds = [KINDS[i] for i in np.flatnonzero(rng.random(len(KINDS)) < presence(place))]
    wanted = [kind for kind in kinds for _ in range(1 + rng.choice(3, p=P_REPEAT))]
    # Every kind keeps one glyph; repeats are dropped first when there are too many.
    rng.shuffle(wanted)
    while len(wanted) > MAX_OBJECTS:
        extra = next(i for i, kind in enumerate(wanted) if wanted.count(kind) > 1)
        del wanted[extra]
    things: list[Thing] = []
    for kind in wanted:
        size = int(rng.integers(13, 21))
        x, y = _free_corner(rng, size, things)
        opacity = rng.uniform(*(FAINT_OPACITY if rng.random() < P_FAINT else SOLID_OPACITY))
        color = list(COLORS)[rng.integers(len(COLORS))]
        things.append(Thing(kind, color, x, y, size, float(opacity)))
    return Scene(place, tuple(things), int(rng.integers(2**31)))


def _free_corner(rng: np.random.Generator, size: int, things: list[Thing]) -> tuple[int, int]:
    """Return the corner, of twelve random ones, whose box overlaps the other glyphs least."""
    corners = rng.integers(0, IMAGE_SIZE - size + 1, size=(12, 2))
    overlap = np.zeros(12)
    for thing in things:
        width = np.minimum(corners[:, 0] + size, thing.x + thing.size)
        width = (width - np.maximum(corners[:, 0], thing.x)).clip(0)
        height = np.minimum(corners[:, 1] + size, thing.y + thing.size)
        overlap += width * (height - np.maximum(corners[:, 1], thing.y)).clip(0)
    x, y = corners[int(overlap.argmin())]
    return int(x), int(y)


def render(scene: Scene) -> UInt8[np.ndarray, "height width 3"]:
    """Draw a scene; the same scene gives the same pixels."""
    rng = np.random.default_rng(scene.noise_seed)
    ground = TINTS[scene.place] + rng.normal(0, 9, 3)
    coarse = rng.normal(0, 11, (GRID, GRID, 1)).astype(np.float32)
    canvas = np.ones((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32) * ground.astype(np.float32)
    canvas += coarse.repeat(PATCH_SIZE, 0).repeat(PATCH_SIZE, 1)
    for _ in range(rng.integers(0, 6)):  # clutter: short bars that are no object
        x, y = rng.integers(0, IMAGE_SIZE - 12, 2)
        width, height = rng.permutation([rng.integers(6, 13), rng.integers(1, 3)])
        canvas[y : y + height, x : x + width] += rng.normal(0, 45, 3)
    for thing in scene.things:
        rows = np.arange(thing.size) * 8 // thing.size
        ink = GLYPHS[thing.kind][np.ix_(rows, rows)][..., None] * np.float32(thing.opacity)
        box = np.s_[thing.y : thing.y + thing.size, thing.x : thing.x + thing.size]
        canvas[box] = canvas[box] * (1 - ink) + np.array(COLORS[thing.color], np.float32) * ink
    canvas += rng.normal(0, 14, canvas.shape).astype(np.float32)
    return canvas.clip(0, 255).astype(np.uint8)


def sample_scenes(count: int, seed: int) -> list[Scene]:
    """Return ``count`` scenes; the same seed gives the same scenes."""
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(count)]
