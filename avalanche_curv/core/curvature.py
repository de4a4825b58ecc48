"""Curvature kinds: which symmetric matrix stands for the second derivative of the past loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from avalanche_curv.core._curvlinops import output_operator
from avalanche_curv.core.hessian import HessianOperator
from avalanche_curv.core.linearised import Relinearised
from avalanche_curv.core.losses import ExampleLoss
from avalanche_curv.core.options import is_count
from avalanche_curv.core.risk import EmpiricalRisk


class Operator(Protocol):
    """A symmetric matrix known by its products."""

    @property
    def size(self) -> int: ...

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]: ...


class Curvature(ABC):
    """A kind of curvature C(θ) of an empirical risk, always of the mean over examples.

    A kind of your own needs `operator` and nothing else; every structure and policy then works with it.
    """

    @abstractmethod
    def operator(self, risk: EmpiricalRisk) -> Operator:
        """The curvature at the frozen parameters of `risk` as an operator on its parameter space."""


def check_loss(curvature: Curvature, loss: ExampleLoss) -> None:
    """Raises ValueError for a Fisher of a loss that is no log-likelihood."""
    if isinstance(curvature, Fisher):
        loss.check_likelihood()


class OutputCurvature(Curvature, ABC):
    """C = (1/N) Σ_i J_iᵀ S_i S_iᵀ J_i: positive semi-definite, given by a factor S_i in the outputs of each example.

    J_i is the Jacobian of the outputs f(x_i) in the parameters. Fast rules and per-example measurements need S only.
    """

    seed: int | None = None

    @abstractmethod
    def factor(
        self, loss: ExampleLoss, outputs: Float[Tensor, "N C"], targets: Tensor, generator: torch.Generator
    ) -> Float[Tensor, "N C R"]:
        """S_i for each example. `generator` gives the draws of a kind that samples, and is ignored by the others."""

    def generator(self) -> torch.Generator:
        """The source of the draws of one pass over the data: the same at every pass."""
        return torch.Generator().manual_seed(self.seed or 0)

    def operator(self, risk: EmpiricalRisk) -> Operator:
        generator = self.generator()
        with torch.no_grad():
            data = [(x, self.factor(risk.loss, risk.outputs(x), y, generator)) for x, y in risk]
        return WithFallback(output_operator(risk, data), Relinearised(self, risk))


@dataclass(frozen=True)
class GGN(OutputCurvature):
    """The generalised Gauss-Newton matrix (1/N) Σ_i J_iᵀ (∇²_f ℓ_i) J_i (Schraudolph 2002)."""

    def factor(self, loss: ExampleLoss, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        return loss.hessian_factor(outputs, targets)


@dataclass(frozen=True)
class Fisher(OutputCurvature):
    """The Fisher information (1/N) Σ_i E_{y ~ p(y | x_i)} [∇ log p ∇ log pᵀ]: labels come from the model.

    Exact by default (type 2: the expectation in closed form; equal to the GGN for softmax cross-entropy and squared
    error). `Fisher(samples=m, seed=s)` is its unbiased Monte-Carlo estimate with m labels an example, whose draws do
    not depend on the batch size. Observed labels are not used: with them it would be `EmpiricalFisher`
    (Kunstner et al. 2019). Raises ValueError for a loss that is no log-likelihood (class weights).
    """

    samples: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.samples is None and self.seed is not None:
            raise ValueError("Fisher(seed=...) draws nothing without samples: give samples=m, or drop the seed.")
        if self.seed is not None and not isinstance(self.seed, Integral):
            raise ValueError(f"Fisher needs an integer seed; got {self.seed!r}.")
        if self.samples is not None and not is_count(self.samples):
            raise ValueError(f"Fisher needs at least 1 sample; got {self.samples}. Leave it out for the exact Fisher.")

    def factor(self, loss: ExampleLoss, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        loss.check_likelihood()
        if self.samples is None:
            return loss.hessian_factor(outputs, targets)
        count, width = outputs.shape
        uniform = torch.rand(count, self.samples, width, generator=generator, dtype=torch.float64)
        return loss.sample_gradients(outputs, uniform.to(outputs)) / self.samples**0.5


@dataclass(frozen=True)
class EmpiricalFisher(OutputCurvature):
    """(1/N) Σ_i g_i g_iᵀ, with g_i the gradient of example i at its observed label. It is not the Fisher."""

    def factor(self, loss: ExampleLoss, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        return loss.gradient(outputs, targets)[:, :, None]


@dataclass(frozen=True)
class OutputGradient(OutputCurvature):
    """(1/N) Σ_i ∇f_i ∇f_iᵀ, with f_i the output of example i for its observed class: the gradients whose span
    orthogonal gradient descent leaves alone (Farajtabar et al. 2020, the variant of the ground truth logit).

    Raises TypeError for targets that are no classes.
    """

    def factor(self, loss: ExampleLoss, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        if targets.is_floating_point() or targets.ndim != 1 or outputs.shape[1] < 2:
            raise TypeError(
                f"OutputGradient needs one class for each example, and an output for each class; got targets of "
                f"{targets.dtype} and shape {tuple(targets.shape)}, {outputs.shape[1]} outputs. Use GGN() instead."
            )
        return F.one_hot(targets, outputs.shape[1]).to(outputs)[:, :, None]


@dataclass(frozen=True)
class BatchedEmpiricalFisher(Curvature):
    """(1/B) Σ_b ḡ_b ḡ_bᵀ, with ḡ_b the mean gradient of mini-batch b: what common code calls EWC.

    It shrinks as `batch_size` grows and is kept for comparison; with batch_size=1 it is the `EmpiricalFisher`.
    """

    batch_size: int

    def __post_init__(self) -> None:
        if not is_count(self.batch_size):
            raise ValueError(f"BatchedEmpiricalFisher needs a batch_size of at least 1; got {self.batch_size}.")

    def operator(self, risk: EmpiricalRisk) -> Operator:
        return GramOperator(torch.cat(list(self.gradients(risk))))

    def gradients(self, risk: EmpiricalRisk) -> Iterator[Float[Tensor, "1 P"]]:
        """ḡ_b / √B, one row at a time."""
        batches = -(-risk.examples // self.batch_size)
        for x, y in risk.rebatched(self.batch_size):
            yield risk.summed_gradient(x, y)[None] / (len(y) * batches**0.5)


@dataclass(frozen=True)
class WithFallback:
    """An operator, and another for models of whose modules torch lacks the derivatives that the first one takes."""

    first: Operator
    second: Operator

    @property
    def size(self) -> int:
        return self.first.size

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        try:
            return self.first.matmat(matrix)
        except NotImplementedError:
            return self.second.matmat(matrix)


@dataclass(frozen=True)
class GramOperator:
    """GᵀG for rows G [B, P]."""

    rows: Float[Tensor, "B P"]

    @property
    def size(self) -> int:
        return self.rows.shape[1]

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        return self.rows.T @ (self.rows @ matrix)


class PositivePart(ABC):
    """How an indefinite symmetric matrix is made positive semi-definite, eigenvalue by eigenvalue."""

    @abstractmethod
    def __call__(self, eigenvalues: Tensor) -> Tensor:
        """The new eigenvalues."""


@dataclass(frozen=True)
class Clip(PositivePart):
    """Negative eigenvalues become zero: the nearest positive semi-definite matrix in the Frobenius norm."""

    def __call__(self, eigenvalues: Tensor) -> Tensor:
        return eigenvalues.clamp_min(0)


@dataclass(frozen=True)
class Absolute(PositivePart):
    """Eigenvalues become their absolute values (Dauphin et al. 2014)."""

    def __call__(self, eigenvalues: Tensor) -> Tensor:
        return eigenvalues.abs()


@dataclass(frozen=True)
class Hessian(Curvature):
    """∇²L, the exact second derivative. It may be indefinite: `psd=Clip()` or `psd=Absolute()` mends its structured
    form (the eigenvalues of a dense matrix or of each block, the entries of a diagonal); with `psd=None` the penalty
    may reward moving away from the anchor without bound."""

    psd: PositivePart | None = None

    def __post_init__(self) -> None:
        if self.psd is not None and not isinstance(self.psd, PositivePart):
            raise TypeError(f"Hessian(psd=...) takes Clip(), Absolute() or None; got {self.psd!r}.")

    def operator(self, risk: EmpiricalRisk) -> Operator:
        return HessianOperator(risk)
