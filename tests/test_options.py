"""What every option and every attribute has in common: it is checked when it is set, and what is set is used."""

import copy
import inspect
import pickle
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
import torch
from avalanche.training.templates import SupervisedTemplate
from torch import nn
from torch.nn import functional as F

import avalanche_curv
from avalanche_curv import (
    FIRE,
    GGN,
    L2,
    AbsoluteError,
    AdaptiveRefresh,
    BatchedEmpiricalFisher,
    DecoupledIsometry,
    Eigenspace,
    EmpiricalRisk,
    Energy,
    EverySteps,
    Fisher,
    FlatSpectrum,
    FromLinearOperator,
    InputSpace,
    L2Init,
    LossFunction,
    LowRank,
    ParameterSpace,
    Parseval,
    ProtectedSpace,
    QuadraticModel,
    Rank,
    ReDO,
    RelativeError,
    SelfNormalizedResets,
    SequentialProjection,
    ShrinkAndPerturb,
    SpectralRegularizer,
    StepProjection,
    StreamingEWC,
    Tikhonov,
    Wasserstein,
)
from avalanche_curv.core.fidelity.monitor import PastModels
from avalanche_curv.core.losses.binary import BinaryCrossEntropy
from avalanche_curv.core.losses.categorical import CrossEntropy
from avalanche_curv.core.options import Fixed, Setting
from avalanche_curv.core.projection.projections import Projector
from avalanche_curv.core.quadratic.penalty import Penalty
from avalanche_curv.core.quadratic.stability import Guarded, WarnIfUnstable
from avalanche_curv.core.structures.diagonal import DiagonalMatrix
from avalanche_curv.plasticity.mitigators.base import Selection
from avalanche_curv.strategies import Training

RESULTS = {
    "Alignment", "Attachment", "ChosenStrength", "CurvatureDrift", "EmpiricalRisk", "GradientDiversity", "Landscape",
    "ParameterSpace", "Past", "ProtectedSpace", "QuadraticModel", "RefreshEvent", "Representation",
    "StrengthSuggestion", "Subspace",
    "TaskEvidence", "WeightSpectrum",
}  # fmt: skip
WITH_ARGUMENTS = {
    "AbsoluteError": AbsoluteError(0.1), "BatchedEmpiricalFisher": BatchedEmpiricalFisher(4), "Energy": Energy(0.5),
    "EverySteps": EverySteps(3), "Fisher": Fisher(samples=2, seed=1), "FlatSpectrum": FlatSpectrum(LowRank(Rank(2))),
    "FromLinearOperator": FromLinearOperator(torch.eye), "LossFunction": LossFunction(F.mse_loss),
    "LowRank": LowRank(Rank(2), max_rank=3), "Rank": Rank(3),
    "RelativeError": RelativeError(0.1), "Tikhonov": Tikhonov(0.1),
    "FromScratch": avalanche_curv.FromScratch(torch.optim.SGD),
}  # fmt: skip


def options():
    """One of each public option: a new one joins by its name in `__all__`."""
    found = {name: getattr(avalanche_curv, name) for name in avalanche_curv.__all__ if name not in RESULTS}
    kinds = {n: k for n, k in found.items() if is_dataclass(k) and not inspect.isabstract(k)}
    return {name: WITH_ARGUMENTS.get(name) or kind() for name, kind in kinds.items()}


OPTIONS = options()
UNUSABLE = {
    "int": ([], "a", 0.5, float("nan"), -1, True, np.float64(2.0), torch.tensor(3), object()),
    "float": ([], "a", float("nan"), float("inf"), True, 1j, torch.tensor(0.5), object()),
    "bool": ([], "yes", float("nan"), 2, None, object()),
}


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_every_field_of_every_option_is_checked_when_it_is_made(option):
    for field in fields(option):
        plain = str(field.type).removesuffix(" | None")
        for value in UNUSABLE.get(plain, (object(),)):
            with pytest.raises((TypeError, ValueError), match=f"{field.name}|{type(option).__name__}"):
                replace(option, **{field.name: value})


def of_numpy(value):
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return np.int64(value) if isinstance(value, int) else np.float64(value)


