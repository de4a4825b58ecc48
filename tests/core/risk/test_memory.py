"""Peak memory of estimates beside that of training, each in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

STATUS = Path("/proc/self/status")

SETUP = """
import gc
from pathlib import Path
import torch
from torch import nn
from torchvision.models import resnet18
from avalanche_curv import Diagonal, EmpiricalFisher, EmpiricalRisk, estimate

torch.set_num_threads(1)
torch.manual_seed(0)
model, criterion = resnet18(num_classes=10), nn.CrossEntropyLoss()
images = torch.randint(256, (160, 3, 32, 32), dtype=torch.uint8)  # two batches and a half
labels = torch.randint(10, (160,))

class Lazy:
    examples = len(labels)

    def __iter__(self):
        for x, y in zip(images.split(64), labels.split(64)):
            yield x.float() / 255, y

def megabytes(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024

gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # forget the peak
before = megabytes("VmRSS")
"""

REPORT = """
print(megabytes("VmHWM") - before, sum(p.nbytes for p in model.parameters()) / 2**20)
"""

PLAIN = """
x, y = next(iter(Lazy()))
torch.autograd.grad(criterion(model(x), y), list(model.parameters()))
"""

ESTIMATE = """
risk = EmpiricalRisk.snapshot(model, criterion, Lazy())
matrix = estimate(EmpiricalFisher(), Diagonal(), risk).curvature
assert matrix.values.min() >= 0 < matrix.values.max()
"""


def printed(work):
    """What work takes at its peak in a fresh process, and the model, in MiB."""
    run = subprocess.run([sys.executable, "-c", SETUP + work + REPORT], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return map(float, run.stdout.split())


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="peaks are read from /proc")
def test_a_diagonal_takes_at_most_three_times_the_memory_of_one_training_step():
    """Per-example gradients of 64 images would take 2.8 GiB."""
    (plain, model), (found, _) = printed(PLAIN), printed(ESTIMATE)
    print(f"model {model:.0f} MiB, one gradient pass {plain:.0f} MiB, estimate {found:.0f} MiB")
    assert found <= 3 * (model + plain)
