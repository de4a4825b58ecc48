"""Spectral regularisation, which keeps the largest singular value of every weight near one."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from avalanche_curv.core.options import Fixed, Setting, check_number, check_seed, check_whole
from avalanche_curv.core.precision import in_own_precision, product
from avalanche_curv.core.risk.selection import ParameterSelector
from avalanche_curv.plasticity.mitigators.regularizer import Regularizer, add_scaled, at_least_float32, gradient_of
from avalanche_curv.plasticity.roles import (
    Role,
    ScaleRole,
    ShiftRole,
    WeightRole,
    parameter_roles,
    warn_of_parameters_without_role,
)

NOISE_EVERY = 128  # iterations
NOISE_LENGTH = 1e-3  # against that of the vector
START_ITERATIONS = 15  # for a matrix that is new or has grown
NORM_ITERATIONS = 50  # for `spectral_norms`


class SpectralRegularizer(Regularizer):
    """Adds strength · R(θ), R = Σ_W (σ₁(W)^k − 1)² + Σ_b ‖b‖₂^{2k} + Σ_γ Σ_i (γ_i − 1)², over weights W, additive
    parameters b and scales γ of norm layers.

    Without it spectral norms grow from task to task, the gradients of different examples become alike, and the network
    trains ever worse (Lewandowski et al. 2024, section 4 and appendix A.7, with k = 2). It pulls the spectral norm of
    a weight to 1, an additive parameter to 0, and each entry of a scale to 1. The loss pulls the other way: at strength
    1e-3, σ₁ settles near 3.

    A weight is a matrix of d_out × all its other axes; for a convolution, σ₁ of this matrix is not the operator norm,
    which it bounds up to a factor that the kernel's size gives. Queries, keys and values of nn.MultiheadAttention and
    the gates of recurrent layers are matrices of their own. Class tokens and positional embeddings are additive.
    Token embeddings, slopes of PReLU, single numbers and frozen parameters are left alone, and a tied parameter counts
    once. A weight that is computed from others, as by `weight_norm`, is left alone with a warning.

    σ₁ is estimated by one power iteration a step on vectors u and v, which `state_dict` contains. With them held
    constant a weight's gradient is 2k (σ^k − 1) σ^{k−1} u vᵀ. Half precision is computed in float32, outside of
    autocast. A matrix of zeros keeps its vectors while it is zero; only with exponent 1 does it have a gradient.

    Raises ValueError for an exponent below 1 and an unusable seed; for the other options see `Regularizer`.

    >>> model = nn.Linear(2, 2)
    >>> with torch.no_grad():
    ...     _ = nn.init.eye_(model.weight).mul_(2), model.bias.fill_(1)
    >>> round(SpectralRegularizer(1e-3).penalty(model).item(), 4)  # (2² − 1)² + (√2)⁴
    13.0
    """

    exponent = Setting(partial(check_number, at_least=1, hint="The paper uses 2."))
    seed = Setting(check_seed)
    iterations = Setting(check_whole)
    pairs = Fixed[dict[str, "SingularPair"]]()

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
        self.exponent, self.seed = exponent, seed
        self.iterations = 0
        self.pairs = {}  # the vectors u and v of each matrix, by its name
        self._groups: tuple[Any, tuple[BlocksByRole, ...]] = (None, ())  # of the parameters seen last

    def prepare(self, model: nn.Module) -> None:
        """Raises ValueError for a selection that fits no parameter; warns of parameters that no rule covers."""
        super().prepare(model)
        warn_of_parameters_without_role(self, model, self.parameters(model))

    @in_own_precision
    def penalty(self, model: nn.Module) -> Tensor:
        """R(θ), without strength and in autograd's graph, for loops that add strength · R to their loss.

        It advances the power iteration, except under `torch.no_grad()`, where the mitigator does not change.
        """
        total, advances = torch.zeros(()), torch.is_grad_enabled()
        groups = self._training_groups(model, self.parameters(model)) if advances else self._separate_groups(model)
        if advances:
            self._advance(groups)
        for group in groups:
            total = total.to(group.device) + self._penalty(group)
        return total

    @in_own_precision
    def add_penalty_gradient(self, parameters: dict[str, nn.Parameter], model: nn.Module, weight: float) -> None:
        k, groups = self.exponent, self._training_groups(model, parameters)
        self._advance(groups)
        for group in groups:
            if group.weights:
                sigma = power_iteration(group.matrices(), group.pairs)
                factors = 2 * k * weight * (sigma**k - 1) * sigma ** (k - 1)
                scaled = torch._foreach_mul([pair.u for pair in group.pairs], list(factors.unbind()))
                for block, u, pair in zip(group.weights, scaled, group.pairs):
                    add_outer(block.gradient(), u, pair.v)
            if group.shifts:
                shifts = [block.value() for block in group.shifts]
                factors = torch.stack(torch._foreach_norm(shifts)) ** (2 * k - 2)
                directions = torch._foreach_mul(shifts, list(factors.unbind()))
                add_scaled([block.gradient() for block in group.shifts], directions, 2 * k * weight)
            scales = [block.value() - 1 for block in group.scales]
            add_scaled([block.gradient() for block in group.scales], scales, 2 * weight)

    @in_own_precision
    def spectral_norms(self, model: nn.Module) -> dict[str, float]:
        """Estimates of σ₁ of each weight by name, from 50 more power iterations than training has made. The vectors of
        training do not change."""
        found: dict[str, float] = {}
        with torch.no_grad():
            for group in (group for group in self._separate_groups(model) if group.weights):
                for _ in range(NORM_ITERATIONS):
                    sigmas = power_iteration(group.matrices(), group.pairs).tolist()
                found |= zip([block.name for block in group.weights], sigmas)
        return found

    def state_dict(self) -> dict[str, Any]:
        vectors = {name: (pair.u.clone(), pair.v.clone()) for name, pair in self.pairs.items()}
        return super().state_dict() | {"vectors": vectors, "iterations": self.iterations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.iterations = state["iterations"]
        self.pairs.clear()
        self.pairs.update({name: SingularPair(u.clone(), v.clone()) for name, (u, v) in state["vectors"].items()})
        self._groups = (None, ())

    def _advance(self, groups: tuple[BlocksByRole, ...]) -> None:
        """Counts one power iteration, and after every 128 adds noise to the vectors."""
        self.iterations += 1
        if self.iterations % NOISE_EVERY == 0:
            for group in groups:
                for block, pair in zip(group.weights, group.pairs):
                    add_noise(pair, block.name, self.seed + self.iterations // NOISE_EVERY)

    def _penalty(self, group: BlocksByRole) -> Tensor:
        k, total = self.exponent, torch.zeros((), device=group.device)
        if group.weights:
            with torch.no_grad():
                power_iteration(group.matrices(), group.pairs)
            pairs = zip(group.matrices(), group.pairs)
            sigma = torch.cat([product(p.u[None], product(matrix, p.v[:, None]))[0] for matrix, p in pairs])
            total = total + (sigma**k - 1).square().sum()
        for block in group.shifts:
            total = total + block.value().square().sum() ** k
        for block in group.scales:
            total = total + (block.value() - 1).square().sum()
        return total

    def _training_groups(self, model: nn.Module, parameters: dict[str, nn.Parameter]) -> tuple[BlocksByRole, ...]:
        """The blocks of the parameters, with the vectors of training; renewed only when the parameters have changed."""
        key = [(name, id(p), p.device, p.dtype, p.shape) for name, p in parameters.items()]
        if self._groups[0] != key:
            self._groups = (key, self._make_groups(model, parameters, self.pairs))
        return self._groups[1]

    def _separate_groups(self, model: nn.Module) -> tuple[BlocksByRole, ...]:
        """The blocks of the parameters, with vectors that may change without those of training."""
        pairs = {name: SingularPair(pair.u, pair.v) for name, pair in self.pairs.items()}
        return self._make_groups(model, self.parameters(model), pairs)

    @torch.no_grad()
    def _make_groups(
        self, model: nn.Module, parameters: dict[str, nn.Parameter], pairs: dict[str, SingularPair]
    ) -> tuple[BlocksByRole, ...]:
        """The blocks of the parameters by device and precision; vectors that `pairs` lacks are added to it."""
        known = parameter_roles(model)
        groups: dict[Any, list[ParameterBlock]] = {}
        for name, parameter in parameters.items():
            role = known.get(parameter)
            if role is None or parameter.numel() == 0:
                continue
            blocks = [ParameterBlock(label, role, parameter, n) for n, label in enumerate(role.names(name))]
            groups.setdefault((parameter.device, blocks[0].value().dtype), []).extend(blocks)
        for block in (block for blocks in groups.values() for block in blocks if isinstance(block.role, WeightRole)):
            matrix = block.value().flatten(1)
            pairs[block.name] = singular_pair_for(pairs.get(block.name), matrix, block.name, self.seed)
        return tuple(BlocksByRole(device, blocks, pairs) for (device, _), blocks in groups.items())

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles make the groups of parameters again."""
        return super().__getstate__() | {"_groups": (None, ())}


