"""Whether the loss of some data under a model is a mean over single examples that can be differentiated, looked at
before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from torch.utils._python_dispatch import TorchDispatchMode

from avalanche_curv.core.hints import called
from avalanche_curv.core.nested import Nested, described, examples, index, leaves, mapped, split
from avalanche_curv.core.options import in_short
from avalanche_curv.core.risk.batches import untouched_randomness
from avalanche_curv.core.risk.forward import Called
from avalanche_curv.core.risk.frozen import HALF, close, drop_idle_hooks
from avalanche_curv.core.risk.known import is_plain

if TYPE_CHECKING:
    from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk

BATCH = 512  # examples of a batch on which a criterion is tried
ONE_BY_ONE = "past loss is a mean over single examples. Use normalisation with running statistics."


def check_given(model: Any, criterion: Any, batches: Any) -> None:
    """Raises TypeError where these are no module, its loss and data, or stand in another order, with what came."""
    if not isinstance(model, nn.Module) or isinstance(model, _Loss) or isinstance(batches, nn.Module):
        hint = f" Did you mean {called(model)}?" if isinstance(model, type) else ""
        hint = " Give the model of the strategy." if isinstance(getattr(model, "model", None), nn.Module) else hint
        raise TypeError(
            "EmpiricalRisk.snapshot(model, criterion, batches) takes a module, its loss and the data, in this order; "
            f"got {', '.join(map(in_short, (model, criterion, batches)))}.{hint}"
        )
    if isinstance(batches, (Tensor, str)) or not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise TypeError(
            f"batches must be pairs (inputs, targets) in a list or a loader; got {_in_words(batches)}. "
            "Give [(inputs, targets)], or DataLoader(TensorDataset(inputs, targets), batch_size=64)."
        )


def check_risk(risk: EmpiricalRisk) -> None:
    """Raises ValueError, or TypeError for outputs that are no tensor, where the risk cannot be computed: for a model
    without trainable parameters, for no data, batches that are no pairs of tensors, outputs and targets that the loss
    does not cover, and for a model that is no function of single examples. Forward hooks of the frozen model that only
    look on are dropped.

    It is seen on a few examples of the first batch that holds some, or, of data in memory, of all; of these all targets
    are looked at besides. Of a criterion that is a function, up to 512 examples of the first batch are looked at.
    """
    _ = risk.space
    in_memory = isinstance(risk.batches, tuple)
    inputs, targets = risk.few
    drop_hooks(risk)
    check_precision(risk.model, _cloned(inputs))
    check_function(risk.model, _cloned(inputs))
    if not is_plain(risk.model):
        with untouched_randomness():
            check_gradients(risk, _cloned(index(inputs, slice(2))))
    risk.loss.check(_outputs(risk.model, inputs), targets)
    risk.loss.check_batch(lambda: _first_batch(risk))
    for _ in risk if in_memory else ():
        pass


def _first_batch(risk: EmpiricalRisk) -> tuple[Tensor, Nested]:
    """The outputs and targets of the first batch, or of its first examples."""
    inputs, targets = index(next(iter(risk)), slice(BATCH))
    with torch.no_grad(), untouched_randomness():
        return _outputs(risk.model, _cloned(inputs)), targets


def drop_hooks(risk: EmpiricalRisk) -> None:
    """Takes forward hooks that only look on from the frozen model of a risk."""

    def evaluate() -> tuple[Tensor, tuple[Tensor, ...]]:
        with untouched_randomness():
            return _differentiated(risk, _cloned(risk.few[0]))

    drop_idle_hooks(risk.base, evaluate)


def _cloned(inputs: Nested) -> Nested:
    return mapped(torch.clone, inputs)


def check_batch(batch: Any) -> None:
    """Raises ValueError unless a batch is a pair (inputs, targets) of as many examples, each a nesting of tensors."""
    parts = [*batch] if isinstance(batch, (tuple, list)) else []
    pair = len(parts) == 2 and leaves(parts[1]) != []
    odd = [_odd(part) for part in parts] if pair else []
    found = leaves(parts) if pair and not any(odd) else []
    lengths = {part.shape[0] if part.ndim else None for part in found}
    if len(found) > 1 and len(lengths) == 1 and None not in lengths:
        return
    if len(parts) > 1 and (isinstance(parts[1], (int, float)) or getattr(parts[1], "ndim", 1) == 0):
        raise ValueError(
            f"Expected batches of examples; got the single example {_in_words(batch)}. Give batches, as by "
            "DataLoader(dataset, batch_size=64)."
        )
    if found:
        got = " and ".join(map(described, parts))
        raise ValueError(f"Inputs and targets of a batch must be as many; got {got}. {_examples_first(parts[1])}")
    for role, part, what in zip(("Inputs", "Targets"), parts, odd):
        if what:
            raise ValueError(
                f"{role} must be a tensor, or a tuple, list or mapping of tensors; got {described(part)}. "
                f"Make a tensor of {what} in the collate function, or leave it out."
            )
    if isinstance(batch, Mapping):
        remedy = 'Call its targets "labels", or make pairs of it: [(batch, batch.pop("y")) for batch in loader].'
    elif len(parts) > 2:
        remedy = "Put all inputs in one tuple, for model(x, mask): [((x, mask), y) for x, mask, y in loader]."
    else:
        remedy = "Put a pair in a list: [(inputs, targets)]."
    raise ValueError(
        "Each batch must be a pair (inputs, targets), the targets a tensor or a nesting of tensors; got "
        f"{_in_words(batch)}. {remedy}"
    )


def _examples_first(targets: Nested) -> str:
    """What to do about targets that are not as many as the inputs."""
    if isinstance(targets, (tuple, list)) and all(isinstance(part, Mapping) for part in targets):
        return (
            "A list with one mapping for each example, as of detectors, has no axis of examples: in the collate "
            "function pad them to one length and stack them, {name: pad_sequence([t[name] for t in targets], "
            "batch_first=True)}, with a mask of the entries that count."
        )
    return "Put examples first."


def _odd(inputs: Nested) -> str:
    """The type of something in a nesting that is neither a tensor nor None; empty where there is none."""
    if isinstance(inputs, Mapping):
        return next(filter(None, (f"{key!r}" for key, part in inputs.items() if _odd(part))), "")
    if isinstance(inputs, (tuple, list)):
        return next(filter(None, map(_odd, inputs)), "")
    return "" if inputs is None or isinstance(inputs, Tensor) else type(inputs).__name__


def _in_words(data: Any) -> str:
    """What data is, in a few words."""
    if isinstance(data, Mapping):
        return f"a {type(data).__name__} of {', '.join(map(str, data))}"
    if isinstance(data, Tensor):
        return f"a Tensor of shape {tuple(data.shape)}"
    if isinstance(data, (tuple, list)):
        kinds = [type(part).__name__ for part in data]
        return str(kinds) if len(kinds) <= 4 else f"a {type(data).__name__} of {len(kinds)}, the first a {kinds[0]}"
    return type(data).__name__


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


def check_precision(model: nn.Module, inputs: Nested) -> None:
    """Raises ValueError unless the frozen `model` takes inputs of its type and computes in no half precision: what is
    rounded to three digits has no derivatives to be relied on."""
    name = _named(model)
    remedy = (
        "Cast to the type of the weights in forward, as by x.to(self.layer.weight.dtype), and open torch.autocast "
        "around the model or in training alone, by enabled=self.training. Half precision is float32 in the frozen copy."
    )
    with torch.no_grad(), untouched_randomness(), _HalfPrecision() as noted:
        try:
            model(inputs)
        except Exception as error:
            if "dtype" not in str(error) and "scalar type" not in str(error):
                return  # which is said by `check_function`
            kinds = ", ".join(dict.fromkeys(str(part.dtype) for part in leaves(inputs)))
            raise ValueError(f"{name} does not take {kinds} when frozen: {error}. {remedy}") from error
    if noted.types:
        raise ValueError(f"{name} computes in {', '.join(map(str, noted.types))} when frozen. {remedy}")


def check_function(model: nn.Module, inputs: Nested) -> None:
    """Raises ValueError, or TypeError where the outputs are no tensor, unless `model` maps each of a few examples to
    outputs of its own, the same every time, alone or with others, in any order."""
    name, versions, count = _named(model), [part._version for part in leaves(inputs)], examples(inputs)
    with torch.no_grad(), untouched_randomness():
        first, again = _outputs(model, inputs), _outputs(model, inputs)
        if [part._version for part in leaves(inputs)] != versions:
            raise ValueError(
                f"{name} writes into its inputs, which would change stored examples. Clone them in forward."
            )
        if first.ndim == 0 or len(first) != count:
            got = "one number" if first.ndim == 0 else f"{len(first)} outputs"
            raise ValueError(f"{name} gives {got} for {count} examples. Put the batch axis first.")
        if not close(first, again):
            raise ValueError(
                f"{name} draws at random in eval mode: its loss is no function. Give dropout self.training."
            )
        try:
            alone, turned = model(index(inputs, slice(1))), model(mapped(lambda t: t.flip(0), inputs)).flip(0)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{name} cannot be evaluated on one example ({error}); {ONE_BY_ONE}") from error
    if not (close(first[:1], alone) and close(first, turned)):
        raise ValueError(f"The outputs of {name} for one example depend on the others in the batch; {ONE_BY_ONE}")


def _named(model: nn.Module) -> str:
    return type(model.module if isinstance(model, Called) else model).__name__


def _outputs(model: nn.Module, inputs: Nested) -> Tensor:
    try:
        outputs = model(inputs)
    except Exception as error:
        raise ValueError(
            f"{_named(model)} cannot be evaluated in eval mode on inputs {described(inputs)}: {type(error).__name__}: "
            f"{error}. Give inputs as in training, or say how the model is called: "
            "forward=lambda model, inputs: model(**inputs)."
        ) from error
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"{_named(model)} gives a {type(outputs).__name__}; expected one tensor of outputs. Say which it is, "
            "forward=lambda model, inputs: model(inputs)[0], or join several, as by torch.cat(model(inputs), dim=1), "
            "and let the criterion take them apart."
        )
    return outputs


def check_gradients(risk: EmpiricalRisk, inputs: Nested) -> None:
    """Raises ValueError unless the gradient over a few examples is the sum of those of single ones, and that which
    `backward` gives in training."""
    _, together = _differentiated(risk, inputs)
    _check_backward(risk, inputs, together)
    alone = [_differentiated(risk, one, weight)[1] for one, weight in zip(split(inputs, 1), _weights(examples(inputs)))]
    floor = 1e-5 * float(torch.stack([part.norm() for part in together]).norm()) if together else 0.0
    for name, whole, parts in zip(risk.space.names, together, zip(*alone)):
        distance = float((sum(parts[1:], parts[0]) - whole).norm())
        if distance > 3e-3 * float(whole.norm()) + floor:
            raise ValueError(
                f"The gradient that {type(risk.base).__name__} gives of one example in '{name}' depends on the others "
                f"in the batch; {ONE_BY_ONE}"
            )


@torch.enable_grad()
def _check_backward(risk: EmpiricalRisk, inputs: Nested, gradients: Sequence[Tensor]) -> None:
    outputs = _outputs(risk.model, inputs)
    if not gradients:
        return
    outputs.backward(_mixture(outputs, _weights(examples(inputs))))
    trained = [torch.zeros_like(p) if p.grad is None else p.grad for p in risk.parameters]
    risk.base.zero_grad(set_to_none=True)
    for name, own, found in zip(risk.space.names, trained, gradients):
        if float((own - found).norm()) > 3e-3 * float(own.norm()):
            raise ValueError(
                f"torch.autograd.grad gives another gradient of {type(risk.base).__name__} in '{name}' than backward() "
                "does, and no derivative follows from it. Use checkpoint(..., use_reentrant=False)."
            )


def _mixture(outputs: Tensor, weights: list[float]) -> Tensor:
    """Numbers by which to add up outputs, with a weight for each example."""
    width = outputs.numel() // max(1, len(outputs))
    return (torch.tensor(weights)[:, None] * torch.linspace(1, 2, width)).to(outputs).view_as(outputs)


def _weights(examples: int) -> list[float]:
    return [1 + i / examples for i in range(examples)]


@torch.enable_grad()
def _differentiated(
    risk: EmpiricalRisk, inputs: Nested, weight: float | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The outputs of a few examples, and the gradient of a mixture of them in each parameter; of one example with its
    `weight` in the mixture."""
    outputs = _outputs(risk.model, inputs)
    if not outputs.requires_grad:
        return outputs, ()
    mixture = _mixture(outputs, _weights(examples(inputs)) if weight is None else [weight])
    try:
        gradients = torch.autograd.grad(
            outputs, risk.parameters, mixture, allow_unused=True, materialize_grads=True
        )
    except Exception as error:
        raise ValueError(
            f"{type(risk.base).__name__} cannot be differentiated in eval mode: {error}. Curvature is made of its "
            "derivatives: give every operation one."
        ) from error
    return outputs.detach(), gradients
