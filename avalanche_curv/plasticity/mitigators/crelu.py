"""The concatenated ReLU."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class CReLU(nn.Module):
    """[max(x, 0), max(−x, 0)] along dim 1 (Shang et al. 2016; against the loss of plasticity, Abbas et al. 2023).

    No unit can die: one half passes each input. Outputs are twice as many as inputs, so that the next layer reads
    twice as many, or layers before are made half as wide to keep the number of parameters near that with a ReLU:

        nn.Sequential(nn.Linear(784, 128), CReLU(), nn.Linear(256, 128), CReLU(), nn.Linear(256, 10))
        nn.Sequential(nn.Conv2d(3, 16, 3), CReLU(), nn.Conv2d(32, 16, 3), CReLU())

    Dim 1 holds features of [batch, features] and channels of images.

    >>> CReLU()(torch.tensor([[1.0, -2.0]]))
    tensor([[1., 0., 0., 2.]])
    """

    def forward(self, x: Float[Tensor, "n c *rest"]) -> Float[Tensor, "n c2 *rest"]:
        return torch.cat((x.relu(), (-x).relu()), dim=1)
