"""Small problems in float64, with every derivative from explicit Jacobians and losses written as on paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn.functional import softplus

from avalanche_curv import EmpiricalRisk, ParameterSpace, PerParameter, QuadraticModel
from avalanche_curv.core.structures.block_diagonal import Block, BlockDiagonalMatrix
from avalanche_curv.core.structures.dense import DenseMatrix
from avalanche_curv.core.structures.diagonal import DiagonalMatrix

EXAMPLES, BATCH, FEATURES, CLASSES = 7, 4, 4, 3  # 4 + 3: a ragged last batch

CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)
RELATIVE = CLASS_WEIGHTS / CLASS_WEIGHTS.mean()
POSITIVE_WEIGHTS = torch.tensor([3.0, 0.5, 1.2], dtype=torch.float64)


def surprise(f: Tensor) -> Tensor:
    """−log p_c for each class c."""
    return f.logsumexp(0) - f


def binary(f: Tensor, y: Tensor) -> Tensor:
    return softplus(f) - y * f


@dataclass(frozen=True)
class OnPaper:
    """A criterion, and the loss ℓ(f, y) of one example with outputs f [C] as its formula says."""

    criterion: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]


LOSSES = {
    "cross_entropy": OnPaper(nn.CrossEntropyLoss(), lambda f, y: surprise(f)[y]),
    "smoothed": OnPaper(
        nn.CrossEntropyLoss(label_smoothing=0.1), lambda f, y: 0.9 * surprise(f)[y] + 0.1 * surprise(f).mean()
    ),
    "weighted": OnPaper(nn.CrossEntropyLoss(CLASS_WEIGHTS), lambda f, y: RELATIVE[y] * surprise(f)[y]),
    "weighted_smoothed": OnPaper(
        nn.CrossEntropyLoss(CLASS_WEIGHTS, label_smoothing=0.3),
        lambda f, y: 0.7 * RELATIVE[y] * surprise(f)[y] + 0.3 * (RELATIVE * surprise(f)).mean(),
    ),
    "mean_square": OnPaper(nn.MSELoss(), lambda f, y: (f - y).square().mean()),
    "summed_square": OnPaper(nn.MSELoss(reduction="sum"), lambda f, y: (f - y).square().sum()),
    "binary": OnPaper(nn.BCEWithLogitsLoss(), lambda f, y: binary(f, y).mean()),
    "summed_binary": OnPaper(nn.BCEWithLogitsLoss(reduction="sum"), lambda f, y: binary(f, y).sum()),
    "weighted_binary": OnPaper(
        nn.BCEWithLogitsLoss(pos_weight=POSITIVE_WEIGHTS),
        lambda f, y: (POSITIVE_WEIGHTS * y * softplus(-f) + (1 - y) * softplus(f)).mean(),
    ),
}

LIKELIHOODS = [name for name in LOSSES if not name.startswith("weighted")]


class Jacobians:
    """Explicit derivatives of every example, one after the other, at the frozen parameters or at `theta` [P]."""

    def __init__(self, risk: EmpiricalRisk, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.model, self.formula = risk.model, loss
        self.inputs = torch.cat([x for x, _ in risk.batches])
        self.targets = torch.cat([y for _, y in risk.batches])
        self.named = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
        self.anchor = torch.cat([p.reshape(-1) for p in self.named.values()])
        self.sizes = [p.numel() for p in self.named.values()]
        places = [len(list(self.model.named_modules(remove_duplicate=once))) for once in (True, False)]
        self.tied = places[0] == places[1]  # tying a module registered twice to itself spoils it in torch

    def outputs(self, theta: Tensor, i: int) -> Tensor:
        parts = theta.split(self.sizes)
        named = {n: part.view_as(p) for (n, p), part in zip(self.named.items(), parts)}
        return functional_call(self.model, named, (self.inputs[i : i + 1],), tie_weights=self.tied).reshape(-1)

    def loss(self, theta: Tensor, i: int) -> Tensor:
        return self.formula(self.outputs(theta, i), self.targets[i])

    def losses(self, theta: Tensor) -> Tensor:
        return self.each(lambda i: self.loss(theta, i))

    def gradients_at(self, theta: Tensor) -> Tensor:
        free = theta.clone().requires_grad_()
        with torch.enable_grad():
            return self.each(lambda i: torch.autograd.grad(self.loss(free, i), free)[0])

    def each(self, function: Callable[[int], Tensor]) -> Tensor:
        return torch.stack([function(i) for i in range(len(self.targets))])

    @cached_property
    def logits(self) -> Tensor:
        return self.each(lambda i: self.outputs(self.anchor, i).detach())

    @cached_property
    def jacobians(self) -> Tensor:
        return self.each(lambda i: jacrev(self.outputs)(self.anchor, i).detach())

    @cached_property
    def gradients(self) -> Tensor:
        return self.gradients_at(self.anchor)

    @cached_property
    def ggns(self) -> Tensor:
        """J_iᵀ (∇²_f ℓ_i) J_i."""
        def one(i: int) -> Tensor:
            curvature = hessian(self.formula)(self.logits[i], self.targets[i])
            return self.jacobians[i].T @ curvature @ self.jacobians[i]

        return self.each(one)

    @cached_property
    def empirical_fishers(self) -> Tensor:
        """g_i g_iᵀ."""
        return self.gradients[:, :, None] * self.gradients[:, None, :]

    def fishers(self, expectation: Callable[[Tensor], Tensor]) -> Tensor:
        """J_iᵀ E[∇_f ∇_fᵀ] J_i, from the expectation over the model's own labels."""
        return self.each(lambda i: self.jacobians[i].T @ expectation(self.logits[i]) @ self.jacobians[i])

    @cached_property
    def hessians(self) -> Tensor:
        """∇²ℓ_i."""
        return self.each(lambda i: hessian(self.loss)(self.anchor, i))

    def batch_gradients(self, size: int) -> Tensor:
        return torch.stack([part.mean(0) for part in self.gradients.split(size)])


