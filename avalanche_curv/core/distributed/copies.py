"""Whether what the ranks hold are copies of one model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from avalanche_curv.core.distributed.ranks import Ranks

AGREEMENT = 1e-5  # relative: copies of one model may differ by rounding


def check_parameters(anchor: Float[Tensor, "P"], ranks: Ranks) -> None:
    """Raises ValueError on all ranks unless they hold the same parameters."""
    for norms in _differing({"parameters": anchor}, ranks).values():
        raise ValueError(
            f"The ranks hold models of different values: the norms of their parameters are {norms}. "
            "Give each a copy of one model: wrap it in DistributedDataParallel, or draw it from one seed."
        )


def check_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Raises ValueError on all ranks unless they hold the same floating point buffers."""
    buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    ranks.agree({"buffers": ", ".join(f"{name} {tuple(buffer.shape)}" for name, buffer in buffers.items())})
    for name, norms in _differing(buffers, ranks).items():
        raise ValueError(
            f"The ranks hold buffers of different values: the norms of '{name}' are {norms}. Each rank has running "
            "statistics of its own after a forward pass in training. Broadcast them from rank 0 beforehand, `for "
            "buffer in model.buffers(): torch.distributed.broadcast(buffer, 0)`, or train with torch.nn.SyncBatchNorm."
        )


def _differing(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, list[float]]:
    """The norms on each rank of those tensors whose norm or sum is not the same on all. NaN passes: it is told from
    the outputs."""
    own = [(float(t.double().norm()), float(t.double().sum())) for t in tensors.values()]
    found = {}
    for name, sizes in zip(tensors, zip(*ranks.gather(own))):
        every = torch.tensor(sizes, dtype=torch.float64)
        if ((every - every[0]).abs() > AGREEMENT * every[0, 0]).any():
            found[name] = every[:, 0].tolist()
    return found
