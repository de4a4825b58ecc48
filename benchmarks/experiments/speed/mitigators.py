"""Training steps beside mitigators of plasticity loss, in a plain loop with Adam."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from avalanche_curv.plasticity.mitigators import (
    L2,
    L2Init,
    Mitigator,
    Parseval,
    ReDO,
    Regularizer,
    ShrinkAndPerturb,
    SpectralRegularizer,
    StreamingEWC,
    Wasserstein,
)
from avalanche_curv.plasticity.roles import ShiftRole, WeightRole, parameter_roles
from benchmarks.experiments.speed.steps import synthetic
from benchmarks.timing import Times, interleaved

if TYPE_CHECKING:
    from benchmarks.experiments.speed.experiment import Config

DEPTH = 4
IMAGE = 64  # of tiny-ImageNet, as the paper's residual networks see it
MITIGATORS: dict[str, Callable[[], Mitigator] | None] = {
    "plain": None,
    "spectral": lambda: SpectralRegularizer(1e-3),
    "exact": lambda: _ExactNorms(1e-3),
    "l2": lambda: L2(1e-3),
    "l2_init": lambda: L2Init(1e-3),
    "shrink_perturb": lambda: ShrinkAndPerturb(1e-4, 1e-4),
    "redo": lambda: ReDO(every=100),
    "wasserstein": lambda: Wasserstein(1e-3),
    "streaming_ewc": lambda: StreamingEWC(1e-3),
    "parseval": lambda: Parseval(1e-3),
    "parseval_4": lambda: Parseval(1e-3, every=4),
}
ON_IMAGES = ("plain", "spectral", "exact")
ROUNDS = 7  # at most
EXACT_STEPS = 2  # of one cost each, and a long one


class _ExactNorms(Regularizer):
    """The spectral penalty with singular values from a decomposition at every step: the price that is avoided."""

    def penalty(self, model: nn.Module) -> Tensor:
        found = parameter_roles(model)
        weights = [p.flatten(1) for p, role in found.items() if isinstance(role, WeightRole)]
        shifts = [p.square().sum() ** 2 for p, role in found.items() if isinstance(role, ShiftRole)]
        return torch.stack([(torch.linalg.matrix_norm(w, 2) ** 2 - 1) ** 2 for w in weights] + shifts).sum()

    def add_penalty_gradient(self, parameters: dict[str, nn.Parameter], model: nn.Module, weight: float) -> None:
        with torch.enable_grad():
            gradients = torch.autograd.grad(weight * self.penalty(model), list(parameters.values()), allow_unused=True)
        for parameter, gradient in zip(parameters.values(), gradients):
            if gradient is not None and parameter.grad is not None:
                parameter.grad += gradient


def mitigated(config: Config) -> Times:
    """The mean step of an MLP with four hidden layers, as the paper has on MNIST, over a `period`: 256 steps, in which
    Wasserstein sorts once, and into which the pool of ShrinkAndPerturb, the noise of SpectralRegularizer, what ReDO
    recycles and `every=10` fall too. So the median over rounds leaves out nothing that only some of them have."""
    inputs, targets = synthetic(config.batch)
    works = {
        name: _steps(_mlp(config.width), inputs, targets, make, EXACT_STEPS if name == "exact" else config.period)
        for name, make in MITIGATORS.items()
    }
    return interleaved(works, min(ROUNDS, config.rounds))


def mitigated_on_images(config: Config) -> Times:
    """A step of ResNet-18, with batches of 32 images."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(config.images, 3, IMAGE, IMAGE, generator=generator)
    targets = torch.randint(10, (config.images,), generator=generator)
    works = {name: _steps(_residual(), inputs, targets, MITIGATORS[name], 1) for name in ON_IMAGES}
    return interleaved(works, min(ROUNDS, config.rounds))


def _steps(
    model: nn.Module, inputs: Tensor, targets: Tensor, make: Callable[[], Mitigator] | None, count: int
) -> Callable[[], float]:
    """Seconds of one of `count` steps, in the mean."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    if make is not None:
        make().attach(optimizer, model)

    def timed() -> float:
        start = perf_counter()
        for _ in range(count):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        return (perf_counter() - start) / count

    return timed


def _mlp(width: int) -> nn.Module:
    torch.manual_seed(0)
    hidden: list[Any] = [layer for _ in range(DEPTH - 1) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(784, width), nn.ReLU(), *hidden, nn.Linear(width, 10))


def _residual() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=10)
