"""Three tiny experiences and learners that train on them. Avalanche takes seconds to import, so only fixtures do."""

import copy
import gc
import random

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

EXPERIENCES = 3

torch.set_num_threads(1)  # tests run in two processes, whose threads would fight for the cores
threadpool_limits(limits=1)


def seed_everything(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  the legacy state is the one that transforms use
    random.seed(seed)


def examples_of(experience):
    """Inputs and targets of an experience, without training transforms."""
    inputs, targets, *_ = zip(*experience.dataset.eval())
    return torch.stack(inputs), torch.as_tensor(targets)


@pytest.fixture(scope="module", autouse=True)
def what_imports_have_made_stays():
    """The garbage collector need not look at it again, which would take a third of a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def one_thread():
    """As compiled loops want it, and again after a test that takes more."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def examples():
    """examples(experience) -> (inputs, targets)."""
    return examples_of


@pytest.fixture(scope="session")
def make():
    """make(constructor, seed=0): a model whose initial values do not depend on the tests before it."""

    def constructed(constructor, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return constructor()

    return constructed


@pytest.fixture
def double():
    """Everything in float64, also what Avalanche makes itself."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def net(make):
    """A multilayer perceptron for the plane, 2-5-2."""
    return make(lambda: nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)))


@pytest.fixture(scope="session")
def plane():
    """Three slices of the plane: 48 training examples each."""
    from avalanche_curv import SineBoundary

    return SineBoundary(EXPERIENCES, examples=60, seed=0)


@pytest.fixture(scope="session")
def stream_of():
    """stream_of(pairs of inputs and targets, task_labels=None): a benchmark of those, to train and to test on."""
    from avalanche_curv.streams._benchmark import Examples, benchmark

    def stream(pairs, task_labels=None):
        sets = [Examples(inputs, targets) for inputs, targets in pairs]
        classes = int(max(targets.max() for _, targets in pairs)) + 1
        return benchmark([(part, part) for part in sets], task_labels or [0] * len(sets), classes)

    return stream


@pytest.fixture(scope="session")
def regression():
    """Three experiences of float64 targets [2] that no line explains; inputs [3]; no task labels."""
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import make_avalanche_dataset
    from torch.utils.data import TensorDataset

    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(EXPERIENCES, 30, 5, generator=generator, dtype=torch.float64)
    sets = [make_avalanche_dataset(TensorDataset(part[:, :3], part[:, 3:])) for part in draws]
    return benchmark_from_datasets(train=sets, test=sets)


@pytest.fixture(scope="session")
def digits(stream_of):
    """digits(task_labels, dtype): two digits in each of three experiences, 50 images each."""
    from avalanche_curv import SplitDigits

    parts = [examples_of(experience) for experience in SplitDigits(5, seed=3).train_stream[:EXPERIENCES]]

    def stream(task_labels=False, dtype=torch.float32):
        pairs = [(inputs[:50].to(dtype), targets[:50]) for inputs, targets in parts]
        return stream_of(pairs, list(range(EXPERIENCES)) if task_labels else None)

    return stream


def growing_head():
    from avalanche.models import IncrementalClassifier

    return nn.Sequential(nn.Linear(64, 3), nn.Tanh(), IncrementalClassifier(3))


def many_heads():
    from avalanche.models import MTSimpleMLP

    return MTSimpleMLP(input_size=64, hidden_size=3)


@pytest.fixture(params=["one growing head", "a head for each task"])
def growing(request, make, digits):
    """growing(dtype) -> (model, benchmark): a model that grows along the benchmark."""
    heads = request.param == "a head for each task"

    def pair(dtype=torch.float32):
        return make(many_heads if heads else growing_head).to(dtype), digits(heads, dtype)

    return pair


@pytest.fixture(scope="session")
def learner():
    """learner(model, *plugins, kind=Naive, metrics=(), ...) -> strategy."""
    from avalanche.training import Naive
    from avalanche.training.plugins import EvaluationPlugin

    def build(model, *plugins, kind=Naive, metrics=(), loggers=(), optimizer=None, criterion=None, **options):
        return kind(
            model=model,
            optimizer=optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5),
            criterion=criterion or nn.CrossEntropyLoss(),
            plugins=list(plugins),
            evaluator=EvaluationPlugin(*metrics, loggers=list(loggers)),
            **{"train_mb_size": 20, **options},
        )

    return build


@pytest.fixture(scope="session")
def train():
    """train(strategy, stream, seed=0, ...) -> strategy, trained on every experience from the same random states."""

    def through(strategy, stream, seed=0, **options):
        seed_everything(seed)
        for experience in stream:
            strategy.train(experience, **options)
        return strategy

    return through


@pytest.fixture
def recorder():
    """A plugin that keeps copies of the model: `steps` after every iteration, `ends` after every experience."""
    from avalanche.training.plugins import SupervisedPlugin

    class Recorder(SupervisedPlugin):
        def __init__(self):
            super().__init__()
            self.steps, self.ends = [], []

        def after_training_iteration(self, strategy, **kwargs):
            self.steps.append(copy.deepcopy(strategy.model))

        def after_training_exp(self, strategy, **kwargs):
            self.ends.append(copy.deepcopy(strategy.model).eval())

    return Recorder()


@pytest.fixture(scope="session")
def two_pairs(stream_of):
    """Two experiences of two classes each in the plane, 32 examples each."""
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(2, 32, 2, generator=generator), torch.randint(2, (2, 32), generator=generator)
    return stream_of([(inputs[0], targets[0]), (inputs[1] + 1, 2 + targets[1])])


@pytest.fixture
def fit_pairs(make, learner, train, two_pairs):
    """fit_pairs(*plugins, ...) -> a strategy trained on `two_pairs` in batches of 8."""

    def trained(*plugins, model=None, epochs=3, **options):
        model = model or make(lambda: nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 4)))
        strategy = learner(model, *plugins, train_mb_size=8, train_epochs=epochs, **options)
        return train(strategy, two_pairs.train_stream, eval_streams=[])

    return trained


@pytest.fixture
def seen_at(fit_pairs):
    """seen_at(hook, look, *plugins, ...) -> what `look(strategy)` gave at each call of a hook in such a training."""
    from avalanche.training.plugins import SupervisedPlugin

    def seen(hook, look, *plugins, **options):
        watcher, found = SupervisedPlugin(), []
        setattr(watcher, hook, lambda strategy, **kwargs: found.append(look(strategy)))
        fit_pairs(*plugins, watcher, **options)
        return found

    return seen


def seeded(make, seed=0):
    """A module in float64 whose initial values do not depend on the tests before it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().double()


@pytest.fixture(scope="session")
def make_model():
    """make_model(constructor, seed): in float64, from a seed of its own."""
    return seeded


def equal_to_rounding(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.fixture(scope="session")
def close():
    """Equality to 1e-10."""
    return equal_to_rounding


class Reads(TorchDispatchMode):
    """Counts what makes a device wait: numbers that are read of it, and results whose size it decides."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        named = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")
        self.count += any(name in str(function) for name in named)
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="session")
def reading():
    """`with reading() as reads:` counts in `reads.count` what makes a device wait."""
    return Reads
