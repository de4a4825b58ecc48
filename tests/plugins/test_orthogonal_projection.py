"""Orthogonal projection among Avalanche's strategies and plugins."""

import copy
import math
import warnings

import pytest
import torch
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.models import IncrementalClassifier
from avalanche.training.plugins import LRSchedulerPlugin, ReplayPlugin, SupervisedPlugin
from torch import nn

from avalanche_curv import (
    CurvatureEWCPlugin,
    Eigenspace,
    EmpiricalRisk,
    Energy,
    Fisher,
    FreezeUncovered,
    GradientProjection,
    InputSpace,
    LeaveUncovered,
    NonFiniteCurvatureError,
    OrthogonalProjection,
    OrthogonalProjectionPlugin,
    OutputGradient,
    PerLayer,
    Projector,
    ProtectedSpace,
    Rank,
    SequentialProjection,
    SpectralRegPlugin,
    StepProjection,
    load_checkpoint,
    save_checkpoint,
)
from avalanche_curv.core.projection import Protection
from avalanche_curv.core.projection.protection import TaskFindings

FAMILY = {
    "flat": Eigenspace(Fisher(), Rank(10)),
    "per layer": Eigenspace(Fisher(), Rank(3), PerLayer()),
    "inputs": InputSpace(Energy(0.9)),
    "outputs": Eigenspace(OutputGradient(), Rank(20), examples=20),
}


@pytest.fixture(params=["flat", "inputs"])
def protection(request):
    """One that holds nothing still, and one that does; `tests/core/projection` has all of the family."""
    return FAMILY[request.param]


def network():
    return nn.Sequential(
        nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 10)
    )


def adam(model):
    return torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)


class Drift(SupervisedPlugin):
    """Of every experience the leakage of all that training has changed into what was protected when it began."""

    def __init__(self, plugin):
        super().__init__()
        self.plugin, self.leaks = plugin, []

    def before_training_exp(self, strategy, **kwargs):
        self.space = self.plugin.protected
        self.start = {name: value.clone() for name, value in self.space.values(strategy.model).items()}

    def before_training_epoch(self, strategy, **kwargs):
        self.flags = [m.training for m in strategy.model.modules()]

    def after_training_epoch(self, strategy, **kwargs):
        if not self.space.is_empty:
            self.leaks.append(self.space.leakage(self.space.values(strategy.model), self.start))


@pytest.fixture
def projected(learner):
    """projected(model, protect, *others, ...) -> (strategy, plugin, drift)."""

    def build(model, protect, *others, uncovered=None, **options):
        plugin = OrthogonalProjectionPlugin(protect, uncovered=uncovered or FreezeUncovered())
        drift = Drift(plugin)
        return learner(model, *others, plugin, drift, **options), plugin, drift

    return build


class Clipping(SupervisedPlugin):
    def before_update(self, strategy, **kwargs):
        nn.utils.clip_grad_norm_(strategy.model.parameters(), 0.5)
        nn.utils.clip_grad_value_(strategy.model.parameters(), 0.02)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_training_stays_out_of_what_past_experiences_need(protection, make, projected, train, digits):
    """With momentum of before, weight decay and clipping, in float32, through BatchNorm and dropout."""
    model = make(network)
    strategy, plugin, drift = projected(model, protection, Clipping(), optimizer=adam(model), train_epochs=3)
    train(strategy, digits().train_stream)
    assert len(drift.leaks) == 6
    assert max(drift.leaks) <= 1e-6
    assert plugin.protected.experiences == 3


def test_it_keeps_more_of_the_past(make, learner, train, digits, examples):
    """Images of the first experience, after all three."""
    stream = digits().train_stream
    losses = {}
    inputs, targets = examples(stream[0])
    for plugins in ([], [OrthogonalProjectionPlugin(Eigenspace(cut=Rank(60)))]):
        model = make(lambda: nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)))
        train(learner(model, *plugins, train_epochs=4), stream)
        losses[len(plugins)] = nn.functional.cross_entropy(model(inputs), targets).item()
    assert losses[1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("recipe", "projection"),
    [("inputs", StepProjection()), ("flat", GradientProjection()), ("flat", SequentialProjection())],
)
def test_the_first_experience_is_that_of_naive_to_the_bit(recipe, projection, make, learner, train, digits):
    traces = []
    for plugins in ([], [OrthogonalProjectionPlugin(FAMILY[recipe], projection=projection)]):
        model = make(network)
        strategy = train(learner(model, *plugins, optimizer=adam(model)), digits().train_stream[:1], seed=1)
        traces.append([
            *model.state_dict().values(), torch.get_rng_state(), torch.tensor([m.training for m in model.modules()]),
            *(p.grad for p in model.parameters()),
            *(value for kept in strategy.optimizer.state.values() for value in kept.values()),
        ])  # fmt: skip
    assert all(map(torch.equal, *traces))


