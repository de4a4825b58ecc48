"""The spectral penalty against exact singular values, against autograd, and under everything that a model may do."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from avalanche_curv import SpectralRegularizer
from avalanche_curv.plasticity.mitigators.spectral import power_iteration
from avalanche_curv.plasticity.roles import weight_matrices


class Transformer(nn.Module):
    """A vision transformer's kinds of parameters, and a token table."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(5, 8)
        self.class_token = nn.Parameter(torch.randn(1, 1, 8))
        self.pos_embedding = nn.Parameter(torch.randn(1, 4, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.cat([self.class_token.expand(len(x), -1, -1), self.tokens(x)], 1) + self.pos_embedding
        return self.head(self.block(x)[:, 0])


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(),
        nn.Linear(4 * 36, 5), nn.LayerNorm(5), nn.Linear(5, 3),
    )  # fmt: skip


MODELS = {
    "linear": lambda: nn.Linear(7, 4),
    "wide": lambda: nn.Linear(4, 9),
    "convolutions": network,
    "grouped": lambda: nn.Conv2d(4, 8, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(5, 3, 2),
    "attention": lambda: nn.MultiheadAttention(6, 2, kdim=5, add_bias_kv=True),
    "transformer": Transformer,
    "recurrent": lambda: nn.LSTM(3, 4, proj_size=2),
}


def made(name, dtype=torch.float64):
    torch.manual_seed(1)
    model = MODELS[name]().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # nothing at a special place such as 0 or 1
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def by_hand(model, k=2.0):
    """Σ (σ₁^k − 1)² + Σ ‖b‖^{2k} + Σ (γ − 1)² with exact singular values, in autograd's graph."""
    total = 0.0
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                continue
            if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)) and name == "weight":
                total = total + (p - 1).square().sum()
            elif "bias" in name or "token" in name or "pos" in name:
                blocks = 3 if "in_proj" in name else 4 if isinstance(module, nn.LSTM) else 1
                total = total + sum(part.norm() ** (2 * k) for part in p.chunk(blocks))
            else:
                lstm = isinstance(module, nn.LSTM) and "hr" not in name
                blocks = 3 if "in_proj" in name else 4 if lstm else 1
                turned = p.transpose(0, 1) if isinstance(module, nn.ConvTranspose2d) else p
                sigmas = [torch.linalg.matrix_norm(part.flatten(1), 2) for part in turned.chunk(blocks)]
                total = total + sum((sigma**k - 1) ** 2 for sigma in sigmas)
    return total


def converged(model, **options):
    regularizer = SpectralRegularizer(1.0, **options)
    regularizer.penalty(model)
    values = {name: matrix.double() for name, matrix in weight_matrices(model).items()}
    for _ in range(3000):
        power_iteration([values[name] for name in regularizer.pairs], list(regularizer.pairs.values()))
    return regularizer


