"""A token of a prompt and of its second inputs, read in one pass as rows of one batch.

A pass of one row waits for the weights and for Python, hardly for the row, so two passes cost
nearly twice what one of two rows does. The rows become many where the decoder begins, and each
cache is given its own when a layer is done, so that any pass can be read either way. It is done
where nobody could tell, but by the rounding of another batch size: single tokens, no other session
in the decoder, no hooks where rows are many, no trace.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as everywhere
from torch.utils.hooks import RemovableHandle
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from clva_lens.methods.branch import Branch
from clva_lens.models import belonging
from clva_lens.models.kv_cache import cache_of
from clva_lens.models.tree import tree

EVERYBODYS = (
    everywhere._global_forward_pre_hooks,
    everywhere._global_forward_hooks,
    everywhere._global_backward_pre_hooks,
    everywhere._global_backward_hooks,
)
# Once transformers was asked for such a thing, its hooks stay, and look when it is asked again.
CAPTURING = "transformers.utils.output_capturing"
KEPT = ("output_hidden_states", "output_attentions")
BY_ROW = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")


class JoinedLayer(DynamicLayer):
    """One layer of several caches, as rows of one batch; each cache has its rows as well.

    Shorter ones begin with padding here, which is not theirs.
    """

    _layer_type = None  # transformers lists by it what caches are made of
    is_initialized = True

    def __init__(self, parts: Sequence[Any]) -> None:
        """Name the layers of the caches; nothing is taken yet."""
        self.parts = parts
        self._given: Sequence[Any] = [None for _ in parts]
        self._starts = [0 for _ in parts]

    def get_seq_length(self) -> int:
        """Return the length of the longest."""
        return max(part.keys.shape[2] for part in self.parts)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add a pass's keys and values, and give each cache its rows."""
        held = [part.keys for part in self.parts]
        if not all(map(is_, held, self._given)):
            longest = self.get_seq_length()
            self._starts = [longest - one.shape[2] for one in held]
            self.keys = self._joined(held)
            self.values = self._joined([part.values for part in self.parts])
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self._given, contents = self._apart(keys), self._apart(values)
        for part, own, content in zip(self.parts, self._given, contents, strict=True):
            part.keys, part.values = own, content
        return keys, values

    def _joined(self, held: Sequence[Tensor]) -> Tensor:
        pairs = zip(held, self._starts, strict=True)
        return torch.cat([functional.pad(one, (0, 0, start, 0)) for one, start in pairs])

    def _apart(self, joined: Tensor) -> Sequence[Tensor]:
        pairs = zip(joined.chunk(len(self.parts)), self._starts, strict=True)
        return [one[:, :, start:] for one, start in pairs]


