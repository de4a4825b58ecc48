"""What a user may add without touching the package, each in one file such as this one: a curvature, a structure, a
policy, a shortcut, a loss. Everything that takes the package's own takes them too, or says why not."""

from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
from torch import distributed, nn

from avalanche_curv import (
    GGN,
    Accumulate,
    AdaptiveRefresh,
    BlockDiagonal,
    Curvature,
    Dense,
    Diagonal,
    Eigenspace,
    EmpiricalFisher,
    EmpiricalRisk,
    ExampleLoss,
    Fisher,
    FlatSpectrum,
    Hessian,
    Kronecker,
    LowRank,
    Matrix,
    MatrixFree,
    Merge,
    OutputCurvature,
    ParameterSpace,
    Past,
    PerLayer,
    Policy,
    QuadraticModel,
    Rank,
    Refresh,
    Structure,
    estimate,
    example_loss,
    landscape,
    rule,
)
from avalanche_curv.core.distributed import ShardedRisk, estimate_sharded
from avalanche_curv.core.fidelity.monitor import PastModels, example_models
from avalanche_curv.core.quadratic.penalty import Penalty


@dataclass(frozen=True)
class GradientAndWeightDecay(Curvature):
    """∇L ∇Lᵀ + α I, known by its products."""

    alpha: float = 0.5

    def operator(self, risk):
        return RankOnePlusIdentity(risk.gradient(), self.alpha)


@dataclass(frozen=True)
class RankOnePlusIdentity:
    vector: torch.Tensor
    alpha: float

    @property
    def size(self):
        return len(self.vector)

    def matmat(self, matrix):
        return torch.outer(self.vector, self.vector @ matrix) + self.alpha * matrix


@dataclass(frozen=True)
class Margin(OutputCurvature):
    """Jᵀ J of all outputs: S = I."""

    def factor(self, loss, outputs, targets, generator):
        return torch.eye(outputs.shape[1]).to(outputs).expand(len(outputs), -1, -1)


@dataclass(frozen=True)
class MeanDiagonal(Structure):
    """The multiple of the identity whose trace is that of the curvature."""

    def from_operator(self, operator, risk):
        diagonal = Diagonal().from_operator(operator, risk).values
        return PartialIdentities(((diagonal.mean(), torch.arange(len(diagonal))),), len(diagonal))

    def bytes(self, space, itemsize):
        return itemsize

    def check(self, space, itemsize):
        pass


@dataclass(frozen=True)
class PartialIdentities(Matrix):
    """Σ_j c_j I_j, with I_j the identity on some coordinates: more than one term after the model has grown."""

    terms: tuple
    size: int

    def product(self, vector):
        result = torch.zeros_like(vector)
        for factor, where in self.terms:
            result[where] += factor * vector[where]
        return result

    def plus(self, other):
        return PartialIdentities((*self.terms, *other.terms), self.size)

    def scaled(self, factor):
        return PartialIdentities(tuple((factor * c, where) for c, where in self.terms), self.size)

    def embedded(self, inner, outer):
        positions = outer.positions(inner)
        return PartialIdentities(tuple((c, positions[where]) for c, where in self.terms), outer.size)

    def map_spectrum(self, function):
        raise TypeError("The eigenvalues of a sum are not at hand.")

    def dense(self):
        return torch.stack([self.product(row) for row in torch.eye(self.size).double()])

    def tensors(self):
        return tuple(c for c, _ in self.terms)


@dataclass(frozen=True)
class AbsoluteError(ExampleLoss):
    """ℓ = Σ_c √(1 + (f_c − y_c)²), a smooth absolute error."""

    def per_example(self, outputs, targets):
        return (1 + (outputs - targets).square()).sqrt().sum(1)

    def gradient(self, outputs, targets):
        r = outputs - targets
        return r / (1 + r.square()).sqrt()

    def hessian_factor(self, outputs, targets):
        return (1 + (outputs - targets).square()).pow(-0.75).diag_embed()

    def sample_gradients(self, outputs, targets, uniform):
        raise TypeError("No likelihood is known for this loss.")

    def check_likelihood(self):
        raise ValueError("No likelihood is known for this loss.")

    def check(self, outputs, targets):
        if outputs.shape != targets.shape:
            raise ValueError("AbsoluteError needs targets of the outputs' shape.")


