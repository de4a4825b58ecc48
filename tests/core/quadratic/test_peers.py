"""Other libraries, where they are installed, on the same data: BackPACK and NNGeometry."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from avalanche_curv import GGN, Diagonal, EmpiricalFisher, EmpiricalRisk, Fisher, Kronecker, estimate

EXAMPLES, CLASSES = 7, 3
CRITERIA = {"cross_entropy": nn.CrossEntropyLoss(), "mean_square": nn.MSELoss()}


def perceptron():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def convolutional():
    return nn.Sequential(nn.Conv2d(2, 3, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, CLASSES))


@pytest.fixture(params=[(perceptron, (4,)), (convolutional, (2, 3, 3))], ids=["perceptron", "convolutional"])
def architecture(request):
    return request.param


@pytest.fixture(params=CRITERIA)
def criterion(request):
    return request.param


@pytest.fixture
def case(architecture, criterion, make_model):
    """A copy of the model, inputs, targets and the risk of them in two batches."""
    constructor, shape = architecture
    generator = torch.Generator().manual_seed(0)
    model = make_model(constructor)
    x = torch.randn(EXAMPLES, *shape, generator=generator, dtype=torch.float64)
    y = (
        torch.randint(CLASSES, (EXAMPLES,), generator=generator) if criterion == "cross_entropy"
        else torch.randn(EXAMPLES, CLASSES, generator=generator, dtype=torch.float64)
    )  # fmt: skip
    risk = EmpiricalRisk.snapshot(model, CRITERIA[criterion], list(zip(x.split(4), y.split(4))))
    return copy.deepcopy(model), x, y, risk


@pytest.fixture
def backpacked(case, criterion):
    """The parameters of the model after a backward pass of BackPACK, which saves its results on them."""
    backpack = pytest.importorskip("backpack")
    from backpack.extensions import KFLR, DiagGGNExact, SumGradSquared

    model, x, y, _ = case
    model, loss = backpack.extend(model), backpack.extend(copy.deepcopy(CRITERIA[criterion]))
    with backpack.backpack(SumGradSquared(), DiagGGNExact(), KFLR()):
        loss(model(x), y).backward()
    return dict(model.named_parameters())


def test_backpack_gives_the_same_diagonals(case, backpacked, close):
    """Its gradients are those of ℓ_i / N, so that the sum of their squares is 1 / N of the empirical Fisher."""
    squares, ggn = (
        torch.cat([getattr(p, name).reshape(-1) for p in backpacked.values()])
        for name in ("sum_grad_squared", "diag_ggn_exact")
    )
    close(estimate(EmpiricalFisher(), Diagonal(), case[3]).curvature.values, EXAMPLES * squares)
    close(estimate(GGN(), Diagonal(), case[3]).curvature.values, ggn)


def test_backpack_gives_the_same_factors(case, backpacked, close):
    """KFLR [G, A] without bias. For a convolution of T positions its A is a sum over them, and its G another estimate,
    of mean sensitivities, so that only A is compared there."""
    for layer in estimate(GGN(), Kronecker(), case[3]).curvature.layers:
        weight = backpacked[layer.weight]
        g, a = weight.kflr
        (term,) = layer.terms
        positions = 16 if weight.ndim == 4 else 1
        close(positions * term.a[:-1, :-1], a)
        if positions == 1:
            close(term.g, g)


@pytest.fixture
def double():
    """NNGeometry makes tensors of the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("structure", [Diagonal(), Kronecker()], ids=str)
def test_nngeometry_gives_the_same_fisher(structure, case, criterion, double, close):
    """For squared error its likelihood has variance 1 in each output, and that of a mean over C outputs C / 2. It
    divides by p + eps, which leaves rounding errors. Its factors share the scale of A ⊗ G between them differently."""
    pytest.importorskip("nngeometry")
    from nngeometry.metrics import FIM
    from nngeometry.object.pspace import PMatDiag, PMatKFAC

    model, x, y, risk = case
    variant = "classif_logits" if criterion == "cross_entropy" else "regression"
    form = PMatDiag if isinstance(structure, Diagonal) else PMatKFAC
    theirs = FIM(model, DataLoader(TensorDataset(x, y), batch_size=4), form, variant=variant)
    ours = estimate(Fisher(), structure, risk).curvature
    factor = 1 if criterion == "cross_entropy" else CLASSES / 2
    if form is PMatDiag:
        close(factor * ours.values, theirs.get_diag(), 1e-7)
    else:
        assert len(theirs.data) == len(ours.layers)
        for layer, (a, g) in zip(ours.layers, theirs.data.values()):
            close(factor * layer.terms[0].dense(), torch.kron(g, a), 1e-7)