def test_with_an_empty_basis_all_training_is_that_of_naive(make, learner, train, digits):
    """With momentum, dropout and batch statistics, by a recipe that finds nothing."""

    class Nothing(Protection):
        def find(self, risk, experience):
            return TaskFindings([])

        def bounds(self, space):
            return {}

    models = [make(network) for _ in range(2)]
    plugin = OrthogonalProjectionPlugin(Nothing(), uncovered=LeaveUncovered())
    train(learner(models[0], optimizer=adam(models[0])), digits().train_stream)
    train(learner(models[1], plugin, optimizer=adam(models[1])), digits().train_stream)
    assert same(state(models[0]), state(models[1]))
    assert plugin.protected.is_empty
    assert plugin.protected.experiences == 3
    assert math.isnan(plugin.protected.energy)


def test_running_statistics_and_uncovered_parameters_hold_still_or_go_on(make, projected, train, digits):
    class Keeping(SupervisedPlugin):
        def after_training_exp(self, strategy, **kwargs):
            ends.append(state(strategy.model[1]))

    for uncovered, rests in ((FreezeUncovered(), True), (LeaveUncovered(), False)):
        ends = []
        model = make(network)
        strategy, plugin, drift = projected(
            model, InputSpace(), Keeping(), uncovered=uncovered, train_epochs=2, eval_every=1
        )
        stream = digits()
        for experience in stream.train_stream:
            strategy.train(experience, eval_streams=[stream.test_stream])
            assert all(m.training for m in model.modules())  # as before
        assert [name for name, flag in zip(dict(model.named_modules()), drift.flags) if not flag] == ["1"] * rests
        assert same(ends[0], ends[2]) == rests
        assert plugin.protected.held.names == (("1.weight", "1.bias") if rests else ())
        assert plugin.protected.statistics == (("1",) if rests else ())


def test_an_embedding_and_a_norm_scale_hold_still_to_the_bit(make, learner, train, stream_of):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.norm, self.twice = nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 6)
            self.last = nn.Linear(6, 3)

        def forward(self, x):
            hidden = self.norm(self.words(x).mean(1))
            return self.last(torch.tanh(self.twice(torch.tanh(self.twice(hidden)))))

    generator = torch.Generator().manual_seed(0)
    stream = stream_of(
        [(torch.randint(9, (30, 4), generator=generator), torch.arange(30) % 3) for _ in range(3)]
    ).train_stream
    model = make(Words)
    plugin = OrthogonalProjectionPlugin(InputSpace(Energy(0.8)))
    strategy = train(learner(model, plugin, optimizer=adam(model)), stream[:1])
    before = state(model)
    train(strategy, stream[1:])
    moved = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert moved == {"last.weight", "last.bias"}
    assert {*plugin.protected.held.names} == {*before} - moved


def test_growing_heads_keep_old_directions_protected_and_new_parameters_free(
    protection, growing, learner, projected, recorder, train
):
    """The first step of the second experience is Naive's in what is new, and projected in what is old."""
    model, stream = growing()
    plain = train(learner(copy.deepcopy(model), recorder), stream.train_stream[:1])
    shapes = {name: p.shape for name, p in plain.model.named_parameters()}
    train(plain, stream.train_stream[1:2], seed=1)
    strategy, plugin, drift = projected(model, protection, recorder)
    for number, experience in enumerate(stream.train_stream):
        train(strategy, [experience], seed=number)
    assert max(drift.leaks) <= 2e-6
    assert plugin.protected.tasks == (0, 1, 2)
    naive, own = (state(recorder.steps[number]) for number in (3, 9))
    new = old = 0
    for name, value in own.items():
        old_part = torch.zeros_like(value, dtype=torch.bool)
        if name in shapes:
            old_part[tuple(slice(n) for n in shapes[name])] = True
        same_part = value == naive[name]
        assert same_part[~old_part].all()
        new, old = new + int((~old_part).sum()), old + int((~same_part).sum())
    assert new > 0
    assert old > 10
    assert shapes.keys() <= own.keys()


