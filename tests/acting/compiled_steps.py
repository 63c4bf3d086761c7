"""Compiled decoding measured: run as a script, since the suite's type checks cannot be traced."""

import json
import sys
from functools import cache
from typing import Any

import torch
from torch._dynamo.testing import CompileCounterWithBackend

import clva_lens as cl
from clva_lens.lens import compiled
from clva_lens.lens.decoding import Watch
from clva_lens.lens.load import LensModel
from tests.tiny_models import QUESTIONS, make_processor, picture, tiny_model

NEW = 8
ASKED = [(picture(0), QUESTIONS[1]), (picture(1), QUESTIONS[2])]  # the first is padded
OTHERS = [(picture(2), QUESTIONS[0]), (picture(3), QUESTIONS[1])]  # shorter
# Methods, and the kernel they are asked with.
METHODS: dict[str, tuple[Any, str]] = {
    "none": (None, "sdpa"),
    "clva": (cl.CLVA(), "eager"),
    "knockout": (cl.KnockOut(), "sdpa"),
    "clearsight of the paper": (cl.ClearSight(variant="paper"), "sdpa"),
    "clva and pai": (cl.compose(cl.CLVA(), cl.PAI()), "sdpa"),
}


@cache
def lens(kernel: str = "sdpa") -> LensModel:
    # Beside grouped heads transformers calls the fused kernel in another way where it compiles.
    heads = "grouped" if kernel == "eager" else "full"
    model = tiny_model(heads, kernel, num_hidden_layers=6)
    return cl.load((model, make_processor()))


class Kept:
    """The logits that a run is shown."""

    def __init__(self) -> None:
        self.logits: list[torch.Tensor] = []
        look = Watch.look

        def keep(watch: Watch, last: torch.Tensor) -> None:
            self.logits.append(last)
            look(watch, last)

        setattr(Watch, "look", keep)  # noqa: B010


@torch.no_grad()
def on_static_cache(model: LensModel, method: Any) -> torch.Tensor:
    """Return the logits of transformers' own generation in the ordinary, uncompiled run."""
    found: Any = model.hf_model
    images, questions = zip(*ASKED, strict=True)
    with cl.intervening(model, method):
        out = found.generate(
            **model.prompt(list(images), list(questions)),
            cache_implementation="static",
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
            disable_compile=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.stack(out.logits)


def measured(name: str, kept: Kept) -> dict[str, Any]:
    """Return what one method gives, compiled and not."""
    method, kernel = METHODS[name]
    model, greedy = lens(kernel), cl.Greedy(max_new_tokens=NEW)
    counter = CompileCounterWithBackend("eager")
    compiled.COMPILING = {"backend": counter}
    compiled.ROOM = 1  # a cache as long as transformers' own
    kept.logits.clear()
    found = cl.generate(model, ASKED, method, greedy, compiled=True)
    logits, graphs = torch.stack(kept.logits), counter.frame_count
    usual = cl.generate(model, ASKED, method, greedy)
    plain = on_static_cache(model, None)
    return {
        "graphs": (graphs, len(counter.graphs)),
        "steps": len(logits) - 1,
        "ids": [one.tolist() for one in found.ids],
        "usual": [one.tolist() for one in usual.ids],
        "error": float((logits - on_static_cache(model, method)).abs().max()),
        "effect": float((logits - plain).abs().max()),
    }


def shared() -> list[Any]:
    """Return the graphs after prompts of one length and of another, and an answer that ends."""
    counter, model = CompileCounterWithBackend("eager"), lens()
    compiled.COMPILING, compiled.ROOM = {"backend": counter}, 64
    graphs, answers = [], []
    greedy = cl.Greedy(max_new_tokens=NEW)
    for asked in (ASKED, OTHERS):
        found = cl.generate(model, asked, cl.CLVA(), greedy, compiled=True)
        graphs.append(counter.frame_count)
    end = int(found.ids[0][2])
    model.hf_model.generation_config.eos_token_id = end
    for both in (True, False):
        answers.append(cl.generate(model, OTHERS, cl.CLVA(), greedy, compiled=both).ids)
    return [graphs, [[one.tolist() for one in ids] for ids in answers]]


if __name__ == "__main__":
    made = Kept()
    json.dump({**{name: measured(name, made) for name in METHODS}, "shared": shared()}, sys.stdout)
