"""Sparse autoencoders of the residual stream: reading features, and steering by them.

With x a row of the stream, the features are f = σ((x − b_dec)·W_enc + b_enc), and the row is
rebuilt as f·W_dec + b_dec (Bricken et al. 2023, "Towards monosemanticity"; Cunningham et al.,
arXiv:2309.08600). σ is ReLU; JumpReLU, which is 0 up to a threshold of each feature (Rajamanoharan
et al., arXiv:2407.14435); or the k largest, then ReLU (Gao et al., arXiv:2406.04093). The layout is
that of SAELens: ``cfg.json`` beside ``sae_weights.safetensors`` with W_enc [d_in, d_sae], W_dec
[d_sae, d_in], b_enc, b_dec and, for JumpReLU, threshold. What it can say and this cannot compute is
refused by name.
"""

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clva_lens.engine.session import Session
from clva_lens.engine.stream import Part, Stream
from clva_lens.ground.errors import ParameterError
from clva_lens.ground.files import taking_place
from clva_lens.ground.parameters import Parameters, check_arguments, is_integer
from clva_lens.methods.base import Kernel, Method, check_layers
from clva_lens.methods.steering_vector import SteeringVector
from clva_lens.methods.stream_rows import StreamSession, check_span
from clva_lens.methods.target import Target
from clva_lens.models.family import transformers_model
from clva_lens.models.norms import wide

Kind = Literal["standard", "jumprelu", "topk"]
"""What makes features sparse."""

WEIGHTS, SETTINGS, MODEL = "sae_weights.safetensors", "cfg.json", "model_name"
# Settings of SAELens that change what is computed, and the only value computed here.
_ONLY = {
    "normalize_activations": ("none", None),
    "reshape_activations": ("none", None),
    "finetuning_scaling_factor": (False, None),
    "scaling_factor": (None,),
    "rescale_acts_by_decoder_norm": (False, None),
    "hook_head_index": (None,),
    "activation_fn_str": ("relu", "topk", None),
}


