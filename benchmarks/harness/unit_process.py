"""Units of a Dask worker run in a process beside it, since the worker's own threads draw from the global random states
that a unit seeds, and a process that has no other work draws as one of ``--jobs`` does.

The worker sends each unit to ``python -m benchmarks.harness.unit_process`` as a length and a pickle, and gets its
answer as such. The process ends when the worker does, which closes its standard input.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from typing import Any, BinaryIO

from benchmarks.harness.errors import UsageError
from benchmarks.harness.signals import leave_signals_to_parent
from benchmarks.harness.unit_run import run_in_worker, use_one_thread
from benchmarks.harness.warned import listen_from_now_on

LENGTH = struct.Struct("!Q")


class ProcessDied(Exception):
    """The process died under a unit; the message is what is known of the reason."""


class UnitProcess:
    """A process that runs one unit after the other, started for the first one and again after it has died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: Any = None
        self._end: Any = None

    def run(self, payload: bytes) -> str | None:
        """Run a pickled (job, unit): the last line of its traceback, None where it finished.

        Raises `ProcessDied`, `UsageError` where the unit cannot be loaded, and what ends a run.
        """
        with self._lock:
            if self._end is None or not self._end.alive:
                self._start()
            try:
                _send(self._process.stdin, payload)
                answer = _receive(self._process.stdout)
            except OSError:
                answer = None
            if answer is None:
                self._end()
                code = self._process.returncode
                raise ProcessDied(f"exit code {_named(code)}; a kill may mean that the memory was used up")
        error = pickle.loads(answer)
        if isinstance(error, Exception):
            raise error
        return error

    def _start(self) -> None:
        path = os.pathsep.join(map(os.path.abspath, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        self._end = weakref.finalize(self, _end, self._process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Close the pipes, at which the process ends, and wait for it."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(OSError):  # of what was left to write
                stream.close()
    process.wait()


def _named(code: int) -> str:
    return f"{signal.Signals(-code).name}({code})" if code < 0 else str(code)


def _send(stream: BinaryIO, content: bytes) -> None:
    stream.write(LENGTH.pack(len(content)) + content)
    stream.flush()


def _receive(stream: BinaryIO) -> bytes | None:
    """What was sent; None where the other side has ended."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    content = stream.read(length)
    return content if len(content) == length else None


def main() -> None:
    """Answer units until the worker ends, also in the middle of one."""
    leave_signals_to_parent()
    listen_from_now_on()
    asked = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a unit prints is no answer
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        while (payload := _receive(asked)) is not None:
            waiting.put(payload)
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        _send(answers, pickle.dumps(_answer(waiting.get())))


def _answer(payload: bytes) -> str | Exception | None:
    use_one_thread()
    try:
        job, unit = pickle.loads(payload)
    except Exception as error:
        return unloadable(error)
    try:
        return run_in_worker(job, unit).error
    except UsageError as error:
        return error
    except Exception as error:
        return RuntimeError(f"{type(error).__name__}: {error}")  # its own class might not be picklable


def unloadable(error: BaseException) -> UsageError:
    """What to say where a worker does not have the code of a unit."""
    return UsageError(
        f"a worker could not load a unit ({type(error).__name__}: {error}). Start the workers in the same Python "
        "environment, with the checkout's folder as their working folder or in PYTHONPATH, and again when code "
        "changes."
    )


if __name__ == "__main__":
    main()
