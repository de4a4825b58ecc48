"""Batches that are mappings with `labels`, as Hugging Face's models take them, as pairs (inputs, targets).

`labels` are the targets, and the rest is what the model takes: it is not given the labels. Where it would make the
inputs of its decoder of them, its own `prepare_decoder_input_ids_from_labels` makes these.

Which outputs belong to which labels is one of the conventions in `forward`: that which the model's names say, unless
the loss that the model itself returns for a few examples with their labels says another. Where it is the mean
cross-entropy by none of them, and the criterion is the mean cross-entropy, the past would be the loss of something
else than is trained, which is refused. Pairs (inputs, targets) are compared with nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avalanche_curv.core.losses import ExampleLoss
from avalanche_curv.core.losses.categorical import CrossEntropy
from avalanche_curv.core.nested import Nested
from avalanche_curv.core.risk.batches import Batches, View, untouched_randomness
from avalanche_curv.core.risk.forward import (
    Convention,
    Forward,
    Logits,
    NextTokenLogits,
    TokenLogits,
    called,
    generates_from_an_encoder,
    logits,
    unadapted,
)

ROUNDING = 1e-5  # of 1 + loss, for means in single precision


def is_labelled(batch: Any) -> bool:
    """Whether a batch is a mapping with `labels`."""
    return isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor)


@dataclass(frozen=True)
class Labelled(View):
    """Batches that are mappings with `labels`, as pairs (inputs, targets)."""

    batches: Batches
    convention: Convention
    model: nn.Module

    def __iter__(self) -> Iterator[tuple[Nested, Nested]]:
        batch: Any
        for batch in self.batches:
            yield self.pair(batch) if is_labelled(batch) else batch

    def pair(self, batch: Mapping[str, Any]) -> tuple[dict[str, Nested], Tensor]:
        """The batch without its labels, and the targets. Raises ValueError as `inputs_of`."""
        return inputs_of(self.model, batch), self.convention.targets(batch["labels"])


def inputs_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Nested]:
    """What the model takes of a batch with `labels`: the rest, and the inputs of its decoder, made as the model itself
    makes them of the labels. Raises ValueError where it has no method for that."""
    inputs = {name: part for name, part in batch.items() if name != "labels"}
    if any(inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds")):
        return inputs
    inner = unadapted(model)
    prepare = getattr(inner, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        inputs["decoder_input_ids"] = prepare(labels=batch["labels"])
    elif generates_from_an_encoder(model):
        raise ValueError(
            f"{type(inner).__name__} makes the inputs of its decoder of the labels, which a past is not given, and has "
            "no prepare_decoder_input_ids_from_labels. Put them in each batch: batch['decoder_input_ids'] = "
            "shift_tokens_right(batch['labels'], config.pad_token_id, config.decoder_start_token_id), by the function "
            "that stands beside the model."
        )
    return inputs


def settled(
    named: Convention, model: nn.Module, batch: Mapping[str, Any], forward: Forward | None, loss: ExampleLoss
) -> Convention:
    """The convention by which the mean cross-entropy of the outputs and the labels is the loss that the frozen `model`
    returns for a batch: the one that its names say, where it is by that; else another. The one that its names say, too,
    where the model returns no loss.

    Outputs are what `forward` gives, where it is given. Raises ValueError where it is so by no convention, but `loss`
    is the mean cross-entropy.
    """
    own = _own_loss(model, batch)
    if own is None:
        return named
    found = _cross_entropies(model, batch, forward, (named, Logits(), TokenLogits(), NextTokenLogits()))
    agreeing = [convention for convention, value in found.items() if abs(value - own) <= ROUNDING * (1 + abs(own))]
    if not agreeing and found and loss in (CrossEntropy(mean=True), CrossEntropy(mean=False)):
        nearest = found.get(named, min(found.values(), key=lambda value: abs(value - own)))
        raise ValueError(
            f"Of the first examples {type(unadapted(model)).__name__} itself returns the loss {own:.6g}, but the "
            f"cross-entropy of its outputs and their labels is {nearest:.6g}, so that the past would be another loss "
            "than is trained. Where labels are next tokens, give forward=lambda model, inputs: "
            "model(**inputs).logits[:, :-1].transpose(1, 2): the labels from the second on are taken. Where the "
            "criterion is meant to be another loss than the model's, which may add terms of its own, give pairs "
            "(inputs, targets) instead of labels: these are not compared."
        )
    return agreeing[0] if agreeing else named


def _own_loss(model: nn.Module, batch: Mapping[str, Any]) -> float | None:
    """The loss that a model returns when it is given labels; None where it returns none, or no finite number."""
    try:
        with torch.no_grad(), untouched_randomness():
            returned = model(**batch)
    except Exception:  # it takes no labels, or does not take these
        return None
    if isinstance(returned, tuple):
        returned = {"loss": returned[0]}
    loss = returned.get("loss") if isinstance(returned, Mapping) else getattr(returned, "loss", None)
    return float(loss) if isinstance(loss, Tensor) and loss.numel() == 1 and loss.isfinite() else None


def _cross_entropies(
    model: nn.Module, batch: Mapping[str, Any], forward: Forward | None, conventions: tuple[Convention, ...]
) -> dict[Convention, float]:
    """The mean cross-entropy by each of the conventions that fits the outputs and the labels."""
    call: Callable[[Any, Any], Any] = forward or (lambda model, inputs: logits(called(model, inputs)))
    found: dict[Convention, float] = {}
    try:
        with torch.no_grad(), untouched_randomness():
            outputs = call(model, inputs_of(model, batch))
    except Exception:  # which is said by `check_function`
        return found
    for convention in conventions:
        try:
            value = F.cross_entropy(
                outputs if forward is not None else convention.outputs(outputs), convention.targets(batch["labels"])
            )
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):  # of other shapes or types
            continue
        found[convention] = float(value)
    return found