@dataclass(frozen=True)
class ParameterBlock:
    """One block of a parameter, such as the queries of an attention."""

    name: str
    role: Role
    parameter: nn.Parameter
    block: int

    def value(self) -> Tensor:
        """The block as a view; a copy in float32 if it is in half precision."""
        return at_least_float32(self.role.tensors(self.parameter)[self.block])

    def gradient(self) -> Tensor:
        """The block of the parameter's gradient, to be changed in place."""
        return self.role.tensors(gradient_of(self.parameter))[self.block]


class BlocksByRole:
    """Blocks on one device and in one precision, by role; `pairs` are the singular vectors of the weights."""

    def __init__(self, device: torch.device, blocks: Sequence[ParameterBlock], pairs: dict[str, SingularPair]) -> None:
        self.device = device
        self.weights = [block for block in blocks if isinstance(block.role, WeightRole)]
        self.shifts = [block for block in blocks if isinstance(block.role, ShiftRole)]
        self.scales = [block for block in blocks if isinstance(block.role, ScaleRole)]
        self.pairs = [pairs[block.name] for block in self.weights]

    def matrices(self) -> list[Tensor]:
        """The weights as matrices of d_out × the product of their other axes."""
        return [block.value().flatten(1) for block in self.weights]


def add_outer(tensor: Tensor, u: Tensor, v: Tensor) -> None:
    """tensor += u vᵀ, for any memory layout and precision of a tensor whose first axis is that of u."""
    flat = tensor.flatten(1)
    if flat.data_ptr() == tensor.data_ptr() and flat.dtype == u.dtype:
        flat.addr_(u, v)
    else:  # `flatten` has made a copy, as of convolutions in channels-last layout
        tensor += torch.outer(u, v).view(tensor.shape).to(tensor.dtype)