@dataclass(frozen=True)
class Sliding(Policy):
    """The sum of the newest two quadratic models; what it keeps more than any policy extends `Past`."""

    def absorb(self, past, risk, curvature, structure):
        new = estimate(curvature, structure, risk)
        newest = getattr(past, "newest", None)
        total = new if newest is None else newest + new
        return SlidingPast(total, experiences=past.experiences + 1, newest=new)


@dataclass(frozen=True)
class SlidingPast(Past):
    newest: QuadraticModel | None = None


class SmoothL1(nn.Module):
    """A criterion of the user's own."""

    def forward(self, outputs, targets):
        return (1 + (outputs - targets).square()).sqrt().sum(1).mean()


@pytest.fixture
def registered():
    """Registrations of this test only."""
    rules = import_module("avalanche_curv.core.structures.rules")._RULES
    before = dict(rules)
    yield
    rules.clear()
    rules.update(before)


@pytest.fixture
def experiences(net, new_problem):
    risks = []
    for seed in range(2):
        risks.append(new_problem(net, "cross_entropy", seed=seed).risk)
        with torch.no_grad():
            net[2].weight += 0.3
    grown = nn.Linear(5, 4).double()
    with torch.no_grad():
        grown.weight[:3], grown.bias[:3] = net[2].weight, net[2].bias
    net[2] = grown
    return net, [*risks, new_problem(net, "cross_entropy", seed=2).risk]


def restricted_to_diagonal_mean(matrix):
    return matrix.diagonal().mean() * torch.eye(len(matrix)).double()


@pytest.mark.parametrize("structure", [Dense(), BlockDiagonal(), Diagonal(), MeanDiagonal()])
def test_a_curvature_with_only_an_operator_works_with_every_structure(structure, problem, close):
    known = problem("mlp", "cross_entropy")
    g = known.paper.gradients.mean(0)
    exact = torch.outer(g, g) + 0.5 * torch.eye(43).double()
    found = estimate(GradientAndWeightDecay(), structure, known.risk).curvature.dense()
    close(found.diagonal().sum(), exact.trace())
    if structure == Dense():
        close(found, exact)
    if structure == MeanDiagonal():
        close(found, restricted_to_diagonal_mean(exact))


@pytest.mark.parametrize("structure", [Dense(), BlockDiagonal(), Diagonal(), MeanDiagonal()])
def test_a_curvature_with_only_a_factor_works_with_every_structure_and_in_pictures(
    structure, architecture, problem, close
):
    known = problem(architecture, "cross_entropy")
    J = known.paper.jacobians
    exact = torch.einsum("ncp,ncq->pq", J, J) / 7
    found = estimate(Margin(), structure, known.risk).curvature.dense()
    close(found.trace(), exact.trace())
    if structure == Dense():
        close(found, exact)
    theta = known.risk.anchor + 0.1
    increase = example_models(Margin(), known.risk).compare(theta).quadratic.increase
    close(increase, 0.5 * (J @ (theta - known.risk.anchor)).square().sum(1))


@pytest.mark.parametrize("kind", [GGN(), Fisher(samples=2, seed=0), EmpiricalFisher(), Hessian(), Margin()])
def test_a_structure_of_ones_own_works_with_every_curvature(kind, architecture, problem, close):
    risk = problem(architecture, "cross_entropy").risk
    exact = estimate(kind, Dense(), risk).curvature.dense()
    close(estimate(kind, MeanDiagonal(), risk).curvature.dense(), restricted_to_diagonal_mean(exact))


