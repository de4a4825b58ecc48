import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from avalanche_curv import (
    GGN,
    BatchedEmpiricalFisher,
    Clip,
    EmpiricalFisher,
    EmpiricalRisk,
    ExampleLoss,
    Fisher,
    Hessian,
)
from avalanche_curv.core.fidelity.examples import ExpandedModels, OutputModels
from avalanche_curv.core.fidelity.layerwise import LayerwiseModels
from avalanche_curv.core.fidelity.measures import Comparison, Fidelity, GradientProducts
from avalanche_curv.core.fidelity.monitor import PastModels, example_models
from avalanche_curv.core.per_example.layers import linear_layers
from avalanche_curv.core.risk import jacobians
from avalanche_curv.core.risk.alike import same_function


def nearby(risk, size=0.3, seed=0):
    noise = torch.randn(risk.anchor.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return risk.anchor + size * noise


def assert_measures(found, actual, increase, true, predicted, close):
    """The definitions of kappa, gamma, alpha and rho."""
    close(found.actual, actual)
    close(found.kappa, actual - increase)
    close(found.gamma, (true - predicted).norm(dim=1), 1e-9)
    close(found.alpha, (true * predicted).sum(1) / (true.norm(dim=1) * predicted.norm(dim=1)), 1e-9)
    close(found.rho, actual / increase, 1e-8)


def assert_explicit(comparison, paper, matrices, theta, close):
    delta = theta - paper.anchor
    bends, slopes = matrices @ delta, paper.gradients
    actual = paper.losses(theta) - paper.losses(paper.anchor)
    true = paper.gradients_at(theta)
    quadratic = 0.5 * bends @ delta
    assert_measures(comparison.quadratic, actual, quadratic, true, bends, close)
    assert_measures(comparison.linear, actual, quadratic + slopes @ delta, true, bends + slopes, close)


MATRICES = {
    "ggn": (GGN(), lambda paper: paper.ggns),
    "empirical": (EmpiricalFisher(), lambda paper: paper.empirical_fishers),
    "hessian": (Hessian(), lambda paper: paper.hessians),
}


@pytest.mark.parametrize("kind", MATRICES)
def test_measures_are_those_of_explicit_jacobians(kind, known, close):
    curvature, matrices = MATRICES[kind]
    theta = nearby(known.risk)
    comparison = example_models(curvature, known.risk).compare(theta)
    assert_explicit(comparison, known.paper, matrices(known.paper), theta, close)


def test_the_fastest_form_is_chosen_by_model_and_kind(problem):
    linear, convolution = problem("mlp", "cross_entropy").risk, problem("conv", "cross_entropy").risk
    assert type(example_models(GGN(), linear)) is LayerwiseModels
    assert type(example_models(Fisher(samples=2, seed=0), linear)) is LayerwiseModels
    assert type(example_models(GGN(), convolution)) is OutputModels
    assert type(example_models(Hessian(), linear)) is ExpandedModels


def test_the_exact_fisher_has_the_quadratic_models_of_the_ggn(likelihood, problem, close):
    risk = problem("mlp", likelihood).risk
    theta = nearby(risk)
    fisher, ggn = (example_models(kind, risk).compare(theta).quadratic for kind in (Fisher(), GGN()))
    close(fisher.kappa, ggn.kappa)
    close(fisher.gamma, ggn.gamma)


@pytest.mark.parametrize("kind", [GGN(), EmpiricalFisher(), Hessian(), Fisher(samples=2, seed=1)])
def test_chunks_and_batches_change_nothing(kind, architecture, problem, monkeypatch, close):
    risk = problem(architecture, "cross_entropy").risk
    theta = nearby(risk)
    whole = example_models(kind, risk).compare(theta).linear
    monkeypatch.setattr(jacobians, "CHUNK_BYTES", 1)
    for other in (risk, risk.rebatched(1), risk.rebatched(7)):
        found = example_models(kind, other).compare(theta).linear
        close(found.kappa, whole.kappa)
        close(found.gamma, whole.gamma)
        close(found.alpha, whole.alpha)


def assert_exact(found, rounding, ratio):
    zeros, ones = torch.zeros(7).double(), torch.ones(7).double()
    for values, expected, tolerance in (
        (found.kappa, zeros, rounding), (found.gamma, zeros, rounding), (found.alpha, ones, 1e-12),
        (found.rho, ones, ratio),
    ):  # fmt: skip
        torch.testing.assert_close(values, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("kind", [GGN(), Hessian(), Fisher()])
@pytest.mark.parametrize("name", ["mean_square", "summed_square"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_a_quadratic_loss_is_predicted_exactly_anywhere(kind, name, size, new_problem, make_model):
    known = new_problem(make_model(lambda: nn.Linear(4, 3)), name)
    found = example_models(kind, known.risk).compare(nearby(known.risk, size)).linear
    assert_exact(found, 1e-12 * max(found.actual.abs().max().item(), 1), 1e-8)


@pytest.mark.parametrize("kind", [GGN(), Hessian(), Fisher()])
def test_a_quadratic_loss_is_predicted_exactly_at_its_minimum_without_the_linear_term(
    kind, exact_problem, make_model, losses
):
    model = make_model(lambda: nn.Linear(4, 3))
    inputs = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)).double()
    known = exact_problem(model, losses["mean_square"], inputs, model(inputs).detach())
    found = example_models(kind, known.risk).compare(nearby(known.risk)).quadratic
    assert_exact(found, 1e-13, 1e-10)
    assert found.means() == pytest.approx(
        {"kappa": 0, "kappa_abs": 0, "gamma": 0, "alpha": 1, "rho": 1, "rho_pooled": 1}, abs=1e-10
    )


def test_without_the_linear_term_a_quadratic_loss_off_its_minimum_is_missed_by_its_slope(
    new_problem, make_model, close
):
    known = new_problem(make_model(lambda: nn.Linear(4, 3)), "mean_square")
    theta = nearby(known.risk)
    found = example_models(GGN(), known.risk).compare(theta).quadratic
    close(found.kappa, known.paper.gradients @ (theta - known.risk.anchor))
    close(found.gamma, known.paper.gradients.norm(dim=1))


@dataclass(frozen=True)
class Cubic(ExampleLoss):
    """ℓ = f³, of outputs that are positive."""

    def per_example(self, outputs, targets):
        return outputs.pow(3).sum(1)

    def gradient(self, outputs, targets):
        return 3 * outputs.square()

    def hessian_factor(self, outputs, targets):
        return (6 * outputs).sqrt().diag_embed()

    def sample_gradients(self, outputs, targets, uniform):
        raise TypeError("A cubic is no log-likelihood.")

    def check_likelihood(self):
        raise TypeError("A cubic is no log-likelihood.")

    def check(self, outputs, targets):
        pass


@pytest.mark.parametrize("kind", [GGN(), Hessian()])
def test_a_cubic_loss_has_the_kappa_of_its_taylor_remainder(kind, make_model, close):
    """f = w x: ℓ = x³ w³ = x³ (a³ + 3 a² δ + 3 a δ² + δ³)."""
    model = make_model(lambda: nn.Linear(1, 1, bias=False))
    nn.init.constant_(model.weight, 2.0)
    x = torch.tensor([[0.5], [1.0], [2.0]]).double()
    models = example_models(kind, EmpiricalRisk.snapshot(model, Cubic(), [(x, x)]))
    delta = 0.7
    comparison = models.compare(torch.tensor([2.0 + delta], dtype=torch.float64))
    cubes = x[:, 0] ** 3
    close(comparison.linear.kappa, cubes * delta**3)
    close(comparison.linear.gamma, cubes * 3 * delta**2)
    close(comparison.quadratic.kappa, cubes * (delta**3 + 3 * 4 * delta))
    close(comparison.linear.alpha, torch.ones(3).double())


@pytest.mark.parametrize("kind", [GGN(), EmpiricalFisher(), Hessian(), Fisher(samples=2, seed=0)])
def test_at_the_anchor_nothing_happens_and_nothing_is_predicted(kind, architecture, problem, close):
    known = problem(architecture, "cross_entropy")
    comparison = example_models(kind, known.risk).compare(known.risk.anchor)
    for found in (comparison.quadratic, comparison.linear):
        assert found.actual.abs().max() == found.kappa.abs().max() == 0
        assert found.rho.isnan().all()
    assert comparison.quadratic.alpha.isnan().all()
    close(comparison.quadratic.gamma, known.paper.gradients.norm(dim=1))
    close(comparison.linear.alpha, torch.ones(7).double())
    assert comparison.linear.gamma.abs().max() < 1e-12


def test_the_model_with_a_linear_term_errs_by_the_third_order_and_the_other_by_the_first(problem):
    risk = problem("conv", "cross_entropy").risk
    step = nearby(risk, 1.0) - risk.anchor
    errors = [example_models(Hessian(), risk).compare(risk.anchor + t * step) for t in (1e-2, 1e-3)]
    third = errors[0].linear.kappa.abs().sum() / errors[1].linear.kappa.abs().sum()
    first = errors[0].quadratic.kappa.abs().sum() / errors[1].quadratic.kappa.abs().sum()
    assert third.item() == pytest.approx(1000, rel=0.1)
    assert first.item() == pytest.approx(10, rel=0.1)


def test_means_leave_out_what_is_not_defined():
    nan = float("nan")
    found = Fidelity(
        torch.tensor([1.0, 2.0, -3.0]), torch.tensor([2.0, 0.0, -1.0]), torch.tensor([1.0, 2.0, 6.0]),
        torch.tensor([0.5, nan, -1.0]),
    )
    assert found.kappa.tolist() == [-1.0, 2.0, -2.0]
    assert torch.equal(found.rho.isnan(), torch.tensor([False, True, False]))
    means = found.means()
    assert all(type(value) is float for value in means.values())
    assert means == pytest.approx(
        {"kappa": -1 / 3, "kappa_abs": 5 / 3, "gamma": 3, "alpha": -0.25, "rho": 1.75, "rho_pooled": 0.0}
    )


def test_measures_of_gradients_on_paper():
    true = torch.tensor([[3.0, 4.0]])
    predicted = torch.tensor([[[0.0, 2.0]], [[0.0, 0.0]]])
    comparison = Comparison.of(
        GradientProducts.of(true, predicted), torch.tensor([1.0]), torch.tensor([[0.5], [2.0]])
    )
    assert comparison.quadratic.gamma.item() == pytest.approx(13**0.5)
    assert comparison.quadratic.alpha.item() == pytest.approx(0.8)
    assert comparison.quadratic.rho.item() == 2
    assert comparison.linear.gamma.item() == pytest.approx(5)
    assert comparison.linear.alpha.isnan()


def test_a_cosine_does_not_leave_its_interval():
    products = GradientProducts(*(torch.tensor([[1.0], [1.0]]) for _ in range(2)), torch.tensor([[1.1], [-1.1]]),
                                torch.zeros(2, 1))
    comparison = Comparison.of(products, torch.ones(1), torch.ones(2, 1))
    assert (comparison.quadratic.alpha.item(), comparison.linear.alpha.item()) == (1.0, -1.0)


class Unreached(nn.Module):
    """A linear layer that the loss never meets."""

    def __init__(self):
        super().__init__()
        self.first, self.spare, self.last = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, 3)

    def forward(self, inputs):
        hidden = self.first(inputs).tanh()
        self.spare(hidden)
        return self.last(hidden)


class Skipped(Unreached):
    """A linear layer that is not even called."""

    def forward(self, inputs):
        return self.last(self.first(inputs).tanh())


def frozen(activation, *names):
    """Three linear layers, some of whose parameters do not train."""
    layers = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), activation, nn.Linear(5, 3)
    model = nn.Sequential(*layers)
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


