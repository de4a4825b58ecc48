"""The decoupled isometry step of AdamO, which draws weight matrices towards an isometry outside of the optimiser."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer

from avalanche_curv.core.attachment import skips_step
from avalanche_curv.core.options import Setting, check_number, optional
from avalanche_curv.core.precision import in_own_precision
from avalanche_curv.core.risk.selection import ParameterSelector
from avalanche_curv.plasticity.mitigators.base import Mitigator
from avalanche_curv.plasticity.mitigators.parseval import isometry_gradient
from avalanche_curv.plasticity.roles import check_weights, weights_among


class DecoupledIsometry(Mitigator):
    """W ← W − rate · strength · ∇R(W) at each step, R(W) = ‖WᵀW − I‖_F², or ‖W Wᵀ − I‖_F² for more columns than rows:
    with Adam the optimiser AdamO (Rosseau, Müller & Nowé 2026, arXiv 2606.09762, eq. 16, 19 and 20).

    ∇R = 4 (W Wᵀ − I) W is that of `Parseval(scale=1)` on the same matrices: linear layers, convolutions as [out, in ·
    kernel], and the query, key and value of attention one by one. `Parseval` adds it to the gradient, where an adaptive
    optimiser divides it, entry by entry, by the size of past gradients, and its moments mix it with those of the loss.
    Here the optimiser and its moments see the loss alone, as in AdamW, which decouples weight decay likewise.

    `rate` is the learning rate of each parameter's group where it is None, as in the source, and follows its schedule.
    The source takes a strength of 1e-3 at rate 1e-4. A singular value follows σ ← σ − 4 rate · strength · σ (σ² − 1):
    near 1 it gets closer by the part 8 rate · strength at each step, and above (2 rate · strength)^−½ the step
    overshoots, ever further. The step is taken just before that of the optimiser, as torch's AdamW takes that of its
    weight decay, and at the same parameters. Weights without a gradient are left alone, such as those of a head that is
    not in use, and with a warning those that are computed from others, as by `weight_norm`. In half precision a step of
    less than about 2e-3 (bfloat16) or 2e-4 (float16) of an entry changes nothing.

    Raises ValueError for a negative strength, for a rate that is not positive, in `prepare` for a model without a
    trainable weight matrix, and in a step for an optimiser whose groups have no `lr` where `rate` is None.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> with torch.no_grad():
    ...     _ = model.weight.copy_(torch.tensor([[2.0, 0.0]]))
    >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    >>> model.weight.grad = torch.zeros(1, 2)  # Adam does not move
    >>> with DecoupledIsometry(0.5).attach(optimizer, model):
    ...     optimizer.step()
    >>> model.weight.detach()  # 2 − 4 · 0.01 · 0.5 · (2² − 1) · 2
    tensor([[1.8800, 0.0000]])
    """

    strength = Setting(partial(check_number, at_least=0))
    rate = Setting(optional(partial(check_number, above=0, hint="None is the optimiser's learning rate.")))

    def __init__(
        self,
        strength: float = 1e-3,
        *,
        rate: float | None = None,
        include: Iterable[ParameterSelector] = (),
        exclude: Iterable[ParameterSelector] = (),
    ) -> None:
        super().__init__(include=include, exclude=exclude)
        self.strength, self.rate = strength, rate

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        check_weights(self, self.parameters(model), model)

    @torch.no_grad()
    @in_own_precision
    def before_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        if self.strength == 0 or skips_step(optimizer):
            return
        stepped = {name: p for name, p in self.parameters(model, optimizer).items() if p.grad is not None}
        rates = {id(p): self._rate(group) for group in optimizer.param_groups for p in group["params"]}
        for parameter, role in weights_among(stepped, model):
            for block in role.tensors(parameter):
                block -= isometry_gradient(block, 1.0, rates[id(parameter)] * self.strength).to(block.dtype)

    def _rate(self, group: dict[str, object]) -> float:
        """The step size of a group of the optimiser's parameters."""
        rate = group.get("lr") if self.rate is None else self.rate
        if rate is None:
            raise ValueError(
                "DecoupledIsometry steps by the learning rate of each parameter's group, and this optimiser's groups "
                "have no 'lr'. Give one, as by DecoupledIsometry(rate=1e-3)."
            )
        return float(rate)  # type: ignore[arg-type]
