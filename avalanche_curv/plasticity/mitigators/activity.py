"""How strongly the units that layers read are active, listened to for a few training passes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_forward_hook


class Activity:
    """Σ |h| over examples and positions of each input unit of some linear layers and convolutions.

    It listens from `start` to `stop`, to passes that autograd records. The hook is torch's for all modules and tells
    these by identity: copies and pickles of the model made meanwhile carry nothing.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._sums: weakref.WeakKeyDictionary[nn.Module, Tensor | None] = weakref.WeakKeyDictionary()
        self._axes: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()
        for layer in layers:
            self._sums[layer], self._axes[layer] = None, set()
        self._release: Callable[[], object] | None = None

    def start(self) -> None:
        """Listen from now on, and forget what was heard before."""
        self.stop()
        for layer in [*self._sums]:
            self._sums[layer], self._axes[layer] = None, set()
        listening = weakref.WeakMethod(self._hear)

        def hook(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
            hear = listening()
            mapped = any(is_functorch_wrapped_tensor(x) for x in (*args, *options.values()) if isinstance(x, Tensor))
            if hear is not None and torch.is_grad_enabled() and not mapped:
                hear(module, *args[:1], **options)

        handle = register_module_forward_hook(hook, with_kwargs=True)
        self._release = weakref.finalize(self, handle.remove)

    def stop(self) -> None:
        """Listen no more; what was heard stays."""
        if self._release is not None:
            self._release()
            self._release = None

    def of(self, layer: nn.Module) -> Float[Tensor, "inputs"] | None:
        """Of one layer; None where it had no pass."""
        return self._sums.get(layer)

    def follows_the_batch(self, layer: nn.Module) -> bool:
        """Whether units were always the second axis of what the layer got, behind the batch's."""
        return self._axes.get(layer) == {1}

    def __reduce__(self) -> tuple[type[Activity], tuple[tuple[()]]]:
        """A copy listens to nothing: layers are known by identity."""
        return Activity, ((),)

    def _hear(self, module: nn.Module, *args: Any, **options: Any) -> None:
        if module not in self._sums:
            return
        inputs: Tensor = args[0] if args else options["input"]
        axis = inputs.ndim - 1 - (len(module.kernel_size) if isinstance(module, _ConvNd) else 0)
        others = [n for n in range(inputs.ndim) if n != axis]
        size = inputs.detach().abs()
        total = size.sum(others, dtype=torch.float32 if size.element_size() < 4 else size.dtype) if others else size
        before = self._sums[module]
        self._sums[module] = total if before is None else before + total
        self._axes[module].add(axis)
