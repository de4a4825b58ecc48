import copy

import pytest
import torch
from torch import nn

from avalanche_curv import SelfNormalizedResets
from avalanche_curv.plasticity.mitigators.self_normalized_resets import Silences

UNITS = 5


def relays(units=UNITS):
    """Units that pass their input on, so that a test says which are silent."""
    model = nn.Sequential(nn.Linear(units, units), nn.ReLU(), nn.Linear(units, 2))
    relay(model)
    return model


def relay(model):
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(len(model[0].weight)))
        model[0].bias.zero_()


def step(model, optimizer, firing):
    """A step on three examples: each unit that fires does so for the second of them alone."""
    inputs = -torch.ones(3, len(firing))
    inputs[1] = torch.tensor([1.0 if fires else -1.0 for fires in firing])
    optimizer.zero_grad()
    model(inputs).sum().backward()
    optimizer.step()


def still(model):
    return torch.optim.SGD(model.parameters(), lr=0.0)


def by_hand(patterns, rejection, every, longest):
    """The units that are reset at each step, from lists of runs."""
    silent, threshold, runs, found = [0] * UNITS, [longest] * UNITS, [[] for _ in range(UNITS)], []
    for number, firing in enumerate(patterns, 1):
        resets = set()
        for unit, fires in enumerate(firing):
            if fires:
                if silent[unit]:
                    runs[unit].append(silent[unit])
                silent[unit] = 0
            else:
                silent[unit] += 1
                if silent[unit] >= threshold[unit]:
                    resets.add(unit)
                    runs[unit].append(silent[unit])
                    silent[unit] = 0
        found.append(resets)
        if number % every == 0:
            for unit in range(UNITS):
                usual = 1
                while sum(run > usual for run in runs[unit]) > rejection * len(runs[unit]):
                    usual += 1
                threshold[unit] = min(longest, usual if usual < threshold[unit] else 2 * threshold[unit])
                runs[unit] = []
    return found, threshold


@pytest.mark.parametrize("rejection", [0.05, 0.3])
def test_units_are_reset_as_in_a_simulation_of_their_silent_runs(rejection, make):
    """Units that fire always, often, at times, in rare bursts, and never again after a while."""
    draw = torch.Generator().manual_seed(3)
    patterns = [
        [True, *(torch.rand(3, generator=draw) < torch.tensor([0.9, 0.5, 0.15])).tolist(), n < 70] for n in range(240)
    ]
    expected, thresholds = by_hand(patterns, rejection, every=40, longest=30)
    model = make(relays)
    resets, optimizer = SelfNormalizedResets(rejection, every=40, longest=30), still(model)
    with resets.attach(optimizer, model):
        for number, firing in enumerate(patterns):
            step(model, optimizer, firing)
            changed = (model[0].weight != torch.eye(UNITS)).any(1).nonzero().flatten().tolist()
            assert set(changed) == expected[number], number
            relay(model)
    assert resets._silences["0"].threshold.tolist() == thresholds
    assert resets.recycled["0"] == sum(map(len, expected)) > 20
    assert len({len([r for r in expected if unit in r]) > 0 for unit in (0, 4)}) == 2  # never the first, and the last


def test_a_reset_draws_what_enters_zeroes_what_leaves_and_clears_the_optimisers_state_of_both(make):
    model = make(relays)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, amsgrad=True)
    step(model, optimizer, [True] * UNITS)
    for kept in optimizer.state.values():
        for moment in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            kept[moment] += 1
    old = copy.deepcopy(model)
    resets = SelfNormalizedResets(longest=2)
    with resets.attach(optimizer, model):
        for _ in range(2):
            step(model, optimizer, [unit != 3 for unit in range(UNITS)])
    assert resets.recycled == {"0": 1}
    others = [0, 1, 2, 4]
    assert 0 < model[0].weight[3].abs().max() < UNITS**-0.5
    assert 0 < model[0].bias[3].abs() < UNITS**-0.5
    assert not model[2].weight[:, 3].any()
    for new, former in ((model[0].weight[others], old[0].weight[others]), (model[0].bias[others], old[0].bias[others]),
                        (model[2].weight[:, others], old[2].weight[:, others]), (model[2].bias, old[2].bias)):
        assert torch.equal(new, former)
    for moment in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        entering, bias, leaving = (
            optimizer.state[p][moment] for p in (model[0].weight, model[0].bias, model[2].weight)
        )
        assert not entering[3].any()
        assert not bias[3]
        assert not leaving[:, 3].any()
        assert (entering[others] > 0).any(1).all()
        assert (leaving[:, others] > 0).all()


