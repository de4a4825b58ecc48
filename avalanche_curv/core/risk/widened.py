"""Parameters in half precision that enter each operation in full precision, while their memory stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

aten: Any = torch.ops.aten
BLOCK = 2**22  # entries of the right factor of a product that are widened at once
PRODUCTS = {aten.mm.default, aten.addmm.default}
LOOKUPS = {aten.embedding.default, aten.index_select.default, aten.index.Tensor, aten.gather.default}

NO_ADDRESS = (
    "A frozen weight in half precision was asked for its address, as by a kernel of an extension, and has none in the "
    "type that curvature is computed in. Let the weight require a gradient and leave it out by exclude=[...], so that "
    "it is copied, or use model.float()."
)


class Widened(Tensor):
    """A constant of type `dtype` whose entries stay in the memory of `narrow`, of another type.

    Every operation gets a copy in `dtype` that lasts as long as the operation, products of matrices one of a block of
    columns after the other, and looking up rows one of these alone: results are those of `narrow.to(dtype)`. Views of
    it are views of `narrow`, and these are what graphs keep for the backward pass, so that a forward and backward pass
    hold one such copy at a time. It costs one more pass over the memory for each operation.

    It has no address in memory that holds values of its type: code that asks for `data_ptr()` gets a RuntimeError. To
    write into it raises a TypeError.

    >>> wide = Widened(torch.ones(2, 3, dtype=torch.bfloat16), torch.float32)
    >>> wide.dtype, (torch.ones(1, 2) @ wide).dtype, wide.T.narrow.dtype
    (torch.float32, torch.float32, torch.bfloat16)
    """

    narrow: Tensor  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, narrow: Tensor, dtype: torch.dtype) -> Widened:
        made = Tensor._make_wrapper_subclass(
            cls, narrow.shape, strides=narrow.stride(), storage_offset=narrow.storage_offset(),
            dtype=dtype, device=narrow.device,
        )
        if hasattr(torch._C, "_set_storage_data_ptr_access_error_msg"):  # else a kernel would read at address zero
            torch._C._set_storage_data_ptr_access_error_msg(made.untyped_storage()._cdata, NO_ADDRESS)
        else:
            torch._C._set_throw_on_mutable_data_ptr(made)
        made.narrow = narrow
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        first, kwargs = args[0] if args else None, kwargs or {}
        if isinstance(first, cls):
            if function._schema.is_mutable:
                raise TypeError(f"{function} writes into a frozen parameter. Clone it first.")
            if function in LOOKUPS:
                return function(first.narrow, *args[1:], **kwargs).to(first.dtype)
            if function.is_view and function is not aten.view.dtype:
                found = function(first.narrow, *args[1:], **kwargs)
                return tree_map_only(Tensor, lambda narrow: cls(narrow, first.dtype), found)
        if function in PRODUCTS and isinstance(args[-1], cls) and args[-1].numel() > BLOCK:
            return _by_columns(function, args, kwargs)
        args, kwargs = tree_map_only(cls, lambda wide: wide.narrow.to(wide.dtype), (args, kwargs))
        return function(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Widened({self.narrow}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        memo[id(self)] = widened(self.narrow.clone(), self.dtype)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable, tuple]:
        return widened, (self.narrow, self.dtype)


def _by_columns(function: Any, args: Any, kwargs: Any) -> Tensor:
    """(b +) a C for a widened matrix C, some columns after the other."""
    *added, left, wide = args
    size = max(1, BLOCK // len(wide))
    starts = [b.expand(len(left), wide.shape[1]).split(size, 1) for b in added]
    parts = zip(*starts, wide.split(size, 1))
    return torch.cat([function(*start, left, block, **kwargs) for *start, block in parts], 1)


def widened(narrow: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """A frozen parameter of type `dtype` with the memory of `narrow`, which may have another one."""
    data = narrow if narrow.dtype == dtype else Widened(narrow, dtype)
    return nn.Parameter(data, requires_grad=False)


def memory_of(parameter: Tensor) -> Tensor:
    """The tensor, of whatever type, that holds the memory of a parameter."""
    return parameter.narrow if isinstance(parameter, Widened) else parameter.data


def give_own_memory(parameter: nn.Parameter) -> None:
    """Moves a parameter to memory of its own."""
    if isinstance(parameter, Widened):
        parameter.narrow = parameter.narrow.clone()
    else:
        parameter.data = parameter.data.clone()
