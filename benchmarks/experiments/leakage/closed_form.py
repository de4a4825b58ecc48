"""What one projection after another leaves in subspaces at equal angles, in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Leak:
    """√(E‖V Δ‖² / E‖Δ‖²) of a step, with V the subspace of the first task, and that of all tasks together."""

    first: float
    union: float


def expected(cosine: float, tasks: int, rank: int, dimension: int) -> Leak:
    """Of a step g ~ N(0, I) from which V₁, then V₂, … have been projected out, where V_i V_jᵀ = cosine · I.

    The steps left in a plane are those of k = `rank` copies of unit vectors v_i with the Gram matrix G. With
    b_i = v_i · g ~ N(0, G), the projections take away Σ_i v_i a_i, L a = b, where L is the lower triangle of G with its
    diagonal (they are one sweep of Gauss-Seidel), and leave v_i · Δ = r_i, r = (I − G L⁻¹) b. For two tasks

        E‖V₁ Δ‖² = k c² (1 − c²),  E‖U Δ‖² = k c²,  E‖Δ‖² = k c² + d − 2k.

    Nothing leaks where subspaces are orthogonal, nor where they are the same.

    >>> leak = expected(0.6, tasks=2, rank=1, dimension=3)
    >>> round(leak.first**2 * (0.36 + 1), 4), round(leak.union**2 * (0.36 + 1), 4)        # 0.36 · 0.64, 0.36
    (0.2304, 0.36)
    """
    gram = np.full((tasks, tasks), cosine) + (1 - cosine) * np.eye(tasks)
    left = np.eye(tasks) - gram @ np.linalg.inv(np.tril(gram))
    moments = left @ gram @ left.T
    inside = float(np.trace(np.linalg.pinv(gram, rcond=1e-12, hermitian=True) @ moments))
    total = rank * inside + dimension - rank * tasks  # more where all are the same, but then nothing leaks
    return Leak(math.sqrt(rank * max(0.0, moments[0, 0]) / total), math.sqrt(rank * max(0.0, inside) / total))
