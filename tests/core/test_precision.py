"""What is computed inside `torch.autocast` and `torch.inference_mode` is what is computed outside."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from avalanche_curv import (
    EKFAC,
    GGN,
    Accumulate,
    AdaptiveRefresh,
    BlockDiagonal,
    Dense,
    Diagonal,
    Eigenspace,
    EmpiricalFisher,
    EmpiricalRisk,
    Fisher,
    FlatSpectrum,
    GradientProjection,
    Hessian,
    Kronecker,
    LowRank,
    MatrixFree,
    Merge,
    Past,
    PerLayer,
    Projector,
    ProtectedSpace,
    Rank,
    Refresh,
    StepProjection,
    estimate,
    landscape,
)
from avalanche_curv.core.fidelity import PastModels
from avalanche_curv.core.precision import in_own_precision, own_precision
from avalanche_curv.core.quadratic.penalty import Penalty, check_takes_dense_gradients
from avalanche_curv.plasticity import Parseval, SpectralRegularizer, gradient_diversity, hidden_activations

STRUCTURES = {
    "diagonal": Diagonal(),
    "dense": Dense(),
    "blocks": BlockDiagonal(PerLayer(), LowRank(Rank(2))),
    "low_rank": LowRank(Rank(5), residual=Diagonal(), max_rank=6),
    "flat": FlatSpectrum(LowRank(Rank(3))),
    "kronecker": Kronecker(),
    "ekfac": EKFAC(),
    "matrix_free": MatrixFree(),
}
KINDS = {"ggn": GGN(), "sampled": Fisher(samples=2, seed=0), "empirical": EmpiricalFisher(), "hessian": Hessian()}
SURROUNDINGS = {"autocast": lambda: torch.autocast("cpu", torch.bfloat16), "inference": torch.inference_mode}
CE = nn.CrossEntropyLoss()


@pytest.fixture(params=SURROUNDINGS)
def surrounding(request):
    """A function that opens the context."""
    return SURROUNDINGS[request.param]


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(9, 4, generator=generator), torch.randint(3, (9,), generator=generator))]


def moved(model):
    generator = torch.Generator().manual_seed(2)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return other


def flat(tensors):
    return torch.cat([torch.as_tensor(t, dtype=torch.float64).detach().reshape(-1) for t in tensors])


def agrees(compute, surrounding, tolerance=1e-5):
    """Compares what `compute()` returns inside and outside of a context, gradients at its end only where there are
    some."""
    outside = flat(compute())
    with surrounding():
        inside = flat(compute())
    assert (inside - outside[: len(inside)]).norm() <= tolerance * outside.norm()


PAIRS = [*((s, "ggn") for s in STRUCTURES), *((s, k) for s in ("low_rank", "matrix_free") for k in KINDS if k != "ggn")]


@pytest.mark.parametrize(("structure", "kind"), PAIRS)
def test_estimates_and_penalties(structure, kind, surrounding):
    curvature, form = KINDS[kind], STRUCTURES[structure]
    model, data = net(), batches()
    now = moved(model)

    def compute():
        past = estimate(curvature, form, EmpiricalRisk.snapshot(model, CE, data), gradient=True)
        past = past + estimate(curvature, form, EmpiricalRisk.snapshot(now, CE, data))
        penalty = past.penalty(now)
        step = torch.ones(past.space.size)
        weighted = Penalty(past, 3.0)(now)
        found = [penalty, weighted, past(now), past.gradient_at(step), past.curvature.product(step)]
        for loss in (penalty, weighted) if penalty.requires_grad else ():
            found += torch.autograd.grad(loss, list(now.parameters()))
        return found

    agrees(compute, surrounding)


@pytest.mark.parametrize("policy", [Accumulate(0.5), Merge(0.9), Refresh(0.5, gradient=True), AdaptiveRefresh(every=1)])
def test_policies(policy, surrounding):
    model, data = net(), batches()
    now = moved(model)

    def compute():
        past = Past()
        for one in (model, now):
            past = policy.absorb(past, EmpiricalRisk.snapshot(one, CE, data), GGN(), LowRank(Rank(5)))
        past = policy.revise(past, model, 1, GGN(), LowRank(Rank(5)))
        assert not any(t.is_inference() for t in (past.model.anchor, *past.model.curvature.tensors()))
        return [past.model.curvature.dense(), past.model.anchor, past.model(moved(now))]

    agrees(compute, surrounding)


def test_fidelity_landscape_and_projection(surrounding):
    model, data = net(), batches()

    def compute():
        risk, now = EmpiricalRisk.snapshot(model, CE, data), moved(model)
        fidelity = PastModels(GGN()).with_experience(risk).measure(now)
        shape = landscape(Hessian(), risk, k=2).numbers()
        space = ProtectedSpace().absorb(risk, Eigenspace(GGN(), Rank(4)))
        with Projector(space, StepProjection()).around_step(now), torch.no_grad():
            for parameter in now.parameters():
                parameter += 0.1
        values = [*fidelity.values(), *shape.values(), risk.value_at(risk.anchor + 1), gradient_diversity(risk)]
        numbers = [v for v in values[:-1] if v == v]
        return [*numbers, values[-1].effective_rank, *now.parameters(), *hidden_activations(now, data[0][0]).values()]

    agrees(compute, surrounding)


@pytest.mark.parametrize("regularizer", [SpectralRegularizer(1.0), Parseval(1.0)])
def test_regularisers_under_autocast(regularizer):
    def compute():
        model = net()
        own = copy.deepcopy(regularizer)
        own.penalty(model).backward()  # inside of autocast too
        own.add_gradients(model)
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    agrees(compute, SURROUNDINGS["autocast"])


def test_training_with_a_penalty_under_autocast_sees_its_exact_gradient():
    model, data = net(), batches()
    past = estimate(GGN(), LowRank(Rank(5)), EmpiricalRisk.snapshot(model, CE, data))
    now = moved(model)
    penalty = Penalty(past, 10.0)
    optimizer = torch.optim.SGD(now.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        expected = 10.0 * past.curvature.dense().double() @ past.displacement(now).double()
        with torch.autocast("cpu", torch.bfloat16):
            loss = 0.0 * CE(now(data[0][0]), data[0][1]) + penalty(now)
            loss.backward()
        found = flat(p.grad for p in now.parameters())
        assert (found - expected).norm() <= 1e-5 * expected.norm()
        optimizer.step()


def test_models_and_examples_made_in_inference_mode():
    with torch.inference_mode():
        model, data = net(), batches()
    found = estimate(Hessian(), Dense(), EmpiricalRisk.snapshot(model, CE, data)).curvature.dense()
    expected = estimate(Hessian(), Dense(), EmpiricalRisk.snapshot(net(), CE, batches())).curvature.dense()
    assert torch.equal(found, expected)


def test_the_callers_context_is_left_as_it_was():
    @in_own_precision
    def fails():
        raise KeyError

    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        with pytest.raises(KeyError):
            fails()
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_inference_mode_enabled()
        with own_precision():
            assert not torch.is_autocast_enabled("cpu")
            assert not torch.is_grad_enabled()
    with nullcontext(), own_precision():
        assert torch.is_grad_enabled()


class Mixed(nn.Module):
    """Layers of two types, each of which is given inputs of its own."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5).to(first), nn.Linear(5, 3).to(second)

    def forward(self, x):
        hidden = torch.tanh(self.first(x.to(self.first.weight.dtype)))
        return self.second(hidden.to(self.second.weight.dtype))


