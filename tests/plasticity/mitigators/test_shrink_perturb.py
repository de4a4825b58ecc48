import copy
import pickle

import pytest
import torch
from torch import nn

from avalanche_curv import AfterTask, EveryStep, EverySteps, ShrinkAndPerturb


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.0)


@pytest.fixture
def model(make):
    return make(lambda: nn.Sequential(nn.Linear(40, 90), nn.LayerNorm(90), nn.ReLU(), nn.Linear(90, 10)))


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(before, model):
    return {name for name, value in values(model).items() if not torch.equal(before[name], value)}


def steps(mitigator, model, n):
    optimizer = sgd(model)
    with mitigator.attach(optimizer, model):
        for _ in range(n):
            optimizer.step()


def test_shrinking_draws_everything_to_zero_but_norm_scales_to_one(model):
    with torch.no_grad():
        model[1].weight.fill_(3.0)
        model[1].bias.fill_(2.0)
    before = values(model)
    steps(ShrinkAndPerturb(0.25, 0.0), model, 1)
    for name, value in values(model).items():
        expected = 1 + 0.75 * (before[name] - 1) if name == "1.weight" else 0.75 * before[name]
        torch.testing.assert_close(value, expected)


LAYERS = {
    "linear": lambda: nn.Linear(100, 400),
    "convolution": lambda: nn.Conv2d(16, 200, 3),
    "transposed": lambda: nn.ConvTranspose2d(16, 200, 3),
    "attention": lambda: nn.MultiheadAttention(64, 4, add_bias_kv=True),
    "attention of other keys": lambda: nn.MultiheadAttention(64, 4, kdim=200, vdim=100),
    "LSTM": lambda: nn.LSTM(100, 10, proj_size=4),
    "GRU": lambda: nn.GRU(100, 20, bidirectional=True),
    "RNN cell": lambda: nn.RNNCell(100, 30),
    "Bilinear": lambda: nn.Bilinear(12, 200, 30),
    "grouped": lambda: nn.Conv2d(8, 32, 3, groups=4),
    "instance norm": lambda: nn.InstanceNorm2d(40, affine=True),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_starting_anew_is_starting_as_torch_does(layer, make):
    fresh = make(LAYERS[layer])
    noisy = copy.deepcopy(fresh)
    ShrinkAndPerturb(1.0, 1.0, when=AfterTask()).apply(noisy)
    for (name, ours), theirs in zip(noisy.named_parameters(), fresh.parameters()):
        if theirs.std() == 0:
            assert torch.equal(ours, theirs), name
        else:
            tolerance = 0.03 if theirs.numel() > 20_000 else 0.02 + 2.5 * theirs.numel() ** -0.5
            tolerance = min(tolerance, 0.15) if theirs.numel() >= 200 else tolerance
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=tolerance), name
            if theirs.numel() > 20_000:  # normal
                assert abs(ours.mean()) < 0.02 * ours.std()
                assert (ours / ours.std()).pow(4).mean().item() == pytest.approx(3.0, abs=0.15)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_layers_without_inputs_or_outputs_have_nothing_to_draw(make):
    model = make(lambda: nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3), nn.Conv2d(3, 2, 1)))
    steps(ShrinkAndPerturb(0.1, 0.1), model, 2)
    assert torch.equal(model[1].bias, torch.zeros(3))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.full((3,), 2.0)), nn.Parameter(torch.ones(3))
        self.temperature = nn.Parameter(torch.tensor(3.0))


def test_vectors_that_nothing_tells_about_and_slopes_are_left_alone():
    model = nn.Sequential(Scaled(), nn.PReLU(3), nn.Embedding(2, 2))
    before = values(model)
    steps(ShrinkAndPerturb(0.5, 1.0), model, 1)
    after = values(model)
    assert changed(before, model) == {"0.bias", "2.weight"}
    assert torch.equal(after["2.weight"], before["2.weight"] / 2)
    assert torch.equal(after["0.bias"], before["0.bias"] / 2)


def test_what_has_no_initial_spread_gets_no_noise(model):
    before = values(model)
    steps(ShrinkAndPerturb(0.0, 1.0), model, 3)
    assert changed(before, model) == {"0.weight", "0.bias", "3.weight", "3.bias"}


def test_the_initial_scale_is_kept_where_noise_is_the_root_of_twice_the_shrinking(make):
    layer = make(lambda: nn.Linear(100, 100))
    before = layer.weight.std().item()
    steps(ShrinkAndPerturb(0.05, 0.1**0.5), layer, 200)
    assert layer.weight.std().item() == pytest.approx(before, rel=0.05)