@pytest.mark.parametrize(
    "policy",
    [Accumulate(), Accumulate(fraction=0.5), Merge(decay=0.5), Refresh(fraction=0.5), Refresh(gradient=True),
     AdaptiveRefresh(fraction=0.5)],
    ids=str,
)
@pytest.mark.parametrize(
    ("kind", "structure"),
    [(GradientAndWeightDecay(), Diagonal()), (Margin(), MeanDiagonal()), (Margin(), Diagonal()), (Margin(), Dense())],
    ids=str,
)
def test_policies_fold_them_while_the_head_grows(policy, kind, structure, experiences, close):
    model, risks = experiences
    past = Past()
    for risk in risks:
        past = policy.absorb(past, risk, kind, structure)
    for p in model.parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    delta = past.model.displacement(model)
    found = torch.cat([g.reshape(-1) for g in torch.autograd.grad(past.model.penalty(model), list(model.parameters()))])
    slope = 0 if past.model.gradient is None else past.model.gradient
    close(found, slope + past.model.curvature.dense() @ delta)
    if policy == Accumulate():
        close(past.model(model), sum(estimate(kind, structure, risk)(model) for risk in risks))


@pytest.mark.parametrize("kind", [GradientAndWeightDecay(), Margin(), GGN()], ids=str)
@pytest.mark.parametrize("structure", [MeanDiagonal(), Diagonal(), LowRank(Rank(2)), MatrixFree()], ids=str)
def test_a_policy_of_ones_own_takes_every_kind_and_structure(kind, structure, experiences, close):
    model, risks = experiences
    past = Past()
    for iteration, risk in enumerate(risks):
        assert Sliding().revise(past, model, iteration, kind, structure) is past
        past = Sliding().absorb(past, risk, kind, structure)
    assert (past.experiences, past.refreshes, Sliding().revises) == (3, (), False)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
    close(past.model(model), sum(estimate(kind, structure, risk)(model) for risk in risks[1:]), 1e-8)


KINDS_OF_ONES_OWN = {
    GradientAndWeightDecay(): lambda g, J: torch.outer(g, g) + 0.5 * torch.eye(43).double(),
    Margin(): lambda g, J: torch.einsum("ncp,ncq->pq", J, J) / 7,
}


@pytest.mark.parametrize("kind", KINDS_OF_ONES_OWN, ids=str)
def test_structures_landscape_projection_and_operators_take_a_kind_of_ones_own(kind, problem, close):
    known = problem("mlp", "cross_entropy")
    exact = KINDS_OF_ONES_OWN[kind](known.paper.gradients.mean(0), known.paper.jacobians)
    values, vectors = torch.linalg.eigh(exact)
    for structure in (MatrixFree(), LowRank(Rank(43))):
        close(estimate(kind, structure, known.risk).curvature.dense(), exact, 1e-8)
    flat = estimate(kind, FlatSpectrum(LowRank(Rank(2))), known.risk).curvature
    close(flat.values, values[-1].expand(2), 1e-8)
    found = landscape(kind, known.risk, k=2)
    assert (found.sharpness, found.trace) == pytest.approx((float(values[-1]), float(exact.trace())))
    (eigenvectors,) = Eigenspace(kind, Rank(1), examples=None).find(known.risk, 0).findings
    close((eigenvectors.rows @ vectors[:, -1]).abs(), torch.ones(1).double(), 1e-8)
    v = torch.linspace(-1, 1, 43).double()
    close(kind.linear_operator(known.risk) @ v, exact @ v)


def test_fidelity_and_kronecker_factors_name_what_a_kind_of_ones_own_lacks(problem):
    risk = problem("mlp", "cross_entropy").risk
    for ask in (lambda: example_models(GradientAndWeightDecay(), risk), lambda: PastModels(GradientAndWeightDecay())):
        with pytest.raises(TypeError, match="or a subclass of OutputCurvature"):
            ask()
    with pytest.raises(TypeError, match=r"register one with @rule\(GradientAndWeightDecay, Kronecker\)"):
        estimate(GradientAndWeightDecay(), Kronecker(), risk)
    assert estimate(Margin(), Kronecker(), risk).curvature.trace() > 0


