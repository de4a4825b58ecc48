"""What TensorBoard shows of an experiment: in the event files, and as a person sees it in a browser."""

import gc
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
import weakref
from dataclasses import dataclass
from pathlib import Path

import pytest
from avalanche.logging import TensorboardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from avalanche_curv.tensorboard import CHARTS, write_hparams
from benchmarks.harness import Experiment
from benchmarks.harness.board import options, results, select, selected
from benchmarks.harness.command import main
from benchmarks.harness.experiment import Unit
from benchmarks.harness.store import Store
from benchmarks.harness.unit_run import Job, run_unit
from benchmarks.registry import Registered

RUNS = ["CurvatureEWC, refresh/seed0", "CurvatureEWC, refresh/seed1", "Naive/seed0", "Naive/seed1"]
GROUPS = {"accuracy", "fidelity", "gradient", "growth", "landscape", "results"}
RESULTS = ["average_accuracy", "forgetting", "fidelity/refresh/kappa_abs", "accuracy/stored"]
NOT_RUN = {"Refreshing", "Plasticity", "Projection"}
TITLES = {heading: list(charts) for heading, charts in CHARTS.items() if heading not in NOT_RUN}


@dataclass(frozen=True)
class Labelled:
    label: str
    strength: float


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """The TensorBoard folder of two strategies with two seeds each; the second seed in a second run."""
    out = tmp_path_factory.mktemp("board")
    experiments = {"drawn": Registered("drawn_experiment:experiment", "two strategies", "drawn_experiment:report")}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            patch.setenv(name, "1")
        for seeds in ("1", "2"):
            assert main(["run", "drawn", "--seeds", seeds, "--jobs", "1", "--out", str(out)], experiments) == 0
    return out / "drawn" / "tensorboard-all"


def events_of(folder):
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def runs_in(board):
    return sorted({file.parent.relative_to(board).as_posix() for file in board.rglob("events.out.tfevents.*")})


def layout_of(folder):
    (event,) = events_of(folder).Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    return {c.title: {chart.title: list(chart.multiline.tag) for chart in c.chart} for c in layout.category}


def hparams_of(folder):
    """The row and the columns that a run defines."""
    content = {
        tag: HParamsPluginData.FromString(data)
        for tag, data in events_of(folder).PluginTagToContent("hparams").items()
    }
    start = content["_hparams_/session_start_info"].session_start_info.hparams
    row = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.items()}
    return row, content["_hparams_/experiment"].experiment


def test_runs_are_named_by_strategy_and_seed_and_resuming_adds_the_missing_ones(board):
    assert runs_in(board) == RUNS
    for run in RUNS:
        assert len(list((board / run).iterdir())) == 2  # what the run logged, and what the harness adds


def test_the_runs_to_open_with_are_those_of_one_seed_and_whole(board):
    few = board.parent / "tensorboard"
    assert runs_in(few) == ["CurvatureEWC, refresh", "Naive"]
    for run in runs_in(few):
        assert {file.name: file.read_bytes() for file in (few / run).iterdir()} == {
            file.name: file.read_bytes() for file in (board / run / "seed0").iterdir()
        }


def units_of(*labels, seeds=(0, 1)):
    return [Unit("e", 1, Labelled(label, 1.0), seed, False) for label in labels for seed in seeds]


def test_at_most_seven_runs_are_selected_those_that_an_experiment_names_first():
    def names(units, *shown):
        return [(unit.label, unit.seed) for unit in selected(units, shown)]

    many = units_of(*"abcdefghi")
    assert names(many, "h", "absent", "b") == [("h", 0), ("b", 0)]
    assert names(many) == names(many, "absent") == [(label, 0) for label in "abcdefg"]
    assert names(units_of("a", seeds=(3, 2))) == [("a", 2)]


def test_the_selection_follows_what_has_finished_and_loses_no_run(tmp_path):
    store, (a, b) = Store(tmp_path), units_of("a", "b", seeds=(0,))
    original = tmp_path / "tensorboard" / "a" / "seed0" / "events.1"  # of a time when this folder held all runs
    original.parent.mkdir(parents=True)
    original.write_text("1")
    select(store, [a, b])
    assert runs(store.selected_runs) == []
    assert runs(store.all_runs) == ["a/seed0/events.1"]
    store.write_unit(a.digest, {}, [])
    store.write_unit(b.digest, {}, [])  # which writes no events
    select(store, [a, b])
    assert runs(store.selected_runs) == ["a/events.1"]
    (store.tensorboard("a", 0) / "events.1").rename(store.tensorboard("a", 0) / "events.2")  # it ran again
    select(store, [a, b])
    assert runs(store.selected_runs) == ["a/events.2"]
    select(store, [b])
    assert runs(store.selected_runs) == []
    assert runs(store.all_runs) == ["a/seed0/events.2"]


