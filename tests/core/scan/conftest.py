"""One model against explicit loops: every kind and structure, fidelity, the landscape and projections, in float64.

What they are compared with uses plain reverse mode alone, one example after the other in a batch of its own, and
symmetric finite differences of that for second derivatives: no `vmap`, no `torch.func`, no double backward.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils.data import DataLoader, TensorDataset

from avalanche_curv.core import (
    EKFAC,
    GGN,
    BlockDiagonal,
    Clip,
    Curvature,
    Dense,
    Diagonal,
    Eigenspace,
    EmpiricalFisher,
    EmpiricalRisk,
    Energy,
    Fisher,
    GramMatrix,
    Hessian,
    InputSpace,
    Kronecker,
    Lanczos,
    LowRank,
    MatrixFree,
    Projector,
    ProtectedSpace,
    Rank,
    StepProjection,
    Structure,
    estimate,
    landscape,
)
from avalanche_curv.core.fidelity import PastModels

EXAMPLES, BATCH, CLASSES, PAIRS = 7, 4, 3, 2
STEP = 1e-5  # of finite differences: their error is near 1e-10
TOLERANCE, OF_DIFFERENCES = 1e-7, 3e-6  # relative to the largest entry
REMEDY = re.compile(
    r"\b(use|give|put|checkpoint|leave|let|replace|register|clone|call|freeze|exclude|train|set)\b", re.IGNORECASE
)


def cross_entropy(outputs: Tensor, target: Tensor) -> Tensor:
    return outputs.logsumexp(0) - outputs[target]


def mean_square(outputs: Tensor, target: Tensor) -> Tensor:
    return (outputs - target).square().mean()


LOSSES = {"cross entropy": (nn.CrossEntropyLoss(), cross_entropy), "squared error": (nn.MSELoss(), mean_square)}


@dataclass
class Loops:
    """Explicit derivatives of a model in eval mode on single examples."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.anchor = self.vector()

    def vector(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.parameters])

    def move(self, theta: Tensor) -> None:
        with torch.no_grad():
            for p, part in zip(self.parameters, theta.split([p.numel() for p in self.parameters])):
                p.copy_(part.view_as(p))

    def outputs(self, i: int) -> Tensor:
        return self.model(self.inputs[i : i + 1]).reshape(-1)

    def pulled(self, scalar: Tensor) -> Tensor:
        if not scalar.requires_grad:
            return torch.zeros_like(self.anchor)
        parts = torch.autograd.grad(scalar, self.parameters, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(self.parameters, parts)]
        return torch.cat([part.reshape(-1) for part in filled])

    def each(self, function: Callable[[int], Tensor], theta: Tensor | None = None) -> Tensor:
        """`function` of each example, at other parameters if these are given."""
        if theta is not None:
            self.move(theta)
        try:
            return torch.stack([function(i) for i in range(len(self.targets))])
        finally:
            if theta is not None:
                self.move(self.anchor)

    def losses(self, theta: Tensor | None = None) -> Tensor:
        return self.each(lambda i: self.loss(self.outputs(i), self.targets[i]).detach(), theta)

    def all_outputs(self, theta: Tensor | None = None) -> Tensor:
        return self.each(lambda i: self.outputs(i).detach(), theta)

    def gradients(self, theta: Tensor | None = None) -> Tensor:
        return self.each(lambda i: self.pulled(self.loss(self.outputs(i), self.targets[i])), theta)

    @cached_property
    def ggns(self) -> Tensor:
        """J_iᵀ (∇²_f ℓ_i) J_i, which is the Fisher for both losses."""

        def one(i: int) -> Tensor:
            outputs = self.outputs(i)
            rows = torch.stack([self.pulled(f) for f in outputs])
            return rows.T @ self.in_outputs(outputs.detach()) @ rows

        return self.each(one)

    def in_outputs(self, f: Tensor) -> Tensor:
        if self.loss is mean_square:
            return 2 / len(f) * torch.eye(len(f)).to(f)
        p = f.softmax(0)
        return p.diag() - torch.outer(p, p)

    @cached_property
    def empirical_fishers(self) -> Tensor:
        rows = self.gradients()
        return rows[:, :, None] * rows[:, None, :]

    @cached_property
    def hessians(self) -> Tensor:
        """The symmetric difference of the gradient along each parameter."""
        columns = []
        for shift in STEP * torch.eye(len(self.anchor)).to(self.anchor):
            columns.append((self.gradients(self.anchor + shift) - self.gradients(self.anchor - shift)) / (2 * STEP))
        found = torch.stack(columns, dim=2)
        trained = self.gradients().any(0)  # what never has a gradient, as a padding index, does not move
        return (found + found.mT) / 2 * trained * trained[:, None]


