"""The same words under every method: an answer that is given is read, and each token judged."""

from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clva_lens.engine.run import running
from clva_lens.ground.errors import ParameterError
from clva_lens.lens.asking import Asking
from clva_lens.lens.captions import TokenChances
from clva_lens.lens.decoding import Greedy
from clva_lens.lens.generate import generate_batch, generate_batches
from clva_lens.lens.load import LensModel
from clva_lens.lens.observers import Observer
from clva_lens.methods.base import Method
from clva_lens.methods.target import Target, shape_of
from clva_lens.models.answer_tokens import AnswerTokens
from clva_lens.models.prompt import Prompt
from clva_lens.models.step import Step


class Read(NamedTuple):
    """How the tokens of a given answer were read.

    ``maps`` are of the rows that wrote each token; ``chances`` are the token's probabilities, and
    ``margins`` logit(yes) − logit(no) at its place, NaN without a token for each.
    """

    maps: Float[Tensor, "layer head token visual"]
    chances: Float[Tensor, " token"]
    margins: Float[Tensor, " token"]


class _Given(TokenChances):
    """Leaves only the answer's next token, once the chances of all were looked at."""

    def __init__(self, observer: Observer, ids: Int[Tensor, " token"], words: AnswerTokens) -> None:
        super().__init__(observer)
        self._ids, self._words = ids.tolist(), words
        self._margins: dict[int, float] = {}

    def logits(
        self, step: Step, logits: Float[Tensor, "batch vocabulary"]
    ) -> Float[Tensor, "batch vocabulary"] | None:
        super().logits(step, logits)
        if not 0 <= step.number < len(self._ids):
            return None
        own = logits[0].detach().float()
        if self._words.yes and self._words.no:
            yes, no = (own[ids].amax() for ids in self._words)
            self._margins[step.number] = float(yes - no)
        only = torch.full_like(logits, -torch.inf)
        token = self._ids[step.number]
        only[:, token] = logits[:, token].nan_to_num(0.0, 0.0, 0.0)
        return only

    def margins(self) -> Float[Tensor, " token"]:
        """Return the margin at each token's place."""
        found = [self._margins.get(number, float("nan")) for number in range(len(self._ids))]
        return torch.tensor(found, dtype=torch.float32)


def answer_of(
    model: LensModel, prompt: Prompt, method: Method | None, decoding: Greedy
) -> tuple[str, Int[Tensor, " token"]]:
    """Return what is answered to one prompt, as text and as tokens."""
    asking = Asking(method=method, decoding=decoding).fitted(model)
    with closing(generate_batches(model, prompt, asking, progress=False)) as answered:
        made = next(answered)
    return made.texts[0], made.ids[0]


def read_given(
    model: LensModel,
    prompt: Prompt,
    method: Method | None,
    ids: Int[Tensor, " token"],
    words: AnswerTokens,
    layers: Sequence[int] | str = "all",
) -> Read:
    """Return how a given answer is read under a method, token by token as if it were written.

    Raises:
        ParameterError: if the method does not fit, or decides the tokens itself.
    """
    target = Target(model.hf_model, model.processor)
    if method is not None and any(one.decode for one in method.sessions(target)):
        raise ParameterError(
            f"{type(method).__name__} searches for its answer, so it cannot be read on the words "
            "of another. Pass a method that works token by token."
        )
    observer = Observer(layers, shape_of(model.hf_model, "decoder"))
    observer.follow(model.hf_model)
    given = _Given(observer, ids, words)
    asking = Asking(method=method, decoding=Greedy(max_new_tokens=len(ids))).fitted(model)
    generate_batch(model, prompt, 0, asking, running(model.hf_model, [observer, given]))
    return Read(observer.answers(ids[None])[0].maps, given.of_answer(ids), given.margins())
