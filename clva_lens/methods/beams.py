"""Beam search of one prompt, with transformers' rules, in states that can be returned to.

``advance`` is one step of ``GenerationMixin`` of transformers 5.23: every beam's continuations
compete, those that stop are kept aside with their score over length^penalty, and the search is over
when no running beam can do better. A length is that of what was generated, unless the decoding asks
for another rule (``cl.Beam(length=...)``). A state never changes, so an earlier one is a point to
go on from.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput

Ids = Int[Tensor, "beam position"]
LOWEST = -1e9


class Advance(NamedTuple):
    """The beams after a step, and for each the beam that it continues and its new token."""

    beams: "Beams"
    parents: Int[Tensor, " beam"]
    tokens: Int[Tensor, " beam"]


@dataclass(frozen=True, eq=False)
class Beams:
    """Running beams, best first, with their summed log-probabilities, and what is finished.

    ``finished`` are (score, ids), best first, at most as many as there are beams; a score is the
    sum of log-probabilities over the generated length to the power of the length penalty.
    """

    ids: Ids
    scores: Float[Tensor, " beam"]
    prompt_rows: int
    finished: tuple[tuple[float, Int[Tensor, " _"]], ...] = ()
    over: bool = False

    @classmethod
    def start(cls, ids: Ids) -> "Beams":
        """Return the state of a prompt, once for each beam; only the first one counts."""
        scores = torch.full((len(ids),), LOWEST, dtype=torch.float32, device=ids.device)
        scores[0] = 0
        return cls(ids, scores, ids.shape[1])

    @property
    def generated(self) -> int:
        """The number of generated tokens."""
        return self.ids.shape[1] - self.prompt_rows

    def advance(
        self,
        log_probs: Float[Tensor, "beam vocabulary"],
        config: GenerationConfig,
        stops: Callable[[Ids], Bool[Tensor, " beam"]],
    ) -> Advance:
        """Return the beams with one more token each; ``stops`` says which sequences end."""
        count, vocabulary = log_probs.shape
        ends = config.eos_token_id
        several = len(ends) if isinstance(ends, list) else int(ends is not None)
        total = (log_probs + rearrange(self.scores, "b -> b 1")).flatten()
        best, where = total.topk(max(2, 1 + several) * count)
        parents, tokens = where // vocabulary, where % vocabulary
        ids = torch.cat([self.ids[parents], rearrange(tokens, "b -> b 1")], dim=1)
        stopped = stops(ids)
        scores, kept = (best + stopped * LOWEST).topk(count)
        finished = self._finish(best[:count], ids[:count], stopped[:count], config)
        beams = Beams(ids[kept], scores, self.prompt_rows, finished)
        if bool(stopped.all()) or beams._cannot_improve(config):
            beams = replace(beams, over=True)
        return Advance(beams, parents[kept], tokens[kept])

    def _finish(
        self,
        best: Float[Tensor, " beam"],
        ids: Ids,
        stopped: Bool[Tensor, " beam"],
        config: GenerationConfig,
    ) -> tuple[tuple[float, Tensor], ...]:
        """Return the finished sequences with those of the best continuations that stop."""
        count = len(best)
        if config.early_stopping is True and len(self.finished) == count:
            return self.finished
        scores = (best / (self.generated + 1) ** config.length_penalty).tolist()
        new = [(scores[i], ids[i]) for i in range(count) if stopped[i]]
        return tuple(sorted((*self.finished, *new), key=lambda one: -one[0])[:count])

    def _cannot_improve(self, config: GenerationConfig) -> bool:
        """Return whether every place is taken by a sequence that no running beam can beat."""
        if len(self.finished) < len(self.scores):
            return False
        if config.early_stopping is True:
            return True
        length = self.generated
        if config.early_stopping == "never" and config.length_penalty > 0:
            length = config.max_length - self.prompt_rows
        return float(self.scores[0] / length**config.length_penalty) <= self.finished[-1][0]

    def answers(self, count: int, padding: int) -> tuple[Ids, Float[Tensor, " beam"]]:
        """Return the best finished sequences, padded at their ends, and their scores."""
        chosen = self.finished[:count]
        ids = [sequence for _, sequence in chosen]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=padding)
        scores = torch.tensor([one for one, _ in chosen], dtype=torch.float32, device=padded.device)
        return padded, scores

    def output(self, config: GenerationConfig) -> Any:
        """Return the best sequences as ``generate`` returns them."""
        ends = config.eos_token_id
        end = ends[0] if isinstance(ends, list) else ends
        padding = next((one for one in (config.pad_token_id, end) if one is not None), 0)
        sequences, scores = self.answers(config.num_return_sequences or 1, padding)
        if not config.return_dict_in_generate:
            return sequences
        return GenerateBeamDecoderOnlyOutput(sequences=sequences, sequences_scores=scores)  # pyright: ignore