def growing_learner(make, protect, projection=StepProjection()):  # noqa: B008
    model = make(lambda: nn.Sequential(
        nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), IncrementalClassifier(8)
    ))  # fmt: skip
    return OrthogonalProjection(
        model=model, optimizer=torch.optim.Adam(model.parameters(), 0.02), protect=protect, projection=projection,
        max_rank=None if isinstance(projection, SequentialProjection) else 25, train_mb_size=16,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "projection"),
    [("inputs", StepProjection()), ("flat", StepProjection()), ("flat", SequentialProjection())],
)
def test_a_resumed_run_ends_bit_identically(recipe, projection, tmp_path, digits, make):
    stream = digits()
    whole = growing_learner(make, FAMILY[recipe], projection)
    torch.manual_seed(0)
    for number, experience in enumerate(stream.train_stream):
        whole.train(experience)
        if number == 1:
            save_checkpoint(whole, tmp_path / "checkpoint.pkl")
    torch.manual_seed(99)
    resumed, done = load_checkpoint(growing_learner(make, FAMILY[recipe], projection), tmp_path / "checkpoint.pkl")
    assert done == 2
    for experience in stream.train_stream[done:]:
        resumed.train(experience)
    assert same(state(whole.model), state(resumed.model))
    one, other = whole.projection.protected, resumed.projection.protected
    assert (one.experiences, one.energy) == (other.experiences, other.energy)
    assert one.blocks.keys() == other.blocks.keys()
    for key, block in one.blocks.items():
        assert torch.equal(block.subspace.rows, other.blocks[key].subspace.rows)


def test_a_copy_of_the_strategy_goes_its_own_way(make, digits):
    stream = digits().train_stream
    strategy = growing_learner(make, FAMILY["flat"])
    strategy.train(stream[0])
    other = copy.deepcopy(strategy)
    other.train(stream[1])
    assert strategy.projection.protected.experiences == 1
    assert other.projection.protected.experiences == 2


def test_online_streams_join_at_the_ends_of_tasks(make, learner, plane, net):
    """Three parts a task: what it needs joins after its last part, of all of the task's examples."""
    plugin = OrthogonalProjectionPlugin(Eigenspace(cut=Rank(4)))
    strategy = learner(net, plugin, train_mb_size=4)
    counts = []
    for part in split_online_stream(plane.train_stream, 16, access_task_boundaries=True, seed=0):
        strategy.train(part)
        counts.append(plugin.protected.experiences)
    assert counts == [0, 0, 1, 1, 1, 2, 2, 2, 3]


def test_it_is_what_a_loop_of_ones_own_does(protection, make, learner, train, digits, examples):
    """A projector in a plain loop gives the same weights, bit for bit."""
    batches = []

    class Listing(SupervisedPlugin):
        def before_forward(self, strategy, **kwargs):
            batches[-1].append((strategy.mb_x.clone(), strategy.mb_y.clone()))

        def before_training_exp(self, strategy, **kwargs):
            batches.append([])

    def mlp():
        return nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))

    one, other = make(mlp), make(mlp)
    stream = digits().train_stream
    train(learner(one, OrthogonalProjectionPlugin(protection), Listing(), optimizer=adam(one)), stream)
    optimizer, space = adam(other), ProtectedSpace()
    for experience, task in zip(stream, batches):
        projector = Projector(space, StepProjection())
        for x, y in task:
            optimizer.zero_grad()
            nn.functional.cross_entropy(other(x), y).backward()
            with projector.around_step(other):
                optimizer.step()
        inputs, targets = examples(experience)
        space = space.absorb(EmpiricalRisk.snapshot(other, nn.CrossEntropyLoss(), [(inputs, targets)]), protection)
    assert same(state(one), state(other))