def runs(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("events.*"))


def test_scalars_fall_into_groups_and_an_experience_with_a_past_ends_with_figures(board):
    for run in RUNS:
        events = events_of(board / run)
        groups = {tag.split("/")[0].removesuffix("_experience") for tag in events.Tags()["scalars"]}
        expected = GROUPS | {"fidelity_trajectory"} | ({"penalty"} if run.startswith("Curvature") else set())
        assert groups == expected
        assert [event.step for event in events.Images("fidelity/kappa_against_distance")] == [6]
        assert [event.step for event in events.Images("landscape/stored/spectrum")] == [6]


class Tangled(Experiment):
    """Leaves its logger in a reference cycle, as strategies do: only the garbage collector closes it."""

    name = "tangled"

    def __init__(self):
        self.closed = []

    def configs(self, options):
        return [Labelled("a", 1.0)]

    def run(self, config, seed, context):
        logger = TensorboardLogger(context.tensorboard_dir)
        logger.log_single_metric("accuracy/stored", 0.5, 3)
        self_held = [logger]
        self_held.append(self_held)
        weakref.finalize(logger, self.closed.append, logger.writer)
        return [{"metric": "accuracy", "value": 0.5}]


def test_when_a_unit_has_finished_its_last_event_is_on_disk(tmp_path):
    experiment, store = Tangled(), Store(tmp_path)
    unit = Unit("tangled", 1, Labelled("a", 1.0), 0, False)
    gc.disable()
    try:
        assert run_unit(Job(experiment, store, None, None, options([unit])), unit).error is None
        assert len(experiment.closed) == 1
        (event,) = events_of(store.tensorboard("a", 0)).Scalars("accuracy/stored")
    finally:
        gc.enable()
    assert (event.step, event.value) == (3, 0.5)
    assert list(layout_of(store.tensorboard("a", 0))) == ["Accuracy"]


def test_the_layout_has_the_charts_that_a_run_can_fill_and_each_shows_one_scalar(board):
    for run in RUNS:
        layout, scalars = layout_of(board / run), events_of(board / run).Tags()["scalars"]
        drawn = set(TITLES) - ({"Penalty"} if run.startswith("Naive") else set())
        assert set(layout) == drawn
        lacking = {"gradient/penalty_norm", "gradient/cosine"} if run.startswith("Naive") else set()
        for heading, charts in layout.items():
            assert list(charts) == [title for title in TITLES[heading] if CHARTS[heading][title] not in lacking]
            for title, patterns in charts.items():
                found = [tag for tag in scalars for pattern in patterns if re.search(pattern, tag)]
                assert set(found) == {CHARTS[heading][title]}


def test_each_run_has_a_row_with_its_options_and_all_runs_the_same_columns(board):
    tables = {run: hparams_of(board / run) for run in RUNS}
    assert tables["Naive/seed1"][0] == {"strategy": "Naive", "seed": 1, "steps": 6}
    assert tables["CurvatureEWC, refresh/seed0"][0] == {
        "strategy": "CurvatureEWC, refresh", "seed": 0, "method": "Trained", "steps": 6, "clipped": "yes",
        "strength": 10.0, "policy": "Refresh", "fraction": 0.2, "policy.seed": 0, "gradient": "no",
    }  # fmt: skip
    for _, table in tables.values():
        names = [info.name for info in table.hparam_infos]
        assert names[:3] == ["strategy", "strength", "policy"]
        assert set(names) == set(tables["CurvatureEWC, refresh/seed0"][0])
        assert [info.name for info in table.hparam_infos if info.differs] == names[:5]
        assert [info.display_name for info in table.metric_infos] == RESULTS


def test_results_are_the_final_values(board):
    for run in RUNS:
        events = events_of(board / run)
        (accuracy,), (forgetting,) = (events.Scalars(f"results/{name}") for name in RESULTS[:2])
        assert accuracy.value == (0.75 if run.startswith("Curvature") else 0.5)
        assert forgetting.value == 0.125 + int(run[-1])
        for curve in RESULTS[2:]:
            (last,) = events.Scalars(f"results/{curve}")
            assert last.value == pytest.approx(events.Scalars(curve)[-1].value)


def test_a_result_without_step_is_taken_and_a_curve_gives_its_last_value_if_it_has_a_chart():
    curve = {1: 3.0, 2: 4.0}
    records = [{"metric": "penalty/raw", "value": value, "step": step} for step, value in curve.items()]
    records += [{"metric": "own/curve", "value": 1.0, "step": 1}, {"metric": "forgetting", "value": 0.1, "step": None}]
    assert results(records) == {"results/forgetting": 0.1, "results/penalty/raw": 4.0}


@dataclass(frozen=True)
class Inner:
    seed: int
    sizes: tuple = (1, 2)


