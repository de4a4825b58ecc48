"""The quadratic model of past loss: its value, gradient, re-anchoring, exact sums, and the penalty it adds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from avalanche_curv.core.arguments import takes
from avalanche_curv.core.curvature._curvlinops import LinearOperator, linear_operator
from avalanche_curv.core.options import OneLine, check_count, check_number
from avalanche_curv.core.precision import in_own_precision
from avalanche_curv.core.quadratic.damping import Damping
from avalanche_curv.core.quadratic.minimum import conjugate_gradients, minimum, rounding_of
from avalanche_curv.core.risk.parameters import ParameterSpace, canonical_parameters
from avalanche_curv.core.risk.selection import training, warn_unprotected
from avalanche_curv.core.state import Saved
from avalanche_curv.core.structures.base import Matrix

Number = TypeVar("Number", float, Tensor, "float | Tensor")
AT_ONCE = 2**20  # coordinates that are widened to float64


@dataclass(frozen=True)
class QuadraticModel(OneLine, Saved):
    """q(θ) = c + gᵀδ + ½ δᵀ C δ with displacement δ = θ − a, over a parameter space of size P.

    Fresh from `estimate`, q is the predicted *increase* of past loss since the anchor: c = 0, and g is zero unless it
    was asked for. Sums and re-anchoring are exact and may give c and g values. θ may be a grown model: it is read
    through `space`, and coordinates that came later do not count.

    `frozen` are the names of parameters that were not trainable at the anchor and are not in the space: q does not see
    them move. Where some of them train after all (`unprotected`), the penalty warns.

    >>> from avalanche_curv.core.structures.diagonal import DiagonalMatrix
    >>> model = nn.Linear(1, 1, bias=False)
    >>> past = QuadraticModel(ParameterSpace.of(model), torch.tensor([1.0]), DiagonalMatrix(torch.tensor([4.0])))
    >>> _ = nn.init.constant_(model.weight, 3.0)
    >>> past(model), past.gradient_at(past.displacement(model))
    (tensor(8.), tensor([8.]))
    """

    space: ParameterSpace
    anchor: Float[Tensor, "P"]
    curvature: Matrix
    gradient: Float[Tensor, "P"] | None = None
    constant: float = 0.0
    frozen: tuple[str, ...] = ()

    def described(self) -> tuple[str, ...]:
        return f"{self.space.size} parameters", repr(self.curvature)

    @takes(model=(nn.Module, "the model that is trained"))
    def displacement(self, model: nn.Module) -> Float[Tensor, "P"]:
        """δ = θ − a [P] for the parameters θ of `model`, detached."""
        return self.space.vector(model).to(self.anchor) - self.anchor

    @in_own_precision
    def __call__(self, model: nn.Module) -> Tensor:
        """q(θ), detached."""
        return self.increase(self.displacement(model)) + self.constant

    @in_own_precision
    def increase(self, displacement: Float[Tensor, "P"]) -> Tensor:
        """q(a + δ) − q(a) = gᵀδ + ½ δᵀ C δ."""
        return quadratic_increase(displacement, self.curvature.product(displacement), self.gradient)

    @in_own_precision
    def gradient_at(self, displacement: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
        """∇q(a + δ) = g + C δ."""
        product = self.curvature.product(displacement)
        return product if self.gradient is None else product + self.gradient

    @takes(model=(nn.Module, "the model that is trained"))
    def penalty(self, model: nn.Module) -> Tensor:
        """q(θ) as a scalar whose gradient in the parameters of `model` is exactly g + C δ. Warns where parameters train
        that are `unprotected`."""
        if free := self.unprotected(model):
            warn_unprotected(free)
        return _Penalty.apply(self, *self.space.tensors(model))

    def unprotected(self, model: nn.Module) -> tuple[str, ...]:
        """The names of the parameters of `model` that train, but were frozen when all of the past was absorbed, so that
        q does not depend on them. Parameters that came later are not among them."""
        return training(self.frozen, model)

    def linear_operator(self) -> LinearOperator:
        """C as a linear operator of curvlinops on the parameters; `.to_scipy()` makes it one of SciPy's."""
        return linear_operator(self.curvature.matmat, self.space.shapes, self.anchor)

    def scaled(self, factor: float) -> QuadraticModel:
        """factor · q; the object itself for a factor of 1."""
        if factor == 1:
            return self
        gradient = None if self.gradient is None else factor * self.gradient
        return replace(
            self, curvature=self.curvature.scaled(factor), gradient=gradient, constant=factor * self.constant
        )

    def damped(self, tau: float) -> QuadraticModel:
        """q + ½ τ ‖δ‖² with the same anchor; q itself for τ = 0."""
        return replace(self, curvature=self.curvature.damped(tau)) if tau else self

    @in_own_precision
    def minimiser(
        self, damping: float | Damping = 0.0, *, tolerance: float = 1e-6, max_products: int = 5000
    ) -> dict[str, Tensor]:
        """The parameters at which q(θ) + ½ τ ‖θ − a‖² is least, by name: `model.load_state_dict(found, strict=False)`.

        They are a + δ with (C + τI) δ = −g and τ = `damping`, a number ≥ 0 in units of curvature, or as a `Damping`
        says; where C is singular, those nearest to the anchor a. Without a slope g that is the anchor itself.

        In double precision: by the eigenvalues of C where its structure has them at hand (`Dense`, `Diagonal`,
        `BlockDiagonal`, `LowRank` without a residual, `Kronecker` and `EKFAC` of one experience, and all of these
        damped), where eigenvalues up to 100 times the rounding of what is stored count as zero; elsewhere by conjugate
        gradients, with at most `max_products` products with C, until ‖Cδ + g‖ ≤ `tolerance` · ‖g‖. Where C is known by
        its products in single precision alone (`MatrixFree`), less than about 1e-6 cannot be reached.

        Raises ValueError where q has no minimum, since C has a negative eigenvalue or g leaves its range, and
        RuntimeError where the products do not suffice.

        >>> from avalanche_curv.core.structures.diagonal import DiagonalMatrix
        >>> space, slope = ParameterSpace.of(nn.Linear(2, 1, bias=False)), torch.tensor([2.0, 0.0])
        >>> past = QuadraticModel(space, torch.ones(2), DiagonalMatrix(torch.tensor([4.0, 0.0])), slope)
        >>> past.minimiser()
        {'weight': tensor([[0.5000, 1.0000]])}
        """
        tau = damping.amount(self) if isinstance(damping, Damping) else check_damping("damping", damping)
        check_tolerances(tolerance, max_products)
        found = self.anchor
        if self.gradient is not None:
            wide = self.anchor.new_empty(0, dtype=torch.float64)
            found = found + minimum(
                self.curvature.to(wide).damped(tau) if tau else self.curvature.to(wide), self.gradient.to(wide),
                rounding=rounding_of(self.anchor), tolerance=tolerance, max_products=max_products,
            )  # fmt: skip
        return dict(zip(self.space.names, self.space.split(found.to(self.anchor))))

    @in_own_precision
    def reanchored(self, anchor: Float[Tensor, "P"]) -> QuadraticModel:
        """This function of θ, written around another anchor [P]: equal everywhere, with another g and c."""
        if torch.equal(anchor, self.anchor):
            return self
        shift = anchor - self.anchor
        product = self.curvature.product(shift)
        constant = self.constant + increase_in_float64(shift, product, self.gradient)
        gradient = product if self.gradient is None else product + self.gradient
        return replace(self, anchor=anchor, gradient=gradient, constant=constant)

    @in_own_precision
    def __add__(self, newer: QuadraticModel) -> QuadraticModel:
        """The sum as one quadratic model, anchored where `newer` is; a grown `newer` decides the space. It is exact
        unless the structure bounds the size of its sums."""
        older, newer = alike(self, newer)
        space = newer.space.union(self.space)
        old, new = older.reanchored(older.seen_from(newer)).embedded(space), newer.embedded(space)
        anchor = new.anchor
        if space != newer.space:
            anchor = old.anchor.clone()
            anchor[space.positions(newer.space).to(anchor.device)] = newer.anchor
        slopes = [slope for slope in (old.gradient, new.gradient) if slope is not None]
        exact = QuadraticModel(
            space,
            anchor,
            old.curvature.plus(new.curvature),
            sum(slopes[1:], slopes[0]) if slopes else None,
            old.constant + new.constant,
            tuple(name for name in dict.fromkeys((*old.frozen, *new.frozen)) if name not in space.names),
        )
        return exact.compressed()

    @in_own_precision
    def compressed(self) -> QuadraticModel:
        """This function with its curvature as a sum keeps it (`Matrix.compressed`), so that q stays bounded below where
        C is positive semi-definite: with the same slope g at the anchor where that lies in the range of what is kept
        (`Matrix.keeps_range`), around the same minimum elsewhere."""
        curvature = self.curvature.compressed()
        if curvature is self.curvature or self.gradient is None or self.curvature.keeps_range:
            return replace(self, curvature=curvature)
        enough = rounding_of(self.gradient) * float(self.gradient.norm())
        step = conjugate_gradients(self.curvature.product, self.gradient, enough).step
        lowest = self.constant + float(self.increase(step))
        product = curvature.product(step)
        return replace(
            self, curvature=curvature, gradient=-product, constant=lowest + float(half(step @ product))
        )

    def seen_from(self, newer: QuadraticModel) -> Float[Tensor, "P"]:
        """The anchor of `newer` in this model's coordinates; this model's own where `newer` has none."""
        if newer.space == self.space:
            return newer.anchor
        space = newer.space.union(self.space)
        anchor = space.embedded(self.anchor, self.space)
        anchor[space.positions(newer.space).to(anchor.device)] = newer.anchor
        return anchor[space.positions(self.space).to(anchor.device)]

    def embedded(self, space: ParameterSpace) -> QuadraticModel:
        """This function over a larger space, whose further coordinates it ignores (and anchors at zero)."""
        if space == self.space:
            return self
        anchor, curvature = space.embedded(self.anchor, self.space), self.curvature.embedded(self.space, space)
        gradient = None if self.gradient is None else space.embedded(self.gradient, self.space)
        return replace(self, space=space, anchor=anchor, curvature=curvature, gradient=gradient)

    @takes(model=(nn.Module, "the model that is trained"))
    def grown(self, model: nn.Module, outputs: tuple[str, ...]) -> QuadraticModel:
        """This function for a model with a head whose weight and bias, of the names `outputs`, have gained rows: each
        later row is anchored at zero, without a slope, and has the mean curvature of the rows that were there.

        For squared error on one-hot classes, summed over outputs, that is exact for the head. Examples that came before
        a class have the target 0 for it, so that the past loss of its output is (1/N) Σ_i (wᵀx_i)² with the inputs x_i
        of the head: at w = 0 the slope is zero, and the curvature 2 (1/N) Σ_i x_i x_iᵀ that of every other row. The
        object itself where nothing has grown. Raises ValueError for names that are not in the space, and TypeError
        where the structure cannot hold it.
        """
        self._check_known(outputs)
        now = canonical_parameters(model)
        shapes = tuple(now[n].shape if n in outputs else s for n, s in zip(self.space.names, self.space.shapes))
        if shapes == self.space.shapes:
            return self
        space = ParameterSpace(self.space.names, shapes)
        return replace(self.embedded(space), curvature=self.curvature.grown(self.space, space, outputs))

    def check_grows(self, outputs: tuple[str, ...]) -> None:
        """Raises what `grown` raises for a head of these names that has grown."""
        self._check_known(outputs)
        self.curvature.grown(self.space, self.space, outputs)

    def _check_known(self, outputs: tuple[str, ...]) -> None:
        if unknown := [name for name in outputs if name not in self.space.names]:
            raise ValueError(f"No parameter {unknown} among those of the past; there are {[*self.space.names]}.")

    def to(self, like: Tensor) -> QuadraticModel:
        """This function with its numbers in the type and on the device of `like`."""
        if self.anchor.dtype == like.dtype and self.anchor.device == like.device:
            return self
        gradient = None if self.gradient is None else self.gradient.to(like)
        return replace(self, anchor=self.anchor.to(like), curvature=self.curvature.to(like), gradient=gradient)

    def following(self, model: nn.Module) -> QuadraticModel:
        """This function on the device of `model`, in the wider of its own type and that of the parameters, of which
        half precision counts as float32: for a model that was moved since."""
        parameters = self.space.vector(model)
        return self.to(wider(self.anchor, parameters))

    @property
    def nbytes(self) -> int:
        """Memory held."""
        extra = 0 if self.gradient is None else self.gradient.nbytes
        return self.anchor.nbytes + self.curvature.nbytes + extra


