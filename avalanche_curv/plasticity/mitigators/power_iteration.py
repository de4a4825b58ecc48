"""The largest singular value of many matrices at once, followed from step to step."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

START = 15  # iterations for a matrix that is new or has grown
STIRRED = 1e-3  # length of the noise, against the vector's


@dataclass(eq=False)
class SingularPair:
    """Approximate leading singular vectors of a matrix, of length 1."""

    u: Float[Tensor, "out"]
    v: Float[Tensor, "in"]


def fitting(pair: SingularPair | None, matrix: Float[Tensor, "out in"], name: str, seed: int) -> SingularPair:
    """`pair` where it has the matrix's shape; otherwise one after 15 iterations.

    They start from random vectors that depend on `seed` and the name alone, or, for a matrix that has grown by rows,
    from the vector u it had, continued by random entries.
    """
    if pair is not None and (len(pair.u), len(pair.v)) == tuple(matrix.shape):
        return SingularPair(pair.u.to(matrix), pair.v.to(matrix))
    drawn = _generator(seed, name)
    u, v = (torch.randn(n, generator=drawn).to(matrix) for n in matrix.shape)
    u /= u.norm()
    if pair is not None and len(pair.u) < len(u):
        u[: len(pair.u)] = pair.u.to(u)
    new = SingularPair(u / u.norm(), v / v.norm())
    for _ in range(START):
        iterate([matrix], [new])
    return new


def stir(pair: SingularPair, name: str, seed: int) -> None:
    """Add a little noise to u, drawn from `seed` and the name, so that it has a part in every direction.

    The iteration can never reach a direction that u and v have no part in, such as a block of the matrix that was zero
    and is not any more. σ changes by about 1e-6 of itself.
    """
    noise = torch.randn(len(pair.u), generator=_generator(seed, name)).to(pair.u)
    stirred = pair.u + STIRRED * noise / noise.norm()
    pair.u = stirred / stirred.norm()


def iterate(matrices: Sequence[Float[Tensor, "out in"]], pairs: Sequence[SingularPair]) -> Float[Tensor, "n"]:
    """One power iteration for each matrix W: v ← Wᵀu / ‖Wᵀu‖, u ← Wv / ‖Wv‖. Returns the estimates σ₁ ≈ uᵀWv = ‖Wv‖.

    Where Wᵀu or Wv is zero or not finite, the old vector stays. All matrices share one device and dtype.

    >>> pair = Pair(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    >>> iterate([torch.diag(torch.tensor([3.0, 1.0]))], [pair]), pair.v
    (tensor([3.]), tensor([1., 0.]))
    """
    backward, _ = _directions([torch.mv(W.mT, pair.u) for W, pair in zip(matrices, pairs)], [p.v for p in pairs])
    forward, lengths = _directions([torch.mv(W, v) for W, v in zip(matrices, backward)], [p.u for p in pairs])
    for pair, u, v in zip(pairs, forward, backward):
        pair.u, pair.v = u, v
    return lengths


def _directions(vectors: list[Tensor], old: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Each vector by its length, the old direction where that is undefined; and the lengths."""
    norms = torch._foreach_norm(vectors)
    found, lengths = list(torch._foreach_div(vectors, norms)), torch.stack(norms)
    if lengths.is_cpu and all(0 < length < math.inf for length in lengths.tolist()):
        return found, lengths  # on other devices this look would wait for them
    usable = (lengths > 0) & lengths.isfinite()
    return [torch.where(ok, new, kept) for ok, new, kept in zip(usable, found, old)], lengths


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))
