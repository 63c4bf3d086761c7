"""How questions are asked: everything but the model and the questions that decides the answers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from clva_lens.ground.errors import ModelLoadError, ParameterError
from clva_lens.ground.parameters import Parameters
from clva_lens.lens.decoding import Decoding, Greedy, check_decoding
from clva_lens.lens.load import LensModel
from clva_lens.methods.base import Method
from clva_lens.models.answer_tokens import AnswerTokens

Share = Literal["picture", "tower"]
"""What questions share: all that is read of a picture before them, or the vision tower's part."""


@dataclass(frozen=True, kw_only=True)
class Asking(Parameters):
    """A method, a decoding, how many prompts at a time, and which samples of a benchmark.

    Without a decoding it is greedy; a benchmark gives it its own length. ``limit`` takes that many
    samples only, drawn with ``seed``; None takes all. ``margin`` has the tokens of the yes−no
    margin; None for all spellings. ``share``: what neighbours ask about is read once for them.
    ``compiled``: decoding steps are one graph.
    """

    method: Method | None = None
    decoding: Decoding | None = None
    batch_size: int = 8
    limit: int | None = None
    seed: int = 0
    margin: AnswerTokens | None = None
    share: Share | None = None
    compiled: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        if self.batch_size < 1:
            raise ParameterError(f"batch_size must be >= 1, but is {self.batch_size}. Pass 8.")
        if self.share not in (None, *get_args(Share)):
            raise ParameterError(
                f"share must be 'picture', 'tower' or None, but is {self.share!r}. Pass share=None "
                "to read a picture again for each question."
            )
        if self.decoding is not None:
            check_decoding(self.method, self.decoding)

    @property
    def how(self) -> Decoding:
        """The decoding; greedy without one."""
        return self.decoding or Greedy()

    def fitted(self, model: LensModel, max_new_tokens: int = 32) -> "Asking":
        """Return it for a model: without a decoding, with a greedy one of this length.

        Raises:
            ModelLoadError: if the model is a bare one, without its processor.
            ParameterError: if the method does not work with the decoding.
        """
        if not isinstance(model, LensModel):
            raise ModelLoadError(
                "questions can only be asked with the model's processor, but got a bare "
                f"{type(model).__name__}. Pass cl.load((hf_model, processor))."
            )
        how = self.decoding or Greedy(max_new_tokens=max_new_tokens)
        check_decoding(self.method, how, model.hf_model)
        return replace(self, decoding=how)

    def each(
        self,
        methods: Mapping[str, Method | None],
        decodings: Mapping[str, Decoding] | None = None,
    ) -> "dict[str, Asking]":
        """Return one for each method by name; those in ``decodings`` with their own decoding."""
        own = decodings or {}
        return {
            name: replace(self, method=method, decoding=own.get(name, self.decoding))
            for name, method in methods.items()
        }