PERCEPTRONS = {
    "inplace": lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)),
    "no bias": lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)),
    "one layer": lambda: nn.Linear(4, 3),
    "deep": lambda: nn.Sequential(
        nn.Linear(4, 5), nn.LeakyReLU(), nn.Dropout(0.3), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)
    ),
    "norm without parameters": lambda: nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False), nn.SiLU(), nn.Linear(5, 3)
    ),
    "frozen below": lambda: frozen(nn.ReLU(inplace=True), "0.weight", "0.bias"),
    "frozen between": lambda: frozen(nn.Tanh(), "2.weight", "2.bias"),
    "frozen bias": lambda: frozen(nn.Tanh(), "0.bias", "4.weight"),
    "unreached": Unreached,
    "skipped": Skipped,
}


@pytest.mark.parametrize("perceptron", PERCEPTRONS)
@pytest.mark.parametrize("kind", [GGN(), EmpiricalFisher()])
def test_models_by_layers_equal_those_on_any_model_and_on_paper(perceptron, kind, new_problem, make_model, close):
    known = new_problem(make_model(PERCEPTRONS[perceptron]).eval(), "cross_entropy", examples=4)
    layers = linear_layers(known.risk)
    assert layers is not None
    by_layers, general = LayerwiseModels(kind, (known.risk, layers)), OutputModels(kind, known.risk)
    for seed in range(2):  # what is kept of the anchor serves more than once
        theta = nearby(known.risk, seed=seed)
        a, b = by_layers.compare(theta), general.compare(theta)
        for form in ("quadratic", "linear"):
            for measure in ("actual", "increase", "gamma", "alpha"):
                close(*(getattr(getattr(found, form), measure) for found in (a, b)))
    matrices = known.paper.ggns if kind == GGN() else known.paper.empirical_fishers
    assert_explicit(a, known.paper, matrices, theta, close)
    moved = known.risk.space.split(nearby(known.risk, seed=2))
    with known.risk.holding(moved):
        later = new_problem(copy.deepcopy(known.risk.base), "cross_entropy", seed=1, examples=3).risk
    risks = known.risk, later, replace(later, forward=lambda model, inputs: 2 * model(inputs), verdicts={})
    assert [same_function(known.risk, risk) for risk in risks] == [True, True, False]
    together = LayerwiseModels(kind, *((risk, linear_layers(risk)) for risk in risks))
    for seed in range(2):
        theta = nearby(known.risk, seed=seed)
        parts = together.compare(theta).split([4, 3, 3])
        for part, risk in zip(parts, risks):
            expected = OutputModels(kind, risk).compare(theta)
            for form in ("quadratic", "linear"):
                for measure in ("actual", "increase", "gamma", "alpha"):
                    close(*(getattr(getattr(found, form), measure) for found in (part, expected)))


