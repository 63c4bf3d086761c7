"""A steering vector: a direction for each layer of a stack, and how it was made, in one file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clva_lens.engine.stream import Part
from clva_lens.ground.errors import ModelLoadError, ParameterError
from clva_lens.ground.files import taking_place
from clva_lens.ground.parameters import Parameters, check_arguments
from clva_lens.methods.stream_rows import Stack
from clva_lens.models.family import transformers_model
from clva_lens.models.weights import is_sample_of

FORMAT = "clva_lens steering vector 1"


@dataclass(frozen=True, eq=False, repr=False)
class SteeringVector(Parameters):
    """A direction for each of ``layers`` (0-based); made by ``cl.steering_vector``.

    ``values`` may have an axis of positions, for a vision tower. ``part`` of ``stack`` is what they
    were read from, and where ``cl.Steer`` adds them unless told otherwise. ``record`` says how they
    were made; ``sample`` are a few of the model's weights, None where that is not known: for
    another model they are refused.

    >>> vector = cl.steering_vector(model, layers=[5, 6])
    >>> vector
    SteeringVector(mean: resid_post of 2 decoder layers, lengths ... to ...)
    >>> null = vector.random(seed=0)  # random directions of the same lengths
    >>> cl.SteeringVector is type(null)
    True
    """

    values: Float[Tensor, "layer *position width"]
    layers: tuple[int, ...]
    part: Part = "resid_post"
    stack: Stack = "decoder"
    record: Mapping[str, Any] = field(default_factory=dict)
    sample: Float[Tensor, "parameter value"] | None = None

    def __post_init__(self) -> None:
        """Check that there is a finite row for each layer.

        Raises:
            ParameterError: if there is not, or the part or the stack is none.
        """
        known = {"part": (self.part, get_args(Part)), "stack": (self.stack, get_args(Stack))}
        for name, (found, allowed) in known.items():
            if found not in allowed:
                raise ParameterError(
                    f"{name} must be one of {', '.join(allowed)}, but is {found!r}. Pass "
                    f"{name}='{allowed[0]}'."
                )
        if self.values.ndim not in (2, 3) or len(self.values) != len(self.layers):
            raise ParameterError(
                f"the values of a steering vector have shape {tuple(self.values.shape)} for "
                f"{len(self.layers)} layers, but are [layer, width], or [layer, position, width]. "
                "Pass a row for each layer."
            )
        numbers = self.layers
        if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0:
            raise ParameterError(
                f"layers are {numbers}, but are one or more indices from 0, each once. Pass a row "
                "of values for each of these."
            )
        if not self.values.is_floating_point() or self.values.is_meta:
            raise ParameterError(
                f"the values of a steering vector are {self.values.dtype} on {self.values.device}, "
                "but must be real numbers that are there. Pass values.float()."
            )
        if not bool(self.values.isfinite().all()):
            raise ParameterError("a steering vector has values that are not finite. Make it anew.")

    @property
    def norms(self) -> Float[Tensor, " layer *position"]:
        """The length of each direction."""
        return self.values.norm(dim=-1)

    def random(self, seed: int = 0) -> "SteeringVector":
        """Return random directions of the same lengths: the control of what this one does."""
        check_arguments(SteeringVector.random, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(self.values.shape, generator=generator, dtype=torch.float32)
        drawn = drawn / drawn.norm(dim=-1, keepdim=True) * self.norms[..., None].cpu()
        return replace(self, values=drawn, record={**self.record, "random": seed})

    def check(self, model: nn.Module) -> None:
        """Raise ModelLoadError if it was made on another model, or on other weights."""
        if self.sample is not None and not is_sample_of(self.sample, model):
            raise ModelLoadError(
                f"this steering vector was made on {self.record.get('model', 'a model')}, whose "
                f"weights are not those of this {type(model).__name__}, so its directions mean "
                "nothing here. Make one with cl.steering_vector(model, pairs)."
            )

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file with the record in its metadata; return its path."""
        path = Path(path)
        told = {
            "format": FORMAT,
            "layers": list(self.layers),
            "part": self.part,
            "stack": self.stack,
            "record": dict(self.record),
        }
        tensors = {"values": self.values.detach().cpu().clone().contiguous()}
        if self.sample is not None:
            tensors["weights_sample"] = self.sample
        path.parent.mkdir(parents=True, exist_ok=True)
        with taking_place(path) as part:
            save_file(tensors, part, metadata={"clva_lens": json.dumps(told)})
        return path

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> "SteeringVector":
        """Return what ``save`` wrote; ``model``, if it is given, must be the one it was made on.

        Raises:
            ParameterError: if there is no such file, or it holds something else.
            ModelLoadError: if it was made on another model, or ``model`` is none.
        """
        check_arguments(SteeringVector.load, path=path)
        try:
            with safe_open(str(path), framework="pt") as file:
                told = json.loads((file.metadata() or {}).get("clva_lens", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise ParameterError(
                f"no steering vector can be read from '{path}' ({error}). Pass a file that "
                "SteeringVector.save() wrote."
            ) from None
        whole = isinstance(told, dict) and {"layers", "part", "stack", "record"} <= told.keys()
        if not whole or told.get("format") != FORMAT or "values" not in tensors:
            raise ParameterError(
                f"'{path}' is a safetensors file, but no steering vector ('{FORMAT}'). Pass a file "
                "that SteeringVector.save() wrote."
            )
        sample = tensors.get("weights_sample")
        layers = tuple(told["layers"]) if isinstance(told["layers"], list) else told["layers"]
        settings = (layers, told["part"], told["stack"], told["record"])
        found = cls(tensors["values"], *settings, sample)
        if model is not None:
            found.check(transformers_model(model))
        return found

    def __repr__(self) -> str:
        """Return where it is from and how long it is."""
        made = self.record.get("how", "given")
        low, high = float(self.norms.min()), float(self.norms.max())
        return (
            f"SteeringVector({made}: {self.part} of {len(self.layers)} {self.stack} layers, "
            f"lengths {low:.3g} to {high:.3g})"
        )