def shuffling(inputs: Tensor, targets: Tensor) -> DataLoader:
    """Batches in another order and of another composition at each pass."""
    draws = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(inputs, targets), BATCH, shuffle=True, generator=draws)


def distance(found: Tensor, expected: Tensor) -> float:
    """max |found − expected| relative to max |expected|; NaN in one of them alone is infinitely far."""
    if found.shape != expected.shape or not torch.equal(found.isnan(), expected.isnan()):
        return float("inf")
    size = float(expected.nan_to_num().abs().max()) if expected.numel() else 0.0
    return float((found - expected).nan_to_num().abs().max()) / max(size, 1e-6) if expected.numel() else 0.0


@dataclass
class Report:
    """What was wrong, and what was refused."""

    wrong: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def attempt(self, label: str, found: Callable[[], Tensor], expected: Tensor, tolerance: float) -> None:
        """Compares; TypeError and ValueError are refusals, every other error is wrong."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                far = distance(found(), expected)
        except (TypeError, ValueError) as error:
            if "can be factorised" in str(error):  # there is nothing to compare
                return
            self.refused.append(f"{label}: {error}")
            if type(error) not in (TypeError, ValueError) or not REMEDY.search(str(error)):
                self.wrong.append(f"{label}: refused without a remedy: {type(error).__name__}: {error}")
        except Exception as error:
            self.wrong.append(f"{label}: {type(error).__name__}: {str(error)[:200]}")
        else:
            if not far <= tolerance:
                self.wrong.append(f"{label}: off by {far:.2g} of the largest entry")


def top_of(matrix: Tensor) -> Tensor:
    """The part of a symmetric matrix in its few largest eigenvalues in magnitude."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = values.abs().argsort(descending=True)[:PAIRS]
    return (vectors[:, kept] * values[kept]) @ vectors[:, kept].T


def columns_for(matrix: Tensor) -> Tensor:
    """Two columns to multiply."""
    return torch.linspace(-1, 1, 2 * len(matrix)).to(matrix).view(-1, 2).cos()


def has_gap(matrix: Tensor) -> bool:
    """Whether the eigenvectors that `top_of` takes are determined."""
    values = torch.linalg.eigvalsh(matrix).abs().sort(descending=True).values
    return len(values) > PAIRS and bool(values[PAIRS - 1] > 1.001 * values[PAIRS] + 1e-6 * values[0])


