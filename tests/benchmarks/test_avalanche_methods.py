"""Avalanche's strategies are as in their papers but for what the notes of the tables say (tests/upstream), and those of
ours that mend one of them train as it does where it works."""

import pytest
import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax, softmax

FRACTION = 0.25


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def weights(strategy):
    return flat(strategy.model.parameters())


def test_mas_trains_as_avalanches_does_and_at_a_loss_of_zero_too(fit_pairs):
    from avalanche.training.plugins import MASPlugin

    from benchmarks.methods import MAS

    class Zero(nn.Module):
        def forward(self, outputs, targets):
            return 0 * outputs.sum()

    fit_pairs(*MAS(0.1).plugins(0), criterion=Zero())
    assert torch.equal(weights(fit_pairs(*MAS(0.1).plugins(0))), weights(fit_pairs(MASPlugin(0.1))))


def test_rwalk_trains_as_avalanches_does_and_in_few_steps_too(fit_pairs):
    from avalanche.training.plugins import RWalkPlugin

    from benchmarks.methods import RWalk

    assert torch.isfinite(weights(fit_pairs(*RWalk(0.1).plugins(0), epochs=1))).all()
    assert torch.equal(weights(fit_pairs(*RWalk(0.1).plugins(0))), weights(fit_pairs(RWalkPlugin(0.1))))


def test_lwf_distils_the_old_classes(fit_pairs):
    from avalanche.training.plugins import LwFPlugin

    plugin = LwFPlugin(alpha=2.0, temperature=2)
    strategy = fit_pairs(plugin, epochs=1)
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    outputs = strategy.model(x) + torch.arange(4.0)
    teacher, student = softmax(strategy.model(x) / 2, 1), log_softmax(outputs / 2, 1)  # all four classes are old now
    expected = 2 * kl_div(student, teacher, reduction="batchmean")
    torch.testing.assert_close(plugin.lwf(x, outputs, strategy.model), expected)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_gem_takes_the_nearest_step_that_does_not_oppose_the_past_and_keeps_a_fraction_of_each_experience(
    fit_pairs, margin
):
    from benchmarks.methods import GEM

    *before, plugin = GEM(margin, FRACTION).plugins(0)
    fit_pairs(*before, plugin)
    assert [len(memory) for memory in plugin.memory_x.values()] == [8, 8]
    past, gradient = torch.tensor([3.0, 4.0]), torch.tensor([1.0, -1.0])
    plugin.G = past[None]
    dual = max(margin, -(past @ gradient).item() / (25 + 1e-3))  # damped by 1e-3, as the authors' own
    torch.testing.assert_close(plugin.solve_quadprog(gradient), gradient + dual * past)


def test_agem_never_opposes_its_reference_gradient_and_keeps_a_fraction_of_each_experience(seen_at):
    from benchmarks.methods import AGEM

    *before, plugin = AGEM(FRACTION).plugins(0)

    def cosine(strategy):
        if not plugin.buffers:
            return 0.0
        gradient = flat(p.grad for p in strategy.model.parameters())
        return torch.cosine_similarity(gradient, plugin.reference_gradients, dim=0).item()

    found = seen_at("after_backward", cosine, *before, plugin)
    assert min(found) > -1e-6
    assert [len(buffer) for buffer in plugin.buffers] == [8, 8]
