"""Steps of parameters in float32, projected by loops that are compiled where a C compiler is at hand."""

from __future__ import annotations

import ctypes
from array import array
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int16
from torch import Tensor

from avalanche_curv.core.compiled import compiled

LANES, ROWS, BLOCK, WIDTH = 16, 4, 8, 512
"""Numbers side by side, rows that are read side by side, rows in a block, and columns that share a scale."""
LARGE = 2**21  # numbers in a basis that does not stay in the cache next to a processor
LEAK = 1e-6  # of a step, that the rows in 16 bits may leave in the basis
SOURCE = f"""
#define LANES {LANES}
#define ROWS {ROWS}
#define BLOCK {BLOCK}
#define WIDTH {WIDTH}
""" """
#include <string.h>
typedef float numbers __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#if defined(__AVX512F__) && LANES == 16
#include <immintrin.h>
#define WIDEN(p) ((numbers)_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)(p)))))
#else
typedef short shorts __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
#define WIDEN(p) __builtin_convertvector(*(const shorts *)(p), numbers)
#endif

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

static double sum(numbers parts) {
    float s[LANES];
    memcpy(s, &parts, sizeof s);
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++) s[l] += s[l + half];
    return s[0];
}

static void dots(const short *tile, const float *scales, const float *x, double *totals) {
    numbers sums[ROWS] = {{0}};
    for (int i = 0; i < WIDTH; i += LANES, tile += ROWS * LANES) {
        const numbers here = *(const numbers *)(x + i);
        _Pragma("GCC unroll 4") for (int r = 0; r < ROWS; r++) sums[r] += WIDEN(tile + LANES * r) * here;
    }
    for (int r = 0; r < ROWS; r++) totals[r] += scales[r] * sum(sums[r]);
}

static void take(const short *tile, const float *scales, const float *weights, float *x) {
    float w[ROWS];
    for (int r = 0; r < ROWS; r++) w[r] = weights[r] * scales[r];
    for (int i = 0; i < WIDTH; i += LANES, tile += ROWS * LANES) {
        numbers here = *(const numbers *)(x + i);
        _Pragma("GCC unroll 4") for (int r = 0; r < ROWS; r++) here -= w[r] * WIDEN(tile + LANES * r);
        *(numbers *)(x + i) = here;
    }
}

/* for the pieces of parameters, and of what lies beside them in memory, that make up n columns from the i-th on */
#define PIECES(...)                                                                                     \\
    for (long i = c * WIDTH, n = last - i < WIDTH ? last - i : WIDTH, m; n > 0; i += m, n -= m) {       \\
        m = n < widths[k] - at ? n : widths[k] - at;                                                    \\
        float *restrict p = parameters[k] + at, *restrict d = x + i;                                    \\
        const float *restrict s = start + i;                                                            \\
        for (long j = 0; j < m; j++) { __VA_ARGS__ }                                                    \\
        at += m;                                                                                        \\
        while (k < count && at == widths[k]) k++, at = 0;                                               \\
    }

/* A step, projected: in one sweep over it the part in one block of rows is taken off, and the next block's products
   are formed; the first makes it of the parameters, and the last writes it to them. */
void correct(long count, const long *widths, float *const *parameters, const float *start, float *rest, float *x,
             long stretches, long rank, const short *tiles, const float *scales, const float *inverse) {
    float weights[BLOCK];
    long before = 0, last = 0;
    for (long k = 0; k < count; k++) last += widths[k];
    for (long first = 0; first < rank || before; first += BLOCK) {
        const long here = first >= rank ? 0 : rank - first < BLOCK ? rank - first : BLOCK;
        const long earlier = before ? first - BLOCK : 0;
        double totals[BLOCK] = {0};
        const short *tile = tiles + first * stretches * WIDTH, *old = tiles + earlier * stretches * WIDTH;
        const float *scale = scales + first * stretches, *older = scales + earlier * stretches;
        long k = 0, at = 0;
        while (k < count && !widths[k]) k++;
        for (long c = 0; c < stretches; c++) {
            if (!before) PIECES(d[j] = p[j] - s[j];)
            for (long r = 0; r < before; r += ROWS, old += ROWS * WIDTH, older += ROWS)
                take(old, older, weights + r, x + c * WIDTH);
            for (long r = 0; r < here; r += ROWS, tile += ROWS * WIDTH, scale += ROWS)
                dots(tile, scale, x + c * WIDTH, totals + r);
            if (!here) PIECES(const float whole = d[j] + rest[i + j], now = s[j] + whole;
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
    """What is compiled from SOURCE, once for each process; None where that fails."""
    found = compiled(SOURCE, "-ffp-contract=fast")
    if found is not None:
        for name, pointers in ARGUMENTS.items():
            getattr(found, name).restype = None
            getattr(found, name).argtypes = [ctypes.c_long] * 2 + [ctypes.c_void_p] * pointers
        pointer, number = ctypes.c_void_p, ctypes.c_long
        found.correct.restype = None
        found.correct.argtypes = [number, *[pointer] * 5, number, number, *[pointer] * 3]
    return found


def usable(rows: Float[Tensor, "k d"]) -> bool:
    """Whether compiled loops are there for parameters that these rows are of: float32 on the CPU, and one thread, since
    several share the passes of torch."""
    if rows.dtype is not torch.float32 or not rows.is_cpu or torch.get_num_threads() > 1:
        return False
    return not torch.compiler.is_compiling() and library() is not None


@dataclass(frozen=True)
class PackedRows:
    """Orthonormal rows Ũ in 16 bits, for the steps of one task: half the memory traffic, which is what a step costs.

    Each number is an integer times a scale for WIDTH of its row: of Gaussian rows it is off by 3e-5 of their size. A
    step x becomes x − x Ũᵀ Ũ, in which x Uᵀ is not zero but −(Ũ − U)(I − Ũᵀ Ũ) x: ‖Ũ − U‖_F / √d of ‖x‖ where x does
    not know of the rounding, so 3e-5 √(k/d).
    """

    tiles: Int16[Tensor, "n"]
    scales: Float[Tensor, "s"]
    inverse: Float[Tensor, "k"]
    step: Float[Tensor, "d"]

    @classmethod
    def of(cls, rows: Float[Tensor, "k d"]) -> PackedRows | None:
        """These rows; None where they stay in the cache anyway, or where more than LEAK of a step would be left in
        them, as a step that is half in the rows and half drawn at random tells."""
        if rows.numel() < LARGE or not usable(rows):
            return None
        packed = cls(*_packed(rows))
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
        library().correct(
            count, widths, parameters, start.data_ptr(), rest.data_ptr(), self.step.data_ptr(),
            len(self.step) // WIDTH, len(self.inverse),
            self.tiles.data_ptr(), self.scales.data_ptr(), self.inverse.data_ptr(),
        )  # fmt: skip


def _packed(rows: Float[Tensor, "k d"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Integers, scales and 1 / ‖ũ‖², in the order in which `correct` reads them, and memory for a step, with zeros at
    its end."""
    stretches, rank = -(-rows.shape[1] // WIDTH), -(-len(rows) // ROWS) * ROWS
    tiles, scales = torch.empty(rank * stretches * WIDTH, dtype=torch.int16), torch.empty(rank * stretches)
    inverse, first = torch.zeros(rank), 0
    for some in rows.split(BLOCK):
        count = -(-len(some) // ROWS) * ROWS
        block = some.new_zeros(count, stretches * WIDTH)
        block[: len(some), : rows.shape[1]] = some
        block = block.view(count, stretches, WIDTH)
        scale = (block.abs().amax(2) / (2**15 - 1)).clamp_(min=torch.finfo(block.dtype).tiny)
        block = block.div_(scale[:, :, None]).round_()
        groups = block.view(-1, ROWS, stretches, WIDTH // LANES, LANES).permute(2, 0, 3, 1, 4)
        own = slice(first * stretches * WIDTH, (first + count) * stretches * WIDTH)
        tiles[own] = groups.reshape(-1)
        scales[first * stretches : (first + count) * stretches] = scale.T.reshape(-1)
        squares = (block.mul_(scale[:, :, None])).square_().sum(2, dtype=torch.float64).sum(1)[: len(some)]
        inverse[first : first + len(some)] = 1 / squares
        first += count
    return tiles, scales, inverse, rows.new_zeros(stretches * WIDTH)
