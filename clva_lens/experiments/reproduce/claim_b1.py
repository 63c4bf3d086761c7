"""B.1: a claim on mutual information, which nothing here tests."""

from collections.abc import Sequence

from clva_lens.experiments.reproduce.found import Found
from clva_lens.experiments.reproduce.items import Item, Part, register
from clva_lens.experiments.reproduce.needs import Need
from clva_lens.experiments.reproduce.subjects import Subject


@register
class ClaimB1(Item):
    """Not tested."""

    name = "claim B.1"
    title = "not tested: mutual information of image and weighted tokens"
    method = (
        "B.1 says that re-weighting a language model's attention to a Q-Former's outputs reduces "
        "the mutual information between image and weighted tokens, and that re-weighting inside "
        "the Q-Former does not. The paper measures neither, and names no estimator. Both are "
        "deterministic functions of one picture, so their mutual information with it is decided "
        "by how pictures are distributed and by how finely numbers are kept, not by the weights "
        "alone; a variational bound would measure its critic as much. So nothing is computed "
        "here. What can be tested is what it would entail for answers: Table 1 of an InstructBLIP "
        "with CLVA(site='decoder') beside CLVA()."
    )

    def needs(self, subject: Subject) -> Sequence[Need]:
        """Return nothing."""
        return []

    def part(self, subject: Subject, found: Found) -> Part:
        """Return nothing: what is to be said is above."""
        return Part()
