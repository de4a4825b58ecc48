import pytest
import torch
from torch import nn

from avalanche_curv import (
    EKFAC,
    GGN,
    Accumulate,
    AdaptiveRefresh,
    BlockDiagonal,
    CurvatureRegularizer,
    Dense,
    Diagonal,
    EmpiricalFisher,
    EmpiricalRisk,
    FlatSpectrum,
    KeepTerms,
    Kronecker,
    LowRank,
    MatrixFree,
    Merge,
    Past,
    PiWeighted,
    Rank,
    Refresh,
    estimate,
)
from avalanche_curv.core.quadratic.policies import part_of

STRUCTURES = [Dense(), BlockDiagonal(), Diagonal(), MatrixFree()]


@pytest.fixture
def experiences(make_model):
    """Three risks along a trajectory of one model whose head grows before the third."""
    model = make_model(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))
    generator = torch.Generator().manual_seed(0)
    risks = []
    for experience in range(3):
        if experience == 2:
            old, model[2] = model[2], make_model(lambda: nn.Linear(3, 4), seed=8)
            with torch.no_grad():
                model[2].weight[:2], model[2].bias[:2] = old.weight, old.bias
        x = torch.randn(8, 4, generator=generator).double()
        y = torch.randint(2, (8,), generator=generator) + (2 if experience == 2 else 0)
        risks.append(EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), list(zip(x.split(3), y.split(3)))))
        with torch.no_grad():
            for p in model.parameters():
                p += 0.3 * torch.randn(p.shape, generator=generator)
    return model, risks


def absorbed(policy, risks, curvature, structure):
    past = Past()
    for risk in risks:
        past = policy.absorb(past, risk, curvature, structure)
    return past


def widened(matrix, inner, outer):
    where = outer.positions(inner)
    wide = torch.zeros(outer.size, outer.size).double()
    wide[where[:, None], where] = matrix
    return wide


@pytest.mark.parametrize("structure", STRUCTURES)
def test_accumulate_is_the_sum_of_each_quadratic_at_its_own_anchor(structure, experiences, close):
    model, risks = experiences
    past = absorbed(Accumulate(), risks, GGN(), structure)
    explicit = torch.zeros(()).double()
    for risk in risks:
        delta = torch.cat([t.reshape(-1) for t in risk.space.tensors(model)]) - risk.anchor
        explicit = explicit + 0.5 * delta @ estimate(GGN(), structure, risk).curvature.dense() @ delta
    assert past.experiences == 3
    assert past.stored == ()
    close(past.model(model), explicit.detach())
    expected = torch.autograd.grad(explicit, list(model.parameters()))
    for a, b in zip(torch.autograd.grad(past.model.penalty(model), list(model.parameters())), expected):
        close(a, b)


def test_accumulate_on_a_fraction_estimates_on_the_part_that_others_keep(experiences, close):
    model, risks = experiences
    policy = Accumulate(fraction=0.5, seed=3)
    past = absorbed(policy, risks, GGN(), Diagonal())
    parts = [part_of(risk, 0.5, 3, t) for t, risk in enumerate(risks)]
    assert [part.examples for part in parts] == [4, 4, 4]
    assert past.model(model).item() == pytest.approx(
        sum(estimate(GGN(), Diagonal(), part)(model).item() for part in parts), rel=1e-10
    )


