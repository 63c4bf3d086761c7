"""Figure 1: how much each head looks at the picture, and how much at words."""

from typing import Any

import numpy as np

from clva_lens.experiments.reproduce.items import Measured, Part, register
from clva_lens.experiments.reproduce.looks import measure_heads
from clva_lens.experiments.reproduce.needs import Measure
from clva_lens.experiments.reproduce.subjects import LOOKS, Subject
from clva_lens.figures import attention_masses


@register
class Figure1(Measured):
    """Heads."""

    name = "figure 1"
    title = "which heads look at the picture"
    method = (
        "Eq. 1: the mean over text rows after the picture, and over adversarial questions. The "
        "paper's numbers are the attention to system and text; with that to the image it sums to "
        "1, so they have a panel of their own, and the table has all three."
    )

    def measure(self, subject: Subject) -> Measure:
        """Return the measurement."""
        return Measure(subject, "heads", measure_heads, subject.limit_of("looks") or LOOKS)

    def shown(self, subject: Subject, told: dict[str, Any]) -> Part:
        """Return the matrices."""
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
