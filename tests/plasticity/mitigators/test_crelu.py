import torch
from torch import nn

from avalanche_curv.plasticity.mitigators.crelu import CReLU


def test_it_is_both_halves_of_the_input_and_loses_nothing():
    x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    y = CReLU()(x)
    assert y.shape == (3, 8, 5, 5)
    assert (y >= 0).all()
    assert torch.equal(y[:, :4] - y[:, 4:], x)


def test_every_unit_that_is_not_zero_passes_a_gradient():
    x = torch.tensor([[-2.0, 3.0, -0.5]], requires_grad=True)
    CReLU()(x).sum().backward()
    assert x.grad.abs().tolist() == [[1.0, 1.0, 1.0]]


def test_networks_built_as_the_docstring_says_fit():
    mlp = nn.Sequential(nn.Linear(784, 128), CReLU(), nn.Linear(256, 128), CReLU(), nn.Linear(256, 10))
    assert mlp(torch.zeros(2, 784)).shape == (2, 10)
    images = nn.Sequential(nn.Conv2d(3, 16, 3), CReLU(), nn.Conv2d(32, 16, 3), CReLU())
    assert images(torch.zeros(2, 3, 8, 8)).shape == (2, 32, 4, 4)
