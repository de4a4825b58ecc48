import copy
import enum
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.logging import TensorboardLogger
from avalanche.models import IncrementalClassifier
from avalanche.training import Naive
from avalanche.training.plugins import (
    AGEMPlugin,
    EvaluationPlugin,
    MIRPlugin,
    ReplayPlugin,
    SupervisedPlugin,
)
from torch import nn

from avalanche_curv import (
    Accumulate,
    AdaptiveRefresh,
    CurvatureEWC,
    CurvatureEWCPlugin,
    JSONLLogger,
    Refresh,
    RelativeError,
    SpectralRegPlugin,
    SplitDigits,
    fidelity_metrics,
    load_checkpoint,
    save_checkpoint,
)

# This file is also the program that resumes: it is run by itself with the folder of the checkpoints.

POLICIES = {
    "accumulate": Accumulate(),
    "refresh": Refresh(fraction=0.2, gradient=True),
    "adaptive": AdaptiveRefresh(RelativeError(0.01), every=1, fraction=0.2),
}


def seed_everything(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  the legacy state is global
    random.seed(seed)


def learner(folder, policy, stream):
    """A growing model with batch statistics and dropout, trained by an optimizer with state, and measured."""
    model = nn.Sequential(
        nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), IncrementalClassifier(6)
    )
    evaluator = EvaluationPlugin(
        *fidelity_metrics(every=2, fraction=0.05, stream=stream),
        accuracy_metrics(minibatch=True, stream=True),
        loggers=[JSONLLogger(folder / "metrics.jsonl")],
    )
    return CurvatureEWC(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.02),
        strength=3.0,
        policy=policy,
        train_mb_size=64,
        evaluator=evaluator,
    )


def state(strategy, folder):
    past = strategy.ewc.past
    return {
        "model": strategy.model.state_dict(),
        "optimizer": strategy.optimizer.state_dict(),
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.random.get_state()[1].astype("int64")),  # noqa: NPY002
        "random": random.getstate(),
        "past": [past.model.anchor, past.model.gradient, past.model.curvature.dense(), past.model.constant],
        "experiences": past.experiences,
        "stored": [batch for risk in past.stored for pair in risk.batches for batch in pair],
        "metrics": dict(strategy.evaluator.get_all_metrics()),
        "log": (folder / "metrics.jsonl").read_text(),
    }


