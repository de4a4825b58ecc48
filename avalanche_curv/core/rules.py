"""Shortcuts for pairs of curvature and structure: each equals the way through operator products."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from avalanche_curv.core.curvature import GGN, BatchedEmpiricalFisher, Hessian, OutputCurvature
from avalanche_curv.core.estimate import by_products, rule
from avalanche_curv.core.examples import curvature_rows
from avalanche_curv.core.layers import LinearLayers
from avalanche_curv.core.risk import EmpiricalRisk
from avalanche_curv.core.structures import (
    BlockDiagonal,
    BlockDiagonalMatrix,
    Dense,
    DenseMatrix,
    Diagonal,
    DiagonalMatrix,
    Matrix,
    Structure,
)

Rows = Iterable[Float[Tensor, "n P"]]

CHUNK = 512  # examples that go through the model at once


@rule(OutputCurvature, Dense)
def dense_from_rows(curvature: OutputCurvature, structure: Structure, risk: EmpiricalRisk) -> DenseMatrix:
    """Σ GᵀG over per-example rows."""
    return _dense(curvature_rows(curvature, risk), risk)


@rule(OutputCurvature, BlockDiagonal)
def blocks_from_rows(curvature: OutputCurvature, structure: Structure, risk: EmpiricalRisk) -> BlockDiagonalMatrix:
    """Σ GᵀG within each parameter."""
    return _blocks(curvature_rows(curvature, risk), risk)


@rule(OutputCurvature, Diagonal)
def diagonal_of_outer_products(
    curvature: OutputCurvature, structure: Structure, risk: EmpiricalRisk
) -> DiagonalMatrix:
    """(B²)ᵀA² in linear layers, summed over the columns of S; squares of per-example rows for any other model."""
    layers = LinearLayers.of(risk)
    if layers is None:
        return _diagonal(curvature_rows(curvature, risk), risk)
    return DiagonalMatrix(_diagonal_of_layers(curvature, risk, layers))


@rule(Hessian, Diagonal)
def diagonal_of_hessian(curvature: Hessian, structure: Diagonal, risk: EmpiricalRisk) -> Matrix:
    """The diagonal of the GGN on chains of linear and piecewise linear layers, by products elsewhere.

    There each output is piecewise linear in any single weight while the others are held, so that the model curvature
    Σ_c (∂ℓ/∂f_c) ∂²f_c/∂w² of the Hessian's diagonal is zero; off the diagonal it is not.
    """
    if _is_piecewise_linear_chain(risk.model) and LinearLayers.of(risk) is not None:
        return diagonal_of_outer_products(GGN(), structure, risk)
    return by_products(curvature, structure, risk)


@rule(BatchedEmpiricalFisher, Dense)
def dense_of_batches(curvature: BatchedEmpiricalFisher, structure: Structure, risk: EmpiricalRisk) -> DenseMatrix:
    """GᵀG of the mini-batch gradients."""
    return _dense(curvature.gradients(risk), risk)


@rule(BatchedEmpiricalFisher, BlockDiagonal)
def blocks_of_batches(
    curvature: BatchedEmpiricalFisher, structure: Structure, risk: EmpiricalRisk
) -> BlockDiagonalMatrix:
    """GᵀG of the mini-batch gradients within each parameter."""
    return _blocks(curvature.gradients(risk), risk)


@rule(BatchedEmpiricalFisher, Diagonal)
def diagonal_of_batches(curvature: BatchedEmpiricalFisher, structure: Structure, risk: EmpiricalRisk) -> DiagonalMatrix:
    """Squares of the mini-batch gradients."""
    return _diagonal(curvature.gradients(risk), risk)


PIECEWISE_LINEAR = (nn.Linear, nn.ReLU, nn.LeakyReLU, nn.Hardtanh, nn.ReLU6, nn.Identity, nn.Flatten, nn.Dropout)


def _is_piecewise_linear_chain(model: nn.Module) -> bool:
    """Whether the model is known to be a composition of such layers: nested `nn.Sequential`s of them."""
    if type(model) is nn.Sequential:
        return all(_is_piecewise_linear_chain(part) for part in model)
    return type(model) in PIECEWISE_LINEAR


def _dense(rows: Rows, risk: EmpiricalRisk) -> DenseMatrix:
    total = risk.anchor.new_zeros(risk.space.size, risk.space.size)
    for part in rows:
        total.addmm_(part.T, part)
    return DenseMatrix(total)


def _blocks(rows: Rows, risk: EmpiricalRisk) -> BlockDiagonalMatrix:
    totals = [risk.anchor.new_zeros(size, size) for size in risk.space.sizes]
    for part in rows:
        for total, block in zip(totals, part.split(risk.space.sizes, dim=1)):
            total.addmm_(block.T, block)
    return BlockDiagonalMatrix(tuple(totals))


def _diagonal(rows: Rows, risk: EmpiricalRisk) -> DiagonalMatrix:
    total = torch.zeros_like(risk.anchor)
    for part in rows:
        total += part.square().sum(0)
    return DiagonalMatrix(total)


def _diagonal_of_layers(
    curvature: OutputCurvature, risk: EmpiricalRisk, layers: LinearLayers
) -> Float[Tensor, "P"]:
    total = torch.zeros_like(risk.anchor)
    views = dict(zip(risk.space.names, risk.space.split(total)))
    generator = curvature.generator()
    for x, y in risk.rebatched(CHUNK):
        with torch.enable_grad(), layers.tapped() as taps:
            outputs = risk.outputs(x)
        factor = curvature.factor(risk.loss, outputs.detach(), y, generator)
        for tap, squares in zip(taps, _squared_sensitivities(outputs, [tap.outputs for tap in taps], factor)):
            for name, part in layers.squared_parts(tap, squares).items():
                views[name] += part
    return total / risk.examples


def _squared_sensitivities(
    outputs: Float[Tensor, "N C"], taps: list[Tensor], factor: Float[Tensor, "N C R"]
) -> list[Tensor]:
    """Σ_r (∂ Σ_i s_irᵀ f_i / ∂Z)² for each tap Z."""
    totals = [torch.zeros_like(tap) for tap in taps]
    for column in factor.unbind(2):
        parts = torch.autograd.grad(
            outputs, taps, column, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for total, part in zip(totals, parts):
            total.addcmul_(part, part)
    return totals
