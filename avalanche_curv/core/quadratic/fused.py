"""The gradient of a diagonal penalty in one pass over memory: compiled where a C compiler is at hand."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from array import array
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import increment_version

SOURCE = """
#define LANES 16   /* sums side by side, which the compiler keeps in vector registers */
#define STRETCH 4096 /* numbers whose sum is taken in their own type */
#define ADD(NAME, REAL)                                                                                \\
double NAME(long count, const long *sizes, REAL *const *gradients, const REAL *const *parameters,      \\
            const REAL *anchor, const REAL *values) {                                                  \\
    double total = 0;                                                                                  \\
    for (long k = 0; k < count; anchor += sizes[k], values += sizes[k], k++) {                         \\
        REAL *restrict g = gradients[k];                                                               \\
        const REAL *restrict p = parameters[k], *restrict a = anchor, *restrict v = values;            \\
        for (long i = 0, n = sizes[k]; i < n;) {                                                       \\
            REAL sums[LANES] = {0};                                                                    \\
            const long end = n - i < STRETCH ? n : i + STRETCH, full = end - (end - i) % LANES;        \\
            for (; i < full; i += LANES)                                                               \\
                for (int l = 0; l < LANES; l++) {                                                      \\
                    const REAL d = p[i + l] - a[i + l], pull = v[i + l] * d;                           \\
                    g[i + l] += pull;                                                                  \\
                    sums[l] += pull * d;                                                               \\
                }                                                                                      \\
            for (; i < end; i++) {                                                                     \\
                const REAL d = p[i] - a[i], pull = v[i] * d;                                           \\
                g[i] += pull;                                                                          \\
                sums[0] += pull * d;                                                                   \\
            }                                                                                          \\
            for (int l = 0; l < LANES; l++) total += sums[l];                                          \\
        }                                                                                              \\
    }                                                                                                  \\
    return total;                                                                                      \\
}
ADD(add_float32, float)
ADD(add_float64, double)
"""
FLAGS = "-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC"
"""Without contraction products are rounded before they are added, as torch rounds them."""
SECONDS = 60  # that a compiler may take
NAMES = {torch.float32: "add_float32", torch.float64: "add_float64"}


@cache
def library() -> Any:
    """What is compiled from SOURCE, once for each process, in a fraction of a second; None where that fails."""
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        return None
    try:
        with TemporaryDirectory() as folder:
            source, built = Path(folder, "fused.c"), Path(folder, "fused.so")
            source.write_text(SOURCE)
            command = [compiler, *FLAGS, str(source), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
            found = ctypes.CDLL(str(built))
    except (OSError, subprocess.SubprocessError):
        return None
    for name in NAMES.values():
        function = getattr(found, name)
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_long, *[ctypes.c_void_p] * 5]
    return found


class OnePass:
    """F (θ − a), for F = diag(values) [P] and the anchor a [P], added to gradients in one pass over memory, where torch
    makes three. Each number is rounded as torch rounds it, so that the results are equal to the bit.

    It is for plain parameters on the CPU, of the type of the anchor, and for one thread: several share the passes of
    torch. `shapes` are those of the parameters, in the order of the anchor.

    >>> weight = torch.nn.Parameter(torch.tensor([3.0]))
    >>> weight.grad = torch.tensor([1.0])
    >>> added = OnePass(torch.tensor([1.0]), torch.tensor([4.0]), [weight.shape]).add([weight])
    >>> added is None or (added, weight.grad)  # None without a compiler, or with several threads
    (16.0, tensor([9.]))
    """

    def __init__(self, anchor: Float[Tensor, "P"], values: Float[Tensor, "P"], shapes: Sequence[torch.Size]) -> None:
        self.anchor, self.values, self.shapes = anchor.contiguous(), values.contiguous(), list(shapes)
        self._sizes = (ctypes.c_long * len(shapes))(*map(math.prod, shapes))
        self._usable = anchor.is_cpu and anchor.dtype in NAMES and values.dtype is anchor.dtype

    def add(self, parameters: Sequence[Tensor | None]) -> float | None:
        """Adds F (θ − a) to the gradients of these parameters θ, and returns δᵀFδ for δ = θ − a; None, with nothing
        done, where that is not possible."""
        if not self._usable or torch.get_num_threads() > 1 or library() is None:
            return None
        gradients = self._gradients(parameters)
        if gradients is None:
            return None
        increment_version(gradients)
        ours = array("Q", map(Tensor.data_ptr, gradients))
        theirs = array("Q", [parameter.data_ptr() for parameter in parameters if parameter is not None])
        return getattr(library(), NAMES[self.anchor.dtype])(
            len(ours), self._sizes, ours.buffer_info()[0], theirs.buffer_info()[0],
            self.anchor.data_ptr(), self.values.data_ptr(),
        )  # fmt: skip

    def _gradients(self, parameters: Sequence[Tensor | None]) -> list[Tensor] | None:
        """The gradients; None where they or the parameters do not lie in memory as the anchor does."""
        dtype, found = self.anchor.dtype, []
        for parameter, shape in zip(parameters, self.shapes):
            if parameter is None or parameter.shape != shape or parameter.dtype is not dtype:
                return None
            gradient = parameter.grad
            if type(gradient) is not Tensor or gradient.dtype is not dtype or gradient.layout is not torch.strided:
                return None
            if not (parameter.is_cpu and parameter.is_contiguous() and gradient.is_contiguous()):
                return None
            found.append(gradient)
        return found