@dataclass
class Scan:
    """All checks of one model with one loss."""

    make: Callable[[], nn.Module]
    reference: Callable[[], nn.Module]
    inputs: Tensor
    loss: str
    report: Report = field(default_factory=Report)

    def run(self) -> None:
        criterion, formula = LOSSES[self.loss]
        self.loops = Loops(self.reference().eval(), self.inputs, self._targets(), formula)
        self.criterion, self.targets = criterion, self.loops.targets
        batches = list(zip(self.inputs.split(BATCH), self.targets.split(BATCH)))
        self.attempt("snapshot", lambda: self.snapshot(batches).anchor, self.loops.anchor, 0.0)
        if self.report.refused or self.report.wrong:
            return
        self.risk, self.shuffled = self.snapshot(batches), self.snapshot(shuffling(self.inputs, self.targets))
        loops = self.loops
        if self.loss == "squared error":  # what does not depend on the loss was looked at with the other
            self.simple(GGN(), loops.ggns.mean(0), TOLERANCE)
            self.fidelity(GGN(), loops.ggns, TOLERANCE)
            return
        self.simple(Fisher(), loops.ggns.mean(0), TOLERANCE)
        for kind, each, tolerance in (
            (GGN(), loops.ggns, TOLERANCE),
            (EmpiricalFisher(), loops.empirical_fishers, TOLERANCE),
            (Hessian(), loops.hessians, OF_DIFFERENCES),
        ):
            self.simple(kind, each.mean(0), tolerance)
            self.operator(kind, each.mean(0), tolerance)
            if kind != EmpiricalFisher():  # whose rows the others treat as those of a GGN
                self.others(kind, each.mean(0), tolerance)
                self.fidelity(kind, each, tolerance)
                self.landscape(kind, each.mean(0), tolerance)
        self.mended(loops.hessians.mean(0))
        self.factors()
        self.projections()

    def _targets(self) -> Tensor:
        draws = torch.Generator().manual_seed(5)
        if self.loss == "cross entropy":
            return torch.randint(CLASSES, (EXAMPLES,), generator=draws)
        return torch.randn(EXAMPLES, CLASSES, generator=draws, dtype=torch.float64)

    def snapshot(self, batches: object) -> EmpiricalRisk:
        return EmpiricalRisk.snapshot(self.make().train(), self.criterion, batches)

    def attempt(self, label: str, found: Callable[[], Tensor], expected: Tensor, tolerance: float) -> None:
        self.report.attempt(f"{self.loss}: {label}", found, expected, tolerance)

    def estimated(
        self, kind: Curvature, structure: Structure, expected: Tensor, tolerance: float, shuffled: bool = False
    ) -> None:
        risk, label = (self.shuffled, " of many parameters") if shuffled else (self.risk, "")
        label = f"{kind} × {type(structure).__name__}{label}"
        self.attempt(label, lambda: estimate(kind, structure, risk).curvature.dense(), expected, tolerance)

    def blocks(self, matrix: Tensor) -> Tensor:
        ones = [torch.ones(p.numel(), p.numel()) for p in self.loops.parameters]
        return torch.where(torch.block_diag(*ones).bool(), matrix, 0.0)

    def simple(self, kind: Curvature, matrix: Tensor, tolerance: float) -> None:
        self.estimated(kind, Dense(), matrix, tolerance)
        self.estimated(kind, Diagonal(), matrix.diagonal().diag(), tolerance)

    def operator(self, kind: Curvature, matrix: Tensor, tolerance: float) -> None:
        columns = columns_for(matrix)
        products = lambda: kind.operator(self.risk).matmat(columns)  # noqa: E731
        self.attempt(f"{kind} as an operator", products, matrix @ columns, tolerance)

    def others(self, kind: Curvature, matrix: Tensor, tolerance: float) -> None:
        self.estimated(kind, BlockDiagonal(), self.blocks(matrix), tolerance)
        columns = columns_for(matrix)

        def free() -> Tensor:
            found = estimate(kind, MatrixFree(), self.risk).curvature
            return torch.stack([found.product(column) for column in columns.T], dim=1)

        self.attempt(f"{kind} × MatrixFree", free, matrix @ columns, tolerance)
        if has_gap(matrix):
            self.estimated(kind, LowRank(Rank(PAIRS)), top_of(matrix), 10 * tolerance)
            with patch("avalanche_curv.core.structures.low_rank.WHOLE", 0):
                self.estimated(kind, LowRank(Rank(PAIRS)), top_of(matrix), 1e-4, shuffled=True)

    def mended(self, matrix: Tensor) -> None:
        """The eigenvalues of a dense matrix or of each block, the entries of a diagonal, are clipped."""
        kind = Hessian(psd=Clip())
        for structure, part in (
            (Dense(), matrix), (BlockDiagonal(), self.blocks(matrix)), (Diagonal(), matrix.diagonal().diag())
        ):
            values, vectors = torch.linalg.eigh(part)
            clipped = (vectors * values.clamp_min(0)) @ vectors.T
            self.estimated(kind, structure, clipped, OF_DIFFERENCES)

    def fidelity(self, kind: Curvature, each: Tensor, tolerance: float) -> None:
        shift = 0.1 * torch.linspace(1, 7, len(self.loops.anchor)).to(self.loops.anchor).sin()
        there = self.loops.anchor + shift
        bends, slopes = each @ shift, self.loops.gradients()
        actual, true = self.loops.losses(there) - self.loops.losses(), self.loops.gradients(there)

        def measures() -> Tensor:
            moved = Loops(self.make(), self.inputs, self.targets, self.loops.loss)
            moved.move(there)
            past = PastModels(kind).with_experience(self.risk)
            (found,) = past.compare_one("accumulate", moved.model)
            return torch.stack([t for f in (found.quadratic, found.linear) for t in (f.kappa, f.gamma)])

        quadratic, linear = (bends @ shift) / 2, (bends @ shift) / 2 + slopes @ shift
        expected = torch.stack([
            actual - quadratic, (true - bends).norm(dim=1), actual - linear, (true - bends - slopes).norm(dim=1)
        ])
        self.attempt(f"{kind}: fidelity", measures, expected, 10 * tolerance)

    def landscape(self, kind: Curvature, matrix: Tensor, tolerance: float) -> None:
        values = torch.linalg.eigvalsh(matrix)
        expected = torch.stack([values.max(), values.sum()])

        def numbers(risk: EmpiricalRisk, **options: Any) -> Tensor:
            found = landscape(kind, risk, k=1, **options)
            return torch.tensor([found.sharpness, found.trace]).to(matrix)

        self.attempt(f"{kind}: landscape", lambda: numbers(self.risk), expected, 10 * tolerance)
        if kind.is_semidefinite:
            gram = lambda: numbers(self.shuffled, methods=(GramMatrix(),))  # noqa: E731
            self.attempt(f"{kind}: landscape of few rows", gram, expected, 10 * tolerance)
        else:
            once = Lanczos(probes=1, steps=2)  # the largest eigenvalue is found without probes
            lanczos = lambda: numbers(self.risk, methods=(once,))[:1]  # noqa: E731
            self.attempt(f"{kind}: landscape by products", lanczos, expected[:1], 1e-3)

    def factors(self) -> None:
        """The corrected eigenvalues of EKFAC are those of C along the factors' eigenvectors, so that its trace is
        exact. Of one example with one row a Kronecker product is exact in linear layers with one position."""
        if not any(isinstance(m, nn.Linear | _ConvNd) for m in self.loops.model.modules()):
            return  # there is no layer to factorise
        ggn = self.loops.ggns.mean(0)
        trace = lambda: torch.tensor(estimate(GGN(), EKFAC(), self.risk).curvature.trace())  # noqa: E731
        self.attempt("GGN() × EKFAC", trace, ggn.trace(), TOLERANCE)
        plain, exact = self.with_one_position(), self.loops.empirical_fishers[0]

        def difference() -> Tensor:
            risk = self.snapshot([(self.inputs[:1], self.targets[:1])])
            matrix = estimate(EmpiricalFisher(), Kronecker(), risk).curvature
            owner = {name: layer for layer in matrix.layers for name in (layer.weight, layer.bias) if name}
            apart = (matrix.dense() - exact) / exact.abs().max().clamp_min(1e-6)
            kept = torch.zeros_like(apart, dtype=torch.bool)
            place = dict(zip(risk.space.names, torch.arange(len(exact)).split(risk.space.sizes)))
            for first, second in itertools.product(place, repeat=2):
                layer = owner.get(first)
                if first == second and layer is None:
                    kept[place[first], place[first]] = True
                elif layer is not None and layer is owner.get(second) and first.rpartition(".")[0] in plain:
                    kept[place[first][:, None], place[second]] = True
            return torch.where(kept, apart, 0.0)

        label = "EmpiricalFisher() × Kronecker of one example"
        self.attempt(label, lambda: 1 + difference(), torch.ones_like(ggn), TOLERANCE)

    def with_one_position(self) -> set[str]:
        """The names of linear layers that see one vector of each example."""
        seen: set[str] = set()
        for name, module in self.loops.model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(
                    lambda layer, args, _, name=name: seen.add(name) if args[0].numel() == layer.in_features else None
                )
        self.loops.outputs(0)
        return seen

    def projections(self) -> None:
        """A step that avoids the top eigenspace has no part in it; one that avoids the inputs changes no output."""
        ggn, step = self.loops.ggns.mean(0), torch.linspace(1, 9, len(self.loops.anchor)).to(self.loops.anchor).sin()

        def projected(protection: object) -> Tensor:
            space = ProtectedSpace().absorb(self.risk, protection)
            moved = Loops(self.reference().eval(), self.inputs, self.targets, self.loops.loss)
            with Projector(space, StepProjection()).around_step(moved.model):
                moved.move(self.loops.anchor + step)
            return moved.vector() - self.loops.anchor

        if has_gap(ggn):
            top = torch.linalg.eigh(ggn).eigenvectors[:, -PAIRS:]
            space = Eigenspace(GGN(), Rank(PAIRS))
            self.attempt("Eigenspace(GGN())", lambda: projected(space), step - top @ (top.T @ step), 1e-4)
        self.attempt(
            "InputSpace",
            lambda: self.loops.all_outputs(self.loops.anchor + projected(InputSpace(Energy(1.0)))),
            self.loops.all_outputs(),
            1e-6,
        )


