import pytest
import torch
from torch import nn

from avalanche_curv import ParameterSpace, Past, QuadraticModel, WarnIfUnstable, suggest_strength
from avalanche_curv.core.quadratic.stability import Guarded, decades
from avalanche_curv.core.structures.dense import DenseMatrix
from avalanche_curv.core.structures.diagonal import DiagonalMatrix

CURVED = DiagonalMatrix(torch.tensor([0.1, 4.0, 1.0]).double())


def past_of(model, curvature=CURVED):
    return QuadraticModel(ParameterSpace.of(model), torch.zeros(curvature.size).double(), curvature)


@pytest.fixture
def model():
    return nn.Linear(3, 1, bias=False).double()


def largest_displacement(optimizer, past, model, strength, steps):
    """Of descent on the penalty alone from θ = 1: at its end, or once it is above 20."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        (strength * past.penalty(model)).backward()
        optimizer.step()
        if (largest := max(float(p.detach().abs().max()) for p in model.parameters())) > 20:
            break
    return largest


def test_the_grid_is_in_decades_from_half_of_what_is_stable_down(model):
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    found = suggest_strength(Past(past_of(model)), sgd, model)
    assert found == suggest_strength(past_of(model), sgd, model)
    assert found.largest_stable == pytest.approx(2 * 1.5 / (0.1 * 4))  # 7.5
    assert found.grid == (3.0, 0.3, 0.03, 0.003)
    assert str(found).startswith("Strengths to try: 3, 0.3, 0.03, 0.003 (descent")
    assert "\n" not in str(found)


@pytest.mark.parametrize("largest", [1.0, 10.0, 1e-3, 0.999999, 6e15, 3e-12, float("inf")])
def test_decades_begin_at_any_number_rounded_down_to_one_digit(largest):
    first, *others = decades(largest)
    assert 0.499 < first / min(largest, 1.79e308) <= 1 + 1e-6
    assert f"{first:.0e}" == f"{first:e}".replace(".000000", "")
    assert others == pytest.approx([first / 10, first / 100, first / 1000])


def test_groups_of_parameters_and_the_message_of_the_guard_have_the_same_numbers(model):
    model = nn.ModuleList([model, nn.Linear(3, 1, bias=False).double()])
    past = past_of(model, DiagonalMatrix(torch.tensor([4.0, 1, 1, 1e-3, 1e-3, 0]).double()))
    sgd = torch.optim.SGD([{"params": part.parameters(), "lr": lr} for part, lr in zip(model, (0.1, 1.0))])
    found = suggest_strength(past, sgd, model)
    assert found.largest_stable == pytest.approx(5.0, rel=1e-2)
    with pytest.warns(UserWarning, match=r"stable up to strength 5 .*\(to try: 2, 0.2, 0.02, 0.002; see suggest_st"):
        Guarded(WarnIfUnstable(), past).allowed(6.0, model, sgd)


def frozen_adam(model, kind=torch.optim.Adam, **options):
    """Adam whose second moments v, all different, hardly change: β₂ = 1 − 10⁻¹³."""
    groups = [{"params": [p], "lr": 0.01 * (k + 1)} for k, p in enumerate(model.parameters())]
    adam = kind(groups, betas=(0.8, 1 - 1e-13), eps=1e-3, **options)
    for parameter in model.parameters():
        second = torch.linspace(0.01, 0.09, parameter.numel()).double().view_as(parameter)
        names = ("exp_avg_sq", "max_exp_avg_sq") if options.get("amsgrad") else ("exp_avg_sq",)
        adam.state[parameter] = {"step": torch.tensor(1e15), "exp_avg": torch.zeros_like(parameter)}
        adam.state[parameter] |= {name: second.clone() for name in names}
    return adam


ADAMS = [(torch.optim.Adam, {}), (torch.optim.Adam, {"amsgrad": True}), (torch.optim.AdamW, {"weight_decay": 0.0})]


@pytest.mark.parametrize(("kind", "options"), ADAMS)
def test_adam_with_fixed_second_moments_diverges_just_above_what_is_said_to_be_stable(kind, options, make_model):
    model = make_model(lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))
    root = torch.randn(9, 9, generator=torch.Generator().manual_seed(3)).double()
    past = past_of(model, DenseMatrix(root @ root.T))
    adam = frozen_adam(model, kind, **options)
    rates = torch.cat([torch.full_like(p, g["lr"]).flatten() for g in adam.param_groups for p in g["params"]])
    seconds = torch.cat([adam.state[p]["exp_avg_sq"].flatten() for p in model.parameters()])
    scaled = (rates / (seconds.sqrt() + 1e-3)).sqrt()
    sharpness = torch.linalg.eigvalsh(scaled[:, None] * past.curvature.dense() * scaled).max()
    largest = float(2 * (1 + 0.8) / (1 - 0.8) / sharpness)
    found = suggest_strength(past, adam, model)
    assert found.largest_stable == pytest.approx(largest, rel=1e-2)
    assert found.grid[0] > found.largest_stable
    for factor, far in ((0.97, False), (1.03, True)):
        own = frozen_adam(model, kind, **options)
        assert (largest_displacement(own, past, model, factor * largest, steps=100) > 20) is far


def test_the_grid_of_adam_begins_where_the_curvature_on_average_is_at_the_limit(model):
    adam = frozen_adam(model)
    seconds = adam.state[model.weight]["exp_avg_sq"].flatten()
    paces, curvature = 0.01 * 0.2 / 3.6 / (seconds.sqrt() + 1e-3), CURVED.values
    found = suggest_strength(past_of(model), adam, model)
    assert found.largest_stable == pytest.approx(float(1 / (paces * curvature).max()), rel=1e-2)
    assert found.grid == decades(float(curvature.sum() / (curvature * paces * curvature).sum()))


def test_adam_itself_does_not_diverge_above_but_shakes(model):
    """Its second moments follow the penalty, so that no step is longer than a few times its rate."""
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    largest_displacement(adam, past_of(model), model, 1e-3, steps=20)
    found = suggest_strength(past_of(model), adam, model)
    for factor in (1.0, 1e2, 1e6):
        assert largest_displacement(adam, past_of(model), model, factor * found.largest_stable, steps=500) < 1


def test_where_no_rule_is_known_the_grid_ends_at_the_weight_of_the_new_experience(model):
    for optimizer in (torch.optim.Adam(model.parameters()), torch.optim.RMSprop(model.parameters())):
        found = suggest_strength(past_of(model), optimizer, model)
        assert (found.largest_stable, found.grid) == (None, (1000, 100, 10, 1))
        assert type(optimizer).__name__ in str(found)


def test_no_strength_is_suggested_where_none_acts(model):
    adam = frozen_adam(model)
    for optimizer in (torch.optim.SGD(model.parameters(), lr=0.1), adam):
        found = suggest_strength(past_of(model, DiagonalMatrix(torch.zeros(3).double())), optimizer, model)
        assert (found.grid, str(found)[:25]) == ((), "Strengths to try: none (C")
    model.weight.requires_grad_(False)
    assert suggest_strength(past_of(nn.Linear(3, 1, bias=False)), adam, model).grid == ()


def test_an_empty_past_is_refused_with_the_remedy(model):
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"past is empty.* Train at least one experience with any strength.*\.past"):
        suggest_strength(Past(), sgd, model)
    with pytest.raises(TypeError, match="past must be a Past or a QuadraticModel; got 3"):
        suggest_strength(3, sgd, model)
