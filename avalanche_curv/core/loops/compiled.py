"""Loops in C, compiled in the user's process where a C compiler is at hand."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

FLAGS = "-O3", "-march=native", "-shared", "-fPIC"
SECONDS = 60  # that a compiler may take
PLAIN = Tensor, nn.Parameter


def compiled(source: str, *flags: str) -> Any:
    """The library that a C compiler (`CC`, or `cc`) makes of this source in a fraction of a second; None where that
    fails. A function that keeps it is to be cached."""
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(compiler[0]) is None:
        return None
    try:
        with TemporaryDirectory() as folder:
            code, built = Path(folder, "loops.c"), Path(folder, "loops.so")
            code.write_text(source)
            command = [*compiler, *FLAGS, *flags, str(code), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
            return ctypes.CDLL(str(built))
    except (OSError, subprocess.SubprocessError):
        return None


def is_alone() -> bool:
    """Whether torch computes in one thread, as compiled loops do, since several share its passes; and not for a graph
    that it compiles."""
    return torch.get_num_threads() == 1 and not torch.compiler.is_compiling()


def is_plain(tensor: Tensor | None, shape: torch.Size, like: Tensor) -> bool:
    """Whether a tensor is one piece of memory of this shape, which a compiled loop may read and write if it is on the
    CPU: a dense one of the type and on the device of `like`, whose methods are not its own."""
    if tensor is None or type(tensor) not in PLAIN or tensor.layout is not torch.strided:
        return False
    alike = tensor.dtype is like.dtype and tensor.device == like.device
    return alike and tensor.is_contiguous() and tensor.shape == shape
