"""Products through a linearisation that is kept, where the kind allows one."""

from __future__ import annotations

from avalanche_curv.core.curvature import Curvature, Hessian, OutputCurvature
from avalanche_curv.core.estimate import refusal, rule
from avalanche_curv.core.linearised import Linearised, LinearisedHessian
from avalanche_curv.core.risk import EmpiricalRisk
from avalanche_curv.core.structures.matrix_free import MatrixFree, MatrixFreeMatrix

BATCH = 256  # examples of one graph


@rule(Curvature, MatrixFree)
def by_operator(curvature: Curvature, structure: MatrixFree, risk: EmpiricalRisk) -> MatrixFreeMatrix:
    """The kind's own operator, on the chosen examples."""
    return structure.from_operator(curvature.operator(_chosen(structure, risk)), risk)


@rule(OutputCurvature, MatrixFree)
def linearised(curvature: OutputCurvature, structure: MatrixFree, risk: EmpiricalRisk) -> MatrixFreeMatrix:
    """J and Jᵀ from graphs that are kept."""
    return structure.from_operator(Linearised(curvature, _chosen(structure, risk).rebatched(BATCH)), risk)


@rule(Hessian, MatrixFree)
def linearised_hessian(curvature: Hessian, structure: MatrixFree, risk: EmpiricalRisk) -> MatrixFreeMatrix:
    """The derivative of the gradient, whose graph is kept."""
    return structure.from_operator(LinearisedHessian(_chosen(structure, risk).rebatched(BATCH)), risk)


@refusal(Hessian, MatrixFree)
def no_spectrum_to_mend(curvature: Hessian, structure: MatrixFree) -> str | None:
    """psd needs eigenvalues."""
    if curvature.psd is None:
        return None
    return (
        f"{curvature} cannot be mended where only products are known. Use Hessian() or GGN() with MatrixFree, or "
        f"{curvature} with LowRank, BlockDiagonal, Diagonal or Dense."
    )


def _chosen(structure: MatrixFree, risk: EmpiricalRisk) -> EmpiricalRisk:
    return risk if structure.fraction == 1 else risk.subset(structure.fraction, structure.seed)
