"""What ``clva-lens bench`` measures of a model: generation, prefill and passes, edited or not."""

import copy
import importlib.util
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from transformers import LlavaForConditionalGeneration, PreTrainedModel

from clva_lens.engine import bias as folding
from clva_lens.engine.bias import BiasForm
from clva_lens.experiments.speed.models import random_prompt
from clva_lens.experiments.speed.other_tools import mitigv_calls, saliency_calls
from clva_lens.experiments.speed.questions import ways_to_ask
from clva_lens.experiments.speed.rewriting import NAME, rewriting
from clva_lens.experiments.speed.sharing import other_ways_to_ask
from clva_lens.ground.errors import ParameterError
from clva_lens.lens.intervene import intervene, intervening
from clva_lens.lens.load import LensModel
from clva_lens.lens.trace import trace_attention
from clva_lens.methods.base import Method
from clva_lens.methods.clva import CLVA
from clva_lens.methods.imccd import IMCCD
from clva_lens.methods.vcd import VCD
from clva_lens.models.family import find_family
from clva_lens.toy import build

PAPER = "the paper's rewriting"


class Case(NamedTuple):
    """Something to measure, the case it is compared with, and its attention kernel."""

    name: str
    over: str
    kernel: str | dict[str, str]
    call: Callable[[], Any]


def cases_of(
    model: PreTrainedModel, new_tokens: int, batch: int = 1, only: Collection[str] | None = None
) -> list[Case]:
    """Return all cases of a model, or those named in ``only`` and what they are compared with.

    Raises:
        ParameterError: if there is no case of such a name.
    """
    handle = _handle(model)
    cases = generation_cases(model, handle, new_tokens, batch)
    cases += forward_cases(model, handle, batch)
    asking = [*ways_to_ask(handle), *other_ways_to_ask(handle)]
    cases += [Case(one.name, one.over, "sdpa", one.call) for one in asking]
    if only is None:
        return cases
    unknown = sorted(set(only) - {case.name for case in cases})
    if unknown:
        names = "; ".join(case.name for case in cases)
        raise ParameterError(f"there is no case {unknown[0]!r}. Pass some of: {names}.")
    wanted = {name for case in cases if case.name in only for name in (case.name, case.over)}
    return [case for case in cases if case.name in wanted]


@dataclass(frozen=True, eq=False)
class _Generation:
    """Generation from one prompt; what its methods return can be called and measured."""

    model: PreTrainedModel
    handle: LensModel
    options: dict[str, Any]
    new_tokens: int

    def plain(self, count: int | None = None) -> Callable[[], None]:
        """Return transformers' own, of all new tokens or ``count`` of them."""
        options: dict[str, Any] = self.options | {"max_new_tokens": count or self.new_tokens}
        length = options["input_ids"].shape[1] + options["max_new_tokens"]
        generate = cast(Any, self.model).generate

        def call() -> None:
            assert generate(**options).shape[1] == length, "it ended early"

        return call

    def edited(
        self, method: Method, count: int | None = None, form: BiasForm | None = None
    ) -> Callable[[], None]:
        """Return generation under a method, its bias in the form that fits best or in ``form``."""
        plain = self.plain(count)

        def call() -> None:
            forced = nullcontext() if form is None else folding.forced(form)
            with forced, intervening(self.model, method):
                plain()

        return call

    def rewritten(self, count: int | None = None) -> Callable[[], None]:
        """Return generation under CLVA as the paper does it."""
        plain = self.plain(count)
        image = self.options["input_ids"][0] == find_family(self.model).image_token_id(self.model)

        def call() -> None:
            with rewriting(self.model, image):
                plain()

        return call

    def traced(self, *methods: Method) -> Callable[[], None]:
        """Return generation in an nnsight trace, under methods if there are any."""

        def call() -> None:
            with self.handle.generate(**self.options) as tracer:
                if methods:
                    intervene(*methods)
                tracer.result.save()

        return call


