"""λ chosen from what a learner has: the strength under which the past is the likeliest prior of the newest task."""

from __future__ import annotations

import logging
import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial

from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.arguments import outside, takes
from avalanche_curv.core.curvature.base import Curvature
from avalanche_curv.core.options import check_number, settle
from avalanche_curv.core.quadratic.estimate import estimate
from avalanche_curv.core.quadratic.minimum import minimum, rounding_of
from avalanche_curv.core.quadratic.model import QuadraticModel, alike
from avalanche_curv.core.quadratic.policies import Policy
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.structures import Structure

LOG = logging.getLogger("avalanche_curv")
FURTHEST = 1e6  # times what it was, or 1, at once


@dataclass(frozen=True)
class TaskEvidence:
    """The Laplace evidence of a task as a function of λ, at parameters θ̂ that were trained on it; see `Evidence`.

    `examples` is N, `loss` the mean loss L(θ̂), `before` that at the minimum m of the past, `distance` D = (θ̂ −
    m)ᵀC(θ̂ − m), and `relative` [r] the eigenvalues μ of the curvature H of L relative to C, of rank r: those of C^{-½}
    H C^{-½} on the range of C.

    >>> import torch
    >>> found = TaskEvidence(examples=100, loss=0.5, distance=0.0125, relative=torch.tensor([3.0, 1.0]).double())
    >>> found.determined(1.0), round(found.best(), 9)  # 1.25 of 2 directions; 1 · 1.25 = γ(1)
    (1.25, 1.0)
    """

    examples: int
    loss: float
    distance: float
    relative: Float[Tensor, "r"]
    before: float = math.inf

    def log(self, strength: float) -> float:
        """log Z(λ) = −N (L + ½ λ D) − ½ Σ log(1 + μ/λ), but for what does not depend on λ or θ̂."""
        fit = self.examples * (self.loss + 0.5 * strength * self.distance)
        return -fit - 0.5 * float((self.relative / strength).log1p().sum())

    def determined(self, strength: float) -> float:
        """γ(λ) = Σ μ / (μ + λ): of how many of the r directions the task says more than the past."""
        return float((self.relative / (self.relative + strength)).sum())

    def best(self) -> float:
        """The λ at which `log` is largest for this θ̂: the one root of λ N D = γ(λ), whose left side grows with λ and
        whose right side falls. 0 where the task determines nothing, infinity where θ̂ is m."""
        if not (self.relative > 0).any():
            return 0.0
        weight = self.examples * self.distance
        low, high = -700.0, math.log(self.relative.numel() / weight) if weight > 0 else math.inf
        if high > 700:  # λ ≤ r / (N D)
            return math.inf
        for _ in range(200):
            middle = (low + high) / 2
            below = math.exp(middle) * weight < self.determined(math.exp(middle))
            low, high = (middle, high) if below else (low, middle)
        return math.exp((low + high) / 2)


@takes(
    past=(QuadraticModel, "strategy.past.model"), risk=(EmpiricalRisk, "EmpiricalRisk.snapshot(model, criterion, ...)"),
    curvature=(Curvature, "Fisher()"), structure=(Structure, "Diagonal()"),
)  # fmt: skip
def task_evidence(
    past: QuadraticModel, risk: EmpiricalRisk, curvature: Curvature, structure: Structure, examples: int | None = None
) -> TaskEvidence:
    """The evidence of the task of `risk`, which is frozen at the end of its training, under the `past` before it.

    H is estimated as `curvature` and `structure` say, those of the past. `examples` is N, where `risk` holds a part of
    those that were trained on. Raises TypeError where the eigenvalues of H relative to C are not at hand (`relatives`),
    ValueError where C has a negative eigenvalue, and what `estimate` raises.
    """
    new = estimate(curvature, structure, risk)
    old, new = alike(past, new)
    moved = old.seen_from(new) - old.anchor
    wide = moved.double()
    curved = old.curvature.to(wide)
    if old.gradient is not None:  # to the minimum m instead of the anchor
        wide = wide - minimum(
            curved, old.gradient.double(), rounding=rounding_of(old.anchor), tolerance=1e-6, max_products=5000,
            bounded=True,
        )  # fmt: skip
    distance = max(0.0, float(curved.quadratic_form(wide)))
    space = new.space.union(old.space)
    relative = relatives(old.embedded(space), new.embedded(space), structure)
    least = risk.anchor.clone()
    least[new.space.positions(old.space).to(least.device)] -= wide.to(least.dtype)
    return TaskEvidence(examples or risk.examples, risk.value(), distance, relative, risk.value_at(least))


