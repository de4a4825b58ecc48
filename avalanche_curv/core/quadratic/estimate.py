"""From a kind of curvature, a structure and a risk to a quadratic model, by the fastest exact method that is known."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.arguments import takes
from avalanche_curv.core.curvature.base import Curvature, NonFiniteCurvatureError
from avalanche_curv.core.precision import in_own_precision
from avalanche_curv.core.quadratic.model import QuadraticModel
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.structures.base import Structure, all_finite
from avalanche_curv.core.structures.rules import check_pair, curvature_matrix


@takes(
    curvature=(Curvature, "Fisher()"), structure=(Structure, "Diagonal()"),
    risk=(EmpiricalRisk, "EmpiricalRisk.snapshot(model, criterion, batches)"),
)  # fmt: skip
@in_own_precision
def estimate(
    curvature: Curvature, structure: Structure, risk: EmpiricalRisk, *, gradient: bool = False
) -> QuadraticModel:
    """The quadratic model of how `risk` increases around its frozen parameters.

    C is `curvature` in the form of `structure`; g = ∇L(a) with `gradient=True`, and zero otherwise, which takes the
    anchor for a minimum. Raises TypeError for arguments of other types or in another order and for a pair that does not
    go together, MemoryError before computing a matrix over the structure's limit, and NonFiniteCurvatureError for NaN
    or infinity in the result, its anchor included. Warns where the columns of an exact kind, one for each class of each
    token, will take longer than ten minutes.

    Beside the matrix and the activations of one batch it takes a copy of the model and of one gradient, and rows of up
    to 2 MiB at once (`Diagonal`, `Kronecker`, `EKFAC`), up to 1 GiB of rows or a Gram matrix of 3,000 rows (`LowRank`),
    or chunks of 128 MiB (`Dense`, dense blocks, and parameters that no layer explains); and factors S [n, C, R] of some
    examples, up to 32 MiB at once and four times as much while they are made (`MatrixFree` holds those of all).

    >>> import torch
    >>> from avalanche_curv import GGN, Diagonal
    >>> x = torch.tensor([[1.0], [3.0]])
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> risk = EmpiricalRisk.snapshot(model, torch.nn.MSELoss(), [(x, x)])
    >>> estimate(GGN(), Diagonal(), risk).curvature.dense().round()   # 2 · mean(x²)
    tensor([[10.]])
    """
    return _estimated(curvature, structure, risk, risk.gradient if gradient else lambda: None)


@in_own_precision
def estimate_with_losses(
    curvature: Curvature, structure: Structure, risk: EmpiricalRisk
) -> tuple[QuadraticModel, Float[Tensor, "N"]]:
    """What `estimate(..., gradient=True)` returns, and the loss of each example at the anchor from the pass that gives
    the gradient. Raises what `estimate` raises."""
    found: list[Tensor] = []

    def slope() -> Tensor:
        losses, gradient = risk.losses_and_gradient()
        found.append(losses)
        return gradient

    return _estimated(curvature, structure, risk, slope), found[0]


def _estimated(
    curvature: Curvature, structure: Structure, risk: EmpiricalRisk, slope_of: Callable[[], Tensor | None]
) -> QuadraticModel:
    check_pair(curvature, structure)
    structure.check(risk.space, risk.anchor.element_size())
    matrix = slope = None
    if all_finite(risk.anchor) and all_finite(risk.one_loss):
        matrix = curvature_matrix(curvature, structure, risk)
        slope = slope_of()
    if matrix is None or not matrix.is_finite() or (slope is not None and not all_finite(slope)):
        raise not_finite(str(curvature), risk.examples)
    return QuadraticModel(risk.space, risk.anchor, matrix, slope, frozen=risk.frozen)


def not_finite(what: str, examples: int) -> NonFiniteCurvatureError:
    """The error for NaN or infinity in what was computed of so many examples."""
    return NonFiniteCurvatureError(
        f"{what} of {examples} examples holds NaN or infinity, so the model, its loss or its inputs do. "
        "Look for diverged weights (lower the learning rate or the strength) and for NaN in the data."
    )