def test_merge_estimates_on_the_same_part_of_a_fraction(experiences):
    _, risks = experiences
    past = absorbed(Merge(fraction=0.5, seed=3), risks, GGN(), Diagonal())
    parts = [estimate(GGN(), Diagonal(), part_of(risk, 0.5, 3, t)) for t, risk in enumerate(risks)]
    assert past.model.curvature.trace() == pytest.approx(sum(part.curvature.trace() for part in parts), rel=1e-10)
    whole = absorbed(Merge(), risks, GGN(), Diagonal()).model.curvature.trace()
    assert past.model.curvature.trace() != pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_merge_follows_its_recursion(structure, decay, experiences, close):
    model, risks = experiences
    past = absorbed(Merge(decay=decay), risks, GGN(), structure)
    space = risks[-1].space
    matrices = [widened(estimate(GGN(), structure, r).curvature.dense(), r.space, space) for r in risks]
    expected = decay * (decay * matrices[0] + matrices[1]) + matrices[2]
    close(past.model.curvature.dense(), expected)
    assert torch.equal(past.model.anchor, risks[-1].anchor)
    assert past.model.gradient is None
    assert past.model.constant == 0
    assert past.experiences == 3
    delta = space.vector(model) - risks[-1].anchor
    close(past.model(model), 0.5 * delta @ expected @ delta)


def test_merge_without_decay_differs_from_accumulate_by_its_anchor_only(experiences, close):
    _, risks = experiences
    merged, summed = (absorbed(p, risks, GGN(), Diagonal()).model for p in (Merge(), Accumulate()))
    close(merged.curvature.dense(), summed.curvature.dense())
    assert summed.gradient.abs().max() > 0


SUMMED = nn.MSELoss(reduction="sum")
CUTS = [(8,), (3, 3, 2), (1,) * 8]


def in_parts(policy, cut, examples, structure=None, per=4):
    """The past of a linear model that stays as it is and meets `examples` in parts, `per` of them for an experience;
    and its anchor."""
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
    past = Past()
    for x in examples.split(cut):
        risk = EmpiricalRisk.snapshot(model, nn.MSELoss(), [(x, x[:, :1])])
        past = policy.absorb_part(past, risk, GGN(), structure or Dense(), len(x) / per)
    return past.model, model.weight.detach()[0]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("policy", [Accumulate(), Merge()])
def test_parts_at_a_fixed_model_are_their_examples_at_once_however_they_are_cut(policy, cut, close):
    examples = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)).double()
    model, anchor = in_parts(policy, cut, examples)
    expected = sum(2 * torch.outer(x, x) for x in examples) / 4  # two experiences of 4, of which each is a mean
    close(model.curvature.dense(), expected)
    away = torch.tensor([0.3, 0.1, -1.0]).double()
    close(model.increase(away) + model.constant, 0.5 * away @ expected @ away)
    assert torch.equal(model.anchor, anchor)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
def test_a_moving_average_decays_with_examples_and_not_with_parts(decay, cut, close):
    first, second = torch.tensor([[1.0, 0, 2], [0, 3, 0]]).double()
    examples = torch.stack([first] * 8 + [second] * 8)
    model, _ = in_parts(Merge(decay), cut + cut, examples, per=8)  # two experiences, each of one example many times
    close(model.curvature.dense(), 2 * decay * torch.outer(first, first) + 2 * torch.outer(second, second))


def test_parts_of_a_fraction_are_estimated_on_it_and_weigh_as_a_whole(close):
    examples = torch.ones(8, 3).double()
    whole, part = (in_parts(Accumulate(fraction=f), (4, 4), examples, Diagonal())[0] for f in (1.0, 0.25))
    close(whole.curvature.dense(), part.curvature.dense())


@pytest.mark.parametrize(
    "structure",
    [Kronecker(KeepTerms()), EKFAC(KeepTerms()), LowRank(Rank(2)), MatrixFree(), BlockDiagonal(block=LowRank(Rank(2)))],
    ids=lambda structure: type(structure).__name__,
)
def test_a_past_that_would_grow_with_every_part_is_refused(structure):
    for policy in (Accumulate(), Merge()):
        with pytest.raises(TypeError, match=r"keeps a term for each.*Take Kronecker\(\)"):
            policy.check_parts(structure, updates=2)


