"""TransformerLens over the same weights: ``to_transformer_lens``.

TransformerLens' own loader, ``boot_transformers``, runs ``pip install torchvision`` when it cannot
make a processor, which replaces torch. It is not used here: the bridge is built around a model that
is loaded already, and its processor and tokenizer are attached afterwards. Nothing is installed,
downloaded or read from disk.
"""

import copy
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from clva_lens.ground.axes import TokenSpans
from clva_lens.ground.errors import InterventionError, ModelLoadError
from clva_lens.methods.bridge_hooks import asked_tensors, image_token_id, prompt_spans
from clva_lens.models.family import matching_family, transformers_model
from clva_lens.models.kv_cache import CACHE, OLD
from clva_lens.models.prompt import Asked
from clva_lens.models.transformerlens import transformer_lens


def to_transformer_lens(model: Any, *, processor: Any = None) -> Any:
    """Return a ``TransformerBridge`` over the weights of ``model``, which stays as it is.

    ``model`` is what ``cl.load`` returned, or a transformers model of any architecture with image
    tokens that TransformerLens has an adapter for; with the latter, ``processor`` may be given.
    Modules are copied and weights are not: the bridge's parameters lie in the same memory.
    TransformerLens' ``enable_compatibility_mode()`` makes its own weights and leaves these.

    Three things are added to the bridge: ``bridge.prompt(image, question)`` is that of the model
    (if it was loaded with ``cl.load``); ``bridge.inputs(prompt)`` are the arguments to call it
    with, ``bridge(**bridge.inputs(prompt))``, also for ``run_with_hooks``, ``run_with_cache`` and
    ``generate``; and ``bridge.spans(prompt)`` are its ``TokenSpans``. Both take a processor's
    output or (image, question) too.

    Raises:
        ModelLoadError: if TransformerLens has no adapter for the model, or lacks torchvision for
            it, or the model has no image tokens.
        InterventionError: if the model is in a run.

    >>> cl.to_transformer_lens(model).cfg.n_layers
    12
    """
    found = _transformers_model(model)
    architecture = type(found).__name__
    lens = transformer_lens()
    if architecture not in lens.adapters:
        family = matching_family(found)
        known = f" (model family '{family.name}')" if family else ""
        suffix = "ForConditionalGeneration"
        has = sorted(name.removesuffix(suffix) for name in lens.multimodal & lens.adapters)
        raise ModelLoadError(
            f"TransformerLens has no adapter for {architecture}{known}, so there is no bridge; it "
            f"has adapters for {', '.join(has)}. Load one of these, or use nnsight: "
            "cl.intervene() and cl.observe() inside 'with model.trace(prompt):'."
        )
    image_token_id(found)
    processor = getattr(model, "processor", None) if processor is None else processor
    bridge = _build(lens.build, found, architecture)
    _name_the_cache(bridge, lens.editable)
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is not None:
        # TransformerLens would read it from its folder or the Hub again to have it write a BOS.
        bridge.tokenizer = copy.deepcopy(tokenizer)
        told = lens.detect_bos_eos(bridge.tokenizer)
        bridge.cfg.tokenizer_prepends_bos, bridge.cfg.tokenizer_appends_eos = told
    bridge.processor = processor
    _attach(bridge, found, getattr(model, "prompt", None))
    return bridge


def _transformers_model(model: Any) -> PreTrainedModel:
    """Return the transformers model behind a handle; it may be of no known family."""
    module = getattr(model, "_module", model)
    return module if isinstance(module, PreTrainedModel) else transformers_model(model)


def _build(build: Any, model: PreTrainedModel, architecture: str) -> Any:
    double = _double(model)
    try:
        return build(
            double, architecture, hf_config=double.config, model_name=model.name_or_path or "model"
        )
    except ImportError as error:
        raise ModelLoadError(
            f"TransformerLens' adapter for {architecture} needs a package that is not installed "
            f"({str(error).split('. ')[0]}). Install the version of it that was made for your "
            "torch, from the index that torch came from; another one would replace torch."
        ) from error


def _name_the_cache(bridge: Any, editable: tuple[type, ...]) -> None:
    """Give the cache to transformers and to TransformerLens' attention under the name each knows.

    Attention that does not find it would read the newest tokens alone, without an error.
    """
    if CACHE == OLD:
        return

    def rename(old: str, new: str) -> Any:
        def hook(_: nn.Module, args: Any, given: dict[str, Any]) -> Any:
            return args, {new if name == old else name: one for name, one in given.items()}

        return hook

    bridge.original_model.register_forward_pre_hook(rename(OLD, CACHE), with_kwargs=True)
    for part in bridge.modules():
        if isinstance(part, editable):
            part.register_forward_pre_hook(rename(CACHE, OLD), with_kwargs=True)


def _double(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model's modules once more, over the same tensors.

    TransformerLens replaces submodules and switches to eager attention. Parameters are new objects
    over the same memory, so that ``bridge.to(...)`` or a gradient does not reach the model.
    """
    for part in model.modules():
        config = getattr(part, "config", None)
        if str(getattr(config, "_attn_implementation", "")).startswith("clva_"):
            raise InterventionError(
                "the model is in a run of clva_lens, so it cannot be copied. Make the bridge "
                "outside 'with cl.intervening(...)' and of a trace."
            )
    shared: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter
        shared[id(parameter)] = (
            nn.Parameter(parameter.detach(), parameter.requires_grad) if plain else parameter
        )
    return copy.deepcopy(model, shared)


def _attach(bridge: Any, model: PreTrainedModel, prompt: Any) -> None:
    def inputs(prompt: Asked) -> dict[str, Tensor]:
        """Return a prompt as the arguments of the bridge, whose first one is called ``input``."""
        given = asked_tensors(bridge, prompt)
        return {"input" if name == "input_ids" else name: given[name] for name in given}

    def spans(prompt: Asked) -> TokenSpans:
        """Return which positions of a prompt are image, text and so on."""
        return prompt_spans(model, asked_tensors(bridge, prompt))

    bridge.inputs, bridge.spans = inputs, spans
    if prompt is not None:
        bridge.prompt = prompt
