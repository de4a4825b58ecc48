"""A frozen copy of a model: a function whose derivatives are those of the loss, and of nothing else."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from avalanche_curv.core.precision import differentiable, in_own_precision
from avalanche_curv.core.risk.fingerprint import fingerprint
from avalanche_curv.core.risk.selection import Selection
from avalanche_curv.core.risk.widened import give_own_memory, memory_of, widened

HALF = {torch.float16, torch.bfloat16}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `DataParallel`, `DistributedDataParallel` and `torch.compile`, which `torch.func` refuses."""
    while True:
        if isinstance(model, (nn.DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def check_values(model: nn.Module) -> None:
    """Raises ValueError for trainable parameters that have no values: of a lazy module, or on the device `meta`."""
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"Parameter '{name}' has no shape yet. Pass a batch through the model first.")
        if parameter.is_meta and parameter.requires_grad:
            raise ValueError(
                f"Parameter '{name}' is on the device meta, and so has no values. Give them memory by "
                "model.to_empty(device='cpu'), and then values, as by load_state_dict."
            )


@in_own_precision
def frozen_copy(model: nn.Module, selection: Selection = Selection()) -> nn.Module:  # noqa: B008  a frozen value
    """A copy in eval mode, without gradients and backward hooks; models with half precision compute in float32. Those
    of its parameters require a gradient that `selection` takes into a parameter space (`Selection.in_space`). Frozen
    ones outside of that space are not copied: see `shared`.

    Embeddings give plain gradients in it: dense, unscaled, and with norms above `max_norm` already reduced. Tensors
    that a module keeps of its last call are copied without their graph. Raises TypeError for a model that cannot be
    copied, ValueError for parameters without values.
    """
    own = unwrapped(model)
    check_values(own)
    try:
        copied = copied_without_graphs(own, differentiable(own) | shared(own, selection)).eval()
    except Exception as error:
        raise TypeError(
            f"{type(model).__name__} cannot be frozen, since it cannot be copied: {error}. Past loss is that of a "
            "copy. Keep locks, files and generators out of the module, or give them a __deepcopy__."
        ) from error
    if not all(p.is_leaf for p in copied.parameters()):  # so torch copies scripted modules
        raise TypeError(
            f"{type(model).__name__} cannot be frozen, since its copy still depends on its parameters. Use the module "
            "that a scripted one was made from."
        )
    copied.zero_grad(set_to_none=True)
    kept = {id(parameter) for _, parameter in selection.in_space(copied)}
    for parameter in copied.parameters():
        parameter.requires_grad_(id(parameter) in kept)
    for module in copied.modules():
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            _give_plain_gradients(module)
    return copied.float() if _is_half(own) else copied


def _is_half(model: nn.Module) -> bool:
    return any(p.dtype in HALF for p in model.parameters())


class Shared:
    """How a parameter of a frozen copy that shares its memory with one of the model was when it was frozen.

    It stands at the parameter as the attribute `shared`. A deep copy of the parameter has memory and no mark, and so
    has one that is read from a file.
    """

    def __init__(self, owner: nn.Parameter) -> None:
        self.owner = weakref.ref(owner)
        self.fingerprint = fingerprint(memory_of(owner))

    def describes(self, parameter: nn.Parameter) -> bool:
        """Whether the values are those of then: they alone count, not whether they were written meanwhile, as by
        `load_state_dict` with equal ones."""
        return torch.equal(fingerprint(memory_of(parameter)), self.fingerprint)

    def __reduce__(self) -> tuple:
        return type(None), ()


_sharing: weakref.WeakValueDictionary[int, nn.Parameter] = weakref.WeakValueDictionary()
"""The parameters of frozen copies that share memory, by their `id`."""


def shared(model: nn.Module, selection: Selection) -> dict[int, nn.Parameter]:
    """Stand-ins that share the memory of parameters of `model`, by the `id` of each, as `copy.deepcopy(model, memo)`
    takes them: of frozen parameters (`requires_grad=False`) outside of the space of `selection`, since training leaves
    them as they are. Of a model with half precision all compute in float32 (see `Widened`).

    Copied all the same are those of an embedding with `max_norm`, which reduces its rows as they are read; those made
    in inference mode; and those of a type of their own, such as quantised ones.
    """
    single = torch.float32 if _is_half(model) else None
    moving = {id(parameter) for _, parameter in selection.in_space(model)}
    moving |= {id(p) for m in model.modules() if getattr(m, "max_norm", None) is not None for p in m.parameters()}
    return {
        id(p): _standing_in(p, single)
        for p in model.parameters()
        if type(p) is nn.Parameter
        and not (p.requires_grad or id(p) in moving or p.is_inference())
    }


def _standing_in(parameter: nn.Parameter, dtype: torch.dtype | None = None) -> nn.Parameter:
    """A frozen parameter with the memory of another one, of the same type, or, where it has a fraction, of `dtype`."""
    other: Any = widened(memory_of(parameter), dtype if dtype and parameter.is_floating_point() else parameter.dtype)
    other.shared = getattr(parameter, "shared", None) or Shared(parameter)
    _sharing[id(other)] = other
    return other


def keep_what_trains(model: nn.Module) -> None:
    """To be called before the parameters of `model` are trained: frozen copies that share memory with those that
    require a gradient now, and did not before, get memory of their own."""
    training = {id(p) for p in model.parameters() if p.requires_grad}
    other: Any
    for other in [*_sharing.values()]:
        mark = getattr(other, "shared", None)
        if mark is not None and id(mark.owner()) in training and mark.describes(other):
            give_own_memory(other)
            other.shared = None


T = TypeVar("T")


class Graphs(Generic[T]):
    """What `make` returns, with graphs through a frozen copy, which hold views of its parameters: kept as long as these
    stay where they are in memory, and made anew after `keep_what_trains`. Raises ValueError as `check_unchanged`."""

    def __init__(self, base: nn.Module, make: Callable[[], T]) -> None:
        self.base, self.make = base, make
        self._places: list[int] | None = None

    @property
    def value(self) -> T:
        check_unchanged(self.base)
        places = [memory_of(parameter).data_ptr() for parameter in self.base.parameters()]
        if self._places != places:
            self._places, self._value = places, self.make()
        return self._value


def check_unchanged(base: nn.Module) -> None:
    """Raises ValueError where a parameter of a frozen copy that shares the memory of the model has other values now.

    All of them are read, once for each use of a risk: see `fingerprint`.
    """
    for name, parameter in base.named_parameters():
        mark = getattr(parameter, "shared", None)
        if mark is not None and not mark.describes(parameter):
            raise ValueError(
                f"Parameter '{name}' of {type(base).__name__} was frozen (requires_grad=False) when its loss was, so "
                "that it was not copied, and was changed in place since: that loss is lost, unless its values are "
                "written back. Take a copy.deepcopy(risk) before, or let the parameter require a gradient and leave it "
                "out by exclude=[...]."
            )


def copied_base(
    base: nn.Module, owned: Callable[[str], bool] = lambda name: False, dtype: torch.dtype | None = None
) -> nn.Module:
    """A copy of a frozen copy that shares what that shares, to compute in `dtype` where that is given. Parameters of
    names that are `owned` have memory of their own, of the type that they compute in. Raises ValueError as
    `check_unchanged`."""
    check_unchanged(base)
    memo = {}
    for name, p in base.named_parameters():
        if not owned(name) and getattr(p, "shared", None) is not None:
            memo[id(p)] = _standing_in(p, dtype)
        elif memory_of(p).dtype != p.dtype and (owned(name) or dtype):
            memo[id(p)] = nn.Parameter(p.detach().clone(), requires_grad=False)
    return copied_without_graphs(base, memo)


def copied_without_graphs(value: T, memo: dict[int, Any] | None = None) -> T:
    """A deep copy, in which tensors that were computed have no graph: `copy.deepcopy` by itself refuses them. Modules
    keep such tensors, of weights computed from others or of their last call."""
    with _WithoutGraphs():
        return copy.deepcopy(value, memo)


class _WithoutGraphs(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def _give_plain_gradients(module: nn.Embedding | nn.EmbeddingBag) -> None:
    module.sparse = module.scale_grad_by_freq = False
    if module.max_norm is not None:
        every = torch.arange(module.num_embeddings, device=module.weight.device)
        with torch.no_grad():
            torch.embedding_renorm_(module.weight, every, module.max_norm, module.norm_type)
        module.max_norm = None


Gradients = tuple[Tensor, ...]


def drop_idle_hooks(base: nn.Module, evaluate: Callable[[], tuple[Tensor, Gradients]]) -> None:
    """Takes from `base` those forward hooks and pre-hooks without which `evaluate` returns the same outputs and
    gradients in the parameters: such as only look on must not see what derivatives are computed with.

    Each hook is called meanwhile. Raises ValueError for one that fails.
    """
    hooked = [(hooks, key) for hooks in _hooks(base) for key in [*hooks]]
    if not hooked:
        return
    try:
        wanted = evaluate()
    except Exception as error:
        with _without(hooked):
            evaluate()  # which raises where it is not the hooks that fail
        raise ValueError(
            f"{type(base).__name__} with its forward hooks cannot be evaluated in eval mode: {error}. Remove the hooks "
            "before curvature is estimated, or let them return early where not module.training."
        ) from error
    with _without(hooked):
        idle = _same(evaluate, wanted)
    for place in hooked if not idle else ():
        with _without([place]):
            needed = not _same(evaluate, wanted)
        if not needed:
            place[0].pop(place[1])
    for hooks, key in hooked if idle else ():
        hooks.pop(key)


def _hooks(base: nn.Module) -> Iterator[dict]:
    for module in base.modules():
        yield module._forward_pre_hooks
        yield module._forward_hooks


@contextmanager
def _without(places: list[tuple[dict, int]]) -> Iterator[None]:
    """Without these hooks, which come back in their order."""
    before = [(hooks, dict(hooks)) for hooks, _ in places]
    for hooks, key in places:
        hooks.pop(key)
    try:
        yield
    finally:
        for hooks, whole in reversed(before):
            hooks.clear()
            hooks.update(whole)


def _same(evaluate: Callable[[], tuple[Tensor, Gradients]], wanted: tuple[Tensor, Gradients]) -> bool:
    try:
        outputs, gradients = evaluate()
    except Exception:  # what the hook does is needed
        return False
    return close(outputs, wanted[0]) and all(close(a, b) for a, b in zip(gradients, wanted[1]))


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal but for the rounding of single precision, on the scale of the largest entry."""
    size = float(a.abs().nan_to_num(0, 0, 0).max()) if a.numel() else 0.0
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3 * size, equal_nan=True)
