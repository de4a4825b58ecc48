"""How much of the Hessian of a linear regression lies on its diagonal, measured and on paper."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.harness.experiment import Record

ROWS = 16_384  # of inputs drawn at once


@dataclass(frozen=True)
class Inputs:
    """D normal features of variance 1 with a common mean and a common correlation: x_i = mean + √ρ s + √(1 − ρ) z_i."""

    mean: float = 0.0
    correlation: float = 0.0

    def draw(self, count: int, dimension: int, generator: np.random.Generator) -> np.ndarray:
        """`count` examples as rows."""
        own = math.sqrt(1 - self.correlation) * generator.standard_normal((count, dimension))
        return self.mean + math.sqrt(self.correlation) * generator.standard_normal((count, 1)) + own

    @property
    def diagonal(self) -> float:
        """E[x_i²] = 1 + mean²."""
        return 1 + self.mean**2

    @property
    def product(self) -> float:
        """E[x_i x_j] = ρ + mean², for i ≠ j."""
        return self.correlation + self.mean**2

    @property
    def product_variance(self) -> float:
        """Var(x_i x_j) = 1 + ρ² + 2 mean² (1 + ρ), for i ≠ j (Isserlis)."""
        return 1 + self.correlation**2 + 2 * self.mean**2 * (1 + self.correlation)


INPUTS = {
    "standard normal": Inputs(),
    "correlation 0.5": Inputs(correlation=0.5),
    "mean 1": Inputs(mean=1.0),
}


def hessian(inputs: Inputs, count: int, dimension: int, generator: np.random.Generator) -> np.ndarray:
    """H = (2/M) XᵀX, of the mean squared error of a linear regression on M = `count` examples."""
    total = np.zeros((dimension, dimension))
    for start in range(0, count, ROWS):
        part = inputs.draw(min(ROWS, count - start), dimension, generator)
        total += part.T @ part
    return 2 / count * total


def ratio(matrix: np.ndarray) -> float:
    """Σ_i |H_ii| / Σ_ij |H_ij|.

    >>> ratio(np.array([[2.0, -1.0], [-1.0, 2.0]])).__round__(3)
    0.667
    """
    sizes = np.abs(matrix)
    return float(np.trace(sizes) / sizes.sum())


def expected_ratio(inputs: Inputs, count: float, dimension: int) -> float:
    """The ratio on paper: E|H_ii| / (E|H_ii| + (D − 1) E|H_ij|).

    H_ij / 2 is the mean of M products x_i x_j, nearly normal with mean c and deviation s, so that
    E|H_ij| / 2 = s √(2/π) exp(−c²/2s²) + c erf(c / s√2). For standard normal inputs c = 0 and s = 1/√M:
    1 / (1 + (D − 1) √(2/(πM))). For others c is what remains as M → ∞.

    >>> expected_ratio(Inputs(), 2 / math.pi, 2), expected_ratio(Inputs(correlation=0.5), math.inf, 3)
    (0.5, 0.5)
    """
    centre, spread = inputs.product, math.sqrt(inputs.product_variance / count)
    if spread == 0:
        folded = abs(centre)
    else:
        folded = spread * math.sqrt(2 / math.pi) * math.exp(-(centre**2) / (2 * spread**2))
        folded += centre * math.erf(centre / (spread * math.sqrt(2)))
    return inputs.diagonal / (inputs.diagonal + (dimension - 1) * folded)


def measure(inputs: Inputs, sizes: tuple[tuple[int, int], ...], seed: int) -> Iterator[Record]:
    """The measured ratio at each (M, D)."""
    generator = np.random.default_rng(seed)
    for count, dimension in sizes:
        value = ratio(hessian(inputs, count, dimension, generator))
        yield {"metric": "ratio", "value": value, "examples": count, "dimension": dimension}


def explained(values: np.ndarray, predictions: np.ndarray) -> float:
    """R² = 1 − Σ (y − ŷ)² / Σ (y − ȳ)²; negative where the mean of the values predicts better.

    >>> explained(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 4.0]))
    0.5
    """
    return float(1 - np.square(values - predictions).sum() / np.square(values - values.mean()).sum())


def fitted(values: np.ndarray, *columns: np.ndarray) -> np.ndarray:
    """The least-squares combination of some columns, as predictions."""
    design = np.stack(columns, axis=1)
    return design @ np.linalg.lstsq(design, values, rcond=None)[0]
