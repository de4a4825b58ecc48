"""Exact diagonals: per-example squares layer by layer, and row by row for parameters that no layer explains."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from avalanche_curv.core.curvature import GGN, BatchedEmpiricalFisher, Hessian, OutputCurvature
from avalanche_curv.core.estimate import by_products, rule
from avalanche_curv.core.examples import curvature_rows
from avalanche_curv.core.layers import Layers, linear_layers
from avalanche_curv.core.pieces import pieces
from avalanche_curv.core.risk import EmpiricalRisk
from avalanche_curv.core.rules.chain_hessian import diagonal_by_units
from avalanche_curv.core.structures import Diagonal, DiagonalMatrix, Matrix, Structure


@rule(OutputCurvature, Diagonal)
def diagonal_of_squares(curvature: OutputCurvature, structure: Structure, risk: EmpiricalRisk) -> DiagonalMatrix:
    """Σ_i Σ_r (J_iᵀ s_ir)² / N over examples i and columns r of S."""
    layers = Layers.of(risk)
    total = torch.zeros_like(risk.anchor)
    views = dict(zip(risk.space.names, risk.space.split(total)))
    for piece in pieces(curvature, layers, risk):
        for columns in piece.columns:
            for tap, of_tap in zip(piece.taps, zip(*columns)):
                for name, part in layers.squares(tap, of_tap, piece.examples).items():
                    views[name] += part.view_as(views[name])
    total /= risk.examples
    add_squares_of_rows(views, curvature, risk, layers.rest)
    return DiagonalMatrix(total)


@rule(BatchedEmpiricalFisher, Diagonal)
def diagonal_of_batches(curvature: BatchedEmpiricalFisher, structure: Structure, risk: EmpiricalRisk) -> DiagonalMatrix:
    """Squares of the mini-batch gradients."""
    total = torch.zeros_like(risk.anchor)
    for row in curvature.gradients(risk):
        total += row.square().sum(0)
    return DiagonalMatrix(total)


PIECEWISE_LINEAR = (nn.Linear, nn.ReLU, nn.LeakyReLU, nn.Hardtanh, nn.ReLU6, nn.Identity, nn.Flatten, nn.Dropout)


@rule(Hessian, Diagonal)
def diagonal_of_hessian(curvature: Hessian, structure: Diagonal, risk: EmpiricalRisk) -> Matrix:
    """The diagonal of the GGN on chains of linear and piecewise linear layers, unit by unit on other chains with all
    parameters in linear layers, by products elsewhere.

    In the first each output is piecewise linear in any single weight while the others are held, so that the model
    curvature Σ_c (∂ℓ/∂f_c) ∂²f_c/∂w² of the Hessian's diagonal is zero; off the diagonal it is not.
    """
    if _is_piecewise_linear_chain(risk.model) and linear_layers(risk) is not None:
        return diagonal_of_squares(GGN(), structure, risk)
    by_units = diagonal_by_units(risk)
    return by_products(curvature, structure, risk) if by_units is None else by_units


def add_squares_of_rows(
    views: dict[str, Tensor], curvature: OutputCurvature, risk: EmpiricalRisk, names: Collection[str]
) -> None:
    """Adds the squares of per-example rows to the views of some parameters."""
    if not names:
        return
    sizes = [views[name].numel() for name in names]
    for part in curvature_rows(curvature, risk, names):
        for name, squares in zip(names, part.square_().sum(0).split(sizes)):
            views[name] += squares.view_as(views[name])


def _is_piecewise_linear_chain(model: nn.Module) -> bool:
    """Whether the model is known to be a composition of such layers: nested `nn.Sequential`s of them."""
    if type(model) is nn.Sequential:
        return all(_is_piecewise_linear_chain(part) for part in model)
    return type(model) in PIECEWISE_LINEAR