@pytest.mark.parametrize("when", [EveryStep(), EveryStep(reuse=1), EveryStep(reuse=4)])
def test_noise_of_different_steps_and_entries_is_uncorrelated(when, make):
    layer = make(lambda: nn.Linear(50, 60, bias=False))
    mitigator, drawn = ShrinkAndPerturb(1.0, 150**0.5, when=when), []
    for _ in range(400):
        mitigator.apply(layer)
        drawn.append(layer.weight.detach().flatten().clone())
    drawn = torch.stack(drawn)  # standard normal
    assert drawn.mean().item() == pytest.approx(0, abs=0.02)
    assert drawn.std().item() == pytest.approx(1, abs=0.02)
    for lag in (1, 2, 5, 64):
        assert (drawn[lag:] * drawn[:-lag]).mean(0).square().mean().item() == pytest.approx(1 / (400 - lag), rel=0.2)
        assert (drawn[lag:, 7:] * drawn[:-lag, :-7]).mean().abs() < 0.01
    assert (drawn[:, 1:] * drawn[:, :-1]).mean().abs() < 0.01
    assert len({tuple(row[:3].tolist()) for row in drawn}) == 400


def test_directions_of_noise_of_different_steps_are_uncorrelated_though_they_share_a_pool(make):
    """A window shares most of its numbers with the next: their sums would correlate at 2/3, but for the signs."""
    layer = make(lambda: nn.Linear(300, 300, bias=False))
    mitigator, sums = ShrinkAndPerturb(1.0, 900**0.5, when=EveryStep(reuse=8)), []
    for _ in range(500):
        mitigator.apply(layer)
        sums.append(layer.weight.detach().sum() / 300)
    sums = torch.stack(sums)  # standard normal
    assert sums.square().mean().item() == pytest.approx(1, abs=0.3)
    assert (sums[1:] * sums[:-1]).mean().abs() < 0.2


def test_it_comes_when_it_is_due(model):
    mitigator = ShrinkAndPerturb(0.5, 0.0, when=EverySteps(3))
    weight = model[0].weight.detach().clone()
    steps(mitigator, model, 2)
    assert torch.equal(model[0].weight, weight)
    steps(mitigator, model, 1)
    assert torch.equal(model[0].weight, weight / 2)
    mitigator.after_task(model, sgd(model))
    assert torch.equal(model[0].weight, weight / 2)
    task = ShrinkAndPerturb(0.5, 0.0, when=AfterTask())
    steps(task, model, 5)
    assert torch.equal(model[0].weight, weight / 2)
    task.after_task(model, sgd(model))
    assert torch.equal(model[0].weight, weight / 4)


def test_zero_of_both_changes_nothing_and_global_randomness_is_never_drawn(model):
    before, state = values(model), torch.get_rng_state()
    steps(ShrinkAndPerturb(0.0, 0.0), model, 3)
    assert not changed(before, model)
    steps(ShrinkAndPerturb(0.1, 0.1), model, 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_frozen_and_excluded_parameters_stay(model):
    model[0].weight.requires_grad_(False)
    before = values(model)
    steps(ShrinkAndPerturb(0.1, 0.1, exclude=(nn.LayerNorm, "3.bias")), model, 2)
    assert changed(before, model) == {"0.bias", "3.weight"}


@pytest.mark.parametrize("when", [EveryStep(reuse=4), EverySteps(2)])
@pytest.mark.parametrize("carry", [lambda m: m.state_dict(), lambda m: pickle.loads(pickle.dumps(m)).state_dict()])
def test_it_goes_on_bit_identically_and_another_seed_draws_otherwise(when, carry, model):
    mitigator = ShrinkAndPerturb(0.1, 0.1, when=when, seed=1)
    steps(mitigator, model, 3)
    others = [copy.deepcopy(model) for _ in range(2)]
    state = carry(mitigator)
    steps(mitigator, model, 6)
    for other, seed in zip(others, (1, 2)):
        again = ShrinkAndPerturb(0.1, 0.1, when=when, seed=seed)
        again.load_state_dict(state)
        steps(again, other, 6)
        assert torch.equal(other[0].weight, model[0].weight) == (seed == 1)


def test_layers_that_grow_are_perturbed_whole(model):
    mitigator = ShrinkAndPerturb(0.0, 0.1)
    steps(mitigator, model, 2)
    model[3] = nn.Linear(90, 14)
    before = values(model)
    steps(mitigator, model, 1)
    assert (values(model)["3.weight"] != before["3.weight"]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_dtypes_keep_them(dtype, model):
    model.to(dtype)
    before = values(model)
    steps(ShrinkAndPerturb(0.1, 0.1), model, 2)
    for name, p in model.named_parameters():
        assert p.dtype == dtype
        assert torch.isfinite(p).all()
        assert name.startswith("1.") or not torch.equal(before[name], p)
