"""Heads on features that learn task after task with a penalty of the past, or all tasks at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from avalanche_curv.core.nested import Nested
from avalanche_curv.core.quadratic.minimum import conjugate_gradients
from benchmarks.networks import mlp

CLASSES = 10
CHUNK = 5  # iterations of L-BFGS between two looks
NEWTON, ITERATIONS = 24, 3000  # steps at most, and iterations of conjugate gradients in each,
ROUNDING = 1e-14  # until the slope is this part of what it was
ENOUGH = 1e-10  # the largest entry of the gradient at what counts as a minimum

Data = tuple[Float[Tensor, "N d"], Int[Tensor, "N"]]
Objective = Callable[[Tensor, Tensor], Tensor]
"""From inputs and classes to what is minimised."""
Product = Callable[[Tensor], Tensor]
Look = Callable[[int], bool]
"""After so many iterations of a task: whether what is minimised has changed."""


@dataclass(frozen=True)
class Network(ABC):
    """What learns from features. Its loss is `squared` error to the one-hot classes, summed over outputs, or
    cross-entropy, in the mean over examples."""

    kind: str
    squared: bool = False

    @property
    @abstractmethod
    def linear(self) -> bool:
        """Whether it is a linear layer: such are trained to a minimum, in double precision, from zero."""

    @abstractmethod
    def layers(self, inputs: int, outputs: int) -> list[nn.Module]:
        """The last of them linear, with all outputs; what is not pretrained is drawn by torch."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.linear else torch.float32

    @property
    def criterion(self) -> nn.Module:
        return nn.MSELoss(reduction="sum") if self.squared else nn.CrossEntropyLoss()

    def build(self, inputs: int, outputs: int, seed: int) -> nn.Sequential:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = nn.Sequential(*self.layers(inputs, outputs)).to(self.dtype)
        if self.linear:
            for parameter in model.parameters():
                nn.init.zeros_(parameter)
        return model

    def targets(self, classes: Int[Tensor, "N"], outputs: int) -> Tensor:
        return F.one_hot(classes, outputs).to(self.dtype) if self.squared else classes

    def loss(self, outputs: Float[Tensor, "N C"], classes: Int[Tensor, "N"]) -> Tensor:
        if self.squared:
            return (outputs - self.targets(classes, outputs.shape[1])).square().sum(1).mean()
        return F.cross_entropy(outputs, classes)

    def batches(self, data: Data, outputs: int) -> list[tuple[Nested, Nested]]:
        """As a risk takes them, for so many outputs."""
        inputs, classes = data
        return list(zip(inputs.split(500), self.targets(classes, outputs).split(500)))

    def seen(self, outputs: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
        """What is compared: the outputs, or the probabilities that come of them."""
        return outputs if self.squared else outputs.softmax(1)


@dataclass(frozen=True)
class Head(Network):
    """Linear, or with hidden layers of ReLU units."""

    hidden: tuple[int, ...] = ()

    @property
    def linear(self) -> bool:
        return not self.hidden

    def layers(self, inputs: int, outputs: int) -> list[nn.Module]:
        return [*mlp(inputs, *self.hidden, outputs)]


@dataclass(frozen=True)
class Schedule:
    """Networks that are not linear take `steps` steps a task on batches of `batch`, by Adam at `rate`; linear ones at
    most so many `iterations` of L-BFGS on all examples of the task."""

    steps: int = 120
    batch: int = 64
    rate: float = 3e-3
    iterations: int = 120


def fit(
    model: nn.Module, head: Network, data: Data, objective: Objective, schedule: Schedule, seed: int, *, tasks: int = 1,
    bend: Product | None = None, look: Look = lambda iteration: False,
) -> None:  # fmt: skip
    """Train on the examples of so many tasks. Where the objective is quadratic, `bend` is the product with what its
    curvature has beside that of the examples."""
    if not head.linear:
        _by_adam(model, data, objective, schedule, look, seed, tasks)
    elif head.squared and bend is not None:
        _by_conjugate_gradients(model, data, objective, bend, look)
    else:
        _to_the_minimum(model, data, objective, schedule.iterations, look)


def _by_conjugate_gradients(model: nn.Module, data: Data, objective: Objective, bend: Product, look: Look) -> None:
    """Newton's step, a second one against rounding, and more where the past was estimated anew."""
    product = of_squares([data])
    parameters, left = list(model.parameters()), 2
    for number in range(NEWTON):
        left = 2 if look(5 * number) else left
        if not left:
            return
        slope = parameters_to_vector(torch.autograd.grad(objective(*data), parameters))
        found = conjugate_gradients(lambda v: product(v) + bend(v), slope, ROUNDING * float(slope.norm()), ITERATIONS)
        vector_to_parameters(parameters_to_vector(parameters).detach() + found.step, parameters)
        left -= 1


def of_squares(tasks: Sequence[Data]) -> Product:
    """The product with the curvature of Σ_t L_t for squared error on a linear head: V ↦ 2 Σ_t V A_t with A_t the
    second moment of inputs with a one, in the order of the head's parameters."""
    rows = [with_one(x) for x, _ in tasks]
    moment = 2 * sum((x.T @ x / len(x) for x in rows), torch.zeros(()))

    def product(vector: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
        outputs = len(vector) // len(moment)
        weight, bias = vector[:-outputs].view(outputs, -1), vector[-outputs:]
        turned = torch.cat([weight, bias[:, None]], dim=1) @ moment
        return torch.cat([turned[:, :-1].reshape(-1), turned[:, -1]])

    return product


def _to_the_minimum(model: nn.Module, data: Data, objective: Objective, iterations: int, look: Look) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(*data)
        loss.backward()
        return loss

    optimizer, since = _lbfgs(model), 0
    for done in range(0, iterations, CHUNK):
        if look(done):
            optimizer, since = _lbfgs(model), done
        optimizer.step(closure)
        if optimizer.state_dict()["state"][0]["n_iter"] < done + CHUNK - since:
            return  # at a minimum, or as near as rounding allows


def _lbfgs(model: nn.Module) -> torch.optim.LBFGS:
    return torch.optim.LBFGS(
        model.parameters(), max_iter=CHUNK, max_eval=10 * CHUNK, history_size=30, tolerance_grad=ENOUGH,
        tolerance_change=0, line_search_fn="strong_wolfe",
    )  # fmt: skip


def _by_adam(
    model: nn.Module, data: Data, objective: Objective, schedule: Schedule, look: Look, seed: int, tasks: int
) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=schedule.rate)
    generator, (x, y) = torch.Generator().manual_seed(seed), data
    taken = schedule.steps * schedule.batch * tasks
    places = torch.cat([torch.randperm(len(y), generator=generator) for _ in range(taken // len(y) + 1)])
    for step, at in enumerate(places[:taken].split(schedule.batch)):
        look(step)
        optimizer.zero_grad()
        objective(x[at], y[at]).backward()
        optimizer.step()


def last(model: nn.Sequential) -> nn.Linear:
    """The layer that gives the outputs."""
    layer = model[-1]
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"A head ends with a linear layer; got {type(layer).__name__}.")
    return layer


def grow(model: nn.Sequential, outputs: int) -> None:
    """Append rows of zeros to the last layer, for so many outputs in all."""
    old = last(model)
    new = nn.Linear(old.in_features, outputs).to(old.weight)
    with torch.no_grad():
        for parameter, known in zip(new.parameters(), old.parameters()):
            parameter.zero_()[: len(known)] = known
    model[-1] = new


def joined(tasks: Sequence[Data]) -> Data:
    """The examples of all tasks."""
    return torch.cat([x for x, _ in tasks]), torch.cat([y for _, y in tasks])


def prior(model: nn.Module, weight: float, centre: Sequence[Tensor] = ()) -> Tensor:
    """½ · weight · ‖θ − centre‖², around zero without a centre."""
    moved = [p - c for p, c in zip(model.parameters(), centre)] if centre else [*model.parameters()]
    return 0.5 * weight * torch.stack([part.square().sum() for part in moved]).sum()


def closed_form(tasks: Sequence[Data], weight: float) -> Float[Tensor, "d+1 C"]:
    """The minimum of Σ_t (1/N_t) Σ_i ‖Wᵀ(x_i, 1) − y_i‖² + ½ · weight · ‖W‖² over all tasks."""
    gram, moment = torch.zeros(()), torch.zeros(())
    for x, y in tasks:
        rows = with_one(x.double())
        gram = gram + rows.T @ rows / len(y)
        moment = moment + rows.T @ F.one_hot(y, CLASSES).double() / len(y)
    return torch.linalg.solve(gram + 0.5 * weight * torch.eye(len(gram)).double(), moment)


def with_one(inputs: Float[Tensor, "N d"]) -> Float[Tensor, "N d+1"]:
    """With a one behind each row, for the bias."""
    return torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