@pytest.mark.parametrize("last", [True, False])
def test_it_composes_with_penalties_replay_schedules_and_spectral_norms(last, make, learner, train, digits):
    """In either order; the drift stays out of the protected space, and the others do their work."""
    model = make(network)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    ewc, spectral = CurvatureEWCPlugin(1.0), SpectralRegPlugin(1e-2)
    schedule = LRSchedulerPlugin(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
    others = [ReplayPlugin(mem_size=40), ewc, spectral, schedule]
    plugin = OrthogonalProjectionPlugin(Eigenspace(cut=Rank(10)))
    drift = Drift(plugin)
    order = [*others, plugin, drift] if last else [plugin, *others, drift]
    strategy = learner(model, *order, optimizer=optimizer, train_epochs=2)
    train(strategy, digits().train_stream)
    assert max(drift.leaks) <= 1e-6
    assert ewc.past.experiences == 3
    assert len(others[0].storage_policy.buffer) == 40


def test_what_plugins_before_it_do_after_the_update_is_taken_out_too(make, learner, train, digits):
    class Pushing(SupervisedPlugin):
        def after_update(self, strategy, **kwargs):
            with torch.no_grad():
                for parameter in strategy.model.parameters():
                    parameter.add_(0.01)

    def leaks(*order):
        model = make(network)
        plugin = OrthogonalProjectionPlugin(Eigenspace(cut=Rank(10)))
        drift = Drift(plugin)
        plugins = {"own": plugin, "push": Pushing()}
        train(learner(model, *(plugins[name] for name in order), drift, train_epochs=2), digits().train_stream)
        return drift.leaks

    assert max(leaks("push", "own")) <= 1e-6
    assert min(leaks("own", "push")) > 1e-2  # of one that comes after it, nothing is seen


def test_a_parameter_that_is_frozen_between_experiences_stays(protection, make, projected, train, digits):
    model = make(network)
    strategy, _, drift = projected(model, protection)
    stream = digits().train_stream
    train(strategy, stream[:1])
    model[0].weight.requires_grad_(False)
    before = model[0].weight.detach().clone()
    train(strategy, stream[1:2])
    assert torch.equal(model[0].weight, before)
    model[0].weight.requires_grad_(True)
    train(strategy, stream[2:])
    assert max(drift.leaks) <= 1e-6
    assert not torch.equal(model[0].weight, before)


def test_the_strategy_takes_the_options_of_the_plugin(make):
    model = make(network)
    strategy = OrthogonalProjection(
        model=model, optimizer=adam(model), protect=InputSpace(), projection=GradientProjection(), max_rank=7,
        train_epochs=3,
    )
    assert (strategy.projection.protect, strategy.projection.projection) == (InputSpace(), GradientProjection())
    assert (strategy.projection.max_rank, strategy.train_epochs) == (7, 3)
    assert strategy.projection in strategy.plugins


class Mixing(nn.Module):
    """Two layers whose inputs are known, a norm, and a tensor of its own: 20 + 16 parameters with directions, 12
    without."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 2)
        self.token = nn.Parameter(torch.ones(4))

    def forward(self, inputs):
        return self.head(self.norm(self.embed(inputs).tanh() + self.token))


def test_what_the_default_cannot_cover_is_said_before_the_first_step_with_the_remedy(make, learner, train, plane):
    remedy = r"InputSpace knows no directions of 12 of the 34 parameters.*: norm.weight, norm.bias, token\. .*" \
        r"protect=Eigenspace\(\) .*LeaveUncovered\(\)"
    held, before = learner(make(Mixing), OrthogonalProjectionPlugin()), state(make(Mixing))
    remedies = {"protect": Eigenspace()}, {"uncovered": LeaveUncovered()}
    covered = [learner(make(Mixing), OrthogonalProjectionPlugin(**remedied)) for remedied in remedies]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(RuntimeError, match=remedy):
            train(held, plane.train_stream)
        for strategy in covered:
            train(strategy, plane.train_stream[:2])
    assert same(before, state(held.model))
    with pytest.warns(UserWarning, match=remedy) as said:
        train(held, plane.train_stream)
    assert len([one for one in said if "InputSpace" in str(one.message)]) == 1


# Errors


@pytest.mark.parametrize(
    ("options", "error", "remedy"),
    [
        ({"protect": Eigenspace}, TypeError, r"protect must be a Protection; got .*Did you mean Eigenspace\(\)"),
        ({"projection": None}, TypeError, r"projection must be a Projection; got None.*StepProjection\(\)"),
        ({"uncovered": StepProjection()}, TypeError, r"uncovered must be an Uncovered; got StepProjection\(\)"),
        ({"max_rank": 0}, ValueError, "max_rank must be an integer of at least 1; got 0"),
        ({"projection": SequentialProjection(), "max_rank": 5}, ValueError, r"Leave max_rank out, or use Step"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, error, remedy):
    with pytest.raises(error, match=remedy):
        OrthogonalProjectionPlugin(**options)


class Searching(torch.optim.SGD):
    """An optimiser of one's own that needs the loss several times."""

    def step(self, closure):
        return super().step(closure)


def assert_refused_untrained(error, remedy, strategy, train, stream):
    before = state(strategy.model)
    with pytest.raises(error, match=remedy):
        train(strategy, stream)
    assert same(before, state(strategy.model))
    assert all(m.training for m in strategy.model.modules())


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, Searching])
@pytest.mark.parametrize("scheduled", [False, True])
def test_optimisers_that_need_a_closure_are_refused(kind, scheduled, net, learner, train, plane):
    optimizer = kind(net.parameters(), lr=0.1)
    if scheduled:  # which wraps `step`
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    strategy = learner(net, OrthogonalProjectionPlugin(), optimizer=optimizer)
    remedy = rf"{kind.__name__} needs a closure.* Use SGD, Adam, AdamW or the like"
    assert_refused_untrained(TypeError, remedy, strategy, train, plane.train_stream)


