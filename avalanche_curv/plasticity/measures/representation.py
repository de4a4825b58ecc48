"""Hidden activations of any model, their dormant units and ranks, and how much they change."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules import activation
from torch.nn.modules.conv import _ConvNd

from avalanche_curv.core.arguments import takes
from avalanche_curv.core.nested import Nested
from avalanche_curv.core.options import is_number
from avalanche_curv.core.precision import in_own_precision
from avalanche_curv.core.risk.batches import like
from avalanche_curv.core.risk.forward import as_function
from avalanche_curv.core.risk.frozen import frozen_copy
from avalanche_curv.core.risk.parameters import canonical_name
from avalanche_curv.plasticity.measures.singular_values import effective_rank, leading_singular_values, stable_rank

Activations = dict[str, Float[Tensor, "N *positions units"]]

LINEAR_MAPS: tuple[type[nn.Module], ...] = (nn.Linear, _ConvNd)
UNIT_MIXING = {"MultiheadAttention", "Softmax", "Softmax2d", "Softmin", "LogSoftmax"}
NONLINEARITIES: tuple[type[nn.Module], ...] = tuple(
    getattr(activation, name) for name in activation.__all__ if name not in UNIT_MIXING
)


@takes(model=(nn.Module, "the model that is trained"))
@in_own_precision
def hidden_activations(model: nn.Module, inputs: Nested) -> Activations:
    """The activations of each hidden layer by its name, in the order of the forward pass, with the units as last axis.

    They are the outputs of the model's activation modules (nn.ReLU, nn.GELU, nn.Tanh, ...), except one that gives the
    outputs of the model. Where there is none, as with `functional.relu`, they are the inputs of its Linear and
    convolutional layers but the first, which may be pooled or normalised. Beside an activation module, functions are
    not recorded: let all hidden layers of a model use modules, or none.
    A module that is called several times has a number after its name: "relu", "relu[1]" and so on.

    A unit is a feature or a channel, according to whether the last layer before was linear or a convolution; for the
    inputs of a layer, according to that layer. The forward pass is that of a copy in eval mode, without gradients.
    Raises ValueError for a model without a hidden layer.

    >>> model = nn.Sequential(nn.Conv1d(2, 3, 5), nn.ReLU(), nn.Flatten(), nn.Linear(6, 2))
    >>> {name: tuple(h.shape) for name, h in hidden_activations(model, torch.zeros(4, 2, 6)).items()}
    {'1': (4, 2, 3)}
    """
    copied, recorder = frozen_copy(model), _ActivationRecorder()
    for name, module in copied.named_modules():
        if isinstance(module, (LINEAR_MAPS, NONLINEARITIES)):
            recorder.watch(module, canonical_name(f"{name}.x").removesuffix("x").removesuffix("."))
    with torch.no_grad():
        outputs = as_function(copied)(like(inputs, next(copied.parameters())))
    found = recorder.hidden(outputs)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no hidden activations: it calls no activation module before its outputs, and "
            "no second Linear or convolutional layer. Use modules such as nn.ReLU() in its forward, or leave out the "
            "measurement of its representation."
        )
    return found


class _ActivationRecorder:
    """Records the inputs of layers and the outputs of activation modules in one forward pass."""

    def __init__(self) -> None:
        self.after: Activations = {}  # activation modules
        self.before: Activations = {}  # Linear and convolutional layers
        self.sources: dict[str, Tensor] = {}  # alive until the end, so that no other tensor takes their place
        self.last: nn.Module | None = None  # of the layers

    def watch(self, module: nn.Module, name: str) -> None:
        """Records the inputs of a layer, or the outputs of an activation module, under `name`."""

        def entering(layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            self.last = layer
            self.before[_numbered(name, self.before)] = _units_last((*args, *named.values())[0], layer)

        def leaving(_: nn.Module, args: Any, output: Tensor) -> None:
            place = _numbered(name, self.after)
            self.after[place], self.sources[place] = _units_last(output, self.last), output

        if isinstance(module, LINEAR_MAPS):
            module.register_forward_pre_hook(entering, with_kwargs=True)
        else:
            module.register_forward_hook(leaving)

    def hidden(self, outputs: Tensor) -> Activations:
        """The recorded activations, except those that are the outputs of the model, and those without units."""
        end = outputs.untyped_storage().data_ptr()
        kept = {n: h for n, h in self.after.items() if self.sources[n].untyped_storage().data_ptr() != end}
        found = kept or dict([*self.before.items()][1:])
        return {name: activations for name, activations in found.items() if activations.shape[-1]}


def _units_last(tensor: Tensor, layer: nn.Module | None) -> Tensor:
    """A copy, since later modules may work in place, with the axis of the layer's features or channels at the end."""
    copied = tensor.detach().clone()
    if isinstance(layer, _ConvNd) and copied.ndim == layer.weight.ndim:
        return copied.movedim(1, -1)
    return copied if copied.ndim > 1 else copied[:, None]


