"""The diagonal of the curvature matrix."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from avalanche_curv.core.curvature.base import OutputCurvature
from avalanche_curv.core.curvature.empirical_fisher import BatchedEmpiricalFisher
from avalanche_curv.core.curvature.ggn import GGN
from avalanche_curv.core.curvature.hessian import Hessian
from avalanche_curv.core.curvature.operators import Operator
from avalanche_curv.core.curvature.second_derivatives import is_differentiated_twice
from avalanche_curv.core.eigen import Pairs, inverted
from avalanche_curv.core.per_example.layers import Layers, by_layers, linear_layers
from avalanche_curv.core.per_example.passes import layer_passes
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.forward import as_matrix
from avalanche_curv.core.risk.known import PIECEWISE_LINEAR, is_altered, is_plain
from avalanche_curv.core.risk.parameters import ParameterSpace
from avalanche_curv.core.structures.base import Matrix, Structure, identity_columns, other_options
from avalanche_curv.core.structures.rules import by_products, rule


@dataclass(frozen=True)
class Diagonal(Structure):
    """The exact diagonal: P numbers, every interaction of two parameters dropped (Kirkpatrick et al. 2017)."""

    is_mean = True
    is_linear = True

    def from_operator(self, operator: Operator, risk: EmpiricalRisk) -> DiagonalMatrix:
        parts = [
            operator.matmat(columns)[start : start + columns.shape[1]].diagonal()
            for start, columns in identity_columns(operator.size, risk.anchor)
        ]
        return DiagonalMatrix(torch.cat(parts))

    def bytes(self, space: ParameterSpace, itemsize: int) -> int:
        return space.size * itemsize

    def check(self, space: ParameterSpace, itemsize: int) -> None:
        """A diagonal is as large as the model: nothing to refuse."""

    def differs_from(self, matrix: Matrix) -> str | None:
        return other_options(matrix, DiagonalMatrix)


@dataclass(frozen=True)
class DiagonalMatrix(Matrix):
    """C = diag(values). Sums are exact."""

    values: Float[Tensor, "P"]

    is_decomposed = True

    @property
    def size(self) -> int:
        return len(self.values)

    def product(self, vector: Tensor) -> Tensor:
        return self.values * vector

    def products(self, vector: Tensor, space: ParameterSpace) -> list[Tensor]:
        return [values * part for values, part in zip(space.split(self.values), space.split(vector))]

    def plus(self, other: Matrix) -> DiagonalMatrix:
        if not isinstance(other, DiagonalMatrix):
            raise TypeError(f"A diagonal can be added to a diagonal only; got {type(other).__name__}.")
        return DiagonalMatrix(self.values + other.values)

    def scaled(self, factor: float) -> DiagonalMatrix:
        return DiagonalMatrix(self.values * factor)

    def embedded(self, inner: ParameterSpace, outer: ParameterSpace) -> DiagonalMatrix:
        return DiagonalMatrix(outer.embedded(self.values, inner))

    def grown(self, inner: ParameterSpace, outer: ParameterSpace, outputs: tuple[str, ...]) -> DiagonalMatrix:
        values, rows, known = self.embedded(inner, outer).values, outer.rows(outputs), len(inner.rows(outputs))
        values[rows[known:]] = values[rows[:known]].mean(0)
        return DiagonalMatrix(values)

    def map_spectrum(self, function: Callable[[Tensor], Tensor]) -> DiagonalMatrix:
        return DiagonalMatrix(function(self.values))

    def largest(self) -> float:
        return float(self.values.max())

    def pseudo_inverse(self, rounding: float) -> DiagonalMatrix:
        """1 / C_ii, and 0 where C_ii = 0: however small an entry is, its own rounding is smaller."""
        return DiagonalMatrix(inverted(self.values))

    def relative_to(self, past: Matrix, rounding: float) -> Tensor | None:
        """H_ii / C_ii where C_ii > 0, however small: as for the pseudo-inverse."""
        if not isinstance(past, DiagonalMatrix):
            return None
        seen = past.values > 0
        return self.values[seen].double() / past.values[seen].double()

    def eigenvectors_beside_diagonal(self) -> tuple[Pairs, Tensor]:
        return (self.values.new_zeros(0), self.values.new_zeros(0, self.size)), self.values

    def damped(self, tau: float) -> DiagonalMatrix:
        return DiagonalMatrix(self.values + tau)

    def dense(self) -> Tensor:
        return self.values.diag()

    def trace(self) -> float:
        return float(self.values.sum())

    def top(self, count: int) -> Pairs:
        order = self.values.abs().argsort(descending=True)[:count]
        vectors = self.values.new_zeros(len(order), self.size)
        vectors[torch.arange(len(order)), order] = 1
        return self.values[order], vectors

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,)


@rule(OutputCurvature, Diagonal)
def diagonal_of_squares(curvature: OutputCurvature, structure: Structure, risk: EmpiricalRisk) -> DiagonalMatrix:
    """Σ_i Σ_r (J_iᵀ s_ir)² / N over examples i and columns r of S."""
    return by_layers(risk, lambda layers: _squares(curvature, layers, risk))


def _squares(curvature: OutputCurvature, layers: Layers, risk: EmpiricalRisk) -> DiagonalMatrix:
    total = torch.zeros_like(risk.anchor)
    views = dict(zip(risk.space.names, risk.space.split(total)))
    for piece in layer_passes(curvature, layers, risk):
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
    for row in curvature.rows(risk):
        total += row.square().sum(0)
    return DiagonalMatrix(total)


@rule(Hessian, Diagonal)
def diagonal_of_hessian(curvature: Hessian, structure: Diagonal, risk: EmpiricalRisk) -> Matrix:
    """The diagonal of the GGN on chains of linear and piecewise linear layers, unit by unit on other chains with all
    parameters in linear layers, by products elsewhere.

    In the first each output is piecewise linear in any single weight while the others are held, so that the model
    curvature Σ_c (∂ℓ/∂f_c) ∂²f_c/∂w² of the Hessian's diagonal is zero; off the diagonal it is not.
    """
    if is_plain(risk.model, PIECEWISE_LINEAR) and linear_layers(risk) is not None:
        return diagonal_of_squares(GGN(), structure, risk)
    by_units = diagonal_by_units(risk) if is_differentiated_twice(risk) else None
    return by_products(curvature, structure, risk) if by_units is None else by_units


def add_squares_of_rows(
    views: dict[str, Tensor], curvature: OutputCurvature, risk: EmpiricalRisk, names: Collection[str]
) -> None:
    """Adds the squares of per-example rows to the views of some parameters."""
    if not names:
        return
    sizes = [views[name].numel() for name in names]
    for part in curvature.rows(risk, names):
        for name, squares in zip(names, part.square_().sum(0).split(sizes)):
            views[name] += squares.view_as(views[name])


CHUNK = 1000  # examples at once


def diagonal_by_units(risk: EmpiricalRisk) -> DiagonalMatrix | None:
    """(1/N) Σ_i of the second derivatives of ℓ_i in each weight and bias of an `nn.Sequential` whose parameters all lie
    in linear layers on vectors; None for any other model.

    Such a layer z = W x + b meets the loss of an example through z alone and linearly, so that
    ∂²ℓ/∂W_ij² = x_j² ∂²ℓ/∂z_i² and ∂²ℓ/∂b_i² = ∂²ℓ/∂z_i². That takes one backward pass for each unit, through what
    follows it, where products of the Hessian take one for each weight.
    """
    chain = _chain(risk)
    if chain is None:
        return None
    total = torch.zeros_like(risk.anchor)
    views = dict(zip(risk.space.names, risk.space.split(total)))
    for x, y in risk.rebatched(CHUNK):
        for name, inputs, curved in _layers(chain, risk, x, y):
            parts = {f"{name}.weight": curved.T @ inputs.square(), f"{name}.bias": curved.sum(0)}
            for parameter, part in parts.items():
                if parameter in views:
                    views[parameter] += part
    return DiagonalMatrix(total / risk.examples)


def _chain(risk: EmpiricalRisk) -> nn.Sequential | None:
    """The model, if it is such a chain and each of its weights is used once."""
    model = risk.model
    if type(model) is not nn.Sequential or any(map(is_altered, model.modules())):
        return None
    owners = [module for module in model for _ in module.parameters()]
    if len(owners) > len([*model.parameters()]) or not all(type(module) is nn.Linear for module in owners):
        return None
    signal, _ = next(iter(risk))
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.Linear) and signal.ndim != 2:
                return None
            signal = module(signal[:1])
    return model


def _layers(chain: nn.Sequential, risk: EmpiricalRisk, x: Tensor, y: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """For each linear layer its name, its inputs [N, in] and ∂²ℓ_i/∂z_i² [N, out]."""
    signal = x
    for place, module in enumerate(chain):
        with torch.no_grad():
            inputs, signal = signal, module(signal)
        if isinstance(module, nn.Linear):
            yield str(place), inputs, unmixed(_following(chain[place + 1 :], risk, y), signal)


def _following(rest: nn.Module, risk: EmpiricalRisk, y: Tensor) -> Callable[[Tensor], Tensor]:
    """The losses of examples from what enters the rest of the chain."""
    return lambda signal: risk.loss.per_example(as_matrix(rest(signal)), y)


@torch.enable_grad()
def unmixed(function: Callable[[Tensor], Tensor], places: Float[Tensor, "N n"]) -> Float[Tensor, "N n"]:
    """∂²f_i/∂z_ij² of a function that treats each row z_i by itself.

    >>> unmixed(lambda z: z.pow(3).sum(1), torch.tensor([[1.0, 2.0]]))
    tensor([[ 6., 12.]])
    """
    places = places.detach().requires_grad_()
    (slope,) = torch.autograd.grad(function(places).sum(), places, create_graph=True)
    columns = [
        torch.autograd.grad(part.sum(), places, retain_graph=True)[0][:, unit]
        for unit, part in enumerate(slope.unbind(1))
    ]
    return torch.stack(columns, dim=1)
