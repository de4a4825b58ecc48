import itertools
import math

import pytest
import torch
from torch import nn

from avalanche_curv import (
    GGN,
    Absolute,
    BatchedEmpiricalFisher,
    BlockDiagonal,
    Clip,
    Dense,
    Diagonal,
    EmpiricalFisher,
    Fisher,
    Hessian,
    estimate,
)


def dense(kind, risk):
    return estimate(kind, Dense(), risk).curvature.dense()


def with_bias_column(inputs):
    return torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)


def linear_layer_order(outputs, features):
    """Where the coordinates (weight, then bias) lie among pairs (output, feature or bias column)."""
    pairs = torch.arange(outputs * (features + 1)).view(outputs, features + 1)
    return torch.cat([pairs[:, :-1].reshape(-1), pairs[:, -1]])


def mean_of_kroneckers(output_curvatures, inputs):
    """(1/N) Σ_i H_i ⊗ x_i x_iᵀ in the order of a linear layer's parameters, x_i with its bias column."""
    x = with_bias_column(inputs)
    terms = [torch.kron(h, torch.outer(row, row)) for h, row in zip(output_curvatures, x)]
    order = linear_layer_order(output_curvatures.shape[1], inputs.shape[1])
    return torch.stack(terms).mean(0)[order][:, order]


def softmax_covariance(f):
    p = f.softmax(0)
    return p.diag() - torch.outer(p, p)


def expected_square_of_score(name, f):
    """E[∇_f ℓ ∇_f ℓᵀ] over the model's own labels; a criterion's mean over outputs scales the log-likelihood by 1/C."""
    scale = 1.0 if "summed" in name or name in ("cross_entropy", "smoothed") else 1 / len(f)
    if "square" in name:  # Gaussian of variance 1/2 in each output: ∇ = 2 (f − y)
        return scale * 4 * 0.5 * torch.eye(len(f)).double()
    if "binary" in name:
        p = f.sigmoid()
        labels = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(f)))).double()
        chances = (labels * p + (1 - labels) * (1 - p)).prod(1)
        scores = p - labels
    else:
        chances = f.softmax(0)
        scores = chances - torch.eye(len(f)).double()
    return scale * scores.T @ (chances[:, None] * scores)


@pytest.mark.parametrize("kind", [GGN(), Hessian(), Fisher()])
def test_curvature_of_linear_regression_is_twice_the_second_moment_of_the_inputs(kind, new_problem, make_model, close):
    problem = new_problem(make_model(lambda: nn.Linear(4, 1)), "mean_square")
    x = with_bias_column(problem.paper.inputs)
    close(dense(kind, problem.risk), 2 * x.T @ x / 7)


@pytest.mark.parametrize("kind", [GGN(), Hessian(), Fisher()])
@pytest.mark.parametrize(("name", "factor"), [("mean_square", 2 / 3), ("summed_square", 2.0)])
def test_regression_with_several_outputs_has_one_such_block_an_output(
    kind, name, factor, new_problem, make_model, close
):
    problem = new_problem(make_model(lambda: nn.Linear(4, 3)), name)
    identities = torch.eye(3).double().expand(7, 3, 3)
    close(dense(kind, problem.risk), factor * mean_of_kroneckers(identities, problem.paper.inputs))


@pytest.mark.parametrize("kind", [GGN(), Hessian(), Fisher()])
def test_curvature_of_logistic_regression(kind, new_problem, make_model, close):
    problem = new_problem(make_model(lambda: nn.Linear(4, 1)), "binary")
    x, p = with_bias_column(problem.paper.inputs), problem.paper.logits.sigmoid()
    close(dense(kind, problem.risk), (x * p * (1 - p)).T @ x / 7)


