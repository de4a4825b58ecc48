"""Criteria in their per-example form ℓ(f, y), with the derivatives in the outputs f that curvature needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from jaxtyping import Bool, Float
from torch import Tensor, nn

from avalanche_curv.core.losses.factor import Factor
from avalanche_curv.core.nested import Nested, described


class ExampleLoss(ABC):
    """The loss ℓ(f, y) of one example, of which a risk takes the mean over examples.

    The convention, for every criterion: ℓ of an example is what the criterion returns for a batch of that one example;
    of outputs over tokens or pixels under a mean, the mean over those that count. L is the mean of ℓ over all N
    examples, whatever the criterion's `reduction` over a batch. An example without a token that counts (`ignore_index`,
    padding) has loss 0 and stays in N. One exception: with one class for each example, torch's mean divides class
    weights by those of the batch, which in a batch of one would undo them: see `CrossEntropy`.

    Outputs are [N, K], further axes flattened; targets are as the data give them, a tensor for
    all criteria of torch but `GaussianNLLLoss`. Every method treats the N examples
    independently, and where the model is sure, small entries keep their own digits.
    """

    @abstractmethod
    def per_example(self, outputs: Float[Tensor, "N K"], targets: Nested) -> Float[Tensor, "N"]:
        """ℓ(f_i, y_i), differentiable."""

    @abstractmethod
    def gradient(self, outputs: Float[Tensor, "N K"], targets: Nested) -> Float[Tensor, "N K"]:
        """∇_f ℓ(f_i, y_i)."""

    @abstractmethod
    def hessian_factor(self, outputs: Float[Tensor, "N K"], targets: Nested) -> Factor | Float[Tensor, "N K R"]:
        """S_i with S_i S_iᵀ = ∇²_f ℓ(f_i, y_i)."""

    def fisher_factor(self, outputs: Float[Tensor, "N K"], targets: Nested) -> Factor | Float[Tensor, "N K R"]:
        """S_i with S_i S_iᵀ = E[g gᵀ] for the gradients g of `sample_gradients`; those of ∇²_f ℓ for most losses."""
        return self.hessian_factor(outputs, targets)

    @abstractmethod
    def sample_gradients(
        self, outputs: Float[Tensor, "N K"], targets: Nested, uniform: Float[Tensor, "N m draws"]
    ) -> Float[Tensor, "N K m"]:
        """∇_f ℓ(f_i, y) at labels y of the model itself, from uniform draws in [0, 1). Of `targets` no label is used,
        but which tokens count. A mean over outputs or tokens is taken of E[g gᵀ]: for a factor s before the sum of
        independent losses, gradients are those of the sum times √s."""

    def draws(self, outputs: Float[Tensor, "N K"], targets: Nested) -> int:
        """The number of uniform numbers that one sample of an example takes: one for each output, unless fewer do."""
        return outputs.shape[1]

    def counted(self, targets: Nested) -> Bool[Tensor, "N ..."] | None:
        """Which targets count, [N] or one for each token, [N, d1, ...]; None for a loss that leaves none out."""
        return None

    def summed(self, outputs: Tensor, targets: Nested) -> nn.Module:
        """Σ_i ℓ_i as a criterion with `reduction="sum"`, for outputs and targets like these, in their own shape:
        torch's own where there is one of the same value, for libraries that look at its type."""
        return Summed(self)

    @abstractmethod
    def check_likelihood(self) -> None:
        """Raises ValueError where exp(-ℓ) is no likelihood, so that a Fisher information is not defined."""

    def check_expectation(self) -> None:  # noqa: B027  most are known in closed form
        """Raises ValueError where `fisher_factor` is not known, so that a Fisher information takes samples."""

    @abstractmethod
    def check(self, outputs: Tensor, targets: Nested) -> None:
        """Raises ValueError for outputs (in the model's own shape) or targets that this form does not cover."""

    def fitted(self, few: Callable[[], tuple[Tensor, Nested]]) -> ExampleLoss:
        """This loss for a model of which `few` gives some outputs, in their own shape, with their targets. Raises
        ValueError where it cannot be one for them."""
        return self

    def check_batch(self, batch: Callable[[], tuple[Tensor, Nested]]) -> None:  # noqa: B027  known ones are right
        """Raises ValueError where the loss of a batch, of which `batch` gives the outputs and targets, is neither the
        mean nor the sum of the losses of its examples."""


class Summed(nn.Module):
    """Σ_i ℓ_i of outputs in their own shape."""

    reduction = "sum"

    def __init__(self, loss: ExampleLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Tensor, targets: Nested) -> Tensor:
        return self.loss.per_example(outputs.reshape(len(outputs), -1), targets).sum()


def check_tensor(name: str, targets: Nested) -> None:
    """Raises ValueError for targets in a nesting, of a criterion that takes one tensor."""
    if not isinstance(targets, Tensor):
        raise ValueError(
            f"{name} takes one tensor of targets; got {described(targets)}. Give a function of all of them, such as "
            "lambda outputs, targets: F.cross_entropy(outputs[:, :5], targets[0]) + F.mse_loss(outputs[:, 5], "
            "targets[1])."
        )
