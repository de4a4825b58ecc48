"""Ready strategies: Avalanche's training loop with one of our plugins."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from avalanche.core import BasePlugin
from avalanche.evaluation import PluginMetric
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.templates import SupervisedTemplate
from avalanche.training.templates.base import BaseTemplate
from torch import nn
from torch.optim import Optimizer

from avalanche_curv.core.curvature.base import Curvature
from avalanche_curv.core.curvature.fisher import Fisher
from avalanche_curv.core.hints import called
from avalanche_curv.core.losses import example_loss
from avalanche_curv.core.options import Configured, Forwarded, check_count, check_kind, check_whole, in_short, optional
from avalanche_curv.core.projection import InputSpace, Projection, Protection, StepProjection
from avalanche_curv.core.quadratic.policies import Accumulate, Past, Policy
from avalanche_curv.core.quadratic.stability import Guard, WarnIfUnstable
from avalanche_curv.core.quadratic.strength import StrengthRule
from avalanche_curv.core.risk.selection import ParameterSelector
from avalanche_curv.core.structures import Diagonal, Structure
from avalanche_curv.plasticity.mitigators.base import Mitigator
from avalanche_curv.plugins import CurvatureEWCPlugin, OrthogonalProjectionPlugin, SpectralRegPlugin

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Training(TypedDict, total=False):
    """The arguments of Avalanche's strategies beside model and optimizer, with its defaults, but for `eval_mb_size`."""

    criterion: Callable[[Any, Any], Any]
    """nn.CrossEntropyLoss()."""
    train_mb_size: int
    """1, the number of examples in a mini-batch of training."""
    train_epochs: int
    """1, the number of epochs of each experience."""
    eval_mb_size: int | None
    """None, the number of examples in a mini-batch of evaluation: `train_mb_size`."""
    device: str | torch.device
    """"cpu"."""
    plugins: Sequence[BasePlugin] | None
    """None, further plugins, which come before the one of the strategy."""
    evaluator: EvaluationPlugin | Callable[[], EvaluationPlugin] | None
    """Avalanche's default, which logs accuracy and loss to the terminal; None logs nothing."""
    eval_every: int
    """-1, after how many epochs to evaluate on the streams given to `train`; 0 at the end of each experience."""
    peval_mode: Literal["epoch", "iteration"]
    """"epoch", what `eval_every` counts."""


class _WithPlugin(Configured, SupervisedTemplate):
    """Naive training with a plugin of ours behind those of the caller. The constructors of its subclasses show the
    arguments of `Training` beside their own."""

    def __init_subclass__(cls, **options: Any) -> None:
        if "__init__" in vars(cls):
            _show_training(cls.__init__)
        super().__init_subclass__(**options)

    def __init__(
        self, *, model: nn.Module, optimizer: Optimizer, plugin: BasePlugin, **training: Unpack[Training]
    ) -> None:
        check_kind("model", model, nn.Module, "SimpleMLP()")
        check_kind("optimizer", optimizer, Optimizer, "torch.optim.SGD(model.parameters(), lr=0.1)")
        given = _checked(training.pop("plugins", None))
        self._plugin, every = plugin, {"eval_mb_size": None, **training}
        for name in TRAINING_CHECKS.keys() & every.keys():
            TRAINING_CHECKS[name](name, every[name])
        super().__init__(model=model, optimizer=optimizer, plugins=[*given, plugin], **every)

    def described(self) -> Iterable[str]:
        return self._plugin.described()


