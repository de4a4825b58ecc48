"""FIRE, which replaces weight matrices by the nearest isometries between tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from avalanche_curv.core.options import Setting, check_count, check_number
from avalanche_curv.core.precision import in_own_precision
from avalanche_curv.core.risk.selection import ParameterSelector
from avalanche_curv.plasticity.mitigators.optimized_entries import OptimizedEntries
from avalanche_curv.plasticity.mitigators.regularizer import at_least_float32
from avalanche_curv.plasticity.mitigators.schedule import AfterTask, Schedule, ScheduledMitigator
from avalanche_curv.plasticity.roles import check_weights, weights_among


class FIRE(ScheduledMitigator):
    """W ← (1 − part) W + part · c · polar(W) at the end of each task: Frobenius-isometry reinitialisation (Han et al.
    2026, arXiv 2602.08040).

    polar(W) = U Vᵀ of the singular value decomposition W = U S Vᵀ is, among the matrices whose rows or columns, those
    that are fewer, are orthonormal, the one nearest to W in squared Frobenius error: the least is forgotten for a
    network whose weights are isometries again, as they train best. c = √(rows / columns), which keeps the size of
    activations from layer to layer. Of a convolution the matrix [out, in] at each of the k places of its kernel is
    replaced, with c = √(out / in) / k: so its output is at most √(out / in) times as large as its input. Queries, keys
    and values of attention and the gates of recurrent layers are matrices of their own; a grouped convolution counts as
    its weight stands. Biases and norm layers do not change, nor do weights that are computed from others, as
    by `weight_norm`, of which `prepare` warns.

    The optimiser's state of the weights that are replaced is that of its start: moments and their counts of steps 0.
    The source begins each task with a new optimiser, which comes to this and new moments of all else. Moments that are
    kept would be those of larger gradients, up to twenty times those that follow in the `plasticity` experiment, and
    Adam's steps as much too small for long.

    The polar factor is that of so many `iterations` of Newton and Schulz (`newton_schulz`), 10 as in the source: a
    singular value that is less than a 50th of ‖W‖_F has then not come to 1 yet, and one of 0 stays. 20 are closer.
    `part` below 1 goes a part of the way, as an option of the source's code does. `when` is `AfterTask()` by default;
    `EverySteps(n)` is for streams that hide where tasks end. The source replaces the weights of all layers of
    perceptrons and convolutional networks, the output layer included, but of transformers those of queries and keys
    alone: `include` and `exclude` choose.

    Raises ValueError for a part outside (0, 1], for fewer than one iteration, and in `prepare` for a model without a
    trainable weight matrix; TypeError for another schedule.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> with torch.no_grad():
    ...     _ = model.weight.copy_(torch.tensor([[0.0, 3.0], [-2.0, 0.0]]))
    >>> FIRE().apply(model)
    >>> model.weight.detach().round(decimals=3)
    tensor([[ 0.,  1.],
            [-1.,  0.]])
    """

    part = Setting(partial(check_number, above=0, at_most=1, hint="1 replaces weights as a whole."))
    iterations = Setting(partial(check_count, hint="The source takes 10."))

    def __init__(
        self,
        part: float = 1.0,
        *,
        iterations: int = 10,
        when: Schedule = AfterTask(),  # noqa: B008  a frozen value
        include: Iterable[ParameterSelector] = (),
        exclude: Iterable[ParameterSelector] = (),
    ) -> None:
        super().__init__(when, include=include, exclude=exclude)
        self.part, self.iterations = part, iterations

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        check_weights(self, self.parameters(model), model)

    @torch.no_grad()
    @in_own_precision
    def apply(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Replaces the selected weights once, now; given `optimizer`, only those that it steps, with their state."""
        kernels = {id(module.weight) for module in model.modules() if isinstance(module, _ConvNd)}
        for parameter, role in weights_among(self.parameters(model, optimizer), model):
            if optimizer is not None:
                OptimizedEntries({id(parameter)}, optimizer).restart(parameter)
            for block in role.tensors(parameter):
                matrices = block.movedim((0, 1), (-2, -1)) if id(parameter) in kernels else block.flatten(1)
                places = math.prod(matrices.shape[:-2])
                values = at_least_float32(matrices)
                isometry = newton_schulz(values, self.iterations) * (
                    math.sqrt(values.shape[-2] / values.shape[-1]) / places
                )
                mixed = torch.lerp(values, isometry, self.part)
                block.copy_(mixed.movedim((-2, -1), (0, 1)) if id(parameter) in kernels else mixed.view(block.shape))


def newton_schulz(matrices: Float[Tensor, "*batch m n"], iterations: int) -> Float[Tensor, "*batch m n"]:
    """The polar factor U Vᵀ of each matrix W = U S Vᵀ, approximately: X ← ³⁄₂ X − ½ X XᵀX, from X = W / ‖W‖_F.

    U and V stay, and singular values follow σ ← ³⁄₂ σ − ½ σ³: small ones grow by half each time, and near 1 the
    distance from it is squared. A matrix of zeros stays.

    >>> newton_schulz(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), 1)  # ³⁄₂ 0.6 − ½ 0.6³ and ³⁄₂ 0.8 − ½ 0.8³
    tensor([[0.7920, 0.0000],
            [0.0000, 0.9440]])
    """
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    size = torch.linalg.matrix_norm(wide, keepdim=True)
    x = wide / torch.where(size > 0, size, 1)
    for _ in range(iterations):
        x = 1.5 * x - 0.5 * (x @ x.mT) @ x
    return x if wide is matrices else x.mT
