"""What holds of every regulariser: its closed-form gradient, and how it meets optimisers, types and frozen parts."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from avalanche_curv import L2, L2Init, Parseval, SpectralRegularizer, StreamingEWC, Wasserstein

KINDS = {
    "L2": L2,
    "L2Init": L2Init,
    "Wasserstein": lambda strength, **options: Wasserstein(strength, resort=1, **options),
    "Parseval": lambda strength, **options: Parseval(strength, scale=0.5, **options),
    "StreamingEWC": lambda strength, **options: StreamingEWC(
        strength, importance_decay=0.8, anchor_decay=0.7, **options
    ),
    "Spectral": SpectralRegularizer,
}


def network():
    return nn.Sequential(
        nn.Unflatten(1, (2, 6)), nn.Conv1d(2, 5, 2), nn.BatchNorm1d(5), nn.ReLU(), nn.ConvTranspose1d(5, 2, 2),
        nn.Flatten(), nn.Linear(12, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 3),
    )  # fmt: skip


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def model(make):
    return make(network)


BATCHES = [(torch.randn(8, 12, generator=torch.Generator().manual_seed(n)), torch.arange(8) % 3) for n in range(6)]


def backward(model, batch):
    inputs, targets = batch
    model.zero_grad()
    dtype = next(model.parameters()).dtype
    cross_entropy(model(inputs.to(dtype)).double(), targets).backward()


def train(model, optimizer, batches=BATCHES):
    for batch in batches:
        backward(model, batch)
        optimizer.step()


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.05, **options)


def added(mitigator, model, optimizer):
    """What a mitigator adds to the gradients that are there."""
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    mitigator.before_step(model, optimizer)
    return {name: p.grad - before.get(name, 0) for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", [name for name in KINDS if name != "Spectral"])  # see test_spectral.py
def test_the_gradient_in_closed_form_is_that_of_autograd_through_the_penalty(name, make, dtype, tolerance):
    model = make(network).to(dtype)
    optimizer, mitigator = sgd(model), KINDS[name](0.3)
    with mitigator.attach(optimizer, model):
        train(model, optimizer)
    backward(model, BATCHES[0])
    anchors = copy.deepcopy(getattr(mitigator, "anchors", None))
    found = added(mitigator, model, optimizer)
    if anchors is not None:  # the penalty of the step is that before θ̄ moves on
        mitigator.anchors = anchors
    penalty = 0.3 * mitigator.penalty(model)
    parts = torch.autograd.grad(penalty, [*model.parameters()], allow_unused=True, materialize_grads=True)
    expected = dict(zip(dict(model.named_parameters()), parts))
    assert penalty > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=10 * tolerance, atol=tolerance)


def test_strength_zero_trains_bit_identically_to_no_mitigator(kind, model):
    other = copy.deepcopy(model)
    optimizer = sgd(model, momentum=0.5)
    kind(0.0).attach(optimizer, model)
    train(model, optimizer)
    train(other, sgd(other, momentum=0.5))
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)


def test_frozen_and_excluded_parameters_and_those_of_no_optimizer_stay(kind, model):
    model[1].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([*model[4].parameters(), *model[6].parameters()], lr=0.1)
    mitigator = kind(10.0, exclude=("6.weight",))
    mitigator.attach(optimizer, model)
    train(model, optimizer, BATCHES[:2])
    backward(model, BATCHES[2])
    found = added(mitigator, model, optimizer)
    assert "1.weight" not in found
    assert found["4.weight"].abs().max() > 0
    assert {name for name, gradient in found.items() if gradient.any()} <= {"4.weight", "4.bias", "6.bias"}


@pytest.mark.parametrize("name", [name for name in KINDS if name != "Spectral"])  # whose vectors depend on names
def test_a_tied_weight_counts_once(name, make):
    tied = make(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
    tied[2].weight = tied[0].weight
    alone = nn.Linear(4, 4)
    alone.load_state_dict(tied[0].state_dict())
    penalties = []
    for model, weight in ((tied, tied[0].weight), (alone, alone.weight)):
        mitigator = KINDS[name](1.0, include=("*weight",))
        mitigator.prepare(model)
        weight.grad = torch.ones(4, 4)
        mitigator.before_step(model, sgd(model))
        with torch.no_grad():
            weight += torch.arange(16.0).view(4, 4) / 10
        penalties.append(mitigator.penalty(model))
    assert penalties[0] == penalties[1] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_regularised_in_their_dtype(kind, make, dtype):
    model = make(lambda: nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 3))).to(dtype)
    full = copy.deepcopy(model).float()
    results = []
    for network in (model, full):
        optimizer, mitigator = sgd(network), kind(0.3)
        with mitigator.attach(optimizer, network):
            train(network, optimizer, BATCHES[:3])
        results.append([p.detach().float() for p in network.parameters()])
        assert all(p.grad.dtype == p.dtype for p in network.parameters())
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)


def test_an_optimiser_that_unscales_by_itself_gets_the_scaled_gradient(kind, make):
    """As GradScaler does with a fused optimiser: gradients come scaled, `grad_scale` says how much."""
    model = make(network).double()
    optimizer, mitigator = sgd(model), kind(0.3)
    with mitigator.attach(optimizer, model):
        train(model, optimizer, BATCHES[:3])
    results = []
    for scale in (1.0, 512.0):
        one, network_ = copy.deepcopy(mitigator), copy.deepcopy(model)
        step = sgd(network_)
        backward(network_, BATCHES[3])
        for p in network_.parameters():
            p.grad *= scale
        if scale > 1:
            step.grad_scale = torch.tensor(scale)
        one.before_step(network_, step)
        results.append([p.grad / scale for p in network_.parameters()])
        results.append([*getattr(one, "importances", {}).values()])
    for a, b in zip(results[0] + results[1], results[2] + results[3]):
        torch.testing.assert_close(a, b)


def test_a_model_without_gradients_gets_those_of_the_penalty_where_they_are_asked_for_and_none_at_a_step(kind, model):
    mitigator, optimizer = kind(0.1), sgd(model)
    with mitigator.attach(optimizer, model):
        train(model, optimizer, BATCHES[:2])
    optimizer.zero_grad(set_to_none=True)
    mitigator.before_step(model, optimizer)
    assert all(p.grad is None for p in model.parameters())
    mitigator.add_gradients(model)
    assert model[6].weight.grad.abs().max() > 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_every_n_steps_the_gradient_is_n_times_as_large(kind, model):
    once, thrice = kind(0.3), kind(0.3, every=3)
    optimizer, found = sgd(model), {}
    train(model, optimizer, BATCHES[:1])
    for mitigator in (once, thrice):
        mitigator.prepare(model)
    train(model, optimizer, BATCHES[1:2])
    start = model[6].weight.detach().clone()
    for mitigator in (once, thrice):
        for _ in range(2):  # StreamingEWC pulls from its second gradient on
            backward(model, BATCHES[2])
            found[mitigator] = added(mitigator, model, optimizer)
            with torch.no_grad():
                model[6].weight += 0.01
        with torch.no_grad():
            model[6].weight.copy_(start)
        mitigator.steps = 1
    assert not any(part.any() for part in added(thrice, model, optimizer).values())
    torch.testing.assert_close(found[thrice]["6.weight"], 3 * found[once]["6.weight"], rtol=1e-3, atol=1e-5)


def test_a_run_goes_on_from_a_state_bit_identically_without_global_randomness(kind, model):
    randomness = torch.get_rng_state()
    optimizer, mitigator = sgd(model, momentum=0.5), kind(0.3, every=2)
    mitigator.attach(optimizer, model)
    train(model, optimizer, BATCHES[:3])
    other, state = copy.deepcopy(model), mitigator.state_dict()
    resumed = sgd(other, momentum=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, BATCHES[3:])
    again = kind(0.3, every=2)
    again.attach(resumed, other)
    again.load_state_dict(state)
    train(other, resumed, BATCHES[3:])
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)
    assert again.steps == mitigator.steps == 6
    assert torch.equal(torch.get_rng_state(), randomness)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("Parseval", "Spectral")])  # without embeddings
def test_sparse_gradients_are_refused_with_the_remedy_which_helps(name, make):
    for exclude in ((), (nn.Embedding,)):
        model = make(lambda: nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(8, 2)))
        optimizer = sgd(model)
        KINDS[name](0.1, exclude=exclude).attach(optimizer, model)
        model(torch.arange(6).view(3, 2)).sum().backward()
        remedy = pytest.raises(TypeError, match=r"shape \(9, 4\) is sparse.*exclude=\(nn.Embedding,\)")
        with nullcontext() if exclude else remedy:
            optimizer.step()


def test_a_step_that_a_scaler_skips_leaves_no_trace(kind):
    """Clipping unscales first, so that a fused optimiser gets no scale, but still hears that gradients are infinite."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), 0.01, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    mitigator = kind(1.0)
    mitigator.attach(optimizer, model)
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(factor * model(torch.ones(1, 2)).sum()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        if factor != 1:
            assert torch.equal(model.weight, before)
            assert mitigator.steps == 0
    assert model.weight.isfinite().all()
    assert mitigator.steps == 1