def test_modules_that_no_name_holds_make_functions_that_are_not_compared():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.held = nn.Linear(3, 2), [nn.Linear(3, 3)]

        def forward(self, x):
            return self.head(self.held[0](x))

    model, data = Hidden(), [(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))]
    one, two = (EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), data) for _ in range(2))
    assert not same_function(one, two)
    assert same_function(one, one)


def test_measures_carry_no_graph_and_work_under_no_grad(architecture, problem, close):
    risk = problem(architecture, "cross_entropy").risk
    theta = nearby(risk)
    for kind in (GGN(), Hessian()):
        expected = example_models(kind, risk).compare(theta).linear
        with torch.no_grad():
            found = example_models(kind, risk).compare(theta).linear
        close(found.gamma, expected.gamma)
        assert not any(t.requires_grad for t in (expected.kappa, expected.gamma, expected.alpha))


@pytest.mark.parametrize("layers", [True, False])
def test_the_distance_of_equal_gradients_does_not_cancel_in_single_precision(layers, make_model):
    """‖g‖² − 2⟨g, p⟩ + ‖p‖² would leave a distance of √ε ‖g‖, a thousand times more."""
    model = make_model(lambda: nn.Linear(4, 3)).float()
    generator = torch.Generator().manual_seed(0)
    batch = (torch.randn(7, 4, generator=generator), torch.randn(7, 3, generator=generator))
    risk = EmpiricalRisk.snapshot(model, nn.MSELoss(), [batch])
    models = LayerwiseModels(GGN(), (risk, linear_layers(risk))) if layers else OutputModels(GGN(), risk)
    found = models.compare(nearby(risk).float()).linear
    assert found.gamma.max() < 3e-6


