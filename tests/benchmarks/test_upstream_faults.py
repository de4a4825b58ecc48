"""What the notes of the tables say of Avalanche's strategies, shown; and that the rest of each is as in its paper."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

FRACTION, IMAGES = 0.25, 32


@pytest.fixture(scope="module")
def stream(stream_of):
    """Two experiences of two classes each in the plane."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, IMAGES, 2, generator=generator)
    targets = torch.randint(2, (2, IMAGES), generator=generator)
    return stream_of([(inputs[0], targets[0]), (inputs[1] + 1, 2 + targets[1])])


@pytest.fixture
def fit(make, learner, train, stream):
    """fit(*plugins, ...) -> a strategy trained on both experiences in batches of 8."""

    def trained(*plugins, model=None, epochs=3, **options):
        model = model or make(lambda: nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 4)))
        strategy = learner(model, *plugins, train_mb_size=8, train_epochs=epochs, **options)
        return train(strategy, stream.train_stream, eval_streams=[])

    return trained


@pytest.fixture
def at(fit):
    """at(hook, look, *plugins, ...) -> what `look(strategy)` gave at each call of a hook, in a training."""
    from avalanche.training.plugins import SupervisedPlugin

    def seen(hook, look, *plugins, **options):
        watcher, found = SupervisedPlugin(), []
        setattr(watcher, hook, lambda strategy, **kwargs: found.append(look(strategy)))
        fit(*plugins, watcher, **options)
        return found

    return seen


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def weights(strategy):
    return flat(strategy.model.parameters())


def test_ewc_squares_the_gradients_of_mini_batch_means(fit, stream):
    from avalanche.training.plugins import EWCPlugin

    plugin = EWCPlugin(0.0)
    strategy = fit(plugin)
    inputs, targets, *_ = zip(*stream.train_stream[1].dataset)
    batches = zip(torch.stack(inputs).split(8), torch.tensor(targets).split(8))
    parameters = list(strategy.model.parameters())
    squares = [
        flat(torch.autograd.grad(cross_entropy(strategy.model(x), y), parameters)) ** 2 for x, y in batches
    ]
    found = flat(importance.data for importance in plugin.importances[1].values())
    torch.testing.assert_close(found, torch.stack(squares).mean(0))


def test_mas_takes_a_loss_of_zero_for_none_and_ours_does_not_but_trains_alike(fit):
    from avalanche.training.plugins import MASPlugin

    from benchmarks.methods import MAS

    class Zero(nn.Module):
        def forward(self, outputs, targets):
            return 0 * outputs.sum()

    with pytest.raises(ValueError, match="Loss is not available"):
        fit(MASPlugin(0.1), criterion=Zero())
    fit(*MAS(0.1).plugins(0), criterion=Zero())
    assert torch.equal(weights(fit(*MAS(0.1).plugins(0))), weights(fit(MASPlugin(0.1))))


def test_rwalk_trains_in_eval_mode_and_is_nan_after_few_steps_where_ours_is_not(fit, at):
    from avalanche.training.plugins import RWalkPlugin

    from benchmarks.methods import RWalk

    assert at("after_forward", lambda strategy: strategy.model.training, RWalkPlugin()).count(True) == 0
    assert not torch.isfinite(weights(fit(RWalkPlugin(), epochs=1))).all()
    assert torch.isfinite(weights(fit(*RWalk(0.1).plugins(0), epochs=1))).all()
    assert torch.equal(weights(fit(*RWalk(0.1).plugins(0))), weights(fit(RWalkPlugin(0.1))))


def test_lwf_distils_the_old_classes_of_a_teacher_that_stays_in_train_mode(fit, make):
    from avalanche.training.plugins import LwFPlugin

    plugin = LwFPlugin(alpha=2.0, temperature=2)
    strategy = fit(plugin, epochs=1)
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    outputs = strategy.model(x) + torch.arange(4.0)
    teacher, student = softmax(strategy.model(x) / 2, 1), log_softmax(outputs / 2, 1)  # all four classes are old now
    expected = 2 * kl_div(student, teacher, reduction="batchmean")
    torch.testing.assert_close(plugin.lwf(x, outputs, strategy.model), expected)
    noise = LwFPlugin()
    fit(noise, model=make(lambda: nn.Sequential(nn.Linear(2, 5), nn.Dropout(0.5), nn.Linear(5, 4))))
    assert not torch.equal(noise.lwf.prev_model(x), noise.lwf.prev_model(x))


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_gem_takes_the_nearest_step_that_does_not_oppose_the_past_and_keeps_a_fraction_of_each_experience(fit, margin):
    from benchmarks.methods import GEM

    *before, plugin = GEM(margin, FRACTION).plugins(0)
    fit(*before, plugin)
    assert [len(memory) for memory in plugin.memory_x.values()] == [8, 8]
    past, gradient = torch.tensor([3.0, 4.0]), torch.tensor([1.0, -1.0])
    plugin.G = past[None]
    dual = max(margin, -(past @ gradient).item() / (25 + 1e-3))  # damped by 1e-3, as the authors' own
    torch.testing.assert_close(plugin.solve_quadprog(gradient), gradient + dual * past)


def test_agem_never_opposes_its_reference_gradient_and_keeps_a_fraction_of_each_experience(at):
    from benchmarks.methods import AGEM

    *before, plugin = AGEM(FRACTION).plugins(0)

    def cosine(strategy):
        if not plugin.buffers:
            return 0.0
        gradient = flat(p.grad for p in strategy.model.parameters())
        return torch.cosine_similarity(gradient, plugin.reference_gradients, dim=0).item()

    found = at("after_backward", cosine, *before, plugin)
    assert min(found) > -1e-6
    assert [len(buffer) for buffer in plugin.buffers] == [8, 8]


def test_der_replays_nothing_while_its_memory_is_smaller_than_the_batch(at):
    from avalanche.training import DER

    def sizes(memory):
        return set(at("after_forward", lambda strategy: len(strategy.mb_x), kind=DER, mem_size=memory))

    assert sizes(7) == {8}
    assert sizes(8) == {8, 16}


def test_icarl_averages_a_class_over_its_images_and_their_mirror_images():
    from types import SimpleNamespace

    from avalanche.training.supervised.icarl import _ICaRLPlugin

    plugin = _ICaRLPlugin(4, None, True)
    image = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    plugin.x_memory, plugin.y_memory, plugin.embedding_size = [image], [[0]], 4
    classifier = SimpleNamespace(replace_class_means_dict=lambda means: None)
    model = SimpleNamespace(feature_extractor=nn.Flatten(), eval_classifier=classifier)
    benchmark = SimpleNamespace(n_classes_per_exp=[1, 1])
    experience = SimpleNamespace(benchmark=benchmark)
    plugin.compute_class_means(SimpleNamespace(experience=experience, device="cpu", model=model))
    half = 0.5**0.5
    torch.testing.assert_close(plugin.class_means[0], torch.tensor([half, half, 0.0, 0.0]))
    assert plugin.class_means[1].norm() == 0