@pytest.mark.parametrize("structure", [Diagonal(), Kronecker(), EKFAC(), LowRank(Rank(6)), MatrixFree()])
@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_models_of_layers_of_two_types(types, structure):
    model, data = Mixed(*types), batches()
    found = estimate(GGN(), structure, EmpiricalRisk.snapshot(model, CE, data))
    whole = copy.deepcopy(model).double()
    expected = estimate(GGN(), structure, EmpiricalRisk.snapshot(whole, CE, data))
    now = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in now.parameters():
            parameter += 0.5
    step = found.displacement(now)
    slope = expected.curvature.product(step.double())
    torch.testing.assert_close(found.curvature.product(step).double(), slope, rtol=1e-3, atol=1e-5)
    for penalty in (found.penalty, Penalty(found, 1.0)):
        slopes = torch.autograd.grad(penalty(now), list(now.parameters()))
        assert [s.dtype for s in slopes] == [p.dtype for p in now.parameters()]
        torch.testing.assert_close(flat(slopes), slope, rtol=1e-2, atol=1e-4)


class Casting(Mixed):
    def forward(self, x):
        return self.second(self.first(x.bfloat16()).float())


class OwnAutocast(Mixed):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.second(self.first(x)).float()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Casting(torch.bfloat16, torch.float32), r"does not take torch.float32 when frozen: .* Cast to the type of"),
        (OwnAutocast(torch.float32, torch.float32), r"in torch.bfloat16 when frozen. .* enabled=self.training"),
    ],
    ids=["casts", "autocast"],
)
def test_models_that_compute_in_half_precision_when_frozen_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        EmpiricalRisk.snapshot(model, CE, batches())


