"""What ``clva-lens check-model`` says of a model: its facts, its check, and which methods apply."""

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from clva_lens.ground.errors import ClvaLensError
from clva_lens.lens.check import check_model
from clva_lens.lens.decoding import Beam, Greedy
from clva_lens.lens.faults import machine_fault
from clva_lens.lens.generate import generate
from clva_lens.lens.load import LensModel
from clva_lens.lens.reading import first_line
from clva_lens.lens.sharing import shared
from clva_lens.lens.summary import model_facts
from clva_lens.methods.base import METHODS
from clva_lens.models.pieces import Piece
from clva_lens.models.prompt import Prompt

QUESTION = "Is there a cup in the image?"


def sample_prompt(model: LensModel) -> Prompt:
    """Return a prompt about a picture of noise, 336 × 336 pixels."""
    noise = np.random.default_rng(0).integers(0, 255, (336, 336, 3), dtype=np.uint8)
    return model.prompt(noise, QUESTION)


def facts(model: LensModel, prompt: Prompt) -> Iterator[str]:
    """Yield sentences on a model's parts, its attention sites, and where a prompt's image is."""
    yield from model_facts(model.hf_model)
    yield f"a sample picture: {prompt!r}"
    for site, tokens in prompt.sites.items():
        yield f"image tokens at the {site}: {_runs(prompt, site)}"
        if isinstance(tokens.grid, str):
            yield f"no grid at the {site}: {tokens.grid}"
            if not isinstance(tokens.pieces, str):
                yield f"pieces at the {site}: {', '.join(map(_piece_fact, tokens.pieces))}"
        else:
            yield f"grid at the {site}: {tokens.grid[0]} × {tokens.grid[1]}"


def sharing(model: LensModel) -> str:
    """Return whether questions about a picture can share what is read of it, or why not."""
    kind, reason = shared(model, None, "picture")
    if reason is None:
        return "yes"
    return f"by the vision tower only: {reason}" if kind == "tower" else f"no. {reason}"


def check(model: LensModel) -> str:
    """Return what ``check_family`` found.

    Raises:
        ModelCheckError: naming what does not fit.
    """
    moved = check_model(model.hf_model, model.prompt, model.name)
    return (
        "rows of every layer sum to 1, and hiding the image moves the logits by "
        f"{moved:.3g} or more"
    )


def refusals(model: LensModel, prompt: Prompt) -> Iterator[tuple[str, str | None]]:
    """Yield each registered method's name, and why the model refuses it; None if it applies.

    Found by answering with it, with its default parameters, in two tokens: greedily, or by the
    beam search that a method is. An error of the model's own code is a reason too, named as such;
    faults of the machine (see ``faults``) are raised.
    """
    for name, kind in METHODS.items():
        greedy = "greedy" in kind.decodings
        decoding = Greedy(max_new_tokens=2) if greedy else Beam(num_beams=2, max_new_tokens=2)
        try:
            generate(model, prompt, method=kind(), decoding=decoding)
        except ClvaLensError as error:
            yield name, str(error)
        except Exception as error:  # the model's code may raise anything
            if machine_fault(error) is not None:
                raise
            yield name, f"it does not run here ({type(error).__name__}: {first_line(error)})"
        else:
            yield name, None


def _piece_fact(piece: Piece) -> str:
    left, top, right, bottom = (round(edge) for edge in piece.box)
    kind = "thumbnail " if piece.thumbnail else ""
    return f"{kind}{piece.rows} × {piece.columns} over [{left}, {top}, {right}, {bottom}]"


def _runs(prompt: Prompt, site: str) -> str:
    """Return where the first sample's image tokens are, as ranges, at most four of them."""
    positions = prompt.spans_at(site).image[0].nonzero()[:, 0].tolist()
    runs = []
    for _, group in groupby(enumerate(positions), lambda pair: pair[1] - pair[0]):
        members = [position for _, position in group]
        runs.append(f"{members[0]}–{members[-1]}")
    more = f" and {len(runs) - 4} more stretches" if len(runs) > 4 else ""
    return f"{len(positions)} at positions {', '.join(runs[:4])}{more}"
