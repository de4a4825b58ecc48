"""A network that segments, finds boxes and classifies, with one criterion over its heads and targets in a nesting: the
past in a plain loop against explicit loops over examples."""

import io

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian
from torch.nn.functional import cross_entropy, huber_loss

from avalanche_curv import GGN, Accumulate, CurvatureRegularizer, Dense, Diagonal, EmpiricalFisher, Fisher, Refresh
from avalanche_curv.core.nested import split

SIDE, CLASSES, STRENGTH, EXAMPLES = 4, 3, 0.5, 5


class Detector(nn.Module):
    """A class of each pixel, a box and whether there is one, from shared features."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(1, 2, 2, stride=2), nn.ConvTranspose2d(2, CLASSES, 2, stride=2)
        self.box, self.present = nn.Linear(8, 4), nn.Linear(8, 2)

    def forward(self, images):
        features = torch.tanh(self.down(images))
        flat = features.flatten(1)
        return {"pixels": self.up(features), "box": self.box(flat), "present": self.present(flat)}


def joined(model, images):
    return torch.cat([head.flatten(1) for head in model(images).values()], dim=1)


def criterion(outputs, targets):
    """Pixels that count, the box where there is one, and whether there is one."""
    pixels, box, present = outputs.split([CLASSES * SIDE**2, 4, 2], dim=1)
    off = huber_loss(box, targets["box"], reduction="none").mean(1) * targets["present"]
    classes = cross_entropy(pixels.unflatten(1, (CLASSES, SIDE, SIDE)), targets["pixels"], reduction="none")
    return (classes.mean((1, 2)) + 2 * off + cross_entropy(present, targets["present"], reduction="none")).mean()


def batches_of(task, size=2):
    generator = torch.Generator().manual_seed(task)
    images = torch.randn(EXAMPLES, 1, SIDE, SIDE, generator=generator, dtype=torch.float64)
    pixels = torch.randint(CLASSES, (EXAMPLES, SIDE, SIDE), generator=generator)
    targets = {
        "pixels": pixels.masked_fill(images[:, 0] > 1, -100),
        "box": torch.randn(EXAMPLES, 4, generator=generator, dtype=torch.float64),
        "present": torch.randint(2, (EXAMPLES,), generator=generator),
    }
    return split((images, targets), size)


def by_loop(model, task):
    """L, ∇L, and the GGN and empirical Fisher, of one example after the other."""
    parameters, found = [*model.parameters()], []
    for x, y in batches_of(task, size=1):
        outputs = joined(model, x)
        loss = criterion(outputs, y)
        slope = flat(torch.autograd.grad(loss, parameters, retain_graph=True))
        rows = [flat(torch.autograd.grad(f, parameters, retain_graph=True, materialize_grads=True, allow_unused=True))
                for f in outputs[0]]  # fmt: skip
        inner = hessian(lambda f, y=y: criterion(f[None], y), outputs[0].detach())
        jacobian = torch.stack(rows)
        found.append((loss.detach(), slope, jacobian.T @ inner @ jacobian, slope.outer(slope)))
    return [torch.stack(part).mean(0) for part in zip(*found)]


def flat(parts):
    return torch.cat([part.reshape(-1) for part in parts])


def weights(model):
    return flat(p.detach().clone() for p in model.parameters())


@pytest.fixture
def model(make_model):
    return make_model(Detector)


@pytest.mark.parametrize("policy", [Accumulate(), Refresh(1.0, gradient=True)], ids=["accumulated", "refreshed"])
@pytest.mark.parametrize("kind", [GGN(), EmpiricalFisher()], ids=["ggn", "empirical"])
def test_the_past_of_several_heads_is_that_of_a_loop_over_examples(kind, policy, model, close):
    regularizer = CurvatureRegularizer(STRENGTH, curvature=kind, structure=Dense(), policy=policy, guard=None)
    regularizer.check(model, criterion, batches_of(0), forward=joined)
    regularizer.absorb(model, criterion, batches_of(0), forward=joined)
    value, slope, *matrices = by_loop(model, 0)
    matrix, anchor = matrices[isinstance(kind, EmpiricalFisher)], weights(model)
    close(regularizer.past.model.curvature.dense(), matrix)
    if isinstance(policy, Refresh):
        (stored,) = regularizer.past.stored
        assert stored.value() == pytest.approx(float(value), rel=1e-12)
        close(regularizer.past.model.gradient, slope)
    linear = slope if isinstance(policy, Refresh) else torch.zeros_like(slope)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with regularizer.attach(optimizer, model):
        for x, y in batches_of(1):
            optimizer.zero_grad()
            loss = criterion(joined(model, x), y)
            delta = weights(model) - anchor
            task = flat(torch.autograd.grad(loss, [*model.parameters()], retain_graph=True))
            expected = weights(model) - 0.1 * (task + STRENGTH * (linear + matrix @ delta))
            loss.backward()
            optimizer.step()
            close(weights(model), expected)
    file = io.BytesIO()
    torch.save(regularizer.state_dict(), file)
    file.seek(0)
    again = CurvatureRegularizer(STRENGTH, curvature=kind, structure=Dense(), policy=policy, guard=None)
    again.load_state_dict(torch.load(file, weights_only=True), model=model, criterion=criterion, forward=joined)
    for one in (regularizer, again):
        one.absorb(model, criterion, batches_of(1), forward=joined)
    close(again.past.model.curvature.dense(), regularizer.past.model.curvature.dense(), 0)


TWO_LINES = r"likelihood is known.* lines:\n    criterion = LossFunction\(f, sample=.*\n    regularizer = .*samples=1"


def test_a_diagonal_is_that_of_the_loop_and_a_fisher_asks_for_a_likelihood(model, close):
    _, _, ggn, empirical = by_loop(model, 0)
    for kind, matrix in ((GGN(), ggn), (EmpiricalFisher(), empirical)):
        regularizer = CurvatureRegularizer(STRENGTH, curvature=kind, structure=Diagonal())
        regularizer.absorb(model, criterion, batches_of(0), forward=joined)
        close(regularizer.past.model.curvature.values, matrix.diagonal())
    for kind in (Fisher(), Fisher(samples=2)):
        regularizer = CurvatureRegularizer(STRENGTH, curvature=kind)
        for refused in (regularizer.check, regularizer.absorb):
            with pytest.raises(ValueError, match=TWO_LINES):
                refused(model, criterion, batches_of(0), forward=joined)


def test_heads_that_nobody_joined_are_asked_for(model):
    with pytest.raises(TypeError, match=r"gives a dict; expected one tensor.*join several, .* take them apart"):
        CurvatureRegularizer(STRENGTH).check(model, criterion, batches_of(0))
