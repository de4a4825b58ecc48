"""Streams over real digits that need no download: `load_digits` of scikit-learn, which is imported when one is made.

1,797 images of handwritten digits (UCI, Optical Recognition of Handwritten Digits), 8×8 pixels, scaled to [0, 1],
float32, flattened row by row to [64]. Of each of the 10 classes a random fifth is for testing. One `seed` gives the
same split of train and test in every stream here; `seed=None` draws from the system's entropy. Global random states
are not used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from avalanche.benchmarks import CLScenario
from jaxtyping import Int
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import rotate

from avalanche_curv.streams._benchmark import Examples, benchmark, check_length, check_stream_seed, split_by_class

CLASSES = 10
SIDE = 8
WHITE = 16.0  # the largest pixel value in the source


def SplitDigits(n_experiences: int = 5, *, task_labels: bool = False, seed: int | None = None) -> CLScenario:
    """Class-incremental: the 10 digits in random order, 10/n of them in each experience.

    Targets stay the digits 0..9. The task label is 0 throughout, or t in experience t with `task_labels=True`
    (task-incremental, for multi-head models). Inputs are 8×8 images scaled to [0, 1], float32, flattened to [64].

    Raises ImportError without scikit-learn, ValueError if n_experiences is not 1, 2, 5 or 10.

    >>> stream = SplitDigits(5, seed=0)
    >>> sorted(digit for experience in stream.train_stream for digit in experience.classes_in_this_experience)
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    digits = _load()
    check_length(n_experiences)
    check_stream_seed(seed)
    if CLASSES % n_experiences:
        raise ValueError(
            f"SplitDigits gives every experience the same number of the {CLASSES} digits; {n_experiences} experiences "
            "do not divide them. Use n_experiences = 1, 2, 5 or 10."
        )
    rng = np.random.default_rng(seed)
    train, test = _train_and_test(digits, rng)
    groups = torch.from_numpy(rng.permutation(CLASSES)).chunk(n_experiences)
    splits = [(_of_classes(train, group), _of_classes(test, group)) for group in groups]
    return benchmark(splits, [t * task_labels for t in range(n_experiences)], CLASSES)


def PermutedDigits(n_experiences: int = 5, *, seed: int | None = None) -> CLScenario:
    """Domain-incremental: all digits in every experience, under one fixed permutation of the pixels each.

    Pixel j of experience t is pixel π_t(j) of the image; π_0 is the identity, the others are uniform. With one seed, a
    longer stream begins with the shorter one. Inputs are 8×8 images scaled to [0, 1], float32, flattened to [64]; the
    task label is 0 throughout.

    Raises ImportError without scikit-learn, ValueError for n_experiences < 1.

    >>> stream = PermutedDigits(2, seed=0)
    >>> first, second = (experience.dataset[0][0] for experience in stream.test_stream)
    >>> torch.equal(first, second), torch.equal(first.sort().values, second.sort().values)
    (False, True)
    """
    digits = _load()
    check_length(n_experiences)
    check_stream_seed(seed)
    rng = np.random.default_rng(seed)
    train, test = _train_and_test(digits, rng)
    orders = [torch.arange(SIDE**2)]
    orders += [torch.from_numpy(rng.permutation(SIDE**2)) for _ in range(n_experiences - 1)]
    splits = [(_permuted(train, order), _permuted(test, order)) for order in orders]
    return benchmark(splits, [0] * n_experiences, CLASSES)


def RotatedDigits(
    n_experiences: int = 5, *, rotations: Sequence[float] | None = None, seed: int | None = None
) -> CLScenario:
    """Domain-incremental: all digits in every experience, turned by one angle each.

    `rotations` are degrees, counter-clockwise about the centre of the image; by default 180 t/n for experience t.
    Bilinear interpolation; what turns in from outside is 0. Inputs are 8×8 images scaled to [0, 1], float32, flattened
    to [64]; the task label is 0 throughout.

    Raises ImportError without scikit-learn, ValueError for n_experiences < 1 and unless there are as many rotations as
    experiences.

    >>> stream = RotatedDigits(2, rotations=[0, 90], seed=0)
    >>> first, second = (experience.dataset[0][0].view(8, 8) for experience in stream.test_stream)
    >>> torch.allclose(second, first.rot90(), atol=1e-5)
    True
    """
    digits = _load()
    check_length(n_experiences)
    check_stream_seed(seed)
    angles = [180 * t / n_experiences for t in range(n_experiences)] if rotations is None else list(rotations)
    if len(angles) != n_experiences:
        raise ValueError(
            f"RotatedDigits needs one rotation for each of {n_experiences} experiences; got {len(angles)}. Give "
            f"{n_experiences} angles in degrees, or none for equally spaced ones."
        )
    train, test = _train_and_test(digits, np.random.default_rng(seed))
    splits = [(_turned(train, angle), _turned(test, angle)) for angle in angles]
    return benchmark(splits, [0] * n_experiences, CLASSES)


def _load() -> Examples:
    """All digits, in the order of the source. Raises ImportError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "The streams of digits read the images that come with scikit-learn, which is not installed. "
            'Run pip install "avalanche-curv[benchmarks]", or pip install scikit-learn.'
        ) from error
    pixels, targets = load_digits(return_X_y=True)
    return Examples(torch.from_numpy(pixels / WHITE).float(), torch.from_numpy(targets))


def _train_and_test(digits: Examples, rng: np.random.Generator) -> tuple[Examples, Examples]:
    train, test = split_by_class(digits.targets, rng)
    return digits.at(train), digits.at(test)


def _of_classes(digits: Examples, classes: Int[Tensor, "k"]) -> Examples:
    return digits.at(torch.isin(digits.targets, classes).nonzero().squeeze(1))


def _permuted(digits: Examples, order: Int[Tensor, "64"]) -> Examples:
    return Examples(digits.inputs[:, order], digits.targets)


def _turned(digits: Examples, degrees: float) -> Examples:
    images = digits.inputs.view(-1, 1, SIDE, SIDE)
    return Examples(rotate(images, float(degrees), InterpolationMode.BILINEAR).flatten(1), digits.targets)
