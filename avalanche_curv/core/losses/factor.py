"""Factors S of a curvature in the outputs, S Sᵀ, known by their action and by their columns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Factor(ABC):
    """S of n examples: S_i [C, R] with S_i S_iᵀ the curvature in the C outputs of example i.

    No factor makes a matrix that nobody asked for. Products take `times`, sums over columns take `columns`, a few at a
    time; what it holds for each example is `bytes_an_example`, a few numbers for each output where it can be.
    """

    @abstractmethod
    def __len__(self) -> int:
        """n."""

    @abstractmethod
    def __getitem__(self, examples: slice) -> Factor:
        """S of some of the examples."""

    @property
    @abstractmethod
    def count(self) -> int:
        """R, the number of columns."""

    @property
    @abstractmethod
    def bytes_an_example(self) -> int:
        """The memory that it holds for each example; 0 where all share it."""

    @abstractmethod
    def times(self, vectors: Float[Tensor, "n C"]) -> Float[Tensor, "n C"]:
        """S_i S_iᵀ u_i."""

    @abstractmethod
    def columns(self, width: int) -> Iterator[Float[Tensor, "n C w"]]:
        """The R columns in order, up to `width` of them at a time. The order does not depend on the width."""

    @abstractmethod
    def scaled(self, weights: Float[Tensor, "n"] | float) -> Factor:
        """w_i S_i, for numbers of at least 0."""

    @abstractmethod
    def tensor_bytes(self, examples: int) -> int:
        """The memory of `tensor` for so many examples like these."""

    def tensor(self) -> Float[Tensor, "n C R"]:
        """All columns at once."""
        return torch.cat([*self.columns(self.count)], dim=2)

    def split(self, size: int) -> Iterator[Factor]:
        """S of up to `size` examples after the other."""
        return (self[start : start + size] for start in range(0, len(self), size))


def as_factor(found: Factor | Tensor) -> Factor:
    """The factor that a kind or a loss gives, which may be a tensor [n, C, R]. Raises ValueError for one of other
    axes, TypeError for anything else."""
    if isinstance(found, Tensor):
        if found.ndim != 3:
            raise ValueError(
                f"A factor of the curvature in the outputs has shape [N, C, R]; got {tuple(found.shape)}. Give a "
                "single column for each example as column[:, :, None]."
            )
        return Columns(found)
    if not isinstance(found, Factor):
        raise TypeError(f"A factor of the curvature in the outputs is a tensor [N, C, R] or a Factor; got {found!r}.")
    return found


@dataclass(frozen=True, eq=False)
class Columns(Factor):
    """S as a tensor."""

    values: Float[Tensor, "n C R"]

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, examples: slice) -> Columns:
        return Columns(self.values[examples])

    @property
    def count(self) -> int:
        return self.values.shape[2]

    @property
    def bytes_an_example(self) -> int:
        return self.values.stride(0) * self.values.element_size()

    def times(self, vectors: Tensor) -> Tensor:
        return torch.einsum("ncr,nr->nc", self.values, torch.einsum("ncr,nc->nr", self.values, vectors))

    def columns(self, width: int) -> Iterator[Tensor]:
        yield from self.values.split(max(1, width), dim=2)

    def scaled(self, weights: Tensor | float) -> Columns:
        return Columns(self.values * (weights[:, None, None] if isinstance(weights, Tensor) else weights))

    def tensor_bytes(self, examples: int) -> int:
        return examples * self.bytes_an_example

    def tensor(self) -> Tensor:
        return self.values


@dataclass(frozen=True, eq=False)
class PerOutput(Factor):
    """S = diag(root): each output curves by itself. C numbers for each example."""

    root: Float[Tensor, "n C"]

    def __len__(self) -> int:
        return len(self.root)

    def __getitem__(self, examples: slice) -> PerOutput:
        return PerOutput(self.root[examples])

    @property
    def count(self) -> int:
        return self.root.shape[1]

    @property
    def bytes_an_example(self) -> int:
        return 0 if self._is_shared else self.root.shape[1] * self.root.element_size()

    def times(self, vectors: Tensor) -> Tensor:
        return self.root.square() * vectors

    def columns(self, width: int) -> Iterator[Tensor]:
        for start in range(0, self.count, max(1, width)):
            roots = self.root[:, start : start + max(1, width)]
            block = roots.new_zeros(*self.root.shape, roots.shape[1])
            block[:, start : start + roots.shape[1]] = roots.diag_embed()
            yield block

    def scaled(self, weights: Tensor | float) -> PerOutput:
        if not isinstance(weights, Tensor):
            return PerOutput((self.root[:1] * weights).expand_as(self.root) if self._is_shared else self.root * weights)
        return PerOutput(self.root * weights[:, None])

    def tensor_bytes(self, examples: int) -> int:
        return (1 if self._is_shared else examples) * self.count**2 * self.root.element_size()

    def tensor(self) -> Tensor:
        if self._is_shared:
            return self.root[0].diag().expand(len(self.root), -1, -1)
        return self.root.diag_embed()

    @property
    def _is_shared(self) -> bool:
        return len(self.root) > 1 and self.root.stride(0) == 0


@dataclass(frozen=True, eq=False)
class Softmax(Factor):
    """S Sᵀ = w (diag(p) − p pᵀ), p = softmax(logits), of R = C − 1 columns, every entry of it with its digits.

    S = √w L, with L_kk = √(p_k q_k / q_{k−1}) and L_ik = −(p_i / q_k) L_kk for i > k, with q_k = Σ_{j>k} p_j, where the
    most probable class changes places with the last: then every q_k is at least 1/C, and no entry of L Lᵀ is a
    difference of larger numbers. Source: Tanabe & Sagae (1992), J. R. Statist. Soc. B 54, 211-219. The product is
    p_i (v_i − pᵀv) with v = u − u_top. Held are the logits' probabilities, C numbers for each example; no C × C matrix.

    >>> L = Softmax.of(torch.zeros(1, 2)).tensor()
    >>> (L @ L.mT)[0]
    tensor([[ 0.2500, -0.2500],
            [-0.2500,  0.2500]])
    """

    p: Float[Tensor, "n C"]
    top: Int[Tensor, "n 1"]
    weight: Float[Tensor, "n"]

    @classmethod
    def of(cls, logits: Float[Tensor, "n C"], weight: Float[Tensor, "n"] | None = None) -> Softmax:
        """The factor at these logits; the weight is 1 where it is left out."""
        weight = logits.new_ones(len(logits)) if weight is None else weight
        return cls(logits.softmax(1), logits.argmax(1, keepdim=True), weight)

    def __len__(self) -> int:
        return len(self.p)

    def __getitem__(self, examples: slice) -> Softmax:
        return Softmax(self.p[examples], self.top[examples], self.weight[examples])

    @property
    def count(self) -> int:
        return self.p.shape[1] - 1

    @property
    def bytes_an_example(self) -> int:
        return self.p.shape[1] * self.p.element_size()

    def times(self, vectors: Tensor) -> Tensor:
        centred = vectors - vectors.gather(1, self.top)
        return self.weight[:, None] * self.p * (centred - (self.p * centred).sum(1, keepdim=True))

    def columns(self, width: int) -> Iterator[Tensor]:
        classes = torch.arange(self.p.shape[1], device=self.p.device)
        order = torch.where(classes == self.top, classes[-1], classes)  # the swap of the two, which is its own inverse
        order[:, -1:] = self.top
        in_order = self.p.gather(1, order)
        from_here = in_order.flip(1).cumsum(1).flip(1)  # q_{k-1}
        after = from_here[:, 1:]  # q_k
        diagonal = (in_order[:, :-1] / from_here[:, :-1] * after).sqrt() * self.weight.sqrt()[:, None]
        place = order[:, :, None]
        for start in range(0, max(1, self.count), max(1, width)):
            some = slice(start, start + max(1, width))
            here = classes[:-1][some]
            block = self.p[:, :, None] / -after[:, None, some]
            yield block.masked_fill_(place < here, 0).masked_fill_(place == here, 1).mul_(diagonal[:, None, some])

    def scaled(self, weights: Tensor | float) -> Softmax:
        return replace(self, weight=self.weight * weights**2)

    def tensor_bytes(self, examples: int) -> int:
        return examples * self.bytes_an_example * self.count


@dataclass(frozen=True)
class Tokens:
    """Outputs [n, A·C·B] as A·B tokens of C classes each, in the order of [n, A, C, B]."""

    before: int = 1
    after: int = 1

    @property
    def count(self) -> int:
        """D = A·B."""
        return self.before * self.after

    def apart(self, matrix: Float[Tensor, "n K"]) -> Float[Tensor, "n*D C"]:
        """One row for each token."""
        if self.count == 1:
            return matrix
        apart = matrix.reshape(len(matrix), self.before, -1, self.after).transpose(2, 3)
        return apart.reshape(len(matrix) * self.count, -1)

    def together(self, rows: Float[Tensor, "n*D C"]) -> Float[Tensor, "n K"]:
        """The inverse of `apart`."""
        if self.count == 1:
            return rows
        apart = rows.reshape(-1, self.before, self.after, rows.shape[1]).transpose(2, 3)
        return apart.reshape(len(apart), -1)

    def place(self, token: int, classes: int) -> slice:
        """The columns of one token's classes."""
        before, after = divmod(token, self.after)
        return slice(before * classes * self.after + after, (before + 1) * classes * self.after, self.after)


