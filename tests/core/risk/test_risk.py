import pytest
import torch
from torch import nn

from avalanche_curv import GGN, Dense, EmpiricalRisk, estimate
from avalanche_curv.core.risk.batches import random_part
from avalanche_curv.core.risk.several import frozen_together


class TwoArguments(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs, scale):
        return scale * self.layer(inputs)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(11, 4, generator=generator).double(), torch.randint(3, (11,), generator=generator)


def batches_of(data, size):
    return list(zip(data[0].split(size), data[1].split(size)))


def test_value_and_gradient_are_means_over_examples(known, close):
    assert known.risk.value() == pytest.approx(known.paper.losses(known.paper.anchor).mean().item(), rel=1e-12)
    close(known.risk.gradient(), known.paper.gradients.mean(0))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("size", [1, 4, 11])
def test_neither_batch_size_nor_reduction_matters(size, reduction, net, data, close):
    whole = EmpiricalRisk.snapshot(net, nn.CrossEntropyLoss(), batches_of(data, 11))
    risk = EmpiricalRisk.snapshot(net, nn.CrossEntropyLoss(reduction=reduction), batches_of(data, size))
    assert risk.value() == pytest.approx(nn.CrossEntropyLoss()(net(data[0]), data[1]).item(), rel=1e-12)
    assert risk.examples == whole.examples == 11
    close(risk.gradient(), whole.gradient())


def test_the_snapshot_does_not_follow_the_model(net, data):
    risk = EmpiricalRisk.snapshot(net, nn.CrossEntropyLoss(), batches_of(data, 4))
    before, anchor = risk.value(), risk.anchor.clone()
    with torch.no_grad():
        net[0].weight += 1
    assert risk.value() == before
    assert torch.equal(risk.anchor, anchor)


def test_risks_that_are_frozen_together_share_one_copy_of_the_model(net, data):
    risks = [EmpiricalRisk.snapshot(net, nn.CrossEntropyLoss(), batches_of(data, size)) for size in (4, 11)]
    with torch.no_grad():
        net[0].weight += 1
    together = frozen_together(risks, net)
    assert together[0].base is together[1].base is not net
    assert [len(risk.batches) for risk in together] == [3, 1]
    loss = nn.CrossEntropyLoss()(net(data[0]), data[1]).item()
    assert [risk.value() for risk in together] == pytest.approx([loss, loss], rel=1e-12)


def test_the_snapshot_uses_the_running_statistics_of_batch_norm(data, make_model, close):
    model = make_model(lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)))
    model[0].running_mean.fill_(0.7)
    risk = EmpiricalRisk.snapshot(model.train(), nn.CrossEntropyLoss(), batches_of(data, 11))
    close(risk.outputs(data[0]), model.eval()(data[0]))


def test_batches_may_be_a_one_shot_generator(net, data, close):
    listed = EmpiricalRisk.snapshot(net, nn.CrossEntropyLoss(), batches_of(data, 4))
    generated = EmpiricalRisk.snapshot(net, nn.CrossEntropyLoss(), (batch for batch in batches_of(data, 4)))
    assert generated.examples == 11
    assert generated.value() == listed.value() == generated.value()
    close(estimate(GGN(), Dense(), generated).curvature.dense(), estimate(GGN(), Dense(), listed).curvature.dense())


def test_inputs_take_the_floating_point_type_of_the_model(net, data):
    single = [(x.float(), y) for x, y in batches_of(data, 4)]
    assert EmpiricalRisk.snapshot(net, nn.CrossEntropyLoss(), single).value() > 0
    half = EmpiricalRisk.snapshot(net.to(torch.bfloat16), nn.CrossEntropyLoss(), single)
    assert half.anchor.dtype == torch.float32
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 11, 20])
def test_rebatching_keeps_the_examples_and_their_order(size, net, data):
    for old in (1, 4, 11):
        parts = list(EmpiricalRisk.snapshot(net, nn.CrossEntropyLoss(), batches_of(data, old)).rebatched(size))
        assert [len(y) for _, y in parts] == [len(y) for _, y in batches_of(data, size)]
        assert torch.equal(torch.cat([x for x, _ in parts]), data[0])
        assert torch.equal(torch.cat([y for _, y in parts]), data[1])


def test_select_takes_examples_across_batches(net, data):
    indices = torch.tensor([0, 3, 4, 10])
    chosen = EmpiricalRisk.snapshot(net, nn.CrossEntropyLoss(), batches_of(data, 4)).select(indices)
    ((x, y),) = list(chosen)
    assert torch.equal(x, data[0][indices])
    assert torch.equal(y, data[1][indices])


