"""A quadratic model of past loss of which every rank keeps a part, and the penalty that it adds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from avalanche_curv.core.distributed.ranks import Ranks
from avalanche_curv.core.distributed.shares import EvenShare, ParameterShare
from avalanche_curv.core.quadratic.model import QuadraticModel, check_first_order, half, times
from avalanche_curv.core.structures.base import Matrix
from avalanche_curv.core.structures.low_rank import LowRankMatrix


@dataclass(frozen=True)
class ShardedQuadratic:
    """q(θ) = c + gᵀδ + ½ δᵀ C δ for C diagonal, of low rank, or both: a rank keeps the anchor, the slope, the diagonal
    and the columns of the eigenvectors of its share of the coordinates alone, about 1/R of the memory.

    A value takes one message of k + 1 numbers, with k the rank of C: V δ = Σ_r V_r δ_r, and the sum of the rest. The
    gradient of a share follows from that without another one. `+` is exact for models of one share. All methods are to
    be called on all ranks.
    """

    share: ParameterShare
    anchor: Float[Tensor, "p"]
    curvature: LowRankMatrix
    gradient: Float[Tensor, "p"]
    constant: float = 0.0

    @classmethod
    def of(cls, past: QuadraticModel, ranks: Ranks = Ranks()) -> ShardedQuadratic:  # noqa: B008  a frozen value
        """An equal share of a model that every rank has, for training with copies of one model; drop `past` afterwards.
        Raises TypeError for another structure than Diagonal, LowRank and FlatSpectrum."""
        share = EvenShare.of_space(past.space, ranks)
        gradient = torch.zeros_like(past.anchor) if past.gradient is None else past.gradient
        return cls(
            share, share.of(past.anchor), _columns(past.curvature, share), share.of(gradient), past.constant
        )

    def __call__(self, model: nn.Module) -> Tensor:
        """q(θ), the same on every rank; detached."""
        return self.evaluate(self.share.vector(model).to(self.anchor) - self.anchor)[0]

    def penalty(self, model: nn.Module) -> Tensor:
        """q(θ), the same on every rank, as a scalar to be added to the loss on all of them.

        Its gradient lies on this rank's share. For a model with copies on all ranks it is R (g + C δ) there and zero
        elsewhere: gradients that are averaged over ranks afterwards, as DistributedDataParallel does, are exact without
        another message. No parameter counts as unused then, not even the heads of past tasks that the task's loss does
        not reach: leave `find_unused_parameters` off. For a model sharded by `fully_shard` it is g + C δ on the rows
        that the rank holds; evaluate the penalty before the model then, whose outermost parameters are whole between
        forward and backward pass.
        """
        return _Penalty.apply(self, *self.share.tensors(model))

    def evaluate(self, displacement: Float[Tensor, "p"]) -> tuple[Tensor, Float[Tensor, "p"]]:
        """q(a + δ), and g + C δ in this rank's coordinates, from its part of δ."""
        c = self.curvature
        bent = torch.zeros_like(displacement) if c.diagonal is None else c.diagonal * displacement
        rest = half(displacement @ bent) + displacement @ self.gradient
        total = self.share.ranks.sum(torch.cat([c.vectors @ displacement, rest[None]]))
        along, rest = total[:-1], total[-1]
        weights = c.values * along
        return half(along @ weights) + rest + self.constant, self.gradient + bent + weights @ c.vectors

    def scaled(self, factor: float) -> ShardedQuadratic:
        """factor · q."""
        return replace(
            self, curvature=self.curvature.scaled(factor), gradient=factor * self.gradient,
            constant=factor * self.constant,
        )

    def __add__(self, newer: ShardedQuadratic) -> ShardedQuadratic:
        """The sum, anchored where `newer` is. Raises ValueError for models of different shares."""
        if (self.share.space, self.share.ranges) != (newer.share.space, newer.share.ranges):
            raise ValueError(
                "Quadratic models over different parameters have different shares and cannot be folded into one, as "
                "where the model has grown in between. Keep both, and add their penalties to the loss."
            )
        value, slope = self.evaluate(newer.anchor - self.anchor)
        return replace(
            newer, curvature=self.curvature.plus(newer.curvature), gradient=slope + newer.gradient,
            constant=float(value) + newer.constant,
        )

    @property
    def nbytes(self) -> int:
        """Memory of the model on this rank, in bytes."""
        return self.anchor.nbytes + self.gradient.nbytes + self.curvature.nbytes


def diagonal_columns(values: Float[Tensor, "p"]) -> LowRankMatrix:
    """A diagonal as a low rank matrix of rank 0 beside it."""
    return LowRankMatrix(values.new_zeros(0, len(values)), values.new_zeros(0), values)


def _columns(matrix: Matrix, share: ParameterShare) -> LowRankMatrix:
    parts = matrix.eigenvectors_beside_diagonal()
    if parts is None or matrix.sums_are_cut:
        raise TypeError(
            f"A {type(matrix).__name__} is not kept in shares, nor is a bound on the rank of sums. Use Diagonal(), "
            "LowRank(...) without max_rank or FlatSpectrum(...), or keep the whole model on every rank."
        )
    (values, vectors), diagonal = parts
    return LowRankMatrix(share.of(vectors), values, None if diagonal is None else share.of(diagonal))


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, past: ShardedQuadratic, *tensors: Tensor) -> Tensor:
        own = torch.cat([*tensors, past.anchor[:0].to(tensors[0] if tensors else past.anchor)])
        value, gradient = past.evaluate(own.to(past.anchor) - past.anchor)
        ctx.types, ctx.sizes, ctx.factor = [t.dtype for t in tensors], [len(t) for t in tensors], past.share.factor
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        check_first_order()
        (gradient,) = ctx.saved_tensors
        parts = times(gradient, ctx.factor * grad_outputs[0]).split(ctx.sizes)
        return None, *(part.to(dtype) for part, dtype in zip(parts, ctx.types))