def shaken(make: Callable[[], nn.Module]) -> nn.Module:
    """A module in float64, away from special values such as scales of one, and with running statistics of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, dtype=parameter.dtype)
            for module in model.modules():
                if isinstance(module, _NormBase) and module.running_mean is not None:
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2.0)
    return model


def draw(shape: tuple[int, ...] | int) -> Tensor:
    """Seven examples of this shape, or as many rows of five tokens of a vocabulary of this size."""
    draws = torch.Generator().manual_seed(1)
    if isinstance(shape, int):
        return torch.randint(shape, (EXAMPLES, 5), generator=draws)
    return torch.randn(EXAMPLES, *shape, generator=draws, dtype=torch.float64)


@pytest.fixture(scope="session")
def scan():
    """scan(make, shape of an example, reference) -> a report of what is wrong and what is refused, in comparison with
    the model that `reference` makes, which is the same by default."""

    def scanned(
        make: Callable[[], nn.Module], shape: tuple[int, ...] | int, reference: Callable[[], nn.Module] | None = None
    ) -> Report:
        report = Report()
        for loss in LOSSES:
            found = Scan(lambda: shaken(make), lambda: shaken(reference or make), draw(shape), loss)
            found.run()
            report.wrong += found.report.wrong
            report.refused += found.report.refused
        return report

    return scanned