def relatives(past: QuadraticModel, new: QuadraticModel, structure: Structure) -> Float[Tensor, "r"]:
    """The eigenvalues of the curvature of `new` relative to that of `past`, over one space (`Matrix.relative_to`), in
    double precision; 0 for negative ones. Raises TypeError where they are not at hand."""
    found = new.curvature.relative_to(past.curvature, rounding_of(past.anchor))
    if found is None:
        raise TypeError(
            f"Evidence() needs the eigenvalues of one curvature relative to another, which {structure} does not have "
            "at hand. Take Diagonal(), Dense() or Kronecker(), or give the strength as a number."
        )
    return found.clamp(min=0.0)


class StrengthRule(ABC):
    """A strength that a learner chooses by itself, at the end of each task for the next one."""

    first: float
    """The strength of the penalty until the rule has chosen one."""

    @abstractmethod
    def check(
        self, risk: EmpiricalRisk, curvature: Curvature, structure: Structure, policy: Policy,
        past: QuadraticModel | None,
    ) -> None:
        """Raises TypeError or ValueError where it could not choose, as seen on a few examples and on the `past` to
        begin with, where one is given: before training."""

    @abstractmethod
    def next(
        self, strength: float, past: QuadraticModel, risk: EmpiricalRisk, curvature: Curvature, structure: Structure,
        examples: int,
    ) -> float:
        """The strength after a task that was trained with `strength` and the `past` before it. `risk` is frozen at its
        end, and holds all or some of the `examples` that were trained on."""


