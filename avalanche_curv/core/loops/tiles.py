"""Rows of a matrix in the order in which compiled loops read them, as they are or in 16 bits.

A loop that forms products of all rows with a vector, or their weighted sum, is bound by reading them. Along one stretch
of memory a processor fetches ahead by itself, and in 16 bits there is half as much to fetch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

LANES, ROWS, WIDTH = 16, 2, 512
"""Numbers side by side, rows that are read side by side, and columns that share a scale."""
HEADER = f"""
#define LANES {LANES}
#define ROWS {ROWS}
#define WIDTH {WIDTH}
""" """
#include <string.h>
typedef float numbers __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define AS_float(p) (*(const numbers *)(p))
#if defined(__AVX512F__) && LANES == 16
#include <immintrin.h>
#define AS_short(p) ((numbers)_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)(p)))))
#else
typedef short shorts __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
#define AS_short(p) __builtin_convertvector(*(const shorts *)(p), numbers)
#endif

static double sum(numbers parts) {
    float s[LANES];
    memcpy(s, &parts, sizeof s);
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++) s[l] += s[l + half];
    return s[0];
}

static double dot(const float *a, const float *b, long n) {
    numbers sums = {0};
    double rest = 0;
    long i = 0;
    for (; i + LANES <= n; i += LANES) sums += *(const numbers *)(a + i) * *(const numbers *)(b + i);
    for (; i < n; i++) rest += a[i] * b[i];
    return rest + sum(sums);
}

/* for the pieces of parameters that make up the c-th WIDTH of their columns: m of them from the i-th on, which begin
   at the parameter's own `at` */
#define PIECES(...)                                                                                     \\
    for (long i = c * WIDTH, n = last - i < WIDTH ? last - i : WIDTH, m; n > 0; i += m, n -= m) {       \\
        m = n < widths[k] - at ? n : widths[k] - at;                                                    \\
        __VA_ARGS__                                                                                     \\
        at += m;                                                                                        \\
        while (k < count && at == widths[k]) k++, at = 0;                                               \\
    }
"""
LOOPS = """
/* totals += products of ROWS rows with WIDTH columns of x */
static void dots_KIND(const KIND *tile, const float *scales, const float *x, double *totals) {
    numbers sums[2 * ROWS] = {{0}};
    for (int i = 0; i < WIDTH; i += 2 * LANES, tile += 2 * ROWS * LANES)
        _Pragma("GCC unroll 4") for (int r = 0; r < 2 * ROWS; r++)
            sums[r] += AS_KIND(tile + LANES * r) * *(const numbers *)(x + i + LANES * (r / ROWS));
    for (int r = 0; r < ROWS; r++) totals[r] += scales[r] * sum(sums[r] + sums[r + ROWS]);
}

/* x -= the weighted sum of ROWS rows */
static void take_KIND(const KIND *tile, const float *scales, const float *weights, float *x) {
    float w[ROWS];
    for (int r = 0; r < ROWS; r++) w[r] = weights[r] * scales[r];
    for (int i = 0; i < WIDTH; i += LANES, tile += ROWS * LANES) {
        numbers here = *(const numbers *)(x + i);
        _Pragma("GCC unroll 4") for (int r = 0; r < ROWS; r++) here -= w[r] * AS_KIND(tile + LANES * r);
        *(numbers *)(x + i) = here;
    }
}
"""


def source(template: str, *kinds: str) -> str:
    """C for loops over tiles of each of these kinds of numbers, `float` or `short`, and for what `template` makes of
    them, in which KIND stands for the kind."""
    return HEADER + "".join((LOOPS + template).replace("KIND", kind) for kind in kinds)


@dataclass(frozen=True)
class Tiles:
    """Rows [k, d], each number times the scale of its WIDTH of its row: in blocks of rows, in them by WIDTH columns, in
    these by ROWS rows, and in these by LANES numbers. Zeros fill up the last rows and columns.

    Numbers are floats, or with `short` integers in 16 bits: of Gaussian rows each is then off by 3e-5 of their size.
    """

    numbers: Tensor
    scales: Float[Tensor, "s"]
    rank: int
    stretches: int
    block: int

    @classmethod
    def of(cls, rows: Float[Tensor, "k d"], *, block: int, short: bool) -> Tiles:
        """The tiles of rows in float32, in blocks of so many, a multiple of ROWS."""
        stretches, rank = -(-rows.shape[1] // WIDTH), -(-len(rows) // ROWS) * ROWS
        numbers = torch.empty(rank * stretches * WIDTH, dtype=torch.int16 if short else torch.float32)
        scales = torch.ones(rank * stretches)
        for first in range(0, rank, block):
            own = slice(first * stretches, min(first + block, rank) * stretches)
            some = numbers.view(-1, WIDTH)[own].view(stretches, -1, WIDTH // LANES, ROWS, LANES)
            of_some = scales[own].view(stretches, -1, ROWS)
            for number, group in enumerate(rows[first : first + block].split(ROWS)):
                padded = rows.new_zeros(ROWS, stretches * WIDTH)
                padded[: len(group), : rows.shape[1]] = group
                parts = padded.view(ROWS, stretches, WIDTH)
                if short:
                    scale = (parts.abs().amax(2) / (2**15 - 1)).clamp_(min=torch.finfo(parts.dtype).tiny)
                    of_some[:, number] = scale.T
                    parts = parts.div_(scale[:, :, None]).round_()
                some[:, number] = parts.view(ROWS, stretches, -1, LANES).permute(1, 2, 0, 3)
        return cls(numbers, scales, rank, stretches, block)

    @property
    def width(self) -> int:
        """The columns, with those of zeros."""
        return self.stretches * WIDTH

    @property
    def is_short(self) -> bool:
        """Whether numbers are integers in 16 bits."""
        return self.numbers.dtype is torch.int16

    def parts(self) -> Iterator[Float[Tensor, "n d"]]:
        """What they hold, block by block, in float64 and with the zeros at the ends."""
        for first in range(0, self.rank, self.block):
            own = slice(first * self.stretches, min(first + self.block, self.rank) * self.stretches)
            some = self.numbers.view(-1, WIDTH)[own].view(self.stretches, -1, WIDTH // LANES, ROWS, LANES).double()
            scaled = some * self.scales[own].view(self.stretches, -1, 1, ROWS, 1)
            yield scaled.permute(1, 3, 0, 2, 4).reshape(-1, self.width)
