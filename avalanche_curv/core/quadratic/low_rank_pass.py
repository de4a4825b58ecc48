"""The gradient of a low rank penalty in two readings of its eigenvectors, by a loop that is compiled where a C compiler
is at hand."""

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
#define LANES 16
#define WIDTH 1024 /* columns whose displacement stays in the cache next to a processor */
#define AT_ONCE 8  /* rows that are summed at once */
typedef float numbers __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static double dot(const float *a, const float *b, long n) {
    numbers sums[4] = {{0}};
    long i = 0;
    double total = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int l = 0; l < 4; l++) {
            __builtin_prefetch(a + i + LANES * l + WIDTH);
            sums[l] += *(const numbers *)(a + i + LANES * l) * *(const numbers *)(b + i + LANES * l);
        }
    for (; i < n; i++) total += a[i] * b[i];
    sums[0] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int l = 0; l < LANES; l++) total += sums[0][l];
    return total;
}

/* g += sum of w_r rows_r, of n numbers each, a stride apart */
static void combine(long rank, const float *rows, long stride, const float *w, float *g, long n) {
    for (long r = 0; r < rank; r += AT_ONCE) {
        const long some = rank - r < AT_ONCE ? rank - r : AT_ONCE;
        const float *own = rows + r * stride;
        long i = 0;
        for (; i + LANES <= n; i += LANES) {
            numbers sum = *(const numbers *)(g + i);
            for (long k = 0; k < some; k++) {
                __builtin_prefetch(own + k * stride + i + WIDTH);
                sum += w[r + k] * *(const numbers *)(own + k * stride + i);
            }
            *(numbers *)(g + i) = sum;
        }
        for (; i < n; i++)
            for (long k = 0; k < some; k++) g[i] += w[r + k] * own[k * stride + i];
    }
}

#define EACH_PIECE                                                                                      \\
    for (long k = 0, first = 0; k < count; first += sizes[k], k++)                                      \\
        for (long i = 0, n; i < sizes[k]; i += n) {                                                     \\
            n = sizes[k] - i < WIDTH ? sizes[k] - i : WIDTH;                                            \\
            const long at = first + i;                                                                  \\
            for (long j = 0; j < n; j++) d[j] = parameters[k][i + j] - anchor[at + j];

/* gradients += slope + C d, or = that; returns d'Cd + 2 slope'd. weights are overwritten. */
double low_rank(long count, const long *sizes, float *const *gradients, float *const *parameters, const float *anchor,
                const float *slope, const float *diagonal, long rank, long size, const float *vectors,
                const float *values, double *totals, float *weights, long adds) {
    float d[WIDTH];
    double form = 0;
    for (long r = 0; r < rank; r++) totals[r] = 0;
    EACH_PIECE
            for (long r = 0; r < rank; r++) totals[r] += dot(vectors + r * size + at, d, n);
            if (slope) form += 2 * dot(slope + at, d, n);
        }
    for (long r = 0; r < rank; r++) {
        weights[r] = values[r] * totals[r];
        form += weights[r] * totals[r];
    }
    EACH_PIECE
            float *g = gradients[k] + i;
            if (!adds) for (long j = 0; j < n; j++) g[j] = 0;
            if (slope) for (long j = 0; j < n; j++) g[j] += slope[at + j];
            if (diagonal) {
                float pull[WIDTH];
                for (long j = 0; j < n; j++) pull[j] = diagonal[at + j] * d[j];
                for (long j = 0; j < n; j++) g[j] += pull[j];
                form += dot(pull, d, n);
            }
            combine(rank, vectors + at, size, weights, g, n);
        }
    return form;
}
"""


@cache
def library() -> Any:
    """What is compiled from SOURCE, once for each process; None where that fails."""
    found = compiled(SOURCE, "-ffp-contract=fast")
    if found is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_long
        found.low_rank.restype = ctypes.c_double
        found.low_rank.argtypes = [number, *[pointer] * 6, number, number, *[pointer] * 4, number]
    return found


class LowRankPass(GradientPass[float]):
    """g + C δ for C = Σ_i λ_i v_i v_iᵀ + diag(d) and δ = θ − a, by itself or added to gradients, in one pass over
    memory for all products vᵀδ and one for their sum. It differs from what torch finds by rounding.

    It is for plain float32 parameters on the CPU, and for one thread: several share the passes of torch. `shapes` are
    those of the parameters, in the order of the anchor.

    >>> weight = torch.nn.Parameter(torch.tensor([3.0, 1.0]))
    >>> matrix = LowRankPass(torch.ones(2), torch.eye(2)[:1], torch.tensor([4.0]), None, None, [weight.shape])
    >>> found = matrix.gradient([weight])
    >>> found is None or found  # None without a compiler, or with several threads
    (16.0, [tensor([8., 0.])])
    """

    def __init__(
        self,
        anchor: Float[Tensor, "P"],
        vectors: Float[Tensor, "k P"],
        values: Float[Tensor, "k"],
        diagonal: Float[Tensor, "P"] | None,
        slope: Float[Tensor, "P"] | None,
        shapes: Sequence[torch.Size],
    ) -> None:
        super().__init__(anchor, shapes)
        held = self.anchor, slope, diagonal, vectors, values
        self.held = [None if tensor is None else tensor.contiguous() for tensor in held]
        self._known = all(t is None or (t.is_cpu and t.dtype is torch.float32) for t in held)
        self._sizes = array("l", map(math.prod, shapes))
        self._room = torch.empty(len(values), dtype=torch.float64), torch.empty(len(values))

    def _is_usable(self) -> bool:
        return self._known and torch.get_num_threads() == 1 and library() is not None

    def _written(self, gradients: Sequence[Tensor], parameters: Sequence[Tensor], adds: bool) -> float:
        ours, theirs = (array("Q", map(Tensor.data_ptr, some)) for some in (gradients, parameters))
        anchor, slope, diagonal, vectors, values = (None if t is None else t.data_ptr() for t in self.held)
        return library().low_rank(
            len(ours), self._sizes.buffer_info()[0], ours.buffer_info()[0], theirs.buffer_info()[0],
            anchor, slope, diagonal, len(self._room[0]), sum(self._sizes), vectors, values,
            self._room[0].data_ptr(), self._room[1].data_ptr(), adds,
        )  # fmt: skip
