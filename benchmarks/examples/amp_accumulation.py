"""Plain PyTorch: bfloat16 autocast, a gradient scaler, and gradients accumulated over four batches."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from avalanche_curv.core import CurvatureRegularizer, Kronecker


def tasks() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Digits, then the same with their pixels in another order."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)
    return [(images, labels), (images[:, torch.randperm(64)], labels)]


def accuracies(strength: float) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), torch.amp.GradScaler("cpu")
    criterion, regularizer = nn.CrossEntropyLoss(), CurvatureRegularizer(strength, structure=Kronecker())
    regularizer.attach(optimizer, model)  # adds strength ∇q once a step, however many backward passes that has
    data = tasks()
    for inputs, targets in data:
        batches = list(zip(inputs[:-300].split(32), targets[:-300].split(32)))
        for number, (some, labels) in enumerate(5 * batches, start=1):
            with torch.autocast("cpu", torch.bfloat16):
                loss = criterion(model(some), labels) / 4
            scaler.scale(loss).backward()
            if number % 4 == 0:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # of the task's gradients alone
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        regularizer.absorb(model, criterion, batches)
    return [float((model(x[-300:]).argmax(1) == y[-300:]).float().mean()) for x, y in data]


if __name__ == "__main__":
    for strength in 0.0, 10.0:
        first, second = accuracies(strength)
        print(f"strength {strength:g}: accuracy {first:.3f} on the first task, {second:.3f} on the second")
