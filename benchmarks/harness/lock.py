"""One run at a time in a results folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from benchmarks.harness.errors import UsageError, full_disk

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other runs out of it while the context is open.

    The lock is the kernel's (flock), which releases it when the process ends in whatever way; systems without it go
    without. Raises UsageError where another run has it, or where the folder cannot be written.
    """
    with _opened(folder) as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"another run is at work in {folder}: wait for it, or choose another --out.") from None
            except OSError:  # a file system that has no locks
                pass
        yield


def _opened(folder: Path) -> TextIO:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / LOCK).open("w")
    except OSError as error:
        raise full_disk(error, folder) or UsageError(
            f"results cannot be written in {folder} ({error.strerror}): choose another folder with --out DIR."
        ) from error