def generation_cases(
    model: PreTrainedModel, handle: LensModel, new_tokens: int, batch: int
) -> list[Case]:
    """Return generation of ``new_tokens`` tokens and of one ("prefill"), plain and edited.

    CLVA is as the model's family has it; the forms of its bias (engine/bias.py) and the rewriting
    of whole patterns (rewriting.py) are measured in the decoder, where the prompt is long.
    """
    for part in (model, getattr(model, "language_model", model)):
        part.generation_config.eos_token_id, part.generation_config.pad_token_id = None, 0
    options = {
        **random_prompt(model, batch).inputs,
        "max_new_tokens": new_tokens,
        "do_sample": False,
    }
    run = _Generation(model, handle, options, new_tokens)
    plain, edited, rewritten, traced = run.plain, run.edited, run.rewritten, run.traced
    decoder, paper = CLVA(site="decoder"), {"text_config": NAME}
    theirs = mitigv_calls(model, random_prompt(model, batch), new_tokens)
    forms: tuple[BiasForm, ...] = ("masked", "split", "folded")
    return [
        Case("generate", "generate", "sdpa", plain()),
        Case("generate, CLVA", "generate", "sdpa", edited(CLVA())),
        Case("generate, CLVA of the prompt", "generate", "sdpa", edited(CLVA(refresh="prompt"))),
        Case("generate, nnsight", "generate", "sdpa", traced()),
        Case("generate, nnsight, CLVA", "generate", "sdpa", traced(CLVA())),
        Case("generate, eager", "generate", "eager", plain()),
        Case("generate, eager, CLVA", "generate, eager", "eager", edited(CLVA())),
        Case(f"generate, {PAPER}", "generate", paper, rewritten()),
        Case("generate, VCD", "generate", "sdpa", edited(VCD())),
        *(Case(name, "generate", "sdpa", call) for name, call in theirs.items()),
        Case("generate, IMCCD", "generate", "sdpa", edited(IMCCD())),
        Case("prefill", "prefill", "sdpa", plain(1)),
        Case("prefill, CLVA", "prefill", "sdpa", edited(CLVA(), 1)),
        *(
            Case(f"prefill, CLVA {form}", "prefill", "sdpa", edited(decoder, 1, form))
            for form in forms
        ),
        Case(f"prefill, {PAPER}", "prefill", paper, rewritten(1)),
    ]


def forward_cases(model: PreTrainedModel, handle: LensModel, batch: int) -> list[Case]:
    """Return one forward pass: plain, traced, and with every pattern or activation kept."""
    prompt = random_prompt(model, batch)
    options: dict[str, Any] = {**prompt.inputs, "logits_to_keep": 1}
    every: dict[str, Any] = {**options, "output_attentions": True}
    cases = [
        Case("forward", "forward", "sdpa", lambda: model(**options)),
        Case("forward, no cache", "forward", "sdpa", lambda: model(**options, use_cache=False)),
        Case("trace_attention", "forward", "sdpa", lambda: trace_attention(model, prompt)),
        Case("output_attentions", "forward", "eager", lambda: model(**every)),
    ]
    cases += [
        Case(name, "forward", "eager", call)
        for name, call in saliency_calls(model, handle, prompt).items()
    ]
    # There is no bridge of theirs for other families.
    if isinstance(model, LlavaForConditionalGeneration) and importlib.util.find_spec(
        "transformer_lens"
    ):
        from clva_lens.lens.bridge import to_transformer_lens

        bridge = to_transformer_lens(model)
        inputs = bridge.inputs(prompt)
        cases += [
            Case("run_with_cache", "forward", "sdpa", lambda: handle.run_with_cache(prompt)),
            Case(
                "TransformerLens' run_with_cache",
                "forward",
                "sdpa",
                lambda: bridge.run_with_cache(**inputs),
            ),
        ]
    return cases


def _handle(model: PreTrainedModel) -> LensModel:
    """Return an nnsight handle of a copy that shares the weights: a wrapped model is slower."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    handle = LensModel(copy.deepcopy(model, shared), build.processor(), "bench")
    handle.hf_model.set_attn_implementation("sdpa")
    return handle