SAME = [
    (CrossEntropy(torch.tensor([1.0, 2.0])), CrossEntropy(torch.tensor([1.0, 2.0]))),
    (BinaryCrossEntropy(True, torch.tensor([3.0])), BinaryCrossEntropy(True, torch.tensor([3.0]))),
    (InputSpace(cuts=[Energy(0.9), Rank(3)]), InputSpace(cuts=(Energy(0.9), Rank(3)))),
    (Selection(include=["a"], exclude=[nn.Linear]), Selection(("a",), (nn.Linear,))),
    (avalanche_curv.Refresh(fraction=1), avalanche_curv.Refresh(fraction=np.float32(1.0))),
    (Eigenspace(GGN(), Rank(np.int64(3))), Eigenspace(GGN(), Rank(3))),
]
for known in OPTIONS.values():
    numbers = {field.name: of_numpy(getattr(known, field.name)) for field in fields(known)}
    SAME += [(known, replace(known, **numbers)), (known, copy.deepcopy(known))]


@pytest.mark.parametrize(("one", "other"), SAME, ids=lambda option: type(option).__name__)
def test_options_that_say_the_same_are_equal_and_have_one_hash_and_one_text(one, other):
    assert one == other
    assert hash(one) == hash(other)
    assert repr(one) == repr(other)
    assert pickle.loads(pickle.dumps(one)) == one


def test_losses_of_other_weights_are_not_equal():
    weights = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]), torch.tensor([[1.0, 2.0]]), None
    assert len({CrossEntropy(weight) for weight in weights}) == 4
    assert CrossEntropy() != BinaryCrossEntropy()


def objects():
    """One of each object with attributes that a user reaches."""
    from avalanche_curv import (
        CurvatureEWCPlugin,
        CurvatureRegularizer,
        MitigatorPlugin,
        OrthogonalProjectionPlugin,
        SpectralRegPlugin,
        fidelity_metrics,
        landscape_metrics,
        plasticity_metrics,
        projection_metrics,
    )

    model = nn.Linear(2, 1)
    quadratic = QuadraticModel(ParameterSpace.of(model), torch.zeros(3), DiagonalMatrix(torch.ones(3)))
    mitigators = [L2(1.0), L2Init(1.0), Parseval(1.0), ReDO(), ShrinkAndPerturb(0.1, 0.1), SpectralRegularizer(1.0)]
    mitigators += [StreamingEWC(1.0), Wasserstein(1.0), FIRE(), DecoupledIsometry(), SelfNormalizedResets()]
    plugins = [CurvatureEWCPlugin(1.0), MitigatorPlugin(L2(1.0)), OrthogonalProjectionPlugin(), SpectralRegPlugin(1.0)]
    makers = fidelity_metrics, landscape_metrics, plasticity_metrics, projection_metrics
    metrics = [metric for maker in makers for metric in maker()]
    core = [
        Guarded(WarnIfUnstable(), quadratic), Penalty(quadratic, 2.0), Projector(ProtectedSpace(), StepProjection()),
        PastModels(Fisher()), AdaptiveRefresh(), quadratic, CurvatureRegularizer(1.0),
    ]  # fmt: skip
    strategies = [
        strategy(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **given)
        for strategy, given in (
            (avalanche_curv.CurvatureEWC, {"strength": 1.0}),
            (avalanche_curv.OrthogonalProjection, {}),
            (avalanche_curv.SpectralReg, {"strength": 1.0}),
        )
    ]
    return [*mitigators, *plugins, *metrics, *core, *strategies]


OBJECTS = objects()


def public_attributes(one):
    """The names of its data: arguments of its constructor, instance attributes, descriptors and properties."""
    arguments = {n for n, p in inspect.signature(type(one)).parameters.items() if p.kind is not p.VAR_KEYWORD}
    if isinstance(one, SupervisedTemplate):
        return sorted(arguments - {"model", "optimizer", "projection", *Training.__annotations__})
    described = inspect.getmembers_static(type(one), lambda value: hasattr(type(value), "__set__"))
    names = {*vars(one), *(name for name, _ in described), *arguments}
    return sorted(name for name in names if not name.startswith("_"))


def test_every_mitigator_and_metric_is_looked_at():
    kinds = {type(one) for one in OBJECTS}
    from avalanche_curv import Mitigator, Recycler, Regularizer, ScheduledMitigator, metrics, plugins

    named = [getattr(avalanche_curv, name) for name in avalanche_curv.__all__]
    mitigators = {kind for kind in named if inspect.isclass(kind) and issubclass(kind, Mitigator)}
    shown = {getattr(module, name) for module in (metrics, plugins) for name in module.__all__}
    classes = {kind for kind in shown if inspect.isclass(kind) and not is_dataclass(kind)}
    abstract = {Mitigator, Recycler, Regularizer, ScheduledMitigator, metrics.ScalarMetric}
    assert kinds >= (mitigators | classes) - abstract


