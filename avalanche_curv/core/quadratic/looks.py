"""How the loss of stored examples is looked at: all of them, or a random part that is as large as the verdict needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from avalanche_curv.core.options import check_count, check_number, settle
from avalanche_curv.core.quadratic.trust import Trust, TrustCheck

Losses = Callable[[Sequence[Int[Tensor, "m"]]], Sequence[Float[Tensor, "m"]]]
"""Sorted indices for each experience ↦ ℓ_n(θ) of these of its examples."""


class Look(ABC):
    """How the loss L(θ) = Σ_t mean_n ℓ_n(θ) of stored examples is measured, to decide whether its model is trusted."""

    @abstractmethod
    def check(
        self, start: float, predicted: float, before: Sequence[Float[Tensor, "n"]], losses: Losses, trust: Trust,
        seed: int,
    ) -> TrustCheck:  # fmt: skip
        """What is found: `start` = L(a), `predicted` = q(θ), and L(θ) as far as it is known.

        `before` has the ℓ_n(a) of each experience, and `losses` gives ℓ_n(θ). A look that draws does so by `seed`.
        """


@dataclass(frozen=True)
class AllStored(Look):
    """All stored examples: one forward pass over them."""

    def check(
        self, start: float, predicted: float, before: Sequence[Float[Tensor, "n"]], losses: Losses, trust: Trust,
        seed: int,
    ) -> TrustCheck:  # fmt: skip
        actual = sum(float(own.double().mean()) for own in losses([torch.arange(len(old)) for old in before]))
        return TrustCheck(start, actual, predicted)


@dataclass(frozen=True)
class RandomPart(Look):
    """A random part of the stored examples that doubles until the verdict is sure, up to all of them.

    With d_n = ℓ_n(θ) − ℓ_n(a) of m_t of the N_t examples of experience t, drawn without replacement,

        L(θ) ≈ L(a) + Σ_t mean(d),   standard error s² = Σ_t var(d)/m_t · (1 − m_t/N_t).

    The verdict is sure where the trust says the same of all values within `sigmas` · s of that. Differences of an
    example with itself vary little near the anchor, so that few examples decide most looks. `examples` are the first
    part, in equal shares of all experiences, at least two of each; of no more stored examples all are taken. A
    sequential test, like that of Korattikara, Chen & Welling (2014, arXiv 1304.5299).
    """

    examples: int = 256
    sigmas: float = 2.0

    def __post_init__(self) -> None:
        hint = "2 errs in one look of twenty that is at the edge of the region."
        settle(self, examples=check_count, sigmas=partial(check_number, above=0, hint=hint))

    def check(
        self, start: float, predicted: float, before: Sequence[Float[Tensor, "n"]], losses: Losses, trust: Trust,
        seed: int,
    ) -> TrustCheck:  # fmt: skip
        found = TrustCheck(start, start, predicted)
        for actual, error in self._estimates(start, before, losses, seed):
            found = replace(found, actual=actual)
            low, high = actual - self.sigmas * error, actual + self.sigmas * error
            extremes = low, min(max(predicted, low), high), high  # least error where nearest to what is predicted
            if len({trust.broken(replace(found, actual=extreme)) is None for extreme in extremes}) == 1:
                break
        return found

    def _estimates(
        self, start: float, before: Sequence[Float[Tensor, "n"]], losses: Losses, seed: int
    ) -> Iterator[tuple[float, float]]:
        """L(θ) and its standard error, by ever larger parts; the last by all."""
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(len(old), generator=generator) for old in before]
        now, share = [old.new_zeros(0) for old in before], max(2, -(-self.examples // len(before)))
        while any(len(seen) < len(old) for seen, old in zip(now, before)):
            stops = (share if 2 * share < len(old) else len(old) for old in before)
            drawn = [order[len(seen) : stop] for order, seen, stop in zip(orders, now, stops)]
            for part in drawn:
                part.copy_(part.sort().values)
            now = [torch.cat([seen, new]) for seen, new in zip(now, losses(drawn))]
            yield _estimated(start, before, now, orders)
            share *= 2


def _estimated(
    start: float, before: Sequence[Float[Tensor, "n"]], now: Sequence[Float[Tensor, "m"]], orders: Sequence[Tensor]
) -> tuple[float, float]:
    """L(θ) and its standard error, from the losses `now` of the first m examples of each order."""
    if all(len(new) == len(old) for new, old in zip(now, before)):
        return sum(float(new.double().mean()) for new in now), 0.0
    actual, variance = start, 0.0
    for old, new, order in zip(before, now, orders):
        change = (new - old[order[: len(new)].to(old.device)]).double()
        actual += float(change.mean())
        if len(new) < len(old):
            variance += float(change.var()) / len(new) * (1 - len(new) / len(old))
    return actual, variance**0.5