@pytest.fixture
def one_process(tmp_path):
    """A process group of one."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")
def test_they_are_estimated_over_processes(one_process, problem, close):
    known = problem("mlp", "cross_entropy")
    shards = ShardedRisk.snapshot(known.model, known.criterion, known.risk.batches)
    for kind in KINDS_OF_ONES_OWN:
        for structure in (MeanDiagonal(), Dense(), LowRank(Rank(2)), MatrixFree()):
            found = estimate_sharded(kind, structure, shards).curvature.dense()
            close(found, estimate(kind, structure, known.risk).curvature.dense(), 1e-8)


@pytest.mark.parametrize("structure", [MeanDiagonal(), BlockDiagonal(PerLayer(), MeanDiagonal())], ids=str)
def test_a_matrix_of_ones_own_has_what_is_derived_from_its_products(structure, problem, net, close):
    past = estimate(GGN(), structure, problem("mlp", "cross_entropy").risk)
    matrix, whole = past.curvature, past.curvature.dense()
    v = torch.linspace(-1, 1, 43).double()
    close(matrix.damped(0.5).product(v), whole @ v + 0.5 * v)
    close(matrix.quadratic_form(v), v @ whole @ v)
    assert matrix.trace() == pytest.approx(float(whole.trace()))
    assert matrix.largest() == pytest.approx(float(whole.diagonal().max()), rel=1e-2)
    close(Penalty(past, 2.0)(net), 2 * past(net))


def test_a_shortcut_of_ones_own_is_taken_for_its_pair_and_subclasses(registered, problem, close):
    taken = []

    @rule(Margin, MeanDiagonal)
    def traces(curvature, structure, risk):
        taken.append(type(curvature).__name__)
        squares = sum(
            torch.autograd.grad(output, risk.parameters, retain_graph=True)[i].square().sum()
            for x, _ in risk for output in risk.outputs(x).reshape(-1) for i in range(4)
        )
        return PartialIdentities(((squares / risk.examples / risk.space.size, torch.arange(risk.space.size)),), 43)

    class Wider(Margin):
        pass

    risk = problem("mlp", "cross_entropy").risk
    exact = restricted_to_diagonal_mean(estimate(Margin(), Dense(), risk).curvature.dense())
    assert taken == []
    for kind in (Margin(), Wider()):
        close(estimate(kind, MeanDiagonal(), risk).curvature.dense(), exact)
    assert taken == ["Margin", "Wider"]


def test_the_nearest_registered_pair_is_taken(registered, problem):
    class Child(Margin):
        pass

    def constant(value):
        return lambda curvature, structure, risk: PartialIdentities(
            ((torch.tensor(value).double(), torch.arange(43)),), 43
        )

    rule(Margin, Structure)(constant(1.0))
    rule(Child, MeanDiagonal)(constant(2.0))
    risk = problem("mlp", "cross_entropy").risk
    assert estimate(Margin(), MeanDiagonal(), risk).curvature.dense()[0, 0] == 1
    assert estimate(Child(), MeanDiagonal(), risk).curvature.dense()[0, 0] == 2


@pytest.mark.parametrize("architecture", ["mlp"])
def test_a_loss_of_ones_own(architecture, problem, exact_problem, on_paper, close):
    @example_loss.register
    def _(criterion: SmoothL1) -> ExampleLoss:
        return AbsoluteError()

    old = problem(architecture, "mean_square")
    formula = on_paper(SmoothL1(), lambda f, y: (1 + (f - y).square()).sqrt().sum())
    known = exact_problem(old.model, formula, old.paper.inputs, old.paper.targets)
    assert known.risk.value() == pytest.approx(SmoothL1()(old.model(old.paper.inputs), old.paper.targets).item())
    for kind, matrices in (
        (GGN(), known.paper.ggns), (EmpiricalFisher(), known.paper.empirical_fishers),
        (Hessian(), known.paper.hessians),
    ):
        close(estimate(kind, Dense(), known.risk).curvature.dense(), matrices.mean(0))
    with pytest.raises(ValueError, match="No likelihood"):
        estimate(Fisher(), Diagonal(), known.risk)
    with pytest.raises(ValueError, match="AbsoluteError needs targets"):
        EmpiricalRisk.snapshot(old.model, SmoothL1(), [(torch.zeros(1, 4).double(), torch.zeros(1, 2))])


def test_a_quadratic_model_can_be_written_by_hand(net):
    space = ParameterSpace.of(net)
    ridge = QuadraticModel(
        space, torch.zeros(43).double(), PartialIdentities(((torch.tensor(2.0).double(), torch.arange(43)),), 43)
    )
    ridge.penalty(net).backward()
    assert all(torch.allclose(p.grad, 2 * p) for p in net.parameters())
