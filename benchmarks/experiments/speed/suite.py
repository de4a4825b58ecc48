"""What the suite itself costs: a grid of plain training runs through the command line, against their training alone."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch.utils.tensorboard import SummaryWriter

from benchmarks.harness.engines import Engine, Processes, ThisProcess
from benchmarks.harness.experiment import Context, Experiment, Options, Record
from benchmarks.harness.results import Results, load
from benchmarks.harness.run import Runner
from benchmarks.harness.store import Store
from benchmarks.harness.tables import Column, table
from benchmarks.registry import Registered

if TYPE_CHECKING:
    from benchmarks.experiments.speed.experiment import Config
    from benchmarks.timing import Times

EVERY = 10
UNITS = 6


@dataclass(frozen=True)
class Training:
    """Plain training of the MLP for some steps, with a record and an event of TensorBoard every ten of them."""

    label: str
    steps: int
    hidden: int


class Grid(Experiment):
    """Units of one length, as many as it has configurations, that do nothing but train and record."""

    name = "suite"

    def __init__(self, trainings: Sequence[Training]) -> None:
        self._trainings = trainings

    def configs(self, options: Options) -> Sequence[Training]:
        return self._trainings

    def run(self, config: Training, seed: int, context: Context) -> Iterator[Record]:
        begin = time.perf_counter()  # the first optimiser loads torch's compiler, which takes any script a second
        h = config.hidden
        model = torch.nn.Sequential(torch.nn.Linear(784, h), torch.nn.ReLU(), torch.nn.Linear(h, 10))
        optimiser = torch.optim.SGD(model.parameters(), 0.01)
        x, y = torch.rand(128, 784), torch.randint(10, (128,))
        seconds = time.perf_counter() - begin
        with SummaryWriter(context.tensorboard_dir) as writer:
            for step in range(0, config.steps, EVERY):
                begin = time.perf_counter()
                for _ in range(EVERY):
                    loss = torch.nn.functional.cross_entropy(model(x), y)
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
                seconds += time.perf_counter() - begin
                value = float(loss.detach())
                writer.add_scalar("loss", value, step)
                yield {"metric": "loss", "value": value, "step": step}
        yield {"metric": "training_seconds", "value": seconds}


def report(results: Results, out: Path) -> str:
    """A table of final losses, as an experiment would write one."""
    return table([Column("run"), Column("loss")], [[label, results.final("loss", label)] for label in results.labels])


def suite(config: Config) -> Times:
    """Seconds of training alone, and of the commands that run it with one job and with two, reports included."""
    length = config.steps * config.period
    grid = Grid([Training(f"run {number}", length, config.hidden) for number in range(UNITS)])
    with TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        one, two = (Path(folder) / name for name in ("one", "two"))
        whole = [_seconds(grid, one, ThisProcess()), _seconds(grid, two, Processes(2))]
        rows = load(Store(one / grid.name), "").select("training_seconds")
    training = sum(row["value"] for row in rows)
    return {"training": [training], "one_job": [whole[0]], "two_jobs": [whole[1]]}


def _seconds(grid: Grid, out: Path, engine: Engine) -> float:
    begin = time.perf_counter()
    entry = Registered(f"{__name__}:Grid", "times the suite", f"{__name__}:report")
    status = Runner(out, engine, lambda name: entry, "python -m benchmarks run speed").run(grid, Options(seeds=1))
    if status:
        raise RuntimeError(f"The grid that times the suite ended with exit status {status}; expected 0.")
    return time.perf_counter() - begin
