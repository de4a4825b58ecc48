"""Mean and standard deviation over seeds."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Summary:
    """The mean of n values and their sample standard deviation, which a single value has not."""

    mean: float
    std: float | None
    n: int


def summarise(values: Iterable[float]) -> Summary:
    """Mean and sample standard deviation, (1/(n − 1)) Σ (x − mean)² under the root.

    >>> summarise([1.0, 2.0, 3.0])
    Summary(mean=2.0, std=1.0, n=3)
    """
    numbers = np.asarray(list(values), dtype=np.float64)
    if not numbers.size:
        raise ValueError("There is no value to summarise. Ask `Results.select` first whether there are rows.")
    with np.errstate(all="ignore"):  # a run that diverged gives an infinite or undefined mean, and a table that says so
        std = float(numbers.std(ddof=1)) if numbers.size > 1 else None
        return Summary(float(numbers.mean()), std, int(numbers.size))