class OneBatch:
    """Has a decoder read a token of the prompt and of its branches at once, where it may."""

    branches: Sequence[Branch] = ()
    joined = False  # whether the pass that is running is of all rows
    _layers: Sequence[JoinedLayer] = ()
    _taken: tuple[Any, list[Any]] | None = None
    _handles: Sequence[RemovableHandle] = ()

    def __init__(self, entry: Any) -> None:
        """Name the module whose call begins a pass."""
        self.entry, self.decoder = entry, entry.get_decoder()

    def begin(self, run: Any) -> None:
        """Watch the decoder for a session that is in this run of it."""
        self._run = run
        self._handles = (
            belonging.hook_before(self.decoder, self._join),
            belonging.hook_after(self.decoder, self._part, first=True),
        )

    def end(self) -> None:
        """Let go of the model."""
        for handle in self._handles:
            handle.remove()
        self.stop()

    def start(self, branches: Sequence[Branch], *, alike: bool) -> None:
        """Read single tokens with these branches from now on, if their positions are known.

        ``alike``: they differ from the prompt in pixels only, and nothing is padded.
        """
        configs = (self.entry.config, self.decoder.config)
        keeps = any(getattr(config, name, False) for config in configs for name in KEPT)
        if not keeps and (alike or all(one.counts or one.full for one in branches)):
            self.branches, self.alike = branches, alike
            self._within = self._at = ()

    def stop(self) -> None:
        """Read passes of the prompt's rows only, and forget the branches."""
        self._part()
        self.branches, self._layers, self.joined = (), (), False

    def _join(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Make a pass one of all rows, if nobody can tell."""
        self._part()  # of a pass that failed
        self.joined = False
        if not self.branches or args or not self._alone():
            return None
        cache, rows = cache_of(kwargs), len(self._run.passes.step.ids)
        many = repeated(kwargs, rows, 1 + len(self.branches))
        if many is not None and not self.alike:
            many = self._told_apart(kwargs, rows, many)
        if many is None or not is_plain(cache) or not self._layers_of(cache):
            return None
        self._taken = cache, cache.layers
        cache.layers, self.joined = [*self._layers], True
        return (), many

    def _told_apart(self, own: Any, rows: int, many: dict[str, Any]) -> dict[str, Any] | None:
        """Return a decoder's arguments with each row's position and mask; None if unknown."""
        places, mask = own.get("position_ids"), own.get("attention_mask")
        if places is None or places.ndim != 2 or (mask is not None and mask.ndim != 2):
            return None
        if mask is None:
            mask = places.new_ones(rows, self._run.passes.step.keys)
        others = [one.lengths + one.generated for one in self.branches]
        masks = [mask, *(one.masked(1) for one in self.branches)]
        longest = max(one.shape[1] for one in masks)
        padded = [functional.pad(one, (longest - one.shape[1], 0)) for one in masks]
        return many | {
            "position_ids": torch.cat([places.expand(rows, -1), *others]),
            "attention_mask": torch.cat(padded),
        }

    def _part(self, *_: Any) -> None:
        """Have the model's cache again as it was, but for what the pass has added."""
        if self._taken is not None:
            cache, cache.layers = self._taken
            self._taken = None

    def _alone(self) -> bool:
        """Whether this pass is the next token's, and nobody else looks at it."""
        step = self._run.passes.step
        if step is None or step.ids is None or step.ids.shape[1] > 1 or step.number < 1:
            return False
        if step.offset != step.prompt_rows + self.branches[0].generated:
            return False
        if not self._at:
            self._within, self._at = watchers(self.entry, self.decoder)
        seen = sees(self._within, CAPTURING) or sees(self._at, CAPTURING, belonging.__name__)
        return not (seen or is_traced(self.decoder) or len(self._run.sessions) > 1)

    def _layers_of(self, cache: Any) -> Sequence[JoinedLayer]:
        """Return the layers of all caches, each as one of many rows; none if some are unusual."""
        if not self._layers or self._layers[0].parts[0] is not cache.layers[0]:
            stacks = [cache.layers, *(branch.cache.layers for branch in self.branches)]
            layers = list(zip(*stacks, strict=False))
            plain = all(len(one) == len(layers) for one in stacks) and all(map(joinable, layers))
            self._layers = [JoinedLayer(parts) for parts in layers] if plain else ()
        return self._layers


def is_traced(module: nn.Module) -> bool:
    """Whether an nnsight trace is running that sees a module, or its ``forward`` is another's."""
    forward = vars(module).get("forward")
    state = getattr(forward, "state", None)
    return forward is not None and (state is None or state.active()[0] is not None)


def is_plain(cache: Any) -> bool:
    """Whether a cache is transformers' usual one, and stays on its device."""
    return type(cache) is DynamicCache and not cache.offloading


def joinable(parts: Sequence[Any]) -> bool:
    """Whether layers of caches are the usual kind, and of one batch size.

    Those with room (``models/room.py``) are written in place, which is worth more than one pass.
    """
    plain = all(type(one) is DynamicLayer and one.keys is not None for one in parts)
    return plain and len({len(one.keys) for one in parts}) == 1


def repeated(given: Mapping[str, Any], rows: int, times: int) -> dict[str, Any] | None:
    """Return a decoder's arguments with all rows so many times; None if some say more of rows."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, Tensor):
            dim = value.ndim - 2 if name == "position_ids" else 0
            if name not in BY_ROW or value.shape[dim] not in (1, rows):
                return None
            if value.shape[dim] == rows:
                value = torch.cat([value] * times, dim=dim)
        elif (name in KEPT and value) or not isinstance(value, None | bool | int | Cache):
            return None
        found[name] = value
    return found


Hooks = Sequence[Mapping[int, Any]]


def watchers(entry: nn.Module, decoder: nn.Module) -> tuple[Hooks, Hooks]:
    """Return where hooks would be that see many rows, and where those of a run are too."""
    language: Any = entry
    own = (decoder, language.get_output_embeddings(), language.get_input_embeddings())
    seeing = {*tree(decoder), *between(entry, decoder)}.difference(own)
    return [*EVERYBODYS, *hooks_of(seeing)], hooks_of(own)


def sees(places: Hooks, *blind: str) -> bool:
    """Whether there is a hook that was not made in one of these modules."""
    return any(
        getattr(hook, "__module__", None) not in blind
        for hooks in places
        if hooks
        for hook in hooks.values()
    )


def hooks_of(modules: Iterable[nn.Module]) -> Hooks:
    """Return the hooks of modules, as torch keeps them."""
    return [
        hooks
        for one in modules
        for hooks in (
            one._forward_pre_hooks,
            one._forward_hooks,
            one._backward_pre_hooks,
            one._backward_hooks,
        )
    ]


def between(outer: nn.Module, inner: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that one hangs in, below another one."""
    above: dict[nn.Module, nn.Module] = {}
    waiting = [outer]
    for one in waiting:
        if inner in above:
            break
        children = [child for child in one._modules.values() if child is not None]
        above |= dict.fromkeys(children, one)
        waiting += children
    one = above[inner]
    while one is not outer:
        yield one
        one = above[one]
