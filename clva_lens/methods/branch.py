"""A second input of a contrast, as a twin of the model reads it, with a cache of its own."""

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from clva_lens.engine.run import add_sessions
from clva_lens.engine.session import Session
from clva_lens.models.family import Inputs, find_site
from clva_lens.models.kv_cache import CACHE
from clva_lens.models.positions import counts_positions, positions_of

Logits = Float[Tensor, "batch vocabulary"]


class Branch:
    """A second input, its key-value cache, and how many generated tokens it has read.

    With a ``cache`` that is filled, its inputs are what goes on from there. ``counts``: positions
    are counted from the mask, as there may be padding before the question; so they are where there
    is padding (the branch is not ``full``) and the model takes them. ``lengths`` are without it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Inputs,
        sessions: list[Session],
        cache: DynamicCache | None = None,
        *,
        counts: bool = False,
    ) -> None:
        """Prepare; nothing is read yet."""
        self.entry: Any = find_site(model, "decoder").passes().entry
        self.reader: Any = model if "pixel_values" in inputs else self.entry
        self.inputs = inputs
        self.mask = inputs["attention_mask"]
        self.cache = DynamicCache() if cache is None else cache
        self.lengths = self.mask.sum(dim=1, keepdim=True)
        self.full = bool((self.lengths == self.mask.shape[1]).all())
        self.counts = counts or (not self.full and counts_positions(self.reader))
        self.begun, self.generated = False, 0
        self.close = add_sessions(model, sessions)

    def read(self, ids: Int[Tensor, "batch new"]) -> Logits:
        """Read more tokens, after the prompt if it was not read yet; return the last logits."""
        how: dict[str, Any] = {CACHE: self.cache, "use_cache": True, "logits_to_keep": 1}
        if not self.begun:
            self.begun = True
            read, given = self.reader, self.inputs
        else:
            self.mask = self.masked(ids.shape[1])
            self.generated += ids.shape[1]
            read, given = self.entry, {"input_ids": ids, "attention_mask": self.mask}
        if self.counts:
            given = given | self._positions(given["input_ids"].shape[1])
        return read(**given, **how).logits[:, -1]

    def masked(self, more: int) -> Int[Tensor, "batch position"]:
        """Return the mask of all that was read, and of so many tokens more."""
        length = self.inputs["attention_mask"].shape[1] + self.generated + more
        ones = self.mask.new_ones(len(self.mask), length - self.mask.shape[1])
        return torch.cat([self.mask, ones], dim=1)

    def _positions(self, count: int) -> Inputs:
        """Return the positions of the last tokens."""
        whole = {"input_ids": self.mask, "attention_mask": self.mask}
        places = positions_of(self.entry, whole)
        return {} if places is None else {"position_ids": places[..., -count:]}

    def reread(self, ids: Int[Tensor, "batch generated"]) -> Logits:
        """Read the prompt and everything generated at once, without a cache."""
        both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        whole = {name: torch.cat([self.inputs[name], both[name]], dim=1) for name in both}
        out = self.reader(**(self.inputs | whole), use_cache=False, logits_to_keep=1)
        return out.logits[:, -1]

    def reorder(self, rows: Int[Tensor, " batch"]) -> None:
        """Take these rows, each the continuation of a row before."""
        self.cache.reorder_cache(cast(torch.LongTensor, rows))
        self.mask = self.mask[rows.to(self.mask.device)]