@dataclass(frozen=True, eq=False, repr=False)
class SparseAutoencoder(Parameters):
    """A sparse autoencoder of a part of one layer's stream; ``layer`` is 0-based.

    >>> import tempfile
    >>> from clva_lens.methods.sae import SparseAutoencoder
    >>> eye = torch.eye(128)
    >>> sae = SparseAutoencoder(eye, eye, torch.zeros(128), torch.zeros(128), layer=6)
    >>> folder = sae.save(tempfile.mkdtemp())
    >>> SparseAutoencoder.load(folder)
    SparseAutoencoder(standard: 128 features of resid_post of layer 6, width 128)
    """

    W_enc: Float[Tensor, "width feature"]
    W_dec: Float[Tensor, "feature width"]
    b_enc: Float[Tensor, " feature"]
    b_dec: Float[Tensor, " width"]
    layer: int
    part: Part = "resid_post"
    kind: Kind = "standard"
    threshold: Float[Tensor, " feature"] | None = None
    k: int | None = None
    apply_b_dec_to_input: bool = True
    record: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that shapes and settings fit together.

        Raises:
            ParameterError: if they do not.
        """
        if self.W_enc.ndim != 2:
            raise ParameterError(f"W_enc is {tuple(self.W_enc.shape)}. Pass [width, feature].")
        width, features = self.W_enc.shape
        shapes = (tuple(self.W_dec.shape), tuple(self.b_enc.shape), tuple(self.b_dec.shape))
        if shapes != ((features, width), (features,), (width,)):
            raise ParameterError(
                f"W_enc is {(width, features)}, but W_dec, b_enc and b_dec are {shapes}. W_enc is "
                "[width, feature] and W_dec [feature, width]: transpose what is the other way."
            )
        needs = {"jumprelu": self.threshold, "topk": self.k}
        if self.kind not in get_args(Kind) or (self.kind in needs and needs[self.kind] is None):
            raise ParameterError(
                f"kind is {self.kind!r} with threshold={self.threshold} and k={self.k}, but is "
                "'standard', 'jumprelu' with a threshold, or 'topk' with k. Pass these."
            )
        if self.part not in get_args(Part):
            raise ParameterError(f"part must be one of {', '.join(get_args(Part))}. Pass one.")
        own = {"W_enc": self.W_enc, "W_dec": self.W_dec, "b_enc": self.b_enc, "b_dec": self.b_dec}
        if self.threshold is not None:
            own["threshold"] = self.threshold
        strange = [name for name, one in own.items() if not bool(one.isfinite().all())]
        if strange:
            raise ParameterError(f"{strange[0]} has values that are not finite. Load it anew.")
        if self.threshold is not None and self.threshold.shape != (features,):
            raise ParameterError(
                f"threshold is {tuple(self.threshold.shape)}, but there are {features} features. "
                "Pass a threshold for each."
            )
        if self.k is not None and not 1 <= self.k <= features:
            raise ParameterError(f"k is {self.k}. Pass 1 to {features}, which features there are.")

    def encode(self, rows: Float[Tensor, "*axes width"]) -> Float[Tensor, "*axes feature"]:
        """Return the features of rows of the stream, in float32 or wider."""
        own = wide(rows)
        if self.apply_b_dec_to_input:
            own = own - self.b_dec.to(own)
        pre = own @ self.W_enc.to(own) + self.b_enc.to(own)
        if self.kind == "topk":
            assert self.k is not None
            top = pre.topk(self.k, dim=-1)
            return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
        if self.kind == "jumprelu":
            assert self.threshold is not None
            return pre.relu() * (pre > self.threshold.to(pre))
        return pre.relu()

    def decode(self, features: Float[Tensor, "*axes feature"]) -> Float[Tensor, "*axes width"]:
        """Return the rows that features stand for."""
        return features @ self.W_dec.to(features) + self.b_dec.to(features)

    def vector(self, feature: int) -> SteeringVector:
        """Return what one unit of a feature writes, for ``cl.Steer``.

        Raises:
            ParameterError: if there is no such feature.
        """
        self.check(feature)
        record = {"how": f"feature {feature} of a sparse autoencoder"}
        values = self.W_dec[feature][None].float()
        return SteeringVector(values, (self.layer,), self.part, "decoder", record)

    def check(self, *features: int) -> None:
        """Raise ParameterError if a feature does not exist."""
        known = range(len(self.b_enc))
        unknown = [one for one in features if not is_integer(one) or one not in known]
        if unknown:
            raise ParameterError(
                f"feature {unknown[0]!r} was named, but there are 0 to {len(self.b_enc) - 1}. Pass "
                "one of these."
            )

    def compare_model(self, model: Any) -> None:
        """Warn if the files name another model than this; they may name its language model."""
        hf_model = transformers_model(model)
        text = hf_model.config.get_text_config()
        named = (getattr(model, "name", None), hf_model.name_or_path, text._name_or_path)
        known = {Path(one).name.casefold() for one in named if one}
        said = self.record.get(MODEL)
        if said and known and Path(said).name.casefold() not in known:
            warnings.warn(
                f"the autoencoder's files say that it is of '{said}', but this model is "
                f"{' or '.join(sorted(known))}. Its features mean something only if that is this "
                "model's language model.",
                stacklevel=3,
            )

    def random(self, seed: int = 0) -> "SparseAutoencoder":
        """Return the null: random directions as long, with the same biases."""
        check_arguments(SparseAutoencoder.random, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(self.W_dec.shape, generator=generator, dtype=torch.float32)
        unit = drawn / drawn.norm(dim=1, keepdim=True)
        encoding = unit.T * self.W_enc.norm(dim=0).cpu()
        decoding = unit * self.W_dec.norm(dim=1, keepdim=True).cpu()
        given = {**vars(self), "W_enc": encoding, "W_dec": decoding}
        return SparseAutoencoder(**{**given, "record": {**self.record, "random": seed}})

    def save(self, folder: str | Path) -> Path:
        """Write SAELens' two files into a folder; return it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        hook = f"blocks.{self.layer}.hook_{self.part}"
        settings = {
            "architecture": self.kind,
            "d_in": len(self.b_dec),
            "d_sae": len(self.b_enc),
            "dtype": str(self.W_enc.dtype).removeprefix("torch."),
            "apply_b_dec_to_input": self.apply_b_dec_to_input,
            "normalize_activations": "none",
            "reshape_activations": "none",
            **({} if self.k is None else {"k": self.k}),
            "metadata": {"hook_name": hook, "hook_layer": self.layer, **self.record},
        }
        names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
        tensors = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        # Copies: tied weights would share memory, which no safetensors file may.
        copies = {name: one.detach().cpu().clone().contiguous() for name, one in tensors.items()}
        with taking_place(folder / WEIGHTS) as part:
            save_file(copies, part)
        with taking_place(folder / SETTINGS) as part:
            part.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        return folder

    @classmethod
    def load(
        cls, path: str | Path, *, layer: int | None = None, part: Part | None = None
    ) -> "SparseAutoencoder":
        """Return the autoencoder in a folder of SAELens' layout, or in one safetensors file.

        ``layer`` and ``part`` say where it belongs, where the files do not.

        Raises:
            ParameterError: if it cannot be read, or says what is not computed here.
        """
        check_arguments(SparseAutoencoder.load, path=path)
        path = Path(path)
        file = path / WEIGHTS if path.is_dir() else path
        try:
            tensors = load_file(file)
            beside = file.with_name(SETTINGS)
            said = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
        except (OSError, SafetensorError, ValueError) as error:
            raise ParameterError(
                f"no sparse autoencoder can be read from '{path}' ({error}). Pass a folder with "
                f"{SETTINGS} and {WEIGHTS}, or a safetensors file."
            ) from None
        missing = [name for name in ("W_enc", "W_dec", "b_enc", "b_dec") if name not in tensors]
        if missing:
            raise ParameterError(
                f"'{file.name}' has {', '.join(sorted(tensors))}, but no {missing[0]}, so it is no "
                "standard, JumpReLU or top-k autoencoder. Pass one of these."
            )
        about = (said.get("metadata") or said.get("meta") or {}) if isinstance(said, dict) else None
        if not isinstance(about, dict):
            raise ParameterError(f"'{beside}' holds no settings. Pass a folder of SAELens' layout.")
        told = {**said, **about}
        where, record = _where(told, tensors, layer, part), {"from": path.name}
        if isinstance(told.get(MODEL), str):
            record[MODEL] = told[MODEL]
        return cls(**where, **_settings(told, tensors), record=record)

    def __repr__(self) -> str:
        """Return its size and where it belongs."""
        width, features = self.W_enc.shape
        return (
            f"SparseAutoencoder({self.kind}: {features} features of {self.part} of layer "
            f"{self.layer}, width {width})"
        )


