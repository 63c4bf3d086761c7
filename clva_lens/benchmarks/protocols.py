"""How papers ask: what they add to a question, the system message, and the length of the answer."""

from dataclasses import dataclass

from clva_lens.ground.registry import Registry

_CHAT = (
    "A chat between a curious {0} and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the {0}'s questions."
)
# LLaVA's conversation templates llava_v1 and vicuna_v1 (haotian-liu/LLaVA, llava/conversation.py).
LLAVA_V1 = _CHAT.format("human")
VICUNA_V1 = _CHAT.format("user")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A way of asking, with the values that a published evaluation used.

    ``suffix`` is added to the question, after ``drop`` is taken from its end. ``system`` is the
    system message for models that have one: None leaves the model's own, "" leaves it out.

    **Departs from the papers:** the rest of the prompt is the model's own template. What else
    differs between the repositories (padding of the picture, a space or a line break after it) is
    the processor's and the template's, and the same for all protocols.
    """

    max_new_tokens: int
    suffix: str = ""
    drop: str = ""
    system: str | None = None

    def ask(self, question: str) -> str:
        """Return the question as it is asked."""
        return question.removesuffix(self.drop) + self.suffix


PROTOCOLS = Registry[Protocol]("protocol")
PROTOCOLS.register("bare", Protocol(max_new_tokens=16))
# VCD's and IMCCD's LLaVA and InstructBLIP runs; on MME after its own "Please answer yes or no.".
PROTOCOLS.register(
    "vcd",
    Protocol(
        max_new_tokens=1024,
        suffix=" Please answer this question with one word.",
        system=LLAVA_V1,
    ),
)
# LLaVA's own evaluation and lmms-eval's; on MME in place of "Please answer yes or no.".
PROTOCOLS.register(
    "llava",
    Protocol(
        max_new_tokens=128,
        suffix="\nAnswer the question using a single word or phrase.",
        drop=" Please answer yes or no.",
        system=VICUNA_V1,
    ),
)
PROTOCOLS.register("opera", Protocol(max_new_tokens=10, system=""))
PROTOCOLS.register(
    "clearsight",
    Protocol(max_new_tokens=1024, suffix=" Please just answer yes or no.", system=VICUNA_V1),
)
# Open questions, as LLaVA's model_vqa.py asks LLaVA-Bench.
PROTOCOLS.register("chat", Protocol(max_new_tokens=1024, system=VICUNA_V1))
