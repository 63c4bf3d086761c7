"""Figure 1: how much each head looks at the picture, and how much at words."""

from collections.abc import Sequence

import numpy as np

from clva_lens.experiments.reproduce.found import Found, Missing
from clva_lens.experiments.reproduce.items import Item, Part, register
from clva_lens.experiments.reproduce.looks import measure_heads
from clva_lens.experiments.reproduce.needs import Measure, Need
from clva_lens.experiments.reproduce.subjects import LOOKS, Subject
from clva_lens.figures import attention_masses


def _measure(subject: Subject) -> Measure:
    return Measure(subject, "heads", measure_heads, subject.limit_of("looks") or LOOKS)


@register
class Figure1(Item):
    """Heads."""

    name = "figure 1"
    title = "which heads look at the picture"
    method = (
        "Eq. 1: the mean over text rows after the picture, and over adversarial questions. The "
        "paper's numbers are the attention to system and text; with that to the image it sums to "
        "1, so they have a panel of their own, and the table has all three."
    )

    def needs(self, subject: Subject) -> Sequence[Need]:
        """Return one measurement."""
        return [_measure(subject)]

    def part(self, subject: Subject, found: Found) -> Part:
        """Return the matrices."""
        try:
            told = found.measured(_measure(subject))
        except Missing as missing:
            return Part(notes=[f"{subject.model}: {missing}."])
        image, system, text = (np.array(told[key]) for key in ("intensity", "system", "text"))
        drawn = attention_masses(image, system + text, layers=told["layers"])
        above = float((image > 0.5).mean())
        note = (
            f"{subject.model}, {told['questions']} questions: text rows put {image.mean():.0%} of "
            f"their attention on the picture, {system.mean():.0%} on system and "
            f"{text.mean():.0%} on text tokens; {above:.0%} of the heads put more than half on "
            f"the picture."
        )
        return Part(drawings={"masses": drawn}, notes=[note])