@dataclass(frozen=True, eq=False)
class PerToken(Factor):
    """S of examples of D tokens that curve each by itself: R = D times the columns of one token, each zero but there.

    Held is what the factors of the tokens hold; no matrix over all outputs of an example.
    """

    inner: Factor
    tokens: Tokens
    classes: int

    def __len__(self) -> int:
        return len(self.inner) // self.tokens.count

    def __getitem__(self, examples: slice) -> PerToken:
        start, stop, _ = examples.indices(len(self))
        return replace(self, inner=self.inner[start * self.tokens.count : stop * self.tokens.count])

    @property
    def count(self) -> int:
        return self.tokens.count * self.inner.count

    @property
    def bytes_an_example(self) -> int:
        return self.tokens.count * self.inner.bytes_an_example

    def times(self, vectors: Tensor) -> Tensor:
        return self.tokens.together(self.inner.times(self.tokens.apart(vectors)))

    def columns(self, width: int) -> Iterator[Tensor]:
        for token in range(self.tokens.count):
            place = self.tokens.place(token, self.classes)
            for some in self.inner[token :: self.tokens.count].columns(width):
                block = some.new_zeros(len(some), self.classes * self.tokens.count, some.shape[2])
                block[:, place] = some
                yield block

    def scaled(self, weights: Tensor | float) -> PerToken:
        each = weights.repeat_interleave(self.tokens.count) if isinstance(weights, Tensor) else weights
        return replace(self, inner=self.inner.scaled(each))

    def tensor_bytes(self, examples: int) -> int:
        return examples * self.tokens.count * self.bytes_an_example * self.inner.count
