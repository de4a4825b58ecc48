"""Subspaces by orthonormal rows, to which one task after another adds directions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from avalanche_curv.core.arguments import takes
from avalanche_curv.core.state import Storable

GRAM_ENTRIES = 2**22  # of rows that are held in float64 at once


@dataclass(frozen=True)
class TaskShare(Storable):
    """The directions of one task in a subspace U: orthonormal directions V = K U by their coordinates K, the curvature
    along each, the trace of all of its curvature (NaN where it is not known), and the number of the task."""

    coordinates: Float[Tensor, "j k"]
    values: Float[Tensor, "j"]
    trace: float
    task: int

    @property
    def inside(self) -> float:
        """The part of the trace that these directions hold in U, Σ_i λ_i ‖κ_i‖²; what directions of other tasks hold of
        it does not count."""
        return float(self.values @ self.coordinates.square().sum(1))

    def on(self, device: torch.device) -> TaskShare:
        """This share on a device."""
        return replace(self, coordinates=self.coordinates.to(device), values=self.values.to(device))

    def padded(self, count: int) -> TaskShare:
        """This share in a subspace with `count` further directions."""
        return replace(self, coordinates=F.pad(self.coordinates, (0, count)))

    def rotated(self, rotation: Float[Tensor, "k l"]) -> TaskShare:
        """This share in the coordinates of another subspace, by the matrix that turns one into the other."""
        return replace(self, coordinates=self.coordinates @ rotation)


@dataclass(frozen=True)
class Subspace(Storable):
    """The span of orthonormal rows U [k, d], and the `shares` of the tasks in it, in float64.

    >>> plane = Subspace.empty(torch.zeros(3)).plus(torch.eye(3)[:2], torch.tensor([4.0, 1.0]), trace=6.0)
    >>> plane.component(torch.tensor([[1.0, 2.0, 3.0]])), round(plane.energy, 3)
    (tensor([[1., 2., 0.]]), 0.833)
    >>> plane.plus(torch.eye(3)[1:2], torch.tensor([1.0])).rank                # merged again, it adds nothing
    2
    """

    rows: Float[Tensor, "k d"]
    shares: tuple[TaskShare, ...] = ()

    @classmethod
    def empty(cls, like: Float[Tensor, "d"]) -> Subspace:
        """{0} in as many dimensions as `like` has entries."""
        return cls(like.new_empty(0, len(like)))

    @property
    def rank(self) -> int:
        """k, the number of rows."""
        return self.rows.shape[0]

    @property
    def dimension(self) -> int:
        """d, the dimension of the space around it."""
        return self.rows.shape[1]

    @property
    def is_whole(self) -> bool:
        """Whether no direction is free."""
        return self.rank == self.dimension

    @property
    def nbytes(self) -> int:
        """Memory of the rows and shares, in bytes."""
        shares = sum(share.coordinates.nbytes + share.values.nbytes for share in self.shares)
        return self.rows.nbytes + shares

    @property
    def energy(self) -> float:
        """The part of all tasks' curvature that their own directions hold in U, of those whose trace is known."""
        return energy(self.shares)

    def on(self, device: torch.device) -> Subspace:
        """This subspace on a device."""
        if self.rows.device == device:
            return self
        return Subspace(self.rows.to(device), tuple(share.on(device) for share in self.shares))

    def component(self, vectors: Float[Tensor, "r d"]) -> Float[Tensor, "r d"]:
        """X Uᵀ U: the part of each row that lies in the subspace."""
        inside = _coordinates(vectors, self.rows)
        return (inside[0] @ self.rows)[None] if len(inside) == 1 else inside @ self.rows

    def withdraw(self, target: Float[Tensor, "r d"], vectors: Float[Tensor, "r d"], *, by_task: bool = False) -> Tensor:
        """`target` less the component of `vectors` in the subspace, in place.

        With `by_task` less X − X (I − V₁ᵀV₁) (I − V₂ᵀV₂) … instead, where the share of one task after another is
        projected out. Where these are not orthogonal, that leaves a part in the earlier ones again.
        """
        inside = _coordinates(vectors, self.rows)
        if by_task:
            inside = inside - self._left_by_tasks(inside)
        if len(target) == 1:
            target[0].addmv_(self.rows.T, inside[0], alpha=-1)
        else:
            target.addmm_(inside, self.rows, alpha=-1)
        return target

    def _left_by_tasks(self, coordinates: Float[Tensor, "r k"]) -> Float[Tensor, "r k"]:
        for share in self.shares:
            own = share.coordinates.to(coordinates)
            coordinates = coordinates - (coordinates @ own.T) @ own
        return coordinates

    def joined(self, rows: Float[Tensor, "m d"]) -> Subspace:
        """The span of this subspace and `rows`, without a share for these. Rows that lie within U add nothing."""
        return self._with_rows(remainder(rows.to(self.rows), self.rows))

    def plus(
        self, rows: Float[Tensor, "m d"], values: Float[Tensor, "m"], trace: float = math.nan, task: int = 0
    ) -> Subspace:
        """The span of this subspace and of orthonormal `rows`, along which a task has the curvature `values`; the
        task's number and the trace of all of its curvature are kept in its share."""
        rows = rows.to(self.rows)
        held = rows @ self.rows.T
        new = _orthonormal_outside(_without(rows, held, self.rows), self.rows)
        coordinates = torch.cat([held, rows @ new.T], dim=1)
        return self._with_rows(new).with_share(TaskShare(coordinates, values, trace, task))

    def _with_rows(self, new: Float[Tensor, "m d"]) -> Subspace:
        if not len(new):
            return self
        return Subspace(torch.cat([self.rows, new]), tuple(share.padded(len(new)) for share in self.shares))

    def with_share(self, share: TaskShare) -> Subspace:
        """This span with the share of one more task."""
        coordinates = _isometry(share.coordinates.double())
        share = replace(share, coordinates=coordinates, values=share.values.double().to(coordinates.device).abs())
        return replace(self, shares=(*self.shares, share))

    def limited(self, rank: int | None) -> Subspace:
        """The `rank` directions in U along which the summed curvature Σ_t V_tᵀ Λ_t V_t is largest."""
        if rank is None or self.rank <= rank:
            return self
        moments = sum(share.coordinates.T @ (share.values[:, None] * share.coordinates) for share in self.shares)
        turned = torch.linalg.eigh(moments)[1].flip(1)[:, :rank]
        rows = turned.T.to(self.rows) @ self.rows
        rows = rows - (rows @ rows.T - torch.eye(rank).to(rows)) @ rows / 2  # (I + E)^(-1/2) rows, against rounding
        return Subspace(rows, tuple(share.rotated(turned) for share in self.shares))

    def restricted(self, at: Int[Tensor, "e"]) -> Subspace:
        """The subspace that vectors have to avoid that are zero in all coordinates but those `at`: the span of these
        columns of U."""
        columns = self.rows[:, at.to(self.rows.device)]
        rows = orthonormal(columns)
        turn = (columns @ rows.T).double()
        shares = (share.rotated(turn) for share in self.shares)
        return Subspace(rows, tuple(replace(share, coordinates=_isometry(share.coordinates)) for share in shares))


