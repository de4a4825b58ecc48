"""TensorBoard's view of the units: beside their curves the charts that overlay runs and a row each in the table of
runs, and the few that it opens with."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.experiment import Unit, columns, describe
from benchmarks.harness.store import Store

Options = dict[str, str | float | bool]
LONGEST = 60
SELECTED = 7  # runs that TensorBoard opens with: it has so many colours
OPTIONS_FIRST = ("strategy", "strength", "curvature", "structure", "policy")
RESULTS_FIRST = ("average_accuracy", "forgetting", "accuracy/past_tasks", "fidelity/accumulate/kappa_abs",
                 "fidelity/refresh/kappa_abs")


def selected(units: Sequence[Unit], shown: Sequence[str]) -> list[Unit]:
    """At most seven units of the first seed: those with the labels of `shown`, in its order, or the first of the grid
    where there are none."""
    seed = min(unit.seed for unit in units)
    by_label = {unit.label: unit for unit in units if unit.seed == seed}
    ordered = {label: by_label[label] for label in shown if label in by_label} or by_label
    return list(ordered.values())[:SELECTED]


def select(store: Store, units: Sequence[Unit]) -> None:
    """Make the folder that TensorBoard opens hold copies of the event files of these units, as far as they have
    finished, and nothing else: in the folder of all runs it would begin with none ticked, or with all."""
    folder = store.selected_runs
    if folder.exists() and not store.all_runs.exists():
        folder.rename(store.all_runs)  # from before there were two: these are the originals
    wanted = {
        unit.label: run for unit in units
        if store.finished(unit.digest) and any((run := store.tensorboard(unit.label, unit.seed)).glob("events.*"))
    }  # fmt: skip
    for old in folder.glob("*"):
        if old.name not in wanted or _files(old) != _files(wanted[old.name]):
            shutil.rmtree(old)
    for label, run in wanted.items():
        if not (folder / label).exists():
            shutil.copytree(run, folder / label)


def _files(folder: Path) -> set[tuple[str, int]]:
    return {(path.name, path.stat().st_size) for path in folder.glob("*")}


def publish(folder: Path, unit: Unit, table: Mapping[str, Options], records: Sequence[Mapping[str, Any]]) -> None:
    """Add the layout and the unit's row of the table (`options`) to the event files of a run; nothing where it has left
    none."""
    if not any(folder.glob("events.out.tfevents.*")):
        return
    from torch.utils.tensorboard import SummaryWriter

    from avalanche_curv.tensorboard import CHARTS, write_hparams, write_layout

    logged = b"".join(path.read_bytes() for path in sorted(folder.glob("events.out.tfevents.*")))
    filled = {heading: {t: tag for t, tag in charts.items() if _has(logged, tag)} for heading, charts in CHARTS.items()}
    drawn = {heading: charts for heading, charts in filled.items() if charts}
    known = {name: value for row in table.values() for name, value in row.items()} | {"seed": unit.seed}
    with SummaryWriter(folder, filename_suffix=".results") as writer:
        write_layout(writer, drawn)
        row = table[unit.label] | {"seed": unit.seed}
        write_hparams(writer, row, results(records), columns=_led_by(OPTIONS_FIRST, known))


def options(units: Sequence[Unit]) -> dict[str, Options]:
    """By label: the label as "strategy", and the columns of its configuration that are not None. Values other than
    numbers and truth values become a short text."""
    configs = {unit.label: describe(unit.config) for unit in units}
    found = columns(list(configs.values()))
    return {
        label: {"strategy": label, **{k: _short(v) for k, v in row.items() if k != "label" and v is not None}}
        for label, row in zip(configs, found)
    }


def results(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The last value of each metric, as `results/<metric>`: of those without steps, and of the curves that have a
    chart; those of RESULTS_FIRST first."""
    from avalanche_curv.tensorboard import CHARTS

    curves = {tag for group in CHARTS.values() for tag in group.values()}
    kept = (record for record in records if record["step"] is None or record["metric"] in curves)
    ordered = sorted(kept, key=lambda record: -1 if record["step"] is None else record["step"])
    last = _led_by(RESULTS_FIRST, {record["metric"]: record["value"] for record in ordered})
    return {f"results/{metric}": value for metric, value in last.items()}


def _led_by(first: Sequence[str], values: dict[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in first if name in values} | values


def _has(logged: bytes, tag: str) -> bool:
    """Whether a scalar is among the events. Looks for its tag as it is encoded, since parsing all events would take
    seconds."""
    return b"\n" + bytes([len(tag.encode())]) + tag.encode() in logged


def _short(value: Any) -> str | float | bool:
    if isinstance(value, bool | int | float):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
