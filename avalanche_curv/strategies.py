"""Ready strategies: Avalanche's training loop with one of our plugins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from avalanche.core import BasePlugin
from avalanche.training.templates import SupervisedTemplate
from torch import nn
from torch.optim import Optimizer

from avalanche_curv.core.curvature.base import Curvature
from avalanche_curv.core.curvature.fisher import Fisher
from avalanche_curv.core.options import Forwarded
from avalanche_curv.core.projection import Eigenspace, Projection, Protection, StepProjection
from avalanche_curv.core.quadratic.policies import Accumulate, Past, Policy
from avalanche_curv.core.quadratic.stability import Guard, WarnIfUnstable
from avalanche_curv.core.risk.selection import ParameterSelector
from avalanche_curv.core.structures import Diagonal, Structure
from avalanche_curv.plugins import CurvatureEWCPlugin, OrthogonalProjectionPlugin, SpectralRegPlugin


class _WithPlugin(SupervisedTemplate):
    """Naive training with a plugin of ours behind those of the caller."""

    def __init__(
        self,
        *,
        plugin: BasePlugin,
        plugins: Sequence[BasePlugin] | None = None,
        eval_mb_size: int | None = None,
        **training: Any,
    ) -> None:
        super().__init__(plugins=[*(plugins or ()), plugin], eval_mb_size=eval_mb_size, **training)


class CurvatureEWC(_WithPlugin):
    """Trains on task loss + strength · q(θ), with q a quadratic model of the loss on past experiences.

    `strength` is λ; `curvature` and `structure` say which matrix q has and how it is stored, `policy` how the models of
    past experiences are combined, `guard` what happens where the penalty alone would diverge, `past` where q begins for
    a pretrained model, `include` and `exclude` which parameters it is of, `examples_per_experience` how much a part of
    an online stream weighs that hides where its tasks end (`CurvatureEWCPlugin`).
    `training` are the arguments of Avalanche's strategies: `criterion` (cross-entropy), `train_mb_size`,
    `train_epochs`, `device`, `plugins`, `evaluator` and so on. The plugin is the attribute `ewc`, and raises
    its errors.
    """

    strength, guard = Forwarded("ewc"), Forwarded("ewc")
    curvature, structure, policy = Forwarded("ewc"), Forwarded("ewc"), Forwarded("ewc")
    past, include, exclude = Forwarded("ewc"), Forwarded("ewc"), Forwarded("ewc")
    examples_per_experience = Forwarded("ewc")

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        strength: float,
        curvature: Curvature = Fisher(),  # noqa: B008  a frozen value
        structure: Structure = Diagonal(),  # noqa: B008
        policy: Policy = Accumulate(),  # noqa: B008
        guard: Guard | None = WarnIfUnstable(),  # noqa: B008
        past: Past = Past(),  # noqa: B008
        examples_per_experience: int = 1000,
        include: Iterable[ParameterSelector] = (),
        exclude: Iterable[ParameterSelector] = (),
        **training: Any,
    ) -> None:
        self.ewc = CurvatureEWCPlugin(
            strength, curvature=curvature, structure=structure, policy=policy, guard=guard,
            past=past, examples_per_experience=examples_per_experience, include=include, exclude=exclude,
        )
        super().__init__(plugin=self.ewc, model=model, optimizer=optimizer, **training)


class OrthogonalProjection(_WithPlugin):
    """Trains with steps that are projected out of the directions that past experiences need.

    `protect` says which directions these are, `projection` how a step is projected, `max_rank` bounds the number of
    directions kept (None: no bound), `include` and `exclude` which parameters are protected.
    `OrthogonalProjectionPlugin` takes further options. `training` are the arguments
    of Avalanche's strategies: `criterion` (cross-entropy), `train_mb_size`, `plugins` and so on. The plugin is the
    attribute `projection`. Raises as the plugin does.
    """

    protect, max_rank = Forwarded("projection"), Forwarded("projection")
    include, exclude = Forwarded("projection"), Forwarded("projection")

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        protect: Protection = Eigenspace(),  # noqa: B008
        projection: Projection = StepProjection(),  # noqa: B008
        max_rank: int | None = None,
        include: Iterable[ParameterSelector] = (),
        exclude: Iterable[ParameterSelector] = (),
        **training: Any,
    ) -> None:
        self.projection = OrthogonalProjectionPlugin(
            protect, projection=projection, max_rank=max_rank, include=include, exclude=exclude
        )
        super().__init__(plugin=self.projection, model=model, optimizer=optimizer, **training)


class SpectralReg(_WithPlugin):
    """Trains on task loss + strength times the spectral penalty, which pulls the spectral norm of weights to 1.

    `exponent`, `every`, `include`, `exclude` and `seed` are those of `SpectralRegularizer`. `training` are the
    arguments of Avalanche's strategies: `criterion` (cross-entropy), `train_mb_size`, `plugins` and so on. The plugin
    is the attribute `spectral`. Raises as the plugin does.
    """

    strength, exponent, every = Forwarded("spectral"), Forwarded("spectral"), Forwarded("spectral")
    include, exclude, seed = Forwarded("spectral"), Forwarded("spectral"), Forwarded("spectral")

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        strength: float,
        exponent: float = 2,
        every: int = 1,
        include: Iterable[ParameterSelector] = (),
        exclude: Iterable[ParameterSelector] = (),
        seed: int = 0,
        **training: Any,
    ) -> None:
        self.spectral = SpectralRegPlugin(
            strength, exponent=exponent, every=every, include=include, exclude=exclude, seed=seed
        )
        super().__init__(plugin=self.spectral, model=model, optimizer=optimizer, **training)
