"""Parseval regularisation, which keeps weight matrices near a multiple of an orthogonal one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from avalanche_curv.core.options import is_number
from avalanche_curv.core.precision import in_own_precision, product
from avalanche_curv.core.risk.selection import ParameterSelector
from avalanche_curv.plasticity.mitigators.regularizer import Regularizer, at_least_float32, gradient_of, sum_of
from avalanche_curv.plasticity.roles import WeightRole, parameter_roles


class Parseval(Regularizer):
    """R(θ) = Σ_W ‖W Wᵀ − s I‖_F², with gradient 4 (W Wᵀ − s I) W (Cisse et al. 2017, there with ½ and s = 1; Chung et
    al. 2024, "Parseval regularization for continual reinforcement learning").

    W are the weights of linear layers and convolutions, the latter as [out, in · kernel], and the query, key and value
    of attention one by one. A matrix with more rows than columns cannot have orthogonal rows: there R takes the
    smaller Gram, ‖WᵀW − s I‖_F², which is less by the constant s² (rows − columns), has the same gradient, and is 0
    for orthogonal columns.

    `scale` is s, the squared singular value that all are drawn to: 1 by default, as in Cisse et al. The sources leave
    out the output layer; do so by its name, `exclude=("head",)`. The two products of matrices for each layer cost
    about as much as the step of a multilayer perceptron at batch 128; `every=10` brings that to a tenth.

    Raises ValueError for a scale that is not positive, and in `prepare` for a model without a trainable weight matrix;
    for the other options see `Regularizer`.
    """

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
        if not is_number(scale) or scale <= 0:
            raise ValueError(f"scale must be a positive number; got {scale!r}. 1 draws all singular values to 1.")
        self.scale = float(scale)

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        if not any(True for _ in _weights(self.parameters(model), model)):
            raise ValueError(
                f"{type(model).__name__} has no trainable weight matrix among the parameters that are selected, and "
                "others have no Parseval form. Let include and exclude leave one."
            )

    @in_own_precision
    def penalty(self, model: nn.Module) -> Tensor:
        return sum_of([
            self._excess(at_least_float32(block).flatten(1)).square().sum()
            for weight, role in _weights(self.parameters(model), model)
            for block in role.tensors(weight)
        ])

    @in_own_precision
    def add_penalty_gradient(self, parameters: dict[str, nn.Parameter], model: nn.Module, weight: float) -> None:
        for parameter, role in _weights(parameters, model):
            for block, gradient in zip(role.tensors(parameter), role.tensors(gradient_of(parameter))):
                matrix = at_least_float32(block.detach()).flatten(1)
                excess = self._excess(matrix) * (4 * weight)
                product = excess @ matrix if len(excess) == len(matrix) else matrix @ excess
                gradient += product.view(gradient.shape)

    def _excess(self, matrix: Float[Tensor, "m n"]) -> Tensor:
        """W Wᵀ − s I or WᵀW − s I, whichever is smaller."""
        wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
        return product(wide, wide.T) - self.scale * torch.eye(len(wide), dtype=matrix.dtype, device=matrix.device)


def _weights(parameters: Mapping[str, nn.Parameter], model: nn.Module) -> Iterator[tuple[nn.Parameter, WeightRole]]:
    """Those of the parameters that are weights, with their roles."""
    chosen = {id(parameter) for parameter in parameters.values()}
    for parameter, role in parameter_roles(model).items():
        if id(parameter) in chosen and isinstance(role, WeightRole):
            yield parameter, role