def test_a_criterion_that_the_recipe_cannot_use_is_refused_before_training(net, learner, train, plane):
    criterion = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0]))
    strategy = learner(net, OrthogonalProjectionPlugin(Eigenspace()), criterion=criterion)
    assert_refused_untrained(ValueError, "likelihood", strategy, train, plane.train_stream)  # which a Fisher needs
    train(learner(net, OrthogonalProjectionPlugin(), criterion=criterion), plane.train_stream[:1])


def test_an_empty_experience_is_refused_before_training(net, learner, train, plane):
    experience = plane.train_stream[0]
    full = experience.dataset
    try:
        experience._dataset = full.subset([])
        strategy = learner(net, OrthogonalProjectionPlugin())
        assert_refused_untrained(ValueError, "Experience 0 holds no examples", strategy, train, [experience])
    finally:
        experience._dataset = full


def test_a_basis_over_its_limit_is_refused_before_the_experience_and_the_past_is_kept(net, learner, train, plane):
    """27 parameters: 20 directions of float32 take 2.1 KiB, and their share 3.3 KiB."""
    refused = OrthogonalProjectionPlugin(Eigenspace(), max_bytes=2000)
    remedy = r"may need 5.4 KiB, over their limit of 2.0 KiB; they hold 0.0 B now. .*max_rank=.*or raise max_bytes"
    assert_refused_untrained(MemoryError, remedy, learner(net, refused), train, plane.train_stream)
    plugin = OrthogonalProjectionPlugin(Eigenspace(cut=Rank(10)), max_bytes=2200)
    strategy = learner(net, plugin)
    train(strategy, plane.train_stream[:1])
    space = plugin.protected
    assert_refused_untrained(MemoryError, "After this experience", strategy, train, plane.train_stream[1:])
    assert plugin.protected is space
    assert space.experiences == 1


@pytest.mark.parametrize(("protect", "place"), zip([*FAMILY.values(), InputSpace(Rank(2))], [0, 3, 17, 0, 3]))
def test_divergence_names_the_experience_and_keeps_what_was_protected(
    protect, place, net, learner, train, plane, examples, stream_of
):
    pairs = [examples(experience) for experience in plane.train_stream]
    pairs[1][0][place, 0] = torch.nan
    stream = stream_of(pairs).train_stream
    plugin = OrthogonalProjectionPlugin(protect)
    strategy = learner(net, plugin)
    train(strategy, stream[:1])
    good = plugin.protected
    with pytest.raises(
        NonFiniteCurvatureError, match=r"Experience 1: .*NaN.*the 1 experiences before .* kept in `protected`"
    ):
        train(strategy, stream[1:2])
    assert plugin.protected is good
    assert good.experiences == 1


def test_gradients_of_true_outputs_need_classes(make, learner, train, regression):
    model = make(lambda: nn.Linear(3, 2)).double()
    plugin = OrthogonalProjectionPlugin(Eigenspace(OutputGradient(), Rank(5)))
    strategy = learner(model, plugin, criterion=nn.MSELoss())
    with pytest.raises(TypeError, match=r"OutputGradient needs one class.* Use GGN\(\)"):
        train(strategy, regression.train_stream)
