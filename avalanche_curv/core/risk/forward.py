"""How a frozen model is called with nested inputs, and which of its outputs count.

Where nobody says it by `forward`, a tensor goes in as `model(x)`, a tuple or list as `model(*x)`, a mapping as
`model(**x)`, and of outputs that have `logits`, as an attribute or a key, these are taken.

A batch that is a mapping with `labels` is one of Hugging Face's: see `labelled`. What its outputs [N, T, V] mean, the
model says itself, by its `loss_type` and the names of its type and of those that it is derived from:

- ForCausalLM, LMHeadModel (GPT-2), ForConditionalGeneration without an encoder: outputs [N, V, T − 1] of the tokens
  that have a next one, and targets [N, T − 1], the next tokens.
- ForMaskedLM, ForTokenClassification, ForConditionalGeneration with an encoder: outputs [N, V, T], targets [N, T].
- any other, such as ForSequenceClassification: outputs and targets as they are.

Of pairs (inputs, targets) nothing is shifted: the targets are then as many as the outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from avalanche_curv.core.nested import Nested
from avalanche_curv.core.risk.batches import untouched_randomness
from avalanche_curv.core.state import Storable

Forward: TypeAlias = Callable[[Any, Any], Tensor]
"""(model, inputs) ↦ outputs."""


class Convention(Storable, ABC):
    """What a model gives that is called by no `forward`, and which labels belong to it."""

    def __call__(self, model: nn.Module, inputs: Nested) -> Tensor:
        return self.outputs(logits(called(model, inputs)))

    @abstractmethod
    def outputs(self, found: Tensor) -> Tensor:
        """The outputs, of the logits that the model gives."""

    @abstractmethod
    def targets(self, labels: Tensor) -> Tensor:
        """The targets, of the labels."""


@dataclass(frozen=True)
class Logits(Convention):
    """The outputs of a model, or the logits among them."""

    def outputs(self, found: Tensor) -> Tensor:
        return found

    def targets(self, labels: Tensor) -> Tensor:
        return labels


@dataclass(frozen=True)
class TokenLogits(Convention):
    """Logits [N, T, V] of tokens as [N, V, T], where losses of torch have the classes."""

    def outputs(self, found: Tensor) -> Tensor:
        return found.movedim(-1, 1)

    def targets(self, labels: Tensor) -> Tensor:
        return labels


@dataclass(frozen=True)
class NextTokenLogits(Convention):
    """Logits [N, T, V] of next tokens as [N, V, T − 1], against the tokens from the second on."""

    def outputs(self, found: Tensor) -> Tensor:
        return found[:, :-1].movedim(-1, 1)

    def targets(self, labels: Tensor) -> Tensor:
        return labels[:, 1:]


NEXT = ("ForCausalLM", "LMHeadModel")
SAME = ("ForMaskedLM", "ForTokenClassification")
EITHER = ("ForConditionalGeneration",)


def convention_of(model: Any, *, labelled: bool) -> Convention:
    """How a model is called that does not say it by `forward`, as its names say; `labelled` where its batches are
    mappings with `labels`."""
    if is_named(model, *SAME) or generates_from_an_encoder(model):
        return TokenLogits()
    if is_named(model, *NEXT, *EITHER):
        return NextTokenLogits() if labelled else TokenLogits()
    return Logits()


def is_named(model: Any, *names: str) -> bool:
    """Whether one of these is in the `loss_type` of a model, or in the name of its type or of one it is derived
    from."""
    inner = unadapted(model)
    said = " ".join([str(getattr(inner, "loss_type", None)), *(kind.__name__ for kind in type(inner).__mro__)])
    return any(name in said for name in names)


def generates_from_an_encoder(model: Any) -> bool:
    """Whether a model has a decoder whose inputs are, in training, its labels one place later."""
    return is_named(model, *EITHER) and getattr(getattr(unadapted(model), "config", None), "is_encoder_decoder", False)


def unadapted(model: Any) -> Any:
    """The model inside an adapter of PEFT."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class Called(nn.Module):
    """A frozen model as a function of inputs alone. The model is its attribute `module`."""

    def __init__(self, module: nn.Module, function: Forward) -> None:
        super().__init__()
        self.module, self.function = module, function
        self.eval()

    def forward(self, inputs: Nested) -> Tensor:
        return self.function(self.module, inputs)


def as_function(model: nn.Module) -> nn.Module:
    """A model as one of inputs alone, in any nesting, as far as it does not need a `forward`."""
    return model if isinstance(model, Called) else Called(model, Logits())


def called(model: nn.Module, inputs: Nested) -> Any:
    """What the model returns."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def logits(outputs: Any) -> Any:
    """The `logits` of outputs that have some, else the outputs."""
    if isinstance(outputs, Mapping):
        return outputs.get("logits", outputs)
    return getattr(outputs, "logits", outputs)


def is_plainly_called(model: nn.Module, inputs: Nested) -> bool:
    """Whether a frozen model makes a tensor of a tensor, as far as it can be called so."""
    if not isinstance(inputs, Tensor):
        return False
    try:
        with torch.no_grad(), untouched_randomness():
            outputs = model(inputs)
    except Exception:  # which is said by `check_risk`
        return True
    return logits(outputs) is outputs


def as_matrix(outputs: Tensor) -> Float[Tensor, "N C"]:
    """Outputs as [N, C]: one number an example becomes one column, further axes are flattened."""
    return outputs.reshape(outputs.shape[0], -1)


@dataclass(frozen=True)
class Unstored(Storable):
    """A function of one's own in a state, which holds its name alone."""

    name: str


def storable_forward(forward: Forward | None) -> Storable | None:
    """What a state holds of a `forward`."""
    if forward is None or isinstance(forward, Storable):
        return forward
    return Unstored(getattr(forward, "__qualname__", type(forward).__name__))


def restored_forward(stored: Any, given: Forward | None) -> Forward | None:
    """The `forward` of which a state holds `stored`. Raises ValueError where it is to be given, and is not."""
    if not isinstance(stored, Unstored):
        return stored
    if given is None:
        raise ValueError(
            f"This past holds stored examples whose model was called by a function of your own ({stored.name}), which "
            "a state does not hold. Give it again: load_state_dict(state, model=..., criterion=..., forward=...)."
        )
    return given
