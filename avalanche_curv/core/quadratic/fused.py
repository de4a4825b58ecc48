"""The gradient of a diagonal penalty in one pass over memory, by a loop that is compiled where a C compiler is at
hand."""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.compiled import compiled
from avalanche_curv.core.structures.gradient_pass import GradientPass

SOURCE = """
#define LANES 16   /* sums side by side, which the compiler keeps in vector registers */
#define STRETCH 4096 /* numbers whose sum is taken in their own type */
#define LEVEL(i)
#define SLOPED(i) + s[i]
#define PASS(NAME, REAL, ASSIGN, SLOPE)                                                                \\
double NAME(long count, const long *sizes, REAL *const *gradients, const REAL *const *parameters,      \\
            const REAL *anchor, const REAL *values, const REAL *slope) {                               \\
    double total = 0;                                                                                  \\
    for (long k = 0; k < count; anchor += sizes[k], values += sizes[k], k++) {                         \\
        REAL *restrict g = gradients[k];                                                               \\
        const REAL *restrict p = parameters[k], *restrict a = anchor, *restrict v = values;            \\
        const REAL *restrict s = slope;                                                                \\
        if (slope) slope += sizes[k];                                                                  \\
        for (long i = 0, n = sizes[k]; i < n;) {                                                       \\
            REAL sums[LANES] = {0};                                                                    \\
            const long end = n - i < STRETCH ? n : i + STRETCH, full = end - (end - i) % LANES;        \\
            for (; i < full; i += LANES)                                                               \\
                for (int l = 0; l < LANES; l++) {                                                      \\
                    const REAL d = p[i + l] - a[i + l], pull = v[i + l] * d SLOPE(i + l);              \\
                    g[i + l] ASSIGN pull;                                                              \\
                    sums[l] += (pull SLOPE(i + l)) * d;                                                \\
                }                                                                                      \\
            for (; i < end; i++) {                                                                     \\
                const REAL d = p[i] - a[i], pull = v[i] * d SLOPE(i);                                  \\
                g[i] ASSIGN pull;                                                                      \\
                sums[0] += (pull SLOPE(i)) * d;                                                        \\
            }                                                                                          \\
            for (int l = 0; l < LANES; l++) total += sums[l];                                          \\
        }                                                                                              \\
    }                                                                                                  \\
    return total;                                                                                      \\
}
#define BOTH(WHERE, REAL, ASSIGN) PASS(WHERE, REAL, ASSIGN, LEVEL) PASS(WHERE##_sloped, REAL, ASSIGN, SLOPED)
BOTH(add_float32, float, +=)
BOTH(add_float64, double, +=)
BOTH(set_float32, float, =)
BOTH(set_float64, double, =)
"""
UNCONTRACTED = "-ffp-contract=off"
"""Products are rounded before they are added, as torch rounds them."""
NAMES = {torch.float32: "float32", torch.float64: "float64"}


@cache
def library() -> Any:
    """What is compiled from SOURCE, once for each process; None where that fails."""
    found = compiled(SOURCE, UNCONTRACTED)
    kinds = [f"{what}_{name}{slope}" for what in ("add", "set") for name in NAMES.values() for slope in ("", "_sloped")]
    for function in (getattr(found, kind) for kind in kinds if found):
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_long, *[ctypes.c_void_p] * 6]
    return found


class OnePass(GradientPass[float]):
    """g + F δ, for F = diag(values) [P], δ = θ − a and a `slope` g [P] or none, by itself or added to gradients, in one
    pass over memory where torch makes two to four. Each number is rounded as torch rounds it: results are equal to the
    bit.

    It is for plain parameters on the CPU, of the type of the anchor, and for one thread: several share the passes of
    torch. `shapes` are those of the parameters, in the order of the anchor.

    >>> weight = torch.nn.Parameter(torch.tensor([3.0]))
    >>> weight.grad = torch.tensor([1.0])
    >>> added = OnePass(torch.tensor([1.0]), torch.tensor([4.0]), [weight.shape]).add([weight])
    >>> added is None or (added, weight.grad)  # None without a compiler, or with several threads
    (16.0, tensor([9.]))
    """

    def __init__(
        self,
        anchor: Float[Tensor, "P"],
        values: Float[Tensor, "P"],
        shapes: Sequence[torch.Size],
        slope: Float[Tensor, "P"] | None = None,
    ) -> None:
        super().__init__(anchor, shapes)
        self.values, self.slope = values.contiguous(), None if slope is None else slope.contiguous()
        self._sizes = array("l", map(math.prod, shapes))
        others = [values] if slope is None else [values, slope]
        self._known = anchor.is_cpu and anchor.dtype in NAMES and all(t.dtype is anchor.dtype for t in others)

    def _is_usable(self) -> bool:
        return self._known and torch.get_num_threads() == 1 and library() is not None

    def _written(self, gradients: Sequence[Tensor], parameters: Sequence[Tensor], adds: bool) -> float:
        ours, theirs = (array("Q", map(Tensor.data_ptr, some)) for some in (gradients, parameters))
        slope, kind = (None, "") if self.slope is None else (self.slope.data_ptr(), "_sloped")
        return getattr(library(), f"{'add' if adds else 'set'}_{NAMES[self.anchor.dtype]}{kind}")(
            len(ours), self._sizes.buffer_info()[0], ours.buffer_info()[0], theirs.buffer_info()[0],
            self.anchor.data_ptr(), self.values.data_ptr(), slope,
        )  # fmt: skip
