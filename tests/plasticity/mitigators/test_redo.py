import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.modules import module as hooks

from avalanche_curv.plasticity.mitigators.redo import ReDO

DEAD = [1, 4]


def kill(layer, units):
    """Units that no input activates: weights 0, bias negative."""
    with torch.no_grad():
        for unit in units:
            layer.weight[unit] = 0
            layer.bias[unit] = -1


def with_dead_units(model, first):
    """All units of the layers behind the first are alive."""
    with torch.no_grad():
        for layer in model[first + 1 :]:
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.bias += 1
    kill(model[first], DEAD)
    return model


def perceptron():
    return with_dead_units(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)), 0)


def images():
    model = nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)), nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3),
    )  # fmt: skip
    return with_dead_units(model, 1)


def flattened():
    model = nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)), nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 3)
    )
    return with_dead_units(model, 1)


def batch(model):
    width = 6 if isinstance(model[0], nn.Linear) else 36
    generator = torch.Generator().manual_seed(0)
    return torch.randn(20, width, generator=generator), torch.arange(20) % 3


def step(model, optimizer):
    inputs, targets = batch(model)
    optimizer.zero_grad()
    cross_entropy(model(inputs), targets).backward()
    optimizer.step()


def still(model):
    """An optimiser that moves nothing."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


def recycled(model, inputs=None, threshold=0.0, optimizer=None, **options):
    """The mitigator after one step that has seen the inputs and moves nothing."""
    redo, optimizer = ReDO(threshold, every=1, **options), optimizer or still(model)
    with redo.attach(optimizer, model):
        if inputs is None:
            step(model, optimizer)
        else:
            model(inputs).sum().backward()
            optimizer.step()
    return redo


@pytest.mark.parametrize(("build", "name", "reader"), [(perceptron, 0, 2), (images, 1, 3), (flattened, 1, 5)])
def test_silent_units_are_recycled_and_the_function_stays(build, name, reader, make):
    model = make(build)
    inputs, _ = batch(model)
    before, old = model(inputs), copy.deepcopy(model)
    redo = recycled(model)
    assert torch.equal(model(inputs), before)
    assert {layer: n for layer, n in redo.recycled.items() if n} == {str(name): 2}
    weight, bound = model[name].weight, model[name].weight[0].numel() ** -0.5
    for unit in range(8):
        assert torch.equal(weight[unit], old[name].weight[unit]) == (unit not in DEAD)
        assert (model[name].bias[unit] == old[name].bias[unit]) == (unit not in DEAD)
    drawn = weight[DEAD].flatten()
    assert 0.5 * bound < drawn.abs().max() < bound
    assert model[name].bias[DEAD].abs().max() < bound
    leaving = model[reader].weight.view(model[reader].weight.shape[0], 8, -1)
    former = old[reader].weight.view(leaving.shape)
    for unit in range(8):
        assert torch.equal(leaving[:, unit], torch.zeros_like(leaving[:, unit]) if unit in DEAD else former[:, unit])


@pytest.mark.parametrize(("build", "name", "reader"), [(perceptron, 0, 2), (images, 1, 3)])
def test_the_moments_of_what_is_recycled_start_anew_and_no_others(build, name, reader, make):
    model = make(build)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, amsgrad=True)
    with torch.no_grad():
        kill(model[name], DEAD)
    step(model, optimizer)
    for kept in optimizer.state.values():
        for moment in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            kept[moment] += 1
    recycled(model, optimizer=optimizer)
    for moment in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        entering, leaving = (optimizer.state[model[n].weight][moment] for n in (name, reader))
        assert not entering[DEAD].any()
        assert not optimizer.state[model[name].bias][moment][DEAD].any()
        assert not leaving[:, DEAD].any()
        assert (entering.flatten(1).abs().sum(1) > 0).sum() == 6
        assert (leaving.transpose(0, 1).flatten(1).abs().sum(1) > 0).sum() == 6


@pytest.mark.parametrize(("threshold", "count"), [(0.24, 0), (0.26, 1), (0.6, 2), (0.8, 3)])
def test_the_score_is_a_units_share_of_the_mean_activity(threshold, count):
    """Activities 1, 2, 3 and 10 have the mean 4: scores ¼, ½, ¾ and 2.5."""
    model = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([1.0, 2.0, 3.0, 10.0]))
    assert recycled(model, torch.randn(5, 1), threshold).recycled == {"0": count}


def test_a_layer_that_is_dead_as_a_whole_is_recycled_as_a_whole(make):
    model = make(perceptron)
    kill(model[0], range(8))
    assert recycled(model, threshold=0.1).recycled["0"] == 8
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_activities_that_are_no_numbers_recycle_nothing(make):
    assert not any(recycled(make(perceptron), torch.full((3, 6), float("nan")), 0.1).recycled.values())


def test_norm_layers_on_the_way_start_anew_for_recycled_units(make):
    def build():
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        with torch.no_grad():
            model[1].weight.fill_(2.0)
            model[1].bias.fill_(0.5)
            model[1].bias[DEAD] = -100.0
        return model

    model = make(build)
    inputs, _ = batch(model)
    before = model(inputs)
    recycled(model)
    assert torch.equal(model(inputs), before)
    assert model[1].weight.tolist() == [1.0 if unit in DEAD else 2.0 for unit in range(8)]
    assert model[1].bias.tolist() == [0.0 if unit in DEAD else 0.5 for unit in range(8)]


def test_it_recycles_every_n_steps_and_listens_only_before(make):
    gc.collect()
    model = make(perceptron)
    redo, optimizer = ReDO(0.0, every=3), still(model)
    with redo.attach(optimizer, model):
        for n in range(1, 8):
            assert len(hooks._global_forward_hooks) == (n % 3 == 0)
            assert bool(redo.recycled) == (n > 3)
            step(model, optimizer)
            kill(model[0], DEAD)
        assert redo.recycled["0"] == 4
    redo = ReDO(every=1)
    with redo.attach(optimizer, model):
        assert len(hooks._global_forward_hooks) == 1
    assert not hooks._global_forward_hooks


def test_only_passes_of_this_model_that_are_trained_on_count(make):
    model = make(perceptron)
    copied = copy.deepcopy(model)
    redo, optimizer = ReDO(0.0, every=1), still(model)
    with redo.attach(optimizer, model):
        with torch.no_grad():
            model(torch.full((1, 6), float("nan")))
        copied(torch.full((1, 6), float("nan")))
        copy.deepcopy(model)(torch.full((1, 6), float("nan")))
        step(model, optimizer)
    assert redo.recycled["0"] == 2


def test_gradients_may_be_accumulated_over_several_passes(make):
    model = make(perceptron)
    inputs, _ = batch(model)
    redo, optimizer = ReDO(0.0, every=1), still(model)
    with torch.no_grad():
        model[0].weight[0] = torch.tensor([1.0, 0, 0, 0, 0, 0])  # active for positive x₀ only
        model[0].bias[0] = 0
    with redo.attach(optimizer, model):
        for part in (inputs[inputs[:, 0] > 0], inputs[inputs[:, 0] <= 0]):
            model(part).sum().backward()
        optimizer.step()
    assert redo.recycled["0"] == 2


def test_snapshots_and_pickles_carry_no_hooks_and_nothing_stays_behind(make):
    gc.collect()
    model = make(perceptron)
    redo = ReDO(every=1)
    redo.prepare(model)
    assert len(hooks._global_forward_hooks) == 1
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in copy.deepcopy(model).modules())
    pickle.loads(pickle.dumps((model, redo)))
    del redo
    gc.collect()
    assert not hooks._global_forward_hooks


@pytest.mark.parametrize("cut", [2, 3])
def test_a_run_goes_on_bit_identically_also_from_the_step_before_it_recycles(cut, make):
    model = make(perceptron)
    redo, optimizer = ReDO(0.5, every=4, seed=1), torch.optim.Adam(model.parameters(), lr=0.01)
    redo.attach(optimizer, model)
    for _ in range(cut):
        step(model, optimizer)
    other, again = copy.deepcopy(model), ReDO(0.5, every=4, seed=1)
    resumed = torch.optim.Adam(other.parameters(), lr=0.01)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.attach(resumed, other)
    again.load_state_dict(copy.deepcopy(redo.state_dict()))
    for network, steps in ((model, optimizer), (other, resumed)):
        for _ in range(6):
            step(network, steps)
    assert again.recycled == redo.recycled
    assert redo.recycled["0"] >= 2
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_global_randomness_is_never_drawn_and_the_seed_decides(make):
    state, found = torch.get_rng_state(), []
    for seed in (1, 1, 2):
        model = make(perceptron)
        recycled(model, seed=seed)
        found.append(model[0].weight[DEAD])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("frozen", [0, 2])
def test_a_frozen_layer_is_touched_on_neither_side(frozen, make):
    model = make(perceptron)
    model[frozen].weight.requires_grad_(False)
    old = copy.deepcopy(model)
    recycled(model)
    assert torch.equal(model[0].weight, old[0].weight)
    assert torch.equal(model[2].weight, old[2].weight)


def test_where_no_layer_can_be_recycled_it_warns(make, recwarn):
    """Of '0' and '2' each weight, or one that reads it, is out of reach; with '2' and '4' there is one."""
    model = make(perceptron)
    ReDO(include=["2", "4"]).prepare(model)
    assert not recwarn
    message = r"ReDO recycles no unit of Sequential as it is: of each hidden layer \(0, 2\) its weight"
    with pytest.warns(UserWarning, match=message) as caught:
        ReDO(include=["2"]).prepare(model)
    assert [one.filename for one in caught] == [__file__]


def test_an_excluded_reader_is_not_touched(make):
    model = make(perceptron)
    old = copy.deepcopy(model)
    recycled(model, threshold=0.9, exclude=("4",))
    assert torch.equal(model[4].weight, old[4].weight)
    assert not torch.equal(model[0].weight, old[0].weight)


def test_what_is_recycled_and_what_is_not_is_said(make):
    redo = ReDO()
    redo.prepare(make(perceptron))
    assert redo.layers == ("0", "2")
    assert redo.left_alone == {"4": "its units are outputs of the model"}


def test_a_model_without_hidden_layers_is_refused_with_the_reasons():
    with pytest.raises(ValueError, match=r"Sequential has no hidden layer .*'0': its units are outputs of the model"):
        ReDO().prepare(nn.Sequential(nn.Linear(3, 2)))


def test_a_step_that_followed_no_training_pass_is_an_error(make):
    model = make(perceptron)
    optimizer = still(model)
    with ReDO(every=1).attach(optimizer, model), pytest.raises(RuntimeError, match="saw no training pass"):
        optimizer.step()


def two_readers(written, make):
    def forward(self, x):
        hidden = self.f(x)
        return self.p(hidden.relu()) + (self.v(hidden.tanh()) if self.both else 0)

    model = make(lambda: written(forward, f=nn.Linear(6, 8), p=nn.Linear(8, 3), v=nn.Linear(8, 3)))
    model.both = True
    return model


def test_a_unit_that_one_of_two_readers_gets_is_in_use(make, written):
    model = two_readers(written, make)
    kill(model.f, DEAD)  # −1 for the ReLU, which is 0, and for tanh, which is not
    with torch.no_grad():
        model.f.weight[5], model.f.bias[5] = 0, 0  # which both get as 0
    inputs = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    before = model(inputs)
    assert recycled(model, inputs).recycled == {"f": 1}
    torch.testing.assert_close(model(inputs), before)


def test_a_layer_with_a_reader_that_had_no_pass_is_not_recycled(make, written):
    model = two_readers(written, make)
    redo, optimizer = ReDO(0.0, every=1), still(model)
    redo.attach(optimizer, model)
    model.both = False
    model(torch.randn(5, 6)).sum().backward()
    with pytest.raises(RuntimeError, match="saw no training pass"):
        optimizer.step()


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, lambda n: nn.GroupNorm(2, n)])
def test_a_norm_over_another_axis_than_the_units_leaves_the_layer_alone(norm, make):
    """[n, 8, 6] → [n, 8, 8]: the norm takes the eight times for its features."""
    model = make(lambda: nn.Sequential(nn.Linear(6, 8), norm(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(),
                                       nn.Linear(8, 3)))  # fmt: skip
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(1, 2, 8))
        model[1].bias.copy_(torch.linspace(2, 1, 8))
        model[3].bias += 1
        kill(model[3], DEAD)
    inputs = torch.randn(20, 8, 6, generator=torch.Generator().manual_seed(0))
    before = model(inputs)
    redo = recycled(model, inputs)
    assert redo.recycled == {"3": 2}
    assert redo.layers == ("3",)
    assert redo.left_alone["0"] == "a norm layer on its way took another axis for its units"
    torch.testing.assert_close(model(inputs), before)


def test_a_model_whose_only_layer_turns_out_to_be_none_is_refused_then(make):
    model = make(lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)))
    with pytest.raises(ValueError, match="'0': a norm layer on its way took another axis"):
        recycled(model, torch.ones(5, 8, 6))


def test_readers_are_heard_that_are_called_by_keyword(make, written):
    model = make(lambda: written(lambda self, x: self.b(input=self.a(x).relu()), a=nn.Linear(6, 8), b=nn.Linear(8, 3)))
    kill(model.a, DEAD)
    assert recycled(model, torch.randn(20, 6, generator=torch.Generator().manual_seed(0))).recycled == {"a": 2}


OPTIMIZERS = {
    "Adadelta": torch.optim.Adadelta,
    "Adagrad": lambda p, lr: torch.optim.Adagrad(p, lr=lr, initial_accumulator_value=0.3),
    "Adamax": torch.optim.Adamax,
    "ASGD": lambda p, lr: torch.optim.ASGD(p, lr=lr, t0=0),
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr, momentum=0.9, centered=True),
    "Rprop": torch.optim.Rprop,
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "Adafactor": torch.optim.Adafactor,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whatever_torchs_optimisers_keep_of_recycled_entries_is_as_at_the_start(name, make):
    model = make(perceptron)
    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.01)
    for _ in range(5):
        step(model, optimizer)
    for kept in optimizer.state.values():
        for entries in kept.values():
            if entries.ndim:
                entries += 0.5
    bias, kill_at = model[0].bias, torch.tensor(DEAD)
    redo = ReDO(0.0, every=1)
    redo.prepare(model)
    kill(model[0], DEAD)
    model(batch(model)[0])
    redo.after_step(model, optimizer)
    starts = {"step_size": 0.01, "sum": 0.3}
    found = {which: entries for which, entries in optimizer.state[bias].items() if entries.ndim}
    assert redo.recycled["0"] == 2
    assert found
    for which, entries in found.items():
        expected = bias if which == "ax" else torch.full_like(bias, starts.get(which, 0.0))
        assert torch.equal(entries[kill_at], expected[kill_at])
        assert not torch.equal(entries[[0, 2, 3]], expected[[0, 2, 3]])


def test_gradients_of_single_examples_may_be_taken_while_it_listens():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer, x = torch.optim.SGD(model.parameters(), 0.1), torch.randn(5, 3)
    redo = ReDO(every=1)
    redo.attach(optimizer, model)
    model(x).sum().backward()
    torch.func.vmap(lambda one: torch.func.functional_call(model, dict(model.named_parameters()), (one,)))(x)
    optimizer.step()
    assert redo.steps == 1


NORMED = {"0": ["1", "3"], "3": "6"}


def normed():
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Dropout(0.0),
                          nn.Linear(5, 3))  # fmt: skip
    with torch.no_grad():
        model[1].bias[DEAD] = -100.0
        model[1].weight.fill_(2.0)
    return model


@pytest.mark.parametrize(
    ("build", "next_layers"),
    [
        (perceptron, {"0": "2", "2": ("4",)}),
        (normed, NORMED),
        (images, {"1": ["3"], "3": ["7"], "7": ["9"]}),
        (flattened, {"1": "5"}),
    ],
)
def test_named_layers_are_recycled_as_traced_ones_are(build, next_layers, make):
    traced, named = make(build), make(build)
    redos = []
    for model, options in ((traced, {}), (named, {"next_layers": next_layers})):
        redo, adam = ReDO(0.5, every=2, **options), torch.optim.Adam(model.parameters(), lr=0.01)
        with redo.attach(adam, model):
            for _ in range(4):
                step(model, adam)
        redos.append(redo)
    assert redos[0].graph.hidden == redos[1].graph.hidden
    assert redos[0].recycled == redos[1].recycled
    assert sum(redos[1].recycled.values()) >= 2
    assert all(map(torch.equal, traced.state_dict().values(), named.state_dict().values()))


def actor_critic(written, make):
    """Which torch.fx cannot trace: the scale of its input depends on values."""

    def forward(self, x):
        h = self.trunk(x / x.norm() if x.abs().max() > 10 else x).relu()
        h = self.norm(self.hidden(h)).relu()
        return torch.cat([self.policy(h), self.value(h)], dim=1)

    def build():
        return written(forward, trunk=nn.Linear(6, 8), hidden=nn.Linear(8, 7), norm=nn.BatchNorm1d(7),
                       policy=nn.Linear(7, 3), value=nn.Linear(7, 1))  # fmt: skip

    return make(build)


def test_a_model_that_cannot_be_traced_is_recycled_by_the_names_of_its_layers(written, make):
    model = actor_critic(written, make)
    with pytest.raises(ValueError, match=r"cannot be traced by torch.fx .* next_layers="):
        ReDO().prepare(model)
    kill(model.trunk, DEAD)
    with torch.no_grad():
        model.norm.weight.fill_(3.0)
        model.norm.bias[2] = -100.0
    inputs = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    before, old = model(inputs), copy.deepcopy(model.state_dict())
    redo = recycled(model, inputs, next_layers={"trunk": "hidden", "hidden": ["norm", "policy", "value"]})
    assert redo.layers == ("trunk", "hidden")
    assert redo.left_alone == dict.fromkeys(("policy", "value"), "next_layers does not name it")
    assert redo.recycled == {"trunk": 2, "hidden": 1}
    model.norm.running_mean.copy_(old["norm.running_mean"])
    torch.testing.assert_close(model(inputs), before)
    assert not model.hidden.weight[[0, 1, 3, 4, 5, 6]][:, DEAD].any()
    assert not model.policy.weight[:, 2].any()
    assert not model.value.weight[:, 2].any()
    assert (model.norm.weight == 3).tolist() == [unit != 2 for unit in range(7)]
    changed = (model.trunk.weight != old["trunk.weight"]).any(1)
    assert changed.nonzero().flatten().tolist() == DEAD


@pytest.mark.parametrize(
    ("next_layers", "error", "message"),
    [
        ({"trunk": "hiden"}, ValueError, "Written has no module 'hiden', .* one of .'hidden'"),
        ({"trunck": "hidden"}, ValueError, "no module 'trunck', .* one of .'trunk'"),
        ({"trunk": "policy"}, ValueError, "units of 'trunk' cannot .* its reader 'policy' mixes or regroups units"),
        ({"hidden": "norm"}, ValueError, "no linear layer or convolution among them reads its units"),
        ({"norm": "policy"}, ValueError, "since it is a BatchNorm1d, no linear layer or convolution"),
        ({"trunk": ["norm", "hidden"]}, ValueError, "the norm layer 'norm' does not take each unit for one feature"),
        ({"trunk": ""}, ValueError, "'' is a Written, no linear layer"),
        ({"trunk": "hidden", "hidden": "hidden"}, ValueError, "it reads its own units"),
        ({"trunk": "hidden", "other": "hidden"}, ValueError, "'hidden' behind several layers"),
        ({}, TypeError, "next_layers takes, for each hidden layer by name"),
        (["trunk", "hidden"], TypeError, r"such as {'fc1': \['fc2'\].*; got \['trunk', 'hidden'\]"),
        ({"trunk": 3}, TypeError, "got {'trunk': 3}"),
    ],
)
def test_names_that_do_not_fit_are_refused_with_the_remedy(next_layers, error, message, written, make):
    model = actor_critic(written, make)
    model.other = nn.Linear(6, 8)
    with pytest.raises(error, match=message):
        ReDO(next_layers=next_layers).prepare(model)
