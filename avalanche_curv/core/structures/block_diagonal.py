"""One dense block for each parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.parameters import ParameterSpace
from avalanche_curv.core.structures.base import Matrix, Structure, check_memory, spectral_function, symmetrised
from avalanche_curv.core.structures.columns import identity_columns

if TYPE_CHECKING:
    from avalanche_curv.core.curvature import Operator
    from avalanche_curv.core.risk import EmpiricalRisk


@dataclass(frozen=True)
class BlockDiagonal(Structure):
    """Interactions within each parameter tensor (one weight matrix, one bias); Σ p² numbers, up to `max_bytes`."""

    max_bytes: int = 4 * 2**30

    def from_operator(self, operator: Operator, risk: EmpiricalRisk) -> Matrix:
        strips: list[list[Tensor]] = [[] for _ in risk.space.sizes]
        bounds = torch.tensor((0, *risk.space.sizes)).cumsum(0).tolist()
        for start, columns in identity_columns(risk.anchor):
            result = operator.matmat(columns)
            stop = start + columns.shape[1]
            for strip, low, high in zip(strips, bounds, bounds[1:]):
                strip.append(result[low:high, max(low, start) - start : max(min(high, stop) - start, 0)])
        return BlockDiagonalMatrix(tuple(symmetrised(torch.cat(strip, dim=1)) for strip in strips))

    def bytes(self, space: ParameterSpace, itemsize: int) -> int:
        return sum(size**2 for size in space.sizes) * itemsize

    def check(self, space: ParameterSpace, itemsize: int) -> None:
        largest = max(zip(space.sizes, space.names))
        check_memory(
            f"BlockDiagonal() with a largest block of {largest[0]:,} parameters ('{largest[1]}')",
            self.bytes(space, itemsize), self.max_bytes,
            "Use Diagonal(), or raise BlockDiagonal(max_bytes=...).",
        )


@dataclass(frozen=True)
class BlockDiagonalMatrix(Matrix):
    """C with one symmetric block for each parameter, in the order of the space. Sums are exact."""

    blocks: tuple[Float[Tensor, "p p"], ...]

    def product(self, vector: Tensor) -> Tensor:
        parts = vector.split([len(block) for block in self.blocks])
        return torch.cat([block @ part for block, part in zip(self.blocks, parts)])

    def plus(self, other: Matrix) -> BlockDiagonalMatrix:
        if not isinstance(other, BlockDiagonalMatrix):
            raise TypeError(f"A block diagonal can be added to a block diagonal only; got {type(other).__name__}.")
        return BlockDiagonalMatrix(tuple(a + b for a, b in zip(self.blocks, other.blocks)))

    def scaled(self, factor: float) -> BlockDiagonalMatrix:
        return BlockDiagonalMatrix(tuple(block * factor for block in self.blocks))

    def embedded(self, inner: ParameterSpace, outer: ParameterSpace) -> BlockDiagonalMatrix:
        held = {
            name: (ParameterSpace((name,), (shape,)), block)
            for name, shape, block in zip(inner.names, inner.shapes, self.blocks)
        }
        blocks = []
        for name, shape, size in zip(outer.names, outer.shapes, outer.sizes):
            block = self.blocks[0].new_zeros(size, size)
            if name in held:
                space, old = held[name]
                where = ParameterSpace((name,), (shape,)).positions(space).to(block.device)
                block[where[:, None], where] = old
            blocks.append(block)
        return BlockDiagonalMatrix(tuple(blocks))

    def map_spectrum(self, function: Callable[[Tensor], Tensor]) -> BlockDiagonalMatrix:
        return BlockDiagonalMatrix(tuple(spectral_function(block, function) for block in self.blocks))

    def dense(self) -> Tensor:
        return torch.block_diag(*self.blocks)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.blocks