def test_a_past_of_parts_takes_no_more_memory_with_more_of_them():
    examples = torch.randn(24, 3, generator=torch.Generator().manual_seed(1)).double()
    cut = LowRank(Rank(1), max_rank=2)
    for structure in (
        Dense(), Diagonal(), BlockDiagonal(), Kronecker(PiWeighted()), cut, BlockDiagonal(block=cut), FlatSpectrum(cut)
    ):
        Accumulate().check_parts(structure, updates=1)
        few, many = (in_parts(Accumulate(), (2,) * n, examples[: 2 * n], structure)[0] for n in (3, 12))
        assert many.nbytes == few.nbytes


@pytest.mark.parametrize("policy", [Refresh(), AdaptiveRefresh()])
def test_policies_that_store_examples_take_whole_experiences_only(policy):
    with pytest.raises(TypeError, match=r"whole experiences.*access_task_boundaries=True"):
        policy.check_parts(Diagonal(), updates=2)
    with pytest.raises(TypeError, match="whole experiences"):
        in_parts(policy, (8,), torch.ones(8, 3).double())


def test_merge_refuses_parts_of_one_update_whose_penalty_would_have_no_gradient():
    Merge().check_parts(Diagonal(), updates=2)
    with pytest.raises(ValueError, match=r"single update.*Accumulate"):
        Merge().check_parts(Diagonal(), updates=1)


def test_merge_that_keeps_nothing_is_the_newest_alone(experiences, close):
    _, risks = experiences
    merged = absorbed(Merge(decay=0), risks, EmpiricalFisher(), Diagonal()).model
    newest = estimate(EmpiricalFisher(), Diagonal(), risks[-1])
    close(merged.curvature.dense(), newest.curvature.dense())


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("gradient", [True, False])
def test_refresh_estimates_all_of_its_stored_past_at_the_newest_anchor(structure, gradient, experiences, close):
    _, risks = experiences
    past = absorbed(Refresh(fraction=0.5, seed=2, gradient=gradient), risks, GGN(), structure)
    parts = [part_of(risk, 0.5, 2, t).at(risks[-1]) for t, risk in enumerate(risks)]
    assert [stored.examples for stored in past.stored] == [4, 4, 4]
    assert torch.equal(past.model.anchor, risks[-1].anchor)
    matrices = [estimate(GGN(), structure, part).curvature.dense() for part in parts]
    close(past.model.curvature.dense(), sum(matrices))
    if gradient:
        close(past.model.gradient, sum(part.gradient() for part in parts))
    else:
        assert past.model.gradient is None
    assert past.experiences == 3


def test_the_gradient_of_refresh_is_that_of_the_stored_past_loss(experiences, close):
    """By autograd through the criterion at the newest parameters."""
    model, risks = experiences
    past = absorbed(Refresh(fraction=0.5, seed=2, gradient=True), risks, GGN(), Diagonal())
    nn.utils.vector_to_parameters(risks[-1].anchor.clone(), model.parameters())
    loss = sum(nn.CrossEntropyLoss()(model(x), y) for stored in past.stored for x, y in stored.batches)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for a, b in zip(torch.autograd.grad(past.model.penalty(model), list(model.parameters())), expected):
        close(a, b)


def test_refresh_of_a_linear_regression_predicts_the_past_loss_exactly(new_problem, make_model):
    """The loss is quadratic, so that with all examples and the gradient q is the increase of Σ_t L_t anywhere."""
    model = make_model(lambda: nn.Linear(4, 2))
    risks = []
    for seed in range(3):
        risks.append(new_problem(model, "mean_square", seed=seed).risk)
        nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(seed))
    past = absorbed(Refresh(fraction=1.0, gradient=True), risks, GGN(), Dense())
    now = EmpiricalRisk.snapshot(model, nn.MSELoss(), risks[0].batches)
    increase = sum(risk.at(now).value() - risk.at(risks[-1]).value() for risk in risks)
    assert past.model(model).item() == pytest.approx(increase, rel=1e-10)


