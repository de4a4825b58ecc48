"""The one door to curvlinops. Operators sum over examples there; the mean is taken here."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from avalanche_curv.core.nested import Nested, described, examples
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.frozen import copied_base

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # a dependency of curvlinops still uses torch.jit
    from curvlinops import GGNLinearOperator
    from curvlinops._torch_base import PyTorchLinearOperator as LinearOperator

COLUMNS = 16  # a matrix product maps over all columns at once: this bounds its memory


@dataclass(frozen=True)
class MeanOperator:
    """(1/N) times a curvlinops operator that sums over N examples."""

    summed: Any
    examples: int

    @property
    def size(self) -> int:
        return self.summed.shape[1]

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        """C M, a few columns at a time."""
        with torch.no_grad():
            parts = [self.summed @ part for part in matrix.split(COLUMNS, dim=1)]
        return torch.cat(parts, dim=1) / self.examples


def output_operator(risk: EmpiricalRisk, data: list[tuple[Nested, Tensor]]) -> MeanOperator:
    """(1/N) Σ_i J_iᵀ S_i S_iᵀ J_i, as the GGN of ½ Σ_i ‖S_iᵀ f_i‖²; `data` holds inputs and S [n, C, R] by batch."""
    return _mean(GGNLinearOperator, risk, _HalfSquare(), data)


def chosen_operator(
    make: Callable[..., Any], risk: EmpiricalRisk, data: list[tuple[Nested, Tensor]]
) -> ChosenOperator:
    """(1/N) times what `make(model, loss, parameters, data, num_data=N, check_deterministic=False)` gives, with
    `batch_size_fn` besides where inputs are no tensors.

    The model is a copy of the frozen one, since operators may leave hooks on it; the loss sums over examples. Raises
    ValueError where the result is no operator on the parameters, and TypeError for targets in a nesting.
    """
    if not isinstance(risk.few[1], Tensor):
        raise TypeError(
            f"Operators of curvlinops take one tensor of targets; got {described(risk.few[1])}. Use GGN(), "
            "Hessian() or EmpiricalFisher()."
        )
    copied = risk.with_base(copied_base(risk.base))
    loss = risk.loss.summed(risk.one_output, risk.few[1])
    made = make(copied.model, loss, copied.parameters, data, **_options(risk, data))
    size = risk.space.size
    if tuple(getattr(made, "shape", ())) != (size, size):
        raise ValueError(
            f"{make} gives a {type(made).__name__} of shape {getattr(made, 'shape', None)}; expected a linear operator "
            f"on the {size} trainable parameters. Give a class such as curvlinops.HessianLinearOperator."
        )
    return ChosenOperator(made, risk.examples)


@dataclass(frozen=True)
class ChosenOperator:
    """(1/N) times an operator of curvlinops, which may differentiate at each product, or one of SciPy's."""

    summed: Any
    examples: int

    @property
    def size(self) -> int:
        return self.summed.shape[1]

    @torch.enable_grad()
    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        """C M, a few columns at a time."""
        return torch.cat([self._product(part) for part in matrix.detach().split(COLUMNS, dim=1)], dim=1) / self.examples

    def _product(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        if isinstance(self.summed, LinearOperator):
            return (self.summed @ matrix).detach()
        return torch.as_tensor(self.summed @ matrix.cpu().numpy()).to(matrix)


def linear_operator(
    matmat: Callable[[Float[Tensor, "P k"]], Float[Tensor, "P k"]], shapes: Sequence[torch.Size], like: Tensor
) -> LinearOperator:
    """A symmetric matrix as a linear operator of curvlinops on parameters of these shapes, in the type and on the
    device of `like`; `matmat` maps M [P, k] to C M [P, k]."""
    return _Products(matmat, shapes, like)


class _Products(LinearOperator):
    """What curvlinops asks of an operator: products with lists of tensors [*shape, K]."""

    SELF_ADJOINT = True

    def __init__(self, matmat: Callable[[Tensor], Tensor], shapes: Sequence[torch.Size], like: Tensor) -> None:
        super().__init__([tuple(shape) for shape in shapes], [tuple(shape) for shape in shapes])
        self._product, self._like = matmat, like

    @property
    def device(self) -> torch.device:
        return self._like.device

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        count = X[0].shape[-1]
        product = self._product(torch.cat([part.reshape(-1, count) for part in X]))
        parts = product.split([shape.numel() for shape in self._in_shape])
        return [part.reshape(*shape, count) for part, shape in zip(parts, self._in_shape)]


def _mean(operator: Any, risk: EmpiricalRisk, loss: nn.Module, data: list) -> MeanOperator:
    summed = operator(
        _Function(risk), loss, risk.parameters, data, **_options(risk, data)
    )
    return MeanOperator(summed, risk.examples)


def _options(risk: EmpiricalRisk, data: list[tuple[Nested, Tensor]]) -> dict[str, Any]:
    nested = {} if isinstance(data[0][0], Tensor) else {"batch_size_fn": examples}
    return {"num_data": risk.examples, "check_deterministic": False, **nested}


class _Function(nn.Module):
    """The outputs [N, C] as a function of a list of parameters; the model's own modules stay out of sight."""

    def __init__(self, risk: EmpiricalRisk) -> None:
        super().__init__()
        self.risk, self.held = risk, nn.ParameterList(risk.parameters)

    def forward(self, inputs: Nested) -> Tensor:
        return self.risk.outputs_at(list(self.held), inputs)


class _HalfSquare(nn.Module):
    reduction = "sum"

    def forward(self, outputs: Tensor, factor: Float[Tensor, "N C R"]) -> Tensor:
        return 0.5 * torch.einsum("nc,ncr->nr", outputs, factor).square().sum()