@pytest.mark.parametrize("kind", [GGN(), Hessian(), Fisher()])
@pytest.mark.parametrize("name", ["cross_entropy", "smoothed"])
def test_curvature_of_softmax_regression(kind, name, new_problem, make_model, close):
    problem = new_problem(make_model(lambda: nn.Linear(4, 3)), name)
    covariances = torch.stack([softmax_covariance(f) for f in problem.paper.logits])
    close(dense(kind, problem.risk), mean_of_kroneckers(covariances, problem.paper.inputs))


def test_empirical_fisher_of_softmax_regression(new_problem, make_model, close):
    problem = new_problem(make_model(lambda: nn.Linear(4, 3)), "cross_entropy")
    residuals = problem.paper.logits.softmax(1) - torch.eye(3).double()[problem.paper.targets]
    squares = residuals[:, :, None] * residuals[:, None, :]
    close(dense(EmpiricalFisher(), problem.risk), mean_of_kroneckers(squares, problem.paper.inputs))


def test_ggn_is_the_mean_of_jacobian_sandwiches(known, close):
    close(dense(GGN(), known.risk), known.paper.ggns.mean(0))


def test_fisher_is_the_expectation_over_the_models_own_labels(architecture, likelihood, problem, close):
    known = problem(architecture, likelihood)
    expected = known.paper.fishers(lambda f: expected_square_of_score(likelihood, f)).mean(0)
    close(dense(Fisher(), known.risk), expected)


def test_fisher_needs_no_labels(problem, close):
    risk = problem("mlp", "cross_entropy").risk
    batches = [(x, torch.zeros_like(y)) for x, y in risk]
    relabelled = type(risk)(risk.base, risk.loss, batches)
    for kind in (Fisher(), Fisher(samples=3, seed=1)):
        close(dense(kind, relabelled), dense(kind, risk))


def test_empirical_fisher_is_the_mean_of_outer_products(known, close):
    close(dense(EmpiricalFisher(), known.risk), known.paper.empirical_fishers.mean(0))


def test_hessian_is_the_mean_of_second_derivatives(loss_name, problem, close):
    known = problem("mlp", loss_name)
    close(dense(Hessian(), known.risk), known.paper.hessians.mean(0))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_batched_empirical_fisher_squares_the_means_of_mini_batches(size, architecture, problem, close):
    known = problem(architecture, "cross_entropy")
    means = known.paper.batch_gradients(size)
    close(dense(BatchedEmpiricalFisher(size), known.risk), means.T @ means / len(means))


def test_batches_of_one_give_the_empirical_fisher(loss_name, problem, close):
    risk = problem("mlp", loss_name).risk
    close(dense(BatchedEmpiricalFisher(1), risk), dense(EmpiricalFisher(), risk))


@pytest.mark.parametrize(
    "kind", [GGN(), Fisher(), Fisher(samples=3, seed=5), EmpiricalFisher(), Hessian(), BatchedEmpiricalFisher(2)]
)
@pytest.mark.parametrize("structure", [Dense(), Diagonal()])
def test_the_batch_size_of_the_data_does_not_matter(kind, structure, problem, close):
    for model in ("mlp", "conv"):
        risk = problem(model, "cross_entropy").risk
        results = [estimate(kind, structure, risk.rebatched(n)).curvature.dense() for n in (1, 3)]
        for other in results[1:]:
            close(other, results[0])


def test_the_batch_size_of_the_batched_empirical_fisher_does(problem):
    risk = problem("mlp", "cross_entropy").risk
    traces = [dense(BatchedEmpiricalFisher(size), risk).trace() for size in (1, 3, 7)]
    assert traces[0] > traces[1] > traces[2]


@pytest.mark.parametrize(
    "kind", [GGN(), Fisher(), Fisher(samples=2, seed=0), EmpiricalFisher(), Hessian(), BatchedEmpiricalFisher(3)]
)
def test_the_reduction_of_cross_entropy_does_not_matter(kind, net, problem, close):
    batches = list(problem("mlp", "cross_entropy").risk)
    risks = [
        type(problem("mlp", "cross_entropy").risk).snapshot(net, nn.CrossEntropyLoss(reduction=reduction), batches)
        for reduction in ("mean", "sum", "none")
    ]
    for risk in risks[1:]:
        close(dense(kind, risk), dense(kind, risks[0]))