class _Penalty(torch.autograd.Function):
    """Value and gradient of a quadratic model from one product; autograd through δᵀ(Cδ) would take two."""

    @staticmethod
    @in_own_precision
    def forward(ctx: Any, past: QuadraticModel, *parameters: Tensor) -> Tensor:
        displacement = past.space.flatten(list(parameters)).to(past.anchor).sub_(past.anchor)
        product = past.curvature.product(displacement)
        value = quadratic_increase(displacement, product, past.gradient) + past.constant
        ctx.space, ctx.places = past.space, [p.new_empty(0) for p in parameters]
        ctx.save_for_backward(product if past.gradient is None else product + past.gradient)
        return value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        check_first_order()
        (gradient,) = ctx.saved_tensors
        parts = ctx.space.split(times(gradient, grad_outputs[0]))
        return None, *(part.to(place) for part, place in zip(parts, ctx.places))


def alike(old: QuadraticModel, new: QuadraticModel) -> tuple[QuadraticModel, QuadraticModel]:
    """Both in the wider of their types, on the device of `new`."""
    like = wider(old.anchor, new.anchor)
    return old.to(like), new.to(like)


def wider(old: Tensor, new: Tensor) -> Float[Tensor, "0"]:
    """An empty tensor in the wider of the types of both, on the device of `new`."""
    return new.new_empty(0, dtype=torch.promote_types(old.dtype, new.dtype))


