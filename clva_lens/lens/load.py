"""``load()``: a model by toy name, Hub id, folder or as it is, with everything a prompt needs."""

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cloudpickle import list_registry_pickle_by_value, unregister_pickle_by_value
from nnsight.modeling.transformers import TransformersModel
from nnsight.ndif import pull_env
from transformers import PreTrainedModel

from clva_lens.ground.errors import (
    ClvaLensError,
    ModelLoadError,
    ParameterError,
    PromptError,
)
from clva_lens.ground.registry import known_as
from clva_lens.lens.cache import CachedRun, NamesFilter, run_with_cache
from clva_lens.lens.check import check_model
from clva_lens.lens.checkpoint import check_finite
from clva_lens.lens.reading import first_line, read_named
from clva_lens.lens.summary import model_facts
from clva_lens.methods.base import MethodLike
from clva_lens.models.family import ModelFamily, Site, find_family
from clva_lens.models.pictures import ImageLike, as_lists, read_image
from clva_lens.models.pieces import Given
from clva_lens.models.prompt import Asked, Prompt, prompt_of
from clva_lens.models.wording import check_words, conversation, texts_of
from clva_lens.toy import pretrained

PACKAGE = __name__.partition(".")[0]
DEVICE, DTYPE = "CLVA_LENS_DEVICE", "CLVA_LENS_DTYPE"
"""Environment variables: the device and dtype of models that are loaded without any being named."""


