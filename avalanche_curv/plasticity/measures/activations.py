"""Hidden activations of any model: what its nonlinearities give to the layers after them."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules import activation
from torch.nn.modules.conv import _ConvNd

from avalanche_curv.core.risk.batches import like
from avalanche_curv.core.risk.frozen import frozen_copy
from avalanche_curv.core.risk.parameters import canonical_name

Activations = dict[str, Float[Tensor, "N *positions units"]]

MAPS: tuple[type[nn.Module], ...] = (nn.Linear, _ConvNd)
SHARES = {"MultiheadAttention", "Softmax", "Softmax2d", "Softmin", "LogSoftmax"}  # they mix units
NONLINEARITIES: tuple[type[nn.Module], ...] = tuple(
    getattr(activation, name) for name in activation.__all__ if name not in SHARES
)


def hidden_activations(model: nn.Module, inputs: Tensor) -> Activations:
    """The activations of each hidden layer by its name, in the order of the forward pass, with the units as last axis.

    They are the outputs of the model's activation modules (nn.ReLU, nn.GELU, nn.Tanh, ...), except one that gives the
    outputs of the model. Where there is none, as with `functional.relu`, they are the inputs of its Linear and
    convolutional layers but the first: the same, up to what pools or normalises in between. One activation module is
    enough for the former: functions are not seen beside it, so let all hidden layers of a model use modules, or none.
    A module that is called several times has a number after its name: "relu", "relu[1]" and so on.

    A unit is a feature of a linear layer or a channel of a convolution, whichever of the two came last; for the inputs
    of a layer, whichever that layer is. The forward pass is that of a copy in eval mode, without gradients. Raises
    ValueError for a model without a hidden layer.

    >>> model = nn.Sequential(nn.Conv1d(2, 3, 5), nn.ReLU(), nn.Flatten(), nn.Linear(6, 2))
    >>> {name: tuple(h.shape) for name, h in hidden_activations(model, torch.zeros(4, 2, 6)).items()}
    {'1': (4, 2, 3)}
    """
    copied, seen = frozen_copy(model), _Seen()
    for name, module in copied.named_modules():
        if isinstance(module, (MAPS, NONLINEARITIES)):
            seen.watch(module, canonical_name(f"{name}.x").removesuffix("x").removesuffix("."))
    with torch.no_grad():
        outputs = copied(like(inputs, next(copied.parameters())))
    found = seen.hidden(outputs)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no hidden activations: it calls no activation module before its outputs, and "
            "no second Linear or convolutional layer. Use modules such as nn.ReLU() in its forward, or leave out the "
            "measurement of its representation."
        )
    return found


class _Seen:
    """What went through the watched modules in one forward pass."""

    def __init__(self) -> None:
        self.after: Activations = {}  # activation modules
        self.before: Activations = {}  # Linear and convolutional layers
        self.sources: dict[str, Tensor] = {}  # alive until the end, so that no other tensor takes their place
        self.last: nn.Module | None = None  # of the layers

    def watch(self, module: nn.Module, name: str) -> None:
        """Collect what enters a layer, or leaves an activation module, under its name."""

        def entering(layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            self.last = layer
            self.before[_numbered(name, self.before)] = _units_last((*args, *named.values())[0], layer)

        def leaving(_: nn.Module, args: Any, output: Tensor) -> None:
            place = _numbered(name, self.after)
            self.after[place], self.sources[place] = _units_last(output, self.last), output

        if isinstance(module, MAPS):
            module.register_forward_pre_hook(entering, with_kwargs=True)
        else:
            module.register_forward_hook(leaving)

    def hidden(self, outputs: Tensor) -> Activations:
        """The activations, without those that are the outputs themselves."""
        end = outputs.untyped_storage().data_ptr()
        kept = {n: h for n, h in self.after.items() if self.sources[n].untyped_storage().data_ptr() != end}
        return kept or dict([*self.before.items()][1:])


def _units_last(tensor: Tensor, layer: nn.Module | None) -> Tensor:
    """A copy, for what follows may write in place, with the axis of the layer's features or channels at the end."""
    copied = tensor.detach().clone()
    if isinstance(layer, _ConvNd) and copied.ndim == layer.weight.ndim:
        return copied.movedim(1, -1)
    return copied if copied.ndim > 1 else copied[:, None]


def _numbered(name: str, taken: Activations) -> str:
    """The name, with how often it was met before where it was."""
    times = sum(other == name or other.startswith(f"{name}[") for other in taken)
    return f"{name}[{times}]" if times else name
