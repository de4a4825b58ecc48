"""The averages and the gradient of streaming EWC in one pass over memory, by a loop that is compiled where a C compiler
is at hand."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from avalanche_curv.core.loops.compiled import compiled, is_alone, is_plain

SOURCE = """
void stream(long count, const long *sizes, float *const *gradients, float *const *parameters, float *const *importances,
            float *const *anchors, const float *weights, float keep, float take, float nearer) {
    for (long k = 0; k < count; k++) {
        float *restrict g = gradients[k], *restrict f = importances[k], *restrict a = anchors[k];
        const float *restrict p = parameters[k], weight = weights[k];
        for (long i = 0, n = sizes[k]; i < n; i++) {
            const float pull = p[i] - a[i];
            f[i] = keep * f[i] + take * g[i] * g[i];
            g[i] += weight * f[i] * pull;
            a[i] += nearer * pull;
        }
    }
}
"""


@cache
def library() -> Any:
    """What is compiled from SOURCE, once for each process; None where that fails."""
    found = compiled(SOURCE)
    if found is not None:
        found.stream.restype = None
        found.stream.argtypes = [ctypes.c_long, *[ctypes.c_void_p] * 6, *[ctypes.c_float] * 3]
    return found


def streamed(
    gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
    importances: Sequence[Tensor],
    anchors: Sequence[Tensor],
    weights: Sequence[float],
    keep: float,
    nearer: float,
) -> bool:
    """F ← keep F + (1 − keep) g², g ← g + weight F (θ − θ̄), θ̄ ← θ̄ + nearer (θ − θ̄), in place, for tensors g, θ, F, θ̄
    of these sequences and their weights. It differs from what torch finds by rounding.

    It is for plain float32 parameters on the CPU, and for one thread: several share the passes of torch. Returns
    whether it was done.
    """
    if not is_alone() or library() is None:
        return False
    kinds = gradients, parameters, importances, anchors
    if not all(p.is_cpu and p.dtype is torch.float32 for p in parameters):
        return False
    if not all(is_plain(t, p.shape, p) for kind in kinds for t, p in zip(kind, parameters)):
        return False
    increment_version([*gradients, *importances, *anchors])
    sizes, factors = array("l", [p.numel() for p in parameters]), array("f", weights)
    pointers = [array("Q", map(Tensor.data_ptr, kind)) for kind in kinds]
    library().stream(
        len(sizes), sizes.buffer_info()[0], *(kind.buffer_info()[0] for kind in pointers), factors.buffer_info()[0],
        keep, 1 - keep, nearer,
    )  # fmt: skip
    return True
