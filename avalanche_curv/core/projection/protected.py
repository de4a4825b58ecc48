"""The protected space of all past tasks: subspaces that later steps stay out of, and parameters that hold still."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from avalanche_curv.core.arguments import takes
from avalanche_curv.core.nested import index
from avalanche_curv.core.options import OneLine, check_count, counted
from avalanche_curv.core.precision import in_own_precision
from avalanche_curv.core.projection.blocks import Parts, ProtectedBlock
from avalanche_curv.core.projection.protection import Finding, Protection
from avalanche_curv.core.projection.subspace import Subspace, energy, orthonormal, principal_angles
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.frozen import unwrapped
from avalanche_curv.core.risk.parameters import ParameterSpace
from avalanche_curv.core.risk.selection import training
from avalanche_curv.core.state import Saved
from avalanche_curv.core.structures.memory import human_bytes

NOTHING = ParameterSpace((), ())


class Uncovered(ABC):
    """What happens to parameters of which a basis knows no directions, and to running statistics of norm layers."""

    @abstractmethod
    def held(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Which of these parameters, or modules with running statistics, hold still."""


@dataclass(frozen=True)
class FreezeUncovered(Uncovered):
    """Parameters without known directions hold still from the end of the first task that uses them: nothing of the past
    is lost, and less is free."""

    def held(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return names


@dataclass(frozen=True)
class LeaveUncovered(Uncovered):
    """Parameters without known directions change as in plain training; the past is lost as far as it depends on
    them."""

    def held(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class ProtectedSpace(OneLine, Saved):
    """The directions that past tasks need: an orthonormal basis U of their union for each block of parameters.

    A step Δ becomes Δ − Δ Uᵀ U in each block: one projection on the complement of the union. Parameters and rows that
    are new in a task are free in it, and so are those that were frozen (`requires_grad=False`) in all tasks before and
    not included in their risks: `frozen` names these, and `unprotected` says which of them train after all. What was
    ever protected stays so, also in tasks that are absorbed while it is frozen.

    Parameters of which no directions are known hold still altogether, or change freely (`FreezeUncovered()`,
    `LeaveUncovered()`): `held` are those that hold still, `statistics` the modules whose running statistics do.
    `absorb` returns a new space.
    """

    blocks: Mapping[str, ProtectedBlock] = field(default_factory=dict)
    held: ParameterSpace = NOTHING
    statistics: tuple[str, ...] = ()
    experiences: int = 0
    frozen: tuple[str, ...] = ()

    def described(self) -> tuple[str, ...]:
        if not self.experiences:
            return ()
        return counted(self.experiences, "experience"), f"{self.used} of {self.space.size} dimensions"

    @takes(
        risk=(EmpiricalRisk, "EmpiricalRisk.snapshot(model, criterion, batches)"),
        protection=(Protection, "Eigenspace(Fisher(), Rank(20))"), uncovered=(Uncovered, "FreezeUncovered()"),
    )  # fmt: skip
    @in_own_precision
    def absorb(
        self,
        risk: EmpiricalRisk,
        protection: Protection,
        *,
        uncovered: Uncovered = FreezeUncovered(),
        max_rank: int | None = None,
    ) -> ProtectedSpace:
        """This space with what one more task needs.

        Args: the `risk` of the task, frozen at the end of its training; `protection`, the recipe for its directions;
        `uncovered`, what happens to parameters without known directions; `max_rank`, the largest rank of each basis.

        Raises TypeError or ValueError for options of the wrong kind, ValueError for blocks of parameters that differ
        from those of earlier tasks, and NonFiniteCurvatureError where the model or its inputs hold NaN or infinity.
        """
        if max_rank is not None:
            check_count("max_rank", max_rank)
        risk = risk.covering(self.space.names)
        found = protection.find(risk, self.experiences)
        self._check_blocks(found.findings, protection)
        used, statistics = parts_in_use(risk)
        shapes = dict(zip(risk.space.names, risk.space.shapes))
        names = uncovered.held(tuple(name for name in found.uncovered if name in used))
        held = self.held.union(ParameterSpace(names, tuple(shapes[name] for name in names)))
        merged = {f.key: _merged(self.blocks.get(f.key), f, risk.anchor, max_rank) for f in found.findings}
        whole = ProtectedSpace(
            {**self.blocks, **merged},
            statistics=tuple(dict.fromkeys((*self.statistics, *uncovered.held(statistics)))),
            experiences=self.experiences + 1,
            frozen=tuple(n for n in dict.fromkeys((*self.frozen, *risk.frozen)) if n not in risk.space.names),
        )
        return replace(whole.restricted(frozenset(whole.space.names) - {*held.names}), held=held)

    def following(self, model: nn.Module) -> ProtectedSpace:
        """This space on the device of `model`, to which that may have been moved."""
        device = next((parameter.device for parameter in model.parameters()), None)
        if device is None or all(block.subspace.rows.device == device for block in self.blocks.values()):
            return self
        blocks = {key: replace(b, subspace=b.subspace.on(device)) for key, b in self.blocks.items()}
        return replace(self, blocks=blocks)

    def unprotected(self, model: nn.Module) -> tuple[str, ...]:
        """The names of the parameters of `model` that train, but were frozen in all past tasks, so that no direction of
        theirs is protected. Parameters that came later are not among them."""
        return training(self.frozen, model)

    @property
    def is_empty(self) -> bool:
        """Whether every step is allowed."""
        return not self.held.names and not any(block.subspace.rank for block in self.blocks.values())

    @property
    def used(self) -> int:
        """The number of dimensions of the parameters that are closed to steps."""
        return sum(block.used for block in self.blocks.values()) + self.held.size

    @property
    def nbytes(self) -> int:
        """Memory of all bases, in bytes."""
        return sum(block.subspace.nbytes for block in self.blocks.values())

    @property
    def energy(self) -> float:
        """The part of past tasks' curvature that their own directions hold, where its trace is known; NaN elsewhere."""
        return energy(share for block in self.blocks.values() for share in block.subspace.shares)

    @property
    def tasks(self) -> tuple[int, ...]:
        """The numbers of the tasks that have added directions."""
        return tuple(sorted({share.task for block in self.blocks.values() for share in block.subspace.shares}))

    @in_own_precision
    def angles(self, first: int, second: int) -> Float[Tensor, "n"]:
        """The principal angles between the directions of two tasks that are still kept, over all blocks, in radians,
        smallest first; none for a task that has added no directions."""
        found = []
        for block in self.blocks.values():
            shares = {share.task: share.coordinates for share in block.subspace.shares}
            if first in shares and second in shares:
                found.append(principal_angles(orthonormal(shares[first]), orthonormal(shares[second])))
        return torch.cat(found).sort().values if found else torch.zeros(0, dtype=torch.float64)

    def resting(self, model: nn.Module) -> list[nn.Module]:
        """The modules of `model` whose running statistics hold still: to be kept in eval mode while it trains."""
        modules = dict(unwrapped(model).named_modules())
        return [modules[name] for name in self.statistics if name in modules]

    def values(self, model: nn.Module) -> dict[str, Tensor]:
        """The protected part of each parameter of `model`, to be read and written."""
        return dict(zip(self.space.names, (tensor.detach() for tensor in self.space.tensors(model))))

    @cached_property
    def space(self) -> ParameterSpace:
        """All parameters that are protected, in the shapes they had at the end of the last task."""
        whole = self.held
        for block in self.blocks.values():
            whole = block.layout.space.union(whole)
        return whole

    @in_own_precision
    def outside(self, vectors: Parts) -> dict[str, Tensor]:
        """The part of a vector outside of the protected space, for each parameter that has a part in that: exactly zero
        where nothing is free."""
        found = {name: torch.zeros_like(vectors[name]) for name in self.held.names}
        for block in self.blocks.values():
            if block.subspace.rank:
                found |= block.outside(vectors)
        return found

    @in_own_precision
    def leakage(self, moved: Parts, start: Parts) -> float:
        """‖Δ Uᵀ U‖ / ‖Δ‖ of the step Δ = `moved` − `start`: 0 outside of the protected space; NaN where Δ = 0."""
        norms = [block.norms(moved, start) for block in self.blocks.values()]
        held = [float((moved[name].double() - start[name].double()).norm()) for name in self.held.names]
        inside, total = (math.hypot(*some, *held) for some in (zip(*norms) if norms else ((), ())))
        return inside / total if total else math.nan

    def restricted(self, names: frozenset[str]) -> ProtectedSpace:
        """The protected space within the named parameters, for steps that move no others."""
        if names >= {*self.space.names}:
            return self
        blocks = ((key, block.restricted(names)) for key, block in self.blocks.items())
        kept = {key: block for key, block in blocks if block is not None}
        held = {name: shape for name, shape in zip(self.held.names, self.held.shapes) if name in names}
        return replace(self, blocks=kept, held=ParameterSpace(tuple(held), tuple(held.values())))

    def check(
        self, protection: Protection, space: ParameterSpace, itemsize: int, *, max_rank: int | None, max_bytes: int
    ) -> None:
        """Raises MemoryError where one more task of a model with the parameters of `space` could take the bases over
        `max_bytes`."""
        needed = self.nbytes
        for key, bound in protection.bounds(space).items():
            held = self.blocks[key].subspace if key in self.blocks else None
            rank = min(bound.dimension, bound.most + (held.rank if held else 0))
            rank = rank if max_rank is None else min(rank, max_rank)
            shares = bound.most + sum(len(share.values) for share in held.shares) if held else bound.most
            needed += itemsize * bound.dimension * rank + 8 * shares * (rank + 1) - (held.nbytes if held else 0)
        if needed > max_bytes:
            raise MemoryError(
                f"After this experience the bases of {protection} may need {human_bytes(needed)}, over their limit of "
                f"{human_bytes(max_bytes)}; they hold {human_bytes(self.nbytes)} now. Keep fewer directions, bound "
                "them by max_rank=..., use PerLayer() or InputSpace(), or raise max_bytes=...."
            )

    def _check_blocks(self, findings: Sequence[Finding], protection: Protection) -> None:
        """Raises ValueError where a finding shares parameters with a block that it does not join."""
        key_of = {name: key for key, block in self.blocks.items() for name in block.layout.space.names}
        for finding in findings:
            held = self.blocks.get(finding.key)
            strange = any(key_of.get(name, finding.key) != finding.key for name in finding.layout.space.names)
            if strange or (held is not None and held.layout.stacked != finding.layout.stacked):
                raise ValueError(
                    f"{protection} has other blocks of parameters than what is held of the {self.experiences} tasks "
                    "before. Protect all tasks in the same way, or start with a new ProtectedSpace()."
                )


def _merged(held: ProtectedBlock | None, finding: Finding, like: Tensor, max_rank: int | None) -> ProtectedBlock:
    outer = finding.layout if held is None else held.layout.union(finding.layout)
    empty = Subspace.empty(like.new_empty(outer.columns.size))
    before = empty if held is None else held.within(outer).subspace.on(like.device)
    return ProtectedBlock(outer, finding.added_to(before, outer).limited(max_rank))


@torch.enable_grad()
def parts_in_use(risk: EmpiricalRisk) -> tuple[frozenset[str], tuple[str, ...]]:
    """The names of the trainable parameters that the outputs depend on, and of the modules called that keep running
    statistics; seen on two examples."""
    inputs, _ = next(iter(risk))
    called: set[nn.Module] = set()

    def note(module: nn.Module, *_: Any) -> None:
        called.add(module)

    keeping = {n: m for n, m in risk.base.named_modules() if getattr(m, "running_mean", None) is not None}
    hooks = [module.register_forward_hook(note) for module in keeping.values()]
    try:
        outputs = risk.outputs(index(inputs, slice(2)))
    finally:
        for hook in hooks:
            hook.remove()
    gradients = torch.autograd.grad(outputs.sum(), risk.parameters, allow_unused=True)
    used = frozenset(name for name, gradient in zip(risk.space.names, gradients) if gradient is not None)
    return used, tuple(name for name, module in keeping.items() if module in called)
