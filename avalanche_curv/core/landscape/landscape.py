"""The shape of the loss around a model: sharpness, trace, ranks and spectral density, and how directions lie to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from avalanche_curv.core.arguments import takes
from avalanche_curv.core.curvature.base import Curvature
from avalanche_curv.core.eigen import Pairs
from avalanche_curv.core.hints import called
from avalanche_curv.core.landscape.averaged import AveragedCurvature
from avalanche_curv.core.landscape.exact import GramMatrix, WholeMatrix
from avalanche_curv.core.landscape.lanczos import Lanczos
from avalanche_curv.core.landscape.spectrum import Density, Spectrum, SpectrumMethod, mean_density
from avalanche_curv.core.options import check_kind, is_count, is_number
from avalanche_curv.core.precision import in_own_precision
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.frozen import copied_base
from avalanche_curv.core.risk.parameters import ParameterSpace

METHODS: tuple[SpectrumMethod, ...] = (WholeMatrix(), GramMatrix(), Lanczos())


@dataclass(frozen=True)
class Landscape:
    """The spectrum λ_1 ≥ … ≥ λ_P of a curvature C at frozen parameters.

    - sharpness = λ_1, the largest eigenvalue.
    - trace = Σ_i λ_i.
    - numerical_rank = #{λ_i > ε λ_1}, which is 0 where λ_1 is not positive.
    - effective_rank = exp(−Σ p_i log p_i), p_i = |λ_i| / Σ_j |λ_j| (Roy & Vetterli 2007).
    - energy = the share of the k largest |λ_i| in Σ_j |λ_j|.
    - density: the eigenvalues with their counts. `top`: the k eigenpairs largest in magnitude, largest first, with
      eigenvectors as rows; fewer where C has fewer that are not zero.

    For a positive semi-definite C the absolute values are the eigenvalues. A Hessian may be indefinite: there sharpness
    and numerical rank look at upward curvature only, trace is a difference, and effective rank and energy measure how
    curvature of either sign is spread. The effective rank and energy of a matrix of zeros are NaN.

    `methods` says of each quantity how it was computed, `exact` whether all are exact up to rounding; `space` names the
    parameters, `examples` is the number of examples. `errors` are the standard errors of the scalars, by name: 0 where
    one is exact or, as the sharpness, good to a residual of 1e-5, and NaN where a single probe says nothing of it.
    """

    sharpness: float
    trace: float
    numerical_rank: float
    effective_rank: float
    energy: float
    density: Density = field(repr=False)
    top: Pairs = field(repr=False)
    exact: bool
    methods: Mapping[str, str] = field(repr=False)
    space: ParameterSpace = field(repr=False)
    examples: int
    errors: Mapping[str, float] = field(repr=False)

    def numbers(self) -> dict[str, float]:
        """The scalars by name, with `exact` as 1.0 or 0.0."""
        names = ("sharpness", "trace", "numerical_rank", "effective_rank", "energy", "exact")
        return {name: float(getattr(self, name)) for name in names}


@in_own_precision
def landscape(
    curvature: Curvature,
    *risks: EmpiricalRisk,
    k: int = 10,
    epsilon: float = 1e-2,
    methods: Sequence[SpectrumMethod] = METHODS,
) -> Landscape:
    """The landscape of the mean loss over all examples of one risk, or of several at the same parameters.

    Args: `k`, the number of eigenvectors that are kept; `epsilon`, the ε of the numerical rank; `methods`, of which the
    first that applies is taken: the whole matrix up to 1,500 parameters, the Gram matrix of up to 3,000 rows, and
    products only beyond that. `Landscape.methods` says which, and `methods=(Lanczos(probes=8),)` chooses one.

    Raises TypeError for a curvature that is none or is mended (`Hessian(psd=...)`), ValueError for risks of several
    models, a k or ε out of range, or where no method applies, and NonFiniteCurvatureError for NaN or infinity.

    >>> from avalanche_curv import GGN
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> model = nn.Linear(2, 1, bias=False)
    >>> risk = EmpiricalRisk.snapshot(model, nn.MSELoss(), [(x, torch.zeros(2, 1))])
    >>> found = landscape(GGN(), risk, k=1)   # 2 XᵀX / N = diag(1, 4)
    >>> [round(value, 3) for value in (found.sharpness, found.trace, found.numerical_rank, found.energy)]
    [4.0, 5.0, 2.0, 0.8]
    >>> found.methods["trace"]
    'eigendecomposition of all 2 rows'
    """
    check_options(curvature, k, epsilon, methods)
    for risk in risks:
        check_kind("risk", risk, EmpiricalRisk, "EmpiricalRisk.snapshot(model, criterion, batches)")
    averaged = AveragedCurvature.of(curvature, risks)
    for value in (averaged.like, *(risk.one_loss for risk in averaged.functions)):
        averaged.checked(value)
    for method in methods:
        found = method.spectrum(averaged, k)
        if found is not None:
            return _landscape(found, averaged, epsilon)
    raise ValueError(
        f"None of the methods {methods} applies to {curvature} of {averaged.examples} examples and "
        f"{averaged.space.size:,} parameters. Raise their limits, or add Lanczos(), which always does."
    )


def moved(risks: Sequence[EmpiricalRisk], model: nn.Module) -> list[EmpiricalRisk]:
    """Risks of one frozen model at the parameters that `model` has now, with past functions, buffers and heads as they
    were. Parameters that came later do not count, and grown ones are cut to their former shape."""
    if not risks:
        return []
    base = copied_base(risks[0].base)
    own = (parameter for parameter in base.parameters() if parameter.requires_grad)
    with torch.no_grad():
        for parameter, value in zip(own, risks[0].space.tensors(model)):
            parameter.copy_(value)
    return [risk.with_base(base) for risk in risks]


def _landscape(found: Spectrum, averaged: AveragedCurvature, epsilon: float) -> Landscape:
    high = float(found.top[0].double().abs().sum())
    rank, effective, energy = _of_density(found.density, found, high, epsilon)
    return Landscape(
        sharpness=found.sharpness,
        trace=found.trace,
        numerical_rank=rank,
        effective_rank=effective,
        energy=energy,
        density=found.density,
        top=found.top,
        exact=found.exact,
        methods=found.methods,
        space=averaged.space,
        examples=averaged.examples,
        errors=_errors(found, high, epsilon),
    )


def _of_density(density: Density, found: Spectrum, high: float, epsilon: float) -> tuple[float, float, float]:
    """Numerical rank, effective rank and energy, of `found` or of another density of the same matrix."""
    magnitude = found.magnitude if found.magnitude_is_known else density.magnitude()
    energy = high / magnitude if magnitude > 0 else math.nan
    return density.count_above(epsilon * found.sharpness), density.effective_rank(), energy


def _errors(found: Spectrum, high: float, epsilon: float) -> dict[str, float]:
    """The standard error of each number: of those of the density by leaving out one probe after another (the jackknife,
    Efron & Stein 1981)."""
    names, count = ("numerical_rank", "effective_rank", "energy"), len(found.probes)
    errors = {"sharpness": 0.0, "trace": found.trace_error} | dict.fromkeys(names, math.nan if count == 1 else 0.0)
    if count > 1:
        others = [mean_density([*found.probes[:i], *found.probes[i + 1 :]]) for i in range(count)]
        each = torch.tensor([_of_density(other, found, high, epsilon) for other in others], dtype=torch.float64)
        spread = (each.var(0, unbiased=False) * (count - 1)).sqrt().tolist()
        errors |= zip(names, spread)
    return errors


def check_options(curvature: object, k: object, epsilon: float, methods: Sequence[SpectrumMethod]) -> None:
    """Raises TypeError or ValueError for what `landscape` cannot use."""
    if not isinstance(curvature, Curvature):
        hint = "Give a value such as Fisher()."
        if isinstance(curvature, type):
            hint = f"Did you mean {called(curvature)}?"
        raise TypeError(f"A landscape is that of a Curvature; got {curvature!r}. {hint}")
    if curvature.is_mended:
        raise TypeError(f"A landscape is that of the curvature as it is; got {curvature}. Use Hessian() or GGN().")
    if not is_count(k):
        raise ValueError(f"k must be an integer of at least 1; got {k!r}. It is how many eigenvectors are kept.")
    if not (is_number(epsilon) and 0 <= epsilon < 1):
        raise ValueError(f"epsilon must lie in [0, 1), relative to the largest eigenvalue; got {epsilon!r}. Try 0.01.")
    if not isinstance(methods, Sequence) or not all(isinstance(method, SpectrumMethod) for method in methods):
        raise TypeError(
            f"methods must be a sequence such as (WholeMatrix(), GramMatrix(), Lanczos()); got {methods!r}."
        )


@dataclass(frozen=True)
class Alignment:
    """Which part of a vector s lies in the span of orthonormal rows V, and which outside: inside = ‖V s‖ / ‖s‖ and
    leakage = ‖s − Vᵀ(V s)‖ / ‖s‖, with inside² + leakage² = 1. Both are NaN for s = 0.
    """

    inside: float
    leakage: float


@takes(vector=(Tensor, "a step [P]"), rows=(Tensor, "eigenvectors [k, P]"))
@in_own_precision
def alignment(vector: Float[Tensor, "P"], rows: Float[Tensor, "k P"]) -> Alignment:
    """Which part of a vector lies in the span of orthonormal rows, and which outside.

    >>> found = alignment(torch.tensor([3.0, 4.0, 0.0]), torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    >>> round(found.inside, 6), round(found.leakage, 6)
    (0.6, 0.8)
    """
    length = float(vector.double().norm())
    if not length > 0:
        return Alignment(math.nan, math.nan)
    inside = rows @ vector
    rest = vector - inside @ rows
    return Alignment(float(inside.double().norm()) / length, float(rest.double().norm()) / length)


@in_own_precision
def overlap(old: Float[Tensor, "k P"], new: Float[Tensor, "l P"]) -> float:
    """How much the spans of two sets of orthonormal rows have in common, ‖V_old V_newᵀ‖_F² / max(k, l): 1 for the same
    span, 0 for orthogonal ones, and k / P on average for random ones of k rows. NaN where there are no rows.

    >>> overlap(torch.eye(4)[:2], torch.eye(4)[1:3])
    0.5
    """
    most = max(len(old), len(new))
    return float((old @ new.T).double().square().sum()) / most if most else math.nan


@dataclass(frozen=True)
class CurvatureDrift:
    """How the curvature of the same examples has changed: tr C_now / tr C_then (NaN where that was 0), and the overlap
    ‖V_then V_nowᵀ‖_F² / k of their top subspaces."""

    trace_ratio: float
    overlap: float


@takes(then=(Landscape, "landscape(GGN(), risk)"), now=(Landscape, "landscape(GGN(), risk)"))
def curvature_drift(then: Landscape, now: Landscape) -> CurvatureDrift:
    """How the curvature has changed from one landscape to a later one of the same examples. Parameters that only one of
    them has count as zero in the other."""
    space = then.space.union(now.space)
    rows = (one.top[1] if one.space == space else space.embedded(one.top[1], one.space) for one in (then, now))
    return CurvatureDrift(now.trace / then.trace if then.trace else math.nan, overlap(*rows))
