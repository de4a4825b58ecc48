"""Copies and pickles made in the middle of an experience take the place of the original and train on as it would."""

import copy
import io
import pickle

import dill
import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from avalanche_curv import (
    EKFAC,
    L2,
    Accumulate,
    AdaptiveRefresh,
    BlockDiagonal,
    CurvatureEWCPlugin,
    Dense,
    Diagonal,
    Eigenspace,
    FlatSpectrum,
    GradientProjection,
    Hessian,
    InputSpace,
    Kronecker,
    L2Init,
    LowRank,
    MatrixFree,
    Merge,
    MitigatorPlugin,
    OrthogonalProjectionPlugin,
    OutputGradient,
    Parseval,
    Rank,
    ReDO,
    Refresh,
    RelativeError,
    RescaleIfUnstable,
    SelfNormalizedResets,
    SequentialProjection,
    ShrinkAndPerturb,
    SpectralRegPlugin,
    StreamingEWC,
    Wasserstein,
    fidelity_metrics,
    landscape_metrics,
    penalty_metrics,
    plasticity_metrics,
    projection_metrics,
)

STRUCTURES = [
    Dense(), Diagonal(), BlockDiagonal(), LowRank(Rank(2)), FlatSpectrum(LowRank(Rank(2))), Kronecker(), EKFAC(),
    MatrixFree(),
]
POLICIES = [
    Accumulate(), Merge(), Refresh(fraction=0.3, gradient=True), AdaptiveRefresh(RelativeError(0.01), every=1)
]
PROJECTIONS = {
    "step": {}, "gradient": {"projection": GradientProjection()}, "tasks": {"projection": SequentialProjection()},
    "inputs": {"protect": InputSpace()}, "outputs": {"protect": Eigenspace(OutputGradient(), Rank(2))},
}
MITIGATORS = {
    "l2": lambda: L2(0.1), "l2 init": lambda: L2Init(0.1), "wasserstein": lambda: Wasserstein(0.1),
    "parseval": lambda: Parseval(0.1), "streaming ewc": lambda: StreamingEWC(0.1),
    "shrink and perturb": lambda: ShrinkAndPerturb(0.9, 0.01), "redo": lambda: ReDO(every=2, threshold=0.5),
    "self-normalised resets": lambda: SelfNormalizedResets(0.5, every=2, longest=2),
}
METRICS = {
    "fidelity": fidelity_metrics, "landscape": landscape_metrics, "plasticity": plasticity_metrics,
    "projection": projection_metrics, "penalty": penalty_metrics,
}

CASES = {
    **{
        f"{type(structure).__name__}, {type(policy).__name__}": lambda s=structure, p=policy: (
            [CurvatureEWCPlugin(5.0, structure=s, policy=p)], []
        )
        for structure in STRUCTURES for policy in (POLICIES if structure == Diagonal() else POLICIES[3:])
    },
    "Hessian": lambda: ([CurvatureEWCPlugin(0.1, curvature=Hessian(), structure=MatrixFree())], []),
    **{f"projection, {name}": lambda o=o: ([OrthogonalProjectionPlugin(**o)], []) for name, o in PROJECTIONS.items()},
    **{name: lambda m=make: ([MitigatorPlugin(m())], []) for name, make in MITIGATORS.items()},
    "spectral": lambda: ([SpectralRegPlugin(0.1)], []),
    **{
        f"metrics, {name}": lambda m=metrics: (
            [CurvatureEWCPlugin(5.0, policy=POLICIES[3]), OrthogonalProjectionPlugin()], m(every=2)
        )
        for name, metrics in METRICS.items()
    },
}


class Replaced(SupervisedPlugin):
    """Puts copies in the place of plugins and metrics, at three iterations and in three ways."""

    WAYS = {  # noqa: RUF012
        ("before_backward", 3): copy.deepcopy,
        ("before_update", 4): lambda thing: pickle.loads(pickle.dumps(thing)),
        ("after_training_iteration", 4): lambda thing: dill.loads(dill.dumps(thing)),
    }

    def __init__(self, *kinds):
        super().__init__()
        self.kinds, self.done = kinds, 0

    def _at(self, hook, strategy):
        way = self.WAYS.get((hook, strategy.clock.train_iterations))
        for owners in (strategy.plugins, strategy.evaluator.metrics) if way else ():
            for place, owner in enumerate(owners):
                if isinstance(owner, self.kinds):
                    owners[place] = way(owner)
                    self.done += 1

    def before_backward(self, strategy, **kwargs):
        self._at("before_backward", strategy)

    def before_update(self, strategy, **kwargs):
        self._at("before_update", strategy)

    def after_training_iteration(self, strategy, **kwargs):
        self._at("after_training_iteration", strategy)