@pytest.mark.parametrize(("fraction", "count"), [(0.001, 1), (0.1, 1), (0.5, 6), (0.95, 10), (1.0, 11)])
def test_a_subset_has_the_fraction_without_replacement(fraction, count, net, data):
    risk = EmpiricalRisk.snapshot(net, nn.CrossEntropyLoss(), batches_of(data, 4))
    ((x, _),) = list(risk.subset(fraction, seed=1))
    assert len(x) == len(x.unique(dim=0)) == count


def test_the_same_seed_draws_the_same_subset_in_any_batching(net, data):
    def inputs(size, seed):
        risk = EmpiricalRisk.snapshot(net, nn.CrossEntropyLoss(), batches_of(data, size))
        return next(iter(risk.subset(0.5, seed)))[0]

    assert torch.equal(inputs(4, seed=1), inputs(11, seed=1))
    assert not torch.equal(inputs(4, seed=1), inputs(4, seed=2))


def test_every_example_is_as_likely_to_be_in_a_subset():
    counts = torch.zeros(10)
    for seed in range(2000):
        counts[random_part(10, 0.3, seed)] += 1
    torch.testing.assert_close(counts / 2000, torch.full((10,), 0.3), atol=0.04, rtol=0)


def test_a_risk_at_another_keeps_its_examples_and_takes_the_parameters(net, data, close):
    old = EmpiricalRisk.snapshot(net, nn.CrossEntropyLoss(), batches_of((data[0][:5], data[1][:5]), 2))
    with torch.no_grad():
        net[0].weight += 1
    new = EmpiricalRisk.snapshot(net, nn.CrossEntropyLoss(), batches_of((data[0][5:], data[1][5:]), 3))
    moved = old.at(new)
    assert torch.equal(moved.anchor, new.anchor)
    assert moved.examples == 5
    assert moved.value() == pytest.approx(nn.CrossEntropyLoss()(net(data[0][:5]), data[1][:5]).item(), rel=1e-12)


def test_forward_says_how_the_model_is_called(data, make_model, close):
    model = make_model(TwoArguments)
    risk = EmpiricalRisk.snapshot(
        model, nn.CrossEntropyLoss(), batches_of(data, 4), forward=lambda model, x: model(x, 2.0)
    )
    plain = make_model(lambda: nn.Linear(4, 3))
    plain.load_state_dict({name: 2 * value for name, value in model.layer.state_dict().items()})
    expected = EmpiricalRisk.snapshot(plain, nn.CrossEntropyLoss(), batches_of(data, 4))
    assert risk.space.names == ("layer.weight", "layer.bias")
    assert risk.value() == pytest.approx(expected.value(), rel=1e-12)
    close(
        estimate(GGN(), Dense(), risk).curvature.dense(),
        4 * estimate(GGN(), Dense(), expected).curvature.dense(),  # f = 2 (W x + b), so J is twice as large
    )


@pytest.mark.parametrize("batches", [[], iter([]), [(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))]])
def test_a_risk_of_no_examples_is_refused(batches, net):
    with pytest.raises(ValueError, match=r"risk of no examples is not defined.*Give one or more"):
        EmpiricalRisk.snapshot(net, nn.CrossEntropyLoss(), batches)


@pytest.mark.parametrize(
    "batch",
    [
        (torch.zeros(2, 4),),
        (torch.zeros(2, 4), torch.zeros(2), torch.zeros(2)),
        (torch.zeros(2, 4), [0, 1]),
        ([[0.0] * 4], [0]),
    ],
)
def test_a_batch_must_be_a_pair_of_tensors(batch, net):
    with pytest.raises(ValueError, match=r"pair \(inputs, targets\), the targets a tensor or .*; got \['"):
        EmpiricalRisk.snapshot(net, nn.CrossEntropyLoss(), [batch])


def test_a_model_without_trainable_parameters_is_refused(net, data):
    with pytest.raises(ValueError, match="no trainable parameter"):
        EmpiricalRisk.snapshot(net.requires_grad_(False), nn.CrossEntropyLoss(), batches_of(data, 4))


def test_the_class_weights_of_a_criterion_in_single_precision_serve_a_double_model(net, data, close):
    weights = torch.tensor([1.0, 2.0, 3.0])
    risk = EmpiricalRisk.snapshot(net, nn.CrossEntropyLoss(weights), batches_of(data, 4))
    per_example = nn.CrossEntropyLoss(reduction="none")(net(data[0]), data[1]) * weights.double()[data[1]] / 2
    assert risk.value() == pytest.approx(per_example.mean().item(), rel=1e-12)
    assert estimate(GGN(), Dense(), risk).curvature.is_finite()
