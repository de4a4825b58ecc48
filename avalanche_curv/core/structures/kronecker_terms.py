"""Symmetric matrices over the changes of one layer that are, or come from, Kronecker products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.eigen import spectrum
from avalanche_curv.core.state import Storable

Adder = Callable[[list[Tensor]], Tensor]
"""Adds the product C w with a change w to tensors of some of its columns each, in place, and returns wᵀ C w."""
APART = 16  # numbers


class KroneckerTerm(Storable, ABC):
    """A symmetric matrix over changes of one layer: [out, in] of the weight and, as the last column, of the bias, as
    far as they are trainable."""

    is_product: bool = False
    """Whether it is the Kronecker product of its `factors`."""

    spans: bool = True
    """Whether it was estimated over all changes of the layer, which may have grown since."""

    @abstractmethod
    def adder(self, own: Float[Tensor, "out in"], widths: Sequence[int]) -> Adder:
        """What adds products of the matrix without its level with the change that stands in the memory `own`, which
        `in_rows` made, to tensors of so many of its columns each; what it needs beside that is made once."""

    @property
    def level(self) -> float:
        """How many times the identity the matrix is, beside what `adder` adds."""
        return 0.0

    @abstractmethod
    def scaled(self, factor: float) -> KroneckerTerm:
        """factor times the matrix."""

    @abstractmethod
    def placed(self, rows: Tensor, columns: Tensor, out: int, inputs: int) -> KroneckerTerm:
        """The matrix over larger changes, in which those of this one stand at some rows and columns; zero elsewhere."""

    def grown(self, known: int) -> KroneckerTerm:
        """With the mean curvature of the first `known` outputs for all further ones, where it is zero. Raises TypeError
        where that is not known."""
        raise TypeError(
            f"{type(self).__name__} cannot give later outputs the curvature of those that are there. Take Kronecker() "
            "or EKFAC() without a cut, or a head that has all outputs from the start."
        )

    @abstractmethod
    def map_spectrum(self, function: Callable[[Tensor], Tensor]) -> KroneckerTerm:
        """`function` of the eigenvalues."""

    @abstractmethod
    def eigen(self) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out out"], Float[Tensor, "in in"]]:
        """Λ, Q_G and Q_A: the eigenvalue Λ_ij belongs to the change q_i q_jᵀ."""

    @abstractmethod
    def factors(self) -> Factors:
        """The matrix, or in the place of one that is no product the pair of its partial traces over G and over A."""

    @abstractmethod
    def diagonal_in(self, g: Float[Tensor, "out r"], a: Float[Tensor, "in s"]) -> Float[Tensor, "r s"]:
        """The quadratic forms of the changes g_i a_jᵀ of these columns."""

    @abstractmethod
    def dense(self) -> Float[Tensor, "d d"]:
        """All entries, over changes in row-major order."""

    @abstractmethod
    def trace(self) -> float:
        """The sum of the eigenvalues."""

    @property
    @abstractmethod
    def work(self) -> int:
        """Floating point operations of a product, for each entry of the change."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored."""


@dataclass(frozen=True)
class Factors(KroneckerTerm):
    """W ↦ G W A."""

    is_product = True

    a: Float[Tensor, "in in"]
    g: Float[Tensor, "out out"]
    spans: bool = True

    def adder(self, own: Float[Tensor, "out in"], widths: Sequence[int]) -> Adder:
        out, inputs = own.shape
        turned, product = in_rows(out, inputs, own), in_rows(out, inputs, own)
        parts = product.split([*widths], dim=1)

        def add(to: list[Tensor]) -> Tensor:
            turned.addmm_(own, self.a, beta=0)
            product.addmm_(self.g, turned, beta=0)
            torch._foreach_add_(to, parts)
            return whole(own) @ whole(product)

        return add

    def scaled(self, factor: float) -> Factors:
        return replace(self, g=self.g * factor)

    def placed(self, rows: Tensor, columns: Tensor, out: int, inputs: int) -> Factors:
        g, a = self.g.new_zeros(out, out), self.a.new_zeros(inputs, inputs)
        g[rows[:, None], rows], a[columns[:, None], columns] = self.g, self.a
        return Factors(a, g, self.spans and (out, inputs) == (len(self.g), len(self.a)))

    def grown(self, known: int) -> Factors:
        g = self.g.clone()
        g.diagonal()[known:] = g.trace() / known
        return replace(self, g=g, spans=True)

    def map_spectrum(self, function: Callable[[Tensor], Tensor]) -> KroneckerTerm:
        values, g, a = self.eigen()
        return Corrected(function(values), g, a, spans=self.spans)

    def eigen(self) -> tuple[Tensor, Tensor, Tensor]:
        (of_g, g), (of_a, a) = (spectrum(factor) for factor in (self.g, self.a))
        return torch.outer(of_g, of_a).to(self.a), without_rounding(g.to(self.a)), without_rounding(a.to(self.a))

    def factors(self) -> Factors:
        return self

    def diagonal_in(self, g: Tensor, a: Tensor) -> Tensor:
        return torch.outer((g * (self.g @ g)).sum(0), (a * (self.a @ a)).sum(0))

    def dense(self) -> Tensor:
        return torch.kron(self.g, self.a)

    def trace(self) -> float:
        return float(self.a.double().trace() * self.g.double().trace())

    @property
    def work(self) -> int:
        return 2 * (len(self.a) + len(self.g))

    def tensors(self) -> tuple[Tensor, ...]:
        return self.a, self.g


