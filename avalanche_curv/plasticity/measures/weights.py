"""Norms, ranks and condition numbers of the weights of a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from avalanche_curv.core.arguments import takes
from avalanche_curv.plasticity.measures.singular_values import (
    condition_number,
    effective_rank,
    singular_values,
    stable_rank,
)
from avalanche_curv.plasticity.roles import weight_matrices


@dataclass(frozen=True)
class WeightSpectrum:
    """Norms, ranks and condition number of one weight W with singular values σ_1 ≥ ... ≥ σ_n, n = min(d_out, d_in):

    - spectral_norm = σ_1;
    - frobenius_norm = ‖W‖_F = (Σ σ_i²)^½;
    - stable_rank = ‖W‖_F² / σ_1²;
    - effective_rank = exp(−Σ p_i log p_i), p_i = σ_i / Σ_j σ_j (Roy & Vetterli 2007);
    - condition_number = σ_1 / σ_n, up to 1e13 or so; infinite for a matrix that is singular to rounding in float64.

    A matrix of zeros has ranks 0. All are NaN for a matrix that is not finite.
    """

    spectral_norm: float
    frobenius_norm: float
    stable_rank: float
    effective_rank: float
    condition_number: float


@takes(model=(nn.Module, "the model that is trained"))
def weight_spectra(model: nn.Module) -> dict[str, WeightSpectrum]:
    """The spectrum of every weight, by name (see `plasticity.roles.weight_matrices`), from all its singular values.

    A kernel of a convolution counts as the matrix d_out × rest (a transposed one with its second axis first), whose
    norm bounds, and is not, that of the convolution; the queries, keys and values of attention count one by one.
    A weight without entries is left out. Raises ValueError for a model without any other weight.

    >>> weight_spectra(nn.Linear(2, 2))["weight"].stable_rank <= 2
    True
    """
    found = {name: matrix for name, matrix in weight_matrices(model).items() if matrix.numel()}
    if not found:
        raise ValueError(f"{type(model).__name__} has no weight that multiplies its input, so there is no spectrum.")
    spectra = {}
    for name, matrix in found.items():
        values = singular_values(matrix)
        spectra[name] = WeightSpectrum(
            spectral_norm=float(values.max()),
            frobenius_norm=float(values.double().square().sum().sqrt()),
            stable_rank=stable_rank(values),
            effective_rank=effective_rank(values),
            condition_number=condition_number(values),
        )
    return spectra


@takes(model=(nn.Module, "the model that is trained"))
def parameter_norm(model: nn.Module) -> float:
    """‖θ‖₂, the norm of all trainable parameters of `model`, those of norm layers included, each once; in float64.

    >>> layer = nn.Linear(1, 1)
    >>> _ = nn.init.constant_(layer.weight, 3), nn.init.constant_(layer.bias, 4)
    >>> parameter_norm(layer)
    5.0
    """
    trainable = (p.detach().double() for p in model.parameters() if p.requires_grad)
    return sum(float(p.square().sum()) for p in trainable) ** 0.5