def zero_loss(model):
    """The gradients of a loss that is constant."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_norms_agree_with_the_exact_singular_values(name):
    model = made(name)
    found = converged(model).spectral_norms(model)
    exact = {label: float(torch.linalg.svdvals(matrix)[0]) for label, matrix in weight_matrices(model).items()}
    assert found == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("k", [1, 2, 2.5])
@pytest.mark.parametrize("name", MODELS)
def test_penalty_and_both_gradients_are_those_of_the_formula(name, k):
    model = made(name)
    regularizer = converged(model, exponent=k)
    exact = by_hand(model, k)
    assert regularizer.penalty(model).item() == pytest.approx(exact.item(), rel=1e-6)
    expected = torch.autograd.grad(exact, list(model.parameters()), allow_unused=True)
    regularizer.penalty(model).backward()
    through_autograd = gradients(model)
    model.zero_grad()
    regularizer.add_gradients(model)
    closed = gradients(model)
    for (label, _), reference in zip(model.named_parameters(), expected):
        if reference is None:
            assert label not in closed
            assert label not in through_autograd
            continue
        torch.testing.assert_close(through_autograd[label], reference, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(closed[label], through_autograd[label], rtol=1e-6, atol=1e-6)


def test_closed_form_follows_autograd_through_training():
    """Two hundred steps of Adam: one model gets its gradients in closed form, the other by autograd."""
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 3)).double()
    two, x, y = copy.deepcopy(one), torch.randn(64, 10).double(), torch.randint(3, (64,))
    first, second = SpectralRegularizer(1e-2), SpectralRegularizer(1e-2)
    optimizers = [torch.optim.Adam(model.parameters(), 1e-2) for model in (one, two)]
    first.attach(optimizers[0], one)
    for _ in range(200):
        for model, optimizer in zip((one, two), optimizers):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if model is two:
                loss = loss + 1e-2 * second.penalty(two)
            loss.backward()
            optimizer.step()
    for a, b in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    for name, norm in first.spectral_norms(one).items():
        exact = float(torch.linalg.svdvals(weight_matrices(one)[name])[0])
        assert 0.8 * exact < norm < 1.001 * exact  # a single iteration a step follows from below


def test_gradient_descent_on_the_penalty_alone_takes_norms_to_their_targets():
    model = made("convolutions")
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    with SpectralRegularizer(1.0).attach(optimizer, model):
        for _ in range(3000):
            zero_loss(model)
            optimizer.step()
    for matrix in weight_matrices(model).values():
        assert float(torch.linalg.matrix_norm(matrix, 2)) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(model[1].weight, torch.ones(6).double(), atol=1e-3, rtol=0)
    assert model[0].bias.norm().item() < 0.1  # ‖b‖⁴ is flat at 0
    assert model[1].bias.norm().item() < 0.1


def test_a_matrix_of_zeros_stays_finite_and_starts_when_it_is_none():
    model = nn.Linear(4, 3, bias=False).double()
    nn.init.zeros_(model.weight)
    regularizer, optimizer = SpectralRegularizer(1.0), torch.optim.SGD(model.parameters(), 0.01)
    regularizer.attach(optimizer, model)
    for _ in range(3):
        zero_loss(model)
        optimizer.step()
    assert not model.weight.any()
    assert regularizer.penalty(model).item() == 1
    with torch.no_grad():
        model.weight.copy_(torch.randn(3, 4))
    for _ in range(2000):
        zero_loss(model)
        optimizer.step()
    assert float(torch.linalg.matrix_norm(model.weight, 2)) == pytest.approx(1, abs=1e-6)


def test_vectors_survive_a_step_at_which_a_weight_is_not_finite():
    model = nn.Linear(4, 3)
    regularizer = SpectralRegularizer(1.0)
    regularizer.penalty(model)
    kept = model.weight.detach().clone()
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    regularizer.penalty(model)
    with torch.no_grad():
        model.weight.copy_(kept)
    for _ in range(200):
        penalty = regularizer.penalty(model)
    assert penalty.item() == pytest.approx(by_hand(model).item(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gets_the_gradient_of_float32_rounded(dtype):
    half = made("convolutions", dtype)
    full = copy.deepcopy(half).float()
    for model in (half, full):
        regularizer = SpectralRegularizer(1.0)
        for _ in range(50):
            model.zero_grad()
            regularizer.add_gradients(model)
    for a, b in zip(half.parameters(), full.parameters()):
        assert a.grad.dtype == dtype
        torch.testing.assert_close(a.grad.float(), b.grad, rtol=1e-2, atol=1e-2)


def test_autocast_changes_nothing():
    model, regularizer = made("linear", torch.float32), SpectralRegularizer(1.0)
    state = regularizer.penalty(model) and regularizer.state_dict()
    plain = regularizer.penalty(model)
    regularizer.load_state_dict(state)
    with torch.autocast("cpu", torch.bfloat16):
        inside = regularizer.penalty(model)
    assert inside.dtype == torch.float32
    assert torch.equal(plain, inside)


def test_channels_last_convolutions_get_the_same_gradient():
    plain = made("convolutions")
    other = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    for model in (plain, other):
        regularizer = SpectralRegularizer(1.0)
        regularizer.add_gradients(model)
    for a, b in zip(plain.parameters(), other.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_tied_weight_counts_once_and_as_a_matrix():
    model = nn.ModuleDict({"table": nn.Embedding(6, 4), "out": nn.Linear(4, 6, bias=False)}).double()
    model["out"].weight = model["table"].weight
    sigma = torch.linalg.matrix_norm(model["out"].weight, 2)
    assert converged(model).penalty(model).item() == pytest.approx(((sigma**2 - 1) ** 2).item(), rel=1e-9)


def test_frozen_parameters_are_left_alone_and_taken_up_when_they_thaw():
    model = made("linear")
    model.weight.requires_grad_(False)
    regularizer = SpectralRegularizer(1.0)
    regularizer.add_gradients(model)
    assert model.weight.grad is None
    model.weight.requires_grad_(True)
    regularizer.add_gradients(model)
    assert model.weight.grad.any()


def test_only_what_the_optimiser_steps_gets_a_gradient():
    model = made("convolutions")
    optimizer = torch.optim.SGD(model[-1].parameters(), 0.1)
    SpectralRegularizer(1.0).attach(optimizer, model)
    zero_loss(model)
    optimizer.step()
    assert {name for name, gradient in gradients(model).items() if gradient.any()} == {"8.weight", "8.bias"}


def test_a_grown_matrix_goes_on_from_the_vectors_it_had():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4)).double()
    regularizer = converged(model)
    old = model[0]
    model[0] = nn.Linear(5, 6).double()
    with torch.no_grad():
        model[0].weight[:4] = old.weight
        model[0].weight[4:] *= 1e-6
    before = regularizer.pairs["0.weight"].u.clone()
    regularizer.penalty(model)
    torch.testing.assert_close(regularizer.pairs["0.weight"].u[:4], before, atol=1e-4, rtol=0)
    assert regularizer.penalty(model).item() == pytest.approx(by_hand(model).item(), rel=1e-6)


def test_include_and_exclude_choose_by_name_and_by_type():
    model = made("convolutions")
    regularizer = SpectralRegularizer(1.0, include=["0", nn.Linear], exclude=["*.bias"])
    assert set(regularizer.parameters(model)) == {"0.weight", "6.weight", "8.weight"}
    with pytest.raises(ValueError, match=r"'9' selects. Did you mean"):
        SpectralRegularizer(1.0, exclude=["9"]).prepare(model)


def test_every_third_step_gives_three_times_the_gradient():
    model = made("linear")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    SpectralRegularizer(0.5, every=3).attach(optimizer, model)
    found = []
    for _ in range(4):
        zero_loss(model)
        optimizer.step()
        found.append(model.bias.grad.clone())
    assert not torch.stack(found[1:3]).any()
    norm = model.bias.detach().norm()
    torch.testing.assert_close(found[0], 3 * 0.5 * 4 * norm**2 * model.bias.detach())
    torch.testing.assert_close(found[3], found[0])


def test_reading_under_no_grad_leaves_no_trace():
    model, regularizer = made("convolutions"), SpectralRegularizer(1.0)
    regularizer.penalty(model)
    before = regularizer.state_dict()
    with torch.no_grad():
        regularizer.penalty(model)
    regularizer.spectral_norms(model)
    after = regularizer.state_dict()
    for name, (u, v) in before["vectors"].items():
        assert all(map(torch.equal, (u, v), after["vectors"][name]))


def test_global_randomness_is_not_used():
    model, state = made("convolutions"), torch.get_rng_state()
    SpectralRegularizer(1.0).penalty(model)
    assert torch.equal(state, torch.get_rng_state())


def trained(model, regularizer, optimizer, steps):
    x, y = torch.linspace(-1, 1, 140).view(20, 7), torch.arange(20) % 4
    with regularizer.attach(optimizer, model):
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def test_a_run_resumed_from_state_dicts_ends_bit_identically():
    whole = made("linear", torch.float32)
    optimizer, regularizer = torch.optim.Adam(whole.parameters(), 0.01), SpectralRegularizer(0.1, every=2)
    trained(whole, regularizer, optimizer, 7)
    saved = copy.deepcopy([x.state_dict() for x in (whole, optimizer, regularizer)])
    trained(whole, regularizer, optimizer, 8)
    resumed = nn.Linear(7, 4)
    optimizer, regularizer = torch.optim.Adam(resumed.parameters(), 0.01), SpectralRegularizer(0.1, every=2)
    for part, state in zip((resumed, optimizer, regularizer), saved):
        part.load_state_dict(state)
    trained(resumed, regularizer, optimizer, 8)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


def test_gradient_scaling_does_not_scale_the_penalty():
    """A scaler unscales before the step; a fused optimiser does it inside, where the penalty must be scaled too."""
    x, y = torch.randn(20, 7), torch.arange(20) % 4
    ends = []
    for fused, scaled in ((False, False), (False, True), (True, False), (True, True)):
        model = made("linear", torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        SpectralRegularizer(0.5).attach(optimizer, model)
        for _ in range(5):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        ends.append(model.weight.detach())
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"strength": -1}, ValueError, "at least 0"),
        ({"strength": float("nan")}, ValueError, "finite"),
        ({"strength": 1.0, "exponent": 0.5}, ValueError, "at least 1"),
        ({"strength": 1.0, "every": 0}, ValueError, "at least 1 step"),
        ({"strength": 1.0, "exclude": [3]}, TypeError, "types of modules"),
        ({"strength": 1.0, "exclude": "head"}, TypeError, "list"),
        ({"strength": 1.0, "exclude": nn.LayerNorm}, TypeError, "list"),
        ({"strength": 1.0, "seed": -1}, ValueError, "seed must be"),
        ({"strength": 1.0, "seed": 1.5}, ValueError, "seed must be"),
    ],
)
def test_bad_options_are_refused_when_it_is_made(options, error, text):
    with pytest.raises(error, match=text):
        SpectralRegularizer(**options)


def test_lbfgs_is_refused():
    model = made("linear")
    with pytest.raises(TypeError, match="LBFGS"):
        SpectralRegularizer(1.0).attach(torch.optim.LBFGS(model.parameters()), model)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_step_with_a_closure_is_the_step_after_it(by_name):
    x, y = torch.randn(20, 7), torch.arange(20) % 4
    ends = []
    for closed in (False, True):
        model = made("linear", torch.float32)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        SpectralRegularizer(0.5).attach(optimizer, model)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
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


def test_a_head_that_is_not_in_use_is_left_alone():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
    before = copy.deepcopy(model["unused"].state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    SpectralRegularizer(1.0).attach(optimizer, model)
    for _ in range(3):
        optimizer.zero_grad()
        model["used"](torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model["unused"].state_dict().items())


def test_an_optimiser_that_maximises_is_refused():
    model = made("linear")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, maximize=True)
    zero_loss(model)
    for use in (SpectralRegularizer(1.0).attach, lambda o, m: SpectralRegularizer(1.0).before_step(m, o)):
        with pytest.raises(ValueError, match="maximises"):
            use(optimizer, model)


def test_what_cannot_work_is_refused_when_it_is_attached():
    model, other = made("linear"), made("wide")
    optimizer, regularizer = torch.optim.SGD(model.parameters(), 0.1), SpectralRegularizer(1.0)
    with pytest.raises(ValueError, match="steps no trainable parameter of Linear"):
        regularizer.attach(optimizer, other)
    with pytest.raises(TypeError, match=r"attach\(optimizer, model\) takes"):
        regularizer.attach(model, optimizer)
    theirs = torch.optim.SGD(other.parameters(), 0.1)
    with regularizer.attach(optimizer, model), pytest.raises(RuntimeError, match="for another model"):
        regularizer.attach(theirs, other)
    copy.deepcopy(regularizer).attach(theirs, other)
    lazy = nn.LazyLinear(3)
    with pytest.raises(ValueError, match="no shape yet"):
        SpectralRegularizer(1.0).attach(torch.optim.SGD(lazy.parameters(), 0.1), lazy)
    with pytest.raises(TypeError, match="complex"):
        SpectralRegularizer(1.0).prepare(nn.Linear(2, 2, dtype=torch.complex64))
    SpectralRegularizer(1.0).prepare(nn.Linear(2, 2, dtype=torch.complex64).requires_grad_(False))


def test_attached_to_a_new_optimiser_it_leaves_the_old_one():
    model, regularizer = made("linear"), SpectralRegularizer(1.0)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for _ in range(2)]
    first, second = (regularizer.attach(optimizer, model) for optimizer in optimizers)
    first.remove()  # once more, which changes nothing
    for optimizer in optimizers:
        zero_loss(model)
        optimizer.step()
    assert regularizer.steps == 1
    second.remove()
    assert regularizer.attach(optimizers[0], model)


def test_looking_before_the_first_step_leaves_no_trace():
    ends = []
    for looks in (False, True):
        model, regularizer = made("linear"), SpectralRegularizer(0.1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        regularizer.attach(optimizer, model)
        if looks:
            regularizer.spectral_norms(model)
            with torch.no_grad():
                regularizer.penalty(model)
        with torch.no_grad():
            model.weight.copy_(torch.randn(4, 7, generator=torch.Generator().manual_seed(5)))
        zero_loss(model)
        optimizer.step()
        ends.append(model.weight.detach())
    assert torch.equal(*ends)


def test_norms_are_right_also_where_the_strength_is_0():
    torch.manual_seed(0)
    model, regularizer = nn.Linear(64, 64), SpectralRegularizer(0.0)
    regularizer.spectral_norms(model)
    with torch.no_grad():
        model.weight.copy_(torch.randn(64, 64))
    exact = float(torch.linalg.svdvals(model.weight.detach())[0])
    assert regularizer.spectral_norms(model)["weight"] == pytest.approx(exact, rel=1e-2)


def test_half_precision_gradients_survive_the_scale_of_a_fused_optimiser():
    """A small gradient is there because it is scaled: without its scale it would be zero in float16."""
    model = nn.Linear(1, 2, bias=False).half()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(65536.0), torch.tensor(0.0)
    model.weight.grad = torch.tensor([[1e-3], [1.0]]).half()
    before = model.weight.grad.clone()
    SpectralRegularizer(1e-12).before_step(model, optimizer)
    assert torch.equal(model.weight.grad, before)


def test_a_block_that_was_zero_is_found_when_it_grows():
    """Vectors that have no part in a block can never reach it by iterating: not without being stirred."""
    model = nn.Linear(8, 8, bias=False).double()
    with torch.no_grad():
        model.weight[4:], model.weight[:, 4:] = 0, 0
    regularizer = SpectralRegularizer(1.0)
    for _ in range(100):
        regularizer.penalty(model)
    with torch.no_grad():
        model.weight[4:, 4:] = 5 * torch.eye(4)
    for _ in range(400):
        regularizer.penalty(model)
    assert regularizer.spectral_norms(model)["weight"] == pytest.approx(5, rel=1e-4)


def test_a_block_that_is_appended_is_found_at_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).double()
    regularizer = converged(model)
    old = model[0].weight.detach()
    model[0] = nn.Linear(8, 8, bias=False).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.block_diag(old, 5 * torch.eye(4).double()))
    assert regularizer.spectral_norms(model)["0.weight"] == pytest.approx(5, rel=1e-4)


@pytest.mark.parametrize("of", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_a_weight_that_is_computed_from_others_is_left_alone_with_a_warning(of):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of the older form
        model = of(nn.Linear(3, 4))
    regularizer = SpectralRegularizer(1.0)
    with pytest.warns(UserWarning, match="weight"):
        regularizer.prepare(model)
    regularizer.add_gradients(model)
    assert set(gradients(model)) == {"bias"}


def test_vectors_that_no_rule_covers_are_named():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.gain = nn.Linear(2, 2), nn.Parameter(torch.ones(2))

    model = nn.Sequential(Gate(), nn.PReLU())
    with pytest.warns(UserWarning, match=r"0\.gain multiply"):
        SpectralRegularizer(1.0).prepare(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SpectralRegularizer(1.0, exclude=["*.gain"]).prepare(model)