def test_a_unit_that_has_fired_at_each_step_of_a_window_is_reset_at_its_first_silent_one(make):
    model = make(relays)
    resets, optimizer = SelfNormalizedResets(every=5, longest=9), still(model)
    with resets.attach(optimizer, model):
        for _ in range(5):
            step(model, optimizer, [True, True, True, True, False])
        assert resets.recycled == {}
        step(model, optimizer, [True, True, True, False, False])
        assert resets.recycled == {"0": 2}  # and that which was silent for the whole window


def test_with_several_readers_a_unit_is_silent_where_it_is_at_each_and_channels_over_all_positions(written, make):
    def forward(self, x):
        h = self.first(x).relu()
        return self.a(h).flatten(1).sum(1) + self.b(h).flatten(1).sum(1)

    layers = {"first": nn.Conv2d(1, 3, 1), "a": nn.Conv2d(3, 1, 1), "b": nn.Conv2d(3, 1, 2)}
    model = make(lambda: written(forward, **layers))
    with torch.no_grad():
        model.first.weight.fill_(1.0)
        model.first.bias.copy_(torch.tensor([0.0, -1.5, -3.5]))
    resets, optimizer = SelfNormalizedResets(longest=1), still(model)
    image = torch.zeros(2, 1, 3, 3)
    image[1, 0, 2, 2] = 2.0  # one position of one example, which the second channel sees and the third does not
    with resets.attach(optimizer, model):
        model(image).sum().backward()
        optimizer.step()
    assert resets.recycled == {"first": 1}
    assert (model.first.weight.flatten() != 1).tolist() == [False, False, True]


def test_activations_that_are_never_zero_are_never_reset(make):
    model = make(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)))
    resets, optimizer = SelfNormalizedResets(every=2, longest=2), torch.optim.SGD(model.parameters(), lr=0.1)
    with resets.attach(optimizer, model):
        for _ in range(6):
            step(model, optimizer, [False] * 4)
    assert resets.recycled == {}


@pytest.mark.parametrize("cut", [3, 4, 7])
def test_a_run_goes_on_bit_identically(cut, make):
    draw = torch.Generator().manual_seed(1)
    patterns = [(torch.rand(UNITS, generator=draw) < 0.5).tolist() for _ in range(16)]
    model, options = make(relays), {"every": 4, "longest": 3, "seed": 1}
    resets, optimizer = SelfNormalizedResets(0.3, **options), torch.optim.Adam(model.parameters(), lr=0.01)
    resets.attach(optimizer, model)
    for firing in patterns[:cut]:
        step(model, optimizer, firing)
    other, again = copy.deepcopy(model), SelfNormalizedResets(0.3, **options)
    resumed = torch.optim.Adam(other.parameters(), lr=0.01)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.attach(resumed, other)
    again.load_state_dict(copy.deepcopy(resets.state_dict()))
    for network, steps in ((model, optimizer), (other, resumed)):
        for firing in patterns[cut:]:
            step(network, steps, firing)
    assert again.recycled == resets.recycled
    assert resets.recycled["0"] >= 2
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    for ours, theirs in zip(vars(again._silences["0"]).values(), vars(resets._silences["0"]).values()):
        assert torch.equal(ours, theirs)


def test_units_that_a_layer_gains_are_new_and_a_smaller_layer_is():
    known = Silences(torch.tensor([2, 3]), torch.tensor([4, 5]), torch.tensor([[1, 2], [3, 4]], dtype=torch.int32))
    grown = Silences.of(torch.ones(3).bool(), 2, known)
    assert grown.silent.tolist() == [2, 3, 0]
    assert grown.threshold.tolist() == [4, 5, 2]
    assert grown.runs.tolist() == [[1, 2], [3, 4], [0, 0]]
    assert not Silences.of(torch.ones(1).bool(), 2, known).runs.any()
    assert Silences.of(torch.ones(2).bool(), 2, known) is known


def test_what_cannot_work_is_refused_with_the_remedy(make):
    for make_one, message in (
        (lambda: SelfNormalizedResets(0.0), "rejection must be a finite number, above 0, below 1"),
        (lambda: SelfNormalizedResets(1.0), "rejection must be a finite number, above 0, below 1"),
        (lambda: SelfNormalizedResets(every=0), "every must be an integer of at least 1"),
        (lambda: SelfNormalizedResets(longest=0), "longest must be an integer of at least 1"),
        (lambda: SelfNormalizedResets(seed=-1), "seed must be an integer from 0"),
        (lambda: SelfNormalizedResets().prepare(nn.Linear(2, 2)), "no hidden layer whose units can be recycled"),
    ):
        with pytest.raises(ValueError, match=message):
            make_one()
    model = make(relays)
    resets, optimizer = SelfNormalizedResets(), still(model)
    with resets.attach(optimizer, model), pytest.raises(RuntimeError, match="Resets saw no training pass"):
        optimizer.step()
