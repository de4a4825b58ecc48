"""The curvature of the mean loss over examples of several past functions at the same parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.curvature import BatchedEmpiricalFisher, Curvature, Hessian, OutputCurvature, check_loss
from avalanche_curv.core.estimate import NonFiniteCurvatureError, has_rule, structured
from avalanche_curv.core.parameters import ParameterSpace
from avalanche_curv.core.risk import EmpiricalRisk, joined_risk
from avalanche_curv.core.structures import Dense, Diagonal, Matrix, MatrixFree


@dataclass(frozen=True)
class AveragedCurvature:
    """C = Σ_f (N_f / N) C_f over functions f, such as the heads of a model for several tasks, of one set of parameters.

    Risks of the same function are joined: `functions` holds one risk each.
    """

    curvature: Curvature
    functions: tuple[EmpiricalRisk, ...]

    @classmethod
    def of(cls, curvature: Curvature, risks: Sequence[EmpiricalRisk]) -> AveragedCurvature:
        """Of all examples of `risks`, which share their frozen model; see `landscape` for what it raises."""
        _check(curvature, risks)
        by_function: dict[object, list[EmpiricalRisk]] = {}
        for risk in risks:
            by_function.setdefault(risk.adapter, []).append(risk)
        return cls(curvature, tuple(joined_risk(same) for same in by_function.values()))

    @property
    def space(self) -> ParameterSpace:
        """The parameters of all functions."""
        return self.functions[0].space

    @property
    def like(self) -> Float[Tensor, "P"]:
        """A vector of the space, for its size, type and device: the parameters themselves."""
        return self.functions[0].anchor

    @property
    def examples(self) -> int:
        """N."""
        return sum(risk.examples for risk in self.functions)

    @property
    def weights(self) -> list[float]:
        """N_f / N."""
        return [risk.examples / self.examples for risk in self.functions]

    @property
    def is_semidefinite(self) -> bool:
        """Whether no eigenvalue can be negative, as far as the kind says."""
        return isinstance(self.curvature, (OutputCurvature, BatchedEmpiricalFisher))

    def whole(self) -> Float[Tensor, "P P"]:
        """C, in float64."""
        return self.checked(self._sum(Dense()).dense().double())

    def product(self) -> Callable[[Float[Tensor, "P"]], Float[Tensor, "P"]]:
        """v ↦ C v, through graphs that are kept as long as the function is."""
        return self._sum(MatrixFree()).product

    def exact_trace(self) -> float | None:
        """tr C from the exact diagonal, where the kind has a rule for it that is cheap."""
        if isinstance(self.curvature, Hessian) or not has_rule(self.curvature, Diagonal()):
            return None
        traces = (structured(self.curvature, Diagonal(), risk).tensors()[0].double().sum() for risk in self.functions)
        return sum(weight * float(trace) for weight, trace in zip(self.weights, traces))

    def checked(self, tensor: Tensor) -> Tensor:
        """The tensor, if it is finite. Raises NonFiniteCurvatureError."""
        if tensor.isfinite().all():
            return tensor
        raise NonFiniteCurvatureError(
            f"{self.curvature} of {self.examples} examples holds NaN or infinity, so the model or its inputs do. "
            "Look for diverged weights (lower the learning rate or the strength) and for NaN in the data."
        )

    def _sum(self, structure: Dense | MatrixFree) -> Matrix:
        parts = (structured(self.curvature, structure, risk) for risk in self.functions)
        weighted = (part.scaled(weight) for part, weight in zip(parts, self.weights))
        return reduce(lambda total, part: total.plus(part), weighted)


def _check(curvature: Curvature, risks: Sequence[EmpiricalRisk]) -> None:
    if not risks:
        raise ValueError("A landscape needs the risk of some examples; got none. Give one or more.")
    for risk in risks:
        check_loss(curvature, risk.loss)
        if risk.base is not risks[0].base:
            raise ValueError(
                "Several risks have one landscape where they are frozen at the same parameters, but these hold models "
                "of their own. Freeze them alike: landscape(curvature, *(risk.at(newest) for risk in risks))."
            )
