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
from avalanche_curv.core.projection import Eigenspace, Projection, Protection, StepProjection
from avalanche_curv.core.quadratic.policies import Accumulate, Policy
from avalanche_curv.core.quadratic.stability import Guard, WarnIfUnstable
from avalanche_curv.core.structures import Diagonal, Structure
from avalanche_curv.plasticity.mitigators.base import ParameterSelector
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
    """Naive training plus strength times a quadratic model of past loss; see `CurvatureEWCPlugin` for the options.

    The other arguments are those of Avalanche's strategies: `criterion` (cross-entropy), `train_mb_size`,
    `train_epochs`, `device`, `plugins`, `evaluator` and so on. The plugin is the attribute `ewc`.
    """

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
        **training: Any,
    ) -> None:
        self.ewc = CurvatureEWCPlugin(
            strength, curvature=curvature, structure=structure, policy=policy, guard=guard
        )
        super().__init__(plugin=self.ewc, model=model, optimizer=optimizer, **training)


class OrthogonalProjection(_WithPlugin):
    """Naive training whose steps stay out of what past experiences need; see `OrthogonalProjectionPlugin` for the
    options, of which the plugin takes more.

    The other arguments are those of Avalanche's strategies, as for `CurvatureEWC`. The plugin is the attribute
    `projection`.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        protect: Protection = Eigenspace(),  # noqa: B008
        projection: Projection = StepProjection(),  # noqa: B008
        max_rank: int | None = None,
        **training: Any,
    ) -> None:
        self.projection = OrthogonalProjectionPlugin(protect, projection=projection, max_rank=max_rank)
        super().__init__(plugin=self.projection, model=model, optimizer=optimizer, **training)


class SpectralReg(_WithPlugin):
    """Naive training plus strength times the spectral penalty; see `SpectralRegularizer` for the options.

    The other arguments are those of Avalanche's strategies, as for `CurvatureEWC`. The plugin is the attribute
    `spectral`.
    """

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
