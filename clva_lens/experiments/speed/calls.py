"""What a method adds to a pass, counted: Python calls, calls into C, and operators of torch.

Seconds of a short prompt are noise, and on a GPU a decoding step is mostly such calls. They are
counted in the pass that reads a prompt, and in that of a token that is generated.
"""

import gc
import sys
from collections import Counter
from types import FrameType
from typing import Any, Literal, NamedTuple, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from clva_lens.experiments.speed.models import random_llava, random_prompt
from clva_lens.lens.intervene import intervening
from clva_lens.methods.ablation import AblateHeads
from clva_lens.methods.base import Method, MethodLike
from clva_lens.methods.clearsight import ClearSight
from clva_lens.methods.clva import CLVA
from clva_lens.methods.knockout import KnockOut
from clva_lens.methods.memvr import MemVR
from clva_lens.methods.pai import PAI

Pass = Literal["prefill", "step"]

# A step is what the last of so many tokens takes; earlier ones make room for those to come.
TOKENS = 4

COUNTED: dict[str, Method] = {
    "CLVA": CLVA(),
    "CLVA of the prompt": CLVA(refresh="prompt"),
    "KnockOut": KnockOut(),
    "ClearSight": ClearSight(),
    "PAI": PAI(),
    "AblateHeads": AblateHeads(heads={layer: [0] for layer in range(16, 32)}),
    "MemVR": MemVR(),
}
"""What is counted beside the plain model, by the name of its rows."""


class Function(NamedTuple):
    """What is called: a "python" or "c" function, or an "operator"."""

    kind: str
    name: str


class Calls(Counter[Function]):
    """How often each function is called; fewer than 0 where a method saves some."""

    def of(self, *kinds: str) -> int:
        """Return the number of calls of some kinds."""
        return sum(times for function, times in self.items() if function.kind in kinds)

    def less(self, other: "Calls") -> "Calls":
        """Return how many more these are than others, by function."""
        more = Calls(self)
        more.subtract(other)
        return Calls({function: times for function, times in more.items() if times})

    @property
    def python_and_c(self) -> int:
        """Calls of Python and of C functions together."""
        return self.of("python", "c")

    @property
    def operators(self) -> int:
        """Operators of torch, as its dispatcher sees them."""
        return self.of("operator")


def extra_calls(model: PreTrainedModel, method: MethodLike) -> dict[Pass, Calls]:
    """Return what a method adds to the pass that reads a random prompt, and to a decoding step."""
    plain, edited = pass_calls(model), pass_calls(model, method)
    return {name: edited[name].less(plain[name]) for name in plain}


def pass_calls(model: PreTrainedModel, *methods: MethodLike) -> dict[Pass, Calls]:
    """Return what a random prompt and a decoding step take, under methods if there are any."""
    _generation(model, methods, 1)  # what is made once, at the first call
    steps = _generation(model, methods, TOKENS).less(_generation(model, methods, TOKENS - 1))
    return {"prefill": _generation(model, methods, 1), "step": steps}


@torch.inference_mode()
def _generation(model: PreTrainedModel, methods: tuple[MethodLike, ...], tokens: int) -> Calls:
    """Return the calls of a greedy generation, without those that open the run."""
    options = {**random_prompt(model).inputs, "max_new_tokens": tokens, "do_sample": False}
    options |= {"eos_token_id": None, "pad_token_id": 0}
    calls, generate = Calls(), cast(Any, model).generate

    def profile(frame: FrameType, event: str, function: Any) -> None:
        if event == "call":
            calls[Function("python", frame.f_code.co_qualname)] += 1
        elif event == "c_call":
            calls[Function("c", function.__qualname__)] += 1

    with intervening(model, *methods):
        gc.collect()
        gc.disable()  # what is freed calls functions too
        sys.setprofile(profile)
        try:
            generate(**options)
        finally:
            sys.setprofile(None)
            gc.enable()
        with _Operators(calls):
            generate(**options)
    return calls


def counted_model() -> PreTrainedModel:
    """Return the model whose calls are reported: as deep as a 7B one; width takes no calls."""
    model = random_llava(32, 16, 4, 36)
    model.set_attn_implementation("sdpa")
    return model


class _Operators(TorchDispatchMode):
    """Counts the operators that run inside it."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count one operator, and run it."""
        self.calls[Function("operator", str(func))] += 1
        return func(*args, **(kwargs or {}))
