"""How any mitigator meets optimisers, and how parameters are selected."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from avalanche_curv import (
    FIRE,
    L2,
    DecoupledIsometry,
    EveryStep,
    EverySteps,
    L2Init,
    Parseval,
    ReDO,
    SelfNormalizedResets,
    ShrinkAndPerturb,
    SpectralRegularizer,
    StreamingEWC,
    Wasserstein,
)


@pytest.fixture
def model(make):
    return make(lambda: nn.Linear(7, 4))


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), 0.1, **options)


def step_on_zero_loss(model, optimizer):
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("by_name", [False, True])
def test_a_step_with_a_closure_is_the_step_after_it(by_name, make):
    x, y = torch.randn(20, 7), torch.arange(20) % 4
    ends = []
    for closed in (False, True):
        model = make(lambda: nn.Linear(7, 4))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        SpectralRegularizer(0.5).attach(optimizer, model)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        for _ in range(5):
            if closed:
                loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
                assert loss.item() > 0
            else:
                closure()
                optimizer.step()
        ends.append(model.weight.detach())
    assert torch.equal(*ends)


def test_attached_to_a_new_optimiser_it_leaves_the_old_one(model):
    mitigator, optimizers = L2(1.0), [sgd(model), sgd(model)]
    first, second = (mitigator.attach(optimizer, model) for optimizer in optimizers)
    first.remove()  # once more, which changes nothing
    for optimizer in optimizers:
        step_on_zero_loss(model, optimizer)
    assert mitigator.steps == 1
    second.remove()
    assert mitigator.attach(optimizers[0], model)


def test_what_cannot_work_is_refused_when_it_is_attached(model):
    other, mitigator = nn.Linear(4, 9), L2(1.0)
    optimizer, theirs = sgd(model), sgd(other)
    with pytest.raises(ValueError, match="steps no trainable parameter of Linear"):
        mitigator.attach(optimizer, other)
    with pytest.raises(TypeError, match=r"attach\(optimizer, model\) takes"):
        mitigator.attach(model, optimizer)
    with mitigator.attach(optimizer, model), pytest.raises(RuntimeError, match="for another model"):
        mitigator.attach(theirs, other)
    copy.deepcopy(mitigator).attach(theirs, other)
    lazy = nn.LazyLinear(3)
    with pytest.raises(ValueError, match="no shape yet"):
        L2(1.0).attach(sgd(lazy), lazy)
    with pytest.raises(TypeError, match="complex"):
        L2(1.0).prepare(nn.Linear(2, 2, dtype=torch.complex64))
    complex_one = nn.Linear(2, 2, dtype=torch.complex64).requires_grad_(False)
    L2(1.0).prepare(nn.Sequential(complex_one, nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="LBFGS"):
        L2(1.0).attach(torch.optim.LBFGS(model.parameters()), model)
    ascent = sgd(model, maximize=True)
    for use in (L2(1.0).attach, lambda o, m: L2(1.0).before_step(m, o)):
        with pytest.raises(ValueError, match="maximises"):
            use(ascent, model)


EACH = [
    L2(1.0), L2Init(1.0), Wasserstein(1.0), SpectralRegularizer(1.0), Parseval(1.0), StreamingEWC(1.0),
    DecoupledIsometry(), FIRE(), ShrinkAndPerturb(0.5, 0.1), ReDO(every=1), SelfNormalizedResets(),
]  # fmt: skip
WEIGHTS_ALONE = [Parseval(1.0), DecoupledIsometry(), FIRE(), SpectralRegularizer(1.0)]


@pytest.mark.parametrize("mitigator", EACH, ids=lambda one: type(one).__name__)
def test_a_model_of_which_nothing_trains_or_has_no_shape_yet_is_refused_by_each(mitigator):
    mitigator = copy.deepcopy(mitigator)
    frozen = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).requires_grad_(False)
    name = type(mitigator).__name__
    with pytest.raises(ValueError, match=f"Sequential has no trainable parameter that {name} selects. Set requires_gr"):
        mitigator.prepare(frozen)
    lazy = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 2))
    calls = [lambda use=use: use(lazy) for use in (
        getattr(mitigator, which, None) for which in ("prepare", "penalty", "add_gradients", "apply", "spectral_norms")
    ) if use is not None]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match=r"Parameter '0.weight' has no shape yet. Pass a batch"):
            call()
    lazy(torch.ones(2, 3))
    mitigator.prepare(lazy)


@pytest.mark.parametrize("mitigator", WEIGHTS_ALONE, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("of", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal])
def test_a_weight_that_is_computed_from_others_is_left_alone_with_a_warning(of, mitigator):
    model = nn.Sequential(of(nn.Linear(3, 4)), nn.PReLU(), nn.Embedding(4, 4), nn.Linear(4, 2))
    parts = ", ".join(name for name, _ in model.named_parameters() if "parametrizations" in name)
    message = f"No rule says whether {parts} multiply, .* so that {type(mitigator).__name__} leaves them alone. Exclude"
    with pytest.warns(UserWarning, match=message) as caught:
        mitigator.prepare(model)
    assert [one.filename for one in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        type(mitigator)(1.0, exclude=["0.parametrizations"]).prepare(model)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: L2(-1.0), ValueError, "strength must be a finite number, at least 0"),
        (lambda: L2(float("nan")), ValueError, "strength must be a finite number"),
        (lambda: L2(1.0, every=0), ValueError, "every must be an integer of at least 1"),
        (lambda: L2(1.0, exclude=[3]), TypeError, "types of modules"),
        (lambda: L2(1.0, exclude="head"), TypeError, "list"),
        (lambda: L2(1.0, exclude=nn.LayerNorm), TypeError, "list"),
        (lambda: SpectralRegularizer(1.0, exponent=0.5), ValueError, "exponent must be a finite number, at least 1"),
        (lambda: SpectralRegularizer(1.0, seed=-1), ValueError, "seed must be an integer from 0 .* got -1"),
        (lambda: SpectralRegularizer(1.0, seed=1.5), ValueError, "seed must be an integer from 0 .* got 1.5"),
        (lambda: Wasserstein(1.0, resort=0), ValueError, "resort must be an integer of at least 1"),
        (lambda: Parseval(1.0, scale=0.0), ValueError, "scale must be a finite number, above 0"),
        (lambda: StreamingEWC(1.0, importance_decay=1.0), ValueError, "importance_decay must be .*, below 1"),
        (lambda: StreamingEWC(1.0, anchor_decay=-0.1), ValueError, "anchor_decay must be .* at least 0, b"),
        (lambda: ShrinkAndPerturb(1.5, 0.1), ValueError, "shrink must be a finite number, at least 0, at most 1"),
        (lambda: ShrinkAndPerturb(0.5, -0.1), ValueError, "noise must be a finite number"),
        (lambda: ShrinkAndPerturb(0.5, 0.1, when=EveryStep), TypeError, "must be a Schedule.* Did you mean EveryStep"),
        (lambda: ShrinkAndPerturb(0.5, 0.1, seed=-1), ValueError, "seed must be an integer from 0 .* got -1"),
        (lambda: ShrinkAndPerturb(0.5, 0.1, seed="a"), ValueError, "seed must be an integer from 0 .* got 'a'"),
        (lambda: EverySteps(0), ValueError, r"EverySteps\(n=...\) must be an integer of at least 1"),
        (lambda: EveryStep(reuse=0), ValueError, r"EveryStep\(reuse=...\) must be an integer of at least 1"),
        (lambda: ReDO(1.0), ValueError, "threshold must be a finite number, at least 0, below 1"),
        (lambda: ReDO(-0.1), ValueError, "threshold must be a finite number, at least 0, below 1"),
        (lambda: ReDO(every=0), ValueError, "every must be an integer of at least 1"),
        (lambda: ReDO(seed=-1), ValueError, "seed must be an integer from 0 .* got -1"),
        (lambda: ReDO(seed=0.5), ValueError, "seed must be an integer from 0 .* got 0.5"),
    ],
)
def test_unusable_options_are_refused_with_the_remedy(make, error, message):
    with pytest.raises(error, match=message):
        make()
