"""Linear operators of curvlinops and SciPy as curvature, and curvature as theirs, against explicit matrices."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator as SciPyOperator
from scipy.sparse.linalg import eigsh
from torch import nn

from avalanche_curv import (
    GGN,
    Accumulate,
    Dense,
    Diagonal,
    EmpiricalFisher,
    Energy,
    Fisher,
    FromLinearOperator,
    Hessian,
    Kronecker,
    LowRank,
    Past,
    Rank,
    estimate,
)

curvlinops = pytest.importorskip("curvlinops")
CLASSES = {
    Hessian(): curvlinops.HessianLinearOperator,
    GGN(): curvlinops.GGNLinearOperator,
    EmpiricalFisher(): curvlinops.EFLinearOperator,
}
NOT_OF_GRADIENTS = {"summed_binary": "curvlinops takes binary targets only"}


@pytest.mark.parametrize("kind", CLASSES, ids=str)
@pytest.mark.parametrize("loss", ["cross_entropy", "smoothed", "weighted", "summed_square", "summed_binary"])
def test_an_operator_of_curvlinops_is_the_kind_of_its_name(kind, loss, architecture, problem, close):
    risk = problem(architecture, loss).risk
    if loss in NOT_OF_GRADIENTS and kind == EmpiricalFisher():
        pytest.skip(NOT_OF_GRADIENTS[loss])
    theirs = FromLinearOperator(CLASSES[kind])
    close(estimate(theirs, Dense(), risk).curvature.dense(), estimate(kind, Dense(), risk).curvature.dense())


@pytest.mark.parametrize("kind", [Hessian(), GGN()], ids=str)
def test_a_mean_over_outputs_is_known_to_hessian_and_ggn(kind, problem, close):
    risk = problem("mlp", "mean_square").risk
    theirs = FromLinearOperator(CLASSES[kind])
    close(estimate(theirs, Dense(), risk).curvature.dense(), estimate(kind, Dense(), risk).curvature.dense())
    with pytest.raises(NotImplementedError, match="Loss must be one of"):
        estimate(FromLinearOperator(curvlinops.EFLinearOperator), Dense(), risk)


@pytest.mark.parametrize("loss", ["cross_entropy", "summed_square"])
def test_the_monte_carlo_fisher_of_curvlinops_and_ours_estimate_the_same_matrix(loss, problem):
    risk, samples = problem("mlp", loss).risk, 3000
    exact = estimate(Fisher(), Dense(), risk).curvature.dense()
    theirs = FromLinearOperator(partial(curvlinops.FisherMCLinearOperator, mc_samples=samples, seed=0))
    for kind in (theirs, Fisher(samples=samples, seed=0)):
        found = estimate(kind, Dense(), risk).curvature.dense()
        assert (found - exact).norm() < 0.05 * exact.norm()


def test_kfac_of_curvlinops_is_ours_and_leaves_no_hooks(problem, close):
    risk = problem("mlp", "cross_entropy").risk
    theirs = FromLinearOperator(
        partial(curvlinops.KFACLinearOperator, fisher_type="type-2", separate_weight_and_bias=False)
    )
    close(estimate(theirs, Dense(), risk).curvature.dense(), estimate(Fisher(), Kronecker(), risk).curvature.dense())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in risk.base.modules())


def test_it_goes_with_structures_and_policies(problem, close):
    risk = problem("mlp", "cross_entropy").risk
    theirs = FromLinearOperator(curvlinops.GGNLinearOperator, is_semidefinite=True)
    for structure in (Diagonal(), LowRank(Rank(3)), LowRank(Energy(0.9))):
        past = Accumulate().absorb(Past(), risk, theirs, structure)
        expected = Accumulate().absorb(Past(), risk, GGN(), structure)
        close(past.model.curvature.dense(), expected.model.curvature.dense(), 1e-6)


def test_an_operator_of_scipy_is_taken_for_the_sum_over_examples(problem, close):
    risk = problem("mlp", "cross_entropy").risk
    whole = np.diag(np.arange(risk.space.size, dtype=float))
    found = FromLinearOperator(
        lambda *_, **__: SciPyOperator(whole.shape, matmat=whole.__matmul__, matvec=whole.__matmul__)
    )
    close(estimate(found, Dense(), risk).curvature.dense(), torch.from_numpy(whole) / risk.examples)


def test_curvature_is_handed_out_as_an_operator_of_curvlinops_and_scipy(problem, close):
    risk = problem("mlp", "cross_entropy").risk
    expected = problem("mlp", "cross_entropy").paper.hessians.mean(0)
    model = estimate(Hessian(), Dense(), risk)
    vectors = torch.randn(risk.space.size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for operator in (Hessian().linear_operator(risk), model.linear_operator()):
        close(operator @ vectors, expected @ vectors)
        lists = operator @ [part.contiguous() for part in risk.space.split(vectors[:, 0])]
        assert [part.shape for part in lists] == list(risk.space.shapes)
        close(risk.space.flatten(lists), expected @ vectors[:, 0])
        found = eigsh(operator.to_scipy(), k=1, which="LA", return_eigenvectors=False)
        assert found[0] == pytest.approx(float(torch.linalg.eigvalsh(expected)[-1]))


@pytest.mark.parametrize("make", [nn.Linear(2, 2), None, "GGN"])
def test_what_makes_no_operator_is_refused(make, problem):
    risk = problem("mlp", "cross_entropy").risk
    with pytest.raises((TypeError, ValueError), match="curvlinops"):
        estimate(
            FromLinearOperator(make if make is None or isinstance(make, str) else lambda *_, **__: make), Dense(), risk
        )
