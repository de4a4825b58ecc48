"""Streaming EWC by a compiled loop: against torch's passes."""

import shutil

import pytest
import torch
from torch import nn

from avalanche_curv.plasticity.mitigators import StreamingEWC, streaming_pass

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler is at hand"),
]


def trained(decay, steps=7):
    """Gradients, averages and parameters after some steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3))
    mitigator = StreamingEWC(2.0, importance_decay=decay)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mitigator.attach(optimizer, model)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 9)).square().mean().backward()
        optimizer.step()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return gradients, mitigator.importances, mitigator.anchors, dict(model.named_parameters()), mitigator.counts


@pytest.mark.parametrize("decay", [0.9, 1 - 1e-6])  # 1 - decay is not what is left of decay in float32
def test_it_is_as_without_a_compiler(decay, monkeypatch):
    assert streaming_pass.library() is not None
    found = trained(decay)
    monkeypatch.setattr(streaming_pass, "library", lambda: None)
    torch.testing.assert_close(found, trained(decay), rtol=1e-5, atol=1e-12)


def test_one_step_is_the_formula():
    g, p, f, a = (torch.tensor(numbers) for numbers in ([3.0, -1.0], [5.0, 1.0], [2.0, 0.0], [4.0, 3.0]))
    version = g._version
    assert streaming_pass.streamed([g], [p], [f], [a], [10.0], 0.75, 0.5)
    assert g._version > version  # autograd sees that it was changed in place
    assert f.tolist() == [0.75 * 2 + 0.25 * 9, 0.25]
    assert g.tolist() == [3 + 10 * 3.75 * 1, -1 + 10 * 0.25 * -2]
    assert a.tolist() == [4.5, 2.0]


def test_what_is_not_plain_or_of_another_type_is_left_alone():
    g, p, f, a = (torch.ones(2, 3) for _ in range(4))
    assert not streaming_pass.streamed([g.T.contiguous().T], [p], [f], [a], [1.0], 0.5, 0.5)
    assert not streaming_pass.streamed(*([t.double()] for t in (g, p, f, a)), [1.0], 0.5, 0.5)
    torch.set_num_threads(2)
    assert not streaming_pass.streamed([g], [p], [f], [a], [1.0], 0.5, 0.5)