def _where(
    told: Mapping[str, Any], tensors: Mapping[str, Tensor], layer: int | None, part: Part | None
) -> dict[str, Any]:
    """Return the layer and the part, from arguments, the hook's name or the tensors."""
    pieces = str(told.get("hook_name") or "").split(".")
    if len(pieces) == 3 and pieces[0] == "blocks" and pieces[1].isdigit():
        layer = int(pieces[1]) if layer is None else layer
        part = cast(Part, pieces[2].removeprefix("hook_")) if part is None else part
    if layer is None and "layer" in tensors:
        layer = int(tensors["layer"])
    if layer is None and told.get("hook_layer") is not None:
        layer = int(told["hook_layer"])
    if layer is None:
        raise ParameterError(
            "the files do not say which layer the autoencoder is of. Pass layer=, and part= if it "
            "is not 'resid_post'."
        )
    return {"layer": layer, "part": part or "resid_post"}


def _settings(told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the weights and what is computed with them; refuse what cannot be."""
    for name, allowed in _ONLY.items():
        if told.get(name) not in allowed:
            raise ParameterError(
                f"{SETTINGS} says {name}={told[name]!r}, which is not computed here. Fold it into "
                "the weights, as SAELens does for inference."
            )
    kind = told.get("architecture") or ("jumprelu" if "threshold" in tensors else "standard")
    if told.get("activation_fn_str") == "topk":
        kind = "topk"
    if kind not in get_args(Kind):
        raise ParameterError(
            f"{SETTINGS} says architecture={kind!r}, but {', '.join(get_args(Kind))} are computed "
            "here. Pass one of these."
        )
    sizes = dict(zip(("d_in", "d_sae"), tensors["W_enc"].shape, strict=False))
    for name, size in sizes.items():
        if told.get(name) not in (None, size):
            raise ParameterError(
                f"{SETTINGS} says {name}={told[name]!r}, but the weights have {size}, so the "
                "files are not of one autoencoder. Pass a folder whose files belong together."
            )
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    kwargs = told.get("activation_fn_kwargs") or {}
    return {
        **{name: tensors[name] for name in names},
        "kind": kind,
        "threshold": tensors.get("threshold") if kind == "jumprelu" else None,
        "k": (told.get("k") or kwargs.get("k")) if kind == "topk" else None,
        "apply_b_dec_to_input": told.get("apply_b_dec_to_input", True),
    }


@dataclass(frozen=True, kw_only=True, repr=False)
class SetFeatures(Method):
    """Set features of a sparse autoencoder to values, in chosen rows of the stream.

    A row x becomes x + Σ_i (v_i − f_i(x))·W_dec,i: what the autoencoder does not rebuild stays. For
    a push of constant size, ``cl.Steer(vector=sae.vector(i))``.

    Args:
        sae: the autoencoder, for a part of the decoder's stream.
        features: the value of each, by its number; 0 switches it off.
        span: rows, as those of ``cl.Steer``.

    Raises:
        ParameterError: if a feature or a span does not exist, or a value is not finite.

    Example::

        with cl.intervening(model, SetFeatures(sae=sae, features={17: 0.0})):
            without = model.hf_model(**prompt).logits
    """

    name: ClassVar[str] = "features"
    paper: ClassVar[str] = "sparse autoencoder features, arXiv:2309.08600"
    kernel: ClassVar[Kernel] = "none"
    sites: ClassVar[tuple[str, ...]] = ()
    sae: SparseAutoencoder
    features: Mapping[int, float | int]
    span: Any = "text"

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        self.sae.check(*self.features)
        check_span(self.span)
        strange = [
            value
            for value in self.features.values()
            if not isinstance(value, Real) or not math.isfinite(value)
        ]
        if strange:
            raise ParameterError(f"a feature's value is {strange[0]!r}. Pass finite numbers.")

    def sessions(self, target: Target) -> list[Session]:
        """Return what sets the features; nothing without any.

        Raises:
            ParameterError: if the layer does not exist.
        """
        if not self.features:
            return []
        self.sae.compare_model(target.model)
        shape = target.at("decoder")
        every = shape._replace(layers=tuple(range(shape.depth)))
        layers = check_layers("layer", (self.sae.layer,), every)
        return [StreamSession(self.sae.part, layers, self.span, self._set)]

    def _set(self, _: int, hidden: Stream) -> Stream:
        if hidden.shape[-1] != len(self.sae.b_dec):
            raise ParameterError(
                f"the autoencoder reads rows of {len(self.sae.b_dec)}, but layer {self.sae.layer} "
                f"has {hidden.shape[-1]}. Pass one of this model."
            )
        numbers = list(self.features)
        own = self.sae.encode(hidden)[..., numbers]
        wanted = own.new_tensor([float(self.features[i]) for i in numbers])
        return (wide(hidden) + (wanted - own) @ self.sae.W_dec[numbers].to(own)).to(hidden.dtype)

    def __repr__(self) -> str:
        """Return what is set where."""
        return f"SetFeatures({dict(self.features)} of layer {self.sae.layer}, span {self.span})"
