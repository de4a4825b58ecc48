"""Policies: what happens to the quadratic model of the past at the end of an experience."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import add

from jaxtyping import Int
from torch import Tensor, nn

from avalanche_curv.core.arguments import takes
from avalanche_curv.core.curvature.base import Curvature
from avalanche_curv.core.losses.elementwise import SquaredError
from avalanche_curv.core.options import OneLine, check_flag, check_fraction, check_number, check_seed, counted, settle
from avalanche_curv.core.precision import in_own_precision
from avalanche_curv.core.quadratic.estimate import estimate
from avalanche_curv.core.quadratic.model import QuadraticModel, alike
from avalanche_curv.core.quadratic.state import frozen_state, maker_of_risks
from avalanche_curv.core.risk.batches import random_part
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.forward import Forward
from avalanche_curv.core.state import Saved, State, Storable, check_state, read, written
from avalanche_curv.core.structures.base import Structure


@dataclass(frozen=True)
class Past(OneLine, Saved):
    """What is known of past experiences: their quadratic model, and the examples that a policy stores of them. A policy
    that keeps more extends it.

    It is saved without pickles: `torch.save(past.state_dict(), path)`, and later
    `Past.load_state_dict(torch.load(path, weights_only=True))`.
    """

    model: QuadraticModel | None = None
    stored: tuple[EmpiricalRisk, ...] = field(default=(), repr=False)
    experiences: int = 0

    def __repr__(self) -> str:
        counts = {"experience": self.experiences, "refresh": len(self.refreshes)}
        return f"Past({', '.join(counted(count, what) for what, count in counts.items() if count)})"

    def state_dict(self) -> State:
        """This past as tensors, numbers, strings, tuples and dictionaries, copied, for `torch.save`.

        Stored examples are written as tensors, and the model at which they are frozen as its `state_dict`. Raises
        TypeError for what is not made of these: `MatrixFree`, which keeps a model instead of a matrix, and stored
        examples with parameters selected by type of module; use `save_checkpoint`.
        """
        return {**written(self), **(frozen_state(self.stored) if self.stored else {})}

    @classmethod
    def load_state_dict(
        cls,
        state: State,
        *,
        model: nn.Module | None = None,
        criterion: object = None,
        forward: Forward | None = None,
    ) -> Past:
        """The past of which `state_dict` made `state`, with the same penalty to the bit. Nothing is changed: it is
        returned.

        Where it holds stored examples, `criterion` is their loss, and `model` one of the same parameters, heads grown
        as they were; their values do not matter, and it stays as it is. Frozen parameters of it that have the values
        of then are shared, others are copied: loading the model first saves that memory. Raises ValueError where these
        are needed and missing, for any other state, with what came, and for a type that is not known: a structure,
        policy or grouping of one's own is to be imported before.
        """
        found = check_state(state, cls)
        known = {"EmpiricalRisk": maker_of_risks(found, model, criterion, forward)} if "frozen" in found else {}
        return cls.checked(read(found, known), state)

    def widened(self, risk: EmpiricalRisk) -> EmpiricalRisk:
        """`risk` over its own parameters and those that the past knows, also where they are frozen now: what was ever
        in the space of the past stays in it."""
        return risk if self.model is None else risk.covering(self.model.space.names)

    @property
    def refreshes(self) -> tuple[RefreshEvent, ...]:
        """When and why the model was estimated anew during an experience; a policy that does so keeps them."""
        return ()


@dataclass(frozen=True)
class RefreshEvent(Storable):
    """A new anchor during an experience: after which iteration of which experience (counted from 0), and why.

    `actual` and `predicted` are the loss of the stored examples and what the model predicts of it, before the refresh.
    """

    experience: int
    iteration: int
    reason: str
    actual: float
    predicted: float

    @property
    def error(self) -> float:
        """|L − q|."""
        return abs(self.actual - self.predicted)


class Policy(ABC):
    """How the quadratic model of the past takes in a new experience."""

    revises: bool = False
    """Whether `revise` may change the past while an experience is trained."""

    @abstractmethod
    def absorb(self, past: Past, risk: EmpiricalRisk, curvature: Curvature, structure: Structure) -> Past:
        """The past with one more experience, as a new object; the first one is absorbed into `Past()`.

        `risk` is that of the experience, frozen at the end of its training; `curvature` and `structure` are those of
        the quadratic model. Raises what `estimate` raises.
        """

    def absorb_part(
        self, past: Past, risk: EmpiricalRisk, curvature: Curvature, structure: Structure, share: float
    ) -> Past:
        """The past with one more part of a stream that does not tell where its tasks end.

        `risk` is that of the part alone, and `share` > 0 how much of an experience it is: its number of examples over
        that which an experience is taken to have. At a fixed model parts weigh as much as all their examples at once,
        however these are cut. Raises TypeError for a policy that takes whole experiences only, and what `absorb`
        raises.
        """
        raise self._takes_no_parts()

    def check_parts(self, structure: Structure, updates: int) -> None:
        """Raises TypeError or ValueError where parts of so many updates each cannot be absorbed: by this policy, or
        because the past would grow with each of them."""
        raise self._takes_no_parts()

    def _takes_no_parts(self) -> TypeError:
        return TypeError(
            f"{type(self).__name__} takes in whole experiences, and this online stream hides where they end. Split it "
            "with access_task_boundaries=True, or take Accumulate()."
        )

    def check_past(self, past: Past) -> None:  # noqa: B027  most need no more than the quadratic model
        """Raises ValueError for a past that this policy cannot go on from."""

    def check_risk(self, risk: EmpiricalRisk, curvature: Curvature, structure: Structure) -> None:  # noqa: B027
        """Raises TypeError or ValueError where this policy could not keep a past of such a model with such a structure,
        of which `risk` holds a few examples: before it is trained."""

    def is_due(self, past: Past, iteration: int) -> bool:
        """Whether `revise` may change the past after so many updates of the current experience: asked for at each."""
        return self.revises

    def revise(
        self, past: Past, model: nn.Module, iteration: int, curvature: Curvature, structure: Structure
    ) -> Past:
        """The past after `iteration` updates of the current experience, of which `model` is the state; 0 is before the
        first, when the model may just have grown. The same object where nothing is to be done."""
        return past


class Drawing(Policy):
    """A policy that takes in a random `fraction` of the examples of an experience, drawn by `seed`: a dataclass with
    these two fields."""

    fraction: float
    seed: int

    def places(self, past: Past, examples: int) -> Int[Tensor, "n"] | None:
        """The sorted places of those of so many examples that are taken in next; None for all."""
        seed = part_seed(self.seed, past.experiences)
        return None if self.fraction == 1 else random_part(examples, self.fraction, seed)

    def of_all(self) -> Drawing:
        """This policy for examples that were drawn before."""
        return replace(self, fraction=1.0)  # type: ignore[type-var]

    def drawn(self, past: Past, risk: EmpiricalRisk) -> EmpiricalRisk:
        """What is taken in of `risk`, over all parameters that the past knows."""
        return part_of(past.widened(risk), self.fraction, self.seed, past.experiences)


absorbing = takes(
    past=(Past, "Past()"), risk=(EmpiricalRisk, "EmpiricalRisk.snapshot(model, criterion, batches)"),
    curvature=(Curvature, "Fisher()"), structure=(Structure, "Diagonal()"),
)  # fmt: skip
"""Checks the arguments of `Policy.absorb`."""


@dataclass(frozen=True)
class Accumulate(Drawing):
    """q = Σ_t ½ δ_tᵀ C_t δ_t: each experience keeps its own anchor (Kirkpatrick et al. 2017).

    The sum is one quadratic model at the newest anchor, with the slope of the past there. Dense, diagonal and
    block-diagonal curvature folds exactly, so that memory and step time do not grow with the number of experiences;
    other structures keep what each experience adds, or merge it (see theirs).
    With fraction < 1, C_t is estimated on that random part of the experience's examples, drawn by `seed`.

    With `gradient=True`, q also carries Σ_t g_tᵀδ_t, the slope of each L_t at its own anchor. That is a minimum of what
    was trained, L_t and the penalty together, and not of L_t: without the slope each anchor but the first counts what
    came before once more (Huszár 2018). With it q is the expansion of L_t, and of a loss that is quadratic, as squared
    error on a linear head, with `Dense()` or `Kronecker()`, it is L_t itself: training on the sum is joint training.
    The exact C_t of a loss that is convex in θ holds g_t in its range; where a slope leaves it, q has no lower bound.

    `outputs` are the names of the weight and the bias of a head that grows with squared error on one-hot classes: rows
    that come later are then part of the past, as `QuadraticModel.grown` says. Other rows that come later are free.

    Of a stream that hides where its tasks end, each part adds share · (gᵀδ + ½ δᵀ C δ) at its own anchor.
    """

    fraction: float = 1.0
    seed: int = 0
    gradient: bool = False
    outputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        settle(self, fraction=check_fraction, seed=check_seed, gradient=check_flag, outputs=_check_names)

    @property
    def revises(self) -> bool:  # type: ignore[override]
        """For a head that grows."""
        return bool(self.outputs)

    def check_risk(self, risk: EmpiricalRisk, curvature: Curvature, structure: Structure) -> None:
        if not self.outputs:
            return
        if not isinstance(risk.loss, SquaredError):
            raise ValueError(
                f"outputs={self.outputs} says what squared error on one-hot classes makes of later outputs, and the "
                f"loss is {type(risk.loss).__name__}. Train with it, or leave outputs out: later outputs are then free."
            )
        if risk.loss.mean:
            raise ValueError(
                f"outputs={self.outputs} needs squared errors that are summed over outputs: a mean over them is "
                "another loss of the past once there are more. Train with nn.MSELoss(reduction='sum'), whose sum over "
                "outputs is averaged over examples."
            )
        estimate(curvature, structure, risk).check_grows(self.outputs)

    def is_due(self, past: Past, iteration: int) -> bool:
        return self.revises and iteration == 0

    def revise(
        self, past: Past, model: nn.Module, iteration: int, curvature: Curvature, structure: Structure
    ) -> Past:
        if iteration or past.model is None:
            return past
        grown = past.model.grown(model, self.outputs)
        return past if grown is past.model else replace(past, model=grown)

    @absorbing
    def absorb(self, past: Past, risk: EmpiricalRisk, curvature: Curvature, structure: Structure) -> Past:
        return self.absorb_part(past, risk, curvature, structure, share=1.0)

    @in_own_precision
    def absorb_part(
        self, past: Past, risk: EmpiricalRisk, curvature: Curvature, structure: Structure, share: float
    ) -> Past:
        new = estimate(curvature, structure, self.drawn(past, risk), gradient=self.gradient).scaled(share)
        return Past(new if past.model is None else past.model + new, experiences=past.experiences + 1)

    def check_parts(self, structure: Structure, updates: int) -> None:
        check_stays_small(structure)


@dataclass(frozen=True)
class Merge(Drawing):
    """One anchor, the newest, and C ← decay · C + C_t (Huszár 2018); decay < 1 is online EWC (Schwarz et al. 2018).

    Of a stream that hides where its tasks end, the anchor is the end of the newest part, and a part that is the share s
    of an experience gives C ← decay^s · C + (1 − decay^s) / (1 − decay) · C_t, or C + s C_t for decay = 1: a moving
    average over examples, the same however they are cut. A part of a single update is never away from its anchor when
    its gradient is taken, so that the penalty would do nothing (ValueError).

    With fraction < 1, C_t is estimated on that random part of the experience's examples, drawn by `seed`.
    """

    decay: float = 1.0
    fraction: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        hint = "1 keeps all of the past, 0 none of it."
        decay = partial(check_number, at_least=0, at_most=1, hint=hint)
        settle(self, decay=decay, fraction=check_fraction, seed=check_seed)

    @absorbing
    def absorb(self, past: Past, risk: EmpiricalRisk, curvature: Curvature, structure: Structure) -> Past:
        return self.absorb_part(past, risk, curvature, structure, share=1.0)

    @in_own_precision
    def absorb_part(
        self, past: Past, risk: EmpiricalRisk, curvature: Curvature, structure: Structure, share: float
    ) -> Past:
        kept = self.decay**share
        added = share if self.decay == 1 else (1 - kept) / (1 - self.decay)
        new = estimate(curvature, structure, self.drawn(past, risk)).scaled(added)
        if past.model is not None:
            old, new = alike(past.model, new)
            new = replace(
                old, anchor=old.seen_from(new), curvature=old.curvature.scaled(kept), gradient=None, constant=0.0
            ) + new
        return Past(new, experiences=past.experiences + 1)

    def check_parts(self, structure: Structure, updates: int) -> None:
        check_stays_small(structure)
        if updates == 1:
            raise ValueError(
                "Merge() puts its anchor at the end of each part of an online stream that hides where its tasks end, "
                "and a part here is a single update: its penalty would have no gradient whenever one is taken. Take "
                "Accumulate(), several epochs, or parts of several batches; or split with access_task_boundaries=True."
            )


@dataclass(frozen=True)
class Refresh(Drawing):
    """Stores a random part of each experience's examples and re-estimates all of the past at the newest anchor.

    q = Σ_t ½ δᵀ C_t δ, with C_t of the stored examples of experience t at the newest parameters. `fraction` of an
    experience's examples are kept, drawn by `seed`.

    With `gradient=True`, q also carries Σ_t g_tᵀδ, the slope of past loss at the new anchor, which is no minimum of
    it. Where that slope leaves the range of C, q has no lower bound and a large strength or a long experience diverges.
    """

    fraction: float = 0.1
    seed: int = 0
    gradient: bool = False

    def __post_init__(self) -> None:
        settle(self, fraction=check_fraction, seed=check_seed, gradient=check_flag)

    @absorbing
    @in_own_precision
    def absorb(self, past: Past, risk: EmpiricalRisk, curvature: Curvature, structure: Structure) -> Past:
        self.check_past(past)
        newest = self.drawn(past, risk)
        stored = (*(old.at(newest) for old in past.stored), newest)
        models = (estimate(curvature, structure, one, gradient=self.gradient) for one in stored)
        return Past(reduce(add, models), stored, past.experiences + 1)

    def check_past(self, past: Past) -> None:
        """Raises ValueError where the examples of an experience are not stored."""
        check_stored("Refresh()", past)


def check_stored(policy: str, past: Past) -> None:
    """Raises ValueError where a past lacks the stored examples of an experience, from which `policy` estimates anew."""
    if len(past.stored) != past.experiences:
        raise ValueError(
            f"{policy} estimates the past anew from stored examples; this one stores those of {len(past.stored)} of "
            f"its {past.experiences} experiences. Absorb all of them with the same policy."
        )


def _check_names(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, (tuple, list)) or not all(isinstance(n, str) for n in value):
        raise TypeError(f"{name} takes names of parameters, as ('head.weight', 'head.bias'); got {value!r}.")
    return tuple(value)


def check_stays_small(structure: Structure) -> None:
    """Raises TypeError where each part of a stream would add to the memory of the past."""
    if structure.sums_grow:
        raise TypeError(
            f"{structure} keeps a term for each of the many parts of this online stream, which hides where its tasks "
            "end. Take Kronecker(), LowRank(..., max_rank=...), Dense() or Diagonal(), whose sums do not grow; or "
            "split with access_task_boundaries=True."
        )


def part_of(risk: EmpiricalRisk, fraction: float, seed: int, experience: int) -> EmpiricalRisk:
    """The random `fraction` of the examples of `risk` that is kept of experience number `experience`, counted from 0:
    equal for every policy and metric of one `seed`; the risk itself for a fraction of 1."""
    return risk if fraction == 1 else risk.subset(fraction, part_seed(seed, experience))


def part_seed(seed: int, experience: int) -> int:
    """The seed by which the kept part of an experience is drawn."""
    return (seed * 1_000_003 + experience) % 2**63
