"""Shrink and perturb, which draws parameters towards zero and adds noise, at the times of a schedule."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.optim import Optimizer

from avalanche_curv.core.options import Setting, check_number, check_seed, check_whole
from avalanche_curv.core.risk.selection import ParameterSelector
from avalanche_curv.plasticity.mitigators.schedule import EveryStep, Schedule, ScheduledMitigator
from avalanche_curv.plasticity.roles import NORMS, RECURRENT, ShiftRole, WeightRole, role_of

POOL_STARTS = 2**16  # at least as many places in a pool where the noise of a step may begin


class ShrinkAndPerturb(ScheduledMitigator):
    """θ ← c + (1 − shrink) (θ − c) + noise · ε, with ε fresh from N(0, std²) (Ash & Adams 2020, there with c = 0).

    std is that of torch's initial values for the layer (`initial_moments`), such as 1 / √(3 fan_in) for the weights and
    biases of linear layers and convolutions, so that `noise` is relative to the initial scale; an
    initialisation of the model's own is not considered. Parameters that torch initialises with a constant get no noise:
    those of norm layers, the biases of attention. A norm layer's scale shrinks to c = 1, its initial value, all else to
    c = 0. Class tokens, positional and token embeddings shrink only. Parameters without a role do not change: slopes of
    PReLU, single numbers, vectors of other modules but their biases, and those from which a weight is computed
    (`weight_norm`).

    `when` is `EveryStep()` by default, `EverySteps(n)` or `AfterTask()`. With shrink 1 and noise 1 the network starts
    anew. Without a loss, entries approach a standard deviation of noise · std / √(2 shrink) for small shrink, which is
    the initial one for noise = √(2 shrink). Ash & Adams take shrink = 0.4 or so at each task; 1e-6 to 1e-4 is
    usual at each step. The optimiser's state does not change. Noise depends on `seed` and the number of times alone.

    Raises ValueError for shrink outside [0, 1], a negative noise and an unusable seed, TypeError for another schedule.

    Parameters in half precision round: shrinking by less than about 2e-3 (bfloat16) or 2e-4 (float16) at a time
    changes nothing. Keep them in float32, as `torch.autocast` does, or shrink more, fewer times.
    """

    shrink = Setting(partial(check_number, at_least=0, at_most=1, hint="It is the part that is taken away."))
    noise = Setting(partial(check_number, at_least=0, hint="1 is the initial scale."))
    seed = Setting(check_seed)
    times = Setting(check_whole)

    def __init__(
        self,
        shrink: float,
        noise: float,
        *,
        when: Schedule = EveryStep(),  # noqa: B008  a frozen value
        include: Iterable[ParameterSelector] = (),
        exclude: Iterable[ParameterSelector] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(when, include=include, exclude=exclude)
        self.shrink, self.noise, self.seed = shrink, noise, seed
        self.times = 0
        self._chosen: list[Tensor] = []  # the last parameters
        self._moments: dict[Tensor, tuple[float, float]] = {}  # of those that have one
        self._pool: tuple[tuple[int, ...], Tensor] | None = None  # made from the seed when it is needed

    @torch.no_grad()
    def apply(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Shrinks and perturbs the selected parameters once, now; given `optimizer`, only those that it steps."""
        chosen: list[Tensor] = [*self.parameters(model, optimizer).values()]
        if len(self._chosen) != len(chosen) or any(p is not known for p, known in zip(chosen, self._chosen)):
            moments = initial_moments(model)
            self._chosen, self._moments = chosen, {p: moments[p] for p in chosen if p in moments}
        if self.shrink and self._moments:
            torch._foreach_mul_([*self._moments], 1 - self.shrink)
            for scale in (p for p, (centre, _) in self._moments.items() if centre):
                scale.add_(self.shrink)
        noisy = [(p, spread) for p, (_, spread) in self._moments.items() if spread]
        if self.noise and noisy:
            self._perturb(noisy)
        self.times += 1

    def _perturb(self, noisy: list[tuple[Tensor, float]]) -> None:
        size = sum(p.numel() for p, _ in noisy)
        begin, sign = self._window(size)
        pool = self._noise_pool(size, noisy[0][0].device)[begin : begin + size]
        for (parameter, spread), part in zip(noisy, pool.split([p.numel() for p, _ in noisy])):
            parameter.add_(part.view(parameter.shape).to(parameter.device), alpha=sign * self.noise * spread)

    def _window(self, size: int) -> tuple[int, int]:
        """The start of this time's noise in the pool, and its sign."""
        if self.when.reuse == 1:
            return 0, 1
        draw = random.Random(f"{self.seed} {self.times}")
        return draw.randrange(max(size, POOL_STARTS)), draw.choice((-1, 1))

    def _noise_pool(self, size: int, device: torch.device) -> Tensor:
        """The pool of standard normal numbers of this time, drawn when it is first needed."""
        key = (self.times // self.when.reuse, size, self.when.reuse, self.seed)
        if self._pool is None or self._pool[0] != key or self._pool[1].device != device:
            generator = torch.Generator(device).manual_seed(random.Random(f"{self.seed} {key[0]}").getrandbits(32))
            whole = size if self.when.reuse == 1 else size + max(size, POOL_STARTS)
            pool = torch.randn(whole, generator=generator, device=device, dtype=torch.float32)
            self._pool = key, pool
        return self._pool[1]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "times": self.times}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.times, self._pool = state["times"], None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pool": None, "_chosen": [], "_moments": {}}


