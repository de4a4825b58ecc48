"""Units run by an engine: in this process, in processes beside it, or by the workers of a cluster."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TypeAlias

from benchmarks.harness.grid import Unit
from benchmarks.harness.store import write_atomically
from benchmarks.harness.unit_run import Job, Outcome, run_unit


@dataclass(frozen=True)
class Lost:
    """A unit whose process died, or was ended because another one died, with what is known of the reason."""

    unit: Unit
    reason: str


Ends: TypeAlias = Generator[Outcome | Lost, None, None]


class Engine(ABC):
    """Where units run."""

    @property
    @abstractmethod
    def jobs(self) -> int | None:
        """How many units run side by side; None where that is not decided here."""

    def check(self) -> None:
        """Raise `UsageError` with the remedy where the engine cannot work. Called before the first unit."""
        return None

    @abstractmethod
    def ends(self, job: Job, units: Sequence[Unit]) -> Ends:
        """The end of each unit, in the order in which they end. After a lost one, units that have not begun may be
        left out. Closing the generator ends the units that are running."""


@dataclass(frozen=True)
class ThisProcess(Engine):
    """One unit after the other, here."""

    @property
    def jobs(self) -> int:
        return 1

    def ends(self, job: Job, units: Sequence[Unit]) -> Ends:
        yield from (run_unit(job, unit) for unit in units)


def run_units(job: Job, units: Sequence[Unit], engine: Engine) -> Generator[Outcome, None, None]:
    """One outcome of each unit, as they end.

    The units that are lost when a process dies run again at the end, one at a time, so that none answers for another:
    one that is lost while it runs alone has failed.
    """
    waiting, suspects = list(units), list[Unit]()
    while waiting:
        ended = set()
        with closing(engine.ends(job, waiting)) as ends:
            for end in ends:
                ended.add(end.unit.digest)
                if isinstance(end, Outcome):
                    yield end
                else:
                    suspects.append(end.unit)
        waiting = [unit for unit in waiting if unit.digest not in ended]
    for unit in suspects:
        with closing(engine.ends(job, [unit])) as ends:
            yield from (end if isinstance(end, Outcome) else _failed(job, end) for end in ends)


def _failed(job: Job, lost: Lost) -> Outcome:
    error = f"the worker process died twice, the second time with no other unit beside it ({lost.reason})"
    write_atomically(job.store.error(lost.unit.digest), error + "\n")
    return Outcome(lost.unit, error)
