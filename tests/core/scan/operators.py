"""Every differentiable operator of torch's own database in a model of one operation: prints what is wrong and refused.

    python operators.py [names of operators]

The parameters, scaled by each example, go through the operator and are summed into three outputs. Rows and products are
compared with plain reverse mode, example by example, and with its finite differences. Run on its own, because importing
the database changes torch's global flags.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_curv.core import EmpiricalRisk, Hessian
from avalanche_curv.core.risk.jacobians import parameters_of, pulled_back

LARGEST, SAMPLES, CANDIDATES, ROWS, STEP = 500, 2, 8, 2, 1e-5
TOLERANCE, OF_DIFFERENCES = 1e-7, 1e-4  # relative to the largest entry


class Operator(nn.Module):
    """Three sums of op(s θ) for each example s."""

    def __init__(self, call: Callable[[Tensor], Any], start: Tensor) -> None:
        super().__init__()
        self.call, self.theta = call, nn.Parameter(start.detach().clone())

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack([self.sums(self.call(self.theta * row[0])) for row in inputs])

    def sums(self, found: Any) -> Tensor:
        parts = [found] if isinstance(found, Tensor) else [part for part in found if isinstance(part, Tensor)]
        real = [torch.view_as_real(p.resolve_conj()) if p.is_complex() else p for p in parts]
        flat = torch.cat([p.reshape(-1) for p in real if p.dtype == torch.float64])
        weights = torch.linspace(1, 9, 3 * len(flat)).to(flat).sin().view(len(flat), 3)
        return flat @ weights


def rows_one_by_one(model: Operator, inputs: Tensor, cotangents: Tensor) -> Tensor:
    rows = []
    for x, columns in zip(inputs, cotangents):
        outputs = model(x[None])[0]
        found = [torch.autograd.grad(outputs, model.theta, c, retain_graph=True)[0] for c in columns.T]
        rows += [part.to_dense().reshape(-1) for part in found]
    return torch.stack(rows).view(len(inputs), cotangents.shape[2], -1)


def gradient(model: Operator, inputs: Tensor, targets: Tensor, theta: Tensor) -> Tensor:
    """Of the mean of the squared errors, one example after the other."""
    moved = Operator(model.call, theta)
    losses = [(moved(x[None])[0] - y).square().mean() for x, y in zip(inputs, targets)]
    return sum(torch.autograd.grad(loss, moved.theta)[0] for loss in losses) / len(losses)


def bend(model: Operator, inputs: Tensor, targets: Tensor, along: Tensor) -> Tensor | None:
    """The product of the Hessian with `along` by differences; None where those of two steps disagree, as at a kink."""
    found = []
    for h in (STEP, STEP / 3):
        ends = (gradient(model, inputs, targets, model.theta.detach() + s * h * along) for s in (1, -1))
        found.append(next(ends).sub(next(ends)) / (2 * h))
    return found[0] if distance(*found) < OF_DIFFERENCES / 10 else None


def distance(found: Tensor, exact: Tensor) -> float:
    if not (found.isfinite().all() and exact.isfinite().all()):
        return float("inf")
    return float((found - exact).abs().max() / exact.abs().max().clamp_min(1e-3))


def compared(model: Operator) -> Iterator[str]:
    """What is wrong with the rows and the products of one model; raises where they are refused."""
    inputs = torch.tensor([[1.0], [0.95]], dtype=torch.float64)
    cotangents = torch.linspace(1, 5, 2 * 3 * ROWS).double().cos().view(2, 3, ROWS)
    exact = rows_one_by_one(model, inputs, cotangents)
    if not exact.isfinite().all():
        return
    targets = model(inputs).detach() + torch.tensor([0.3, -0.2, 0.1]).double()
    risk = EmpiricalRisk.snapshot(model, nn.MSELoss(), [(inputs, targets)])
    with torch.no_grad():
        far = distance(pulled_back(risk, parameters_of(risk), inputs, cotangents), exact)
    if far > TOLERANCE:
        yield f"rows off by {far:.2g}"
    along = torch.linspace(1, 7, model.theta.numel()).double().sin().view_as(model.theta)
    product = bend(model, inputs, targets, along)
    if product is not None:
        far = distance(Hessian().operator(risk).matmat(along.reshape(-1, 1))[:, 0], product.reshape(-1))
        if far > OF_DIFFERENCES:
            yield f"Hessian off by {far:.2g}"


def models(op: Any) -> Iterator[Operator]:
    """Models of the first few samples of an operator that are small, differentiable and the same every time."""
    found = 0
    for number, sample in enumerate(op.sample_inputs("cpu", torch.float64, requires_grad=False)):
        if found == SAMPLES or number == CANDIDATES:
            return
        start = sample.input
        if not (isinstance(start, Tensor) and start.dtype == torch.float64 and 0 < start.numel() <= LARGEST):
            continue
        model = Operator(lambda theta, s=sample: op.op(theta, *s.args, **s.kwargs), start)
        try:
            outputs = model(torch.ones(1, 1).double())
            torch.autograd.grad(outputs.sum(), model.theta)
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
            continue  # no derivative, or no output of floating type
        if torch.equal(outputs, model(torch.ones(1, 1).double())):
            found += 1
            yield model


def main(names: list[str]) -> None:
    from torch.testing._internal.common_methods_invocations import op_db

    warnings.simplefilter("ignore")
    report: dict[str, list[str]] = {"right": [], "refused": [], "wrong": []}
    for op in op_db:
        if not op.supports_autograd or torch.float64 not in op.supported_dtypes("cpu"):
            continue
        if names and op.name not in names:
            continue
        torch.manual_seed(0)
        name = f"{op.name} {op.variant_test_name}".strip()
        try:
            tried = list(models(op))
        except Exception as error:  # the database itself needs what is not installed
            print(f"not tried: {name}: {type(error).__name__}", file=sys.stderr)
            continue
        for model in tried:
            try:
                wrong = list(compared(model))
            except (TypeError, ValueError) as error:
                report["refused"].append(f"{name}: {str(error)[:200]}")
            except Exception as error:
                report["wrong"].append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            else:
                report["wrong"] += [f"{name}: {part}" for part in wrong]
                report["right"] += [] if wrong else [name]
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