@pytest.mark.parametrize("structure", [Dense(), Kronecker(), Kronecker(KeepTerms())], ids=str)
def test_accumulate_with_slopes_is_the_past_loss_of_a_linear_head_with_squared_error_anywhere(structure, make_model):
    """At any anchors, since nothing is taken for a minimum; one pair of factors is enough, of which G is 2 I always."""
    generator, criterion = torch.Generator().manual_seed(0), nn.MSELoss(reduction="sum")
    model, risks, weights, loss = make_model(lambda: nn.Linear(4, 3)), [], [], 0.0
    for _ in range(3):
        nn.init.normal_(model.weight, generator=generator)
        x, y = (torch.randn(9, size, generator=generator).double() for size in (4, 3))
        risks.append(EmpiricalRisk.snapshot(model, criterion, [(x, y)]))
        weights.append((model.weight.detach().clone(), model.bias.detach().clone()))
    past = absorbed(Accumulate(gradient=True), risks, GGN(), structure)
    nn.init.normal_(model.weight, generator=generator)
    for risk, (weight, bias) in zip(risks, weights):
        ((x, y),) = risk
        loss += (model(x) - y).square().sum(1).mean() - (x @ weight.T + bias - y).square().sum(1).mean()
    assert past.model(model).item() == pytest.approx(loss.item(), rel=1e-10)
    assert absorbed(Accumulate(), risks, GGN(), structure).model(model).item() != pytest.approx(loss.item(), rel=0.1)


@pytest.mark.parametrize("structure", [Dense(), Kronecker(), EKFAC(), Diagonal()], ids=str)
def test_outputs_that_come_later_have_had_the_target_zero_all_along(structure, make_model):
    """Past loss of a grown head, written out with ones and zeros for targets of all classes."""
    generator, criterion = torch.Generator().manual_seed(0), nn.MSELoss(reduction="sum")
    policy, past, tasks, model = Accumulate(gradient=True, outputs=("weight", "bias")), Past(), [], nn.Linear(4, 2)
    for classes in (2, 3, 5, 6):
        model = make_model(lambda classes=classes: nn.Linear(4, classes), seed=classes)
        past = policy.revise(past, model, 0, GGN(), structure)
        assert policy.revise(past, model, 0, GGN(), structure) is past
        if classes < 6:
            x, y = torch.randn(9, 4, generator=generator).double(), torch.randint(classes, (9,), generator=generator)
            one_hot = nn.functional.one_hot(y, 6).double()
            risk = EmpiricalRisk.snapshot(model, criterion, [(x, one_hot[:, :classes])])
            past = policy.absorb(past, risk, GGN(), structure)
            tasks.append((x, one_hot, risk.value()))
    batches = [(x, y) for x, y, _ in tasks]
    whole = estimate(GGN(), structure, EmpiricalRisk.snapshot(model, criterion, batches)).curvature.dense()
    torch.testing.assert_close(past.model.curvature.dense(), 3 * whole)
    if structure != Diagonal():
        loss = sum((model(x) - y).square().sum(1).mean() - before for x, y, before in tasks)
        assert past.model(model).item() == pytest.approx(loss.item(), rel=1e-10)


@pytest.mark.parametrize(
    ("outputs", "structure", "criterion", "error", "what"),
    [
        (("wieght", "bias"), Dense(), SUMMED, ValueError, r"No parameter \['wieght'\]"),
        (("weight",), Kronecker(), SUMMED, ValueError, r"outputs=\('weight',\) lacks 'bias'"),
        (("weight", "bias"), LowRank(Rank(1)), SUMMED, TypeError, "LowRankMatrix cannot give later outputs"),
        (("weight", "bias"), Dense(), nn.CrossEntropyLoss(), ValueError, "the loss is CrossEntropy"),
        (("weight", "bias"), Dense(), nn.MSELoss(), ValueError, r"summed over outputs.*reduction='sum'"),
    ],
)
def test_a_head_that_cannot_grow_is_refused_before_it_is_trained(outputs, structure, criterion, error, what):
    def check(policy):
        regularizer = CurvatureRegularizer(1.0, curvature=GGN(), structure=structure, policy=policy)
        regularizer.check(nn.Linear(2, 2), criterion, [(torch.ones(3, 2), torch.ones(3, 2) / 2)])

    check(Accumulate(gradient=True))
    with pytest.raises(error, match=what):
        check(Accumulate(gradient=True, outputs=outputs))


