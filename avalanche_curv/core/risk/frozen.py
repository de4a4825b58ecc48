"""A frozen copy of a model, and the test that it is a function of single examples."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from avalanche_curv.core.precision import differentiable, in_own_precision

HALF = {torch.float16, torch.bfloat16}
ONE_BY_ONE = "past loss is a mean over single examples. Use normalisation with running statistics."


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `DataParallel`, `DistributedDataParallel` and `torch.compile`, which `torch.func` refuses."""
    while True:
        if isinstance(model, (nn.DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


@in_own_precision
def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode, without gradients; half precision becomes float32."""
    own = unwrapped(model)
    copied = copy.deepcopy(own, differentiable(own)).eval()
    copied.zero_grad(set_to_none=True)
    return copied.float() if any(p.dtype in HALF for p in copied.parameters()) else copied


class _HalfPrecision(TorchDispatchMode):
    """Notes the half precision types that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        parts = found if isinstance(found, (tuple, list)) else (found,)
        self.types |= {part.dtype for part in parts if isinstance(part, Tensor)} & HALF
        return found


def check_precision(model: nn.Module, inputs: Tensor) -> None:
    """Raises ValueError unless the frozen `model` takes inputs of its type and computes in no half precision: what is
    rounded to three digits has no derivatives to be relied on."""
    name = type(model).__name__
    remedy = (
        "Cast to the type of the weights in forward, as by x.to(self.layer.weight.dtype), and open torch.autocast "
        "around the model or in training alone, by enabled=self.training. Half precision is float32 in the frozen copy."
    )
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _HalfPrecision() as noted:
        try:
            model(inputs)
        except RuntimeError as error:
            if "dtype" not in str(error) and "scalar type" not in str(error):
                raise
            raise ValueError(f"{name} does not take {inputs.dtype} when frozen: {error}. {remedy}") from error
    if noted.types:
        raise ValueError(f"{name} computes in {', '.join(map(str, noted.types))} when frozen. {remedy}")


def check_function(model: nn.Module, inputs: Tensor) -> None:
    """Raises ValueError unless `model` maps each of a few examples to outputs of its own, the same every time."""
    name, version = type(model).__name__, inputs._version
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        first, again = model(inputs), model(inputs)
        try:
            alone = model(inputs[:1])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{name} cannot be evaluated on one example ({error}); {ONE_BY_ONE}") from error
    if inputs._version != version:
        raise ValueError(f"{name} writes into its inputs, which would change stored examples. Clone them in forward.")
    if len(first) != len(inputs):
        raise ValueError(f"{name} gives {len(first)} outputs for {len(inputs)} examples. Put the batch axis first.")
    if not _close(first, again):
        raise ValueError(f"{name} draws at random in eval mode: its loss is no function. Give dropout self.training.")
    if not _close(first[:1], alone):
        raise ValueError(f"The outputs of {name} for one example depend on the others in the batch; {ONE_BY_ONE}")


def _close(a: Tensor, b: Tensor) -> bool:
    size = float(a.abs().nan_to_num(0, 0, 0).max())
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3 * size, equal_nan=True)
