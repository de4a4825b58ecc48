"""Spectral regularisation: the largest singular value of every weight is kept close to one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_curv.core.options import check_seed, is_number
from avalanche_curv.plasticity.mitigators.gradients import add_to, gradient_of, in_full
from avalanche_curv.plasticity.mitigators.power_iteration import SingularPair, fitting, iterate, stir
from avalanche_curv.plasticity.mitigators.regularizer import Regularizer
from avalanche_curv.plasticity.mitigators.roles import (
    Adds,
    Multiplies,
    Role,
    Scales,
    block_names,
    roles,
    warn_of_unknown,
)
from avalanche_curv.plasticity.mitigators.selection import ParameterSelector

STIR = 128  # iterations between
LOOK = 50


class SpectralRegularizer(Regularizer):
    """Adds strength · R(θ), R = Σ_W (σ₁(W)^k − 1)² + Σ_b ‖b‖₂^{2k} + Σ_γ Σ_i (γ_i − 1)², over weights W, additive
    parameters b and scales γ of norm layers.

    Without it spectral norms grow from task to task, the gradients of different examples become alike, and the network
    trains ever worse (Lewandowski et al. 2024, section 4 and appendix A.7, with k = 2). It pulls the spectral norm of
    a weight to 1, an additive parameter to 0, and each entry of a scale to 1. Do not expect σ₁ = 1: at strength 1e-3
    it settles near 3.

    A weight is a matrix of d_out × all its other axes; for a convolution, σ₁ of this matrix is not the operator norm,
    which it bounds up to a factor that the kernel's size gives. Queries, keys and values of nn.MultiheadAttention and
    the gates of recurrent layers are matrices of their own. Class tokens and positional embeddings are additive.
    Token embeddings, slopes of PReLU, single numbers and frozen parameters are left alone, and a tied parameter counts
    once. A weight that is computed from others, as by `weight_norm`, is left alone with a warning.

    σ₁ is followed by one power iteration a step from vectors u and v that persist, and are in `state_dict`. With them
    held constant a weight's gradient is 2k (σ^k − 1) σ^{k−1} u vᵀ. Half precision is computed in float32, outside of
    autocast. A matrix of zeros keeps its vectors until it is none; with exponent 1 alone it is moved along them.

    Raises ValueError for an exponent below 1 and an unusable seed, and those of `Regularizer`.

    >>> model = nn.Linear(2, 2)
    >>> with torch.no_grad():
    ...     _ = nn.init.eye_(model.weight).mul_(2), model.bias.fill_(1)
    >>> round(SpectralRegularizer(1e-3).penalty(model).item(), 4)  # (2² − 1)² + (√2)⁴
    13.0
    """

    def __init__(
        self,
        strength: float,
        *,
        exponent: float = 2,
        every: int = 1,
        include: Iterable[ParameterSelector] = (),
        exclude: Iterable[ParameterSelector] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(strength, every=every, include=include, exclude=exclude)
        if not is_number(exponent) or exponent < 1:
            raise ValueError(f"exponent must be a number, at least 1; got {exponent!r}. The paper uses 2.")
        check_seed(seed)
        self.exponent, self.seed = exponent, seed
        self.iterations = 0
        self.pairs: dict[str, SingularPair] = {}  # the vectors u and v of each matrix, by its name
        self._groups: tuple[Any, tuple[Group, ...]] = (None, ())  # of the parameters seen last

    def prepare(self, model: nn.Module) -> None:
        """Raises ValueError for a selection that fits no parameter; warns of parameters that no rule covers."""
        super().prepare(model)
        warn_of_unknown(model, self.parameters(model))

    def penalty(self, model: nn.Module) -> Tensor:
        """R(θ) with its gradient, for loops that add strength · R to their loss.

        It advances the power iteration, except under `torch.no_grad()`, where it looks without leaving a trace.
        """
        total, advances = torch.zeros(()), torch.is_grad_enabled()
        groups = self._grouped(model, self.parameters(model)) if advances else self._looked(model)
        if advances:
            self._advance(groups)
        for group in groups:
            with torch.autocast(group.device.type, enabled=False):
                total = total.to(group.device) + self._penalty(group)
        return total

    def _add(self, parameters: dict[str, nn.Parameter], model: nn.Module, weight: float) -> None:
        k, groups = self.exponent, self._grouped(model, parameters)
        self._advance(groups)
        for group in groups:
            with torch.autocast(group.device.type, enabled=False):
                if group.weights:
                    sigma = iterate(group.matrices(), group.pairs)
                    factors = 2 * k * weight * (sigma**k - 1) * sigma ** (k - 1)
                    scaled = torch._foreach_mul([pair.u for pair in group.pairs], list(factors.unbind()))
                    for part, u, pair in zip(group.weights, scaled, group.pairs):
                        add_outer(part.gradient(), u, pair.v)
                if group.shifts:
                    shifts = [part.value() for part in group.shifts]
                    factors = torch.stack(torch._foreach_norm(shifts)) ** (2 * k - 2)
                    directions = torch._foreach_mul(shifts, list(factors.unbind()))
                    add_to([part.gradient() for part in group.shifts], directions, 2 * k * weight)
                scales = [part.value() - 1 for part in group.scales]
                add_to([part.gradient() for part in group.scales], scales, 2 * weight)

    def spectral_norms(self, model: nn.Module) -> dict[str, float]:
        """The estimate of σ₁ of each weight by name, from 50 power iterations more than training has made, which are
        then forgotten."""
        found: dict[str, float] = {}
        with torch.no_grad():
            for group in (group for group in self._looked(model) if group.weights):
                for _ in range(LOOK):
                    sigmas = iterate(group.matrices(), group.pairs).tolist()
                found |= zip([part.name for part in group.weights], sigmas)
        return found

    def state_dict(self) -> dict[str, Any]:
        vectors = {name: (pair.u.clone(), pair.v.clone()) for name, pair in self.pairs.items()}
        return super().state_dict() | {"vectors": vectors, "iterations": self.iterations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.iterations = state["iterations"]
        self.pairs = {name: SingularPair(u.clone(), v.clone()) for name, (u, v) in state["vectors"].items()}
        self._groups = (None, ())

    def _advance(self, groups: tuple[Group, ...]) -> None:
        """Count one power iteration, and stir the vectors from time to time."""
        self.iterations += 1
        if self.iterations % STIR == 0:
            for group in groups:
                for part, pair in zip(group.weights, group.pairs):
                    stir(pair, part.name, self.seed + self.iterations // STIR)

    def _penalty(self, group: Group) -> Tensor:
        k, total = self.exponent, torch.zeros((), device=group.device)
        if group.weights:
            with torch.no_grad():
                iterate(group.matrices(), group.pairs)
            sigma = torch.stack([p.u @ (matrix @ p.v) for matrix, p in zip(group.matrices(), group.pairs)])
            total = total + (sigma**k - 1).square().sum()
        for part in group.shifts:
            total = total + part.value().square().sum() ** k
        for part in group.scales:
            total = total + (part.value() - 1).square().sum()
        return total

    def _grouped(self, model: nn.Module, parameters: dict[str, nn.Parameter]) -> tuple[Group, ...]:
        """What the parameters are, found again only after they have changed."""
        key = [(name, id(p), p.device, p.dtype, p.shape) for name, p in parameters.items()]
        if self._groups[0] != key:
            self._groups = (key, self._found(model, parameters, self.pairs))
        return self._groups[1]

    def _looked(self, model: nn.Module) -> tuple[Group, ...]:
        """The same for a look that leaves no trace: with vectors of its own."""
        pairs = {name: SingularPair(pair.u, pair.v) for name, pair in self.pairs.items()}
        return self._found(model, self.parameters(model), pairs)

    @torch.no_grad()
    def _found(
        self, model: nn.Module, parameters: dict[str, nn.Parameter], pairs: dict[str, SingularPair]
    ) -> tuple[Group, ...]:
        """Parts by device and precision, and their vectors in `pairs`, begun where they are missing."""
        known = roles(model)
        groups: dict[Any, list[Part]] = {}
        for name, parameter in parameters.items():
            role = known.get(parameter)
            if role is None or parameter.numel() == 0:
                continue
            parts = [Part(label, role, parameter, n) for n, label in enumerate(block_names(name, role))]
            groups.setdefault((parameter.device, parts[0].value().dtype), []).extend(parts)
        for part in (part for parts in groups.values() for part in parts if isinstance(part.role, Multiplies)):
            matrix = part.value().flatten(1)
            pairs[part.name] = fitting(pairs.get(part.name), matrix, part.name, self.seed)
        return tuple(Group(device, parts, pairs) for (device, _), parts in groups.items())

    def __getstate__(self) -> dict[str, Any]:
        """Without what is found again when it is needed."""
        return super().__getstate__() | {"_groups": (None, ())}


@dataclass(frozen=True)
class Part:
    """One block of a parameter."""

    name: str
    role: Role
    parameter: nn.Parameter
    block: int

    def value(self) -> Tensor:
        """The block, in float32 at least."""
        return in_full(self.role.tensors(self.parameter)[self.block])

    def gradient(self) -> Tensor:
        """The block of the parameter's gradient, to be changed in place."""
        return self.role.tensors(gradient_of(self.parameter))[self.block]


class Group:
    """Parts on one device and in one precision, by role."""

    def __init__(self, device: torch.device, parts: Sequence[Part], pairs: dict[str, SingularPair]) -> None:
        self.device = device
        self.weights = [part for part in parts if isinstance(part.role, Multiplies)]
        self.shifts = [part for part in parts if isinstance(part.role, Adds)]
        self.scales = [part for part in parts if isinstance(part.role, Scales)]
        self.pairs = [pairs[part.name] for part in self.weights]

    def matrices(self) -> list[Tensor]:
        """The weights, each of d_out × the rest."""
        return [part.value().flatten(1) for part in self.weights]


def add_outer(tensor: Tensor, u: Tensor, v: Tensor) -> None:
    """tensor += u vᵀ, of whatever layout and precision."""
    flat = tensor.flatten(1)
    if flat.data_ptr() == tensor.data_ptr() and flat.dtype == u.dtype:
        flat.addr_(u, v)
    else:  # `flatten` has made a copy, as of convolutions in channels-last layout
        tensor += torch.outer(u, v).view(tensor.shape).to(tensor.dtype)
