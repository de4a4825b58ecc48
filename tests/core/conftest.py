"""Small problems in float64 and their curvature matrices from explicit Jacobians, example by example."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

from avalanche_curv import EmpiricalRisk

CRITERIA = {
    "cross_entropy": nn.CrossEntropyLoss(),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "mean_squared_error": nn.MSELoss(),
    "summed_squares": nn.MSELoss(reduction="sum"),
    "binary": nn.BCEWithLogitsLoss(),
}


def make_targets(criterion: nn.Module, examples: int, outputs: int, generator: torch.Generator) -> Tensor:
    if isinstance(criterion, nn.CrossEntropyLoss):
        return torch.randint(outputs, (examples,), generator=generator)
    if isinstance(criterion, nn.BCEWithLogitsLoss):
        return torch.randint(2, (examples, outputs), generator=generator).double()
    return torch.randn(examples, outputs, generator=generator, dtype=torch.float64)


def make_risk(model: nn.Module, criterion: nn.Module, *, examples: int = 7, batch: int = 3, seed: int = 0):
    """A risk over a ragged last batch."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(examples, 4, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        outputs = model(inputs).shape[1]
    targets = make_targets(criterion, examples, outputs, generator)
    return EmpiricalRisk.snapshot(model, criterion, list(zip(inputs.split(batch), targets.split(batch))))


def mlp(outputs: int = 3, seed: int = 0, hidden: int = 5) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, outputs)).double()


def conv(outputs: int = 3, seed: int = 0) -> nn.Module:
    """No linear layer holds all parameters, so the shortcuts for linear layers do not apply."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 2), nn.BatchNorm1d(2), nn.Tanh(), nn.Flatten(),
            nn.Linear(6, outputs),
        ).double()


class Reference:
    """Explicit Jacobians and Hessians of every example."""

    def __init__(self, risk: EmpiricalRisk) -> None:
        self.risk = risk
        self.inputs = torch.cat([x for x, _ in risk])
        self.targets = torch.cat([y for _, y in risk])
        self.model = risk.base
        self.parameters = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}

    def criterion(self, outputs: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError

    def flat(self, tree: dict[str, Tensor], lead: int) -> Tensor:
        return torch.cat([t.reshape(*t.shape[:lead], -1) for t in tree.values()], dim=-1)

    def outputs(self, parameters: dict[str, Tensor], i: int) -> Tensor:
        return functional_call(self.model, parameters, (self.inputs[i : i + 1],))[0]

    def jacobian(self, i: int) -> Tensor:
        return self.flat(jacrev(lambda p: self.outputs(p, i))(self.parameters), 1)

    def loss(self, outputs: Tensor, i: int) -> Tensor:
        return self.original(outputs[None], self.targets[i : i + 1])

    def mean(self, of) -> Tensor:
        return torch.stack([of(i) for i in range(len(self.targets))]).mean(0)

    def ggn(self) -> Tensor:
        def one(i: int) -> Tensor:
            J, f = self.jacobian(i), self.outputs(self.parameters, i)
            return J.T @ hessian(lambda z: self.loss(z, i))(f) @ J

        return self.mean(one)

    def gradients(self) -> Tensor:
        def one(i: int) -> Tensor:
            f = self.outputs(self.parameters, i)
            return self.jacobian(i).T @ jacrev(lambda z: self.loss(z, i))(f)

        return torch.stack([one(i) for i in range(len(self.targets))])

    def empirical_fisher(self) -> Tensor:
        g = self.gradients()
        return g.T @ g / len(g)

    def hessian(self) -> Tensor:
        def risk(p: dict[str, Tensor]) -> Tensor:
            return self.mean(lambda i: self.loss(self.outputs(p, i), i))

        blocks = hessian(risk)(self.parameters)
        rows = []
        for name, row in blocks.items():
            n = self.parameters[name].numel()
            rows.append(torch.cat([b.reshape(n, -1) for b in row.values()], dim=1))
        return torch.cat(rows)


def reference(risk: EmpiricalRisk, criterion: nn.Module) -> Reference:
    made = Reference(risk)
    made.original = criterion
    return made


@pytest.fixture(params=CRITERIA)
def criterion(request) -> nn.Module:
    return CRITERIA[request.param]
