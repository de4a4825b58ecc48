import pickle

import dill
import pytest
import torch
from avalanche.models import IncrementalClassifier
from avalanche.training import EWC, MAS, Cumulative, LwF, Naive, Replay, SynapticIntelligence
from avalanche.training.plugins import EvaluationPlugin
from torch import nn

from avalanche_curv.streams import SineBoundary


def test_class_one_lies_above_the_sine_curve_and_class_zero_below(tensors):
    for experience in SineBoundary(3, noise=2.0, seed=0).train_stream:
        inputs, targets, _ = tensors(experience)
        side = 2 * targets - 1
        assert (side * (inputs[:, 1] - inputs[:, 0].sin()) >= -1e-6).all()


def test_without_noise_every_point_is_on_the_curve(tensors):
    inputs, *_ = tensors(SineBoundary(1, noise=0, seed=0).train_stream[0])
    torch.testing.assert_close(inputs[:, 1], inputs[:, 0].sin())


def test_the_distance_from_the_curve_has_the_second_moment_of_the_noise(tensors):
    inputs, *_ = tensors(SineBoundary(1, examples=50_000, noise=0.5, seed=0).train_stream[0])
    assert (inputs[:, 1] - inputs[:, 0].sin()).square().mean().item() == pytest.approx(0.25, rel=0.05)


def test_experience_t_is_uniform_over_the_t_th_slice(tensors):
    stream = SineBoundary(4, examples=20_000, seed=0).train_stream
    for experience, left in zip(stream, (-5.0, -2.5, 0.0, 2.5), strict=True):
        x1 = tensors(experience)[0][:, 0]
        assert x1.min() >= left - 1e-6
        assert x1.max() <= left + 2.5 + 1e-6
        quarters = torch.histc(x1, bins=4, min=left, max=left + 2.5) / len(x1)
        torch.testing.assert_close(quarters, torch.full((4,), 0.25), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("examples", "train", "test"), [(250, [100, 100], [25, 25]), (10, [4, 4], [1, 1]), (251, [101, 100], [25, 25])]
)
def test_a_fifth_of_either_class_is_for_testing(examples, train, test, tensors):
    benchmark = SineBoundary(2, examples=examples, seed=0)
    for stream, sizes in ((benchmark.train_stream, train), (benchmark.test_stream, test)):
        for experience in stream:
            assert torch.bincount(tensors(experience)[1]).tolist() == sizes


def test_training_and_test_points_are_different(tensors):
    benchmark = SineBoundary(2, seed=0)
    for train, test in zip(benchmark.train_stream, benchmark.test_stream, strict=True):
        assert not {tuple(x) for x in tensors(train)[0].tolist()} & {tuple(x) for x in tensors(test)[0].tolist()}


def test_experiences_know_their_place_classes_and_task(tensors):
    benchmark = SineBoundary(3, seed=0)
    assert benchmark.n_classes == 2
    for t, experience in enumerate(benchmark.train_stream):
        assert experience.current_experience == t
        assert experience.classes_in_this_experience == [0, 1]
        assert experience.task_labels == [0]
        assert list(experience.dataset.targets) == tensors(experience)[1].tolist()
        assert experience.dataset.eval()[0][0].dtype == torch.float32
        assert torch.equal(experience.dataset.eval()[0][0], experience.dataset.train()[0][0])


def test_the_same_seed_gives_the_same_points_and_another_seed_others(equal):
    assert equal(SineBoundary(2, seed=3), SineBoundary(2, seed=3))
    assert not equal(SineBoundary(2, seed=3), SineBoundary(2, seed=4))
    assert not equal(SineBoundary(2), SineBoundary(2))


@pytest.mark.usefixtures("random_states")
@pytest.mark.parametrize("seed", [0, None])
def test_global_random_states_stay_as_found(seed):
    SineBoundary(2, seed=seed)


@pytest.mark.parametrize("library", [pickle, dill])
def test_a_pickle_holds_the_points_once(library, equal):
    benchmark = SineBoundary(2, examples=5000, seed=0)
    packed = library.dumps(benchmark)
    assert equal(library.loads(packed), benchmark)
    assert len(packed) < 1_000_000  # 2 × 5000 × (2 × 4 + 8 bytes), and the lists of targets


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"n_experiences": 0}, "n_experiences >= 1; got 0"),
        ({"examples": 9}, "examples >= 10.*got 9"),
        ({"noise": -0.1}, ">= 0; got -0.1"),
        ({"noise": float("nan")}, "got nan"),
        ({"seed": []}, r"seed must be an integer of at least 0; got \[\]"),
    ],
)
def test_wrong_arguments_name_the_remedy(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        SineBoundary(**arguments)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (Naive, {}),
        (Cumulative, {}),
        (EWC, {"ewc_lambda": 1.0}),
        (Replay, {"mem_size": 10}),
        (LwF, {"alpha": 1.0, "temperature": 2.0}),
        (MAS, {}),
        (SynapticIntelligence, {"si_lambda": 1.0}),
    ],
)
def test_strategies_of_avalanche_train_and_evaluate_on_it(strategy, options):
    benchmark = SineBoundary(3, examples=20, seed=0)
    model = nn.Sequential(nn.Linear(2, 4), IncrementalClassifier(4, 2))
    learner = strategy(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=8,
        eval_mb_size=8,
        evaluator=EvaluationPlugin(strict_checks=True),
        **options,
    )
    for experience in benchmark.train_stream:
        learner.train(experience)
        learner.eval(benchmark.test_stream)
    assert learner.clock.train_exp_counter == 3