def of_one_lookup(**options):
    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(6, 4, **options), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.table(x).mean(1))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Lookup()


def lookups():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(6, (7, 3), generator=generator), torch.randint(3, (7,), generator=generator)


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
@pytest.mark.parametrize("structure", [Diagonal(), LowRank(Rank(7))])
def test_bags_of_embeddings_equal_a_loop_over_examples(mode, structure):
    model = nn.Sequential(nn.EmbeddingBag(6, 4, mode=mode), nn.Linear(4, 3)).double()
    x, y = lookups()
    found = estimate(EmpiricalFisher(), structure, EmpiricalRisk.snapshot(model, CE, [(x, y)])).curvature.dense()
    each = (torch.autograd.grad(CE(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters())) for i in range(len(y)))
    rows = torch.stack([flat(slopes) for slopes in each])
    whole = rows.T @ rows / len(y)
    expected = whole.diagonal().diag() if isinstance(structure, Diagonal) else whole
    torch.testing.assert_close(found, expected)


def test_a_penalty_trains_sparse_embeddings_by_sgd_and_a_projected_gradient_is_refused():
    model, dense = of_one_lookup(sparse=True), of_one_lookup()
    x, y = lookups()
    risk = EmpiricalRisk.snapshot(dense, CE, [(x, y)])
    past = estimate(EmpiricalFisher(), Diagonal(), risk)
    for one in (model, dense):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            (CE(one(x), y) + Penalty(past, 2.0)(one)).backward()
            optimizer.step()
    torch.testing.assert_close(flat(model.parameters()), flat(dense.parameters()))
    space = ProtectedSpace().absorb(risk, Eigenspace(EmpiricalFisher(), Rank(3)))
    model.zero_grad()
    CE(model(x), y).backward()
    with pytest.raises(TypeError, match=r"'table.weight'.* are sparse, .* Use StepProjection\(\)"):
        Projector(space, GradientProjection()).before_step(model)
    with pytest.raises(TypeError, match="SparseAdam steps sparse gradients alone"):
        check_takes_dense_gradients(torch.optim.SparseAdam([model.table.weight]))


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("structure", [LowRank(Rank(5)), Diagonal()])
def test_lbfgs_reaches_the_minimum_on_paper(structure, search):
    """Of strength ½ (θ − a)ᵀC(θ − a) + ½ ‖θ − b‖², where (strength C + I) θ = strength C a + b."""
    model, data, strength = net().double(), batches(), 1e3
    data = [(x.double(), y) for x, y in data]
    past = estimate(GGN(), structure, EmpiricalRisk.snapshot(model, CE, data))
    start = past.space.vector(moved(model)) + 1
    matrix = past.curvature.dense()
    best = torch.linalg.solve(strength * matrix + torch.eye(len(start)), strength * matrix @ past.anchor + start)
    for penalty in (lambda model: strength * past.penalty(model), Penalty(past, strength)):
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), past.space.split(start)):
                parameter.copy_(value)
        optimizer = torch.optim.LBFGS(
            model.parameters(), max_iter=300, tolerance_grad=1e-12, tolerance_change=0, line_search_fn=search
        )

        def closure(penalty=penalty, optimizer=optimizer):
            optimizer.zero_grad()
            values = torch.cat([parameter.reshape(-1) for parameter in model.parameters()])
            loss = penalty(model) + (values - start).square().sum() / 2
            loss.backward()
            return loss

        optimizer.step(closure)
        torch.testing.assert_close(past.space.vector(model), best, rtol=0, atol=1e-6)
