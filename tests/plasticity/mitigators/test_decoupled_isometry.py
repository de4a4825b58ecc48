import pytest
import torch
from torch import nn

from avalanche_curv import DecoupledIsometry, Parseval


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found, expected):
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-11, atol=1e-12)


def layer_of(weight, bias=True):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias).double()
    layer.weight.data.copy_(weight)
    return layer


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_with_adam_it_is_adamo_whose_moments_see_the_loss_alone(shape):
    """Against equations 19 and 20 written out, with the gradient of equation 16 by autograd, and a rate that falls."""
    layer, strength = layer_of(drawn(*shape)), 0.3
    weight, m, v = layer.weight.detach().clone(), torch.zeros(shape).double(), torch.zeros(shape).double()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, betas=(0.8, 0.9), eps=1e-6)
    with DecoupledIsometry(strength).attach(optimizer, layer):
        for t in range(1, 5):
            lr = optimizer.param_groups[0]["lr"] = 0.1 / t
            g = drawn(*shape, seed=t)
            layer.weight.grad, layer.bias.grad = g.clone(), torch.zeros(shape[0]).double()
            optimizer.step()
            w = weight.clone().requires_grad_()
            gram = w.T @ w if shape[0] >= shape[1] else w @ w.T
            (r,) = torch.autograd.grad((gram - torch.eye(min(shape))).square().sum(), w)
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
            step = lr * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-6)
            weight = weight - step - lr * strength * r
            close(layer.weight, weight)
            close(optimizer.state[layer.weight]["exp_avg"], m)
            close(optimizer.state[layer.weight]["exp_avg_sq"], v)


def test_plain_descent_is_that_of_parseval_and_adam_is_not():
    ends = {}
    for kind in (torch.optim.SGD, torch.optim.Adam):
        for mitigator in (DecoupledIsometry(0.3), Parseval(0.3)):
            layer = layer_of(drawn(4, 3))
            optimizer = kind(layer.parameters(), lr=0.01)
            with mitigator.attach(optimizer, layer):
                for seed in range(3):
                    layer.weight.grad, layer.bias.grad = drawn(4, 3, seed=seed), drawn(4)
                    optimizer.step()
            ends[kind.__name__, type(mitigator).__name__] = layer.weight.detach()
    close(ends["SGD", "DecoupledIsometry"], ends["SGD", "Parseval"])
    assert (ends["Adam", "DecoupledIsometry"] - ends["Adam", "Parseval"]).abs().max() > 1e-3


def test_singular_values_follow_the_cubic_and_come_to_one():
    matrix, strength = drawn(3, 5), 0.5
    u, sizes, v = torch.linalg.svd(matrix, full_matrices=False)
    layer = layer_of(matrix, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    with DecoupledIsometry(strength, rate=0.02).attach(optimizer, layer):
        for _ in range(400):
            layer.weight.grad = torch.zeros(3, 5).double()
            optimizer.step()
            sizes = sizes - 4 * 0.02 * strength * sizes * (sizes**2 - 1)
            close(layer.weight, u @ sizes.diag() @ v)
    close(layer.weight, u @ v)


def test_convolutions_are_matrices_and_queries_keys_and_values_apart(make):
    model = make(lambda: nn.ModuleList([nn.Conv2d(2, 3, 2), nn.MultiheadAttention(4, 2)]).double())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    mitigator, optimizer = DecoupledIsometry(0.1, exclude=("*out_proj*",)), torch.optim.SGD(model.parameters(), lr=0.5)
    mitigator.attach(optimizer, model)
    optimizer.step()

    def stepped(matrix):
        return matrix - 0.05 * 4 * (matrix @ matrix.T - torch.eye(len(matrix))) @ matrix

    expected = before | {
        "0.weight": stepped(before["0.weight"].flatten(1)).view(3, 2, 2, 2),
        "1.in_proj_weight": torch.cat([stepped(block) for block in before["1.in_proj_weight"].chunk(3)]),
    }
    for name, p in model.named_parameters():
        close(p, expected[name])


def test_each_group_steps_by_its_own_rate_and_what_has_no_gradient_or_is_skipped_stays(make):
    model = make(lambda: nn.ModuleList([nn.Linear(3, 3, bias=False) for _ in range(3)]).double())
    before = [layer.weight.detach().clone() for layer in model]
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1:].parameters(), "lr": torch.tensor(0.2)}]
    optimizer = torch.optim.SGD(groups)
    for layer in model[:2]:
        layer.weight.grad = torch.zeros(3, 3).double()
    mitigator = DecoupledIsometry(0.5)
    mitigator.before_step(model, optimizer)
    for layer, old, rate in zip(model, before, (0.1, 0.2, 0.0)):
        gradient = 4 * (old @ old.T - torch.eye(3)) @ old
        torch.testing.assert_close(layer.weight.detach(), old - rate * 0.5 * gradient, rtol=1e-7, atol=1e-8)
    now = [layer.weight.detach().clone() for layer in model]
    optimizer.found_inf = torch.ones(())
    mitigator.before_step(model, optimizer)
    assert all(torch.equal(layer.weight, old) for layer, old in zip(model, now))


def test_what_cannot_work_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"no trainable weight matrix .* DecoupledIsometry looks at no others"):
        DecoupledIsometry().prepare(nn.LayerNorm(3))
    with pytest.raises(ValueError, match="strength must be a finite number, at least 0"):
        DecoupledIsometry(-1.0)
    with pytest.raises(ValueError, match="rate must be a finite number, above 0; got 0"):
        DecoupledIsometry(rate=0)

    class Rateless(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

        def step(self):
            pass

    layer = nn.Linear(2, 2)
    layer.weight.grad = torch.zeros(2, 2)
    optimizer = Rateless(layer.parameters())
    with DecoupledIsometry().attach(optimizer, layer), pytest.raises(ValueError, match=r"no 'lr'. Give one.*rate=1e-3"):
        optimizer.step()
    with DecoupledIsometry(rate=0.1).attach(optimizer, layer):
        optimizer.step()
