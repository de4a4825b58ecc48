import pytest
import torch
from torch import nn

from avalanche_curv import (
    GGN,
    BlockDiagonal,
    Dense,
    Diagonal,
    EmpiricalFisher,
    EmpiricalRisk,
    ExampleLoss,
    Fisher,
    Kronecker,
    LowRank,
    Rank,
    estimate,
    example_loss,
)
from avalanche_curv.core.losses.factor import Softmax


def outputs_and_targets(name, examples=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    f = 2 * torch.randn(examples, 3, generator=generator, dtype=torch.float64)
    if "binary" in name:
        return f, torch.rand(examples, 3, generator=generator, dtype=torch.float64)  # soft labels as well
    if "square" in name:
        return f, torch.randn(examples, 3, generator=generator, dtype=torch.float64)
    return f, torch.randint(3, (examples,), generator=generator)


def covariance(p):
    return p.diag_embed() - p[:, :, None] * p[:, None, :]


@pytest.mark.parametrize("structure", [Dense(), Diagonal(), LowRank(Rank(1)), Kronecker(), BlockDiagonal()], ids=str)
@pytest.mark.parametrize("kind", [GGN(), Fisher(), Fisher(samples=1), EmpiricalFisher()], ids=str)
def test_a_class_that_is_the_only_one_has_no_curvature(kind, structure):
    """Its cross-entropy is 0 whatever the logit is: of an example, and of each of its tokens."""
    tokens = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (1, 4)))
    for model, targets in ((nn.Linear(3, 1), torch.zeros(5).long()), (tokens, torch.zeros(5, 4).long())):
        risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(torch.ones(5, 3), targets)])
        assert not estimate(kind, structure, risk).curvature.dense().any()


def test_targets_of_one_output_may_be_a_vector(losses, close):
    f, y = torch.randn(5, 1).double(), torch.rand(5).double()
    for name in ("mean_square", "binary"):
        loss = example_loss(losses[name].criterion)
        for part in (loss.per_example, loss.gradient):
            close(part(f, y), part(f, y[:, None]))
        close(loss.hessian_factor(f, y).tensor(), loss.hessian_factor(f, y[:, None]).tensor())


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0])
def test_samples_at_the_ends_of_the_unit_interval_are_finite(uniform, likelihood, losses):
    f, y = outputs_and_targets(likelihood)
    y = torch.cat([y, y[:1]])
    f = torch.cat([f, torch.tensor([[1000.0, -1000.0, 0.0]]).double()]).float()
    drawn = example_loss(losses[likelihood].criterion).sample_gradients(f, y, torch.full((7, 1, 3), uniform))
    assert drawn.isfinite().all()


def test_a_label_is_drawn_where_the_uniform_number_falls(losses):
    f = torch.tensor([[0.2, 0.3, 0.5]]).double().log()
    uniform = torch.tensor([0.1, 0.3, 0.6]).double()[None, :, None].expand(1, 3, 3)
    drawn = example_loss(losses["cross_entropy"].criterion).sample_gradients(f, torch.zeros(1).long(), uniform)
    torch.testing.assert_close(drawn[0].T, f.exp() - torch.eye(3).double())


def test_a_masked_class_is_never_drawn(losses):
    f = torch.tensor([[-1000.0, 0.0, 0.0, -1000.0]])
    uniform = torch.rand(1, 1000, 4, generator=torch.Generator().manual_seed(0))
    drawn = example_loss(losses["cross_entropy"].criterion).sample_gradients(f, torch.zeros(1).long(), uniform)
    assert drawn[0, [0, 3]].abs().max() == 0


EXTREME = {
    "ties": [0.0, 0.0, 0.0, 0.0],
    "one certain": [1e3, 0.0, 0.0, 0.0],
    "last certain": [0.0, 0.0, 0.0, 1e3],
    "one impossible": [-1e3, 0.0, 1.0, 2.0],
    "both ends": [1e3, -1e3, 1e3, 0.0],
    "masked first": [-1000.0, -1000.0, 0.3, -0.2],
    "masked last": [0.3, -0.2, -1000.0, -1000.0],
    "masked between": [0.3, -1000.0, -1000.0, -0.2],
    "all but one masked": [-1000.0, 5.0, -1000.0, -1000.0],
    "nearly impossible": [0.0, -80.0, -90.0, -100.0],
    "large ties": [1e3, 1e3, 1e3, 1e3],
}


@pytest.mark.parametrize("logits", EXTREME.values(), ids=EXTREME)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_the_softmax_covariance_is_factored_for_extreme_logits(logits, dtype, tolerance):
    f = torch.tensor([logits], dtype=dtype)
    factor = Softmax.of(f).tensor()
    assert factor.shape == (1, 4, 3)
    assert factor.isfinite().all()
    torch.testing.assert_close(factor @ factor.mT, covariance(f.softmax(1)), atol=tolerance, rtol=0)


