"""One block for each parameter or each layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from avalanche_curv.core.curvature.base import Curvature, OutputCurvature
from avalanche_curv.core.curvature.operators import Operator
from avalanche_curv.core.eigen import Pairs
from avalanche_curv.core.options import settle
from avalanche_curv.core.per_example.gram import Rows, gram_rows, top_pairs
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.parameters import ParameterSpace
from avalanche_curv.core.state import Storable
from avalanche_curv.core.structures.base import Matrix, Structure, other_options
from avalanche_curv.core.structures.dense import Dense, DenseMatrix
from avalanche_curv.core.structures.diagonal import Diagonal
from avalanche_curv.core.structures.low_rank import GRAM_ROWS, LowRank
from avalanche_curv.core.structures.memory import check_limit, check_memory
from avalanche_curv.core.structures.rules import by_products, check_pair, refusal, rule, structured


class Grouping(Storable, ABC):
    """Which parameters share a block."""

    @abstractmethod
    def key(self, name: str) -> str:
        """What the parameters of one block have in common."""

    def spaces(self, space: ParameterSpace) -> list[ParameterSpace]:
        """The spaces of the blocks, in the order of their first parameters."""
        groups: dict[str, list[tuple[str, torch.Size]]] = {}
        for name, shape in zip(space.names, space.shapes):
            groups.setdefault(self.key(name), []).append((name, shape))
        return [ParameterSpace(*zip(*group)) for group in groups.values()]


@dataclass(frozen=True)
class WholeModel(Grouping):
    """One block of all parameters."""

    def key(self, name: str) -> str:
        return ""


@dataclass(frozen=True)
class PerParameter(Grouping):
    """A block for each parameter tensor: one weight matrix, one bias."""

    def key(self, name: str) -> str:
        return name


@dataclass(frozen=True)
class PerLayer(Grouping):
    """A block for each module: its weight and bias together."""

    def key(self, name: str) -> str:
        return name.rpartition(".")[0]


@dataclass(frozen=True)
class BlockDiagonal(Structure):
    """Interactions within each parameter or layer, with every block in a structure of its own, such as
    `BlockDiagonal(PerLayer(), LowRank(Rank(10)))`. Sums are those of the blocks. Up to `max_bytes` in all."""

    per: Grouping = PerParameter()
    block: Structure = field(default_factory=Dense)
    max_bytes: int = 4 * 2**30

    fits_in_blocks = False

    @property
    def is_mean(self) -> bool:  # type: ignore[override]
        """Whether the blocks are."""
        return self.block.is_mean

    @property
    def sums_grow(self) -> bool:  # type: ignore[override]
        """Whether those of the blocks do."""
        return self.block.sums_grow

    def __post_init__(self) -> None:
        settle(self, max_bytes=check_limit)
        if not isinstance(self.per, Grouping):
            raise TypeError(f"BlockDiagonal takes PerParameter(), PerLayer() or WholeModel(); got {self.per!r}.")
        if not isinstance(self.block, Structure):
            raise TypeError(f"BlockDiagonal takes blocks such as Dense() or LowRank(Rank(10)); got {self.block!r}.")

    def from_operator(self, operator: Operator, risk: EmpiricalRisk) -> BlockDiagonalMatrix:
        return self.matrix(risk, lambda at, _: self.block.from_operator(Restricted(operator, at), risk))

    def matrix(self, risk: EmpiricalRisk, block: Callable[[Tensor, ParameterSpace], Matrix]) -> BlockDiagonalMatrix:
        """The matrix whose blocks are given by their coordinates and their space."""
        spaces = self.per.spaces(risk.space)
        places = (risk.space.positions(space).to(risk.anchor.device) for space in spaces)
        blocks = tuple(Block(space, block(at, space)) for at, space in zip(places, spaces))
        return BlockDiagonalMatrix(risk.space, self.per, blocks)

    def bytes(self, space: ParameterSpace, itemsize: int) -> int:
        return sum(self.block.bytes(part, itemsize) for part in self.per.spaces(space))

    def check(self, space: ParameterSpace, itemsize: int) -> None:
        largest = max(self.per.spaces(space), key=lambda part: part.size)
        check_memory(
            f"{self} with a largest block of {largest.size:,} parameters ({', '.join(largest.names)})",
            self.bytes(space, itemsize), self.max_bytes,
            "Use BlockDiagonal(block=LowRank(Rank(10))), Kronecker() or Diagonal(), or raise "
            "BlockDiagonal(max_bytes=...).",
        )

    def differs_from(self, matrix: Matrix) -> str | None:
        blocks = matrix.blocks if isinstance(matrix, BlockDiagonalMatrix) else ()
        found = (self.block.differs_from(block.matrix) for block in blocks if block.matrix is not None)
        inner = next((one for one in found if one is not None), None)
        whole = other_options(matrix, BlockDiagonalMatrix, per=self.per)
        return f"{type(matrix).__name__} with blocks of {inner}" if whole is None and inner is not None else whole


@dataclass(frozen=True)
class Restricted:
    """Some rows and columns of an operator."""

    whole: Operator
    at: Int[Tensor, "p"]

    @property
    def size(self) -> int:
        return len(self.at)

    def matmat(self, matrix: Float[Tensor, "p k"]) -> Float[Tensor, "p k"]:
        padded = matrix.new_zeros(self.whole.size, matrix.shape[1])
        padded[self.at] = matrix
        return self.whole.matmat(padded)[self.at]


@dataclass(frozen=True)
class Block(Storable):
    """A matrix over some parameters; None for zero, where they are newer than all curvature."""

    space: ParameterSpace
    matrix: Matrix | None

    def plus(self, other: Block) -> Block:
        if self.matrix is None or other.matrix is None:
            return Block(self.space, self.matrix or other.matrix)
        return Block(self.space, self.matrix.plus(other.matrix))

    def within(self, outer: ParameterSpace) -> Block:
        return Block(outer, None if self.matrix is None else self.matrix.embedded(self.space, outer))


@dataclass(frozen=True)
class BlockDiagonalMatrix(Matrix):
    """C with a symmetric block for each group of parameters."""

    space: ParameterSpace
    per: Grouping
    blocks: tuple[Block, ...]

    copies_to_scale = True

    @property
    def size(self) -> int:
        return self.space.size

    def product(self, vector: Tensor) -> Tensor:
        result = torch.zeros_like(vector)
        for at, matrix in self.placed:
            result[at] = matrix.product(vector[at])
        return result

    def plus(self, other: Matrix) -> BlockDiagonalMatrix:
        if not isinstance(other, BlockDiagonalMatrix) or (self.space, self.per) != (other.space, other.per):
            raise TypeError(f"A block diagonal can be added to one of the same blocks; got {type(other).__name__}.")
        return replace(self, blocks=tuple(a.plus(b) for a, b in zip(self.blocks, other.blocks)))

    def compressed(self) -> BlockDiagonalMatrix:
        if all(b.matrix is None or b.matrix.compressed() is b.matrix for b in self.blocks):
            return self
        return self._map(lambda matrix: matrix.compressed())

    def scaled(self, factor: float) -> BlockDiagonalMatrix:
        return self._map(lambda matrix: matrix.scaled(factor))

    def embedded(self, inner: ParameterSpace, outer: ParameterSpace) -> BlockDiagonalMatrix:
        held = {self.per.key(block.space.names[0]): block for block in self.blocks}
        groups = ((space, held.get(self.per.key(space.names[0]))) for space in self.per.spaces(outer))
        blocks = (Block(space, None) if block is None else block.within(space) for space, block in groups)
        return BlockDiagonalMatrix(outer, self.per, tuple(blocks))

    def to(self, like: Tensor) -> BlockDiagonalMatrix:
        return self._map(lambda matrix: matrix.to(like))

    def map_spectrum(self, function: Callable[[Tensor], Tensor]) -> BlockDiagonalMatrix:
        return self._map(lambda matrix: matrix.map_spectrum(function))

    @property
    def is_decomposed(self) -> bool:  # type: ignore[override]
        """Whether all blocks are."""
        return all(matrix.is_decomposed for _, matrix in self.placed)

    def pseudo_inverse(self, rounding: float) -> BlockDiagonalMatrix | None:
        found = {id(matrix): matrix.pseudo_inverse(rounding) for _, matrix in self.placed}
        inverses = {place: inverse for place, inverse in found.items() if inverse is not None}
        return self._map(lambda matrix: inverses[id(matrix)]) if len(inverses) == len(found) else None

    def dense(self) -> Tensor:
        whole = self.tensors()[0].new_zeros(self.size, self.size)
        every = torch.arange(self.size, device=whole.device)
        for at, matrix in self.placed:
            where = every[at]
            whole[where[:, None], where] = matrix.dense()
        return whole

    def trace(self) -> float:
        return sum(matrix.trace() for _, matrix in self.placed)

    def top(self, count: int) -> Pairs:
        values, vectors = [], []
        for at, matrix in self.placed:
            some, rows = matrix.top(min(count, matrix.size))
            values.append(some)
            vectors.append(rows.new_zeros(len(rows), self.size))
            vectors[-1][:, at] = rows
        found = torch.cat(values)
        order = found.abs().argsort(descending=True)[:count]
        return found[order], torch.cat(vectors)[order]

    def in_blocks(self, space: ParameterSpace) -> list[tuple[ParameterSpace, Matrix | None]]:
        return [(block.space, block.matrix) for block in self.blocks]

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for block in self.blocks if block.matrix is not None for t in block.matrix.tensors())

    @cached_property
    def placed(self) -> list[tuple[slice | Tensor, Matrix]]:
        """The coordinates of each block that is not zero, as a range where they are neighbours."""
        device = self.tensors()[0].device
        held = [(self.space.positions(b.space).to(device), b.matrix) for b in self.blocks if b.matrix is not None]
        return [(_range(at), matrix) for at, matrix in held]

    def _map(self, function: Callable[[Matrix], Matrix]) -> BlockDiagonalMatrix:
        held = ((b.space, b.matrix) for b in self.blocks)
        blocks = tuple(Block(space, None if matrix is None else function(matrix)) for space, matrix in held)
        return replace(self, blocks=blocks)


def _range(at: Int[Tensor, "p"]) -> slice | Tensor:
    first, last = int(at[0]), int(at[-1])
    return slice(first, last + 1) if torch.equal(at, torch.arange(first, last + 1, device=at.device)) else at


@rule(Curvature, BlockDiagonal)
def blocks_from_rows(curvature: Curvature, structure: BlockDiagonal, risk: EmpiricalRisk) -> Matrix:
    """From the rows G of a kind that has them, where blocks are dense or of low rank; by products elsewhere."""
    if isinstance(structure.block, Dense) and curvature.row_count(risk) is not None:
        return _dense_blocks(curvature, structure, risk)
    if isinstance(structure.block, LowRank) and isinstance(curvature, OutputCurvature):
        rows = gram_rows(curvature, risk, GRAM_ROWS)
        if rows is not None:
            return _low_rank_blocks(curvature, structure, structure.block, risk, rows)
    return by_products(curvature, structure, risk)


def _dense_blocks(curvature: Curvature, structure: BlockDiagonal, risk: EmpiricalRisk) -> BlockDiagonalMatrix:
    """Σ GᵀG within each block."""
    zeros = structure.matrix(risk, lambda _, space: DenseMatrix(risk.anchor.new_zeros(space.size, space.size)))
    for part in curvature.rows(risk):
        for at, matrix in zeros.placed:
            block = part[:, at]
            matrix.tensors()[0].addmm_(block.T, block)
    return zeros


def _low_rank_blocks(
    curvature: Curvature, structure: BlockDiagonal, recipe: LowRank, risk: EmpiricalRisk, rows: list[Rows]
) -> BlockDiagonalMatrix:
    """Each block by the Gram matrix of its own columns."""
    whole = structured(curvature, Diagonal(), risk).tensors()[0] if recipe.needs_diagonal else None

    def block(at: Tensor, space: ParameterSpace) -> Matrix:
        own = [part for part in (some.only(space.names) for some in rows) if part is not None]
        diagonal = None if whole is None else whole[at]
        nothing = risk.anchor.new_zeros(0), risk.anchor.new_zeros(0, space.size)  # a layer that is not called
        return recipe.matrix(lambda count: top_pairs(own, space, count) if own else nothing, space.size, diagonal)

    return structure.matrix(risk, block)


@refusal(Curvature, BlockDiagonal)
def blocks_that_do_not_fit(curvature: Curvature, structure: BlockDiagonal) -> str | None:
    """Blocks need a structure that can be read out of products, and that goes with the kind."""
    if not structure.block.fits_in_blocks:
        return f"BlockDiagonal takes blocks of Dense, Diagonal, LowRank or FlatSpectrum; got {structure.block}."
    check_pair(curvature, structure.block)
    return None
