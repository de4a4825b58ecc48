"""The gradient of a quadratic model by itself, or added to those of a loss, faster than by products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import increment_version

from avalanche_curv.core.loops.compiled import is_plain
from avalanche_curv.core.precision import in_own_precision

Form = TypeVar("Form", bound="float | Tensor")


class GradientPass(ABC, Generic[Form]):
    """g + C δ for δ = θ − a, by itself or added to gradients, for parameters that are plain tensors of the type and on
    the device of the anchor a [P]; `shapes` are theirs, in the order of the anchor."""

    def __init__(self, anchor: Float[Tensor, "P"], shapes: Sequence[torch.Size]) -> None:
        self.anchor, self.shapes = anchor.contiguous(), list(shapes)

    @in_own_precision
    @torch.no_grad()
    def add(self, parameters: Sequence[Tensor | None]) -> Form | None:
        """Adds g + C δ to the gradients of these parameters θ, and returns δᵀCδ + 2 gᵀδ; None, with nothing done, where
        that is not possible."""
        known = [p for p in parameters if p is not None and p.grad is not None]
        gradients = [p.grad for p in known if p.grad is not None]
        if len(known) < len(self.shapes) or not (self._fit(known) and self._fit(gradients)):
            return None
        increment_version(gradients)
        return self._written(gradients, known, adds=True)

    @in_own_precision
    @torch.no_grad()
    def gradient(self, parameters: Sequence[Tensor]) -> tuple[Form, list[Tensor]] | None:
        """δᵀCδ + 2 gᵀδ and g + C δ, in the shapes of the parameters and in memory of its own; None where that is not
        possible."""
        if not self._fit(parameters):
            return None
        gradients = [self.anchor.new_empty(shape) for shape in self.shapes]
        return self._written(gradients, parameters, adds=False), gradients

    @abstractmethod
    def _is_usable(self) -> bool:
        """Whether it is possible here and now, whatever the parameters."""

    @abstractmethod
    def _written(self, gradients: Sequence[Tensor], parameters: Sequence[Tensor], adds: bool) -> Form:
        """Adds g + C δ to gradients, or writes it to them, and returns δᵀCδ + 2 gᵀδ."""

    def _fit(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these lie in memory as the anchor does."""
        if torch.compiler.is_compiling() or not self._is_usable():
            return False
        return all(is_plain(tensor, shape, self.anchor) for tensor, shape in zip(tensors, self.shapes))
