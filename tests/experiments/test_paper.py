"""A number of the paper stands only beside what it is a number of."""

import pytest

from clva_lens.experiments.paper import MEAN, SOURCES, SPLITS, beside_paper, paper_rows, pope_means

LLAVA = "llava-hf/llava-1.5-7b-hf"


def rows(*sources, methods=("greedy", "CLVA")):
    """Accuracies that tell their source and split, and what CLVA changes."""
    return [
        {
            "benchmark": f"pope/{source}/{split}",
            "method": method,
            "metric": metric,
            "value": (s + 1) / 10 + d / 100,
            "change": None if method == "greedy" else d / 100,
            "low": -1.0,
            "high": 1.0,
            "n": 10,
        }
        for s, source in enumerate(sources)
        for d, split in enumerate(SPLITS)
        for method in methods
        for metric in ("accuracy", "f1", "seconds")
    ]


@pytest.mark.parametrize("table", [1, 4, 6])
@pytest.mark.parametrize("source", [*SOURCES, MEAN, "toy"])
def test_a_mean_of_three_data_sets_stands_beside_no_single_one(table, source):
    methods = {cell["method"] for cell in paper_rows(table)}
    given = rows(source, methods=methods)
    given += [row | {"benchmark": f"pope/{source}/average"} for row in given[:4]]
    found = [row["paper"] for row in beside_paper(given, table, LLAVA)]
    right = source == (MEAN if table == 1 else "coco")
    assert any(one is not None for one in found) == right
    assert all(one is None for row, one in zip(given, found, strict=True) if row["metric"] == "n")


def test_the_numbers_are_those_of_the_table():
    given = [*rows(*SOURCES), *pope_means(rows(*SOURCES))]
    found = {
        (row["benchmark"], row["method"], row["metric"]): row["paper"]
        for row in beside_paper(given, 1, LLAVA)
    }
    assert found[f"pope/{MEAN}/random", "greedy", "accuracy"] == 88.26
    assert found[f"pope/{MEAN}/average", "CLVA", "f1"] == 85.67
    assert {one for (name, *_), one in found.items() if "mean" not in name} == {None}
    assert {row["paper"] for row in beside_paper(given, 1, "toy-llava")} == {None}


def test_means_are_of_all_three_data_sets_or_are_not_there():
    made = {(r["benchmark"], r["method"], r["metric"]): r for r in pope_means(rows(*SOURCES))}
    # (0.1 + 0.2 + 0.3) / 3, and the popular split is 0.01 more.
    row = made[f"pope/{MEAN}/popular", "CLVA", "accuracy"]
    assert row["value"] == pytest.approx(0.21) and row["change"] == pytest.approx(0.01)
    assert (row["low"], row["high"], row["n"]) == (None, None, 30)
    average = made[f"pope/{MEAN}/average", "greedy", "f1"]
    assert average["value"] == pytest.approx(0.21) and average["change"] is None
    assert made["pope/gqa/average", "CLVA", "accuracy"]["value"] == pytest.approx(0.31)
    assert not any(metric == "seconds" for _, _, metric in made)
    alone = {row["benchmark"] for row in pope_means(rows("coco", "gqa"))}
    assert alone == {"pope/coco/average", "pope/gqa/average"}
    assert pope_means([row for row in rows("coco") if "popular" not in row["benchmark"]]) == []
