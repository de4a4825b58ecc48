"""The draws of a curvature kind from the middle of the examples on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.curvature import OutputCurvature
from avalanche_curv.core.losses import ExampleLoss

CHUNK = 4096  # examples whose draws are skipped at once


def with_draws_after(
    curvature: OutputCurvature, examples: int, loss: ExampleLoss, outputs: Float[Tensor, "N C"], targets: Tensor
) -> OutputCurvature:
    """The kind with its draws as they are after a number of examples of the shape of the given ones; itself if it
    draws none. Draws of a kind come one example after another, so that they do not depend on the batch size."""
    later = _Later(curvature, examples, loss, outputs[:1].detach(), targets[:1])
    return later if examples and later.draws else curvature


@dataclass(frozen=True)
class _Later(OutputCurvature):
    curvature: OutputCurvature
    skipped: int
    loss: ExampleLoss
    outputs: Float[Tensor, "1 C"]
    targets: Tensor

    def factor(self, loss: ExampleLoss, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        return self.curvature.factor(loss, outputs, targets, generator)

    def generator(self) -> torch.Generator:
        generator = self.curvature.generator()
        for start in range(0, self.skipped, CHUNK):
            self._skip(min(CHUNK, self.skipped - start), generator)
        return generator

    @property
    def draws(self) -> bool:
        """Whether S takes anything from the generator."""
        generator = self.curvature.generator()
        before = generator.get_state()
        self._skip(1, generator)
        return not torch.equal(before, generator.get_state())

    def _skip(self, examples: int, generator: torch.Generator) -> None:
        outputs, targets = (t.expand(examples, *t.shape[1:]) for t in (self.outputs, self.targets))
        with torch.no_grad():
            self.curvature.factor(self.loss, outputs, targets, generator)
