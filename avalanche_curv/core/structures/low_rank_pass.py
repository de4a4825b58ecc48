"""The gradient of a low rank penalty in two readings of its eigenvectors, by a loop that is compiled where a C compiler
is at hand."""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from avalanche_curv.core.loops.compiled import compiled, is_alone
from avalanche_curv.core.loops.tiles import ROWS, Tiles, source
from avalanche_curv.core.structures.gradient_pass import GradientPass

LARGE = 2**21  # numbers in eigenvectors that do not stay in the cache next to a processor
TEMPLATE = """
#define GROUPS for (long r = 0; r < rank; r += ROWS, tile += ROWS * WIDTH, scale += ROWS)
#define CHANGE(to) for (long j = 0; j < m; j++) (to)[j] = parameters[k][at + j] - anchor[i + j];

/* gradients += slope + C d, or = that; returns d'Cd + 2 slope'd. weights are overwritten. */
double low_rank_KIND(long count, const long *widths, float *const *gradients, float *const *parameters,
                     const float *anchor, const float *slope, const float *diagonal, long stretches, long rank,
                     const KIND *tiles, const float *scales, const float *values, double *totals, float *weights,
                     long adds) {
    float x[WIDTH], d[WIDTH], pull[WIDTH];
    double form = 0;
    long last = 0, k = 0, at = 0;
    const KIND *tile = tiles;
    const float *scale = scales;
    for (long r = 0; r < rank; r++) totals[r] = 0;
    for (long j = 0; j < count; j++) last += widths[j];
    while (k < count && !widths[k]) k++;
    for (long c = 0; c < stretches; c++) {
        memset(x, 0, sizeof x);
        PIECES(CHANGE(x + i - c * WIDTH) if (slope) form += 2 * dot(slope + i, x + i - c * WIDTH, m);)
        GROUPS dots_KIND(tile, scale, x, totals + r);
    }
    for (long r = 0; r < rank; r++) {
        form += values[r] * totals[r] * totals[r];
        weights[r] = -values[r] * totals[r];
    }
    tile = tiles, scale = scales, k = 0, at = 0;
    while (k < count && !widths[k]) k++;
    for (long c = 0; c < stretches; c++) {
        memset(x, 0, sizeof x);
        GROUPS take_KIND(tile, scale, weights + r, x);
        PIECES(float *restrict g = gradients[k] + at, *restrict own = x + i - c * WIDTH;
               if (slope) for (long j = 0; j < m; j++) own[j] += slope[i + j];
               if (diagonal) {
                   CHANGE(d)
                   for (long j = 0; j < m; j++) pull[j] = diagonal[i + j] * d[j];
                   for (long j = 0; j < m; j++) own[j] += pull[j];
                   form += dot(pull, d, m);
               }
               if (adds) for (long j = 0; j < m; j++) g[j] += own[j];
               else memcpy(g, own, m * sizeof(float));)
    }
    return form;
}
"""


TILED = WeakTensorKeyDictionary()
"""Tiles by the eigenvectors that they hold: a strength that changes at each step scales eigenvalues alone."""


@cache
def library() -> Any:
    """What is compiled from TEMPLATE, once for each process; None where that fails."""
    found = compiled(source(TEMPLATE, "float", "short"), "-ffp-contract=fast")
    if found is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_long
        for function in (found.low_rank_float, found.low_rank_short):
            function.restype = ctypes.c_double
            function.argtypes = [number, *[pointer] * 6, number, number, *[pointer] * 5, number]
    return found


class LowRankPass(GradientPass[float]):
    """g + C δ for C = Σ_i λ_i v_i v_iᵀ + diag(d) and δ = θ − a, by itself or added to gradients, in one pass over
    memory for all products vᵀδ and one for their sum. It differs from what torch finds by rounding.

    Eigenvectors that do not stay in the cache, of LARGE numbers and more, are read in 16 bits (`Tiles`): C is then that
    of ṽ_i = v_i + e_i with the same anchor, as semi-definite as before, ‖e_i‖ ≤ 4e-4 ‖v_i‖ and 3e-5 ‖v_i‖ of Gaussian
    ones. The gradient is off by λ_i (e_i v_iᵀ + v_i e_iᵀ) δ: 3e-5 of C δ where δ lies along v_i, and otherwise at most
    3e-5 λ_i ‖δ‖. In a step that moves θ by a thousandth of itself the former is half the rounding of θ.

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
        self.vectors, self.values = vectors, values
        self.others = [None if tensor is None else tensor.contiguous() for tensor in (self.anchor, slope, diagonal)]
        held = *self.others, vectors, values
        self._known = all(t is None or (t.is_cpu and t.dtype is torch.float32) for t in held)
        self._sizes = array("l", map(math.prod, shapes))

    def _is_usable(self) -> bool:
        return self._known and is_alone() and library() is not None

    def _written(self, gradients: Sequence[Tensor], parameters: Sequence[Tensor], adds: bool) -> float:
        ours, theirs = (array("Q", map(Tensor.data_ptr, some)) for some in (gradients, parameters))
        tiles, rooms = self._tiles, (tensor.data_ptr() for tensor in self._rooms)
        function = library().low_rank_short if tiles.is_short else library().low_rank_float
        return function(
            len(ours), self._sizes.buffer_info()[0], ours.buffer_info()[0], theirs.buffer_info()[0],
            *(None if tensor is None else tensor.data_ptr() for tensor in self.others),
            tiles.stretches, tiles.rank, tiles.numbers.data_ptr(), tiles.scales.data_ptr(), *rooms, adds,
        )  # fmt: skip

    @cached_property
    def _tiles(self) -> Tiles:
        """The eigenvectors in the order in which they are read."""
        if self.vectors not in TILED:
            short = self.vectors.numel() >= LARGE
            TILED[self.vectors] = Tiles.of(self.vectors, block=ROWS * len(self.vectors), short=short)
        return TILED[self.vectors]

    @cached_property
    def _rooms(self) -> tuple[Tensor, Tensor, Tensor]:
        """The eigenvalues, and room for vᵀδ and for weights, each for all rows of the tiles."""
        values = F.pad(self.values, (0, self._tiles.rank - len(self.values)))
        return values, torch.empty_like(values, dtype=torch.float64), torch.empty_like(values)