@pytest.fixture
def normed(make):
    return make(lambda: nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_copy_made_in_training_goes_on_bit_identically(case, normed, plane, learner, train):
    results = []
    for replaced in (False, True):
        plugins, metrics = CASES[case]()
        swap = Replaced(*map(type, [*plugins, *metrics])) if replaced else Replaced()
        strategy = learner(copy.deepcopy(normed), *plugins, swap, metrics=metrics)
        train(strategy, plane.train_stream[:2])
        modes = [module.training for module in strategy.model.modules()]
        results.append((strategy.model.state_dict(), modes, repr(strategy.evaluator.get_all_metrics())))
    assert swap.done == 3 * len([*plugins, *metrics])
    (expected, *others), (got, *others_too) = results
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert others == others_too


def test_a_strength_that_a_guard_has_lowered_stays_low_in_a_copy(normed, plane, learner, train):
    class Cooled(SupervisedPlugin):
        """Large steps at first, at which the strength is lowered, then small ones, at which it would be stable."""

        def before_training_iteration(self, strategy, **kwargs):
            strategy.optimizer.param_groups[0]["lr"] = 1.0 if strategy.clock.train_iterations < 4 else 0.01

    ends = []
    for kinds in ((), (CurvatureEWCPlugin,)):
        plugin = CurvatureEWCPlugin(100.0, guard=RescaleIfUnstable())
        strategy = learner(copy.deepcopy(normed), plugin, Replaced(*kinds), Cooled())
        train(strategy, plane.train_stream[:2])
        ends.append([p.detach() for p in strategy.model.parameters()])
    assert all(map(torch.equal, *ends))


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def ends(strategy, plugins, resume, train, stream):
    """The model after `stream`, trained by this strategy, or by one made anew that loads the states of its plugins."""
    if resume is not None:
        model = copy.deepcopy(strategy.model)
        for new, old in zip(resume, plugins):
            stored = {"model": model, "criterion": nn.CrossEntropyLoss()} if isinstance(new, CurvatureEWCPlugin) else {}
            new.load_state_dict(through_a_file(old.state_dict()), **stored)
        strategy = type(strategy)(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), train_mb_size=20, plugins=resume,
            evaluator=None,
        )
    return train(strategy, stream, seed=1).model.state_dict()


# states of all structures are in `tests/core/quadratic/test_state.py`
OTHERS = [type(structure).__name__ for structure in STRUCTURES if structure not in (Diagonal(), Kronecker())]
RESUMED = [case for case in CASES if not case.startswith(("metrics", "Hessian", *OTHERS))]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", RESUMED)
def test_training_resumed_from_the_states_of_plugins_goes_on_bit_identically(case, normed, plane, learner, train):
    plugins, again = CASES[case]()[0], CASES[case]()[0]
    strategy = learner(normed, *plugins, optimizer=torch.optim.SGD(normed.parameters(), lr=0.1))
    train(strategy, plane.train_stream[:2])
    resumed = ends(copy.deepcopy(strategy), plugins, again, train, plane.train_stream[2:])
    unbroken = ends(strategy, plugins, None, train, plane.train_stream[2:])
    assert all(torch.equal(resumed[name], value) for name, value in unbroken.items())


def test_states_of_growing_models_hold_their_stored_examples(growing, learner, train):
    model, benchmark = growing()
    policy = AdaptiveRefresh(RelativeError(0.01), every=2, fraction=0.2)
    plugins, again = ([CurvatureEWCPlugin(5.0, policy=policy), OrthogonalProjectionPlugin()] for _ in range(2))
    strategy = learner(model, *plugins, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    train(strategy, benchmark.train_stream[:2])
    resumed = ends(copy.deepcopy(strategy), plugins, again, train, benchmark.train_stream[2:])
    unbroken = ends(strategy, plugins, None, train, benchmark.train_stream[2:])
    assert all(torch.equal(resumed[name], value) for name, value in unbroken.items())
    assert again[0].past.refreshes == plugins[0].past.refreshes
    assert repr(again[1].protected) == repr(plugins[1].protected)


WRONG = [
    (lambda: CurvatureEWCPlugin(1.0).load_state_dict(OrthogonalProjectionPlugin().state_dict()),
     r"CurvatureEWCPlugin.load_state_dict\(\) takes what its state_dict\(\) returned; got that of OrthogonalP"),
    (lambda: OrthogonalProjectionPlugin().load_state_dict(nn.Linear(1, 1).state_dict()), "dictionary of 'weight', 'b"),
    (lambda: MitigatorPlugin(L2(1.0)).load_state_dict(MitigatorPlugin(L2Init(1.0)).state_dict()), "got that of L2Init"),
    (lambda: L2(1.0).load_state_dict({"steps": 3}), "L2.load_state_dict.* got a dictionary of 'steps'"),
    (lambda: CurvatureEWCPlugin(1.0).load_state_dict([]), "got list"),
]  # fmt: skip


@pytest.mark.parametrize(("load", "said"), WRONG, ids=range(len(WRONG)))
def test_another_state_is_refused_with_what_came(load, said):
    with pytest.raises(ValueError, match=said):
        load()


def test_a_state_that_a_policy_cannot_go_on_from_leaves_the_plugin_as_it_was(normed, plane, learner, train):
    plugin, other = CurvatureEWCPlugin(1.0), CurvatureEWCPlugin(1.0, policy=Refresh())
    train(learner(normed, plugin), plane.train_stream[:1])
    with pytest.raises(ValueError, match="stores those of 0 of its 1 experiences"):
        other.load_state_dict(plugin.state_dict())
    assert repr(other.past) == "Past()"
