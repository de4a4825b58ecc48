"""Curvature and penalty on several processes (torch.distributed, launched by torchrun).

Models of which every rank holds a copy, and examples of its own:

    risk = ShardedRisk.snapshot(model, criterion, my_batches)         # all of this is called on all ranks
    past = estimate_sharded(Fisher(), Diagonal(), risk)               # equal to one process with all examples
    kept = ShardedQuadratic.of(past)                                  # 1/R of it on each rank
    loss = criterion(ddp(x), y) + strength * kept.penalty(ddp)

Models sharded by `fully_shard` (FSDP2), which no rank holds in full:

    kept = estimate_fully_sharded(Fisher(), model, criterion, my_batches)
    loss = strength * kept.penalty(model) + criterion(model(x), y)    # the penalty first
"""

from avalanche_curv.core.distributed.estimation import estimate_sharded
from avalanche_curv.core.distributed.fully_sharded import estimate_fully_sharded
from avalanche_curv.core.distributed.penalty import ShardedQuadratic
from avalanche_curv.core.distributed.ranks import Ranks
from avalanche_curv.core.distributed.risk import ShardedRisk
from avalanche_curv.core.distributed.shares import EvenShare, LocalShards, ParameterShare

__all__ = [
    "EvenShare",
    "LocalShards",
    "ParameterShare",
    "Ranks",
    "ShardedQuadratic",
    "ShardedRisk",
    "estimate_fully_sharded",
    "estimate_sharded",
]
