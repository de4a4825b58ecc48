"""Summaries, tables and figures against what paper says."""

import math
from itertools import combinations, pairwise

import pytest
from matplotlib.text import Text

from benchmarks.harness import Results, Summary, summarise
from benchmarks.harness.labels import Named, label_ends, label_points, spread
from benchmarks.harness.matrices import accuracy_matrices, accuracy_matrix, plot_matrices
from benchmarks.harness.plots import (
    COLOURS,
    REST,
    Curves,
    Dots,
    Points,
    new_figure,
    plot_curves,
    plot_dots,
    plot_scatter,
    styles,
)
from benchmarks.harness.report import where
from benchmarks.harness.store import Store
from benchmarks.harness.tables import Column, table

TABLE = """\
| strategy |      accuracy | forgetting |   n |
| :------- | ------------: | ---------: | --: |
| Naive    | 0.250 ± 0.125 |       0.75 |   3 |
| SI¹      | 0.250 ± 0.000 |          – |   3 |
| EWC      |     **0.875** |   **0.50** |   1 |
| MAS¹     |           nan |   **0.50** |   0 |

¹ does nothing on a CPU"""


def test_mean_and_sample_deviation_of_known_numbers():
    assert summarise([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]) == Summary(5.0, math.sqrt(32 / 7), 8)


def test_one_value_has_no_deviation():
    assert summarise([3.0]) == Summary(3.0, None, 1)


def test_a_diverged_seed_shows_in_the_mean():
    assert math.isnan(summarise([1.0, math.nan]).mean)
    assert summarise([1.0, math.inf]).mean == math.inf


def test_no_value_is_an_error():
    with pytest.raises(ValueError, match="no value to summarise"):
        summarise([])


def test_table_is_aligned_marked_and_annotated():
    columns = [Column("strategy"), Column("accuracy", best=max), Column("forgetting", 2, best=min), Column("n")]
    cells = [
        ["Naive", Summary(0.25, 0.125, 3), 0.75, 3],
        ["SI", Summary(0.25, 0.0, 3), None, 3],
        ["EWC", Summary(0.875, None, 1), 0.5, 1],
        ["MAS", Summary(math.nan, None, 1), 0.501, 0],
    ]
    note = "does nothing on a CPU"
    assert table(columns, cells, {"SI": note, "MAS": note, "absent": "unused"}) == TABLE


def test_a_bar_in_a_name_does_not_break_the_table():
    assert table([Column("name")], [["|κ|"]]).splitlines()[-1] == r"| \|κ\| |"


def test_no_two_labels_share_a_colour_and_the_rest_is_grey():
    labels = [str(i) for i in range(25)]

    def coloured(*matter):
        return [label for label, style in styles(labels, matter or None).items() if style.matters]

    assert coloured("3", "absent", "1") == ["1", "3"]
    assert styles(labels, ("3", "1"))["3"].colour == COLOURS[0]
    assert coloured() == coloured("absent") == labels[:7]
    assert len({styles(labels)[label].colour for label in labels}) == 8
    assert styles(labels)["24"].colour == REST
    assert [style.colour for style in styles(labels[:7], ("6",)).values()] == [*COLOURS[1:], COLOURS[0]]


def test_labels_move_no_further_than_they_must():
    assert spread([], [], 0.0, 9.0) == []
    assert spread([7.0, 1.0], [2.0, 2.0], 0.0, 9.0) == [7.0, 1.0]
    assert spread([5.0, 5.0, 5.0], [2.0, 1.0, 1.0], 0.0, 9.0) == pytest.approx([11 / 3, 31 / 6, 37 / 6])
    assert spread([0.0, 0.5, 8.9], [1.0, 1.0, 2.0], 0.0, 9.0) == [0.5, 1.5, 8.0]  # at both ends
    assert spread([4.0, 5.0], [8.0, 8.0], 0.0, 9.0) == [0.5, 8.5]  # more than there is room for


