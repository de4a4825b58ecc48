"""The empirical risk of examples that are spread over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from avalanche_curv.core.distributed.ranks import Ranks
from avalanche_curv.core.nested import Nested, examples, index, mapped
from avalanche_curv.core.risk.batches import Batches, kept
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.forward import Forward


@dataclass(frozen=True)
class ShardedRisk:
    """L(θ) = (1/N) Σ_r Σ_{i on r} ℓ(f_θ(x_i), y_i): every rank holds a copy of the model and examples of its own.

    It is the risk of one process that sees the examples of rank 0 first, then those of rank 1, and so on. The numbers
    `counts` of examples may differ, and may be zero: such a rank has borrowed an example, which does not count. Make it
    with `ShardedRisk.snapshot`; all methods are to be called on all ranks.
    """

    own: EmpiricalRisk
    counts: tuple[int, ...]
    ranks: Ranks

    @classmethod
    def snapshot(
        cls,
        model: nn.Module,
        criterion: object,
        batches: Batches,
        *,
        ranks: Ranks = Ranks(),  # noqa: B008  a frozen value
        forward: Forward | None = None,
    ) -> ShardedRisk:
        """`EmpiricalRisk.snapshot` of this rank's `batches`, which may be none. It raises what that raises, on all
        ranks; ValueError too where ranks hold models of other parameters or buffers, or none has an example."""
        own_batches = ranks.together(lambda: kept(batches))
        first, spare = borrowed(own_batches, ranks)
        own = ranks.together(
            lambda: EmpiricalRisk.snapshot(model, criterion, own_batches if first else (spare,), forward=forward)
        )
        risk = cls(own, tuple(ranks.gather_of(lambda: own.examples if first else 0)), ranks)
        risk._check()
        return risk

    @property
    def examples(self) -> int:
        """N, of all ranks."""
        return sum(self.counts)

    @property
    def before(self) -> int:
        """The number of examples on the ranks before this one."""
        return sum(self.counts[: self.ranks.rank])

    @property
    def share(self) -> float:
        """N_r / N of this rank."""
        return self.counts[self.ranks.rank] / self.examples

    @cached_property
    def is_finite(self) -> bool:
        """Whether parameters and first losses are, on every rank."""
        own = self.own
        return all(self.ranks.gather_of(lambda: bool(own.anchor.isfinite().all() and own.one_loss.isfinite().all())))

    def value(self) -> float:
        """L at the frozen parameters."""
        like = torch.zeros((), dtype=torch.float64, device=self.own.anchor.device)
        return float(self.ranks.sum_of(lambda: like + self.own.value() * self.share, like))

    def gradient(self) -> Float[Tensor, "P"]:
        """∇L at the frozen parameters."""
        return self.ranks.sum_of(lambda: self.own.gradient() * self.share, self.own.anchor)

    def select(self, indices: Int[Tensor, "n"]) -> ShardedRisk:
        """The risk of the examples at sorted `indices` from 0 to N − 1, which count through the ranks."""
        ends = torch.tensor(self.counts).cumsum(0)
        rank_of = torch.bucketize(indices, ends, right=True)
        counts = torch.bincount(rank_of, minlength=len(self.counts))
        here = indices[rank_of == self.ranks.rank] - self.before
        own = self.ranks.together(lambda: self.own.select(here if len(here) else torch.tensor([0])))
        return replace(self, own=own, counts=tuple(counts.tolist()))

    def _check(self) -> None:
        anchor, space = self.own.anchor, self.own.space
        self.ranks.check_device(anchor.device)
        self.ranks.agree({
            "parameters": ", ".join(f"{name} {tuple(shape)}" for name, shape in zip(space.names, space.shapes)),
            "type of the parameters": str(anchor.dtype),
            "criterion": type(self.own.loss).__name__,
        })
        check_parameters(anchor, self.ranks)
        check_buffers(self.own.base, self.ranks)


def borrowed(batches: Batches, ranks: Ranks) -> tuple[bool, Any]:
    """Whether this rank has examples, and one of the first rank that has some, as a batch on the CPU; None where every
    rank has. Raises ValueError where none has."""
    own = ranks.together(lambda: next((batch for batch in batches if examples(batch)), None))
    known = ranks.gather(own is not None)
    if not any(known):
        raise ValueError("The risk of no examples is not defined: no rank has any. Give one or more to some rank.")
    if all(known):
        return True, None
    lender = known.index(True)
    lending = None if ranks.rank != lender else own
    found = ranks.gather_of(lambda: None if lending is None else lent(lending))[lender]
    return own is not None, found


def lent(batch: Nested) -> Nested:
    """The first example of a batch, as a batch on the CPU."""
    return mapped(lambda tensor: tensor.detach().cpu(), index(batch, slice(1)))


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
    """The norms on each rank of those tensors whose norm or sum is not the same on all. NaN is let pass: the
    outputs show it."""
    own = [(float(t.double().norm()), float(t.double().sum())) for t in tensors.values()]
    found = {}
    for name, sizes in zip(tensors, zip(*ranks.gather(own))):
        every = torch.tensor(sizes, dtype=torch.float64)
        if ((every - every[0]).abs() > AGREEMENT * every[0, 0]).any():
            found[name] = every[:, 0].tolist()
    return found
