"""How many of the top eigenpairs a low rank matrix keeps."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.arguments import outside
from avalanche_curv.core.options import check_count, check_number, settle
from avalanche_curv.core.state import Storable


class Cut(Storable, ABC):
    """How many of the top eigenpairs are kept."""

    needs_trace: bool = False
    """Whether the number depends on the trace, so that C has to be positive semi-definite."""

    def takes_all(self, size: int) -> bool:
        """Whether all eigenpairs of a matrix of this size are kept, also those that are zero."""
        return False

    @abstractmethod
    def most(self) -> int:
        """The largest number that may be kept."""

    @abstractmethod
    def count(self, values: Float[Tensor, "k"], trace: float) -> int:
        """How many of these eigenvalues, in falling order, are kept of a matrix with this trace."""

    @abstractmethod
    def corner(self, values: Float[Tensor, "m n"]) -> tuple[int, int]:
        """How many rows and columns of the eigenvalues of a Kronecker product are kept, of which the largest come
        first: those of the eigenvectors of its two factors, at most `most()` of each."""

    def warn_if_short(self, share: float, what: str) -> None:
        """Warns where the part `share` of the trace, which `what` is kept holds, is less than is asked for."""

    def is_enough(self, values: Float[Tensor, "k"], trace: float) -> bool:
        """Whether the cut lies among the eigenvalues given."""
        return len(values) >= self.most()


@dataclass(frozen=True)
class Rank(Cut):
    """The k eigenpairs largest in magnitude."""

    k: int

    def __post_init__(self) -> None:
        settle(self, k=check_count)

    def most(self) -> int:
        return self.k

    def takes_all(self, size: int) -> bool:
        return self.k >= size

    def count(self, values: Tensor, trace: float) -> int:
        return min(self.k, len(values))

    def corner(self, values: Tensor) -> tuple[int, int]:
        rows, columns = values.shape
        return min(self.k, rows), min(self.k, columns)


@dataclass(frozen=True)
class Energy(Cut):
    """The fewest top eigenpairs that hold a `fraction` of the trace, at most `most_pairs` of them (with a warning).

    Of a Kronecker product the fewest eigenvectors of both factors together, which makes a product cheapest, at most
    `most_pairs` of each.

    For positive semi-definite curvature: where eigenvalues cancel, a part of the trace means nothing.
    """

    fraction: float
    most_pairs: int = 100

    needs_trace = True

    def __post_init__(self) -> None:
        fraction = partial(check_number, above=0, at_most=1, hint="It is a part of the trace.")
        settle(self, fraction=fraction, most_pairs=check_count)

    def most(self) -> int:
        return self.most_pairs

    def count(self, values: Tensor, trace: float) -> int:
        if not len(values):
            return 0
        held = values.double().cumsum(0)
        enough = int((held < self.fraction * trace * (1 - 1e-6)).sum()) + 1
        if enough > min(len(values), self.most_pairs):
            here = min(len(values), self.most_pairs)
            self.warn_if_short(float(held[here - 1]) / trace if trace else 1.0, f"top {here} eigenpairs hold")
            return here
        return enough

    def warn_if_short(self, share: float, what: str) -> None:
        if share < self.fraction * (1 - 1e-3):
            warnings.warn(
                f"The {what} {share:.1%} of the trace, not {self.fraction:.1%}. "
                "Raise Energy(most_pairs=...) to keep more.",
                UserWarning,
                stacklevel=outside(),
            )

    def is_enough(self, values: Tensor, trace: float) -> bool:
        return super().is_enough(values, trace) or float(values.double().sum()) >= self.fraction * trace

    def corner(self, values: Tensor) -> tuple[int, int]:
        held = values.double().cumsum(0).cumsum(1)
        enough = held >= self.fraction * held[-1, -1] * (1 - 1e-6)
        rows, columns = (torch.arange(1, min(n, self.most_pairs) + 1, device=values.device) for n in values.shape)
        together = (rows[:, None] + columns).where(enough[: len(rows), : len(columns)], sum(values.shape) + 1)
        row, column = divmod(int(together.argmin()), len(columns))
        return (row + 1, column + 1) if enough[row, column] else (len(rows), len(columns))
