"""What is warned of while units run: nothing of it between the lines of the progress, all of it in ``warnings.log``,
and what this package itself warns of shown once each at the end."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.harness.store import Store, write_atomically

if TYPE_CHECKING:
    from benchmarks.harness.experiment import Unit

OURS = ("avalanche_curv", "benchmarks")


@dataclass(frozen=True)
class Warned:
    """A warning: its kind and text, where it points to, and whether code of this project gave it."""

    text: str
    place: str
    ours: bool


_listeners: list[list[Warned]] = []
"""The innermost takes what comes."""
_always = ExitStack()


@contextmanager
def listening() -> Iterator[list[Warned]]:
    """The list that takes what the module warnings and the loggers of libraries would print while the context is open,
    each once for each place that it comes from."""
    heard: list[Warned] = []
    _listeners.append(heard)
    try:
        with warnings.catch_warnings(), _loggers_heard():  # the first also forgets what was shown before
            warnings.showwarning = _hear
            yield heard
    finally:
        _listeners.pop()


def listen_from_now_on() -> None:
    """Listen until the process ends, also between units and while modules are imported."""
    if not _listeners:
        _always.enter_context(listening())


def before_this() -> list[Warned]:
    """What a process that listens from its beginning has heard outside of its units, each given once."""
    if len(_listeners) < 2:
        return []
    heard, _listeners[0][:] = list(_listeners[0]), []
    return heard


def _hear(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    _listeners[-1].append(Warned(f"{category.__name__}: {message}", f"{filename}:{lineno}", _given_by_us()))


def _given_by_us() -> bool:
    """Whether the function that warns is of this project, wherever its `stacklevel` points; torch warns from inside of
    operators, on behalf of functions that do not."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__") in ("warnings", "_py_warnings"):
        frame = frame.f_back
    return _is_ours(str(frame.f_globals.get("__name__"))) and "warn" in frame.f_code.co_names


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in OURS


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warned = Warned(
            f"{record.levelname}: {record.getMessage()}", f"{record.pathname}:{record.lineno}", _is_ours(record.name)
        )
        if _listeners and warned not in _listeners[-1]:  # as through two handlers
            _listeners[-1].append(warned)


_HANDLER = _Handler(logging.WARNING)


@contextmanager
def _loggers_heard() -> Iterator[None]:
    """Have loggers tell the innermost listener what they would print, those with handlers of their own too."""
    root = logging.getLogger()
    loggers = [root, *(one for one in root.manager.loggerDict.values() if isinstance(one, logging.Logger))]
    shown = (sys.stdout, sys.stderr)
    printing = [(one, own) for one in loggers for own in one.handlers if getattr(own, "stream", None) in shown]
    listened = root, *(one for one, _ in printing)
    fresh = [one for one in dict.fromkeys(listened) if _HANDLER not in one.handlers]
    for one, own in printing:
        one.removeHandler(own)
    for one in fresh:
        one.addHandler(_HANDLER)
    try:
        yield
    finally:
        for one in fresh:
            one.removeHandler(_HANDLER)
        for one, own in printing:
            one.addHandler(own)


def keep(store: Store, digest: str, heard: Iterable[Warned]) -> None:
    """Write the warnings of a unit beside it, if there are any."""
    lines = [json.dumps(asdict(warned)) for warned in dict.fromkeys(heard)]
    if lines:
        write_atomically(store.warned(digest), "\n".join(lines) + "\n")
    else:
        store.warned(digest).unlink(missing_ok=True)


def told(store: Store, units: Sequence[Unit], heard: Sequence[Warned]) -> tuple[list[str], list[str]]:
    """Write ``warnings.log`` from the warnings of the units and those heard beside them.

    Returns those of this project, a text each, and a line on the file for the end of the run; none where nobody warned.
    """
    sources: dict[Warned, list[str]] = {}
    for warned in heard:
        sources.setdefault(warned, []).append("the run itself")
    for unit in units:
        for warned in _read(store, unit.digest):
            sources.setdefault(warned, []).append(f"{unit.label}, seed {unit.seed}")
    if not sources:
        store.warnings.unlink(missing_ok=True)
        return [], []
    entries = [
        f"{warned.place}: {warned.text}\n    in {_in_words(where)}\n"
        for warned, where in sorted(sources.items(), key=lambda item: not item[0].ours)
    ]
    write_atomically(store.warnings, "\n".join(entries))
    ours: dict[str, list[str]] = {}
    for warned, where in sources.items():
        if warned.ours:
            ours.setdefault(warned.text, []).extend(where)
    count, units_of = len(sources), len({where for some in sources.values() for where in some})
    line = f"Warnings: {store.warnings} ({count} different, in {units_of} unit{'s' * (units_of > 1)})"
    return [f"{text} (in {_in_words(where)})" for text, where in ours.items()], [line]


def _in_words(sources: Sequence[str]) -> str:
    return sources[0] if len(sources) == 1 else f"{len(sources)} units, the first: {sources[0]}"


def _read(store: Store, digest: str) -> list[Warned]:
    try:
        lines = store.warned(digest).read_text(encoding="utf-8").splitlines()
        return [Warned(**json.loads(line)) for line in lines]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        return [Warned(f"{type(error).__name__}: {error}", str(store.warned(digest)), ours=True)]
