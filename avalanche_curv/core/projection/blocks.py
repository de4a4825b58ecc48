"""Parameters as one matrix, whose rows have to stay out of a subspace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.parameters import ParameterSpace
from avalanche_curv.core.subspace import Subspace

Parts = Mapping[str, Tensor]
"""Tensors by parameter name."""


@dataclass(frozen=True)
class Layout:
    """How some parameters make up one matrix X [r, d].

    All in one row [1, P]; or `stacked`, with what belongs to each output of a layer in a row of its own: X = (W | b),
    [out, in] for a bias-free linear layer, [out, in · kernel + 1] for a convolution with bias.
    """

    space: ParameterSpace
    stacked: bool = False

    @property
    def columns(self) -> ParameterSpace:
        """The parameters, or their parts of one output, as the coordinates of a row."""
        if not self.stacked:
            return self.space
        return ParameterSpace(self.space.names, tuple(shape[1:] for shape in self.space.shapes))

    @property
    def height(self) -> int:
        """r."""
        return self.space.shapes[0][0] if self.stacked else 1

    def matrix(self, parts: Parts) -> Float[Tensor, "r d"]:
        """X."""
        return torch.cat([parts[name].reshape(self.height, -1) for name in self.space.names], dim=1)

    def parts(self, matrix: Float[Tensor, "r d"]) -> dict[str, Tensor]:
        """X in the shapes of the parameters."""
        widths = self.columns.sizes
        return {
            name: part.reshape(shape)
            for name, shape, part in zip(self.space.names, self.space.shapes, matrix.split(widths, dim=1))
        }

    def union(self, other: Layout) -> Layout:
        """The smallest layout that holds both."""
        return replace(self, space=self.space.union(other.space))


@dataclass(frozen=True)
class Block:
    """A matrix of parameters, and the subspace that its rows stay out of."""

    layout: Layout
    subspace: Subspace

    @property
    def used(self) -> int:
        """How many dimensions of the parameters are protected."""
        return self.layout.height * self.subspace.rank

    def within(self, outer: Layout) -> Block:
        """The same of parameters that have grown."""
        if outer == self.layout:
            return self
        inner, whole = self.layout.columns, outer.columns
        subspace = self.subspace if inner == whole else self.subspace.embedded(whole.positions(inner), whole.size)
        return Block(outer, subspace)

    def restricted(self, names: frozenset[str]) -> Block | None:
        """Where only these parameters move, if any of the block does."""
        kept = [(n, s) for n, s in zip(self.layout.space.names, self.layout.space.shapes) if n in names]
        if not kept or len(kept) == len(self.layout.space.names):
            return self if kept else None
        layout = replace(self.layout, space=ParameterSpace(*zip(*kept)))
        return Block(layout, self.subspace.restricted(self.layout.columns.positions(layout.columns)))

    def component(self, parts: Parts, by_task: bool = False) -> dict[str, Tensor]:
        """The part of X in the subspace, as it is or as one task after another takes it away."""
        vectors = self.layout.matrix(parts).to(self.subspace.rows)
        within = self.subspace.component_by_task(vectors) if by_task else self.subspace.component(vectors)
        return self.layout.parts(within)