def initial_moments(model: nn.Module) -> dict[Tensor, tuple[float, float]]:
    """The mean and the standard deviation of the values with which torch initialises each parameter of `model`.

    Weights and biases of linear and bilinear layers and convolutions come from U(−b, b) with b = 1/√fan_in, those of
    recurrent layers with b = 1/√hidden; the standard deviation is b/√3. fan_in is that of torch, also for transposed
    convolutions. `MultiheadAttention` draws the weights that enter it from Xavier's distribution, with
    √(2 / (fan_in + fan_out)), the one that leaves it as a linear layer's, and has biases of 0, but for the key and the
    value that it appends (`bias_k`, `bias_v`), which have 1/√fan_in. Matrices in other modules, and the biases beside
    them, are taken as those of a linear layer. Norm scales are 1 and shifts 0 without spread; so is, here, what
    multiplies nothing (class tokens, embeddings).

    Left out are other parameters without a role: slopes of PReLU, single numbers, other vectors, and the parameters
    from which a weight is computed.

    >>> model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    >>> [(mean, round(std, 3)) for mean, std in initial_moments(model).values()]
    [(0.0, 0.333), (0.0, 0.333), (1.0, 0.0), (0.0, 0.0)]
    """
    moments: dict[Tensor, tuple[float, float]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            role = role_of(module, name, parameter)
            if role is not None:
                moments.setdefault(parameter, (role.initial, _spread(module, name, parameter)))
            elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                moments.setdefault(parameter, (0.0, 0.0))
    return moments


def _spread(module: nn.Module, name: str, parameter: nn.Parameter) -> float:
    """The initial standard deviation of a parameter that has a role."""
    if isinstance(module, nn.MultiheadAttention):
        if name == "in_proj_bias":
            return 0.0
        ends = (parameter.shape[-1],) * 2 if name.startswith("bias") else parameter.shape
        return math.sqrt(2 / sum(ends)) if sum(ends) else 0.0
    if isinstance(module, NORMS) or (isinstance(module, NonDynamicallyQuantizableLinear) and name == "bias"):
        return 0.0  # that linear layer is the one by which attention leaves
    if isinstance(module, RECURRENT):
        fan_in = module.hidden_size
    elif isinstance(module, nn.Bilinear):
        fan_in = module.in1_features
    else:
        fan_in = _fan_in(module, parameter)
    return 1 / math.sqrt(3 * fan_in) if fan_in else 0.0


def _fan_in(module: nn.Module, parameter: nn.Parameter) -> int:
    """The number of inputs of each output, of the parameter or, for an additive vector, of the matrix beside it."""
    own = {p: role_of(module, n, p) for n, p in module.named_parameters(recurse=False)}
    if isinstance(own[parameter], ShiftRole):
        matrices = [p for p, role in own.items() if isinstance(role, WeightRole)]
        return math.prod(matrices[0].shape[1:]) if matrices and parameter.ndim == 1 else 0
    return math.prod(parameter.shape[1:])
