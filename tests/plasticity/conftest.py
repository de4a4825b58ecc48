import pytest
from torch import nn


class Written(nn.Module):
    """A model whose forward pass is given as a function."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.written = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.written(self, x)


@pytest.fixture
def written():
    """written(forward, **layers) -> a model whose forward pass is forward(model, x)."""
    return Written
