"""What is computed once and read by many runs, in the folder ``kept`` below --out: the features of images, say.

A run tells where `--out` is (`keep_below`), in its own process and in each worker. Elsewhere nothing is kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias
from zipfile import BadZipFile

from filelock import FileLock

if TYPE_CHECKING:
    import numpy as np

Arrays: TypeAlias = "dict[str, np.ndarray]"

_out: Path | None = None


def keep_below(out: Path) -> None:
    """From now on keep arrays in the folder ``kept`` below this one."""
    global _out
    _out = out


def kept(name: str, compute: Callable[[], Arrays]) -> Arrays:
    """The arrays in the file of that name, or those of `compute`, which are then kept.

    The name has to say all that the arrays depend on, best by a digest. One process computes while others wait for it.
    A file that cannot be read is written anew.
    """
    if _out is None:
        return compute()
    path = _out / "kept" / f"{name}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        found = _read(path)
        if found is None:
            found = compute()
            _write(path, found)
    return found


def _read(path: Path) -> Arrays | None:
    import numpy as np

    try:
        with np.load(path) as file:  # a zip archive, which knows checksums
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, BadZipFile):
        return None


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    import numpy as np

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # names of arrays, none of an option
        temporary.replace(path)
    except BaseException:  # such as a full disk, to which the temporary file would be left
        temporary.unlink(missing_ok=True)
        raise