@dataclass(frozen=True)
class Problem:
    """A model, a criterion, the risk of both on a few examples, and the same on paper."""

    model: nn.Module
    criterion: nn.Module
    risk: EmpiricalRisk
    paper: Jacobians


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A module in float64 whose initial values do not depend on the tests before it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().double()


def mlp(outputs: int = CLASSES) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, outputs))


def convolution() -> nn.Module:
    """Most parameters lie outside linear layers, so the shortcuts for linear layers do not apply."""
    norm = nn.BatchNorm1d(2)
    norm.running_mean = torch.tensor([0.3, -0.2])
    norm.running_var = torch.tensor([0.5, 2.0])
    return nn.Sequential(
        nn.Unflatten(1, (1, FEATURES)), nn.Conv1d(1, 2, 2), norm, nn.Tanh(), nn.Flatten(), nn.Linear(6, CLASSES)
    )


def targets_for(criterion: nn.Module, outputs: Tensor, generator: torch.Generator) -> Tensor:
    if isinstance(criterion, nn.CrossEntropyLoss):
        return torch.randint(outputs.shape[1], (len(outputs),), generator=generator)
    if isinstance(criterion, nn.BCEWithLogitsLoss):
        return torch.randint(2, outputs.shape, generator=generator).double()
    return torch.randn(outputs.shape, generator=generator, dtype=torch.float64)


def problem_of(model: nn.Module, name: str, seed: int = 0, examples: int = EXAMPLES, batch: int = BATCH) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(examples, FEATURES, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        targets = targets_for(LOSSES[name].criterion, model(inputs), generator)
    return problem_on(model, LOSSES[name], inputs, targets, batch)


def problem_on(model: nn.Module, on_paper: OnPaper, inputs: Tensor, targets: Tensor, batch: int = BATCH) -> Problem:
    batches = list(zip(inputs.split(batch), targets.split(batch)))
    risk = EmpiricalRisk.snapshot(model.train(), on_paper.criterion, batches)
    return Problem(model, on_paper.criterion, risk, Jacobians(risk, on_paper.loss))


@cache
def known_problem(model: str, name: str) -> Problem:
    return problem_of(seeded({"mlp": mlp, "conv": convolution}[model]).eval(), name)


@pytest.fixture(scope="session")
def problem():
    """problem("mlp" | "conv", loss name): shared by all tests, so do not change its model."""
    return known_problem


@pytest.fixture(scope="session")
def new_problem():
    """new_problem(model, loss name, ...): on random examples."""
    return problem_of


@pytest.fixture(scope="session")
def exact_problem():
    """exact_problem(model, formulas, inputs, targets)."""
    return problem_on


@pytest.fixture(scope="session")
def on_paper():
    return OnPaper


@pytest.fixture(scope="session")
def losses():
    return LOSSES


@pytest.fixture(params=["mlp", "conv"])
def architecture(request) -> str:
    return request.param


@pytest.fixture(params=LOSSES)
def loss_name(request) -> str:
    return request.param


@pytest.fixture(
    params=[*(("mlp", name) for name in LOSSES), *(("conv", n) for n in ("cross_entropy", "mean_square", "binary"))],
    ids=" ".join,
)
def known(request) -> Problem:
    """Each loss on a perceptron, and three on a model to which no shortcut applies, where losses act as there."""
    return known_problem(*request.param)


@pytest.fixture(params=LIKELIHOODS)
def likelihood(request) -> str:
    return request.param


@pytest.fixture
def net() -> nn.Module:
    """A multilayer perceptron 4-5-3 of this test's own."""
    return seeded(mlp)


def random_matrix(structure: str, space: ParameterSpace, generator: torch.Generator):
    """A positive semi-definite matrix of the structure."""

    def block(n: int) -> Tensor:
        root = torch.randn(n, n, generator=generator, dtype=torch.float64)
        return root @ root.T / n

    if structure == "dense":
        return DenseMatrix(block(space.size))
    if structure == "blocks":
        parts = PerParameter().spaces(space)
        blocks = tuple(Block(part, DenseMatrix(block(part.size))) for part in parts)
        return BlockDiagonalMatrix(space, PerParameter(), blocks)
    return DiagonalMatrix(torch.rand(space.size, generator=generator, dtype=torch.float64))


@pytest.fixture(params=["dense", "blocks", "diagonal"])
def random_quadratic(request):
    """random_quadratic(space, seed): of one structure, with a gradient and a constant."""

    def make(space: ParameterSpace, seed: int) -> QuadraticModel:
        generator = torch.Generator().manual_seed(seed)
        anchor, slope = torch.randn(2, space.size, generator=generator, dtype=torch.float64)
        return QuadraticModel(space, anchor, random_matrix(request.param, space, generator), slope, 0.7 * seed)

    return make


@pytest.fixture(scope="session")
def restricted():
    """restricted(structure name, matrix, sizes): the entries that the structure keeps."""

    def restrict(structure: str, matrix: Tensor, sizes: tuple[int, ...]) -> Tensor:
        if structure == "dense":
            return matrix
        if structure == "diagonal":
            return matrix.diagonal().diag()
        mask = torch.block_diag(*[torch.ones(n, n, dtype=torch.bool) for n in sizes])
        return torch.where(mask, matrix, 0.0)

    return restrict
