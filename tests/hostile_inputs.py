"""Hostile inputs by the thousand, through every door; counts what came of them.

``python tests/hostile_inputs.py [seed] [share]`` prints a table: each input's outcome is **equal**
(to an expectation that is worked out without clva_lens), **refused** (one of its errors), **bare**
(any other exception) or **different** (another result, or one where a refusal was due). The last
two are faults, and are listed. ``share`` scales the numbers of inputs. It is no test of pytest's.
"""

import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile_doors import REFUSAL, Case, World, a_picture, a_text, an_edited_prompt
from hostile_settings import a_checkpoint, a_decoding, a_method, a_place
from transformers.utils import logging

import clva_lens as cl
from clva_lens.ground.errors import ClvaLensError
from clva_lens.toy.scenes import render, sample_scenes

DOORS: dict[str, tuple[Callable[[random.Random, World], Case], int]] = {
    "pictures": (a_picture, 900),
    "texts": (a_text, 500),
    "edited prompts": (an_edited_prompt, 400),
    "decodings": (a_decoding, 200),
    "methods": (a_method, 400),
    "heads": (a_place, 150),
    "checkpoints": (a_checkpoint, 150),
}


def main(seed: int = 0, share: float = 1.0) -> int:
    """Run all doors, print the counts and the faults; return their number."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        toys = tuple(
            (cl.load(name), cl.load(name, attn_implementation="eager", check=False))
            for name in ("toy-llava", "toy-instructblip")
        )
        image = np.array(render(sample_scenes(1, seed=7)[0]))
        world = World(toys, image, Path(folder))
        before = [one.sum().item() for toy, _ in toys for one in toy.hf_model.parameters()]
        total: Counter = Counter()
        for door, (made, count) in DOORS.items():
            counted, bad, began = Counter(), [], time.perf_counter()
            draws = random.Random(f"{seed} {door}")
            for _ in range(round(count * share)):
                case = made(draws, world)
                outcome, said = outcome_of(case)
                counted[outcome] += 1
                if outcome in ("bare", "different"):
                    bad.append(f"    {outcome}: {case.name}: {said}")
            total += counted
            show(door, counted, time.perf_counter() - began)
            print("\n".join(bad), flush=True) if bad else None
            faults += len(bad)
        show("all", total, 0)
        after = [one.sum().item() for toy, _ in toys for one in toy.hf_model.parameters()]
        print("the models are as they were" if before == after else "A MODEL HAS CHANGED")
    return faults + (before != after)


def show(door: str, counted: Counter, seconds: float) -> None:
    """Print one line of the table."""
    kinds = ("equal", "refused", "bare", "different")
    told = ", ".join(f"{counted[kind]} {kind}" for kind in kinds)
    print(f"{door}: {sum(counted.values())} inputs: {told} ({seconds:.0f} s)", flush=True)


def outcome_of(case: Case) -> tuple[str, str]:
    """Run one input; return what came of it, and the fault in words."""
    try:
        found = case.call()
    except ClvaLensError as error:
        whole = len(str(error)) > 30
        return ("refused", "") if whole else ("bare", f"no sentence: {error}")
    except Exception as error:  # what is looked for
        return "bare", f"{type(error).__name__}: {str(error)[:160]!r}"
    try:
        wanted = case.expected()
    except Exception as error:  # outside software refuses it
        return "different", f"was accepted, but {type(error).__name__}: {str(error)[:120]!r}"
    if wanted is REFUSAL:
        return "different", f"was accepted: {str(found)[:80]}"
    return (
        ("equal", "") if same(found, wanted) else ("different", f"{found!s:.80} != {wanted!s:.80}")
    )


def same(found: Any, wanted: Any) -> bool:
    """Whether two results agree; numbers to 1e-3, and to 1e-7 of what is above 10,000."""
    if isinstance(wanted, torch.Tensor):
        if found.shape != wanted.shape:
            return False
        gap, large = (found.double() - wanted.double()).abs(), float(wanted.abs().max())
        return bool((gap <= 1e-3 * max(1.0, large / 1e4)).all())
    if isinstance(wanted, list | tuple):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    if isinstance(wanted, float):
        return abs(found - wanted) <= 1e-3
    return found == wanted


if __name__ == "__main__":
    given = [float(one) for one in sys.argv[1:]]
    sys.exit(main(*(int(one) if i == 0 else one for i, one in enumerate(given))) > 0)
