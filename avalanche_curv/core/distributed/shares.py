"""Shares of a model's parameters: the coordinates whose quadratic model each rank keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from avalanche_curv.core.distributed.ranks import Ranks
from avalanche_curv.core.risk.parameters import ParameterSpace, canonical_name


@dataclass(frozen=True)
class ParameterShare(ABC):
    """The part of one rank: of the entries of each parameter, in row-major order, a range [start, stop). The parts of
    all `ranks` together are the whole `space`."""

    space: ParameterSpace
    ranges: tuple[tuple[int, int], ...]
    ranks: Ranks

    @property
    @abstractmethod
    def factor(self) -> int:
        """What the gradient of a penalty is multiplied with, so that it is right after ranks have averaged theirs."""

    @abstractmethod
    def tensors(self, model: nn.Module) -> list[Tensor]:
        """This rank's entries of each parameter of `model`, flat and attached to its graph."""

    def of(self, vector: Float[Tensor, "*k P"]) -> Float[Tensor, "*k p"]:
        """This rank's part of vectors over the space, in new memory."""
        parts = vector.split(self.space.sizes, dim=-1)
        return torch.cat([part[..., start:stop] for part, (start, stop) in zip(parts, self.ranges)], dim=-1)

    def vector(self, model: nn.Module) -> Float[Tensor, "p"]:
        """This rank's entries of the parameters of `model` as one detached vector (a copy)."""
        return torch.cat([part.detach() for part in self.tensors(model)])


@dataclass(frozen=True)
class EvenShare(ParameterShare):
    """One of R equal runs of the coordinates, for a model of which every rank holds a copy (DistributedDataParallel).
    The model may have grown since: it is read through the space."""

    @classmethod
    def of_space(cls, space: ParameterSpace, ranks: Ranks) -> EvenShare:
        """The run of this rank: the first ones are longer by one coordinate where R does not divide P."""
        length, longer = divmod(space.size, ranks.size)
        first = ranks.rank * length + min(ranks.rank, longer)
        last, begin, ranges = first + length + (ranks.rank < longer), 0, []
        for size in space.sizes:
            start, stop = (min(max(end - begin, 0), size) for end in (first, last))
            ranges.append((start, stop))
            begin += size
        return cls(space, tuple(ranges), ranks)

    @property
    def factor(self) -> int:
        return self.ranks.size

    def tensors(self, model: nn.Module) -> list[Tensor]:
        whole = self.space.tensors(model)
        return [t.reshape(-1)[start:stop] for t, (start, stop) in zip(whole, self.ranges)]


@dataclass(frozen=True)
class LocalShards(ParameterShare):
    """The rows that a rank holds of a model sharded by `fully_shard` (FSDP2). Its gradients stay where they are."""

    @classmethod
    def of_model(cls, model: nn.Module) -> LocalShards:
        """Raises TypeError unless all trainable parameters are sharded by rows over one and the same mesh."""
        mesh, sharded = mesh_of(model), local_shards(model)
        ranks = Ranks(mesh.get_group())
        space = ParameterSpace.of(model)
        counts = zip(space.shapes, (sharded[name].numel() for name in space.names))
        return cls(space, tuple(_rows(shape, count, ranks) for shape, count in counts), ranks)

    @property
    def factor(self) -> int:
        return 1

    def tensors(self, model: nn.Module) -> list[Tensor]:
        shards = local_shards(model)
        return [shards[name].reshape(-1) for name in self.space.names]


def mesh_of(model: nn.Module) -> Any:
    """The mesh of ranks over which the parameters are sharded by rows. Raises TypeError where there is none."""
    from torch.distributed.tensor import DTensor, Shard

    meshes = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rows = isinstance(parameter, DTensor) and parameter.placements == (Shard(0),)
            if not isinstance(parameter, DTensor) or not rows:
                how = parameter.placements if isinstance(parameter, DTensor) else type(parameter).__name__
                raise TypeError(
                    f"Parameter '{name}' is not sharded by rows over one mesh of ranks; got {how}. Apply fully_shard "
                    "to the model on a mesh of one axis, or use estimate_sharded for a model that every rank copies."
                )
            meshes.append(parameter.device_mesh)
    if not meshes or any(mesh != meshes[0] for mesh in meshes):
        raise TypeError(f"A sharded model needs trainable parameters on one mesh; got {len(set(meshes))} meshes.")
    return meshes[0]


def local_shards(model: nn.Module) -> dict[str, Tensor]:
    """This rank's rows of each trainable parameter by canonical name, attached to the graph. Raises TypeError for a
    parameter that is not in shards."""
    from torch.distributed.tensor import DTensor

    shards = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            raise TypeError(
                f"Parameter '{name}' is not in shards now: the outermost module keeps its own whole between forward "
                "and backward pass. Put the penalty first: past.penalty(model) + criterion(model(x), y)."
            )
        if isinstance(parameter, DTensor) and parameter.requires_grad:
            shards[canonical_name(name)] = parameter.to_local()
    return shards


def _rows(shape: torch.Size, local: int, ranks: Ranks) -> tuple[int, int]:
    """The entries of a rank, which holds ⌈n / R⌉ of the n rows as long as there are some."""
    count, width = shape[0], shape[1:].numel()
    rows = -(-count // ranks.size)
    start, stop = (min(rows * number, count) * width for number in (ranks.rank, ranks.rank + 1))
    if stop - start != local:
        raise TypeError(f"A parameter of shape {tuple(shape)} is not cut in equal runs of rows: {local} lie here.")
    return start, stop
