"""Faults of curvlinops that this package works around. A test that fails here says that curvlinops is mended: take out
the workaround that its docstring names, and the test."""

import pytest
import torch
from torch import nn

from avalanche_curv.core.curvature._curvlinops import linear_operator

curvlinops = pytest.importorskip("curvlinops")
fast_lanczos = curvlinops.papyan2020traces.spectrum.fast_lanczos


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


pytestmark = pytest.mark.usefixtures("double")


def examples(outputs=3, batch=4):
    torch.manual_seed(0)
    x, y = torch.randn(7, 4), torch.tensor([0, 0, 1, 0, 2, 1, outputs - 1])
    return list(zip(x.split(batch), y.split(batch)))


def dense(kind, model, criterion, data, **options):
    """The matrix, and the parameters that it is over."""
    parameters = list(model.parameters())
    made = getattr(curvlinops, kind)(model, criterion, parameters, data, check_deterministic=False, **options)
    return made @ torch.eye(sum(p.numel() for p in parameters))


def relative(found, exact):
    return float((found - exact).abs().max() / exact.abs().max())


def exact_ggn(model, data):
    """Of a mean cross-entropy, from rows one by one."""
    parameters, total, count = list(model.parameters()), 0, 0
    for x in torch.cat([x for x, _ in data]):
        f = model(x[None])[0]
        parts = [torch.autograd.grad(one, parameters, retain_graph=True) for one in f]
        rows = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in parts])
        p, count = f.softmax(0).detach(), count + 1
        total = total + rows.T @ (p.diag() - torch.outer(p, p)) @ rows
    return total / count


class Twice(nn.Module):
    """A linear layer called twice; with `tied` a second one of the same weight."""

    def __init__(self, tied):
        super().__init__()
        self.a, self.tied = nn.Linear(4, 4, bias=False), tied
        self.b = nn.Linear(4, 4, bias=False) if tied else None
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x):
        return (self.b if self.tied else self.a)(self.a(x).tanh())


@pytest.mark.parametrize("tied", [False, True], ids=["called twice", "tied weights"])
def test_kfac_is_silently_wrong_for_a_weight_that_is_used_twice(tied):
    """Worked around in avalanche_curv/core/structures/kronecker.py: such weights get a diagonal. For one example with
    one position and one label KFAC of a weight that is used once is exact; here its trace is not."""
    model, ((x, y), *_) = Twice(tied), examples(outputs=4)
    data = [(x[:1], y[:1])]
    found = dense("KFACLinearOperator", model, nn.CrossEntropyLoss(), data, fisher_type="type-2")
    assert abs(float(found.trace() / exact_ggn(model, data).trace()) - 1) > 0.1


@pytest.mark.parametrize(
    "criterion", [nn.CrossEntropyLoss(torch.tensor([0.2, 1.0, 5.0])), nn.CrossEntropyLoss(ignore_index=0)]
)
def test_a_mean_over_weighted_examples_is_taken_for_a_mean_over_examples(criterion):
    """Worked around in avalanche_curv/core/curvature/_curvlinops.py: operators sum there, and the mean is ours."""
    criterion = criterion.double()
    model, data = nn.Linear(4, 3), examples()
    whole = [tuple(torch.cat(part) for part in zip(*data))]
    found = [dense("GGNLinearOperator", model, criterion, some) for some in (data, whole)]
    assert relative(*found) > 1e-3


def test_the_empirical_fisher_of_a_mean_square_is_as_many_times_too_large_as_there_are_outputs():
    """Worked around in avalanche_curv/core/curvature/empirical_fisher.py, which does not use its operator."""
    model, data = nn.Linear(4, 3), [(x, torch.randn(len(x), 3)) for x, _ in examples()]
    parameters, rows = list(model.parameters()), []
    for x, y in zip(*(torch.cat(part) for part in zip(*data))):
        parts = torch.autograd.grad(nn.functional.mse_loss(model(x), y), parameters)
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    exact = torch.stack(rows).T @ torch.stack(rows) / len(rows)
    found = dense("EFLinearOperator", model, nn.MSELoss(), data)
    torch.testing.assert_close(found, 3 * exact)


def test_a_generator_of_data_gives_zeros_from_the_second_product_on():
    """Worked around in avalanche_curv/core/risk/empirical_risk.py: `snapshot` keeps the batches of an iterator."""
    model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss(reduction="sum")
    operator = curvlinops.GGNLinearOperator(
        model, criterion, list(model.parameters()), iter(examples()), check_deterministic=False, num_data=7
    )
    first, second = operator @ torch.ones(15), operator @ torch.ones(15)
    assert first.any()
    assert not second.any()


def test_fast_lanczos_finds_the_largest_eigenvalue_again_and_again():
    """Worked around in avalanche_curv/core/landscape/lanczos.py and core/eigen.py, which do not take it for ranks."""
    values = torch.cat([torch.tensor([100.0]), torch.linspace(0, 1, 99)])
    operator = linear_operator(lambda m: values[:, None] * m, [values.shape], values)
    assert (fast_lanczos(operator, 60)[0] > 99).sum() > 1
