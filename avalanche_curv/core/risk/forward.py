"""How a frozen model is called with nested inputs, and which of its outputs count.

Where nobody says it by `forward`, a tensor goes in as `model(x)`, a tuple or list as `model(*x)`, a mapping as
`model(**x)`, and of outputs that have `logits`, as an attribute or a key, these are taken.

A batch that is a mapping with `labels` is one of Hugging Face's: `labels` are the targets, and the rest is what the
model takes. What its outputs [N, T, V] mean, the model says itself, by its `loss_type` and the name of its type:

- ForCausalLM, LMHeadModel (GPT-2), ForConditionalGeneration without an encoder: outputs [N, V, T − 1] of the tokens
  that have a next one, and targets [N, T − 1], the next tokens.
- ForMaskedLM, ForTokenClassification, ForConditionalGeneration with an encoder: outputs [N, V, T], targets [N, T].
- any other, such as ForSequenceClassification: outputs and targets as they are.

Of pairs (inputs, targets) nothing is shifted: the targets are then as many as the outputs. The model is not given the
labels, and a loss of its own is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from avalanche_curv.core.nested import Nested
from avalanche_curv.core.risk.batches import Batches, View
from avalanche_curv.core.state import Storable

Forward: TypeAlias = Callable[[Any, Any], Tensor]
"""(model, inputs) ↦ outputs."""


@dataclass(frozen=True)
class Logits(Storable):
    """The outputs of a model, or the logits among them."""

    def __call__(self, model: nn.Module, inputs: Nested) -> Tensor:
        return logits(called(model, inputs))

    def targets(self, labels: Tensor) -> Tensor:
        return labels


@dataclass(frozen=True)
class TokenLogits(Storable):
    """Logits [N, T, V] of tokens as [N, V, T], where losses of torch have the classes."""

    def __call__(self, model: nn.Module, inputs: Nested) -> Tensor:
        return logits(called(model, inputs)).movedim(-1, 1)

    def targets(self, labels: Tensor) -> Tensor:
        return labels


@dataclass(frozen=True)
class NextTokenLogits(Storable):
    """Logits [N, T, V] of next tokens as [N, V, T − 1], against the tokens from the second on."""

    def __call__(self, model: nn.Module, inputs: Nested) -> Tensor:
        return logits(called(model, inputs))[:, :-1].movedim(-1, 1)

    def targets(self, labels: Tensor) -> Tensor:
        return labels[:, 1:]


Convention: TypeAlias = Logits | TokenLogits | NextTokenLogits

NEXT = ("ForCausalLM", "LMHeadModel")
SAME = ("ForMaskedLM", "ForTokenClassification")
EITHER = ("ForConditionalGeneration",)


def convention_of(model: Any, *, labelled: bool) -> Convention:
    """How a model is called that does not say it by `forward`; `labelled` where its batches are mappings with
    `labels`."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # inside an adapter of PEFT
    said = f"{getattr(inner, 'loss_type', None)} {type(inner).__name__}"
    encodes = getattr(getattr(inner, "config", None), "is_encoder_decoder", False)
    if any(name in said for name in (*SAME, *(EITHER if encodes else ()))):
        return TokenLogits()
    if any(name in said for name in (*NEXT, *EITHER)):
        return NextTokenLogits() if labelled else TokenLogits()
    return Logits()


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


def is_labelled(batch: Any) -> bool:
    """Whether a batch is a mapping with `labels`."""
    return isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor)


@dataclass(frozen=True)
class Labelled(View):
    """Batches that are mappings with `labels`, as pairs (inputs, targets)."""

    batches: Batches
    convention: Convention

    def __iter__(self) -> Iterator[tuple[Nested, Nested]]:
        batch: Any
        for batch in self.batches:
            yield self.pair(batch) if is_labelled(batch) else batch

    def pair(self, batch: Mapping[str, Any]) -> tuple[dict[str, Nested], Tensor]:
        """The batch without its labels, and the targets."""
        inputs = {name: part for name, part in batch.items() if name != "labels"}
        return inputs, self.convention.targets(batch["labels"])
