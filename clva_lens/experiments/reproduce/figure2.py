"""Figure 2b, and Eq. 12: curves over layers, beside those of random weights."""

from collections.abc import Callable
from typing import Any

from clva_lens.experiments.reproduce.intervals import FEW
from clva_lens.experiments.reproduce.items import Measured, Part, register
from clva_lens.experiments.reproduce.looks import UNTRAINED, measure_drift, measure_parts
from clva_lens.experiments.reproduce.needs import Measure
from clva_lens.experiments.reproduce.subjects import LOOKS, Subject
from clva_lens.figures import layer_curves


class _Curves(Measured):
    """Curves over layers."""

    measured: str
    make: Callable[..., dict[str, Any]]

    def measure(self, subject: Subject) -> Measure:
        """Return the measurement."""
        passes = 4 * (subject.limit_of("looks") or LOOKS)
        return Measure(subject, self.measured, self.make, passes)

    def shown(self, subject: Subject, told: dict[str, Any]) -> Part:
        """Return the curves, and what follows from them."""
        rows = [
            row if row["pictures"] >= FEW else {**row, "low": None, "high": None}
            for row in told["rows"]
        ]
        notes = [self.said(subject, told)]
        if any(row["pictures"] < FEW for row in told["rows"]):
            notes.append(f"{subject.model}: fewer than {FEW} pictures, so no bands are drawn.")
        drawn = layer_curves(rows, marked=told["positive_layer"])
        return Part(drawings={"layers": drawn}, notes=notes)

    def said(self, subject: Subject, told: dict[str, Any]) -> str:
        """Return what the curves say."""
        raise NotImplementedError


def curve(told: dict[str, Any], quantity: str, run: str) -> dict[int, float]:
    """Return the values of a curve by layer."""
    return {
        row["layer"]: row["value"]
        for row in told["rows"]
        if row["quantity"].startswith(quantity) and row["run"] == run
    }


@register
class Figure2(_Curves):
    """Drift."""

    name = "figure 2"
    title = "entropy and drift by layer (b)"
    method = (
        "Eqs. 5 and 6 over adversarial questions. r with the positive anchor is that with a map "
        "of its own layer, so it is near 1 there by definition, and CLVA's edit is made of both "
        "anchors: the same curves of a model with random weights show how much of their shape is "
        "no finding. Panel (a) is the item figure 2a."
    )
    measured = "drift"
    make = staticmethod(measure_drift)

    def said(self, subject: Subject, told: dict[str, Any]) -> str:
        """Return how late layers stand to both anchors."""
        lines = []
        for run in ("greedy", UNTRAINED):
            near = curve(told, "r with the positive", run)
            first = curve(told, "r with the first", run)
            if not near or not first:
                continue
            middle, last = told["positive_layer"], max(near)
            lines.append(
                f"{run}: r with the anchor goes from {near[middle]:.2f} in its layer {middle} to "
                f"{near[last]:.2f} in the last, r with the first layer's map from "
                f"{first[middle]:.2f} to {first[last]:.2f}"
            )
        return f"{subject.model}. {'; '.join(lines)}."


@register
class Equation12(_Curves):
    """Parts of the output."""

    name = "equation 12"
    title = "linguistic and visual part of the attention output (§ 4.4)"
    method = (
        "O = O_P + O_V at the last row of the prompt, exact, from the row of the pattern and the "
        "values: the lengths of both over all heads of a layer, and the projection of O_V on O "
        "over its length. § 4.4 expects O_V to dominate early and to vanish late, and CLVA to "
        "make O_P smaller. Beside it the same of a model with random weights."
    )
    measured = "parts"
    make = staticmethod(measure_parts)

    def said(self, subject: Subject, told: dict[str, Any]) -> str:
        """Return the share of the first and the last layer, and what CLVA does to O_P."""
        lines = []
        for run in ("greedy", UNTRAINED):
            share = curve(told, "visual share", run)
            plain, edited = (
                curve(told, "linguistic", one)
                for one in (run, "CLVA" if run == "greedy" else f"{run}, CLVA")
            )
            if not share or not edited:
                continue
            after = [layer for layer in plain if layer > told["positive_layer"]]
            ratio = sum(edited[i] for i in after) / max(sum(plain[i] for i in after), 1e-12)
            lines.append(
                f"{run}: visual share {share[min(share)]:.2f} in layer {min(share)}, "
                f"{share[max(share)]:.2f} in layer {max(share)}; CLVA makes O_P in the layers "
                f"after the anchor {ratio:.2f} times as long"
            )
        return f"{subject.model}. {'; '.join(lines)}."