@dataclass(frozen=True)
class Outer:
    label: str
    inner: Inner
    absent: object = None
    kind: object = Path


def test_options_are_flat_short_and_unambiguous():
    unit = Unit("e", 1, Outer("a", Inner(3, tuple(range(99)))), 7, False)
    flat = options([unit])["a"]
    assert list(flat) == ["strategy", "inner.seed", "sizes", "kind"]  # a class that says no more than its field
    assert (flat["strategy"], flat["inner.seed"]) == ("a", 3)
    assert flat["sizes"].startswith("[0, 1, 2")
    assert len(flat["sizes"]) == 60
    assert flat["kind"].endswith("Path")
    both = options([unit, Unit("e", 1, Labelled("b", 1.0), 0, False)])
    assert both == {"a": flat, "b": {"strategy": "b", "strength": 1.0}}


def test_an_option_that_tensorboard_cannot_show_is_refused(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer, pytest.raises(TypeError, match=r"'sizes' is a tuple\. Give its name"):
        write_hparams(writer, {"sizes": (1, 2)}, {})


# In a browser ---------------------------------------------------------------------------------------------------------

SEEN = """
const texts = [], images = [];
function walk(node) {
  if (node.nodeType === 3 && node.textContent.trim()) texts.push(node.textContent.trim());
  if (node.tagName === 'IMG' && node.complete && node.naturalWidth > 0) images.push(node.naturalWidth);
  if (['STYLE', 'SCRIPT', 'TEMPLATE', 'NOSCRIPT'].includes(node.tagName)) return;
  if (node.shadowRoot) walk(node.shadowRoot);
  node.childNodes.forEach(walk);
}
walk(document.body);
return [texts, images];
"""


@pytest.fixture
def server(board):
    """TensorBoard on the folder: its address, once it has read all runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--logdir", str(board), "--port", str(port), "--load_fast=false"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    try:
        waited(lambda: len(answer(f"{address}/data/plugin/custom_scalars/layout").get("category", [])) == len(TITLES))
        waited(lambda: len(sorted_by(address, "average_accuracy")) == len(RUNS))  # the table lags behind the charts
        yield address
    finally:
        process.terminate()
        process.wait(10)


def answer(address):
    try:
        with urllib.request.urlopen(address, timeout=10) as response:
            return json.load(response)
    except (OSError, ValueError):
        return {}


def sorted_by(server, result):
    """The rows of the table of runs, sorted by one of its columns, the largest first."""
    statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
    column = {"metric": {"tag": f"results/{result}", "group": ""}, "order": "ORDER_DESC"}
    question = {"allowedStatuses": statuses, "colParams": [column], "startIndex": 0, "sliceSize": 100}
    address, headers = f"{server}/data/plugin/hparams/session_groups", {"Content-Type": "application/json"}
    request = urllib.request.Request(address, json.dumps(question).encode(), headers)
    return [row["name"] for row in answer(request).get("sessionGroups", [])]


def waited(condition, seconds=90.0):
    """The first true value of a condition."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            pytest.fail("waited in vain")
        time.sleep(0.3)
    return value


def read(browser, address, name, *words, without=(), images=0):
    """The texts of a page of TensorBoard, once it shows all words and so many images, and none of `without`."""
    browser.get("about:blank")
    browser.get(f"{address}/#{name}")

    def shown():
        texts, loaded = browser.execute_script(SEEN)
        return texts if set(words) <= set(texts) and not set(without) & set(texts) and len(loaded) >= images else None

    return waited(shown, 60)


@pytest.mark.slow
def test_runs_sort_by_final_accuracy_and_by_forgetting(server):
    assert [run[:5] for run in sorted_by(server, "average_accuracy")] == ["Curva", "Curva", "Naive", "Naive"]
    assert [run[-5:] for run in sorted_by(server, "forgetting")] == ["seed1", "seed1", "seed0", "seed0"]


@pytest.mark.slow
def test_a_person_sees_strategies_groups_charts_a_table_and_figures(browser, server):
    read(browser, server, "timeseries", *RUNS, "accuracy", "fidelity")
    read(browser, server, "scalars", *RUNS, *GROUPS, "penalty")
    charts = [*TITLES, *TITLES["Accuracy"], *TITLES["Fidelity"], "Matches (4)"]
    read(browser, server, "custom_scalars", *RUNS, *charts, without=["Matches (0)"])
    texts = read(browser, server, "hparams", "Trial ID", *RUNS, *RESULTS, "strategy", "strength", "policy")
    table = texts[texts.index("Trial ID") :]
    for run in RUNS:
        row = table[table.index(run) :][:8]
        assert run.split("/")[0] in row
        assert ("0.75000" if run.startswith("Curvature") else "0.50000") in row
    read(browser, server, "images", *RUNS, "fidelity/kappa_against_distance", images=1)