def resume(folder):
    for name, policy in POLICIES.items():
        seed_everything(99)
        benchmark = SplitDigits(5, seed=0)
        strategy = learner(folder / name, policy, benchmark.test_stream)
        strategy, start = load_checkpoint(strategy, folder / name / "checkpoint.pt")
        for experience in benchmark.train_stream[start:3]:
            strategy.train(experience)
        torch.save(state(strategy, folder / name), folder / name / "resumed.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """For each policy, a run that is saved after two experiences, goes on, and is resumed elsewhere."""
    folder = tmp_path_factory.mktemp("runs")
    benchmark = SplitDigits(5, seed=0)
    for name, policy in POLICIES.items():
        seed_everything(0)
        strategy = learner(folder / name, policy, benchmark.test_stream)
        for experience in benchmark.train_stream[:2]:
            strategy.train(experience)
        before = copy.deepcopy(state(strategy, folder / name))
        save_checkpoint(strategy, folder / name / "checkpoint.pt")
        assert_identical(state(strategy, folder / name), before)
        strategy.train(benchmark.train_stream[2])
        torch.save(state(strategy, folder / name), folder / name / "state.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, str(folder)], check=True, env=environment)
    return folder


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_resumed_in_another_process_ends_bit_identically_to_an_uninterrupted_one(policy, folder):
    expected = torch.load(folder / policy / "state.pt", weights_only=False)
    resumed = torch.load(folder / policy / "resumed.pt", weights_only=False)
    assert resumed["experiences"] == 3
    assert len(expected["stored"]) == (0 if policy == "accumulate" else 6)
    assert len(resumed["log"].splitlines()) > 100
    assert_identical(resumed, expected)


def assert_identical(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_identical(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_identical(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.LBFGS])
def test_optimizers_come_back_as_the_class_they_were(optimizer, net, tmp_path):
    strategy = naive(net, optimizer)
    names = set(vars(torch.optim))
    save_checkpoint(strategy, tmp_path / "checkpoint.pt")
    assert set(vars(torch.optim)) == names
    resumed, start = load_checkpoint(naive(net, torch.optim.Adam), tmp_path / "checkpoint.pt")
    assert type(resumed.optimizer) is optimizer
    assert start == 0


def naive(net, optimizer=torch.optim.SGD, *plugins, **options):
    return Naive(
        model=net,
        optimizer=optimizer(net.parameters(), lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        plugins=list(plugins),
        evaluator=EvaluationPlugin(**options),
        train_mb_size=24,
    )


def resumes_bit_identically(make, stream, path):
    """Whether a run of `make()` over the stream, saved amid it and resumed, ends as the one that goes on."""
    seed_everything(0)
    strategy = make()
    for experience in stream[:2]:
        strategy.train(experience)
    save_checkpoint(strategy, path)
    for experience in stream[2:]:
        strategy.train(experience)
    end = torch.get_rng_state()
    seed_everything(99)
    resumed, start = load_checkpoint(make(), path)
    for experience in stream[start:]:
        resumed.train(experience)
    assert start == 2
    assert resumed.model is not strategy.model
    assert torch.equal(torch.get_rng_state(), end)
    assert_identical(resumed.model.state_dict(), strategy.model.state_dict())
    return resumed


REPLAYS = {"agem": lambda: AGEMPlugin(20, 20), "mir": lambda: MIRPlugin(6, 30, 10), "replay": lambda: ReplayPlugin(30)}


@pytest.mark.parametrize("replay", REPLAYS)
def test_loaders_that_have_not_begun_are_made_again(replay, net, digits, make, tmp_path):
    def strategy():
        model = make(lambda: nn.Linear(64, 10))
        ours = CurvatureEWCPlugin(3.0, policy=Refresh(fraction=0.5)), SpectralRegPlugin(0.01)
        return naive(model, torch.optim.SGD, REPLAYS[replay](), *ours)

    resumes_bit_identically(strategy, digits(task_labels=True).train_stream, tmp_path / "checkpoint.pt")


def test_used_up_loaders_that_each_experience_replaces_are_left_out(net, tmp_path):
    strategy = naive(net)
    strategy.pos_neg_loaders = [counting(4)]  # as ER_AML has them
    next(strategy.pos_neg_loaders[0])
    save_checkpoint(strategy, tmp_path / "checkpoint.pt")
    resumed, _ = load_checkpoint(naive(net), tmp_path / "checkpoint.pt")
    assert not hasattr(resumed, "pos_neg_loaders")
    assert next(strategy.pos_neg_loaders[0]) == 1


def test_the_place_of_a_loader_in_its_data_is_refused(net, tmp_path):
    strategy = naive(net)
    strategy.batches = iter(torch.utils.data.DataLoader(torch.ones(4, 2)))  # as RARPlugin has it
    with pytest.raises(TypeError, match=r"a data loader half-way .* before_training_exp"):
        save_checkpoint(strategy, tmp_path / "checkpoint.pt")
    assert not list(tmp_path.iterdir())


def counting(limit, *, first=0):
    yield from range(first, limit)


def test_a_generator_is_made_again_unless_it_has_begun(net, tmp_path):
    strategy = naive(net)
    strategy.numbers = counting(4, first=2)
    save_checkpoint(strategy, tmp_path / "checkpoint.pt")
    assert next(strategy.numbers) == 2
    resumed, _ = load_checkpoint(naive(net), tmp_path / "checkpoint.pt")
    assert list(resumed.numbers) == [2, 3]
    with pytest.raises(TypeError, match=r"the generator counting half-way"):
        save_checkpoint(strategy, tmp_path / "checkpoint.pt")


class Points(torch.utils.data.Dataset):
    """Points of two classes, as a program may define them."""

    kind = enum.Enum("kind", ["PLANE"])

    def __init__(self, inputs, targets):
        super().__init__()
        self.inputs, self.targets = inputs, targets

    def __len__(self):
        return len(self.inputs)


class LabelledPoints(Points):
    def __getitem__(self, index):
        return self.inputs[index], int(self.targets[index])


def test_a_replay_buffer_over_a_data_set_of_the_main_program_is_resumed(net, plane, examples, tmp_path, monkeypatch):
    main = sys.modules["__main__"]
    for cls in (Points, LabelledPoints):
        monkeypatch.setattr(cls, "__module__", "__main__")
        monkeypatch.setattr(main, cls.__name__, cls, raising=False)
    sets = [_taskaware(LabelledPoints(*examples(experience))) for experience in plane.train_stream]
    stream = benchmark_from_datasets(train=sets).train_stream
    path = tmp_path / "checkpoint.pt"

    def strategy():
        return naive(copy.deepcopy(net), torch.optim.SGD, ReplayPlugin(30), CurvatureEWCPlugin(3.0))

    resumed = resumes_bit_identically(strategy, stream, path)
    stored = resumed.plugins[0].storage_policy.buffer._flat_data._datasets[0]
    assert type(stored) is LabelledPoints
    monkeypatch.delattr(main, "LabelledPoints")
    with pytest.raises(AttributeError, match=r"LabelledPoints.* Define the class in the program that loads"):
        load_checkpoint(strategy(), path)


def _taskaware(dataset):
    from avalanche.benchmarks.utils import _make_taskaware_classification_dataset

    return _make_taskaware_classification_dataset(dataset, task_labels=0)


def test_a_tensorboard_logger_is_saved_too(net, plane, tmp_path):
    strategy = naive(net, loggers=[TensorboardLogger(tb_log_dir=tmp_path)])
    strategy.train(plane.train_stream[0])
    save_checkpoint(strategy, tmp_path / "new" / "folder" / "checkpoint.pt")
    resumed, start = load_checkpoint(naive(net), tmp_path / "new" / "folder" / "checkpoint.pt")
    assert start == 1
    assert isinstance(resumed.evaluator.loggers[0], TensorboardLogger)


def test_a_run_over_an_online_stream_resumes_amid_a_task(net, plane, tmp_path):
    parts = list(split_online_stream(plane.train_stream, 16, access_task_boundaries=True, seed=0))
    options = {"strength": 30.0, "train_mb_size": 4, "evaluator": None}
    seed_everything(0)
    strategy = CurvatureEWC(model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), **options)
    for part in parts[:5]:  # three to a task
        strategy.train(part)
    save_checkpoint(strategy, tmp_path / "checkpoint.pt")
    for part in parts[5:]:
        strategy.train(part)
    uninterrupted, past = [p.detach().clone() for p in net.parameters()], strategy.ewc.past
    other = copy.deepcopy(net)
    resumed = CurvatureEWC(model=other, optimizer=torch.optim.SGD(other.parameters(), lr=0.1), **options)
    resumed, start = load_checkpoint(resumed, tmp_path / "checkpoint.pt")
    assert (start, resumed.ewc.past.experiences) == (5, 1)
    for part in parts[start:]:
        resumed.train(part)
    assert_identical(list(resumed.model.parameters()), uninterrupted)
    assert resumed.ewc.past.experiences == past.experiences == 3
    assert torch.equal(resumed.ewc.past.model.curvature.dense(), past.model.curvature.dense())


def test_without_a_file_the_strategy_comes_back_as_it_is(net, tmp_path):
    strategy = naive(net)
    assert load_checkpoint(strategy, tmp_path / "none.pt") == (strategy, 0)


def test_a_file_of_another_kind_is_named(net, tmp_path):
    strategy = naive(net)
    state, text = tmp_path / "state.pt", tmp_path / "notes.txt"
    torch.save(CurvatureEWCPlugin(1.0).state_dict(), state)
    text.write_text("hello")
    for path, why in ((state, "KeyError: 'strategy'"), (text, "UnpicklingError")):
        with pytest.raises(ValueError, match=rf"{path.name} is no checkpoint \({why}.* goes into its load_state_dict"):
            load_checkpoint(strategy, path)


def test_a_failed_save_leaves_the_checkpoint_before_it_and_no_trace(net, tmp_path):
    path = tmp_path / "checkpoint.pt"
    strategy = naive(net)
    save_checkpoint(strategy, path)
    before = path.read_bytes()
    names = set(vars(torch.optim))
    strategy.unpicklable = (number for number in range(3))
    with pytest.raises(TypeError, match="generator"):
        save_checkpoint(strategy, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert set(vars(torch.optim)) == names


def test_saving_amid_an_experience_is_refused(net, plane, tmp_path):
    class Early(SupervisedPlugin):
        def after_training_epoch(self, strategy, **kwargs):
            save_checkpoint(strategy, tmp_path / "checkpoint.pt")

    with pytest.raises(RuntimeError, match=r"in the middle of one. Save after strategy.train"):
        naive(net, torch.optim.SGD, Early()).train(plane.train_stream[0])
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    resume(Path(sys.argv[1]))
