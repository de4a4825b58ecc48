"""λ in five runs, as the README says: one at 100, and the four that it suggests; the best on held-out images is kept.

    python -m benchmarks.examples.choose_strength --dataset-root DIR [--seed 0] [--optimizer adam] [--first 5] [--grid]

Split MNIST, task-incremental, 2,000 training images a task. The five runs are of the first five tasks, all there are,
or of fewer (`--first 3`), of which the best goes on. With `--grid` thirteen half-decades are run besides, to see what
the five have missed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from avalanche.benchmarks import tensors_benchmark
from avalanche.models import MTSimpleMLP
from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor
from torchvision.datasets import MNIST

from avalanche_curv import CurvatureEWC, choose_strength
from avalanche_curv.metrics.training_accuracy import training_accuracy

TRAINING, HELD_OUT = 2000, 500
Images = list[tuple[Tensor, Tensor]]
"""(images, digits) of each task."""


@dataclass(frozen=True)
class Options:
    dataset_root: Path
    seed: int = 0
    optimizer: Literal["sgd", "adam"] = "sgd"
    first: int = 5
    grid: bool = False


def tasks(options: Options) -> tuple[Images, Images, Images]:
    """Training, held-out and test images of five pairs of digits."""
    whole = (MNIST(str(options.dataset_root), train=training) for training in (True, False))
    (images, digits), (test_images, test_digits) = ((data.data.flatten(1) / 255, data.targets) for data in whole)
    generator, found = torch.Generator().manual_seed(options.seed), (Images(), Images(), Images())
    for pair in torch.randperm(10, generator=generator).split(2):
        here, test = torch.isin(digits, pair).nonzero()[:, 0], torch.isin(test_digits, pair)
        kept = here[torch.randperm(len(here), generator=generator)][: TRAINING + HELD_OUT].split([TRAINING, HELD_OUT])
        parts = [*((images[part], digits[part]) for part in kept), (test_images[test], test_digits[test])]
        for where, part in zip(found, parts):
            where.append(part)
    return found


def stream(parts: Images) -> list:
    """The experiences, each with its own task label."""
    return [*tensors_benchmark(parts, parts, task_labels=[*range(len(parts))]).train_stream]


def main(options: Options) -> None:
    training, held_out, test = map(stream, tasks(options))

    def make(strength: float) -> CurvatureEWC:
        torch.manual_seed(options.seed)
        model = MTSimpleMLP(input_size=784, hidden_size=100)
        adam = options.optimizer == "adam"
        optimizer = torch.optim.Adam(model.parameters()) if adam else torch.optim.SGD(model.parameters(), lr=0.1)
        return CurvatureEWC(
            model=model, optimizer=optimizer, strength=strength, train_mb_size=64, train_epochs=3, guard=None,
            evaluator=EvaluationPlugin(),
        )  # fmt: skip

    chosen = choose_strength(make, training[: options.first], held_out[: options.first])
    for strength, accuracy in chosen.scores.items():
        print(f"λ = {strength:<8.4g} held out {accuracy:.4f}")
    for experience in training[options.first :]:
        chosen.strategy.train(experience)
    accuracy = sum(training_accuracy(chosen.strategy, one) for one in test) / len(test)
    print(f"kept: λ = {chosen.strength:.4g}, test accuracy {accuracy:.4f}")
    if options.grid:
        best = choose_strength(make, training, test, strengths=[10 ** (power / 2) for power in range(-2, 11)])
        above = max(0.0, best.scores[best.strength] - accuracy)
        print(f"best on the test images: λ = {best.strength:.4g}, {above:.4f} above it")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__.partition("\n")[0]))
