"""Ready strategies: Avalanche's training loop with one of our plugins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.plugins.evaluation import default_evaluator
from avalanche.training.templates import SupervisedTemplate
from torch import nn

from avalanche_curv.core.curvature import Curvature, Fisher
from avalanche_curv.core.mitigators.selection import Kept
from avalanche_curv.core.policies import Accumulate, Policy
from avalanche_curv.core.stability import Guard, Warn
from avalanche_curv.core.structures import Diagonal, Structure
from avalanche_curv.plugins import CurvatureEWCPlugin, SpectralRegPlugin


class CurvatureEWC(SupervisedTemplate):
    """Naive training plus strength times a quadratic model of past loss; see `CurvatureEWCPlugin` for the options.

    The other arguments are those of Avalanche's strategies. The plugin is the attribute `ewc`.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: nn.Module | None = None,
        strength: float,
        curvature: Curvature = Fisher(),  # noqa: B008  a frozen value
        structure: Structure = Diagonal(),  # noqa: B008
        policy: Policy = Accumulate(),  # noqa: B008
        guard: Guard | None = Warn(),  # noqa: B008
        train_mb_size: int = 1,
        train_epochs: int = 1,
        eval_mb_size: int | None = None,
        device: str | torch.device = "cpu",
        plugins: Sequence[Any] | None = None,
        evaluator: EvaluationPlugin | Callable[[], EvaluationPlugin] = default_evaluator,
        eval_every: int = -1,
        **base_kwargs: Any,
    ) -> None:
        self.ewc = CurvatureEWCPlugin(
            strength, curvature=curvature, structure=structure, policy=policy, guard=guard
        )
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=criterion or nn.CrossEntropyLoss(),
            train_mb_size=train_mb_size,
            train_epochs=train_epochs,
            eval_mb_size=eval_mb_size,
            device=device,
            plugins=[*(plugins or ()), self.ewc],
            evaluator=evaluator,
            eval_every=eval_every,
            **base_kwargs,
        )


class SpectralReg(SupervisedTemplate):
    """Naive training plus strength times the spectral penalty; see `SpectralRegularizer` for the options.

    The other arguments are those of Avalanche's strategies. The plugin is the attribute `spectral`.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: nn.Module | None = None,
        strength: float = 1e-3,
        exponent: float = 2,
        every: int = 1,
        include: Iterable[Kept] = (),
        exclude: Iterable[Kept] = (),
        train_mb_size: int = 1,
        train_epochs: int = 1,
        eval_mb_size: int | None = None,
        device: str | torch.device = "cpu",
        plugins: Sequence[Any] | None = None,
        evaluator: EvaluationPlugin | Callable[[], EvaluationPlugin] = default_evaluator,
        eval_every: int = -1,
        **base_kwargs: Any,
    ) -> None:
        self.spectral = SpectralRegPlugin(
            strength, exponent=exponent, every=every, include=include, exclude=exclude
        )
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=criterion or nn.CrossEntropyLoss(),
            train_mb_size=train_mb_size,
            train_epochs=train_epochs,
            eval_mb_size=eval_mb_size,
            device=device,
            plugins=[*(plugins or ()), self.spectral],
            evaluator=evaluator,
            eval_every=eval_every,
            **base_kwargs,
        )
