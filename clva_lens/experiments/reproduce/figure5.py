"""Figure 5: accuracy over α and β."""

from collections.abc import Sequence

from clva_lens.experiments.reproduce.found import Found
from clva_lens.experiments.reproduce.items import Item, Part, register
from clva_lens.experiments.reproduce.making import Column, make_cells, source_of, yes_no
from clva_lens.experiments.reproduce.needs import Need, Run
from clva_lens.experiments.reproduce.subjects import Subject
from clva_lens.figures import surface
from clva_lens.methods.clva import CLVA

ALPHAS = (2.0, 6.0, 10.0, 14.0, 18.0, 22.0)
BETAS = (0.1, 0.3, 0.5, 0.7, 0.9)


@register
class Figure5(Item):
    """Strengths."""

    name = "figure 5"
    title = "accuracy over α and β, POPE random COCO"
    method = (
        "Change against greedy in points, with the change of the yes-ratio beside it: accuracy "
        "that moves with it is a shift of the threshold. The paper draws a surface without "
        "numbers, and its axes' grid is not legible: this grid is ours."
    )

    def needs(self, subject: Subject) -> Sequence[Need]:
        """Return a run for each pair, and greedy."""
        return list(_runs(subject).values())

    def part(self, subject: Subject, found: Found) -> Part:
        """Return both surfaces, and the cells they are drawn from."""
        runs = {name: [run] for name, run in _runs(subject).items()}
        labels = {name: name for name in runs}
        columns = [
            Column(header, yes_no(metric, source_of), runs, scale=100, better=better)
            for header, metric, better in (("Acc.", "accuracy", 1), ("yes, %", "yes_ratio", 0))
        ]
        cells = make_cells(subject, found, None, columns, labels)
        changes = {(one.row, one.column): one.change for one in cells}
        drawings = {}
        for header, word in (("Acc.", "accuracy"), ("yes, %", "yes-ratio")):
            rows = [
                {"alpha": alpha, "beta": beta, "change": changes.get((_name(alpha, beta), header))}
                for alpha in ALPHAS
                for beta in BETAS
            ]
            if all(row["change"] is not None for row in rows):
                label = f"change of {word} (points)"
                drawings[word] = surface(rows, "alpha", "beta", "change", label)
        notes = [] if drawings else [f"{subject.model}: the grid is not complete, so not drawn."]
        return Part(cells, drawings, notes=notes)


def _name(alpha: float, beta: float) -> str:
    return f"α = {alpha:g}, β = {beta:g}"


def _runs(subject: Subject) -> dict[str, Run]:
    (benchmark,) = subject.pope("random", "coco").values()
    limit = subject.limit_of("grid") if subject.toy else subject.limit_of("pope")
    runs = {"greedy": Run(subject, benchmark, limit=limit)}
    for alpha in ALPHAS:
        for beta in BETAS:
            method = CLVA(alpha=alpha, beta=beta)
            runs[_name(alpha, beta)] = Run(subject, benchmark, method, limit=limit)
    return runs
