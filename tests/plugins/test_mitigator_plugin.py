import copy

import pytest
import torch
from torch import nn

from avalanche_curv import (
    FIRE,
    L2,
    AfterTask,
    CurvatureEWC,
    CurvatureEWCPlugin,
    DecoupledIsometry,
    EverySteps,
    L2Init,
    MitigatorPlugin,
    Parseval,
    ReDO,
    SelfNormalizedResets,
    ShrinkAndPerturb,
    SpectralRegularizer,
    StreamingEWC,
    Wasserstein,
    load_checkpoint,
    plasticity_metrics,
    save_checkpoint,
)

WEAK = {
    "L2": L2,
    "L2Init": L2Init,
    "Wasserstein": lambda strength: Wasserstein(strength, resort=4),
    "Parseval": Parseval,
    "StreamingEWC": lambda strength: StreamingEWC(strength, importance_decay=0.9, anchor_decay=0.9),
    "Spectral": lambda strength: SpectralRegularizer(strength, every=2),
    "ShrinkAndPerturb": lambda strength: ShrinkAndPerturb(strength, strength),
    "DecoupledIsometry": DecoupledIsometry,
}
STRONG = {
    **{name: lambda kind=kind: kind(0.03) for name, kind in WEAK.items()},
    "ShrinkAndPerturb every 3 steps": lambda: ShrinkAndPerturb(0.01, 0.01, when=EverySteps(3)),
    "ShrinkAndPerturb after tasks": lambda: ShrinkAndPerturb(0.3, 0.3, when=AfterTask()),
    "ReDO": lambda: ReDO(0.9, every=4),
    "SelfNormalizedResets": lambda: SelfNormalizedResets(0.5, every=2, longest=1),
    "FIRE": lambda: FIRE(0.5),
}


def deep():
    """With a hidden layer that ReDO recycles, batch statistics, dropout, and a head that grows."""
    from avalanche.models import IncrementalClassifier

    return nn.Sequential(
        nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 6), nn.ReLU(),
        IncrementalClassifier(6),
    )  # fmt: skip


def deep_heads():
    from avalanche.models import MTSimpleMLP

    model = MTSimpleMLP(input_size=64, hidden_size=6)
    model.features = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU())
    return model


