"""What a kind of curvature is: the symmetric matrix that stands for the second derivative of past loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.curvature._curvlinops import LinearOperator, linear_operator, output_operator
from avalanche_curv.core.curvature.operators import (
    FACTOR_BYTES,
    FactorInOutputs,
    Operator,
    Spectral,
    column_count,
    factor_of,
    pieces,
    some_factor,
)
from avalanche_curv.core.curvature.outlook import Outlook
from avalanche_curv.core.curvature.products import Relinearised, Way, right_products
from avalanche_curv.core.losses import ExampleLoss, Factor
from avalanche_curv.core.nested import Nested, split
from avalanche_curv.core.precision import in_own_precision
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.jacobians import chunk_size, parameters_of, pulled_back

M = TypeVar("M", bound=Spectral)


class NonFiniteCurvatureError(FloatingPointError):
    """The estimated curvature holds NaN or infinity."""


class Curvature(ABC):
    """A kind of curvature C(θ) of an empirical risk, always of the mean over examples.

    A kind of your own needs `operator` and nothing else. Every policy then works with it, and every structure but
    `Kronecker` and `EKFAC`; `Energy` cuts need `is_semidefinite` too. The other methods say what more is
    known of a kind: faster rules and measurements ask for it.
    """

    is_semidefinite: bool = False
    """Whether C has no negative eigenvalues. Say so for a kind of your own: others are taken to be indefinite."""

    is_known_of_examples: bool = False
    """Whether the kind defines the curvature C_i of the loss of one example, as fidelity compares it: by `factor` for
    an `OutputCurvature`, by `example_expansion` for other kinds."""

    @abstractmethod
    def operator(self, risk: EmpiricalRisk) -> Operator:
        """C at the frozen parameters of `risk`, as an operator with products C M [P, k] on its parameter space."""

    @in_own_precision
    def linear_operator(self, risk: EmpiricalRisk) -> LinearOperator:
        """The curvature at the frozen parameters of `risk` as a linear operator of curvlinops, for its traces, norms,
        inverses and spectral densities; `.to_scipy()` makes it one of SciPy's."""
        return linear_operator(in_own_precision(self.operator(risk).matmat), risk.space.shapes, risk.anchor)

    def check_loss(self, loss: ExampleLoss) -> None:  # noqa: B027  most need no more of a loss than that it is known
        """Raises ValueError for a loss for which this curvature is not defined."""

    @property
    def is_mended(self) -> bool:
        """Whether `mended` changes the spectrum of an estimate."""
        return False

    def mended(self, matrix: M) -> M:
        """`matrix`, an estimate of C, with the eigenvalues that this kind asks for; itself for most kinds."""
        return matrix

    def unmended(self) -> Curvature:
        """This kind of curvature without `mended`: its eigenvalues stay as they are."""
        return self

    def row_count(self, risk: EmpiricalRisk) -> int | None:
        """M, the number of rows of G with C = GᵀG; None for a kind without such rows."""
        return None

    def rows(self, risk: EmpiricalRisk) -> Iterator[Float[Tensor, "n P"]]:
        """The M rows of G with C = GᵀG, some at a time. Raises TypeError for a kind without such rows."""
        raise TypeError(f"{self} is not known as a sum of outer products. Use Fisher(), GGN() or EmpiricalFisher().")

    def example_expansion(
        self, risk: EmpiricalRisk, inputs: Nested, targets: Nested, displacement: Float[Tensor, "P"]
    ) -> tuple[Float[Tensor, "n P"], Float[Tensor, "n P"]]:
        """∇ℓ_i(a) and C_i δ for each of n examples, with C_i the curvature of ℓ_i alone at the anchor a of `risk`.

        Raises TypeError for a kind that does not define C_i.
        """
        raise self._unknown_of_examples()

    def check_examples(self) -> None:
        """Raises TypeError for a kind that does not define the curvature of single examples."""
        if not self.is_known_of_examples:
            raise self._unknown_of_examples()

    def _unknown_of_examples(self) -> TypeError:
        return TypeError(
            f"Fidelity compares single examples with their own curvature, which {self} does not define. "
            "Use GGN(), Fisher(), EmpiricalFisher(), Hessian() without psd, or a subclass of OutputCurvature."
        )

    def terms(self, examples: int) -> int:
        """B, the number of terms of the mean C = (1/B) Σ_b C_b over this number of examples: one for each, unless a
        kind averages over mini-batches."""
        return examples

    def check_shards(self, counts: Sequence[int]) -> None:  # noqa: B027
        """Raises ValueError where C of all examples is no mean of the C of shards with these numbers of examples."""


