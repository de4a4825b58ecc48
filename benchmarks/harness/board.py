"""TensorBoard's view of a unit beside its curves: the charts that overlay runs, and its row in the table of runs."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.experiment import Unit, columns, describe

Options = dict[str, str | float | bool]
LONGEST = 60
OPTIONS_FIRST = ("strategy", "strength", "curvature", "structure", "policy")
RESULTS_FIRST = ("average_accuracy", "forgetting", "accuracy/past_tasks", "fidelity/accumulate/kappa_abs",
                 "fidelity/refresh/kappa_abs")


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
