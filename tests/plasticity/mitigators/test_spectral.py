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
    "channels last": lambda: network().to(memory_format=torch.channels_last),
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


def exact_norm(matrix):
    return float(torch.linalg.matrix_norm(matrix.detach(), 2))


def zero_loss(model):
    """The gradients of a loss that is constant."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "k"), [*((name, 2) for name in MODELS), ("convolutions", 1), ("convolutions", 2.5)]
)
def test_norms_penalty_and_both_gradients_are_those_of_the_formula(name, k):
    model = made(name)
    regularizer = converged(model, exponent=k)
    norms = {label: exact_norm(matrix) for label, matrix in weight_matrices(model).items()}
    assert regularizer.spectral_norms(model) == pytest.approx(norms, rel=1e-4)
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
        exact = exact_norm(weight_matrices(one)[name])
        assert 0.8 * exact < norm < 1.001 * exact  # a single iteration a step follows from below


def test_gradient_descent_on_the_penalty_alone_takes_norms_to_their_targets():
    model = made("convolutions")
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    with SpectralRegularizer(1.0).attach(optimizer, model):
        for _ in range(3000):
            zero_loss(model)
            optimizer.step()
    for matrix in weight_matrices(model).values():
        assert exact_norm(matrix) == pytest.approx(1, abs=1e-3)
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
    assert exact_norm(model.weight) == pytest.approx(1, abs=1e-6)


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


def test_autocast_changes_nothing():
    model, regularizer = made("linear", torch.float32), SpectralRegularizer(1.0)
    state = regularizer.penalty(model) and regularizer.state_dict()
    plain = regularizer.penalty(model)
    regularizer.load_state_dict(state)
    with torch.autocast("cpu", torch.bfloat16):
        inside = regularizer.penalty(model)
    assert inside.dtype == torch.float32
    assert torch.equal(plain, inside)


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


def test_a_grown_matrix_goes_on_from_the_vectors_it_had_and_its_new_block_is_found_at_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).double()
    old, regularizer = model[0].weight.detach(), converged(model)
    before = regularizer.pairs["0.weight"].u.clone()
    for scale, u in ((1e-6, before), (5, torch.zeros(4).double())):
        model[0] = nn.Linear(8, 8, bias=False).double()
        with torch.no_grad():
            model[0].weight.copy_(torch.block_diag(old, scale * torch.eye(4).double()))
        grown = copy.deepcopy(regularizer)
        grown.penalty(model)
        torch.testing.assert_close(grown.pairs["0.weight"].u[:4], u, atol=1e-2, rtol=0)
        assert grown.spectral_norms(model)["0.weight"] == pytest.approx(max(scale, exact_norm(old)), rel=1e-4)


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


def test_norms_are_right_also_where_the_strength_is_0():
    torch.manual_seed(0)
    model, regularizer = nn.Linear(64, 64), SpectralRegularizer(0.0)
    regularizer.spectral_norms(model)
    with torch.no_grad():
        model.weight.copy_(torch.randn(64, 64))
    exact = exact_norm(model.weight)
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


@pytest.mark.parametrize("begun", [False, True])
def test_looking_leaves_no_trace(begun):
    ends = []
    for looks in (False, True):
        model, regularizer = made("linear"), SpectralRegularizer(0.1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        regularizer.attach(optimizer, model)
        if begun:
            regularizer.penalty(model)
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
