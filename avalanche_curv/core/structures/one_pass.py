"""The part of a gradient that takes no product of matrices, in one pass over memory, by loops that are compiled where a
C compiler is at hand."""

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

from avalanche_curv.core.loops.compiled import compiled, is_alone
from avalanche_curv.core.structures.gradient_pass import GradientPass

SOURCE = """
#define LANES 16     /* sums side by side, which the compiler keeps in vector registers */
#define STRETCH 4096 /* numbers whose sum is taken in their own type */
#define NUMBER(at, sum) {                                                                               \\
    const REAL d = p[at] - a[at], slope_here = SLOPED ? s[at] : 0;                                      \\
    const REAL pull = (CURVED ? level + c[at] : level) * d + slope_here;                                \\
    if (KEPT) place[at] = d;                                                                            \\
    g[at] = ADDED ? g[at] + pull : pull;                                                                \\
    sum += (pull + slope_here) * d;                                                                     \\
}

/* places = d = parameters - anchor; gradients += slope + (levels + diagonal) d, or = that; returns d' that + slope'd */
double one_pass(long count, const long *rows, const long *columns, const long *strides, REAL *const *gradients,
                REAL *const *parameters, REAL *const *places, const double *levels, const REAL *anchor,
                const REAL *slope, const REAL *diagonal) {
    double total = 0;
    for (long k = 0, first = 0; k < count; k++)
        for (long r = 0, n = columns[k]; r < rows[k]; r++, first += n) {
            const REAL level = levels[k], *restrict p = parameters[k] + r * n, *restrict a = anchor + first;
            const REAL *restrict s = SLOPED ? slope + first : 0, *restrict c = CURVED ? diagonal + first : 0;
            REAL *restrict g = gradients[k] + r * n, *restrict place = KEPT ? places[k] + r * strides[k] : 0;
            for (long i = 0; i < n;) {
                REAL sums[LANES] = {0};
                const long end = n - i < STRETCH ? n : i + STRETCH, full = end - (end - i) % LANES;
                for (; i < full; i += LANES)
                    for (int l = 0; l < LANES; l++) NUMBER(i + l, sums[l])
                for (; i < end; i++) NUMBER(i, sums[0])
                for (int l = 0; l < LANES; l++) total += sums[l];
            }
        }
    return total;
}
"""
UNCONTRACTED = "-ffp-contract=off"
"""Products are rounded before they are added, as torch rounds them."""
KINDS = {torch.float32: "float", torch.float64: "double"}


@cache
def loop(kind: str, added: bool, sloped: bool, curved: bool, kept: bool) -> Any:
    """What is compiled from SOURCE for numbers of this kind, once for each process; None where that fails. Of the four
    that follow, each says what it reads or writes: the gradients before, the slope, the diagonal, the places."""
    options = {"ADDED": added, "SLOPED": sloped, "CURVED": curved, "KEPT": kept}
    definitions = (f"-D{name}={value:d}" for name, value in options.items())
    found = compiled(SOURCE, UNCONTRACTED, f"-DREAL={kind}", *definitions)
    if found is None:
        return None
    found.one_pass.restype, found.one_pass.argtypes = ctypes.c_double, [ctypes.c_long, *[ctypes.c_void_p] * 10]
    return found.one_pass


class OnePass(GradientPass[float]):
    """g + (d + l) ∘ δ, for δ = θ − a, a slope g [P] or none, a diagonal d [P] or none and one number l for each
    parameter (0 without `levels`), by itself or added to gradients, in one pass over memory where torch makes two to
    six. Each number is rounded as torch rounds it: results are equal to the bit.

    It is for plain parameters on the CPU, of the type of the anchor, and for one thread: several share the passes of
    torch. `shapes` are those of the parameters, in the order of the anchor. Where there are `places`, tensors of these
    shapes whose rows may lie apart, δ is written to them.

    >>> weight = torch.nn.Parameter(torch.tensor([3.0]))
    >>> weight.grad = torch.tensor([1.0])
    >>> added = OnePass(torch.tensor([1.0]), torch.tensor([4.0]), [weight.shape]).add([weight])
    >>> added is None or (added, weight.grad)  # None without a compiler, or with several threads
    (16.0, tensor([9.]))
    """

    def __init__(
        self,
        anchor: Float[Tensor, "P"],
        diagonal: Float[Tensor, "P"] | None,
        shapes: Sequence[torch.Size],
        slope: Float[Tensor, "P"] | None = None,
        *,
        levels: Sequence[float] = (),
        places: Sequence[Tensor] = (),
    ) -> None:
        super().__init__(anchor, shapes)
        self.slope, self.diagonal = (None if part is None else part.contiguous() for part in (slope, diagonal))
        held = [part for part in (anchor, slope, diagonal, *places) if part is not None]
        self._known = anchor.dtype in KINDS and all(part.is_cpu and part.dtype is anchor.dtype for part in held)
        self._known = self._known and all(place.ndim < 2 or place[0].is_contiguous() for place in places)
        rows = [shape[0] if places and shape else 1 for shape in shapes]
        columns = [math.prod(shape) // count if count else 0 for shape, count in zip(shapes, rows)]
        strides = [place.stride(0) if place.ndim else 1 for place in places]
        self._sizes = [array("l", numbers) for numbers in (rows, columns, strides)]
        self._levels = array("d", levels or [0.0] * len(shapes))
        self._places = array("Q", map(Tensor.data_ptr, places)) if places else None

    def _is_usable(self) -> bool:
        return self._known and is_alone() and None not in (self._loop(True), self._loop(False))

    def _loop(self, adds: bool) -> Any:
        given = (part is not None for part in (self.slope, self.diagonal, self._places))
        return loop(KINDS[self.anchor.dtype], adds, *given)

    def _written(self, gradients: Sequence[Tensor], parameters: Sequence[Tensor], adds: bool) -> float:
        ours, theirs = (array("Q", map(Tensor.data_ptr, some)) for some in (gradients, parameters))
        sizes = (numbers.buffer_info()[0] for numbers in self._sizes)
        return self._loop(adds)(
            len(ours), *sizes, ours.buffer_info()[0], theirs.buffer_info()[0],
            None if self._places is None else self._places.buffer_info()[0], self._levels.buffer_info()[0],
            *(None if part is None else part.data_ptr() for part in (self.anchor, self.slope, self.diagonal)),
        )  # fmt: skip
