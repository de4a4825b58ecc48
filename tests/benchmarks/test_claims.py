"""The kinds of the claims against loops over examples and against paper, the course of a run, and its report."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from avalanche_curv import (
    BatchedEmpiricalFisher,
    Dense,
    Diagonal,
    EmpiricalFisher,
    EmpiricalRisk,
    Fisher,
    Merge,
    Past,
    estimate,
)
from avalanche_curv.core.quadratic.penalty import Penalty
from benchmarks.experiments.claims.course import (
    ACCURACY,
    Pixels,
    PublicCode,
    Setting,
    accuracies,
    added,
    at_once,
    confidence,
    learn,
    of_whole,
    risk_of,
    sequence,
    with_whole,
)
from benchmarks.experiments.claims.experiment import (
    GRIDS,
    KINDS,
    SETTINGS,
    ClaimsOptions,
    at,
    best_strengths,
    chosen,
    experiment,
    rows,
)
from benchmarks.experiments.claims.report import report
from benchmarks.experiments.claims.reversal import Reversed
from benchmarks.experiments.claims.uniform import Uniform
from benchmarks.experiments.claims.variational import Variational
from benchmarks.streams.scenario import CLASS, DOMAIN, TASK

HEADS = Setting(Pixels(), TASK, (6, 2, 2), hidden=(6,), images="digits", train=20, test=10, steps=4, batch=5)
SHARED = replace(HEADS, scenario=DOMAIN, tasks=(2, 2, 2, 2, 2))


def network(outputs=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, outputs)).double()
    inputs, targets = torch.randn(11, 4).double(), torch.randint(outputs, (11,))
    return model, inputs, targets


def slope(loss, model):
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])


def risk(model, inputs, targets, criterion=nn.CrossEntropyLoss(), **options):  # noqa: B008
    return EmpiricalRisk.snapshot(model, criterion, [(inputs, targets)], **options)


@pytest.mark.parametrize(("kind", "size"), [(EmpiricalFisher(), 1), (BatchedEmpiricalFisher(4), 4)])
def test_reversal_squares_gradients_of_the_loss_at_negated_outputs(kind, size):
    model, inputs, targets = network()
    batches = list(zip(inputs.split(size), targets.split(size)))
    slopes = [slope(F.cross_entropy(-model(x), y), model) for x, y in batches]
    expected = torch.stack([torch.outer(g, g) for g in slopes]).mean(0)
    for one in (risk(model, inputs, targets), risk(model, inputs, targets, forward=lambda model, x: model(x))):
        torch.testing.assert_close(estimate(Reversed(kind), Diagonal(), one).curvature.values, expected.diagonal())
        torch.testing.assert_close(estimate(Reversed(kind), Dense(), one).curvature.dense(), expected)


def test_of_two_classes_reversal_weighs_an_example_by_p_squared_and_the_fisher_by_p_times_1_minus_p():
    """With m = f_y − f_other, p = sigmoid(m): the trace of an example is weight · ‖∇m‖²."""
    model, inputs, targets = network(2)
    expected = {"reversal": 0.0, "Fisher": 0.0, "empirical": 0.0}
    for x, y in zip(inputs, targets):
        outputs = model(x[None])[0]
        margin = outputs[y] - outputs[1 - y]
        length, p = slope(margin, model).square().sum(), torch.sigmoid(margin).detach()
        for name, weight in (("reversal", p**2), ("Fisher", p * (1 - p)), ("empirical", (1 - p) ** 2)):
            expected[name] += float(weight * length / len(targets))
    kinds = {"reversal": Reversed(EmpiricalFisher()), "Fisher": Fisher(), "empirical": EmpiricalFisher()}
    for name, kind in kinds.items():
        trace = estimate(kind, Diagonal(), risk(model, inputs, targets)).curvature.trace()
        assert trace == pytest.approx(expected[name], rel=1e-9)


def test_of_a_loss_that_is_quadratic_the_variational_curvature_is_the_diagonal_of_the_hessian():
    """(w x − y)² has E[∂²/∂w²] = 2 x² under any Gaussian; the mean of 800 steps is left with noise of some per cent."""
    torch.manual_seed(0)
    inputs = torch.randn(8, 2).double()
    model = nn.Linear(2, 1, bias=False).double()
    kind = Variational(damping=1.0, decay=0.995, steps=800, initial=1.0, batch=8)
    found = estimate(kind, Diagonal(), risk(model, inputs, model(inputs).detach(), nn.MSELoss())).curvature.values
    torch.testing.assert_close(found, 2 * inputs.square().mean(0), rtol=0.2, atol=0)


def test_the_variational_curvature_is_that_of_ivon_with_its_mean_held_still():
    """An explicit loop of the algorithm, and the package where it is installed (python -m pip install ivon-opt)."""
    model, inputs, targets = network()
    kind = Variational(damping=0.25, decay=0.9, steps=12, initial=0.5, batch=11)
    found = estimate(kind, Diagonal(), risk(model, inputs, targets)).curvature.values
    anchor, h = nn.utils.parameters_to_vector(model.parameters()).detach(), torch.full_like(found, 0.5)
    generator = torch.Generator().manual_seed(0)
    noises = []
    for _ in range(12):
        torch.randperm(1, generator=generator)  # of the one batch
        noises.append(torch.randn(h.shape, generator=generator, dtype=h.dtype))
        variance = 1 / (11 * (h + 0.25))
        noise = noises[-1] * variance.sqrt()
        nn.utils.vector_to_parameters(anchor + noise, model.parameters())
        price = slope(F.cross_entropy(model(inputs), targets), model) * noise / variance
        h = 0.9 * h + 0.1 * price + 0.005 * (h - price) ** 2 / (h + 0.25)
    torch.testing.assert_close(found, h.clamp_min(0))
    ivon = pytest.importorskip("ivon", reason="ivon-opt is missing")
    nn.utils.vector_to_parameters(anchor, model.parameters())
    optimizer = ivon.IVON(model.parameters(), lr=1e-300, ess=11, hess_init=0.5, beta2=0.9, weight_decay=0.25)
    for drawn in noises:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn", lambda *size, drawn=drawn, **options: drawn)
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    torch.testing.assert_close(found, optimizer.param_groups[0]["hess"].clamp_min(0))


def test_uniform_is_the_identity():
    one = risk(*network())
    assert torch.equal(estimate(Uniform(), Diagonal(), one).curvature.values, torch.ones(one.space.size).double())
    assert torch.equal(estimate(Uniform(), Dense(), one).curvature.dense(), torch.eye(one.space.size).double())


def test_sums_are_those_of_merge_and_the_public_code_takes_means_over_classes_of_what_it_cuts():
    torch.manual_seed(0)
    past, ours, cut, seen = Past(), None, None, []
    for number, classes in enumerate((6, 2, 2), start=1):
        one = risk(nn.Linear(3, 2), torch.randn(9, 3), torch.ones(9).long())
        new = estimate(Fisher(), Diagonal(), one)
        past, ours = Merge().absorb(past, one, Fisher(), Diagonal()), added(ours, new)
        cut = PublicCode(0.1).added(cut, new, (6, 2, 2)[:number])
        seen += [new.curvature.values.clamp(max=0.1)] * classes
    torch.testing.assert_close(ours.curvature.values, past.model.curvature.values)
    torch.testing.assert_close(cut.curvature.values, torch.stack(seen).mean(0))
    assert cut.curvature.values.max() == pytest.approx(0.1)
    assert ours.curvature.values.max() > 0.3
    for found in (ours, cut):
        torch.testing.assert_close(found.anchor, past.model.anchor)


def test_the_loss_compares_the_outputs_of_a_task_of_all_or_shared_ones_and_so_do_risks():
    for setting, columns, known in (
        (HEADS, slice(6, 8), slice(0, 8)), (replace(HEADS, scenario=CLASS), slice(0, 10), slice(0, 10)),
        (SHARED, slice(0, 2), slice(0, 2)),
    ):  # fmt: skip
        (_, (x, y), *_), _ = sequence(setting, 0, None)
        model = setting.build(64)
        outputs = model(x)
        expected = F.cross_entropy(outputs[:, columns], y - columns.start).item()
        assert F.cross_entropy(setting.compared(outputs, y), y).item() == pytest.approx(expected)
        own = risk_of(model, setting, (x, y), 2)
        assert own.value() == pytest.approx(expected)
        probability = outputs[:, columns].softmax(1)[torch.arange(len(y)), y - columns.start].mean()
        assert confidence(own) == pytest.approx(probability.item())
        of_known = F.cross_entropy(outputs[:, known], y).item()
        assert risk_of(model, setting, (x, y), 2, PublicCode()).value() == pytest.approx(of_known)


def test_classes_are_named_in_the_order_in_which_they_come_and_images_held_out_are_the_last():
    for setting, named in ((HEADS, [{0, 1, 2, 3, 4, 5}, {6, 7}, {8, 9}]), (SHARED, [{0, 1}] * 5)):
        (train, test), (kept, held) = sequence(setting, 3, None), sequence(replace(setting, held_out=5), 3, None)
        assert [set(y.tolist()) for _, y in train] == named
        for whole, part, last, tested, count in zip(train, kept, held, test, setting.tasks):
            assert [len(y) for _, y in (whole, part, last)] == [20 * count, 15 * count, 5 * count]
            assert len(torch.cat([part[0], last[0]]).unique(dim=0)) == len(whole[0].unique(dim=0))
            assert not torch.equal(last[0], tested[0][: 5 * count])


def values(records, metric):
    return [record["value"] for record in records if record["metric"] == metric]


def run(setting, **options):
    torch.manual_seed(0)
    return list(learn(setting, *sequence(setting, 0, None), **options))


def test_a_strength_of_zero_is_naive_and_another_is_not():
    naive, strong = run(SHARED), run(SHARED, kind=Uniform(), strength=1e6)
    assert values(run(SHARED, kind=Fisher(), strength=0.0), "confidence") == values(naive, "confidence")
    assert values(strong, "confidence")[0] == values(naive, "confidence")[0]
    assert values(strong, "confidence")[1:] != values(naive, "confidence")[1:]
    assert values(strong, "trace") == [64 * 6 + 6 + 6 * 2 + 2] * 4


def test_a_penalty_on_w_plus_b_a_and_the_head_has_its_gradient_by_the_chain_rule():
    adapted = replace(SHARED, rank=2)
    assert values(run(adapted, kind=Uniform(), strength=1.0, whole=True), "trace") == [64 * 6 + 6 * 2 + 2] * 4
    torch.manual_seed(0)
    model = adapted.build(64)
    one = risk(with_whole(model), torch.ones(4, 64), torch.ones(4).long())
    penalty = Penalty(estimate(Fisher(), Diagonal(), one), 3.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    assert penalty.space.names == ("0.weight", "2.weight", "2.bias")
    whole = torch.cat([model[0].weight.flatten(), model[2].weight.flatten(), model[2].bias])
    by_hand = 1.5 * (penalty.of.curvature.values * (whole - penalty.of.anchor).square()).sum()
    trained, term = [p for p in model.parameters() if p.requires_grad], of_whole(penalty, model)
    assert term.item() == pytest.approx(by_hand.item(), rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(term, trained), torch.autograd.grad(by_hand, trained))


def test_accuracies_ask_for_the_class_in_its_task_and_among_all():
    outputs = torch.tensor([[1.0, 0, 0, 0, 0, 0, 9, 9, 9, 9], [0, 2.0, 1, 1, 1, 1, 3, 1, 1, 1], [0.0] * 9 + [1.0]])
    tests = [(outputs[:2], torch.tensor([0, 1])), (outputs[:1], torch.tensor([6])), (outputs[2:], torch.tensor([8]))]
    found = {record["metric"]: record["value"] for record in accuracies(nn.Identity(), HEADS, tests)}
    assert found == {"own classes": pytest.approx(2 / 3), "all classes": 0.25}


def test_strengths_are_chosen_for_each_question(results_of):
    made = [one for one in rows("pixels", HEADS, KINDS) if one.row in ("naive", "uniform", "public EWC-DR")]
    tuned = [at(one, strength) for one in made for strength in one.grid[4:6]]
    results = results_of(experiment, [replace(one, setting=replace(HEADS, held_out=5)) for one in tuned])
    found = best_strengths(results)
    assert {place[:3] for place in found} == {("pixels", "uniform", measure) for measure in ACCURACY[TASK]}
    shown = [one for row in made for one in chosen(row, found)]
    for _, row, measure, strength in found:
        (only,) = [one for one in shown if one.row == row and measure in one.chosen]
        assert only.strength == strength
        best = max(results.final(measure, one.label).mean for one in tuned)
        assert results.final(measure, f"pixels, {row} at {strength:g}").mean == best
    assert {one.row: one.strength for one in shown}.items() >= {"naive": 0.0, "public EWC-DR": 1e4}.items()


def test_every_row_that_keeps_something_is_tuned_or_has_the_strength_of_its_code():
    for part, setting in SETTINGS.items():
        for row in rows(part, setting, KINDS):
            assert bool(row.grid) != (row.kind is None or (row.code is not None and row.strength > 0))
            assert all(b == pytest.approx(10 * a) for a, b in zip(row.grid, row.grid[1:]))
    assert {*KINDS, "public EWC", "public EWC-DR"} == {*GRIDS}


def test_the_report_shows_each_row_and_what_was_claimed(results_of, tmp_path):
    configs = rows("pixels", HEADS, KINDS | {"variational": Variational(steps=2)})
    written = report(results_of(experiment, configs), tmp_path)
    for row in configs:
        assert f"| {row.row} " in written
    assert "| public EWC-DR less public EWC " in written
    assert "## Whether the Fisher vanishes" in written


def test_all_at_once_is_one_task_of_all_examples_with_as_many_steps_in_all():
    tasks, tests = sequence(SHARED, 0, None)
    whole = tuple(torch.cat(part) for part in zip(*tasks))
    torch.manual_seed(0)
    joint = list(at_once(SHARED, tasks, tests, every=False))
    torch.manual_seed(0)
    one = list(learn(replace(SHARED, steps=20), [whole], tests))
    assert values(joint, "both classes") == values(one, "both classes")


def test_quick_runs_need_no_download():
    made = experiment.configs(ClaimsOptions(seeds=1, quick=True))
    assert {one.setting.images for one in made} == {"digits"}
