"""Models as people write them: each curvature, structure and measure of every one is right or refused.

What single operators of torch do is in `test_operators`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample, linear
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.utils.checkpoint import checkpoint

VECTOR, SEQUENCE, IMAGE = (4,), (3, 4), (1, 4, 4)


class Model(nn.Module):
    """Linear layers a [4 → 4] and b [4 → 3], a tensor t [4, 4], and what a function makes of them for inputs x."""

    def __init__(self, function: Callable[[Model, Tensor], Tensor], **more: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.t = nn.Linear(4, 4), nn.Linear(4, 3), nn.Parameter(torch.eye(4))
        self.function = function
        for name, module in more.items():
            self.add_module(name, module)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(self, inputs)


class Doubled(torch.autograd.Function):
    """x³ with a derivative of its own, without a rule for `vmap`."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class Mappable(torch.autograd.Function):
    """x³ with a derivative of its own and a rule for `vmap`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class Once(torch.autograd.Function):
    """x³ whose derivative is computed where autograd does not look."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class Silent(torch.autograd.Function):
    """x³ whose derivative holds x as a constant: its second derivative is silently zero."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return 3 * ctx.x**2 * gradient


def tied() -> nn.Module:
    model = Model(lambda m, x: m.b(m.c(m.a(x).tanh()).tanh()), c=nn.Linear(4, 4))
    model.c.weight = model.a.weight
    return model


def under_two_names() -> nn.Module:
    model = Model(lambda m, x: m.b(m.a(x).tanh()))
    model.again = model.a
    return model


def hooked(kind: str, hook: Callable, module: str = "a") -> nn.Module:
    model = Model(lambda m, x: m.b(m.a(x).tanh()))
    getattr(getattr(model, module), f"register_{kind}")(hook)
    return model


def hooked_chain(kind: str, hook: Callable) -> nn.Module:
    between = nn.Tanh() if kind == "forward_pre_hook" else nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), between, nn.Linear(4, 3))
    getattr(model[0], f"register_{kind}")(hook)
    return model


def frozen() -> nn.Module:
    model = Model(lambda m, x: m.b(m.a(x).tanh() @ m.t))
    model.a.weight.requires_grad_(False)
    return model


def routed_by_example(m: Model, x: Tensor) -> Tensor:
    chosen = x[:, 0] > 0
    h = torch.zeros_like(x)
    h[chosen], h[~chosen] = m.a(x[chosen]), m.c(x[~chosen])
    return m.b(h.tanh())


def routed_by_token(m: Model, x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    h = torch.zeros_like(flat)
    for expert, own in enumerate((m.a, m.c)):
        at = (flat[:, 0] > 0).long().eq(expert).nonzero()[:, 0]
        h = h.index_add(0, at, own(flat[at]) * flat[at, 1:2].sigmoid())
    return m.b(h.view_as(x).tanh().mean(1))


def branching(m: Model, x: Tensor) -> Tensor:
    rows = [m.a(row) if row.sum() > 0 else m.c(row).sin() for row in x]
    return m.b(torch.stack(rows).tanh())


def last_rarely(m: Model, x: Tensor) -> Tensor:
    """Only the last of the examples takes the other path."""
    rare = (x[:, :1] < x.new_tensor(-1.0)).to(x)
    return m.b(m.a(x).tanh() + rare * m.a(m.a(x)))


def class_token(m: Model, x: Tensor) -> Tensor:
    tokens = torch.cat([m.t[:1].expand(len(x), 1, 4), x], dim=1)
    weights = (tokens @ m.a(tokens).mT).softmax(2)
    return m.b((weights @ tokens)[:, 0])


def written_in_place(m: Model, x: Tensor) -> Tensor:
    h = m.a(x).clone()
    h[:, 0] *= 2
    h[:, 1:].add_(x[:, :1] * m.t[0, 1:])
    return m.b(h.tanh_() * m.t[0])


def positive(m: Model, x: Tensor) -> Tensor:
    """A positive definite matrix of each example."""
    h = m.a(x)
    return torch.einsum("ni,nj->nij", h, h) + m.t @ m.t.T + torch.eye(4).to(x)


def solved(m: Model, x: Tensor) -> Tensor:
    return m.b(torch.linalg.solve(positive(m, x), m.a(x)[:, :, None])[:, :, 0])


def sampled(m: Model, x: Tensor) -> Tensor:
    grid = (x.flatten(1)[:, :8] @ m.c.weight.view(-1)[:64].view(8, 8)).tanh().view(-1, 2, 2, 2)
    return m.b(grid_sample(x, grid, align_corners=False).flatten(1))


def spectrum(m: Model, x: Tensor) -> Tensor:
    modes = torch.fft.rfft(m.a(x), dim=1)
    return m.b(torch.cat([modes.real[:, :2], (modes * modes.conj()).real[:, :2]], dim=1))


def scattered(m: Model, x: Tensor) -> Tensor:
    h = m.a(x)
    to = torch.tensor([2, 0, 0, 1]).expand(len(x), 4)
    return m.b((torch.zeros_like(h).scatter_add(1, to, h) + h.gather(1, to)).tanh())


def bucketed(m: Model, x: Tensor) -> Tensor:
    bucket = torch.bucketize(x[:, 0].detach(), torch.tensor([-1.0, 0, 1]).to(x))
    return m.b(m.a(x).tanh() + nn.functional.one_hot(bucket, 4).to(x) @ m.t)


def mapped_over_positions(m: Model, x: Tensor) -> Tensor:
    return m.b(torch.func.vmap(lambda row: torch.tanh(m.a(row)).mean(0))(x))


def energy_gradient(m: Model, x: Tensor) -> Tensor:
    """The gradient of a scalar of the inputs, by torch.func, as models of energies have it."""
    return m.b(torch.func.vmap(torch.func.grad(lambda row: m.a(row).tanh().square().sum()))(x))


def autograd_inside(m: Model, x: Tensor) -> Tensor:
    """The same by autograd."""
    with torch.enable_grad():
        inner = x.detach().requires_grad_()
        energy = m.a(inner).tanh().square().sum()
        return m.b(torch.autograd.grad(energy, inner, create_graph=True)[0])


def remembering(m: Model, x: Tensor) -> Tensor:
    m.last = m.a(x).tanh()
    return m.b(m.last)


def counting(m: Model, x: Tensor) -> Tensor:
    m.calls += 1
    return m.b(m.a(x).tanh())


def counted() -> nn.Module:
    model = Model(counting)
    model.register_buffer("calls", torch.zeros(()))
    return model


class LoRA(nn.Linear):
    """A linear layer with a low-rank correction, as a subclass."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.down, self.up = nn.Parameter(torch.ones(1, 4)), nn.Parameter(torch.ones(4, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) + inputs @ self.down.T @ self.up.T