def test_only_known_names_of_a_structure_that_can_hold_it_grow(make_model):
    model, larger = make_model(lambda: nn.Linear(2, 2)), make_model(lambda: nn.Linear(2, 3))
    risk = EmpiricalRisk.snapshot(model, nn.MSELoss(), [(torch.ones(3, 2).double(), torch.ones(3, 2).double())])
    past = Accumulate().absorb(Past(), risk, GGN(), LowRank(Rank(1))).model
    with pytest.raises(ValueError, match=r"No parameter \['head.weight'\] among .* there are \['weight', 'bias'\]"):
        past.grown(larger, ("head.weight",))
    with pytest.raises(TypeError, match=r"LowRankMatrix cannot give later outputs .* Take Dense\(\)"):
        past.grown(larger, ("weight", "bias"))
    with pytest.raises(TypeError, match=r"names of parameters, as \('head.weight', 'head.bias'\); got 'weight'"):
        Accumulate(outputs="weight")


def test_accumulate_of_a_linear_regression_at_its_minima_predicts_the_past_loss_exactly(make_model):
    generator = torch.Generator().manual_seed(0)
    model, risks = make_model(lambda: nn.Linear(4, 1)), []
    for _ in range(3):
        x, y = torch.randn(9, 4, generator=generator).double(), torch.randn(9, 1, generator=generator).double()
        solution = torch.linalg.lstsq(torch.cat([x, torch.ones(9, 1)], 1), y).solution[:, 0]
        nn.utils.vector_to_parameters(solution, model.parameters())
        risks.append(EmpiricalRisk.snapshot(model, nn.MSELoss(), [(x, y)]))
    past = absorbed(Accumulate(), risks, GGN(), Dense())
    nn.init.normal_(model.weight, generator=generator)
    now = EmpiricalRisk.snapshot(model, nn.MSELoss(), risks[0].batches)
    increase = sum(risk.at(now).value() - risk.value() for risk in risks)
    assert past.model(model).item() == pytest.approx(increase, rel=1e-10)


def test_the_same_seed_stores_the_same_part_for_every_policy_and_curvature(experiences):
    _, risks = experiences

    def stored(seed, curvature):
        past = absorbed(Refresh(fraction=0.25, seed=seed), risks, curvature, Diagonal())
        return [next(iter(part))[0] for part in past.stored]

    first, again, other = stored(1, GGN()), stored(1, EmpiricalFisher()), stored(2, GGN())
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not all(torch.equal(a, b) for a, b in zip(first, other))
    kept = [next(iter(part_of(risk, 0.25, 1, t)))[0] for t, risk in enumerate(risks)]
    assert all(torch.equal(a, b) for a, b in zip(first, kept))


def test_each_experience_draws_a_part_of_its_own(experiences):
    _, risks = experiences
    parts = [next(iter(part_of(risks[0], 0.5, 0, t)))[0] for t in range(6)]
    assert len({tuple(part.reshape(-1).tolist()) for part in parts}) > 1


def test_a_whole_experience_is_not_copied(experiences):
    _, risks = experiences
    assert part_of(risks[0], 1, 0, 0) is risks[0]


@pytest.mark.parametrize("policy", [Accumulate(), Merge(), Refresh(fraction=1.0)])
def test_absorbing_returns_a_new_past(policy, experiences):
    model, risks = experiences
    first = policy.absorb(Past(), risks[0], GGN(), Diagonal())
    before = first.model(model).item()
    second = policy.absorb(first, risks[1], GGN(), Diagonal())
    assert (first.experiences, second.experiences) == (1, 2)
    assert first.model(model).item() == before
