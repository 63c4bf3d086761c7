"""What other tools do on the same model and prompt, where they are installed."""

import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from clva_lens.lens.load import LensModel
from clva_lens.models.prompt import Prompt


class GivenInputs:
    """A processor for mitigv that returns inputs which were made before, and keeps tokens apart.

    It has no end token, so that every answer has as many tokens.
    """

    def __init__(self, prompt: Prompt) -> None:
        """Keep what it returns."""
        self.inputs = dict(prompt.inputs)

    def __call__(self, **_: Any) -> dict[str, Tensor]:
        """Return the inputs."""
        return dict(self.inputs)

    def batch_decode(self, tokens: Tensor, **_: Any) -> list[str]:
        """Return the tokens of each row as numbers."""
        return [" ".join(map(str, row)) for row in tokens.tolist()]


def mitigv_calls(
    model: PreTrainedModel, prompt: Prompt, new_tokens: int
) -> dict[str, Callable[[], Any]]:
    """Return mitigv's generation under VCD, and in its own loop without it, by case.

    Its VCD has the paper's cut-off and noise by default; what it costs does not depend on them.
    Without contrast and cut-off its loop is greedy decoding. Empty where it is not installed.
    """
    if not isinstance(model, LlavaForConditionalGeneration) or not importlib.util.find_spec(
        "mitigv"
    ):
        return {}
    from mitigv.algorithms.vcd import VCD, VCDConfig  # type: ignore[import-not-found]
    from mitigv.backends.llava import LlavaModelAdapter  # type: ignore[import-not-found]

    def under(**strengths: float) -> Callable[[], Any]:
        config = VCDConfig(max_new_tokens=new_tokens, **strengths)
        theirs = VCD(model=LlavaModelAdapter(model), processor=GivenInputs(prompt), config=config)
        return lambda: theirs.generate(None, "")

    return {"generate, mitigv's VCD": under(), "generate, mitigv": under(alpha=0.0, beta=0.0)}


def saliency_calls(
    model: PreTrainedModel, handle: LensModel, prompt: Prompt
) -> dict[str, Callable[[], Any]]:
    """Return vl-saliency's capture of all attention, by case; empty where it is not installed."""
    if not isinstance(model, LlavaForConditionalGeneration) or not importlib.util.find_spec(
        "vl_saliency"
    ):
        return {}
    from vl_saliency import SaliencyExtractor  # type: ignore[import-not-found]

    theirs = SaliencyExtractor(model, handle.processor, store_grads=False)
    given = {**prompt.inputs}
    return {"vl-saliency's capture": lambda: theirs.capture(None, **given)}