class LensModel(TransformersModel):
    """An nnsight model with its family: ``prompt`` makes what ``trace`` and ``generate`` run on.

    The transformers model itself is ``hf_model``; ``family`` and ``name`` say what it is.
    """

    def __init__(
        self, model: PreTrainedModel, processor: Any, name: str, revision: str | None = None
    ) -> None:
        """Wrap a loaded model and its processor; ``revision`` is the commit of its files."""
        with warnings.catch_warnings():
            # A Q-Former has submodules called "output", which nnsight serves as "E_output".
            warnings.filterwarnings("ignore", "Module '.*' has a submodule named 'output'")
            super().__init__(
                model,
                task="image-text-to-text",
                processor=processor,
                tokenizer=getattr(processor, "tokenizer", processor),
            )
        self.processor = processor
        self.name, self.revision = name, revision
        self.family: ModelFamily = find_family(model)

    def __repr__(self) -> str:
        """Return what ``clva-lens check-model`` says first; ``print(model)`` shows all modules."""
        return "\n  ".join([f"LensModel '{self.name}':", *model_facts(self.hf_model)])

    def __str__(self) -> str:
        """Return nnsight's tree of the modules."""
        return super().__repr__()

    @property
    def hf_model(self) -> PreTrainedModel:
        """The transformers model."""
        assert isinstance(self._module, PreTrainedModel)
        return self._module

    @property
    def words(self) -> Any:
        """The tokenizer."""
        return self.tokenizer

    @property
    def images(self) -> Any:
        """The image processor."""
        return getattr(self.processor, "image_processor", None)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The places of attention; the first is the one that methods act on by default."""
        return self.family.sites(self.hf_model)

    @property
    def site(self) -> Site:
        """The attention that methods read and edit by default."""
        return self.sites[0]

    @property
    def num_layers(self) -> int:
        """The number of layers of the stack that the site is in."""
        return self.site.depth

    def _remoteable_model_key(self) -> str:
        """Refuse ``remote=True``, for which nnsight asks for this."""
        raise ModelLoadError(
            f"remote=True sends a trace to a server, which does not know '{self.name}' with its "
            "family and processor. Leave remote= out to run here, or trace nnsight's own handle, "
            "TransformersModel('HUB ID'), in which cl.intervene and cl.observe work too, on a "
            "server that has clva_lens installed (docs/nnsight.md)."
        )

    def _remote_backend(self, *args: Any, **kwargs: Any) -> Any:
        """Send clva_lens by name: nnsight takes an editable install for a module of the user's.

        Such modules are sent by value, in which module state (context variables, locks) fails.
        """
        pull_env()
        if PACKAGE in list_registry_pickle_by_value():
            unregister_pickle_by_value(sys.modules[PACKAGE])
        return super()._remote_backend(*args, **kwargs)

    def prompt(
        self,
        image: ImageLike | Sequence[ImageLike],
        question: str | Sequence[str],
        *,
        system: str | None = None,
        turns: Sequence[Any] = (),
        answer: str | None = None,
        background: str | None = "white",
        processor: Any = None,
    ) -> Prompt:
        """Return the prompt that asks ``question`` about ``image``; lists make a batch.

        Batches are padded on the left. ``system`` is the system message: None leaves the model's
        own, "" leaves it out. ``turns`` were said before, in each prompt of a batch: (question,
        answer) pairs, (picture, question, answer) where the model takes several pictures, or chat
        messages. Without pictures there, the picture comes first. The model continues ``answer``.
        ``background`` is the colour behind what is transparent; None takes the stored one.
        ``processor`` takes the place of the model's own.

        Raises:
            PromptError: if an image cannot be read, a text is empty or has a control token, lists
                differ in length, or there is no place for the turns, the answer or so many tokens.
            ParameterError: if the background is no opaque colour.
        """
        images, questions, batched = as_lists(image, question, background)
        processor = self.processor if processor is None else processor
        placeholder = str(getattr(processor, "image_token", "<image>"))
        for text in questions:
            if placeholder in text:
                raise PromptError(
                    f"the question contains '{placeholder}', which stands for an image. Leave it "
                    "out: the image is put before the question."
                )
        model, family = self.hf_model, self.family
        shown: list[Any] = list(images)
        made = [conversation(turns, text) for text in questions] if turns else []
        said = [text for messages, _ in made for text in texts_of(messages)] or questions
        check_words(processor, said if answer is None else [*said, answer], system)
        if turns:
            texts = [family.converse(processor, messages, system) for messages, _ in made]
            before = [read_image(one, background) for one in made[0][1]]
            shown = [[*before, image] for image in images] if before else shown
        else:
            texts = [family.ask(processor, text, system) for text in questions]
        if answer is not None:
            texts = [family.begin(text, answer) for text in texts]
        inputs = family.encode(model, processor, shown, texts)
        if answer is not None:
            family.check_begun(processor, texts, inputs)
        rows = tuple(tuple(row) if isinstance(row, list) else (row,) for row in shown)
        return prompt_of(
            model,
            inputs,
            Given(processor, rows, tuple(texts)),
            batched=batched,
            images=tuple(images),
            questions=tuple(questions),
            system=system,
        )

    def run_with_cache(
        self,
        prompt: Asked,
        names_filter: NamesFilter = None,
        *,
        method: MethodLike | None = None,
    ) -> CachedRun:
        """Return (logits, ``transformer_lens.ActivationCache``) of one forward pass.

        Names and axes are TransformerLens': ``blocks.{i}.hook_resid_pre|mid|post``,
        ``.hook_attn_out``, ``.hook_mlp_out``, ``.attn.hook_q|k|v|z`` [batch, pos, head, d_head]
        (``rot_q|rot_k`` after the rotary embedding), ``.attn.hook_pattern|attn_scores`` [batch,
        head, query_pos, key_pos], ``.attn.hook_result``, ``.ln1|ln2.hook_scale|normalized``,
        ``.mlp.hook_pre|post``, ``hook_embed``, ``ln_final.hook_scale|normalized``. The vision
        tower has the same under ``vision.``, the Q-Former under ``qformer.``, where
        ``cross_attn`` reads the picture. ``hook_embed`` is what enters the first layer, with the
        picture's features in their places.

        ``names_filter`` is a name, a list of names or a function of a name, and nothing else is
        kept; None keeps all but patterns, scores and results. Patterns and scores are float32 and
        show the attention under ``method`` and under interventions that are open; rows of padding
        are meaningless. No gradients are kept.

        Raises:
            UnknownName: if ``names_filter`` has a name that the model does not.
            ParameterError: if ``names_filter`` selects nothing, or is of another kind.
            ModelLoadError: if nobody wrote the names of this model down.
            InterventionError: inside a trace, or if attention is asked for and its kernel cannot
                be intercepted.
        """
        return run_with_cache(self, prompt, names_filter, method)


def load(
    model: str | Path | tuple[Any, Any],
    *,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    check: bool = True,
    trust_remote_code: bool = False,
    **options: Any,
) -> LensModel:
    """Load a vision-language model: a toy name, a Hub id, a folder, or (hf_model, processor).

    ``dtype``, ``device_map``, ``attn_implementation`` and ``options`` go to ``from_pretrained``;
    toys are float32 unless ``dtype`` says otherwise. The environment variables CLVA_LENS_DEVICE and
    CLVA_LENS_DTYPE stand for these two where they are None. Only safetensors are read, but for
    Qwen-VL, published as pickles and converted here (``clva_lens.models.qwen.convert``). ``check``
    runs short forward passes that prove that attention can be read and edited (``check_family``),
    that question and picture reach the model (``check_asked``), and that no weight is NaN.
    ``revision``, ``cache_dir``, ``token`` and ``subfolder`` hold for weights, configuration and
    processor alike. ``model`` may hold a PEFT model; its adapters stay active.
    ``trust_remote_code`` must stay False: code of a model repository is never run.

    Raises:
        ModelLoadError: if there is no such model, it has no safetensors weights or no processor,
            needs remote code, or belongs to no known family; if weights are missing, left over,
            of another shape or not finite; or if its files lead elsewhere, or cannot be read.
        ParameterError: if this machine does not have the device.
        ModelCheckError: if the check fails.
        PromptError: if its processor does not make a prompt of a picture and a question.

    >>> model = cl.load("toy-llava")
    >>> model.num_layers, model.site.name
    (12, 'decoder')
    """
    if trust_remote_code:
        raise ModelLoadError(
            "trust_remote_code=True was passed, but clva_lens never runs code from a model "
            "repository. Load the model yourself, and pass (hf_model, processor)."
        )
    if not isinstance(model, tuple):
        dtype = os.environ.get(DTYPE) if dtype is None else dtype
        device_map = os.environ.get(DEVICE) if device_map is None else device_map
    given = {"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation}
    given = {option: value for option, value in given.items() if value is not None} | options
    if isinstance(model, tuple):
        hf_model, processor = _pair(model, given)
        revision = getattr(hf_model.config, "_commit_hash", None)
        name = hf_model.name_or_path or type(hf_model).__name__
    else:
        name = str(model)
        if not Path(name).is_dir():
            name = known_as(name, pretrained.names()) or name
        check_device(device_map, options.get("device"))
        with _in_words(f"the model '{name}' could not be loaded", ModelLoadError):
            hf_model, processor, revision = read_named(name, given)
    with _in_words(f"'{name}' is no model to look inside", ModelLoadError):
        _require_usable(hf_model, processor, name)
        lens = LensModel(hf_model.eval(), processor, name, revision)
    if check:
        check_finite(hf_model, name)
        check_model(lens.hf_model, lens.prompt, name)
    return lens


@contextmanager
def _in_words(what: str, kind: type[ClvaLensError]) -> Iterator[None]:
    """Turn whatever goes wrong in the block into one of our errors, with its cause."""
    try:
        yield
    except ClvaLensError:
        raise
    except Exception as error:  # a broken file may raise anything
        remedy = (
            "Check the name, and that its files are whole and of one image-text-to-text model with "
            "safetensors weights; without a network, pass a local folder."
        )
        if any(word in str(error) for word in ("attn_implementation", "FlashAttention", "flash_a")):
            remedy = "Pass attn_implementation='sdpa', or 'eager', which are always there."
        raise kind(f"{what}: {first_line(error)} {remedy}") from error


def check_device(device_map: Any, device: Any = None) -> None:
    """Refuse a device that this machine does not have, before anything is read.

    Raises:
        ParameterError: naming it; or if it has the name that ``from_pretrained`` does not know.
    """
    if device is not None:
        raise ParameterError(
            f"device={device!r} was passed, but load() takes it as from_pretrained does. Pass "
            f"device_map={device!r}."
        )
    named = device_map.values() if isinstance(device_map, dict) else [device_map]
    for device in named:
        if device is None or device in ("auto", "balanced", "balanced_low_0", "sequential", "disk"):
            continue
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, TypeError) as error:
            raise ParameterError(
                f"the device {str(device)!r} cannot be used here: {first_line(error)} Pass "
                "device_map='cpu' (--device cpu), or one that torch finds."
            ) from error


def _pair(model: tuple[Any, ...], options: dict[str, Any]) -> tuple[PreTrainedModel, Any]:
    """Return a loaded model and its processor; a PEFT model as what its adapters act in."""
    if len(model) == 2 and hasattr(model[0], "get_base_model"):
        if any(one.is_prompt_learning for one in model[0].peft_config.values()):
            raise ModelLoadError(
                f"the adapter of this {type(model[0]).__name__} puts virtual tokens before the "
                "prompt, which the model itself does not have. Use one that changes weights, such "
                "as LoRA."
            )
        model = (model[0].get_base_model(), model[1])
    if len(model) != 2 or not isinstance(model[0], PreTrainedModel):
        raise ModelLoadError(
            "a tuple must be (hf_model, processor) with a transformers model first. Pass "
            "cl.load((hf_model, processor))."
        )
    unused = [option for option, value in options.items() if value is not None]
    if unused:
        raise ModelLoadError(
            f"{' and '.join(unused)} was passed with a model that is loaded already. Pass it "
            "to the model's own from_pretrained()."
        )
    return model[0], model[1]


def _require_usable(model: PreTrainedModel, processor: Any, name: str) -> None:
    """Refuse a model of no family, without an image processor, or whose inputs have no place."""
    find_family(model)
    if not hasattr(processor, "image_processor"):
        raise ModelLoadError(
            f"'{name}' has a {type(processor).__name__} but no image processor. Save the model's "
            "processor beside the weights, or pass (hf_model, processor)."
        )
    if model.device.type == "meta":
        raise ModelLoadError(
            f"the first weights of '{name}' are on the device 'meta' (offloaded, or never loaded), "
            "so nnsight cannot tell where inputs go. Load it with a device_map that keeps what "
            "comes first (vision tower, embeddings) on a device, or use cl.intervening(hf_model, "
            "method) around the model itself."
        )
