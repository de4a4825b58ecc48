"""The files of results, written so that each is either complete or absent.

``<out>/<experiment>/``
    ``units/<digest>.jsonl``      a finished unit: a header line, then one line per record, the timings marked as such
    ``units/<digest>.error.txt``  the traceback of a unit that failed
    ``units/<digest>.warnings.jsonl``  what was warned of in it, if anything
    ``units/<digest>.broken``     what was in the place of a finished unit and could not be read, when a run began
    ``tensorboard-all/<label>/seed<k>``  event files: the run's own, and its row and charts (``*.results``)
    ``tensorboard/<label>``       copies of those of one seed of the rows that matter, for TensorBoard to open with
    ``manifest.json``             the grid of the last run and what it ran on
    ``report.md``, ``report.html``, ``*.png``; ``report.error.txt`` where it failed
    ``warnings.log``              all that was warned of, each once
    ``.lock``                     held by a run that is at work
"""

import errno
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from benchmarks.harness import reading
from benchmarks.harness.errors import UsageError
from benchmarks.harness.reading import Broken, content

LOCK = ".lock"


@dataclass(frozen=True)
class Store:
    """The folder of one experiment."""

    root: Path

    def unit(self, digest: str) -> Path:
        return self.root / "units" / f"{digest}.jsonl"

    def error(self, digest: str) -> Path:
        return self.root / "units" / f"{digest}.error.txt"

    def warned(self, digest: str) -> Path:
        return self.root / "units" / f"{digest}.warnings.jsonl"

    def tensorboard(self, label: str, seed: int) -> Path:
        return self.all_runs / label / f"seed{seed}"

    @property
    def all_runs(self) -> Path:
        return self.root / "tensorboard-all"

    @property
    def selected_runs(self) -> Path:
        return self.root / "tensorboard"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def report(self) -> Path:
        return self.root / "report.md"

    @property
    def report_error(self) -> Path:
        return self.root / "report.error.txt"

    @property
    def warnings(self) -> Path:
        return self.root / "warnings.log"

    @property
    def page(self) -> Path:
        return self.root / "report.html"

    def finished(self, digest: str) -> bool:
        return self.unit(digest).exists()

    def header(self, digest: str) -> dict[str, Any] | None:
        """The header of a finished unit, None for any other."""
        if not self.finished(digest):
            return None
        with self.unit(digest).open(encoding="utf-8") as file:
            return json.loads(file.readline())

    def read(self, digest: str, label: str, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The header and the records of a finished unit. Raises `Broken` where its file does not hold them."""
        header, records = content(self.unit(digest), reading.unit)
        if (header["label"], header["seed"]) != (label, seed):
            raise Broken(self.unit(digest), f"is of {header['label']!r} with seed {header['seed']}, expected {label!r} "
                                            f"with seed {seed}")  # fmt: skip
        return header, records

    def set_aside_if_broken(self, digest: str, label: str, seed: int) -> str | None:
        """Rename the file of a unit that cannot be read, so that the unit has not finished: what is wrong with it."""
        try:
            if self.finished(digest):
                self.read(digest, label, seed)
        except Broken as error:
            self.unit(digest).replace(self.root / "units" / f"{digest}.broken")
            return str(error)
        return None

    def write_unit(self, digest: str, header: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
        lines = [json.dumps(line) for line in (header, *records)]
        write_atomically(self.unit(digest), "\n".join(lines) + "\n")
        self.error(digest).unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a temporary file beside the path, sync it, and rename it: a kill leaves the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:  # such as a full disk, to which the temporary file would be left
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Make the folder and lock it against other runs while the context is open; the end of the process, however it
    comes, frees it. Raises UsageError where another run has it, or where the folder cannot be written."""
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UsageError(f"another run is at work in {folder}: wait for it, or choose another --out.") from None
    except NotImplementedError:  # a file system that has no locks
        pass
    except OSError as error:
        raise full_disk(error, folder) or UsageError(
            f"results cannot be written in {folder} ({error.strerror}): choose another folder with --out DIR."
        ) from error
    try:
        yield
    finally:
        lock.release()


def full_disk(error: BaseException | None, folder: Path) -> UsageError | None:
    """The message for an error that was caused by a full disk, None for any other. `folder` is named where the error
    does not name a file."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            place = Path(error.filename).parent if error.filename else folder
            return UsageError(
                f"no space is left on the disk of {place}. What has finished is kept: make space, and the same command "
                "runs the rest."
            )
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def reporting_a_full_disk(folder: Path) -> Iterator[None]:
    """Raise `UsageError` in place of the error of a write to a full disk."""
    try:
        yield
    except OSError as error:
        if full := full_disk(error, folder):
            raise full from error
        raise


@contextmanager
def collecting_full_disks(folder: Path) -> Iterator[list[UsageError]]:
    """The errors of a full disk that are raised in threads and finalisers while the context is open, as `UsageError`.

    TensorBoard writes its events there, where Python prints an error and goes on. Other errors are printed as usual.
    """
    met: list[UsageError] = []

    def wrapped(hook: Any) -> Any:
        def handle(arguments: Any) -> None:
            error = full_disk(arguments.exc_value, folder)
            if error is None:
                hook(arguments)
            else:
                met.append(error)

        return handle

    before = threading.excepthook, sys.unraisablehook
    threading.excepthook, sys.unraisablehook = map(wrapped, before)
    try:
        yield met
    finally:
        threading.excepthook, sys.unraisablehook = before
