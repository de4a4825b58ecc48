"""λ in five runs, as the README says: one at 100, and the four that it suggests; the best on held-out images is kept.

    python -m benchmarks.examples.choose_strength --dataset-root DIR [--seed 0] [--optimizer adam] [--grid]

Split MNIST, task-incremental, 2,000 training images a task. With `--grid` thirteen half-decades are run besides, to see
what the five have missed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from avalanche.benchmarks import tensors_benchmark
from avalanche.models import MTSimpleMLP, avalanche_forward
from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor
from torchvision.datasets import MNIST

from avalanche_curv import CurvatureEWC, suggest_strength
from avalanche_curv.core import NonFiniteCurvatureError

TRAINING, HELD_OUT, FIRST = 2000, 500, 100.0
Images = list[tuple[Tensor, Tensor]]
"""(images, digits) of each task."""


@dataclass(frozen=True)
class Options:
    dataset_root: Path
    seed: int = 0
    optimizer: Literal["sgd", "adam"] = "sgd"
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


def trained(strength: float, training: Images, options: Options) -> CurvatureEWC:
    """The strategy after five tasks of three epochs."""
    torch.manual_seed(options.seed)
    model = MTSimpleMLP(input_size=784, hidden_size=100)
    adam = options.optimizer == "adam"
    optimizer = torch.optim.Adam(model.parameters()) if adam else torch.optim.SGD(model.parameters(), lr=0.1)
    strategy = CurvatureEWC(
        model=model, optimizer=optimizer, strength=strength, train_mb_size=64, train_epochs=3, guard=None,
        evaluator=EvaluationPlugin(),
    )  # fmt: skip
    strategy.train(tensors_benchmark(training, training, task_labels=[*range(len(training))]).train_stream)
    return strategy


@torch.no_grad()
def accuracy(strategy: CurvatureEWC, parts: Images) -> float:
    """The average over the tasks, each with its own head."""
    strategy.model.eval()
    total = 0.0
    for task, (images, digits) in enumerate(parts):
        outputs = avalanche_forward(strategy.model, images, torch.full((len(images),), task))
        total += float((outputs.argmax(1) == digits).float().mean())
    return total / len(parts)


def main(options: Options) -> None:
    training, held_out, test = tasks(options)
    scores: dict[float, tuple[float, float]] = {}  # on held-out and on test images

    def run(strength: float) -> CurvatureEWC:
        strategy = trained(strength, training, options)
        scores[strength] = accuracy(strategy, held_out), accuracy(strategy, test)
        print(f"λ = {strength:<8.4g} held out {scores[strength][0]:.4f}  test {scores[strength][1]:.4f}", flush=True)
        return strategy

    first = run(FIRST)
    suggestion = suggest_strength(first.past, first.optimizer, first.model)
    print(suggestion)
    for strength in {*suggestion.grid} - {FIRST}:
        run(strength)
    chosen = max(scores, key=lambda strength: scores[strength][0])
    print(f"kept: λ = {chosen:.4g}, test accuracy {scores[chosen][1]:.4f}")
    if options.grid:
        for power in range(-2, 11):
            try:
                run(10 ** (power / 2))
            except NonFiniteCurvatureError:
                print(f"λ = {10 ** (power / 2):<8.4g} diverged")
        best = max(scores, key=lambda strength: scores[strength][1])
        print(f"best on the test images: λ = {best:.4g}, {scores[best][1] - scores[chosen][1]:.4f} above it")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__.partition("\n")[0]))
