"""A long-format record of every scalar metric: one JSON object per line."""

from __future__ import annotations

import json
import math
import weakref
from numbers import Real
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from avalanche.evaluation.metric_results import AlternativeValues
from avalanche.logging import BaseLogger
from torch import Tensor


class JSONLLogger(BaseLogger):
    """Appends {"metric": name, "value": number, "step": x} to the file at `path` for every scalar metric value.

    Unlike Avalanche's CSVLogger it keeps custom metrics. A scalar is a number or a 0-d tensor or array; of several
    representations of one value the scalar is taken; all else (images, matrices, text) is skipped. JSON has no NaN and
    no infinity: a value that is not finite is written as null. Lines are buffered and reach the disk at the end of
    every experience, in training and in evaluation, at the end of every evaluation, and by `flush()` or `close()`.

    The folder is made; an existing file is continued, so give each run its own.

    A logger from a pickle or a checkpoint knows how long its file was. With its first record it cuts the file to that
    length, since a run resumed from a checkpoint writes anew what the run before wrote after it: the file then equals
    that of an unbroken run. What was cut is appended to `<path>.superseded`. A copy by `copy.deepcopy` continues the
    file as it is.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "run" / "metrics.jsonl"
    >>> logger = JSONLLogger(path)
    >>> logger.log_single_metric("Loss", 0.5, 3)
    >>> logger.close()
    >>> path.read_text()
    '{"metric": "Loss", "value": 0.5, "step": 3}\\n'
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path).absolute()
        self._length: int | None = None  # to which the file is cut by the next record, in bytes
        self._file = self._open()

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        """Appends `value` under `name` at step `x_plot`, if it is a scalar; skips it otherwise."""
        number = _scalar(value)
        if number is not None:
            self._cut()
            finite = number if math.isfinite(number) else None
            self._file.write(json.dumps({"metric": name, "value": finite, "step": int(x_plot)}) + "\n")

    def after_training_exp(self, *_: object, **__: object) -> None:
        self.flush()

    after_eval_exp = after_eval = after_training_exp

    def flush(self) -> None:
        """Write what is buffered to the file."""
        self._file.flush()

    def close(self) -> None:
        """Write what is buffered and close the file; also done when the logger or the interpreter ends."""
        self._file.close()

    def _open(self) -> TextIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a", encoding="utf-8")
        weakref.finalize(self, file.close)
        return file

    def _cut(self) -> None:
        """Takes out what the file has gained since this logger was pickled."""
        length, self._length = self._length, None
        if length is None or self.path.stat().st_size <= length:
            return
        with self.path.open("r+b") as file, self.path.with_name(f"{self.path.name}.superseded").open("ab") as rest:
            file.seek(length)
            rest.write(file.read())
            file.truncate(length)

    def __getstate__(self) -> dict[str, Any]:
        if not self._file.closed:
            self.flush()
        length = self._length if self._length is not None else self.path.stat().st_size if self.path.exists() else 0
        return {**self.__dict__, "_file": None, "_length": length}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._file = self._open()

    def __deepcopy__(self, memo: dict[int, Any]) -> JSONLLogger:
        copied = type(self).__new__(type(self))
        copied.__setstate__({**self.__getstate__(), "_length": self._length})
        return copied


def _scalar(value: Any) -> float | None:
    if isinstance(value, AlternativeValues):
        value = value.best_supported_value(Real)
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    return float(value) if isinstance(value, Real) else None
