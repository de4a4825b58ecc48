"""The diversity of the gradients of single examples: how many directions they span."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.arguments import takes
from avalanche_curv.core.curvature.empirical_fisher import EmpiricalFisher
from avalanche_curv.core.per_example.gram import rows_of
from avalanche_curv.core.per_example.layers import Layers, by_layers
from avalanche_curv.core.precision import in_own_precision
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.plasticity.measures.singular_values import condition_number, effective_rank, singular_values_of_gram

ROW_BYTES = 256 * 2**20  # of explicit gradients in memory at once


@dataclass(frozen=True)
class GradientDiversity:
    """Effective rank and condition number of the matrix G = [g_1 ... g_m] of the gradients g_i = ∇_θ ℓ_i of m examples,
    from its singular values σ_i:

    - effective_rank = exp(−Σ p_i log p_i), p_i = σ_i / Σ_j σ_j: m for orthogonal gradients of one length, 1 for
      collinear ones (Lewandowski et al. 2024, section 3.3, whose formula lacks the exponential and the sign);
    - condition_number = σ_1 / σ_m: infinite where gradients are linearly dependent, or appear so in GᵀG in float64:
      from (m ε)^−½ on, ε = 2.2e-16, which is 6e6 for 128 examples.
    """

    effective_rank: float
    condition_number: float
    examples: int


@takes(risk=(EmpiricalRisk, "EmpiricalRisk.snapshot(model, criterion, batches)"))
@in_own_precision
def gradient_diversity(risk: EmpiricalRisk) -> GradientDiversity:
    """The effective gradient diversity of the examples of `risk` at its frozen parameters, over the whole network.

    From the eigenvalues σ² of the m × m Gram matrix GᵀG, summed in float64 from one forward and backward pass. For
    linear layers on matrices G is never formed; for others it is formed in parts of some parameters, with one pass over
    the data for each part of 256 MiB. Both numbers are NaN where a gradient is not finite. Raises TypeError for a loss
    without per-example form.
    """
    values = singular_values_of_gram(gradient_gram(risk))
    return GradientDiversity(effective_rank(values), condition_number(values), len(values))


@in_own_precision
def gradient_gram(risk: EmpiricalRisk) -> Float[Tensor, "m m"]:
    """The Gram matrix with entries (1/m) g_iᵀg_j in float64, of the gradients at the observed targets."""
    return by_layers(risk, lambda layers: _gram(layers, risk))


def _gram(layers: Layers, risk: EmpiricalRisk) -> Float[Tensor, "m m"]:
    total = torch.zeros(risk.examples, risk.examples, dtype=torch.float64, device=risk.anchor.device)
    for part in _parts(layers, risk):
        for rows in rows_of(EmpiricalFisher(), risk, part):
            total += rows.gram_in_float64()
    return total


def _parts(layers: Layers, risk: EmpiricalRisk) -> Iterator[Layers]:
    """The layers in parts whose explicit gradients fit in `ROW_BYTES`, or belong to one layer."""
    sizes = dict(zip(risk.space.names, risk.space.sizes))
    most = ROW_BYTES // (risk.examples * risk.anchor.element_size())
    alone = [replace(layers, names={layer: name}, rest=()) for layer, name in layers.names.items()]
    alone += [replace(layers, names={}, rest=(name,)) for name in layers.rest]
    size, part = 0, replace(layers, names={}, rest=())
    for one in alone:
        formed = [name for layer in one.names if layer not in layers.flat for name in layers.trainable(layer)]
        more = sum(sizes[name] for name in (*formed, *one.rest))
        if size and size + more > most:
            yield part
            size, part = 0, replace(layers, names={}, rest=())
        size, part = size + more, replace(part, names=part.names | one.names, rest=part.rest + one.rest)
    yield part
