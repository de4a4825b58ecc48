"""The shape of the loss around a model: its sharpness, trace, ranks and spectral density."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from avalanche_curv.core.curvature.base import Curvature
from avalanche_curv.core.curvature.hessian import Hessian
from avalanche_curv.core.eigen import Pairs
from avalanche_curv.core.landscape.averaged import AveragedCurvature
from avalanche_curv.core.landscape.exact import GramMatrix, WholeMatrix
from avalanche_curv.core.landscape.lanczos import Lanczos
from avalanche_curv.core.landscape.spectrum import Density, Spectrum, SpectrumMethod
from avalanche_curv.core.options import is_count, is_number
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.parameters import ParameterSpace

WAYS: tuple[SpectrumMethod, ...] = (WholeMatrix(), GramMatrix(), Lanczos())


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

    `ways` says of each quantity how it was computed, `exact` whether all are exact up to rounding.
    """

    sharpness: float
    trace: float
    numerical_rank: float
    effective_rank: float
    energy: float
    density: Density = field(repr=False)
    top: Pairs = field(repr=False)
    exact: bool
    ways: Mapping[str, str] = field(repr=False)
    space: ParameterSpace = field(repr=False)
    examples: int

    def numbers(self) -> dict[str, float]:
        """The scalars by name, with `exact` as 1.0 or 0.0."""
        names = ("sharpness", "trace", "numerical_rank", "effective_rank", "energy", "exact")
        return {name: float(getattr(self, name)) for name in names}


def landscape(
    curvature: Curvature,
    *risks: EmpiricalRisk,
    k: int = 10,
    epsilon: float = 1e-2,
    ways: Sequence[SpectrumMethod] = WAYS,
) -> Landscape:
    """The landscape of the mean loss over all examples of one risk, or of several at the same parameters.

    The first of `ways` that applies is taken: the whole matrix up to 1,500 parameters, the Gram matrix of up to 3,000
    rows, and products only beyond that. `Landscape.ways` says which, and `ways=(Lanczos(probes=8),)` chooses one.

    Raises TypeError for a curvature that is none or is mended (`Hessian(psd=...)`), ValueError for risks of several
    models, a k or ε out of range, or where none of the ways applies, and NonFiniteCurvatureError for NaN or infinity.

    >>> from avalanche_curv import GGN
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> model = nn.Linear(2, 1, bias=False)
    >>> risk = EmpiricalRisk.snapshot(model, nn.MSELoss(), [(x, torch.zeros(2, 1))])
    >>> found = landscape(GGN(), risk, k=1)   # 2 XᵀX / N = diag(1, 4)
    >>> found.sharpness, found.trace, found.numerical_rank, round(found.energy, 3), found.ways["trace"]
    (4.0, 5.0, 2.0, 0.8, 'eigendecomposition of all 2 rows')
    """
    check_options(curvature, k, epsilon, ways)
    averaged = AveragedCurvature.of(curvature, risks)
    for value in (averaged.like, *(risk.one_output for risk in averaged.functions)):
        averaged.checked(value)
    for way in ways:
        found = way.spectrum(averaged, k)
        if found is not None:
            return _landscape(found, averaged, epsilon)
    raise ValueError(
        f"None of the ways {ways} applies to {curvature} of {averaged.examples} examples and {averaged.space.size:,} "
        "parameters. Raise their limits, or add Lanczos(), which always does."
    )


def moved(risks: Sequence[EmpiricalRisk], model: nn.Module) -> list[EmpiricalRisk]:
    """Risks of one frozen model at the parameters that `model` has now: the same past functions, buffers and heads
    included. Parameters that came later do not count, and grown ones are cut (see `ParameterSpace.tensors`)."""
    if not risks:
        return []
    base = copy.deepcopy(risks[0].base)
    own = (parameter for parameter in base.parameters() if parameter.requires_grad)
    with torch.no_grad():
        for parameter, value in zip(own, risks[0].space.tensors(model)):
            parameter.copy_(value)
    return [replace(risk, base=base) for risk in risks]


def _landscape(found: Spectrum, averaged: AveragedCurvature, epsilon: float) -> Landscape:
    high = float(found.top[0].double().abs().sum())
    return Landscape(
        sharpness=found.sharpness,
        trace=found.trace,
        numerical_rank=found.density.count_above(epsilon * found.sharpness),
        effective_rank=found.density.effective_rank(),
        energy=high / found.magnitude if found.magnitude > 0 else math.nan,
        density=found.density,
        top=found.top,
        exact=found.exact,
        ways=found.ways,
        space=averaged.space,
        examples=averaged.examples,
    )


def check_options(curvature: object, k: object, epsilon: float, ways: Sequence[SpectrumMethod]) -> None:
    """Raises TypeError or ValueError for what `landscape` cannot use."""
    if not isinstance(curvature, Curvature):
        hint = f"Call it: {curvature.__name__}()." if isinstance(curvature, type) else "Give a value such as Fisher()."
        raise TypeError(f"A landscape is that of a Curvature; got {curvature!r}. {hint}")
    if isinstance(curvature, Hessian) and curvature.psd is not None:
        raise TypeError(f"A landscape is that of the curvature as it is; got {curvature}. Use Hessian() or GGN().")
    if not is_count(k):
        raise ValueError(f"k must be an integer of at least 1; got {k!r}. It is how many eigenvectors are kept.")
    if not (is_number(epsilon) and 0 <= epsilon < 1):
        raise ValueError(f"epsilon must lie in [0, 1), relative to the largest eigenvalue; got {epsilon!r}. Try 0.01.")
    if not isinstance(ways, Sequence) or not all(isinstance(way, SpectrumMethod) for way in ways):
        raise TypeError(f"ways must be a sequence such as (WholeMatrix(), GramMatrix(), Lanczos()); got {ways!r}.")
