"""The network that is timed, and what it is timed on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from benchmarks.experiments.speed.experiment import Config


def network(config: Config) -> nn.Module:
    """784-hidden-hidden-10 with ReLU, drawn from torch's current random state."""
    h = config.hidden
    return nn.Sequential(nn.Linear(784, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, 10))


def synthetic(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random inputs [count, 784] in [0, 1] and random classes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 784, generator=generator), torch.randint(10, (count,), generator=generator)


def orthonormal(count: int, size: int, seed: int = 0) -> Tensor:
    """Random orthonormal rows [count, size]."""
    drawn = torch.randn(size, count, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(drawn)[0].T.contiguous()
