import math

import pytest
import torch
from avalanche.models import MTSimpleMLP, MultiHeadClassifier
from torch import nn

from avalanche_curv import (
    GGN,
    L2,
    Accumulate,
    BlockDiagonal,
    Clip,
    CurvatureEWCPlugin,
    Dense,
    Eigenspace,
    Hessian,
    Merge,
    MitigatorPlugin,
    NonFiniteCurvatureError,
    OrthogonalProjectionPlugin,
    Refresh,
)


@pytest.mark.parametrize("strength", [-1.0, math.nan, math.inf, "1", None])
def test_strength_must_be_finite_and_not_negative(strength):
    with pytest.raises(ValueError, match=r"at least 0; got .* 0 only measures"):
        CurvatureEWCPlugin(strength)


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        ({"curvature": GGN}, r"curvature must be a Curvature; got .*GGN.* Did you mean GGN\(\)"),
        ({"structure": Dense}, r"Did you mean Dense\(\)"),
        ({"policy": Accumulate}, r"Did you mean Accumulate\(\)"),
        ({"curvature": "ggn"}, r"got 'ggn'. Give a value such as Fisher\(\)"),
        ({"structure": GGN()}, r"structure must be a Structure; got GGN\(\). Give a value such as Diagonal\(\)"),
        ({"policy": None}, r"Give a value such as Accumulate\(\)"),
    ],
)
def test_options_are_values_of_their_kind(option, remedy):
    with pytest.raises(TypeError, match=remedy):
        CurvatureEWCPlugin(1.0, **option)


def test_a_hessian_that_may_be_indefinite_warns_and_a_mended_one_does_not(recwarn):
    with pytest.warns(UserWarning, match=r"Use Hessian\(psd=Clip\(\)\)") as caught:
        CurvatureEWCPlugin(1.0, curvature=Hessian())
    assert caught[0].filename == __file__
    CurvatureEWCPlugin(1.0, curvature=Hessian(psd=Clip()))
    assert not recwarn


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def assert_refused_untrained(error, remedy, model, strategy, train, stream):
    before = weights(model)
    with pytest.raises(error, match=remedy):
        train(strategy, stream)
    assert torch.equal(weights(model), before)
    assert strategy.clock.train_iterations == 0


def test_an_unknown_criterion_is_refused_before_training(net, learner, train, plane):
    strategy = learner(net, CurvatureEWCPlugin(1.0), criterion=nn.CosineEmbeddingLoss())
    remedy = r"criterion CosineEmbeddingLoss cannot be called .* in two lines:\n    criterion = LossFunction\(lambda"
    assert_refused_untrained(ValueError, remedy, net, strategy, train, plane.train_stream)


@pytest.mark.parametrize(
    ("structure", "remedy"),
    [
        (Dense(max_bytes=1000), r"Dense\(\) on 27 parameters needs 2.8 KiB .* of 1000.0 B. Use .*BlockDiagonal\(\)"),
        (BlockDiagonal(max_bytes=100), r"largest block of 10 parameters.* needs .* Use .*or Diagonal\(\)"),
    ],
)
def test_a_matrix_over_its_limit_is_refused_before_the_first_step(structure, remedy, net, learner, train, plane):
    strategy = learner(net, CurvatureEWCPlugin(1.0, structure=structure))
    assert_refused_untrained(MemoryError, remedy, net, strategy, train, plane.train_stream)


@pytest.mark.parametrize(
    "build",
    [
        lambda: CurvatureEWCPlugin(1.0),
        lambda: OrthogonalProjectionPlugin(Eigenspace()),
        lambda: MitigatorPlugin(L2(0.1)),
    ],
)
def test_a_plugin_that_is_listed_twice_is_refused_before_training(build, net, learner, train, plane):
    plugin = build()
    with pytest.raises(ValueError, match=r"Plugin is in the plugins of the strategy 2 times.* List it once"):
        train(learner(net, plugin, plugin), plane.train_stream[:1])


def test_an_empty_experience_is_refused_before_training(net, learner, train, plane):
    experience = plane.train_stream[0]
    full = experience.dataset
    try:
        experience._dataset = full.subset([])
        remedy = "Experience 0 holds no examples.* Remove it from the stream"
        strategy = learner(net, CurvatureEWCPlugin(1.0))
        assert_refused_untrained(ValueError, remedy, net, strategy, train, [experience])
    finally:
        experience._dataset = full


def test_a_model_without_trainable_parameters_is_refused(net, learner, train, plane):
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    strategy = learner(net, CurvatureEWCPlugin(1.0))
    remedy = "Sequential has no trainable parameter.* Set requires_grad=True"
    assert_refused_untrained(ValueError, remedy, net, strategy, train, plane.train_stream)


def test_several_tasks_in_one_experience_of_a_multi_task_model_are_refused_before_training(
    make, digits, learner, train
):
    experience, other = digits(True).train_stream[:2]
    experience._dataset = experience.dataset.concat(other.dataset)
    model = make(lambda: MTSimpleMLP(input_size=64, hidden_size=3))
    model.classifier = MultiHeadClassifier(3, masking=False)
    strategy = learner(model, CurvatureEWCPlugin(1.0))
    remedy = r"Experience 0 carries the task labels \[0, 1\].* Give each task an experience of its own"
    assert_refused_untrained(ValueError, remedy, model, strategy, train, [experience])


@pytest.mark.parametrize("policy", [Accumulate(), Merge(), Refresh(0.5)])
def test_divergence_names_the_experience_and_keeps_the_last_good_model(policy, net, learner, train, plane_with_nan):
    ewc = CurvatureEWCPlugin(1.0, policy=policy)
    strategy = learner(net, ewc)
    train(strategy, plane_with_nan.train_stream[:1])
    good = ewc.past
    with pytest.raises(NonFiniteCurvatureError, match=r"Experience 1: .*NaN.*lower the learning rate.* kept in `past`"):
        train(strategy, plane_with_nan.train_stream[1:])
    assert ewc.past is good
    assert ewc.past.experiences == 1
    assert ewc.past.model.curvature.is_finite()


def test_divergence_of_a_multi_task_model_is_called_so(make, stream_of, learner, train):
    inputs = torch.rand(20, 64)
    benchmark = stream_of([(inputs, torch.arange(20) % 2), (inputs / 0, torch.arange(20) % 2)], [0, 1])
    model = make(lambda: MTSimpleMLP(input_size=64, hidden_size=3))
    with pytest.raises(NonFiniteCurvatureError, match="Experience 1"):
        train(learner(model, CurvatureEWCPlugin(1.0)), benchmark.train_stream)


@pytest.fixture
def plane_with_nan(plane, examples, stream_of):
    """The plane, with one input of the second experience missing."""
    pairs = [examples(experience) for experience in plane.train_stream]
    pairs[1][0][3, 0] = torch.nan
    return stream_of(pairs)