def energy(shares: Iterable[TaskShare]) -> float:
    """The part of the trace of all tasks that their directions hold, Σ inside / Σ tr C, over shares whose trace is
    known; NaN where none is."""
    known = [share for share in shares if math.isfinite(share.trace)]
    total = sum(share.trace for share in known)
    return sum(share.inside for share in known) / total if total else math.nan


def remainder(rows: Float[Tensor, "m d"], basis: Float[Tensor, "k d"]) -> Float[Tensor, "l d"]:
    """Orthonormal rows that span what unit `rows` have outside orthonormal `basis`: block Gram-Schmidt, twice, since
    once leaves rounding that is large beside a small remainder (Giraud et al. 2005, "twice is enough").

    A remainder below `tolerance` does not count, so that what the basis holds adds nothing.
    """
    return _orthonormal_outside(_without(rows, rows @ basis.T, basis), basis)


def _orthonormal_outside(rows: Float[Tensor, "m d"], basis: Float[Tensor, "k d"]) -> Float[Tensor, "l d"]:
    """Orthonormal rows of the span outside `basis`, for rows that are orthogonal to it up to rounding."""
    rows = orthonormal(rows)
    return orthonormal(_without(rows, rows @ basis.T, basis))


def _without(rows: Tensor, coordinates: Float[Tensor, "m k"], basis: Float[Tensor, "k d"]) -> Tensor:
    """X − K U, for rows X of coordinates K in the basis U."""
    return torch.addmm(rows, coordinates, basis, alpha=-1) if len(rows) and len(basis) else rows


