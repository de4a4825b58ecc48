"""Passes over the data of a risk, a piece at a time, with the sensitivities of each layer to the columns of S."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.curvature.base import OutputCurvature
from avalanche_curv.core.curvature.operators import factor_of, pieces
from avalanche_curv.core.curvature.outlook import Outlook
from avalanche_curv.core.losses import ExampleLoss, Factor
from avalanche_curv.core.nested import Nested
from avalanche_curv.core.nested import examples as number_of
from avalanche_curv.core.per_example.counting import Counting
from avalanche_curv.core.per_example.layers import Layers, sensitivities
from avalanche_curv.core.per_example.taps import Tap
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk

CHUNK = 512  # examples that go through the model at once, fewer where they are large
CACHE_BYTES = 2 * 2**20  # of what leaves the layers for these examples, but for the first FEW: half of a large cache
FEW = 32  # examples for which the weights of a large layer are read at once
CHUNK_BYTES = 32 * 2**20  # of what leaves the layers, for these examples and for the columns of S at once


@dataclass(frozen=True)
class LayerPass:
    """A chunk of n examples after a forward pass: what entered and left each layer, the outputs and the factor S, whose
    columns the outlook counts."""

    examples: int
    taps: list[Tap]
    outputs: Float[Tensor, "n C"]
    factor: Factor
    loss: ExampleLoss
    targets: Nested
    outlook: Outlook

    @property
    def counting(self) -> Counting:
        """Which positions of the layers count, before any sensitivity."""
        return Counting.of(self.loss, self.taps, self.targets)

    @property
    def columns(self) -> Iterator[list[Sequence[Any]]]:
        """For each column s_r of S, ∂(Σ_i s_irᵀ f_i)/∂Z of each tap; some columns at a time where these are large."""
        ends = sum(end.nbytes for tap in self.taps for end in tap.ends)
        for some in self.factor.columns(max(1, CHUNK_BYTES // max(1, self.outputs.nbytes, ends))):
            yield [sensitivities(self.outputs, self.taps, column) for column in some.unbind(2)]
            self.outlook.took(self.examples, some.shape[2], self.factor.count)


def layer_passes(curvature: OutputCurvature, layers: Layers, risk: EmpiricalRisk) -> Iterator[LayerPass]:
    """Passes over all examples of `risk` in order, with the factor S of `curvature`; none if there are no layers.

    To be used within `by_layers`: raises LayerDiffers if a layer is called otherwise than on the first examples.
    """
    generator, outlook = curvature.generator(), Outlook(curvature, risk)
    fit = [max(1, some // max(1, layers.bytes_an_example)) for some in (CACHE_BYTES, CHUNK_BYTES)]
    size = min(CHUNK, max(fit[0], min(fit[1], FEW)))
    for x, y in pieces(curvature, risk.rebatched(size)) if layers.names else ():
        with torch.enable_grad(), layers.tapped(number_of(y), once=True) as taps:
            outputs = risk.outputs(x)
        layers.check_calls(taps, number_of(y))
        factor = factor_of(curvature, risk, outputs.detach(), y, generator)
        yield LayerPass(number_of(y), taps, outputs, factor, risk.loss, y, outlook)

