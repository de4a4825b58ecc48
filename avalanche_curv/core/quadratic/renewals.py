"""What is estimated anew where a quadratic model is trusted no more, and from which of the stored examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from avalanche_curv.core.options import check_count, optional, settle


@dataclass(frozen=True)
class Renewal(ABC):
    """What a refresh during an experience estimates anew, of as many stored `examples`, all of them for None: equal
    shares of all past experiences, at least one of each, drawn anew each time."""

    examples: int | None

    @property
    @abstractmethod
    def keeps_curvature(self) -> bool:
        """Whether C stays that of the last end of an experience."""

    def __post_init__(self) -> None:
        settle(self, examples=optional(partial(check_count, hint="None takes all that are stored.")))

    def drawn(self, counts: Sequence[int], seed: int) -> tuple[Int[Tensor, "n"], ...]:
        """Sorted places of the examples of each experience, of which so many are stored.

        >>> [len(places) for places in SlopeAlone(6).drawn([2, 5, 5], seed=0)]
        [2, 2, 2]
        """
        generator = torch.Generator().manual_seed(seed)
        share = None if self.examples is None else max(1, self.examples // len(counts))
        return tuple(torch.randperm(count, generator=generator)[:share].sort().values for count in counts)


@dataclass(frozen=True)
class Everything(Renewal):
    """Loss, slope and curvature."""

    examples: int | None = None
    keeps_curvature = False


@dataclass(frozen=True)
class SlopeAlone(Renewal):
    """Loss and slope, which one gradient pass over the drawn examples gives; C stays that of the last end of an
    experience.

    A model that lives δ long errs by ½ δᵀ (H − C) δ for another C, and by (g' − g)ᵀ δ for the slope of another anchor,
    so that the shorter it lives the less its curvature matters.
    """

    examples: int | None = 512
    keeps_curvature = True
