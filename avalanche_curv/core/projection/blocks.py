"""Parameters as a matrix, and a subspace that the rows of its steps stay out of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.projection.subspace import Subspace
from avalanche_curv.core.risk.parameters import ParameterSpace
from avalanche_curv.core.state import Storable

Parts = Mapping[str, Tensor]
"""Tensors by parameter name."""


@dataclass(frozen=True)
class Layout(Storable):
    """How some parameters are arranged in one matrix X [r, d].

    All in one row [1, P]; or `stacked`, with what belongs to each output of a layer in a row of its own: X = (W | b),
    [out, in] for a bias-free linear layer, [out, in · kernel + 1] for a convolution with bias. With `transposed` the
    layer's own weight is [in, out], and its transpose is what stands in X.
    """

    space: ParameterSpace
    stacked: bool = False
    transposed: bool = False

    @property
    def columns(self) -> ParameterSpace:
        """The coordinates of a row: the parameters, or where `stacked` their parts of one output."""
        if not self.stacked:
            return self.space
        of_one = slice(-1) if self.transposed else slice(1, None)
        return ParameterSpace(self.space.names, tuple(shape[of_one] for shape in self.space.shapes))

    @property
    def height(self) -> int:
        """r, the number of rows."""
        return self.space.shapes[0][-1 if self.transposed else 0] if self.stacked else 1

    def difference(self, moved: Parts, start: Parts | None, like: Tensor) -> Float[Tensor, "r d"]:
        """The matrix X of `moved` − `start`, or of `moved` alone where `start` is None, in the type of `like`."""
        matrix = like.new_empty(self.height, self.columns.size)
        for name, view in self.parts(matrix).items():
            if start is None:
                view.copy_(moved[name])
            else:
                torch.sub(moved[name].to(like), start[name].to(like), out=view)
        return matrix

    def parts(self, matrix: Float[Tensor, "r d"]) -> dict[str, Tensor]:
        """Views of the entries of X in the shapes of the parameters, by name."""
        parts = zip(self.space.names, self.space.shapes, matrix.split(self.columns.sizes, dim=1))
        return {
            name: part.T if self.transposed and len(shape) == 2 else part.view(shape) for name, shape, part in parts
        }

    def widened(self, matrix: Float[Tensor, "m d"], outer: Layout) -> Float[Tensor, "m e"]:
        """Rows over the columns of `outer`, a layout that holds this one; zero in those that are new."""
        own, whole = self.columns, outer.columns
        return matrix if own == whole else whole.embedded(matrix, own)

    def union(self, other: Layout) -> Layout:
        """The smallest layout that holds this one and `other`."""
        return replace(self, space=self.space.union(other.space))


@dataclass(frozen=True)
class ProtectedBlock(Storable):
    """A matrix of parameters, and the subspace that the rows of its steps stay out of."""

    layout: Layout
    subspace: Subspace

    @property
    def used(self) -> int:
        """The number of dimensions of the parameters that are protected."""
        return self.layout.height * self.subspace.rank

    def within(self, outer: Layout) -> ProtectedBlock:
        """This block within the layout `outer` of parameters that have grown."""
        return ProtectedBlock(outer, replace(self.subspace, rows=self.layout.widened(self.subspace.rows, outer)))

    def restricted(self, names: frozenset[str]) -> ProtectedBlock | None:
        """The block of those parameters alone, where no others move; None where the block holds none of them."""
        kept = [(n, s) for n, s in zip(self.layout.space.names, self.layout.space.shapes) if n in names]
        if not kept or len(kept) == len(self.layout.space.names):
            return self if kept else None
        layout = replace(self.layout, space=ParameterSpace(*zip(*kept)))
        return ProtectedBlock(layout, self.subspace.restricted(self.layout.columns.positions(layout.columns)))

    def outside(self, vectors: Parts) -> dict[str, Tensor]:
        """The part of `vectors` outside of the subspace, by parameter: exactly zero where no direction is free."""
        matrix = self.layout.difference(vectors, None, self.subspace.rows)
        left = matrix.zero_() if self.subspace.is_whole else self.subspace.withdraw(matrix, matrix)
        return self.layout.parts(left)

    def norms(self, moved: Parts, start: Parts) -> tuple[float, float]:
        """‖X Uᵀ U‖ and ‖X‖ of the step X = `moved` − `start`."""
        step = self.layout.difference(moved, start, self.subspace.rows)
        inside = self.subspace.component(step)
        return float(inside.double().norm()), float(step.double().norm())