class OutputCurvature(Curvature, ABC):
    """C = (1/N) Σ_i J_iᵀ S_i S_iᵀ J_i: positive semi-definite, given by a factor S_i in the outputs of each example.

    J_i is the Jacobian of the outputs f(x_i) in the parameters. Fast rules and per-example measurements need S only.
    """

    seed: int | None = None
    is_semidefinite = True
    is_known_of_examples = True

    @abstractmethod
    def factor(
        self, loss: ExampleLoss, outputs: Float[Tensor, "N C"], targets: Nested, generator: torch.Generator
    ) -> Factor | Float[Tensor, "N C R"]:
        """S_i for each of N examples, from their outputs and targets, with any number R of columns: as a tensor, or as
        a `Factor`, which need not hold all of them. `generator` gives the draws of a kind that samples."""

    def generator(self) -> torch.Generator:
        """A new source of random draws for one pass over the data, equal at every pass: it starts from `seed`."""
        return torch.Generator().manual_seed(self.seed or 0)

    def operator(self, risk: EmpiricalRisk) -> Operator:
        ways: dict[str, Way] = {"forward": _in_forward_mode, "graphs": Relinearised}
        inputs, targets = next(iter(risk))
        if some_factor(self, risk, inputs, targets).tensor_bytes(risk.examples) > FACTOR_BYTES:
            del ways["forward"]  # which holds all columns of S of all examples
        return right_products(self, risk, ways)

    def row_count(self, risk: EmpiricalRisk) -> int:
        """N R, the number of rows of G: N examples, and R columns of S for each."""
        return column_count(self, risk)

    def rows(self, risk: EmpiricalRisk, names: Collection[str] | None = None) -> Iterator[Float[Tensor, "n P"]]:
        """Rows of G with C = GᵀG: the columns of J_iᵀ S_i / √N, one chunk of examples after the other. `names`
        restricts them to some parameters, in the order given."""
        parameters, generator, outlook = parameters_of(risk), self.generator(), Outlook(self, risk)
        width = sum(parameters[name].numel() for name in names or parameters)
        with torch.no_grad():
            for x, y in pieces(self, risk):
                outputs = risk.outputs(x)
                factor = factor_of(self, risk, outputs, y, generator).scaled(risk.examples**-0.5)
                wide = max(width, outputs.shape[1])
                size, columns = chunk_size(risk, factor.count, wide), chunk_size(risk, 1, wide)
                for part_x, part_factor in zip(split(x, size), factor.split(size)):
                    some = (pulled_back(risk, parameters, part_x, s, names) for s in part_factor.columns(columns))
                    if len(part_factor) > 1:  # rows come in the order of examples
                        yield torch.cat([*some], dim=1).flatten(0, 1)
                        outlook.took(len(part_factor), factor.count, factor.count)
                    else:
                        for rows in some:
                            yield rows[0]
                            outlook.took(1, rows.shape[1], factor.count)


def _in_forward_mode(curvature: FactorInOutputs, risk: EmpiricalRisk) -> Operator:
    """C by products of curvlinops, which go forward and then in reverse."""
    generator = curvature.generator()
    with torch.no_grad():
        data = [(x, factor_of(curvature, risk, risk.outputs(x), y, generator).tensor()) for x, y in risk]
    return output_operator(risk, data)