@dataclass(frozen=True)
class Evidence(StrengthRule):
    """λ that makes the newest task likeliest, with the past as its prior: the marginal likelihood of a Laplace
    approximation (MacKay 1992, "Bayesian interpolation", eqs. 2.20 to 2.23; for networks Immer et al. 2021).

    **The prior.** Training on N examples with the mean loss L minimises L(θ) + λ q(θ). Where the loss of an example is
    a negative log-likelihood, N times that is a negative log-joint density, with the likelihood exp(−N L) and the prior
    exp(−N λ q): a Gaussian around the minimum m of q, with the precision N λ C. The past itself is Σ_t N_t L_t ≈
    Σ_t N_t q_t. So λ = N_t / N weighs an example of the past as one of the task: 1 for tasks of equal size. Other λ
    temper the past, for what its approximation leaves out.

    **Its evidence.** Z(λ) = ∫ p(task | θ) p(θ | λ) dθ says how well a prior of this strength has foreseen the task. By
    Laplace's method at the minimum θ̂ of L + λq, with H the curvature of L there and D = (θ̂ − m)ᵀC(θ̂ − m),

        log Z(λ) = −N L(θ̂) − ½ N λ D + ½ log det(NλC) − ½ log det(N (H + λC)),

    exact for quadratic L. N cancels in the determinants. With the eigenvalues μ of H relative to C, those of
    C^{-½} H C^{-½}, they leave −½ Σ log(1 + μ/λ). Where C is singular, of rank r, the prior is flat along its null
    space, and H is what is left of it there: its Schur complement on the range of C, in `Dense()`. `Diagonal()` has
    none, and `Kronecker()` leaves it out: μ are then the products of the relative eigenvalues of its
    factors, and what the null space shares with the range counts as held still.

    **Its maximum.** θ̂ minimises L + λq, so that it does not contribute to the derivative, and neither does H, taken as
    constant:

        d log Z / dλ = −½ N D + γ(λ) / (2λ),   γ(λ) = Σ μ / (μ + λ)   so that   λ = γ(λ) / (N D).

    γ is the number of directions that the task determines better than the past, and N λ D how many standard deviations
    of the prior, squared, it has moved in all. At the end of each task that was trained with a penalty, λ becomes the
    root of this equation for the θ̂ of now, where one side grows with λ and the other falls. The next task is trained
    with it. Repeated, that ends where log Z is stationary. The first task has no past, and the second `first`.

    **What it is not.** Evidence says how likely the past makes the new task, and not how much of the past is lost by
    learning it. Where tasks want other parameters, D is large and λ small, whatever is forgotten. And it trusts its
    count of directions: where a diagonal or a pair of factors has more of them than examples determine, each speaks for
    a larger λ. Examples that are fitted with certainty have no curvature left, so that γ and λ go to 0. What that does
    to accuracy: `python -m benchmarks run strengths`.

    λ stays what it was, with a warning, where the loss at θ̂ is more than twice what it is at m: no minimum of L + λq is
    above L(m), so that training diverged or was too short. It also stays where θ̂ is m or γ is 0, and grows by at most a
    factor of 1e6 at once. SGD may not be stable at it: take `guard=RescaleIfUnstable()` there.

    `first` ≥ 0 is the strength until then. Policies that move the past while a task is trained (`AdaptiveRefresh`) are
    refused, with structures of whose matrices relative eigenvalues are not known, and online streams that hide where
    tasks end (TypeError, before training). Costs one more estimate for each task.
    """

    first: float = 1.0

    def __post_init__(self) -> None:
        settle(self, first=partial(check_number, at_least=0, hint="1 weighs tasks of equal size alike."))

    def check(
        self, risk: EmpiricalRisk, curvature: Curvature, structure: Structure, policy: Policy,
        past: QuadraticModel | None,
    ) -> None:
        if policy.revises:
            raise TypeError(
                f"Evidence() compares the end of a task with the past before it, which {policy} moves meanwhile. Give "
                "the strength as a number: 1 weighs tasks of equal size alike."
            )
        if not (curvature.is_semidefinite or curvature.is_mended):
            raise TypeError(
                f"Evidence() takes the curvature of the past for the precision of a prior, which {curvature} is not "
                "where it is negative. Take GGN(), Fisher() or Hessian(psd=Clip())."
            )
        new = estimate(curvature, structure, risk)
        old = (new if past is None else past) + new
        relatives(old, new.to(old.anchor).embedded(old.space), structure)

    def next(
        self, strength: float, past: QuadraticModel, risk: EmpiricalRisk, curvature: Curvature, structure: Structure,
        examples: int,
    ) -> float:
        found = task_evidence(past, risk, curvature, structure, examples)
        best, largest = found.best(), FURTHEST * max(strength, 1.0)
        if not found.loss <= 2 * found.before:
            warnings.warn(
                f"Evidence() keeps strength {strength:.4g}: the loss of the task is {found.loss:.3g} at its end and "
                f"{found.before:.3g} where the penalty is least, so that training did not come to a minimum of both. "
                "Lower the learning rate, or take guard=RescaleIfUnstable().",
                UserWarning,
                stacklevel=outside(),
            )
            return strength
        if not 0 < best < math.inf:
            said, chosen = "is kept: the task has no curvature left, or has moved no parameter", strength
        else:
            chosen = min(best, largest)
            said = "by evidence" if chosen == best else f"is the most at once: evidence says {best:.4g}"
        LOG.info(
            "Strength %.4g %s (before: %.4g): of %d directions of the past the task determines %.4g, and N D is %.4g.",
            chosen, said, strength, found.relative.numel(), found.determined(chosen) if chosen else 0.0,
            found.examples * found.distance,
        )  # fmt: skip
        return chosen