def _check_evaluator(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is an evaluator, makes one, or is None."""
    if not (value is None or isinstance(value, EvaluationPlugin) or callable(value)):
        raise TypeError(f"{name} must be an EvaluationPlugin; got {in_short(value)}. Give EvaluationPlugin(*metrics).")


TRAINING_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "train_mb_size": check_count, "train_epochs": check_whole, "eval_mb_size": optional(check_count),
    "evaluator": _check_evaluator,
}  # fmt: skip


def _show_training(constructor: Any) -> None:
    """Gives a constructor that takes `**training: Unpack[Training]` the signature that it has with all of these."""
    own = inspect.signature(constructor)
    *named, last = own.parameters.values()
    if last.kind is not last.VAR_KEYWORD or last.annotation != "Unpack[Training]":
        return
    theirs = inspect.signature(SupervisedTemplate.__init__).parameters
    further = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if name == "eval_mb_size" else theirs[name].default,
            annotation=annotation.__forward_arg__,
        )
        for name, annotation in Training.__annotations__.items()
    ]
    constructor.__signature__ = own.replace(parameters=[*named, *further])


def _check_criterion(criterion: Any) -> None:
    """Raises TypeError for a criterion without a per-example form."""
    if criterion is not None:
        example_loss(criterion)


def _checked(plugins: Any) -> Sequence[BasePlugin]:
    """Raises TypeError for plugins that are no list, and for a plugin that is none, with what is meant."""
    if plugins is None:
        return ()
    if isinstance(plugins, (BasePlugin, type)) or not isinstance(plugins, Iterable):
        raise TypeError(f"plugins must be a list of plugins, such as [ReplayPlugin(mem_size=200)]; got {plugins!r}.")
    found = [*plugins]
    for wrong in (plugin for plugin in found if not isinstance(plugin, BasePlugin)):
        kind = wrong if isinstance(wrong, type) else type(wrong)
        if issubclass(kind, BaseTemplate):
            remedy = f"{kind.__name__} is a strategy. Give its plugin, such as {kind.__name__}Plugin(...)."
        elif issubclass(kind, PluginMetric):
            remedy = "Metrics go into evaluator=EvaluationPlugin(...)."
        elif isinstance(wrong, Mitigator):
            remedy = f"Did you mean MitigatorPlugin({wrong!r})?"
        else:
            remedy = f"Did you mean {called(kind)}?" if kind is wrong else "Give a list such as [GEMPlugin(256, 0.5)]."
        raise TypeError(f"plugins must be a list of plugins; got {wrong!r} among them. {remedy}")
    return found


class CurvatureEWC(_WithPlugin):
    """Trains on task loss + strength · q(θ), with q a quadratic model of the loss on past experiences.

    `strength` is λ, or a rule that chooses it (`Evidence()`); `curvature` and `structure` say which matrix q has and
    how it is stored, `policy` how the models of past experiences are combined, `guard` what happens where the penalty
    alone would diverge, `past` where q begins for a pretrained model, `include` and `exclude` which parameters it is
    of, `examples_per_experience` how much a part of an online stream weighs that hides where its tasks end
    (`CurvatureEWCPlugin`).
    The arguments from `criterion` on are those of Avalanche's strategies (`Training`). The plugin is the attribute
    `ewc`, and raises its errors. Raises TypeError for an argument that it does not take, with the one that is meant,
    for a criterion without per-example form and for plugins that are none.
    """

    rule, strength, guard = Forwarded("ewc"), Forwarded("ewc"), Forwarded("ewc")
    curvature, structure, policy = Forwarded("ewc"), Forwarded("ewc"), Forwarded("ewc")
    past, include, exclude = Forwarded("ewc"), Forwarded("ewc"), Forwarded("ewc")
    examples_per_experience = Forwarded("ewc")

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        strength: float | StrengthRule,
        curvature: Curvature = Fisher(),  # noqa: B008  a frozen value
        structure: Structure = Diagonal(),  # noqa: B008
        policy: Policy = Accumulate(),  # noqa: B008
        guard: Guard | None = WarnIfUnstable(),  # noqa: B008
        past: Past = Past(),  # noqa: B008
        examples_per_experience: int = 1000,
        include: Iterable[ParameterSelector] = (),
        exclude: Iterable[ParameterSelector] = (),
        **training: Unpack[Training],
    ) -> None:
        _check_criterion(training.get("criterion"))
        self.ewc = CurvatureEWCPlugin(
            strength, curvature=curvature, structure=structure, policy=policy, guard=guard,
            past=past, examples_per_experience=examples_per_experience, include=include, exclude=exclude,
        )
        super().__init__(plugin=self.ewc, model=model, optimizer=optimizer, **training)


class OrthogonalProjection(_WithPlugin):
    """Trains with steps that are projected out of the directions that past experiences need.

    `protect` says which directions these are: by default the inputs of each layer (`InputSpace()`: gradient projection
    memory), or `Eigenspace(...)` of any curvature. `projection` says how a step is projected, `max_rank` bounds the
    number of directions kept (None: no bound), `include` and `exclude` which parameters are protected.
    `OrthogonalProjectionPlugin` takes further options, and warns of parameters that will hold still. The arguments from
    `criterion` on are those of Avalanche's strategies (`Training`). The plugin is the attribute `projection`. Raises as
    the plugin and `CurvatureEWC` do.
    """

    protect, max_rank = Forwarded("projection"), Forwarded("projection")
    include, exclude = Forwarded("projection"), Forwarded("projection")

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        protect: Protection = InputSpace(),  # noqa: B008
        projection: Projection = StepProjection(),  # noqa: B008
        max_rank: int | None = None,
        include: Iterable[ParameterSelector] = (),
        exclude: Iterable[ParameterSelector] = (),
        **training: Unpack[Training],
    ) -> None:
        _check_criterion(training.get("criterion"))
        self.projection = OrthogonalProjectionPlugin(
            protect, projection=projection, max_rank=max_rank, include=include, exclude=exclude
        )
        super().__init__(plugin=self.projection, model=model, optimizer=optimizer, **training)


class SpectralReg(_WithPlugin):
    """Trains on task loss + strength times the spectral penalty, which pulls the spectral norm of weights to 1.

    `exponent`, `every`, `include`, `exclude` and `seed` are those of `SpectralRegularizer`. The arguments from
    `criterion` on are those of Avalanche's strategies (`Training`). The plugin is the attribute `spectral`. Raises as
    the plugin does, and TypeError for an argument that it does not take and for plugins that are none.
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
        **training: Unpack[Training],
    ) -> None:
        self.spectral = SpectralRegPlugin(
            strength, exponent=exponent, every=every, include=include, exclude=exclude, seed=seed
        )
        super().__init__(plugin=self.spectral, model=model, optimizer=optimizer, **training)
