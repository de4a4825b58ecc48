"""Which positions of a layer have a part in means of its inputs: padding, and what else a loss leaves out, has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from avalanche_curv.core.losses import ExampleLoss
from avalanche_curv.core.nested import Nested
from avalanche_curv.core.per_example import layer_kinds
from avalanche_curv.core.per_example.layers import sensitivities
from avalanche_curv.core.per_example.taps import Tap


@dataclass
class Counting:
    """The positions that count in linear and convolutional layers, for n examples in one forward pass.

    Which tokens of an example count says the loss: those whose target is not its `ignore_index`. A position of a layer
    counts

    - in a layer with as many positions as there are tokens, if its token counts or the outputs of tokens that count
      depend on it, as those of an answer do on the question;
    - in a linear layer with some other number of positions, such as the T inputs of T − 1 next tokens, if such outputs
      depend on it;
    - in any other layer, one after pooling, say, or a convolution of another resolution, and with one class for each
      example, if any token of its example counts.

    So padding has no part, and all is as without it, wherever the outputs that count do not depend on it. They depend
    on a position if their derivative there is not zero, for sensitivities that are noted.
    """

    masks: dict[nn.Module, Bool[Tensor, "n T"]]
    """Of the layers of which some positions may not count, those that do as far as is known."""
    open: list[Tap]
    """The layers in which positions count that outputs depend on."""

    @classmethod
    def of(cls, loss: ExampleLoss, taps: Sequence[Tap], targets: Nested) -> Counting:
        """What is known before any sensitivity: all, where every target counts and layers have a position for each."""
        found, counted = cls({}, []), loss.counted(targets)
        if counted is None:
            return found
        tokens = counted.reshape(len(counted), -1)
        complete = bool(tokens.all())
        for tap in (tap for tap in taps if layer_kinds.is_outer(tap.layer)):
            length = layer_kinds.positions(tap.layer, tap.outputs, len(tokens)).shape[2]
            aligned, linear = length == tokens.shape[1], layer_kinds.takes_tokens(tap.layer)
            if counted.ndim == 1 or length == 1 or not (aligned or linear):
                if not complete:
                    found.masks[tap.layer] = tokens.any(1, keepdim=True).expand(-1, length)
            elif not (aligned and complete):
                found.masks[tap.layer] = tokens if aligned else tokens.new_zeros(len(tokens), length)
                found.open.append(tap)
        return found

    def note(self, tap: Tap, sensitivity: Tensor) -> None:
        """Takes in a sensitivity of outputs that count, if it matters for this layer."""
        if tap in self.open:
            mask = self.masks[tap.layer]
            touched = (layer_kinds.positions(tap.layer, sensitivity, len(mask)) != 0).any(1)
            self.masks[tap.layer] = mask | touched

    def note_all(self, loss: ExampleLoss, outputs: Float[Tensor, "n K"], targets: Nested) -> None:
        """Takes in one backward pass from the outputs that count, if it matters: their order is [n, C, tokens]."""
        tokens = loss.counted(targets)
        if self.open and tokens is not None:
            apart = outputs.view(len(outputs), -1, tokens[0].numel())
            mixed = torch.linspace(1, 2, apart.shape[1]).to(outputs)
            scalar = torch.einsum("ncd,c,nd->", apart, mixed, tokens.reshape(len(tokens), -1).to(outputs))
            for tap, sensitivity in zip(self.open, sensitivities(scalar, self.open)):
                self.note(tap, sensitivity)

    def shares(self, layer: nn.Module, like: Tensor) -> Float[Tensor, "n T"] | None:
        """w_nt, T times the share of position t in the mean over the inputs of example n: Σ_t w_nt = T, or all 0 for an
        example without a position that counts. None where every position counts."""
        mask = self.masks.get(layer)
        if mask is None or mask.all():
            return None
        weights = mask.to(like)
        return weights / weights.mean(1, keepdim=True).clamp_min(1e-30)
