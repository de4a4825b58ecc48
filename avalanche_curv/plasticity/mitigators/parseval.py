"""Parseval regularisation, which keeps weight matrices near a multiple of an orthogonal one."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from avalanche_curv.core.options import Setting, check_number
from avalanche_curv.core.precision import in_own_precision, product
from avalanche_curv.core.risk.selection import ParameterSelector
from avalanche_curv.plasticity.mitigators.regularizer import Regularizer, at_least_float32, gradient_of, sum_of
from avalanche_curv.plasticity.roles import check_weights, weights_among


class Parseval(Regularizer):
    """R(θ) = Σ_W ‖W Wᵀ − s I‖_F², with gradient 4 (W Wᵀ − s I) W (Cisse et al. 2017, there with ½ and s = 1; Chung et
    al. 2024, "Parseval regularization for continual reinforcement learning").

    W are the weights of linear layers and convolutions, the latter as [out, in · kernel], and the query, key and value
    of attention one by one. A matrix with more rows than columns cannot have orthogonal rows: there R takes the
    smaller Gram, ‖WᵀW − s I‖_F², which is less by the constant s² (rows − columns), has the same gradient, and is 0
    for orthogonal columns.

    `scale` is s, the squared singular value that all are drawn to: 1 by default, as in Cisse et al. The sources leave
    out the output layer; do so by its name, `exclude=("head",)`. The two products of matrices for each layer cost
    about as much as the step of a multilayer perceptron at batch 128; `every=10` brings that to a tenth. Weights that
    are computed from others, as by `weight_norm`, are left alone with a warning.

    Raises ValueError for a scale that is not positive, and in `prepare` for a model without a trainable weight matrix;
    for the other options see `Regularizer`.
    """

    scale = Setting(partial(check_number, above=0, hint="1 draws all singular values to 1."))

    def __init__(
        self,
        strength: float,
        *,
        scale: float = 1.0,
        every: int = 1,
        include: Iterable[ParameterSelector] = (),
        exclude: Iterable[ParameterSelector] = (),
    ) -> None:
        super().__init__(strength, every=every, include=include, exclude=exclude)
        self.scale = scale

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        check_weights(self, self.parameters(model), model)

    @in_own_precision
    def penalty(self, model: nn.Module) -> Tensor:
        return sum_of([
            gram_excess(at_least_float32(block).flatten(1), self.scale).square().sum()
            for weight, role in weights_among(self.parameters(model), model)
            for block in role.tensors(weight)
        ])

    @in_own_precision
    def add_penalty_gradient(self, parameters: dict[str, nn.Parameter], model: nn.Module, weight: float) -> None:
        for parameter, role in weights_among(parameters, model):
            for block, gradient in zip(role.tensors(parameter), role.tensors(gradient_of(parameter))):
                gradient += isometry_gradient(block, self.scale, weight)


def gram_excess(matrix: Float[Tensor, "m n"], scale: float = 1.0) -> Float[Tensor, "k k"]:
    """W Wᵀ − s I or WᵀW − s I, whichever is smaller."""
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    return product(wide, wide.T) - scale * torch.eye(len(wide), dtype=matrix.dtype, device=matrix.device)


def isometry_gradient(weight: Float[Tensor, "m *n"], scale: float, factor: float) -> Float[Tensor, "m *n"]:
    """factor · ∇‖W Wᵀ − s I‖_F² = 4 factor (W Wᵀ − s I) W for W = `weight` as a matrix [m, n], in float32 at least.

    >>> isometry_gradient(torch.tensor([[2.0, 0.0]]), scale=1.0, factor=0.5)  # 4 · 0.5 · (2² − 1) · 2
    tensor([[12.,  0.]])
    """
    matrix = at_least_float32(weight.detach()).flatten(1)
    excess = gram_excess(matrix, scale) * (4 * factor)
    return (excess @ matrix if len(excess) == len(matrix) else matrix @ excess).view(weight.shape)
