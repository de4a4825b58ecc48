"""A curvature from any linear operator of curvlinops, or of SciPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from avalanche_curv.core.curvature._curvlinops import chosen_operator
from avalanche_curv.core.curvature.base import Curvature
from avalanche_curv.core.curvature.operators import Operator
from avalanche_curv.core.options import check_flag, settle
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk


@dataclass(frozen=True)
class FromLinearOperator(Curvature):
    """(1/N) A, with A the linear operator that `make` gives for a sum over N examples.

    `make` is a class of curvlinops, or a function with the same arguments:

        FromLinearOperator(curvlinops.KFACLinearOperator)
        FromLinearOperator(partial(curvlinops.FisherMCLinearOperator, mc_samples=3), is_semidefinite=True)

    It is called as `make(model, loss, parameters, data, num_data=N, check_deterministic=False)`, with a copy of the
    frozen model, a criterion that sums over examples, the parameters in the order of `risk.space`, and the batches; it
    may give an operator of curvlinops or of SciPy, symmetric and of P × P. The criterion is torch's own where that sums
    to the same loss; a mean over outputs (`MSELoss()` on several outputs) is known to curvlinops' Hessian and GGN
    alone.

    Args:
        make: what makes the operator.
        is_semidefinite: whether it has no negative eigenvalues.

    Raises ValueError for an operator of another shape, and what `make` raises.
    """

    make: Callable[..., Any]
    is_semidefinite: bool = False

    def __post_init__(self) -> None:
        if not callable(self.make):
            raise TypeError(
                "FromLinearOperator takes what makes an operator, such as curvlinops.GGNLinearOperator; got "
                f"{self.make!r}."
            )
        settle(self, is_semidefinite=check_flag)

    def operator(self, risk: EmpiricalRisk) -> Operator:
        return chosen_operator(self.make, risk, list(risk))
