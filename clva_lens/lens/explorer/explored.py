"""What an explorer shows, as arrays: made without a browser, kept in one file, read back."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np

from clva_lens.ground.errors import ParameterError
from clva_lens.ground.files import taking_place
from clva_lens.ground.parameters import check_arguments
from clva_lens.science.heads import SomeHeads, head_mask

FORMAT = 1
CLASSES = ("all", "sensitive", "insensitive")
_TEXT, _OUTLINE = "text", "outline: "

Kind = TypeVar("Kind", bound="Explored")


@dataclass(frozen=True, eq=False, repr=False)
class Explored:
    """One prompt, read without a method and with each of a few.

    Axis ``look`` has the model alone first, then each method; ``names`` says which. ``words`` are
    those that the model alone answers. All looks read the same words, so that row and column of one
    map can be compared with another's; what a method would answer by itself is in ``answers``.

    Args:
        photo: [row, column, colour], 0 to 255: what the model saw of it.
        maps: [look, layer, head, word, patch], fractions of attention mass, of the rows that wrote
            the word. Where a Q-Former reads the picture before any word, there is one for all.
        mass: [look, layer, head, word], the same over all image tokens.
        probabilities: [look, blind, word], of each word as it was written: as it is, and with all
            of the attention to the image knocked out.
        margins: [look, blind, word], logit(yes) − logit(no) there, in nats; NaN without these.
        knocked: [look, layer], the first margin where one layer alone is knocked out; NaN where it
            was not asked for.
        sensitive, insensitive: [look, layer, head], the classes of Eqs. 2–3, arXiv:2603.25088v1.
        curves: [look, curve, layer], those of ``AttentionDrift``, in the order of its fields.
        lens: [look, layer, 2], of the decoder's ``lens_layers``: the margin, and the probability
            of the likeliest token, whose text is in ``lens_words``.
        outlines: bool [patch] by name: the object, and the anchors of a CLVA.
        grid: (rows, columns) of the patches. ``layers`` are 0-based, of ``depth``; ``anchors`` are
            the layers of the positive and of the negative one.
        record: how all this came about.
    """

    question: str
    model: str
    names: tuple[str, ...]
    answers: tuple[str, ...]
    words: tuple[str, ...]
    layers: tuple[int, ...]
    depth: int
    anchors: tuple[int, int]
    grid: tuple[int, int]
    lens_layers: tuple[int, ...]
    lens_words: tuple[tuple[str, ...], ...]
    record: dict[str, Any]
    photo: np.ndarray
    maps: np.ndarray
    mass: np.ndarray
    probabilities: np.ndarray
    margins: np.ndarray
    knocked: np.ndarray
    sensitive: np.ndarray
    insensitive: np.ndarray
    curves: np.ndarray
    lens: np.ndarray
    outlines: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        """Have arrays that nobody writes to.

        Raises:
            ParameterError: if sizes do not fit each other.
        """
        looks, layers, heads, _, patches = self.maps.shape
        rows, columns = self.grid
        wanted = (len(self.names), len(self.layers), rows * columns)
        if (looks, layers, patches) != wanted or self.mass.shape[:3] != (looks, layers, heads):
            raise ParameterError(
                f"the maps have {looks} looks, {layers} layers and {patches} patches, but "
                f"{', '.join(map(str, wanted))} are named. Make explorations with cl.explore()."
            )
        self._check_sizes(looks, layers, heads)
        for array in (*self._arrays().values(), *self.outlines.values()):
            array.flags.writeable = False

    def _check_sizes(self, looks: int, layers: int, heads: int) -> None:
        """Raise ParameterError if an array, or what names its axes, is of another size."""
        words, read = len(self.words), len(self.lens_layers)
        by_head = (looks, layers, heads)
        wanted = {
            "mass": self.maps.shape[:-1],
            "probabilities": (looks, 2, words),
            "margins": (looks, 2, words),
            "knocked": (looks, layers),
            "sensitive": by_head,
            "insensitive": by_head,
            "curves": (looks, *self.curves.shape[1:2], layers),
            "lens": (looks, read, 2),
        }
        found = {name: one.shape for name, one in self._arrays().items()}
        told = {"answers": (self.answers, looks), "lens_words": (self.lens_words, looks)}
        wanted |= {name: (size,) for name, (_, size) in told.items()}
        found |= {name: (len(one),) for name, (one, _) in told.items()}
        for name, mask in self.outlines.items():
            found[name], wanted[name] = mask.shape, self.maps.shape[-1:]
        for name, size in wanted.items():
            if found[name] != size:
                raise ParameterError(
                    f"'{name}' is {found[name]}, but {size} fits the maps and the words. Make "
                    "explorations with cl.explore()."
                )
        if self.maps.shape[3] not in (1, words) or not np.isfinite(self.maps).all():
            raise ParameterError(
                f"there are maps of {self.maps.shape[3]} words for {words}, or some are not "
                "numbers. Make explorations with cl.explore()."
            )

    def map(
        self, word: int = 0, layer: int | None = None, heads: SomeHeads | str = "all", look: int = 0
    ) -> np.ndarray:
        """Return where heads looked as a word was written, averaged over them: [row, column].

        ``layer`` is 0-based; None is that of the positive anchor. ``heads`` is "all", "sensitive"
        or "insensitive", a class of the layer; or heads by name, whatever their layers: pairs
        (layer, head), {layer: [heads]} or a mask. ``look`` is 0 without a method, then 1, ….

        Raises:
            ParameterError: if there is no such word, layer, head or look.
        """
        if not 0 <= look < len(self.names) or not 0 <= word < len(self.words):
            raise ParameterError(
                f"there is no word {word} in look {look}: there are {len(self.words)} words and "
                f"{len(self.names)} looks. Count from 0."
            )
        maps = self.maps[look, :, :, min(word, self.maps.shape[3] - 1)].astype(np.float64)
        mask = self._chosen(layer, heads, look)
        found = maps[mask].mean(axis=0) if mask.any() else np.zeros(maps.shape[-1])
        return found.reshape(self.grid)

    def _chosen(self, layer: int | None, heads: SomeHeads | str, look: int) -> np.ndarray:
        """Return the heads that are meant, as a mask [layer, head]."""
        if not isinstance(heads, str):
            count = self.maps.shape[2]
            of = "the exploration"
            return head_mask(heads, self.layers, count, depth=self.depth, of=of).numpy()
        layer = self.anchors[0] if layer is None else layer
        if heads not in CLASSES or layer not in self.layers:
            raise ParameterError(
                f"there are no heads {heads!r} in layer {layer}. Pass one of "
                f"{', '.join(map(str, self.layers))}, and {', '.join(CLASSES)}, or name heads."
            )
        mask = np.zeros(self.sensitive.shape[1:], dtype=bool)
        row = self.layers.index(layer)
        mask[row] = True if heads == "all" else getattr(self, heads)[look, row]
        return mask

    def strongest(self, word: int, count: int) -> Sequence[tuple[int, int]]:
        """Return the places [layer, head] with most on the image in any look, most first."""
        mass = self.mass[..., min(word, self.mass.shape[-1] - 1)].max(axis=0)
        order = np.argsort(-mass, axis=None, kind="stable")[:count]
        return [divmod(int(one), mass.shape[1]) for one in order]

    # ── one file ──

    def _arrays(self) -> dict[str, np.ndarray]:
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: one for name, one in found.items() if isinstance(one, np.ndarray)}

    def save(self, path: str | Path) -> Path:
        """Write everything into one ``.npz`` file, from which ``load`` makes the same; return it.

        Raises:
            ParameterError: if the name does not end in ``.npz``.
        """
        path = npz_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = self._arrays()
        text = {one.name: getattr(self, one.name) for one in fields(self)}
        text = {name: one for name, one in text.items() if name not in {*arrays, "outlines"}}
        said = json.dumps({"format": FORMAT, **text}, ensure_ascii=False)
        marks = {f"{_OUTLINE}{name}": mask for name, mask in self.outlines.items()}
        with taking_place(path) as part, part.open("wb") as file:
            given: Any = {**arrays, **marks, _TEXT: np.frombuffer(said.encode(), dtype=np.uint8)}
            np.savez_compressed(file, **given)
        return path

    @classmethod
    def load(cls: type[Kind], path: str | Path) -> Kind:
        """Return what ``save`` wrote.

        Raises:
            ParameterError: if the file is missing, damaged, or none of these.
        """
        check_arguments(cls.load, path=path)
        path = npz_path(path)
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            told = json.loads(arrays.pop(_TEXT).tobytes().decode())
            version = told.pop("format")
            marks = {one: arrays.pop(one) for one in list(arrays) if one.startswith(_OUTLINE)}
            outlines = {name.removeprefix(_OUTLINE): mask for name, mask in marks.items()}
            given = {**{name: _frozen(one) for name, one in told.items()}, **arrays}
            if version == FORMAT:
                names = [one.name for one in fields(cls) if one.name != "outlines"]
                given = {name: given[name] for name in names}
        except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
            raise ParameterError(
                f"'{path}' is no exploration ({type(error).__name__}). Pass a file that "
                "Exploration.save() wrote."
            ) from None
        if version != FORMAT:
            raise ParameterError(
                f"'{path}' is of format {version}, and {FORMAT} is read. Make it again."
            )
        return cls(**given, outlines=outlines)


def npz_path(path: str | Path) -> Path:
    """Return a path that ends in ``.npz``, or raise ParameterError."""
    path = Path(path)
    if path.suffix != ".npz":
        raise ParameterError(f"'{path}' does not end in .npz. Name the file so.")
    return path


def _frozen(value: Any) -> Any:
    """Return lists as the tuples that they were."""
    return tuple(_frozen(one) for one in value) if isinstance(value, list) else value
