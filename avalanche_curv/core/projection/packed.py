"""Steps of parameters in float32, projected by loops that are compiled where a C compiler is at hand."""

from __future__ import annotations

import ctypes
from array import array
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.loops.compiled import compiled, is_alone
from avalanche_curv.core.loops.tiles import Tiles, source

BLOCK = 8  # rows
LARGE = 2**21  # numbers in a basis that does not stay in the cache next to a processor
LEAK = 1e-6  # of a step, that the rows in 16 bits may leave in the basis
TEMPLATE = f"""
#define BLOCK {BLOCK}
""" """
/* parameters [rows, width of each], side by side in the rows of one matrix */
#define EACH(...)                                                                                       \\
    for (long r = 0; r < rows; r++)                                                                     \\
        for (long k = 0; k < count; start += widths[k], k++) {                                          \\
            float *restrict p = parameters[k] + r * widths[k], *restrict s = start;                     \\
            __VA_ARGS__                                                                                     \\
        }

void begin(long rows, long count, const long *widths, float *const *parameters, float *start) {
    EACH(memcpy(s, p, widths[k] * sizeof(float));)
}

void apart(long rows, long count, const long *widths, float *const *parameters, float *start, float *step) {
    EACH(float *restrict d = step; step += widths[k];
         for (long i = 0, n = widths[k]; i < n; i++) d[i] = p[i] - s[i];)
}

void settle(long rows, long count, const long *widths, float *const *parameters, float *start, const float *step,
            float *rest) {
    EACH(const float *restrict d = step; float *restrict left = rest; step += widths[k]; rest += widths[k];
         for (long i = 0, n = widths[k]; i < n; i++) {
             const float whole = d[i] + left[i], now = s[i] + whole;
             left[i] = whole - (now - s[i]);
             p[i] = now;
         })
}

#define EACH_NUMBER(...) PIECES(                                                                          \\
    float *restrict p = parameters[k] + at, *restrict d = x + i;                                        \\
    const float *restrict s = start + i;                                                                \\
    for (long j = 0; j < m; j++) { __VA_ARGS__ })

/* A step, projected: in one sweep over it the part in one block of rows is taken off, and the next block's products
   are formed; the first makes it of the parameters, and the last writes it to them. */
void correct(long count, const long *widths, float *const *parameters, const float *start, float *rest, float *x,
             long stretches, long rank, const KIND *tiles, const float *scales, const float *inverse) {
    float weights[BLOCK];
    long before = 0, last = 0;
    for (long k = 0; k < count; k++) last += widths[k];
    for (long i = last; i < stretches * WIDTH; i++) x[i] = 0; /* after a step that was NaN */
    for (long first = 0; first < rank || before; first += BLOCK) {
        const long here = first >= rank ? 0 : rank - first < BLOCK ? rank - first : BLOCK;
        const long earlier = before ? first - BLOCK : 0;
        double totals[BLOCK] = {0};
        const KIND *tile = tiles + first * stretches * WIDTH, *old = tiles + earlier * stretches * WIDTH;
        const float *scale = scales + first * stretches, *older = scales + earlier * stretches;
        long k = 0, at = 0;
        while (k < count && !widths[k]) k++;
        for (long c = 0; c < stretches; c++) {
            if (!before) EACH_NUMBER(d[j] = p[j] - s[j];)
            for (long r = 0; r < before; r += ROWS, old += ROWS * WIDTH, older += ROWS)
                take_KIND(old, older, weights + r, x + c * WIDTH);
            for (long r = 0; r < here; r += ROWS, tile += ROWS * WIDTH, scale += ROWS)
                dots_KIND(tile, scale, x + c * WIDTH, totals + r);
            if (!here) EACH_NUMBER(const float whole = d[j] + rest[i + j], now = s[j] + whole;
                                   rest[i + j] = whole - (now - s[j]);
                                   p[j] = now;)
        }
        for (long r = 0; r < here; r++) weights[r] = totals[r] * inverse[first + r];
        before = here;
    }
}
"""
ARGUMENTS = {"begin": 3, "apart": 4, "settle": 5}
"""How many pointers each loop over parameters takes."""


@cache
def library() -> Any:
    """What is compiled from TEMPLATE, once for each process; None where that fails."""
    found = compiled(source(TEMPLATE, "short"), "-ffp-contract=fast")
    if found is not None:
        for name, pointers in ARGUMENTS.items():
            getattr(found, name).restype = None
            getattr(found, name).argtypes = [ctypes.c_long] * 2 + [ctypes.c_void_p] * pointers
        pointer, number = ctypes.c_void_p, ctypes.c_long
        found.correct.restype = None
        found.correct.argtypes = [number, *[pointer] * 5, number, number, *[pointer] * 3]
    return found


def usable(rows: Float[Tensor, "k d"]) -> bool:
    """Whether compiled loops are there for parameters that these rows are of: float32 on the CPU, and one thread."""
    return rows.dtype is torch.float32 and rows.is_cpu and is_alone() and library() is not None


@dataclass(frozen=True)
class PackedRows:
    """Orthonormal rows Ũ in 16 bits, for the steps of one task: half the memory traffic, which is what a step costs.

    A step x becomes x − x Ũᵀ Ũ, in which x Uᵀ is not zero but −(Ũ − U)(I − Ũᵀ Ũ) x: ‖Ũ − U‖_F / √d of ‖x‖ where x does
    not know of the rounding, so 3e-5 √(k/d).
    """

    tiles: Tiles
    inverse: Float[Tensor, "k"]
    step: Float[Tensor, "d"]

    @classmethod
    def of(cls, rows: Float[Tensor, "k d"]) -> PackedRows | None:
        """These rows; None where they stay in the cache anyway, or where more than LEAK of a step would be left in
        them, as a step that is half in the rows and half drawn at random tells."""
        if rows.numel() < LARGE or not usable(rows):
            return None
        tiles = Tiles.of(rows, block=BLOCK, short=True)
        squares = torch.cat([some.square().sum(1) for some in tiles.parts()])
        packed = cls(tiles, torch.where(squares > 0, 1 / squares, 0.0).float(), rows.new_zeros(tiles.width))
        generator = torch.Generator().manual_seed(0)
        step = torch.randn(rows.shape[1], generator=generator) / rows.shape[1] ** 0.5
        step += torch.randn(rows.shape[0], generator=generator) / rows.shape[0] ** 0.5 @ rows
        left = rows @ packed.outside(step)
        return packed if float(left.norm() / step.norm()) <= LEAK else None

    def outside(self, step: Float[Tensor, "d"]) -> Float[Tensor, "d"]:
        """`step` − `step` Ũᵀ Ũ."""
        moved, start, rest = step.clone(), torch.zeros_like(step), torch.zeros_like(step)
        width, pointer = array("l", [len(step)]), array("Q", [moved.data_ptr()])
        self.correct(1, width.buffer_info()[0], pointer.buffer_info()[0], start, rest)
        return moved

    def correct(self, count: int, widths: int, parameters: int, start: Tensor, rest: Tensor) -> None:
        """`parameters` ← `start` + `rest` + the part of `parameters` − `start` outside of the rows; `rest` ← what is
        lost in rounding. The parameters are so many tensors, with the addresses of their widths and of theirs."""
        tiles = self.tiles
        library().correct(
            count, widths, parameters, start.data_ptr(), rest.data_ptr(), self.step.data_ptr(),
            tiles.stretches, tiles.rank, tiles.numbers.data_ptr(), tiles.scales.data_ptr(), self.inverse.data_ptr(),
        )  # fmt: skip