class Standardised(nn.Conv2d):
    """A convolution with standardised weights, as a subclass."""

    def forward(self, inputs: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.square().mean((1, 2, 3), keepdim=True) + 0.1).sqrt()
        return self._conv_forward(inputs, weight, self.bias)


def empty_and_scalar() -> nn.Module:
    model = Model(lambda m, x: m.b(m.a(x).tanh() * m.s) + m.nothing.sum())
    model.s, model.nothing = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.zeros(0))
    return model


def compiled() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))


def traced() -> nn.Module:
    return torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))


def elementwise(function: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return partial(Model, lambda m, x: m.b(function(m.a(x))))


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] | int = VECTOR
    refused: str = ""


def of(function: Callable[[Model, Tensor], Tensor], shape: tuple[int, ...] = VECTOR, **layers: tuple[int, int]) -> Case:
    return Case(lambda: Model(function, **{name: nn.Linear(*size) for name, size in layers.items()}), shape)


def chain(changed: Callable[[nn.Module], nn.Module]) -> Case:
    return Case(lambda: nn.Sequential(changed(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3)))


CASES = {
    "class token": of(class_token, SEQUENCE),
    "tied weights": Case(tied),
    "a layer called twice": of(lambda m, x: m.b(m.a(m.a(x).tanh()).tanh())),
    "a layer under two names": Case(under_two_names),
    "a layer and its weight used elsewhere": of(lambda m, x: m.b(m.a(x).tanh() @ m.a.weight)),
    "a layer bypassed": of(lambda m, x: m.b(linear(x, m.a.weight, m.a.bias).tanh())),
    "unused parameters": of(lambda m, x: m.b(x).tanh()),
    "frozen parameters": Case(frozen),
    "parameters of no axis and of no entry": Case(empty_and_scalar),
    "mapped by vmap": of(lambda m, x: m.b(torch.func.vmap(m.a)(x).tanh())),
    "mapped over positions": of(mapped_over_positions, SEQUENCE),
    "gradient of an energy, torch.func": of(energy_gradient),
    "gradient of an energy, autograd": of(autograd_inside),
    "routing by example": of(routed_by_example, c=(4, 4)),
    "routing by token": of(routed_by_token, SEQUENCE, c=(4, 4)),
    "branch on values": of(branching, c=(4, 4)),
    "a rare path": of(last_rarely),
    "hook that changes outputs": Case(lambda: hooked("forward_hook", lambda m, a, out: 2 * out.sin())),
    "hook that keeps outputs": Case(lambda: hooked("forward_hook", lambda m, a, out: setattr(m, "kept", out))),
    "pre-hook that changes inputs": Case(lambda: hooked("forward_pre_hook", lambda m, a: (a[0] ** 2,))),
    "pre-hook on the head": Case(lambda: hooked("forward_pre_hook", lambda m, a: (3 * a[0],), "b")),
    "hook on the outputs, chain": Case(lambda: hooked_chain("forward_hook", lambda m, a, out: out**2)),
    "pre-hook on the inputs, chain": Case(lambda: hooked_chain("forward_pre_hook", lambda m, a: (a[0] ** 2,))),
    "chain, pruned": chain(lambda layer: prune.l1_unstructured(layer, "weight", 0.4)),
    "chain with weight_norm": chain(parametrizations.weight_norm),
    "chain with old weight_norm": chain(old_weight_norm),
    "chain with old spectral_norm": chain(old_spectral_norm),
    "checkpointed": of(lambda m, x: m.b(checkpoint(lambda x: m.a(x).tanh(), x, use_reentrant=False))),
    "checkpointed, reentrant": Case(
        lambda: Model(lambda m, x: m.b(checkpoint(lambda x: m.a(x).tanh(), x.requires_grad_(), use_reentrant=True))),
        refused="torch has no derivative for given parameters of it",
    ),
    "keeps a computed tensor": of(remembering),
    "counts its calls": Case(counted),
    "scripted": Case(compiled, refused="torch copies scripted modules with a graph to the original"),
    "traced": Case(traced),
    "low-rank adapter": Case(lambda: nn.Sequential(LoRA(), nn.Tanh(), nn.Linear(4, 3))),
    "standardised convolution": Case(lambda: nn.Sequential(
        Standardised(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)
    ), IMAGE),
    "residual": of(lambda m, x: m.b(x + m.a(x).tanh())),
    "matrix products with bare tensors": of(lambda m, x: m.b((x @ m.t).tanh())),
    "addmm and baddbmm": of(lambda m, x: m.b(torch.addmm(m.t[0], x, m.t).tanh())),
    "einsum": of(lambda m, x: torch.einsum("nij,ik,cj->nc", x, m.t[:3], m.b.weight), SEQUENCE),
    "written in place": of(written_in_place),
    "Fourier modes": of(spectrum),
    "complex numbers": of(lambda m, x: m.b(torch.view_as_real(
        torch.view_as_complex(m.a(x).view(-1, 2, 2)).exp() * torch.polar(x[:, :2].abs(), x[:, 2:])
    ).flatten(1).tanh())),
    "prototypes": of(lambda m, x: -torch.cdist(m.a(x), m.t[:3])),
    "prototypes, absolute distance": of(lambda m, x: -torch.cdist(m.a(x), m.t[:3], p=1.0)),
    "distances within an example": of(
        lambda m, x: m.b(torch.cdist(m.a(x), m.t[:3]).mean(1)[:, :1] + x[:, 0]), SEQUENCE
    ),
    "sort": of(lambda m, x: m.b(m.a(x).sort(1).values)),
    "scatter and gather": of(scattered),
    "bucketize and one_hot": of(bucketed),
    "grid_sample": of(sampled, IMAGE, c=(8, 8)),
    "linalg.solve": of(solved),
    "autograd.Function": Case(elementwise(Doubled.apply)),
    "autograd.Function with a rule for vmap": Case(elementwise(Mappable.apply)),
    "autograd.Function without a second derivative": Case(elementwise(Once.apply), refused="it has no Hessian"),
    "autograd.Function with a silent derivative": Case(elementwise(Silent.apply), refused="its Hessian is wrong"),
    "scalar from values": of(lambda m, x: m.b(torch.stack([m.a(row) * float(row.sum()) for row in x]))),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_measure_of_this_model_is_right_or_refused(name: str, scan) -> None:
    case = CASES[name]
    report = scan(case.make, case.shape)
    assert not report.wrong, "\n".join(["", *report.wrong])
    assert case.refused or not report.refused, "\n".join(["refused:", *report.refused])