@dataclass(frozen=True)
class Corrected(KroneckerTerm):
    """W ↦ Q_G (Λ ∘ (Q_Gᵀ W Q_A)) Q_Aᵀ."""

    values: Float[Tensor, "out in"]
    g: Float[Tensor, "out out"]
    a: Float[Tensor, "in in"]
    is_product: bool = False
    spans: bool = True

    def adder(self, own: Float[Tensor, "out in"], widths: Sequence[int]) -> Adder:
        (out, r), s = self.g.shape, self.a.shape[1]
        turned, bent, back = in_rows(out, s, own), in_rows(r, s, own), in_rows(out, s, own)
        vectors = [some.T for some in self.a.split([*widths])]

        def add(to: list[Tensor]) -> Tensor:
            bent.addmm_(self.g.T, turned.addmm_(own, self.a, beta=0), beta=0)
            form = (bent * bent).reshape(-1) @ self.values.reshape(-1)
            back.addmm_(self.g, bent.mul_(self.values), beta=0)
            for place, some in zip(to, vectors):
                place.addmm_(back, some)
            return form

        return add

    def scaled(self, factor: float) -> Corrected:
        return replace(self, values=self.values * factor)

    def placed(self, rows: Tensor, columns: Tensor, out: int, inputs: int) -> Corrected:
        """Eigenvectors keep their number: only their entries get new places."""
        g, a = self.g.new_zeros(out, self.g.shape[1]), self.a.new_zeros(inputs, self.a.shape[1])
        g[rows], a[columns] = self.g, self.a
        return replace(self, g=g, a=a, spans=self.spans and (out, inputs) == (len(self.g), len(self.a)))

    def grown(self, known: int) -> Corrected:
        """By a further eigenvector for each of them."""
        later = torch.eye(len(self.g)).to(self.g)[:, known:]
        values = (self.values.sum(0) / known).expand(later.shape[1], -1)
        whole, spans = torch.cat([self.g, later], dim=1), len(self.a) == self.a.shape[1]
        return replace(self, values=torch.cat([self.values, values]), g=whole, spans=spans)

    def map_spectrum(self, function: Callable[[Tensor], Tensor]) -> KroneckerTerm:
        return replace(self, values=function(self.values), is_product=False)

    def eigen(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.values, self.g, self.a

    def factors(self) -> Factors:
        """A = Q_A diag(Σ_i Λ_i·) Q_Aᵀ / √tr and G = Q_G diag(Σ_j Λ_·j) Q_Gᵀ / √tr."""
        root = self.values.sum().sqrt()
        return Factors(
            (self.a * (self.values.sum(0) / root)) @ self.a.T, (self.g * (self.values.sum(1) / root)) @ self.g.T
        )

    def diagonal_in(self, g: Tensor, a: Tensor) -> Tensor:
        return (g.T @ self.g).square() @ self.values @ (self.a.T @ a).square()

    def dense(self) -> Tensor:
        vectors = torch.kron(self.g, self.a)
        return (vectors * self.values.reshape(-1)) @ vectors.T

    def trace(self) -> float:
        return float(self.values.double().sum())

    @property
    def work(self) -> int:
        return 4 * (self.a.shape[1] + self.g.shape[1])

    def tensors(self) -> tuple[Tensor, ...]:
        return self.values, self.g, self.a


def without_rounding(values: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """Mean squares, or eigenvectors, with those entries set to zero that are below ε² of the largest, ε the rounding of
    their type: what rounding leaves where the others are zero, as in the directions of dead units. Subnormal numbers,
    and factors whose product is one, are among them, with which products take many times as long on some processors.

    >>> without_rounding(torch.tensor([[1.0, 1e-13, 1e-16]]))
    tensor([[1.0000e+00, 1.0000e-13, 0.0000e+00]])
    """
    sizes = values.abs()
    nothing = sizes < torch.finfo(values.dtype).eps ** 2 * sizes.max()  # NaN and infinity are not
    return values.masked_fill(nothing, 0.0)


def in_rows(count: int, width: int, like: Tensor) -> Float[Tensor, "count width"]:
    """Zeros whose rows are a multiple of `APART` numbers apart: products of matrices are written to them in four fifths
    of the time that it takes with rows of 785 numbers."""
    return like.new_zeros(count, -(-width // APART) * APART)[:, :width]


def whole(rows: Float[Tensor, "count width"]) -> Float[Tensor, "n"]:
    """All memory that `in_rows` made, with zeros between the rows."""
    return rows.as_strided((rows.shape[0] * rows.stride(0),), (1,))
