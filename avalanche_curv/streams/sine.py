"""A nonlinear boundary in the plane, met slice by slice: the stream whose answers can be drawn."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from avalanche.benchmarks import CLScenario

from avalanche_curv.core.options import is_count, is_number
from avalanche_curv.streams._benchmark import Examples, benchmark, check_length, check_stream_seed, split_by_class

LEFT, RIGHT = -5.0, 5.0
FEWEST = 10


def SineBoundary(
    n_experiences: int = 9, *, examples: int = 250, noise: float = 0.5, seed: int | None = None
) -> CLScenario:
    """Two classes on either side of x₂ = sin(x₁); experience t sees the t-th of n equal slices of x₁ ∈ [-5, 5].

    x₁ ~ U(slice t), x₂ = sin(x₁) + s|ε| with ε ~ N(0, noise²), s = -1 for class 0 and s = +1 for class 1. Each
    experience has `examples` examples, half of either class (an odd one goes to class 0); of each class a fifth is
    the test experience. Inputs are float32 of shape [2]. Domain-incremental: both classes in every experience, one
    head of two logits, task label 0. `seed=None` draws from the system's entropy; global random states are not used.

    Raises ValueError for n_experiences < 1, noise < 0 and examples < 10.

    >>> stream = SineBoundary(4, seed=0)
    >>> x1 = torch.stack([x for x, *_ in stream.train_stream[0].dataset])[:, 0]
    >>> len(x1), len(stream.test_stream[0].dataset), bool((x1 >= -5).all() and (x1 <= -2.5).all())
    (200, 50, True)
    """
    check_length(n_experiences)
    check_stream_seed(seed)
    if not is_count(examples) or examples < FEWEST:
        raise ValueError(
            f"An experience of SineBoundary needs examples >= {FEWEST}, so that either class is in both its training "
            f"and its test part; got {examples!r}. Ask for more."
        )
    if not is_number(noise) or noise < 0:
        raise ValueError(f"noise is a standard deviation, finite and >= 0; got {noise!r}. Use 0 to stay on the curve.")
    rng = np.random.default_rng(seed)
    edges = np.linspace(LEFT, RIGHT, n_experiences + 1).tolist()
    splits = []
    for left, right in pairwise(edges):
        drawn = _slice(left, right, examples, noise, rng)
        train, test = split_by_class(drawn.targets, rng)
        splits.append((drawn.at(train), drawn.at(test)))
    return benchmark(splits, task_labels=[0] * n_experiences, n_classes=2)


def _slice(left: float, right: float, count: int, noise: float, rng: np.random.Generator) -> Examples:
    targets = rng.permutation(np.arange(count) % 2)
    x1 = rng.uniform(left, right, count)
    x2 = np.sin(x1) + (2 * targets - 1) * np.abs(rng.normal(0, noise, count))
    return Examples(torch.from_numpy(np.stack([x1, x2], axis=1)).float(), torch.from_numpy(targets))
