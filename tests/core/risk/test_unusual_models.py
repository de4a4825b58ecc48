"""Models and options off the beaten track: right, or refused with the remedy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avalanche_curv.core import (
    GGN,
    BatchedEmpiricalFisher,
    Clip,
    Dense,
    Diagonal,
    EmpiricalFisher,
    EmpiricalRisk,
    Fisher,
    Hessian,
    Refresh,
    estimate,
)
from avalanche_curv.core.fidelity.examples import OutputModels
from avalanche_curv.core.fidelity.monitor import example_models


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(6, 4, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(3, (6,), generator=generator)


def seeded(make) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def double_backward(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    parameters = list(model.parameters())
    loss = F.cross_entropy(model(inputs), targets)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in gradient]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(4), lambda: nn.GroupNorm(2, 4)], ids=["layer", "group"])
def test_hessian_with_affine_normalisation_is_the_double_backward(norm) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), norm(), nn.Tanh(), nn.Linear(4, 3)).double())
    inputs, targets = data()
    risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(inputs, targets)])
    found = estimate(Hessian(), Dense(), risk).curvature.dense()
    torch.testing.assert_close(found, double_backward(model, inputs, targets).detach(), rtol=1e-9, atol=1e-10)


class Recurrent(nn.Module):
    """torch's `vmap` has no rule for its LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.lstm(inputs.view(len(inputs), 2, 2))[0][:, -1])


def test_empirical_fisher_of_a_recurrent_network_is_the_mean_of_outer_products() -> None:
    model, (inputs, targets) = seeded(lambda: Recurrent().double()), data()
    risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(inputs, targets)])
    rows = []
    for x, y in zip(inputs, targets):
        parts = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), list(model.parameters()))
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    expected = torch.stack(rows).T @ torch.stack(rows) / len(rows)
    for structure, wanted in ((Dense(), expected), (Diagonal(), expected.diagonal().diag())):
        found = estimate(EmpiricalFisher(), structure, risk).curvature.dense()
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_alpha_in_single_precision_is_that_of_double_where_the_true_gradient_is_small() -> None:
    """After long training the true gradients vanish beside the predicted ones: products must not be differences.

    A smooth model: a ReLU at its kink may be on in one precision and off in the other.
    """
    model = seeded(lambda: nn.Sequential(nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, 5)))
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(100, 20, generator=generator), torch.randint(5, (100,), generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()

    train(20)
    criterion = nn.CrossEntropyLoss()
    single = EmpiricalRisk.snapshot(model, criterion, [(inputs, targets)])
    double = EmpiricalRisk.snapshot(copy.deepcopy(model).double(), criterion, [(inputs.double(), targets)])
    train(500)
    theta = single.space.vector(model)
    found = example_models(GGN(), single).compare(theta)
    exact = OutputModels(GGN(), double).compare(theta.double())
    for ours, truth in ((found.quadratic, exact.quadratic), (found.linear, exact.linear)):
        assert not ours.alpha.isnan().any()
        torch.testing.assert_close(ours.alpha.double(), truth.alpha, rtol=0, atol=1e-3)
        torch.testing.assert_close(ours.gamma.double(), truth.gamma, rtol=1e-3, atol=1e-4)


class RandomInEval(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(F.dropout(inputs, 0.5))


class WritesIntoInputs(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs.mul_(0.5))


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: RandomInEval(4, 3), r"draws at random in eval mode.*self\.training"),
        (lambda: WritesIntoInputs(4, 3), r"writes into its inputs.*Clone them"),
        (lambda: nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)), "running statistics"),
    ],
)
def test_a_model_that_is_no_function_of_single_examples_is_refused(make, remedy: str) -> None:
    inputs, targets = data()
    before = inputs.clone()
    with pytest.raises(ValueError, match=remedy):
        EmpiricalRisk.snapshot(make().double(), nn.CrossEntropyLoss(), [(inputs, targets)])
    torch.testing.assert_close(inputs, before, rtol=0, atol=0)


class Focal(nn.CrossEntropyLoss):
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().forward(outputs, targets).square()


def test_a_subclass_of_a_known_criterion_is_not_taken_for_it() -> None:
    with pytest.raises(ValueError, match=r"Focal mixes the examples of a batch.*give a criterion of single examples"):
        EmpiricalRisk.snapshot(nn.Linear(4, 3).double(), Focal(), [data()])


class Scaled(nn.Linear):
    """A linear layer with one more parameter."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.scale * super().forward(inputs)


def test_a_linear_layer_with_more_parameters_has_the_diagonal_of_its_dense_matrix() -> None:
    risk = EmpiricalRisk.snapshot(seeded(Scaled).double(), nn.CrossEntropyLoss(), [data()])
    dense = estimate(GGN(), Dense(), risk).curvature.dense()
    found = estimate(GGN(), Diagonal(), risk).curvature.dense()
    torch.testing.assert_close(found.diagonal(), dense.diagonal(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Hessian(psd="clip"),
        lambda: Hessian(psd=Clip),
        lambda: Fisher(samples=1.5),
        lambda: BatchedEmpiricalFisher(2.5),
        lambda: Refresh(fraction="0.1"),
        lambda: Refresh(fraction=True),
    ],
)
def test_options_of_the_wrong_type_are_refused_when_made(make) -> None:
    with pytest.raises((TypeError, ValueError), match="got"):
        make()