@pytest.mark.parametrize("log", [False, True])
def test_labels_stand_in_the_order_of_the_ends_and_cover_neither_each_other_nor_the_curves(log):
    figure = new_figure(5, 3)
    axes = figure.subplots()
    heights = [1.0, 1.01, 1.02, 1.03, 9.0]
    ends = [Named(f"a label of many words, number {i}", 1.0, y, "blue") for i, y in enumerate(heights)]
    for end in ends:
        axes.plot([0, 1], [5.0, end.y])
    axes.set_yscale("log" if log else "linear")
    label_ends(figure, {axes: ends})
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(label) for label in axes.texts]
    assert all(below.y1 <= above.y0 for below, above in pairwise(boxes))
    assert all(axes.bbox.x1 < box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_labels_of_points_cover_no_point_and_no_label():
    figure = new_figure(5, 3)
    axes = figure.subplots()
    places = [(0.0, 0.0), (0.03, 0.0), (0.0, 0.03), (1.0, 1.0)]
    axes.plot(*zip(*places), "o")
    label_points(figure, {axes: [Named("point", *xy, "blue") for xy in places[1:]]}, {axes: places[:1]})
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(label) for label in axes.texts]
    assert not any(box.contains(*axes.transData.transform(xy)) for box in boxes for xy in places)
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_figures_are_written_without_a_display(tmp_path):
    one, three = Summary(0.5, None, 1), Summary(0.6, 0.1, 3)
    labels = ["a", "b"]
    series = {"a": [(0.0, one), (1.0, one)], "b": [(0.0, three), (1.0, three)]}
    curves = [Curves(series, "accuracy"), Curves(series, "error", log=True, marks=[0.5])]
    paths = [
        plot_curves(tmp_path / "curves.png", curves, xlabel="step", labels=labels),
        plot_dots(tmp_path / "dots.png", [Dots({"a": one, "b": None}, "accuracy", reference=0.5)], labels=labels),
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


@pytest.mark.parametrize(("runs", "of_few", "of_all"), [(0, False, False), (2, True, False), (3, True, True)])
def test_a_report_tells_where_few_curves_are_and_where_all(tmp_path, runs, of_few, of_all):
    for number in range(runs):
        (tmp_path / "tensorboard-all" / f"strategy {number}" / "seed0").mkdir(parents=True)
    for number in range(min(runs, 2)):
        (tmp_path / "tensorboard" / f"strategy {number}").mkdir(parents=True)
    written = where(Store(tmp_path))
    assert (f"Curves: tensorboard --logdir {tmp_path}/tensorboard" in written) == of_few
    assert (f"Curves of all 3 runs: tensorboard --logdir {tmp_path}/tensorboard-all" in written) == of_all


def course(*matrices):
    """Results with the accuracies a[t][j] of seeds 0, 1, ..., experiences ending every 10 steps."""
    return Results(("a",), tuple(
        {"label": "a", "seed": seed, "metric": f"accuracy/experience_{j}", "step": 10 * (t + 1), "value": value}
        for seed, matrix in enumerate(matrices) for t, row in enumerate(matrix) for j, value in enumerate(row)
    ))  # fmt: skip


ONE = [[0.9, 0.1, 0.2], [0.6, 0.8, 0.3], [0.5, 0.7, 1.0]]
TWO = [[0.7, 0.3, 0.4], [0.8, 0.6, 0.1], [0.3, 0.5, 0.8]]


def test_an_accuracy_matrix_is_read_back_below_its_diagonal():
    assert accuracy_matrices(course(ONE), "a") == {0: [[0.9, None, None], [0.6, 0.8, None], [0.5, 0.7, 1.0]]}
    matrix = accuracy_matrix(course(ONE, TWO), "a")
    assert matrix[0] == [Summary(pytest.approx(0.8), pytest.approx(math.sqrt(0.02)), 2), None, None]
    assert matrix[2][1].mean == pytest.approx(0.6)
    assert accuracy_matrix(Results(("a",), ()), "a") == []


def test_a_seed_of_which_an_experience_is_missing_is_left_out():
    assert list(accuracy_matrices(course(ONE, TWO[:2]), "a")) == [0]


def test_finals_by_seed_take_the_last_step():
    assert course(ONE, TWO).finals("accuracy/experience_1", "a") == {0: 0.7, 1: 0.5}


def test_dollars_in_a_label_are_no_formula(tmp_path):
    label, one = r"$\frac$ and $", Summary(0.5, None, 1)
    plot_matrices(tmp_path / "m.png", {label: [[1.0]]})
    plot_scatter(tmp_path / "s.png", [Points({label: (one, one)}, "x", "y", label)], labels=[label])
    plot_dots(tmp_path / "d.png", [Dots({label: one}, "x")], labels=[label])


def test_matrices_and_points_are_drawn_whatever_is_missing(tmp_path):
    one, two = Summary(0.5, None, 1), Summary(0.0, 0.1, 3)
    labels = ["a", "b", "a label of so many words that it takes more than one line above its panel"]
    points = Points({"a": (one, two), "b": (one, None)}, "x", "y", log_x=True, log_y=True)
    paths = [
        plot_matrices(tmp_path / "m.png", {"a": accuracy_matrix(course(ONE), "a"), labels[2]: [[1.0]], "b": []}),
        plot_scatter(tmp_path / "s.png", [points], labels=labels),
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    with pytest.raises(ValueError, match="no matrix to draw"):
        plot_matrices(tmp_path / "m.png", {"a": []})