def _numbered(name: str, taken: Activations) -> str:
    """The name, followed by the number of times that it was taken before, if any."""
    times = sum(other == name or other.startswith(f"{name}[") for other in taken)
    return f"{name}[{times}]" if times else name


@dataclass(frozen=True)
class Representation:
    """Dormant units and ranks of the activations H of one hidden layer, on a batch of N examples:

    - units: their number;
    - dormant: the fraction of units with `dormancy_scores` s_i ≤ τ (Sokar et al. 2023, definition 3.1);
    - zero: the fraction of units that are exactly zero for the whole batch, at all positions;
    - effective_rank and stable_rank of H as the matrix N × (positions · units), not centred: at most N.

    All but `units` are NaN where an activation is not finite.
    """

    units: int
    dormant: float
    zero: float
    effective_rank: float
    stable_rank: float


def representations(activations: Activations, threshold: float = 0.025) -> dict[str, Representation]:
    """The `Representation` of each layer by name, from its activations (see `hidden_activations`).

    `threshold` is τ, the score up to which a unit is dormant. Raises ValueError where it is negative.

    >>> from torch import tensor
    >>> h = tensor([[1.0, 0.0], [0.0, 0.0]])
    >>> representations({"relu": h})["relu"].dormant
    0.5
    """
    if not is_number(threshold) or threshold < 0:
        raise ValueError(f"threshold must be a finite number, at least 0; got {threshold!r}. 0 counts units of zeros.")
    return {name: _of_layer(h, threshold) for name, h in activations.items()}


def dormancy_scores(activations: Float[Tensor, "N *positions units"]) -> Float[Tensor, "units"]:
    """The score s_i = E|h_i| / ((1/H) Σ_k E|h_k|) of each of the H units of a layer, with E the mean over examples and
    positions. The mean of the scores is 1, except in a layer of zeros, where all are 0.

    Source: Sokar et al. 2023, equation 1.

    >>> from torch import tensor
    >>> dormancy_scores(tensor([[3.0, 0.0], [-3.0, 2.0]]))
    tensor([1.5000, 0.5000], dtype=torch.float64)
    """
    means = activations.detach().double().abs().flatten(0, -2).mean(0)
    whole = means.mean()
    return means if float(whole) == 0 else means / whole


def representation_change(before: Activations, now: Activations) -> float:
    """The relative change (1/L) Σ_l ‖H_l − H'_l‖_F / ‖H'_l‖_F of the activations of L layers on the same inputs, from
    `before` (H') to `now` (H).

    The change of a layer of zeros is 0 if it is zero still, otherwise infinite. Layers that only one of the two has, or
    that have grown, do not count; NaN where none is left.

    Lewandowski et al. 2024, section 5.2, measure the distance between hidden activations at the beginning of one task
    and of the next, without a formula; here it is relative to their size, so that layers and networks compare.

    >>> from torch import tensor
    >>> representation_change({"relu": tensor([[3.0, 4.0]])}, {"relu": tensor([[3.0, 2.0]])})
    0.4
    """
    same = [name for name in before if name in now and now[name].shape == before[name].shape]
    changes = [_change(before[name].double(), now[name].double()) for name in same]
    return sum(changes) / len(changes) if changes else math.nan


def _of_layer(activations: Tensor, threshold: float) -> Representation:
    units = activations.shape[-1]
    if not activations.isfinite().all():
        return Representation(units, math.nan, math.nan, math.nan, math.nan)
    values = leading_singular_values(activations.flatten(1))
    return Representation(
        units=units,
        dormant=_fraction(dormancy_scores(activations) <= threshold),
        zero=_fraction((activations == 0).flatten(0, -2).all(0)),
        effective_rank=effective_rank(values),
        stable_rank=stable_rank(values),
    )


def _fraction(which: Tensor) -> float:
    return int(which.sum()) / len(which)


def _change(before: Tensor, now: Tensor) -> float:
    difference, size = float((now - before).norm()), float(before.norm())
    if difference == 0:
        return 0.0
    return difference / size if size > 0 else math.inf