@pytest.mark.parametrize("one", OBJECTS, ids=lambda one: type(one).__name__)
def test_a_public_attribute_is_checked_when_it_is_set_or_cannot_be_set(one):
    for name in public_attributes(one):
        before = getattr(one, name)
        for value in (object(), float("nan"), -1.5):
            with pytest.raises((AttributeError, TypeError, ValueError), match=name):
                setattr(one, name, value)
        assert getattr(one, name) is before or getattr(one, name) == before


@pytest.mark.parametrize("one", OBJECTS, ids=lambda one: type(one).__name__)
def test_an_attribute_that_can_be_set_takes_what_it_holds_and_others_name_the_remedy(one):
    for name in public_attributes(one):
        value, described = getattr(one, name), inspect.getattr_static(type(one), name, None)
        if isinstance(described, Fixed) or name in ("include", "exclude"):
            with pytest.raises(AttributeError, match=rf"{name} of a \w+ cannot be changed.* Make a new"):
                setattr(one, name, value)
        elif isinstance(described, Setting) or name == "strength":
            setattr(one, name, value)
            assert getattr(one, name) == value


@pytest.mark.parametrize("one", OBJECTS, ids=lambda one: type(one).__name__)
def test_what_is_set_survives_copies_and_pickles(one):
    for name in public_attributes(one):
        value = getattr(one, name)
        if isinstance(value, int | float | str) and not isinstance(one, SupervisedTemplate):
            assert getattr(copy.deepcopy(one), name) == value
            assert getattr(pickle.loads(pickle.dumps(one)), name) == value


def grads(mitigator, model, steps):
    """What a regulariser adds to gradients of zero at one step after another that moves nothing."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.0), []
    with mitigator.attach(optimizer, model):
        for _ in range(steps):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return found


@pytest.mark.parametrize("make", [L2, Parseval, SpectralRegularizer, Wasserstein, L2Init], ids=lambda m: m.__name__)
def test_a_strength_that_is_set_acts_at_the_next_step(make):
    model = nn.Linear(3, 2).double()
    mitigator = make(0.0)
    mitigator.prepare(model)
    with torch.no_grad():
        model.weight.add_(torch.arange(6.0).view(2, 3))
    (nothing,) = grads(mitigator, model, 1)
    mitigator.strength = 2.0
    (twice,) = grads(mitigator, model, 1)
    mitigator.strength = 1.0
    mitigator.every = 1
    (once,) = grads(mitigator, model, 1)
    assert not nothing.any()
    assert once.any()
    torch.testing.assert_close(twice, 2 * once, rtol=1e-3, atol=1e-6)


def test_a_seed_and_a_schedule_that_are_set_draw_other_noise():
    def noise(change):
        model = nn.Linear(3, 2)
        nn.init.zeros_(model.weight)
        mitigator = ShrinkAndPerturb(0.0, 1.0, seed=1)
        mitigator.apply(model)
        first = model.weight.detach().clone()
        change(mitigator)
        mitigator.apply(model)
        return model.weight.detach() - first

    same, other = noise(lambda m: None), noise(lambda m: setattr(m, "seed", 2))
    assert not torch.equal(same, other)
    afresh = noise(lambda m: setattr(m, "when", EverySteps(1)))
    assert not torch.equal(same, afresh)


def test_redo_recycles_at_the_steps_that_were_set_last():
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    redo, optimizer, at = ReDO(every=1000), torch.optim.SGD(model.parameters(), lr=0.0), []
    with redo.attach(optimizer, model):
        for step in range(1, 9):
            model(torch.ones(1, 2)).sum().backward()
            if step == 4:
                redo.every = 2  # between the pass and the step: that pass was not recorded
            before = dict(redo.recycled)
            optimizer.step()
            at += [step] if before != redo.recycled or (step > 4 and redo.steps == redo._due) else []
    assert at == [6, 8]


def test_a_projection_and_a_rank_that_do_not_fit_are_refused_when_they_are_made():
    with pytest.raises(ValueError, match="Leave max_rank out"):
        avalanche_curv.OrthogonalProjectionPlugin(projection=SequentialProjection(), max_rank=5)


def test_a_past_that_is_set_is_the_past_that_is_trained_with(net, learner, train, plane):
    batches = [(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]))]
    risk = EmpiricalRisk.snapshot(copy.deepcopy(net), nn.CrossEntropyLoss(), batches)
    ewc = avalanche_curv.CurvatureEWCPlugin(3.0)
    ewc.past = avalanche_curv.Accumulate().absorb(avalanche_curv.Past(), risk, Fisher(), avalanche_curv.Diagonal())
    train(learner(net, ewc), plane.train_stream[:1])
    assert ewc.past.experiences == 2
    assert ewc.last_penalty > 0
