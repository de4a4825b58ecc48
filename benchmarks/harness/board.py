"""What TensorBoard shows of a unit beside its curves: the charts that overlay runs, and its row in a table."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.grid import Unit, describe

Options = dict[str, str | float | bool]
LONGEST = 60
OPTIONS_FIRST = ("strategy", "strength", "curvature", "structure", "policy")
RESULTS_FIRST = ("average_accuracy", "forgetting", "accuracy/past_tasks", "fidelity/accumulate/kappa_abs",
                 "fidelity/refresh/kappa_abs")


def publish(folder: Path, unit: Unit, columns: Options, records: Sequence[Mapping[str, Any]]) -> None:
    """Add the layout and the unit's row to the event files of a run; nothing where it has left none."""
    if not any(folder.glob("events.out.tfevents.*")):
        return
    from torch.utils.tensorboard import SummaryWriter

    from avalanche_curv.tensorboard import CHARTS, write_hparams, write_layout

    logged = b"".join(path.read_bytes() for path in sorted(folder.glob("events.out.tfevents.*")))
    filled = {heading: {t: tag for t, tag in charts.items() if _has(logged, tag)} for heading, charts in CHARTS.items()}
    drawn = {heading: charts for heading, charts in filled.items() if charts}
    with SummaryWriter(folder, filename_suffix=".results") as writer:
        write_layout(writer, drawn)
        write_hparams(writer, options(unit), results(records), columns=columns)


def options(unit: Unit) -> Options:
    """The configuration as a flat mapping, and the seed.

    A nested dataclass gives its class name, where that says more than the field's, and its own fields: each under its
    own name, or under `outer.name` where several have that name. What is None is left out; what is neither a number
    nor a truth value becomes a short text.
    """
    leaves = [(path, value) for path, value in _leaves(unit.config, ()) if path != ("label",)]
    first: Options = {"strategy": unit.label, "seed": unit.seed}
    count = Counter([*first, *(path[-1] for path, _ in leaves)])
    return first | {path[-1] if count[path[-1]] == 1 else ".".join(path[-2:]): _short(value) for path, value in leaves}


def columns(units: Iterable[Unit]) -> Options:
    """Every option of any unit with one of its values, the most telling first."""
    return _led_by(OPTIONS_FIRST, {name: value for unit in units for name, value in options(unit).items()})


def results(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The last value of each metric, as `results/<metric>`: of those without steps, and of the curves that have a
    chart; the most telling first."""
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


def _leaves(value: Any, path: tuple[str, ...]) -> Iterable[tuple[tuple[str, ...], Any]]:
    if is_dataclass(value) and not isinstance(value, type):
        if path and type(value).__name__.lower() != path[-1]:
            yield path, type(value).__name__
        for field in fields(value):
            yield from _leaves(getattr(value, field.name), (*path, field.name))
    elif value is not None:
        yield path, value


def _short(value: Any) -> str | float | bool:
    described = describe(value)
    if isinstance(described, bool | int | float):
        return described
    text = str(described)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
