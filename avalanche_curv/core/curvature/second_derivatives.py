"""The second derivative of a risk: the derivative of the gradient where torch gives that, differences elsewhere."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from avalanche_curv.core.curvature.operators import Operator
from avalanche_curv.core.curvature.products import OfRisk
from avalanche_curv.core.nested import Nested
from avalanche_curv.core.risk.batches import untouched_randomness
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.frozen import Graphs, copied_base
from avalanche_curv.core.risk.known import is_plain
from avalanche_curv.core.risk.trust import differing, directions, nearby


@dataclass(frozen=True)
class LinearisedHessian(OfRisk):
    """∇²L from the graph of the gradient."""

    risk: EmpiricalRisk

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        """H M, column by column."""
        return torch.stack([self._product(column) for column in matrix.T], dim=1) / self.risk.examples

    def __getstate__(self) -> dict[str, Any]:
        """Graphs are not stored: they are computed again."""
        return {"risk": self.risk}

    def _product(self, vector: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
        total = torch.zeros_like(vector)
        for gradient in self._gradients.value:
            if gradient.requires_grad:
                parts = torch.autograd.grad(
                    gradient, self.risk.parameters, vector,
                    retain_graph=True, allow_unused=True, materialize_grads=True,
                )
                total += self.risk.space.flatten(list(parts))
        return total

    @cached_property
    def _gradients(self) -> Graphs[list[Tensor]]:
        return Graphs(self.risk.base, lambda: [summed_gradient_graph(self.risk, x, y) for x, y in self.risk])


COLUMNS = 32  # products at once: this bounds the memory


@dataclass(frozen=True)
class ReverseHessian:
    """∇²L at the frozen parameters, as the derivative of the gradient.

    Reverse over reverse, where curvlinops 3.0.1 goes forward over reverse: torch lacks forward derivatives for
    attention and, without gradients, for group norms. Where it has them, its products took 0.9 to 3.2 times as long
    (multilayer perceptrons of 900 and 90,000 parameters, a small convolutional network).
    """

    risk: EmpiricalRisk

    @property
    def size(self) -> int:
        return self.risk.space.size

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        """H M, a few columns at a time."""
        total = torch.zeros_like(matrix)
        for x, y in self.risk:
            gradient = summed_gradient_graph(self.risk, x, y)
            if gradient.requires_grad:
                parts = [self._rows(gradient, part.T) for part in matrix.split(COLUMNS, dim=1)]
                total += torch.cat(parts).T
        return total / self.risk.examples

    def _rows(self, gradient: Float[Tensor, "P"], rows: Float[Tensor, "k P"]) -> Float[Tensor, "k P"]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*performance drop.*")  # a loop where vmap has no rule
            parts = torch.autograd.grad(
                gradient, self.risk.parameters, rows.contiguous(),
                retain_graph=True, is_grads_batched=True, allow_unused=True,
            )
        sizes = self.risk.space.sizes
        filled = [rows.new_zeros(len(rows), n) if part is None else part for part, n in zip(parts, sizes)]
        return torch.cat([part.reshape(len(rows), -1) for part in filled], dim=1)


@torch.enable_grad()
def summed_gradient_graph(risk: EmpiricalRisk, x: Nested, y: Tensor) -> Float[Tensor, "P"]:
    """Σ_i ∇ℓ_i over one batch, which can be differentiated again."""
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention lack second derivatives
        loss = risk.loss.per_example(risk.outputs(x), y).sum()
    parts = torch.autograd.grad(loss, risk.parameters, create_graph=True, allow_unused=True, materialize_grads=True)
    return risk.space.flatten(list(parts))


class HessianByDifferences:
    """∇²L at the frozen parameters θ, by symmetric differences of gradients:

        H v = (∇L(θ + h v) − ∇L(θ − h v)) / 2h + O(h²),   h ‖v‖ = ε^⅓ max(1, ‖θ‖),

    with ε the rounding of the type of θ, or of double precision, in which the model is evaluated by `doubled`. For
    models whose gradient torch does not differentiate rightly: in double precision exact to about 1e-9, but for a kink
    of the loss within h of θ.
    """

    def __init__(self, risk: EmpiricalRisk) -> None:
        self.risk = risk

    @property
    def size(self) -> int:
        return self.risk.space.size

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        """H M, column by column."""
        columns = matrix.to(self.risk.anchor).T
        return torch.stack([_difference(self.risk, self.risk.anchor, v) for v in columns], dim=1).to(matrix)


def _difference(
    risk: EmpiricalRisk, parameters: Float[Tensor, "P"], vector: Float[Tensor, "P"], step: float = 1.0
) -> Float[Tensor, "P"]:
    """H v at these parameters, with differences `step` times as wide."""
    length = float(vector.norm())
    if not length > 0:
        return torch.zeros_like(parameters)
    h = step * _width(parameters) / length
    ahead, behind = (risk.gradient_at(parameters + sign * h * vector) for sign in (1, -1))
    return (ahead - behind) / (2 * h)


def _width(parameters: Float[Tensor, "P"]) -> float:
    """h ‖v‖."""
    return torch.finfo(parameters.dtype).eps ** (1 / 3) * max(1.0, float(parameters.norm()))


def doubled(risk: EmpiricalRisk) -> EmpiricalRisk:
    """The risk with its frozen model in double precision."""
    return risk.with_base(copied_base(risk.base, dtype=torch.float64).double())


def hessian_operator(risk: EmpiricalRisk) -> Operator:
    """∇²L as the derivative of the gradient where that is right, and by differences of gradients elsewhere; zero in
    what never trains (see `held_still`). Raises what `is_differentiated_twice` raises."""
    right = is_differentiated_twice(risk)
    return moving(ReverseHessian(risk) if right else HessianByDifferences(doubled(risk)), risk)


@dataclass(frozen=True)
class _Moving:
    """An operator within the coordinates that are not held still."""

    whole: Operator
    still: Int[Tensor, "s"]

    @property
    def size(self) -> int:
        return self.whole.size

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        return self.whole.matmat(matrix.index_fill(0, self.still, 0)).index_fill(0, self.still, 0)


def moving(operator: Operator, risk: EmpiricalRisk) -> Operator:
    """An operator on the parameters of a risk, with zeros in what is held still."""
    still = held_still(risk)
    return _Moving(operator, still) if len(still) else operator


def held_still(risk: EmpiricalRisk) -> Int[Tensor, "s"]:
    """The coordinates that get no gradient though outputs depend on them: the rows at `padding_idx` of embeddings."""
    places = {id(p): start for p, start in zip(risk.parameters, accumulate(risk.space.sizes, initial=0))}
    found = [torch.arange(0)]
    for module in risk.base.modules():
        padding, weight = getattr(module, "padding_idx", None), getattr(module, "weight", None)
        if padding is not None and isinstance(weight, Tensor) and id(weight) in places:
            start = places[id(weight)] + padding * weight.shape[1]
            found.append(torch.arange(start, start + weight.shape[1]))
    return torch.cat(found).to(risk.anchor.device)


def is_differentiated_twice(risk: EmpiricalRisk) -> bool:
    """Whether torch's derivative of the gradient of the loss equals differences of gradients, on a few examples at
    parameters nearby. Asked once of a frozen model, and not of one of known modules.

    Raises TypeError where it does not, and the model cannot be evaluated in double precision, or where the gradient is
    that of no function.
    """
    if "second derivatives" not in risk.verdicts:
        with untouched_randomness():
            risk.verdicts["second derivatives"] = is_plain(risk.model) or _agrees_with_differences(risk)
    return risk.verdicts["second derivatives"]


def _agrees_with_differences(risk: EmpiricalRisk) -> bool:
    for precise, tolerance in ((doubled, 1e-3), (lambda risk: risk, 5e-2)):
        try:
            trial = precise(risk.trial(2))
            with trial.holding(nearby(trial)):
                wrong = _wrong_second_derivatives(trial, tolerance)
                symmetric = not wrong or _is_symmetric(trial)
        except Exception:  # of any kind: not every model can be evaluated in double precision
            continue
        if not symmetric:
            raise TypeError(
                f"The gradient of {type(risk.base).__name__} is that of no function, since its derivative is not "
                "symmetric: something is detached in forward that depends on the parameters, say. It has no Hessian. "
                "Use GGN(), Fisher() or EmpiricalFisher(), which take first derivatives only."
            )
        if wrong and trial.anchor.dtype != torch.float64:
            raise TypeError(_no_hessian(risk, wrong))
        if wrong is not None:
            return not wrong
    return True


def _wrong_second_derivatives(trial: EmpiricalRisk, tolerance: float) -> list[int] | None:
    """The places of the parameters for which torch's derivative of the gradient is not that of differences; None where
    these depend on their width, at a kink or by rounding, so that there is nothing to judge by."""
    vector, space = directions(trial.space.size, 1, like=trial.anchor), trial.space
    vector = vector.index_fill(0, held_still(trial), 0)
    here = space.flatten([p.detach() for p in trial.parameters])
    near, rounding = _difference(trial, here, vector[:, 0]), _rounding(trial, here, vector)
    wanted, size = space.split(near), float(near.norm())
    try:
        product = ReverseHessian(trial).matmat(vector)[:, 0]
        wrong, size = differing(space.split(product), wanted, tolerance), max(size, float(product.norm()))
    except Exception:  # torch lacks the derivative
        wrong = [*range(len(wanted))]
    if not rounding <= 1e-2 * tolerance * size:
        return None
    if wrong:
        far = space.split(_difference(trial, here, vector[:, 0], 3.0))
        if differing(far, wanted, tolerance, size):
            return None
    return wrong


def _is_symmetric(trial: EmpiricalRisk) -> bool:
    """Whether uᵀ H v = vᵀ H u for two directions, with H by differences of gradients."""
    still = held_still(trial)
    u, v = (part.index_fill(0, still, 0) for part in directions(2, trial.space.size, like=trial.anchor))
    here = trial.space.flatten([p.detach() for p in trial.parameters])
    of_u, of_v = (_difference(trial, here, direction) for direction in (u, v))
    size = float(of_u.norm() * v.norm() + of_v.norm() * u.norm()) / trial.space.size**0.5
    noise = 1e2 * (_rounding(trial, here, u) * v.norm() + _rounding(trial, here, v) * u.norm())
    return abs(float(u @ of_v - v @ of_u)) <= 1e-2 * size + float(noise)


def _rounding(trial: EmpiricalRisk, here: Float[Tensor, "P"], vector: Tensor) -> float:
    """The norm of what rounding leaves of H v by differences."""
    return torch.finfo(here.dtype).eps * float(trial.gradient_at(here).norm() * vector.norm()) / _width(here)


def _no_hessian(risk: EmpiricalRisk, wrong: list[int]) -> str:
    names = [risk.space.names[place] for place in wrong]
    modules = dict(risk.base.named_modules())
    owners = {name.rpartition(".")[0] for name in names}
    kinds = sorted(f"{type(modules[owner]).__name__} '{owner}'" for owner in owners if owner in modules)
    return (
        f"torch gives another second derivative of {', '.join(kinds)} than differences of gradients do, in the "
        f"parameters {', '.join(names[:5])}. Use GGN(), Fisher() or EmpiricalFisher(), which take first derivatives "
        "only; or let the model run in double precision, in which the Hessian is taken by differences."
    )