def test_past_models_measure_each_experience_at_its_own_and_at_the_newest_anchor(net, new_problem, close):
    risks = []
    for seed in range(3):
        risks.append(new_problem(net, "cross_entropy", seed=seed, examples=5).risk)
        with torch.no_grad():
            for p in net.parameters():
                p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).double()
    past = PastModels(GGN())
    for risk in risks:
        past = past.with_experience(risk)
    theta = risks[0].space.vector(net)
    values = past.measure(net)
    for t, risk in enumerate(risks):
        own = example_models(GGN(), risk).compare(theta)
        newest = example_models(GGN(), risk.at(risks[-1])).compare(theta)
        for name, fidelity in (
            ("accumulate", own.quadratic), ("accumulate_linear", own.linear),
            ("refresh", newest.quadratic), ("refresh_linear", newest.linear),
        ):
            for measure, value in fidelity.means().items():
                assert values[f"{name}/{measure}/experience_{t}"] == pytest.approx(value, rel=1e-9)
    parts = [example_models(GGN(), risk).compare(theta).quadratic for risk in risks]
    overall = sum(part.kappa.sum().item() for part in parts) / 15
    assert values["accumulate/kappa"] == pytest.approx(overall, rel=1e-9)


@pytest.mark.parametrize("kind", [BatchedEmpiricalFisher(2), Hessian(psd=Clip())])
def test_kinds_without_a_per_example_form_are_refused(kind, problem):
    for refused in (lambda: example_models(kind, problem("mlp", "cross_entropy").risk), lambda: PastModels(kind)):
        with pytest.raises(TypeError, match=r"single examples.*does not define. Use GGN\(\)"):
            refused()


@pytest.mark.parametrize("architecture", ["mlp", "conv"])
def test_a_part_that_was_frozen_at_the_anchor_is_seen_when_it_trains(architecture, problem, close):
    """The error is that over all parameters that move, not 0."""
    known = problem(architecture, "cross_entropy")
    model, theta = copy.deepcopy(known.model), nearby(known.risk)
    first = next(model.parameters()).requires_grad_(False)
    past = PastModels(GGN()).with_experience(EmpiricalRisk.snapshot(model, known.criterion, known.risk.batches))
    assert past.covering(model) is past
    first.requires_grad_(True)
    nn.utils.vector_to_parameters(theta, model.parameters())
    found = past.compare(model)
    for name in ("accumulate", "refresh"):
        assert_explicit(found[name][0], known.paper, known.paper.ggns, theta, close)
    distance = float((theta - known.risk.anchor).norm())
    assert past.distances(model) == pytest.approx(dict.fromkeys(past.distances(model), distance))
    covering = past.covering(model)
    first.requires_grad_(False)
    later = covering.with_experience(EmpiricalRisk.snapshot(model, known.criterion, known.risk.batches))
    assert {risk.space for risk in (*later.accumulate, *later.refresh)} == {known.risk.space}