@dataclass(eq=False)
class SingularPair:
    """Approximate leading singular vectors u and v of a matrix, of length 1."""

    u: Float[Tensor, "out"]
    v: Float[Tensor, "in"]


def singular_pair_for(pair: SingularPair | None, matrix: Float[Tensor, "out in"], name: str, seed: int) -> SingularPair:
    """`pair` if it has the shape of `matrix`, otherwise a new pair after 15 power iterations.

    These start from random vectors that depend on `seed` and the matrix's `name` alone, or, for a matrix that has grown
    by rows, from the vector u of `pair`, continued by random entries.
    """
    if pair is not None and (len(pair.u), len(pair.v)) == tuple(matrix.shape):
        return SingularPair(pair.u.to(matrix), pair.v.to(matrix))
    generator = _generator(seed, name)
    u, v = (torch.randn(n, generator=generator).to(matrix) for n in matrix.shape)
    u /= u.norm()
    if pair is not None and len(pair.u) < len(u):
        u[: len(pair.u)] = pair.u.to(u)
    new = SingularPair(u / u.norm(), v / v.norm())
    for _ in range(START_ITERATIONS):
        power_iteration([matrix], [new])
    return new


def add_noise(pair: SingularPair, name: str, seed: int) -> None:
    """Adds a little noise to u, drawn from `seed` and the matrix's `name`, which gives it components in all directions.

    Without it the iteration could never reach a direction in which u and v have no component, such as that of a block
    of the matrix that was zero before. The relative change of σ is about 1e-6.
    """
    noise = torch.randn(len(pair.u), generator=_generator(seed, name)).to(pair.u)
    noisy = pair.u + NOISE_LENGTH * noise / noise.norm()
    pair.u = noisy / noisy.norm()


def power_iteration(matrices: Sequence[Float[Tensor, "out in"]], pairs: Sequence[SingularPair]) -> Float[Tensor, "n"]:
    """One power iteration for each matrix W: v ← Wᵀu / ‖Wᵀu‖, u ← Wv / ‖Wv‖.

    Changes the pairs and returns the estimates σ₁ ≈ uᵀWv = ‖Wv‖. Where Wᵀu or Wv is zero or not finite, the old vector
    stays. All matrices share one device and dtype.

    >>> pair = SingularPair(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    >>> power_iteration([torch.diag(torch.tensor([3.0, 1.0]))], [pair]), pair.v
    (tensor([3.]), tensor([1., 0.]))
    """
    backward, _ = _directions([torch.mv(W.mT, pair.u) for W, pair in zip(matrices, pairs)], [p.v for p in pairs])
    forward, lengths = _directions([torch.mv(W, v) for W, v in zip(matrices, backward)], [p.u for p in pairs])
    for pair, u, v in zip(pairs, forward, backward):
        pair.u, pair.v = u, v
    return lengths


def _directions(vectors: list[Tensor], old: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Each vector divided by its length, or the old direction where that is undefined, and the lengths."""
    norms = torch._foreach_norm(vectors)
    found, lengths = list(torch._foreach_div(vectors, norms)), torch.stack(norms)
    if lengths.is_cpu and all(0 < length < math.inf for length in lengths.tolist()):
        return found, lengths  # on other devices this look would wait for them
    usable = (lengths > 0) & lengths.isfinite()
    return [torch.where(ok, new, kept) for ok, new, kept in zip(usable, found, old)], lengths


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))
