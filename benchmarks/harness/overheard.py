"""Errors of a full disk where no caller meets them: in a thread, or while an object is collected."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness.errors import UsageError, full_disk


@contextmanager
def overhearing_a_full_disk(folder: Path) -> Iterator[list[UsageError]]:
    """The errors of a full disk that threads and finalisers meet while the context is open, each as `UsageError`.

    TensorBoard writes its events so; Python would print such an error and go on. All others it prints as ever.
    """
    met: list[UsageError] = []

    def listening(hook: Any) -> Any:
        def hear(arguments: Any) -> None:
            found = full_disk(arguments.exc_value, folder)
            if found is None:
                hook(arguments)
            else:
                met.append(found)

        return hear

    before = threading.excepthook, sys.unraisablehook
    threading.excepthook, sys.unraisablehook = map(listening, before)
    try:
        yield met
    finally:
        threading.excepthook, sys.unraisablehook = before
