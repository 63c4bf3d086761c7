"""Hooks on the residual stream of a site's stack: what its layers read from it and write to it.

They are there only while a session of a run wants them, and only at the places that it names.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, get_args

from jaxtyping import Float
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from clva_lens.ground.errors import ParameterError
from clva_lens.models.activations import Place
from clva_lens.models.belonging import hook_after, hook_before
from clva_lens.models.family import find_family
from clva_lens.models.step import Step

Part = Literal["resid_pre", "attn_out", "cross_attn_out", "mlp_in", "mlp_out", "resid_post", "z"]
"""What of a layer: TransformerLens' name of it, without "hook_".

"z" is what a decoder's heads put out, side by side, as their projection reads it: after the gates
of a model that has some.

"mlp_in" is what the MLP reads: the stream after the norm, a bridge's "mlp.hook_in". A Q-Former,
which normalises after each sum, has none.
"""

Stream = Float[Tensor, "batch query *copy width"]
"""A part of the residual stream; a few models have several copies of it."""


class StreamCall(NamedTuple):
    """Which part of which layer (0-based) a session is shown, and in which pass."""

    part: Part
    layer: int
    step: Step


def stream_name(site: str, part: str, layer: int) -> str:
    """Return TransformerLens' name of a part of a layer, as ``run_with_cache`` has it."""
    prefix = "" if site == "decoder" else f"{site}."
    hook = {"mlp_in": "mlp.hook_in", "z": "attn.hook_z"}.get(part, f"hook_{part}")
    return f"{prefix}blocks.{layer}.{hook}"


def stream_hooks(
    model: PreTrainedModel,
    site: str,
    wanted: Iterable[tuple[Part, int]],
    edit: Callable[[Part, int, Tensor], Tensor | None],
    *,
    first: bool = False,
) -> Iterator[tuple[tuple[Part, int], RemovableHandle]]:
    """Put a hook at each (part, layer); ``edit`` returns what replaces a value, or None.

    ``first``: what a module puts out is edited before any other hook sees it.

    Raises:
        ModelLoadError: if nobody wrote down where these are in the model.
        ParameterError: if the site's stack has no such part or layer.
    """
    places = {place.name: place for place in find_family(model).activations(model).places}
    for name, place in list(places.items()):
        if name.endswith("ln2.hook_normalized"):  # what this norm puts out, the MLP reads
            after = place._replace(tap=place.tap._replace(side="output"))
            places[name.replace("ln2.hook_normalized", "mlp.hook_in")] = after
    for part, layer in wanted:
        name = stream_name(site, part, layer)
        if part not in get_args(Part) or name not in places:
            known = [one for one in get_args(Part) if stream_name(site, one, 0) in places]
            depth = sum(stream_name(site, "resid_pre", i) in places for i in range(len(places)))
            raise ParameterError(
                f"there is no '{name}' to read or edit. The {site} has {', '.join(known)} of "
                f"layers 0 to {depth - 1} (0-based). Name one of these."
            )
        yield (part, layer), _hook(places[name], part, edit, first)


def _hook(
    place: Place, part: Part, edit: Callable[[Part, int, Tensor], Tensor | None], first: bool
) -> RemovableHandle:
    times = place.tap.times

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = edit(part, place.layer, args[0] if args else kwargs["hidden_states"])
        if found is None:
            return None
        return ((found, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": found})

    def after(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        own = output[0] if isinstance(output, tuple) else output
        found = edit(part, place.layer, own if times == 1.0 else own * times)
        if found is None:
            return None
        found = found if times == 1.0 else found / times
        return (found, *output[1:]) if isinstance(output, tuple) else found

    if place.tap.side == "input":
        return hook_before(place.module, before)
    return hook_after(place.module, after, first=first)
