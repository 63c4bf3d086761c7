"""A token of a prompt and of its second inputs, read in one pass as rows of one batch.

A pass of one row waits for the weights and for Python, hardly for the row, so two passes cost
nearly twice what one of two rows does. The rows become many where the decoder begins, and each
cache is given its own when a layer is done, so that any pass can be read either way. It is done
where nobody could tell, but by the rounding of another batch size: single tokens, no other session
in the decoder, no hooks where rows are many, no trace.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere
from torch.utils.hooks import RemovableHandle
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from clva_lens.methods.branch import Branch
from clva_lens.models import belonging
from clva_lens.models.kv_cache import cache_of
from clva_lens.models.tree import tree

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
KEPT = ("output_hidden_states", "output_attentions")
BY_ROW = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")


class JoinedLayer(DynamicLayer):
    """One layer of several caches, as rows of one batch; each cache has its rows as well."""

    def __init__(self, parts: Sequence[Any]) -> None:
        """Name the layers of the caches; nothing is taken yet."""
        super().__init__()
        self.parts = parts
        self._given: Sequence[Tensor | None] = [None for _ in parts]

    def join(self) -> None:
        """Take what the caches hold, unless that is what they were given here."""
        held = [part.keys for part in self.parts]
        if any(one is not given for one, given in zip(held, self._given, strict=True)):
            self.keys = torch.cat(held)
            self.values = torch.cat([part.values for part in self.parts])
            self.dtype, self.device, self.is_initialized = held[0].dtype, held[0].device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add a pass's keys and values, and give each cache its rows."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        rows = len(keys) // len(self.parts)
        self._given = keys.split(rows)
        for part, own, content in zip(self.parts, self._given, values.split(rows), strict=True):
            part.keys, part.values = own, content
        return keys, values


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

    def start(self, branches: Sequence[Branch]) -> None:
        """Read single tokens from now on with branches whose tokens are the prompt's, unpadded."""
        configs = (self.entry.config, self.decoder.config)
        if not any(getattr(config, name, False) for config in configs for name in KEPT):
            self.branches = branches
            self._within, self._at = watchers(self.entry, self.decoder)

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
        if many is None or type(cache) is not DynamicCache or not self._layers_of(cache):
            return None
        for layer in self._layers:
            layer.join()
        self._taken = cache, cache.layers
        cache.layers, self.joined = self._layers, True
        return (), many

    def _part(self, *_: Any) -> None:
        """Have the model's cache again as it was, but for what the pass has added."""
        if self._taken is not None:
            cache, cache.layers = self._taken
            self._taken = None

    def _alone(self) -> bool:
        """Whether this pass is the next token's, and nobody else looks at it."""
        step, forward = self._run.passes.step, vars(self.decoder).get("forward")
        if step is None or step.ids is None or step.ids.shape[1] > 1 or step.number < 1:
            return False
        if step.offset != step.prompt_rows + self.branches[0].generated:
            return False
        if forward is not None and forward.state.active()[0] is not None:  # an nnsight trace
            return False
        others = (hook for hooks in self._at for hook in hooks.values())
        own = all(hook.__module__ == belonging.__name__ for hook in others)
        return own and not any(self._within) and len(self._run.sessions) == 1

    def _layers_of(self, cache: Any) -> Sequence[JoinedLayer]:
        """Return the layers of all caches, each as one of many rows; none if some are unusual."""
        if not self._layers or self._layers[0].parts[0] is not cache.layers[0]:
            stacks = [cache.layers, *(branch.cache.layers for branch in self.branches)]
            layers = list(zip(*stacks, strict=True))
            plain = all(joinable(parts) for parts in layers)
            self._layers = [JoinedLayer(parts) for parts in layers] if plain else ()
        return self._layers


def joinable(parts: Sequence[Any]) -> bool:
    """Whether layers of caches are the usual kind, and of one shape."""
    if any(type(one) is not DynamicLayer or one.keys is None for one in parts):
        return False
    return all(one.keys.shape == parts[0].keys.shape for one in parts)


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
        elif name in KEPT and value or not isinstance(value, Cache | bool | int | None):
            return None
        found[name] = value
    return found


Hooks = Sequence[Mapping[int, Any]]


def watchers(entry: nn.Module, decoder: nn.Module) -> tuple[Hooks, Hooks]:
    """Return where hooks would be that see many rows, and where those of a run are too."""
    above = {child: one for one in tree(entry) for child in one._modules.values()}
    seeing = [one for one in tree(decoder) if one is not decoder]
    one = decoder
    while above[one] is not entry:
        seeing.append(one := above[one])
    language: Any = entry
    own = [decoder, language.get_output_embeddings(), language.get_input_embeddings()]
    everybodys = [vars(everywhere)[f"_global{name}"] for name in HOOKS]
    within = [getattr(one, name) for one in seeing if one not in own for name in HOOKS]
    return everybodys + within, [getattr(one, name) for one in own for name in HOOKS]
