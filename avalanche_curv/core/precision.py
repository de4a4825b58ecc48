"""Computing in the numbers' own type and with derivatives, whatever context the caller has opened.

Inside `torch.autocast` products of matrices are rounded to half precision, and what is made in `torch.inference_mode`
cannot be differentiated, then or later. What this package computes is the same inside of both as outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

A = ParamSpec("A")
R = TypeVar("R")

AUTOCAST = ("cpu", "cuda", "mps", "xpu")  # the types of device for which torch keeps its state apart


def in_own_precision(function: Callable[A, R]) -> Callable[A, R]:
    """The function, computed without the autocast and the inference mode that its caller may have opened.

    It is for functions that return their result, not for generators, which would close the contexts of their caller.
    """

    @wraps(function)
    def computed(*args: A.args, **kwargs: A.kwargs) -> R:
        if not torch.is_inference_mode_enabled() and not _casting():
            return function(*args, **kwargs)
        with own_precision():
            return function(*args, **kwargs)

    return computed


@contextmanager
def own_precision() -> Iterator[None]:
    """Leaves autocast, for every type of device, and inference mode, where no gradients are taken unless
    `torch.enable_grad` asks for them.

    >>> x = torch.ones(2, 2)
    >>> with torch.autocast("cpu", torch.bfloat16), own_precision():
    ...     print((x @ x).dtype)
    torch.float32
    """
    with ExitStack() as contexts:
        for device in _casting():
            contexts.enter_context(torch.autocast(device, enabled=False))
        if torch.is_inference_mode_enabled():
            contexts.enter_context(torch.inference_mode(False))
            contexts.enter_context(torch.no_grad())
        yield


class _Product(torch.autograd.Function):
    @staticmethod
    @in_own_precision
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return left @ right

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        return product(grad_outputs[0], right.mT), product(left.mT, grad_outputs[0])


def product(left: Float[Tensor, "n m"], right: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
    """The product of two matrices of one type in that type, with all of its derivatives, wherever the backward pass is
    called: inside `torch.autocast` that of `left @ right` is rounded to half precision.

    >>> w = torch.tensor([[1 + 2**-10]], requires_grad=True)
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     product(w, w).sum().backward()
    >>> w.grad == 2 * w
    tensor([[True]])
    """
    return _Product.apply(left, right)


def differentiable(module: nn.Module) -> dict[int, Tensor]:
    """Copies of the parameters and buffers of `module` that were made in inference mode, by the `id` of each, as
    `copy.deepcopy(module, memo)` takes them: it would make tensors of inference mode of them again."""
    parameters = [p for p in module.parameters() if p.is_inference()]
    buffers = {id(buffer): buffer.clone() for buffer in module.buffers() if buffer.is_inference()}
    return buffers | {id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for p in parameters}


def _casting() -> list[str]:
    """The types of device under autocast."""
    return [device for device in AUTOCAST if torch.is_autocast_enabled(device)]
