"""Exact diagonals and Kronecker factors of models that come with Avalanche."""

import pytest
import torch
from avalanche.models import IncrementalClassifier, MTSimpleMLP, SlimResNet18
from torch import nn

from avalanche_curv import GGN, Diagonal, EmpiricalFisher, EmpiricalRisk, Kronecker, estimate
from avalanche_curv.core.per_example.layers import Layers


def masked_head():
    """A head of three classes, the last of which has not been seen yet."""
    head = IncrementalClassifier(5, initial_out_features=3)
    head.active_units[:2] = 1
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), head)


def first_head(model, inputs):
    """A multi-task model seen through one of its heads."""
    return model(inputs, torch.zeros(len(inputs), dtype=torch.long))


def squares(model, inputs, targets):
    """Squares of each example's gradient, and the mean of them."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = 0
    for x, y in zip(inputs, targets):
        loss = nn.functional.cross_entropy(model(x[None]), y[None])
        parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        total = total + torch.cat([part.reshape(-1) for part in parts]).square()
    return total / len(inputs)


def ggn_diagonal(model, inputs):
    """Σ_cd J_cp (diag p − ppᵀ)_cd J_dp, averaged."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = 0
    for x in inputs:
        outputs = model(x[None])[0]
        rows = []
        for f in outputs:
            parts = torch.autograd.grad(f, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
        j, p = torch.stack(rows), outputs.detach().softmax(0)
        total = total + p @ j.square() - (p @ j).square()
    return total / len(inputs)


def case(model, shape, classes, forward=None, examples=5):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(examples, *shape, generator=generator, dtype=torch.float64)
    targets = torch.randint(classes, (examples,), generator=generator)
    batches = list(zip(inputs.split(3), targets.split(3)))
    risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), batches, forward=forward)
    return risk, inputs, targets


def assert_exact(risk, inputs, targets):
    for kind, expected in (
        (EmpiricalFisher(), squares(risk.model, inputs, targets)), (GGN(), ggn_diagonal(risk.model, inputs)),
    ):
        torch.testing.assert_close(
            estimate(kind, Diagonal(), risk).curvature.values, expected, rtol=1e-9, atol=1e-12
        )


def test_a_slim_residual_network_is_explained_by_its_layers_alone(make):
    model = make(lambda: SlimResNet18(3, nf=2)).double().eval()
    risk, inputs, targets = case(model, (3, 32, 32), 3)
    assert Layers.of(risk).rest == ()
    assert_exact(risk, inputs, targets)
    matrix = estimate(GGN(), Kronecker(), risk).curvature
    convolutions = {n + ".weight" for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert {layer.weight for layer in matrix.layers} == convolutions


def test_a_head_that_masks_units_is_exact(make):
    model = make(masked_head).double().eval()
    risk, inputs, targets = case(model, (6,), 2)
    assert_exact(risk, inputs, targets)
    matrix = estimate(GGN(), Kronecker(), risk).curvature
    assert [layer.weight for layer in matrix.layers] == ["0.weight", "2.classifier.weight"]
    head = dict(zip(risk.space.names, risk.space.split(matrix.dense().diagonal())))["2.classifier.weight"]
    assert head[:2].all()
    assert not head[2].any()


@pytest.mark.parametrize("structure", [Diagonal(), Kronecker()], ids=["diagonal", "kronecker"])
def test_a_head_of_another_task_has_no_curvature(structure, make, double):
    model = make(lambda: MTSimpleMLP(input_size=6, hidden_size=4))
    model.classifier.classifiers["1"] = IncrementalClassifier(4, 2, masking=False)
    model.classifier.known_train_tasks_labels.add(1)
    model.classifier.masking = False
    model.eval()
    risk, inputs, targets = case(model, (6,), 2, first_head)
    values = estimate(GGN(), structure, risk).curvature.dense().diagonal()
    parts = dict(zip(risk.space.names, risk.space.split(values)))
    assert not parts["classifier.classifiers.1.classifier.weight"].any()
    assert parts["classifier.classifiers.0.classifier.weight"].any()
    if structure == Diagonal():
        assert_exact(risk, inputs, targets)