def test_the_columns_of_the_factor_sum_to_zero():
    factor = Softmax.of(torch.randn(8, 10, generator=torch.Generator().manual_seed(0)).double()).tensor()
    torch.testing.assert_close(factor.sum(1), torch.zeros(8, 9).double(), atol=1e-14, rtol=0)


def test_a_thousand_classes_in_single_precision():
    f = 5 * torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    factor = Softmax.of(f).tensor()
    torch.testing.assert_close(factor @ factor.mT, covariance(f.softmax(1)), atol=1e-6, rtol=0)


def test_ggn_of_a_masked_head_is_finite(net, make_model):
    masked = make_model(lambda: nn.Sequential(nn.Linear(4, 3))).float()
    nn.init.constant_(masked[0].bias[2:], -1000.0)
    risk = EmpiricalRisk.snapshot(masked, nn.CrossEntropyLoss(), [(torch.ones(2, 4), torch.tensor([0, 1]))])
    matrix = estimate(GGN(), Dense(), risk).curvature.dense()
    assert matrix.isfinite().all()
    assert matrix[8:12].abs().max() == 0  # the masked row of the weight


@pytest.mark.parametrize("criterion", ["L1Loss", None, 3.0, nn.L1Loss])
def test_what_is_no_criterion_is_told_what_to_give(criterion):
    with pytest.raises(TypeError, match=r"in two lines:\n    criterion = LossFunction\(lambda|Did you mean nn.L1Loss"):
        example_loss(criterion)


def test_an_example_loss_is_its_own_form(losses):
    loss = example_loss(losses["smoothed"].criterion)
    assert isinstance(loss, ExampleLoss)
    assert example_loss(loss) is loss


@pytest.mark.parametrize(
    ("targets", "criterion", "message"),
    [
        (torch.tensor([0, 1, 3]), nn.CrossEntropyLoss(), r"lie in \[0, 3\].*has 3 logits.*one logit a class"),
        (torch.tensor([0, 1, -1]), nn.CrossEntropyLoss(), r"lie in \[-1, 1\]"),
        (-torch.rand(3, 3), nn.CrossEntropyLoss(), "at least 0. Give them, not logits"),
        (torch.rand(3, 2), nn.CrossEntropyLoss(), r"of shape \(3,\).*or probabilities of classes.*got .*\(3, 2\)"),
        (torch.tensor([0, 1, 2]).int(), nn.CrossEntropyLoss(), r"int64 or uint8.*got torch.int32.*with \.long\(\)"),
        (torch.tensor([0, 1, 1]).bool(), nn.CrossEntropyLoss(), r"got torch.bool.*with \.long\(\)"),
        (torch.tensor([0, 1, 2]), nn.CrossEntropyLoss(torch.tensor([1.0, 2.0])), "Got 2 class weights for 3 logits"),
        (torch.rand(3, 2), nn.MSELoss(), r"MSELoss needs targets of the outputs' shape \(3, 3\); got \(3, 2\)"),
        (torch.rand(3), nn.MSELoss(), r"got \(3,\), which torch broadcasts or refuses. Reshape them"),
        (torch.rand(3, 1), nn.MSELoss(), r"got \(3, 1\), which torch broadcasts or refuses. Reshape them"),
        (torch.tensor([0, 1, 1]), nn.BCEWithLogitsLoss(), "BCEWithLogitsLoss needs targets of the outputs' shape"),
        (torch.ones(3, 3).long(), nn.BCEWithLogitsLoss(), r"floating point targets.*int64 from 1 to 1.*\.float\(\)"),
        (torch.ones(3, 3) * 2, nn.BCEWithLogitsLoss(), r"targets in \[0, 1\]; got torch.float64 from 2.0 to 2.0"),
        (torch.rand(3, 3), nn.BCEWithLogitsLoss(pos_weight=torch.ones(3, 1)), r"\(3,\); got shape \(3, 1\). Give one"),
        (torch.rand(3, 3), nn.BCEWithLogitsLoss(torch.ones(3, 3)), r"got shape \(3, 3\). Give one number, or one an"),
        (torch.rand(3, 3), nn.BCEWithLogitsLoss(-torch.ones(3)), "must be at least 0"),
    ],
)
def test_targets_that_the_loss_does_not_cover(targets, criterion, message, make_model):
    with pytest.raises(ValueError, match=message):
        EmpiricalRisk.snapshot(make_model(lambda: nn.Linear(2, 3)), criterion, [(torch.zeros(3, 2).double(), targets)])


def test_classes_on_the_last_axis_are_told_where_they_belong(make_model):
    model = make_model(lambda: nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3))))
    batch = (torch.zeros(2, 4).double(), torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"as by logits.transpose\(1, 2\)"):
        EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [batch])