def orthonormal(rows: Float[Tensor, "m d"]) -> Float[Tensor, "l d"]:
    """Orthonormal rows of the same span, without directions of singular values below `tolerance`; by the Gram matrix in
    float64, whose eigenvalues resolve singular values from 1e-8 on."""
    if not len(rows):
        return rows
    values, vectors = torch.linalg.eigh(gram(rows))
    kept = values > tolerance(rows.dtype) ** 2
    return (vectors[:, kept] / values[kept].sqrt()).T.to(rows) @ rows


def tolerance(kind: torch.dtype) -> float:
    """The part of a unit vector below which a direction counts as none: 100 times the rounding of the type, at least
    1e-7.
    """
    return max(100 * torch.finfo(kind).eps, 1e-7)


@takes(first=(Tensor, "orthonormal rows [j, d]"), second=(Tensor, "orthonormal rows [k, d]"))
def principal_angles(first: Float[Tensor, "j d"], second: Float[Tensor, "k d"]) -> Float[Tensor, "n"]:
    """The n = min(j, k) principal angles between the spans of orthonormal rows, in radians, smallest first; by sines
    where they are small (Björck & Golub 1973).

    >>> from math import pi
    >>> line, plane = torch.tensor([[1.0, 1.0, 0.0]]) / 2**0.5, torch.eye(3)[1:]
    >>> round(float(principal_angles(line, plane)) / pi, 6)
    0.25
    """
    if len(first) < len(second):
        first, second = second, first
    first, second = first.double(), second.double()
    overlap = second @ first.T
    cosines = torch.linalg.svdvals(overlap).clamp(max=1)
    sines = torch.linalg.svdvals(second - overlap @ first).flip(0)[: len(cosines)].clamp(max=1)
    return torch.where(cosines.square() < 0.5, cosines.acos(), sines.asin())


def _isometry(coordinates: Float[Tensor, "j k"]) -> Float[Tensor, "j k"]:
    """(K Kᵀ)^(-1/2) K, the nearest rows to K whose KᵀK is a projection: orthonormal ones, or zero where K has less."""
    values, vectors = torch.linalg.eigh(coordinates @ coordinates.T)
    inverse = torch.where(values > tolerance(values.dtype) ** 2, values.clamp(min=0).rsqrt(), 0.0)
    return (vectors * inverse) @ vectors.T @ coordinates


def gram(rows: Float[Tensor, "m d"]) -> Float[Tensor, "m m"]:
    """X Xᵀ in float64, without a copy of all of X."""
    total = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    for part in map(Tensor.double, rows.split(max(1, GRAM_ENTRIES // len(rows)), dim=1)):
        total.addmm_(part, part.T)
    return total


def _coordinates(vectors: Float[Tensor, "r d"], rows: Float[Tensor, "k d"]) -> Float[Tensor, "r k"]:
    return (rows @ vectors[0])[None] if len(vectors) == 1 else vectors @ rows.T
