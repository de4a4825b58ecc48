"""The tables that help to choose, on small records."""

import pytest

from benchmarks.harness.decisions import by_scenario, by_structure
from benchmarks.harness.results import Results

DIAGONAL, DENSE = {"class": "Diagonal"}, {"class": "Dense", "max_bytes": 9}
SAMPLED, EMPIRICAL = {"class": "Fisher", "samples": 1}, {"class": "EmpiricalFisher"}


def compared(**accuracies):
    """Results of `compare`: by strategy the accuracies of seeds 0, 1, ..."""
    names = {name: name.replace("_", " ") for name in accuracies}
    rows = tuple(
        {"metric": "average_accuracy", "step": None, "value": value, "label": names[name], "seed": seed}
        for name, values in accuracies.items()
        for seed, value in enumerate(values)
    )
    headers = tuple(
        {"label": row["label"], "seed": row["seed"], "config": {"strategy": row["label"]}, "commit": "c"}
        for row in rows
    )
    return Results(tuple(names.values()), rows, headers)


def cells(markdown, *first):
    """The cells of the row that begins with these."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]
    return next(row for row in rows if row[: len(first)] == [*first])


def row(**accuracies):
    return cells(by_scenario([("class", "scratch", compared(**accuracies))]), "class")


BOUNDS = {"Naive": [0.2, 0.2], "Cumulative": [1.0, 1.0], "JointTraining": [0.9, 0.9]}


def test_a_row_leads_from_naive_by_the_best_without_and_with_examples_to_all_at_once():
    found = row(**BOUNDS, EWC=[0.6, 0.8], MAS=[0.5, 0.5], LwF=[0.7, 0.7], Replay=[0.8, 0.9], GDumb=[0.3, 0.3])
    assert found == [
        "class", "scratch", "0.200 ± 0.000", "EWC; LwF **0.700 ± 0.141**", "Replay **0.850 ± 0.071**", "0.900 ± 0.000"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("accuracy", "said"),
    [(0.26, "nothing helps: SI 0.260 ± 0.000"), (0.28, "little helps: SI 0.280 ± 0.000"),
     (0.54, "little helps: SI 0.540 ± 0.000"), (0.56, "SI **0.560 ± 0.000**")],
)  # fmt: skip
def test_it_is_said_where_nothing_helps(accuracy, said):
    """A tenth of the way from 0.2 to 0.9 is at 0.27, half of it at 0.55."""
    assert row(**BOUNDS, SI=[accuracy] * 2)[3] == said


def test_the_best_of_ours_follows_where_it_is_not_named():
    names = {"CurvatureEWC Fisher, merge": [0.3] * 2, "CurvatureEWC Fisher, accumulate": [0.22] * 2}
    assert row(**BOUNDS, **names, GPM=[0.4] * 2)[3] == (
        "little helps: GPM 0.400 ± 0.000; CurvatureEWC Fisher, merge 0.300 ± 0.000"
    )
    names["CurvatureEWC Fisher, merge"] = [0.25] * 2
    assert row(**BOUNDS, **names, GPM=[0.4] * 2)[3] == (
        "little helps: GPM 0.400 ± 0.000; CurvatureEWC does not: 0.250 ± 0.000"
    )
    assert row(**BOUNDS, **names, GPM=[0.1] * 2)[3] == "nothing helps: CurvatureEWC Fisher, merge 0.250 ± 0.000"


def test_where_there_is_nothing_to_keep_naive_is_enough():
    bounds = {"Naive": [0.9, 0.9], "JointTraining": [0.905, 0.905]}
    assert row(**bounds, EWC=[0.91] * 2, Replay=[0.9] * 2)[3:5] == ["Naive is enough"] * 2


def test_of_rows_of_ours_that_are_alike_one_is_named():
    names = {"CurvatureEWC Fisher, merge": [0.8, 0.7], "CurvatureEWC Fisher, accumulate": [0.75, 0.73]}
    assert row(**BOUNDS, **names, LwF=[0.74] * 2)[3] == "CurvatureEWC Fisher, merge; LwF **0.750 ± 0.071**"


def test_many_that_are_alike_are_counted_and_what_is_not_there_is_a_dash():
    alike = {name: [0.8, 0.8] for name in ("EWC", "SI", "MAS", "RWalk", "LwF")}
    assert row(**BOUNDS, **alike)[3:5] == ["EWC; SI; MAS and 2 more **0.800 ± 0.000**", "–"]
    assert row(EWC=[0.5])[2:] == ["–", "EWC **0.500**", "–", "–"]


def test_runs_that_diverged_are_no_best():
    assert row(**BOUNDS, EWC=[float("nan")] * 2, LwF=[0.8] * 2)[3] == "LwF **0.800 ± 0.000**"


def prices(structure=DIAGONAL):
    works = [
        {"name": "a", "curvature": EMPIRICAL, "structure": structure},
        {"name": "b", "curvature": SAMPLED, "structure": structure},
    ]
    references, ratios = {"build/reference": 750.0, "step1/reference": 4.0}, {"build/ratio": 2.0, "step1/ratio": 1.5}
    rows = tuple(
        {"metric": metric, "step": None, "value": value, "row": name, "label": "net", "seed": 0}
        for name, factor in (("a", 1), ("b", 2))
        for metric, value in (*references.items(), *((one, factor * ratio) for one, ratio in ratios.items()))
    )
    return Results(("net",), rows, ({"label": "net", "seed": 0, "config": {"works": works}, "commit": "0123456789"},))


def kept(model="net"):
    """Naive, and one structure of two on a model; accuracies 0.5 and 0.75."""
    methods = {"Naive": (None, 0.5), "Diagonal()": (DIAGONAL, 0.75)}
    rows, headers = [], []
    for method, (structure, accuracy) in methods.items():
        unit = {"label": f"{model}, {method}", "seed": 0}
        config = {"model": model, "method": method, "structure": structure, "curvature": SAMPLED, "tasks": 2}
        headers.append({**unit, "config": config})
        rows += [{"metric": "average_accuracy", "step": None, "value": accuracy, **unit}]
        rows += [{"metric": "bytes", "step": None, "value": size, "row": name, **unit}
                 for name, size in (("Diagonal()", 3 * 2**19), ("Dense()", 2**41))]  # fmt: skip
    return Results(tuple(header["label"] for header in headers), tuple(rows), tuple(headers))


def test_a_structure_has_its_accuracy_its_bytes_and_the_times_of_its_own_curvature():
    written = by_structure(kept(), prices())
    assert cells(written, "net") == ["net", "Naive", "0.500", "", "", "4.0 ms"]
    assert cells(written, "", "`Diagonal()`")[2:] == ["0.750", "1.5 MiB", "3.00 s (4.0)", "12.0 ms (3.00)"]
    assert "last of 2 tasks" in written
    newer = {**DIAGONAL, "sums": {"class": "Other"}, "added": None}  # options that one of the two was recorded without
    assert by_structure(kept(), prices(newer)) == written
    assert "commit 0123456, one thread" in written


def test_what_does_not_fit_has_its_bytes_and_what_was_not_timed_dashes():
    assert cells(by_structure(kept(), prices()), "", "`Dense()`")[2:] == ["–", "2,048.0 GiB", "–", "–"]
    assert cells(by_structure(kept("another"), prices()), "", "`Diagonal()`")[2:] == ["0.750", "1.5 MiB", "–", "–"]
