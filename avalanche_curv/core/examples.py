"""Per-example derivatives for any model, a chunk of examples at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp, vmap

from avalanche_curv.core.curvature import OutputCurvature
from avalanche_curv.core.risk import EmpiricalRisk

CHUNK_BYTES = 128 * 2**20

Parameters = dict[str, Tensor]


def outputs_of(risk: EmpiricalRisk) -> Callable[[Parameters, Tensor], Float[Tensor, "N C"]]:
    """(parameters, inputs) ↦ outputs, for the frozen past function at any parameters of its shapes."""

    def outputs(parameters: Parameters, inputs: Tensor) -> Tensor:
        return risk.outputs_at(list(parameters.values()), inputs)

    return outputs


def parameters_of(risk: EmpiricalRisk, vector: Float[Tensor, "P"] | None = None) -> Parameters:
    """The named parameters to call `outputs_of` with: those at the anchor, or `vector` in their shapes."""
    return dict(zip(risk.space.names, risk.space.split(risk.anchor if vector is None else vector)))


def pulled_back(
    risk: EmpiricalRisk, parameters: Parameters, inputs: Tensor, cotangents: Float[Tensor, "N C R"]
) -> Float[Tensor, "N R P"]:
    """J_iᵀ S_i for each example i, with J_i the Jacobian of the outputs at `parameters`."""
    outputs = outputs_of(risk)

    def one(x: Tensor, s: Float[Tensor, "C R"]) -> Parameters:
        pull: Any = vjp(lambda p: outputs(p, x[None])[0], parameters)[1]
        return vmap(lambda column: pull(column)[0], in_dims=1)(s)

    parts = vmap(one)(inputs, cotangents)
    return torch.cat([part.reshape(*part.shape[:2], -1) for part in parts.values()], dim=2)


def curvature_rows(curvature: OutputCurvature, risk: EmpiricalRisk) -> Iterator[Float[Tensor, "n P"]]:
    """Rows G, chunk after chunk, with Σ GᵀG the curvature of the mean: J_iᵀ S_i / √N."""
    parameters, generator = parameters_of(risk), curvature.generator()
    with torch.no_grad():
        for x, y in risk:
            factor = curvature.factor(risk.loss, risk.outputs(x), y, generator) / risk.examples**0.5
            size = chunk_size(risk, factor.shape[2])
            for part_x, part_factor in zip(x.split(size), factor.split(size)):
                yield pulled_back(risk, parameters, part_x, part_factor).flatten(0, 1)


def chunk_size(risk: EmpiricalRisk, rows_an_example: int) -> int:
    """How many examples may hold `rows_an_example` vectors of size P each at once."""
    return max(1, CHUNK_BYTES // (rows_an_example * risk.space.size * risk.anchor.element_size()))