def test_summed_squares_are_c_times_the_mean_over_c_outputs(problem, close):
    summed, mean = problem("mlp", "summed_square").risk, problem("mlp", "mean_square").risk
    close(dense(GGN(), summed), 3 * dense(GGN(), mean))
    close(dense(EmpiricalFisher(), summed), 9 * dense(EmpiricalFisher(), mean))


def test_the_error_of_the_monte_carlo_fisher_falls_with_the_root_of_the_samples(likelihood, new_problem, make_model):
    risk = new_problem(make_model(lambda: nn.Linear(4, 3)), likelihood).risk
    exact, samples, seeds = dense(Fisher(), risk), (1, 8, 64, 256), 12
    errors = [
        sum((dense(Fisher(samples=m, seed=seed), risk) - exact).square().sum().item() for seed in range(seeds)) / seeds
        for m in samples
    ]
    x = torch.tensor([math.log(m) for m in samples])
    y = torch.tensor([0.5 * math.log(error) for error in errors])
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert slope.item() == pytest.approx(-0.5, abs=0.08)


def test_the_draws_of_the_monte_carlo_fisher_belong_to_its_seed(problem):
    risk = problem("mlp", "cross_entropy").risk
    first, again, other = (dense(Fisher(samples=1, seed=seed), risk) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("kind", [GGN(), Fisher(), Fisher(samples=2, seed=0), EmpiricalFisher()])
def test_outer_products_are_positive_semi_definite(kind, likelihood, problem):
    assert torch.linalg.eigvalsh(dense(kind, problem("mlp", likelihood).risk)).min() > -1e-12


def test_the_hessian_of_this_network_is_indefinite(problem):
    eigenvalues = torch.linalg.eigvalsh(dense(Hessian(), problem("mlp", "cross_entropy").risk))
    assert eigenvalues.min() < -1e-3 < 1e-3 < eigenvalues.max()


@pytest.mark.parametrize(
    ("part", "function"), [(Clip(), lambda values: values.clamp(min=0)), (Absolute(), lambda values: values.abs())]
)
def test_the_positive_part_changes_the_eigenvalues_of_what_is_kept(part, function, problem, restricted, close):
    known = problem("mlp", "cross_entropy")
    exact, sizes = known.paper.hessians.mean(0), known.risk.space.sizes
    for structure, name in ((Dense(), "dense"), (BlockDiagonal(), "blocks"), (Diagonal(), "diagonal")):
        kept = restricted(name, exact, sizes)
        mended = estimate(Hessian(psd=part), structure, known.risk).curvature.dense()
        close(torch.linalg.eigvalsh(mended), function(torch.linalg.eigvalsh(kept)).sort().values, 1e-9)
        close(mended @ kept, kept @ mended, 1e-9)  # the same eigenvectors


def test_monte_carlo_fisher_names_its_mistakes():
    with pytest.raises(ValueError, match="give samples=m, or drop the seed"):
        Fisher(seed=0)
    with pytest.raises(ValueError, match=r"at least 1; got 0. Leave it out for the exact"):
        Fisher(samples=0)


@pytest.mark.parametrize("structure", [Dense(), Diagonal()])
@pytest.mark.parametrize(
    ("name", "remedy"), [("weighted", "or drop the class weights"), ("weighted_binary", "or drop pos_weight")]
)
def test_no_fisher_of_a_weighted_loss(structure, name, remedy, problem):
    for kind in (Fisher(), Fisher(samples=2, seed=0)):
        with pytest.raises(ValueError, match=f"not defined.*{remedy}"):
            estimate(kind, structure, problem("mlp", name).risk)
