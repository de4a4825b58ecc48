"""A wrong set-up never costs an experience: its error comes before the first step, with the remedy."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from avalanche_curv import (
    CurvatureEWCPlugin,
    Dense,
    Diagonal,
    Eigenspace,
    EmpiricalFisher,
    Hessian,
    InputSpace,
    Kronecker,
    LowRank,
    NonFiniteCurvatureError,
    OrthogonalProjectionPlugin,
    OutputGradient,
    Rank,
)
from avalanche_curv.metrics import fidelity_metrics, landscape_metrics, plasticity_metrics

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(24, 4, generator=GENERATOR)
Y = torch.randint(3, (24,), generator=GENERATOR)


def net(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), *between, nn.Tanh(), nn.Linear(5, 3))


class Changed(nn.Module):
    """A network whose outputs pass through a function."""

    def __init__(self, change) -> None:
        super().__init__()
        self.net, self.change = net(), change

    def forward(self, x):
        return self.change(self.net(x), x)


class Locked(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 3))
        self.lock = threading.Lock()


class OnlyToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(4, 3))

    def forward(self, x):
        return x @ self.token


class SquareOfTheLoss(nn.CrossEntropyLoss):
    def forward(self, outputs, targets):
        return super().forward(outputs, targets).square()


def with_hook(hook) -> nn.Module:
    model = net()
    model[0].register_forward_hook(hook)
    return model


def fails_in_eval(module, args, output):
    if not module.training:
        raise AssertionError("only in training")


class BrokenKind(EmpiricalFisher):
    def factor(self, loss, outputs, targets, generator):
        return loss.gradient(outputs, targets)  # without its axis of columns


class BrokenStructure(Diagonal):
    def from_operator(self, operator, risk):
        raise ValueError("no such matrix")


class Lists(torch.utils.data.Dataset):
    def __init__(self, make) -> None:
        self.make, self.targets = make, Y.tolist()

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i):
        return self.make(i)


@dataclass(frozen=True)
class SetUp:
    """What is wrong, and the error and remedy expected of it."""

    error: type[Exception]
    remedy: str
    model: object = net
    criterion: nn.Module = nn.CrossEntropyLoss()  # noqa: RUF009
    data: tuple = (X, Y)
    plugin: object = lambda: CurvatureEWCPlugin(1.0)
    metrics: object = tuple
    optimizer: object = None


def ewc(**options):
    return lambda: CurvatureEWCPlugin(1.0, **options)


unknown = {"criterion": nn.CosineEmbeddingLoss(), "error": ValueError, "remedy": "in two lines"}
nothing = {"plugin": lambda: None}
SETUPS = {
    "unknown criterion": SetUp(**unknown),
    "criterion that overrides": SetUp(ValueError, "mixes the examples", criterion=SquareOfTheLoss()),
    "function as criterion": SetUp(ValueError, "MSELoss needs targets", criterion=nn.functional.mse_loss),
    "no likelihood": SetUp(ValueError, "drop the class weights", criterion=nn.CrossEntropyLoss(torch.rand(3))),
    "targets of another size": SetUp(ValueError, "needs targets of the outputs' shape", criterion=nn.MSELoss()),
    "class logits": SetUp(ValueError, "Give them, not logits", data=(X, -torch.rand(24, 3))),
    "targets out of range": SetUp(ValueError, "one logit a class", data=(X, torch.where(Y == 0, -1, Y))),
    "classes without logits": SetUp(ValueError, "Give the model one logit a class", data=(X, Y + 3)),
    "statistics of the batch": SetUp(
        ValueError, "normalisation with running statistics", lambda: net(nn.BatchNorm1d(5, track_running_stats=False))
    ),
    "outputs centred in the batch": SetUp(
        ValueError, "depend on the others in the batch", lambda: Changed(lambda f, x: f - f.mean(0))
    ),
    "outputs by place in the batch": SetUp(
        ValueError, "depend on the others", lambda: Changed(lambda f, x: f + torch.arange(len(f))[:, None])
    ),
    "random in eval": SetUp(
        ValueError, "draws at random in eval mode", lambda: Changed(lambda f, x: nn.functional.dropout(f))
    ),
    "outputs in a tuple": SetUp(TypeError, "Say which it is, forward=", lambda: Changed(lambda f, x: (f, x))),
    "batch axis second": SetUp(ValueError, "Put the batch axis first", lambda: Changed(lambda f, x: f.T)),
    "one number": SetUp(ValueError, "Put the batch axis first", lambda: Changed(lambda f, x: f.mean())),
    "writes into inputs": SetUp(
        ValueError, "Clone them in forward", lambda: Changed(lambda f, x: f + x.mul_(2)[:, :3])
    ),
    "inputs of another width": SetUp(ValueError, "Give inputs as in training", data=(X[:, :3], Y)),
    "a lock in the model": SetUp(TypeError, "Keep locks, files and generators out", Locked),
    "nothing to train": SetUp(ValueError, "Set requires_grad=True", lambda: net().requires_grad_(False)),
    "a hook for training only": SetUp(ValueError, "return early where not", lambda: with_hook(fails_in_eval)),
    "mappings": SetUp(ValueError, "Call its targets \"labels\"", data=(lambda i: {"x": X[i], "y": Y[i]},)),
    "no layer to factorise": SetUp(TypeError, "Use LowRank or Diagonal", OnlyToken, plugin=ewc(structure=Kronecker())),
    "too large a matrix": SetUp(MemoryError, "Use LowRank", plugin=ewc(structure=Dense(max_bytes=1000))),
    "not a number in the data": SetUp(NonFiniteCurvatureError, "NaN in the data", data=(X / 0, Y)),
    "outputs of classes for numbers": SetUp(
        TypeError, r"Use GGN\(\) instead", criterion=nn.MSELoss(), data=(X, torch.rand(24, 3)),
        plugin=lambda: OrthogonalProjectionPlugin(Eigenspace(OutputGradient(), Rank(2))),
    ),
    "a kind that is broken": SetUp(ValueError, "Nothing was trained", plugin=ewc(curvature=BrokenKind())),
    "a structure that is broken": SetUp(
        ValueError, "no such matrix", plugin=ewc(curvature=Hessian(), structure=BrokenStructure()),
        model=lambda: Changed(lambda f, x: f.square()),
    ),
    "a projection of an unknown criterion": SetUp(**unknown, plugin=OrthogonalProjectionPlugin),
    "a projection of steps with a closure": SetUp(
        TypeError, "Use SGD, Adam", plugin=OrthogonalProjectionPlugin, optimizer=torch.optim.LBFGS
    ),
    "inputs kept of an unfit model": SetUp(
        ValueError, "depend on the others", lambda: Changed(lambda f, x: f - f.mean(0)),
        plugin=lambda: OrthogonalProjectionPlugin(InputSpace()),
    ),
    "fidelity of an unknown criterion": SetUp(**unknown, **nothing, metrics=lambda: fidelity_metrics(fraction=1)),
    "fidelity of a random model": SetUp(
        ValueError, "draws at random", lambda: Changed(lambda f, x: nn.functional.dropout(f)),
        **nothing, metrics=fidelity_metrics,
    ),
    "a landscape of mappings": SetUp(
        ValueError, "make pairs of it", **nothing, metrics=landscape_metrics,
        data=(lambda i: {"x": X[i], "y": Y[i]},),
    ),
    "the plasticity of a locked model": SetUp(TypeError, "Keep locks", Locked, **nothing, metrics=plasticity_metrics),
}  # fmt: skip


@pytest.mark.parametrize("name", SETUPS)
def test_the_error_comes_before_the_first_step(name, learner, train, recorder) -> None:
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import make_avalanche_dataset

    setup = SETUPS[name]
    data = torch.utils.data.TensorDataset(*setup.data) if len(setup.data) == 2 else Lists(*setup.data)
    stream = benchmark_from_datasets(train=[make_avalanche_dataset(data)]).train_stream
    torch.manual_seed(0)
    model, own = setup.model(), setup.plugin()
    options = {"optimizer": setup.optimizer(model.parameters())} if setup.optimizer else {}
    plugins = [recorder, *([own] if own else [])]
    strategy = learner(model, *plugins, criterion=setup.criterion, metrics=setup.metrics(), **options)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(setup.error, match=rf"(?s){setup.remedy}"):
        train(strategy, stream)
    assert not recorder.steps
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_what_is_tried_leaves_training_as_it_is(learner, train, stream_of) -> None:
    """Strength 0 and metrics alone train as Naive does, to the bit."""
    stream = stream_of([(X, Y), (X.flip(0), Y)]).train_stream
    found = []
    for plugins, metrics in (((), ()), ((CurvatureEWCPlugin(0.0, structure=LowRank(Rank(3))),), fidelity_metrics())):
        torch.manual_seed(0)
        model = net(nn.Dropout(0.2))
        train(learner(model, *plugins, metrics=metrics), stream)
        found.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(*found)
