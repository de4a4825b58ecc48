"""An experiment of milliseconds for the tests of the harness: value = a random number + slope · step.

The environment variable TINY_FAULT makes label "b" with seed 1 raise, exit, die, hang, hang the first time only, warn,
or find the disk full (itself, or where nobody sees it: `lose`), without being part of its digest; TINY_LOG names a file
that gets one line per unit as it starts.
"""

import errno
import logging
import os
import random
import signal
import sys
import threading
import time
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from PIL import Image

from benchmarks.harness import Experiment, Options
from benchmarks.harness.options import one_of
from benchmarks.harness.tables import Column, table


@dataclass(frozen=True)
class Slope:
    value: float


@dataclass(frozen=True)
class TinyConfig:
    label: str
    slope: Slope


@dataclass(frozen=True)
class TinyOptions(Options):
    stream: Annotated[str, one_of("stream", ["sine", "digits"])] = "sine"
    row: tuple[str, ...] = ()


class Tiny(Experiment):
    name = "tiny"
    options_type = TinyOptions

    def variant(self, options):
        return "" if options.stream == "sine" else options.stream

    def configs(self, options):
        return [TinyConfig("a", Slope(1.0)), TinyConfig("b", Slope(2.0))]

    def run(self, config, seed, context):
        import torch

        context.tensorboard_dir.mkdir(parents=True)
        (context.tensorboard_dir / f"events.{time.time_ns()}").touch()
        log = Path(os.environ["TINY_LOG"])
        with log.open("a") as file:
            file.write(f"{config.label}{seed}\n")
        if (config.label, seed) == ("b", 1):
            fail(os.environ.get("TINY_FAULT"), log.read_text().split().count("b1"))
        start = torch.rand(()).item() + sum(random.random() for _ in range(20_000))
        for step in range(3):
            yield {"metric": "accuracy", "value": start + config.slope.value * step, "step": step}
        yield {"metric": "seconds", "value": time.perf_counter()}


def report(results, out):
    Image.new("RGB", (2, 1), "white").save(out / "accuracy.png")
    finals = {label: results.final("accuracy", label) for label in results.labels}
    rows = [[label, final, final.n if final else 0] for label, final in finals.items()]
    return table([Column("config"), Column("accuracy", best=max), Column("n")], rows)


def fail(fault, times):
    if fault == "raise":
        raise ArithmeticError("the loss is not finite")
    if fault == "die" or (fault == "die once" and times == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hang" or (fault == "hang once" and times == 1):
        time.sleep(60)
    if fault == "warn":
        for module in ("avalanche.training", "avalanche_curv.plugins"):
            exec(f"import warnings; warnings.warn('of {module}', stacklevel=2)", {"__name__": module})
        logging.getLogger("torch").warning("of a logger")
    if fault == "exit":
        sys.exit(0)
    if fault == "full":
        with Path("/dev/full").open("w") as file:
            file.write("an event")
    if fault and fault.startswith("full, "):
        lose(fault, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), Path(os.environ["TINY_LOG"]))


class Logger:
    """Loses its events when it is collected, as TensorBoard's writer under Avalanche's logger does."""

    def __init__(self, error, log):
        self.strategy = self  # a cycle, as there
        weakref.finalize(self, Logger.close, error, log)  # keeps the error, which may keep the logger

    @staticmethod
    def close(error, log):
        with log.open("a") as file:
            file.write("closed\n")
        raise error


def lose(where, error, log):
    if where == "full, in a thread":

        def write():
            raise error

        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        return
    logger = Logger(error, log)  # noqa: F841 - lives as long as the frame
    if where == "full, while logging":
        raise error


class Staged(Tiny):
    """Runs the slope that did best in the tiny experiment."""

    name = "staged"

    def prerequisite(self, options):
        return experiment, replace(options, seeds=2)

    def settled(self, options, results):
        best = max(results.labels, key=lambda label: results.final("accuracy", label).mean)
        return replace(options, stream=best)

    def configs(self, options):
        value = {"a": 1.0, "b": 2.0}[options.stream]
        return [TinyConfig(f"slope{value:g}_", Slope(value))]


experiment = Tiny()
staged = Staged()
