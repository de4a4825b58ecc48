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
from torch.autograd.graph import increment_version

from avalanche_curv.core.compiled import compiled, is_plain

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


class LowRankPass:
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
        held = anchor, slope, diagonal, vectors, values
        self.held = [None if tensor is None else tensor.contiguous() for tensor in held]
        self._usable = all(t is None or (t.is_cpu and t.dtype is torch.float32) for t in held)
        self.shapes, self._sizes = list(shapes), array("l", map(math.prod, shapes))
        self._room = torch.empty(len(values), dtype=torch.float64), torch.empty(len(values))

    def add(self, parameters: Sequence[Tensor | None]) -> float | None:
        """Adds g + C δ to the gradients of these parameters θ, and returns δᵀCδ + 2 gᵀδ; None, with nothing done, where
        that is not possible."""
        gradients = [p.grad for p in parameters if p is not None and p.grad is not None]
        if len(gradients) < len(parameters) or not (self._fit(parameters) and self._fit(gradients)):
            return None
        increment_version(gradients)
        return self._passed(gradients, parameters, adds=True)

    def gradient(self, parameters: Sequence[Tensor]) -> tuple[float, list[Tensor]] | None:
        """δᵀCδ + 2 gᵀδ and g + C δ, in the shapes of the parameters and in memory of its own; None where that is not
        possible."""
        if not self._fit(parameters):
            return None
        gradients = [torch.empty(shape) for shape in self.shapes]
        return self._passed(gradients, parameters, adds=False), gradients

    def _fit(self, tensors: Sequence[Tensor | None]) -> bool:
        if not self._usable or torch.get_num_threads() > 1 or torch.compiler.is_compiling() or library() is None:
            return False
        return all(is_plain(tensor, shape, self._room[1]) for tensor, shape in zip(tensors, self.shapes))

    def _passed(self, gradients: Sequence[Any], parameters: Sequence[Any], adds: bool) -> float:
        ours, theirs = (array("Q", map(Tensor.data_ptr, some)) for some in (gradients, parameters))
        anchor, slope, diagonal, vectors, values = (None if t is None else t.data_ptr() for t in self.held)
        return library().low_rank(
            len(ours), self._sizes.buffer_info()[0], ours.buffer_info()[0], theirs.buffer_info()[0],
            anchor, slope, diagonal, len(self._room[0]), sum(self._sizes), vectors, values,
            self._room[0].data_ptr(), self._room[1].data_ptr(), adds,
        )  # fmt: skip
