"""Elastic weight consolidation on several processes: two tasks of digits, with and without the penalty.

    torchrun --nproc-per-node 2 -m benchmarks.distributed_ewc

Each process has a part of every batch and of the past examples, and keeps its share of anchor and Fisher. At the end
the first one repeats the training alone and prints how far its parameters are from those of all. It runs on GPUs
(nccl) where there are some, else on CPUs (gloo), and also as a single process: python -m benchmarks.distributed_ewc.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from avalanche_curv.core import Diagonal, EmpiricalRisk, Fisher, estimate
from avalanche_curv.core.distributed import ShardedQuadratic, ShardedRisk, estimate_sharded

STEPS, BATCH, RATE, STRENGTH = 600, 64, 0.1, 30.0
PIXELS, HIDDEN, CLASSES, TRAINING = 64, 100, 10, 1437


class Task(NamedTuple):
    """Digits to train on, and others to test on."""

    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor


Past = Callable[[nn.Module], Tensor]
"""The penalty that stands for the first task."""


def tasks(device: torch.device) -> tuple[Task, Task]:
    """The digits of scikit-learn, and the same with pixels in another order."""
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    x, y = torch.as_tensor(images / 16, device=device), torch.as_tensor(digits, device=device)
    pixels = torch.randperm(PIXELS, generator=torch.Generator().manual_seed(1)).to(device)
    first, second = (
        Task(z[:TRAINING], y[:TRAINING], z[TRAINING:], y[TRAINING:]) for z in (x, x[:, pixels])
    )
    return first, second


def network(device: torch.device) -> nn.Module:
    """The same perceptron on every process, in float64."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)).to(device, torch.float64)


def learn(model: nn.Module, task: Task, past: Past | None, *, rank: int = 0, ranks: int = 1) -> None:
    """SGD on the mean loss of each batch, of which this process has a part; gradients are averaged over processes."""
    optimizer, generator = torch.optim.SGD(model.parameters(), lr=RATE), torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        own = torch.randint(len(task.targets), (BATCH,), generator=generator)[rank::ranks].to(task.targets.device)
        loss = ranks / BATCH * cross_entropy(model(task.inputs[own]), task.targets[own], reduction="sum")
        optimizer.zero_grad()
        (loss if past is None else loss + past(model)).backward()
        optimizer.step()


def together(task: Task, model: nn.Module, rank: int, ranks: int) -> Past:
    """The penalty from the examples of all processes; each keeps its share of anchor and matrix."""
    own = [part.tensor_split(ranks)[rank] for part in (task.inputs, task.targets)]
    risk = ShardedRisk.snapshot(model, nn.CrossEntropyLoss(), [(own[0], own[1])])
    return ShardedQuadratic.of(estimate_sharded(Fisher(), Diagonal(), risk)).scaled(STRENGTH).penalty


def alone(task: Task, model: nn.Module) -> Past:
    """The same from all examples in one process."""
    risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(task.inputs, task.targets)])
    return estimate(Fisher(), Diagonal(), risk).scaled(STRENGTH).penalty


def accuracy(model: nn.Module, task: Task) -> float:
    """The share of test digits that are recognised."""
    with torch.no_grad():
        return float((model(task.test_inputs).argmax(1) == task.test_targets).double().mean())


def run(device: torch.device, rank: int, ranks: int) -> list[str]:
    """Trains on both tasks, with and without the penalty, and says what came of it."""
    first, second = tasks(device)
    lines = []
    for name, keep in (("without penalty", False), (f"with penalty {STRENGTH:g}", True)):
        model = DistributedDataParallel(network(device))
        learn(model, first, None, rank=rank, ranks=ranks)
        learn(model, second, together(first, model, rank, ranks) if keep else None, rank=rank, ranks=ranks)
        lines.append(f"{name}: first task {accuracy(model, first):.3f}, second task {accuracy(model, second):.3f}")
    if rank == 0:
        repeated = network(device)
        learn(repeated, first, None)
        learn(repeated, second, alone(first, repeated))
        gaps = [(p - q).detach().abs().max() for p, q in zip(model.module.parameters(), repeated.parameters())]
        lines.append(f"largest difference of a parameter to one process: {float(torch.stack(gaps).max()):.1e}")
    return lines


def main() -> None:
    """Starts the process group that torchrun describes, or one of this process alone."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        if "RANK" in os.environ:
            distributed.init_process_group(backend)
        else:
            meeting = (Path(folder) / "meeting").as_uri()
            distributed.init_process_group(backend, init_method=meeting, rank=0, world_size=1)
        rank, ranks = distributed.get_rank(), distributed.get_world_size()
        lines = run(device, rank, ranks)
        if rank == 0:
            print(f"{ranks} process{'es' if ranks > 1 else ''}, {backend} on {device.type}")
            print("\n".join(lines))
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
