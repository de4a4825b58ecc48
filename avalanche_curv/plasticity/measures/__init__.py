"""Measures of the plasticity of a network, on its weights, its hidden activations and its per-example gradients."""

from avalanche_curv.plasticity.measures.gradients import GradientDiversity, gradient_diversity
from avalanche_curv.plasticity.measures.representation import (
    Representation,
    dormancy_scores,
    hidden_activations,
    representation_change,
    representations,
)
from avalanche_curv.plasticity.measures.singular_values import (
    condition_number,
    effective_rank,
    singular_values,
    singular_values_of_gram,
    stable_rank,
)
from avalanche_curv.plasticity.measures.weights import WeightSpectrum, parameter_norm, weight_spectra

__all__ = [
    "GradientDiversity",
    "Representation",
    "WeightSpectrum",
    "condition_number",
    "dormancy_scores",
    "effective_rank",
    "gradient_diversity",
    "hidden_activations",
    "parameter_norm",
    "representation_change",
    "representations",
    "singular_values",
    "singular_values_of_gram",
    "stable_rank",
    "weight_spectra",
]