def assert_same(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


@pytest.mark.parametrize("kind", WEAK)
def test_strength_zero_is_bit_identical_to_naive(kind, growing, learner, train):
    model, benchmark = growing()
    plain = train(learner(copy.deepcopy(model)), benchmark.train_stream)
    mitigated = train(learner(model, MitigatorPlugin(WEAK[kind](0.0))), benchmark.train_stream)
    assert_same(mitigated.model, plain.model)


@pytest.fixture(scope="module", params=[False, True], ids=["one growing head", "a head for each task"])
def beside(request, make, digits, learner, train):
    """(beside(*plugins) -> a strategy that they, replay and a penalty train; the parameters without others)."""
    from avalanche.training.plugins import ReplayPlugin

    def trained(*plugins):
        others = ReplayPlugin(mem_size=30), CurvatureEWCPlugin(0.1)
        model = make(deep_heads if request.param else deep)
        return train(learner(model, *plugins, *others), digits(request.param).train_stream)

    return trained, dict(trained().model.named_parameters())


@pytest.mark.parametrize("kind", STRONG)
def test_every_mitigator_trains_growing_models_beside_replay_and_a_penalty(kind, beside):
    trained, plain = beside
    mitigator = STRONG[kind]()
    strategy = trained(MitigatorPlugin(mitigator))
    ours = dict(strategy.model.named_parameters())
    assert ours.keys() == plain.keys()
    assert all(torch.isfinite(p).all() for p in ours.values())
    acted = bool(getattr(mitigator, "recycled", True))  # with one growing head no unit is silent for a whole step
    assert any(not torch.equal(p, ours[name]) for name, p in plain.items()) == acted
    assert mitigator.steps == strategy.clock.train_iterations


def test_it_is_what_attaching_to_the_optimizer_is(make, digits, learner, train):
    benchmark = digits(False)
    results = []
    for attached in (False, True):
        model = make(lambda: nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 10)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        mitigators = [StreamingEWC(1.0), L2Init(0.01), SpectralRegularizer(0.1), ReDO(0.9, every=3)]
        mitigators += [ShrinkAndPerturb(0.01, 0.01), DecoupledIsometry(0.1), SelfNormalizedResets(longest=2)]
        if attached:
            for mitigator in mitigators:
                mitigator.attach(optimizer, model)
        plugins = [] if attached else [MitigatorPlugin(mitigator) for mitigator in mitigators]
        train(learner(model, *plugins, optimizer=optimizer), benchmark.train_stream[:1])
        results.append(model)
    assert_same(*results)


@pytest.mark.parametrize("kind", STRONG)
def test_a_resumed_run_ends_bit_identically(kind, make, digits, learner, train, tmp_path):
    benchmark = digits(False)

    def strategy(seed):
        model = make(deep, seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        return learner(model, MitigatorPlugin(STRONG[kind]()), optimizer=optimizer, train_mb_size=10)

    whole = train(strategy(0), benchmark.train_stream[:2])
    save_checkpoint(whole, tmp_path / "checkpoint.pt")
    whole.train(benchmark.train_stream[2])
    resumed, start = load_checkpoint(strategy(1), tmp_path / "checkpoint.pt")
    assert start == 2
    resumed.train(benchmark.train_stream[2])
    assert_same(resumed.model, whole.model)
    ours, theirs = (next(p for p in s.plugins if isinstance(p, MitigatorPlugin)).mitigator for s in (resumed, whole))
    assert ours.steps == theirs.steps == 15
    if kind in ("ReDO", "SelfNormalizedResets"):
        assert ours.recycled == theirs.recycled
        assert sum(ours.recycled.values()) > 0


def test_what_is_no_mitigator_is_refused_with_the_remedy(net):
    with pytest.raises(TypeError, match=r"Did you mean L2\(...\)"):
        MitigatorPlugin(L2)
    with pytest.raises(TypeError, match="mitigator must be a Mitigator"):
        MitigatorPlugin(0.1)


def test_options_that_do_not_fit_the_model_are_refused_before_training(net, plane, learner):
    before = copy.deepcopy(net)
    with pytest.raises(ValueError, match="no parameter that 'head' selects"):
        learner(net, MitigatorPlugin(L2(0.1, exclude=("head",)))).train(plane.train_stream[0])
    assert_same(net, before)


def test_redo_recycles_behind_no_layer_that_a_head_chosen_by_task_labels_reads(digits, learner, train, make):
    from avalanche.models import MTSimpleMLP

    redo = ReDO(0.9, every=4)
    train(learner(make(deep_heads), MitigatorPlugin(redo)), digits(True).train_stream)
    assert redo.layers == ("features.0",)
    assert "'classifier'" in redo.left_alone["features.2"]
    with pytest.raises(ValueError, match="'classifier'"):
        ReDO().prepare(MTSimpleMLP(input_size=6, hidden_size=4))


# --- what works between two tasks waits until the first is measured, evaluated and remembered ---


@pytest.fixture
def starts():
    """A plugin that keeps the parameters before the model grows for a task (`before`), and then (`first`)."""
    from avalanche.training.plugins import SupervisedPlugin

    class Starts(SupervisedPlugin):
        def __init__(self):
            super().__init__()
            self.before, self.first = [], []

        def before_train_dataset_adaptation(self, strategy, **kwargs):
            self.before.append([p.detach().clone() for p in strategy.model.parameters()])

        def before_training_epoch(self, strategy, **kwargs):
            self.first.append([p.detach().clone() for p in strategy.model.parameters()])

    return Starts()


def test_weights_are_halved_between_tasks_and_not_before_they_are_remembered(digits, make, recorder, starts):
    model = make(lambda: nn.Linear(64, 10, bias=False))
    strategy = CurvatureEWC(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), strength=1.0, train_mb_size=50,
        plugins=[MitigatorPlugin(ShrinkAndPerturb(0.5, 0.0, when=AfterTask())), recorder, starts], evaluator=None,
    )  # fmt: skip
    for experience in digits().train_stream:
        strategy.train(experience)
        assert torch.equal(strategy.ewc.past.model.anchor, recorder.ends[-1].weight.flatten())
        assert torch.equal(model.weight, recorder.ends[-1].weight)
    for end, (start,) in zip(recorder.ends, starts.first[1:]):
        assert torch.equal(start, 0.5 * end.weight)


def test_the_accuracy_of_a_task_is_that_before_the_perturbation(digits, train, learner, make):
    found = []
    for plugins in ([], [MitigatorPlugin(ShrinkAndPerturb(1.0, 1.0, when=AfterTask()))]):
        model = make(lambda: nn.Sequential(nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 10)))
        strategy = learner(model, *plugins, metrics=plasticity_metrics(), train_epochs=5)
        train(strategy, digits().train_stream[:1])
        found.append(strategy.evaluator.get_all_metrics()["plasticity_experience/accuracy"])
    assert found[0] == found[1]


def test_rows_that_grow_for_the_next_task_are_not_touched(growing, learner, train, starts):
    """What works between two tasks does so before the model grows."""
    model, stream = growing()
    plugin = MitigatorPlugin(ShrinkAndPerturb(1.0, 0.0, when=AfterTask()))
    train(learner(model, plugin, starts), stream.train_stream)
    assert not any(p.any() for shrunk in starts.before[1:] for p in shrunk)
    assert any(p.any() for first in starts.first[1:] for p in first)  # new rows and heads


def test_tasks_end_where_a_stream_that_is_split_online_does_not_hide_it(plane, learner, net):
    from avalanche.benchmarks.scenarios.online import split_online_stream

    mitigator, counts = ShrinkAndPerturb(0.5, 0.0, when=AfterTask()), []
    strategy = learner(net, MitigatorPlugin(mitigator), train_mb_size=4)
    for part in split_online_stream(plane.train_stream, 16, access_task_boundaries=True, seed=0):
        strategy.train(part)
        counts.append(mitigator.times)
    assert counts == [0, 0, 0, 1, 1, 1, 2, 2, 2]  # when the next begins
    with pytest.raises(ValueError, match="acts between tasks, and this online stream hides where they end"):
        strategy.train(split_online_stream(plane.train_stream, 16, seed=0))