def times(gradient: Tensor, scale: Tensor) -> Tensor:
    """The product, without touching the gradient where the scale is known to be one."""
    return gradient if is_one(scale) else gradient * scale


def is_one(scale: Tensor) -> bool:
    """Whether a scalar is known to be one: other devices than the CPU are not waited for."""
    return scale.device.type == "cpu" and scale.item() == 1


def half(quadratic_form: Number) -> Number:
    """½ δᵀ(Cδ) from δᵀ(Cδ): the ½ of every penalty and prediction."""
    return 0.5 * quadratic_form


check_damping = partial(check_number, at_least=0, hint="It is in units of curvature; 0 leaves q as it is.")
"""A check of τ."""


def check_tolerances(tolerance: float, max_products: int) -> None:
    """Raises ValueError unless these are a positive part of ‖g‖ and a number of products."""
    check_number("tolerance", tolerance, above=0, below=1, hint="It is a part of the length of the slope: 1e-6.")
    check_count("max_products", max_products)


def check_first_order() -> None:
    """Raises RuntimeError in a backward pass that is to be differentiated again, where C would be missing."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "The gradient of a penalty cannot be differentiated again (create_graph=True). Differentiate the task loss "
            "alone, and add gradient_at(displacement) and curvature.product(v) of the QuadraticModel yourself."
        )


def quadratic_increase(displacement: Tensor, product: Tensor, gradient: Tensor | None = None) -> Tensor:
    """gᵀδ + ½ δᵀ(Cδ)."""
    quadratic = half(displacement @ product)
    return quadratic if gradient is None else quadratic + displacement @ gradient.to(displacement)


def increase_in_float64(displacement: Tensor, product: Tensor, gradient: Tensor | None = None) -> float:
    """gᵀδ + ½ δᵀ(Cδ) in float64, of some coordinates at a time, so that no vector is copied whole."""
    parts = [d.split(AT_ONCE) for d in (displacement, product, *([] if gradient is None else [gradient]))]
    return sum(float(quadratic_increase(d.double(), c.double(), *g)) for d, c, *g in zip(*parts))
