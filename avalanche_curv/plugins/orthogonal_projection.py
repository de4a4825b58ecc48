"""Orthogonal projection as an Avalanche plugin: steps that leave directions of the past alone."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

from avalanche.training.plugins import SupervisedPlugin

from avalanche_curv.core.arguments import outside
from avalanche_curv.core.curvature.base import NonFiniteCurvatureError
from avalanche_curv.core.options import Configured, Fixed, Forwarded, Setting, check_count, check_kind, optional
from avalanche_curv.core.projection import (
    FreezeUncovered,
    InputSpace,
    Projection,
    Projector,
    ProtectedSpace,
    Protection,
    StepProjection,
    Uncovered,
)
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.parameters import ParameterSpace
from avalanche_curv.core.risk.selection import ParameterSelector, Selection, Unprotected, in_words, selection_of
from avalanche_curv.core.state import State, check_state, state_of
from avalanche_curv.plugins import _bridge, _tasks


class OrthogonalProjectionPlugin(Configured, SupervisedPlugin):
    """Projects each training step on the orthogonal complement of what past experiences need.

    At the end of an experience `protect` finds its directions, and they join one orthonormal basis U of the union of
    all (`protected`, a `ProtectedSpace`): Δ ← Δ − U Uᵀ Δ. By default they are the inputs of each linear and
    convolutional layer (`InputSpace()`), which a forward pass over 300 examples finds; `Eigenspace()` takes the top
    eigenvectors of a curvature in all parameters, at many times the cost. The step itself is projected, so that the
    parameters stay in the complement under any optimiser; `GradientProjection()` and `SequentialProjection()` are for
    comparison.

    `max_rank` bounds the rank of each basis and keeps the directions along which past curvature is largest. A basis of
    k rows takes k P numbers, and j k in double precision for the j directions of each task; all bases together up to
    `max_bytes`. `StepProjection` reads a large one in 16 bits, a copy of half its memory while a task trains. With
    nothing protected, as in the first experience, training is exactly Naive's; with all protected, no parameter moves.

    The step is what changes between `before_update` and this plugin's `after_update`: put it behind plugins that change
    parameters there. It goes with penalties, replay and mitigators, but what these do between two tasks is not
    projected. `batch_size` is how many examples are loaded at once.

    Protected are trainable parameters, or with `include` those that it selects by name ("head", "*.bias") or by type of
    module, also where they are frozen (`requires_grad=False`) and train only later; without those that `exclude`
    selects. What was ever protected stays so, also in experiences that end while it is frozen.

    What a projection cannot protect: new heads and rows that grow later are free, though they may change what the model
    says of old inputs (`growth/...` of `fidelity_metrics` shows it), and so are parameters that were frozen until now
    and not included, which is warned of before their first step; running statistics of norm layers, and parameters of
    which no directions are known, hold still from the end of the first experience (`uncovered=FreezeUncovered()`), norm
    layers in eval mode, or go on as they are (`uncovered=LeaveUncovered()`). Which parameters will hold still is said
    in a warning before the first step. Other buffers are not looked at.

    Raises TypeError or ValueError for unusable options when it is made; ValueError for an online stream that hides
    where its tasks end; before the first step of an experience TypeError for an optimiser that needs a closure,
    TypeError or ValueError for selectors that fit no parameter and for whatever would keep it from being absorbed at
    its end, which is tried on four of its examples (a criterion without a per-example form, no examples); MemoryError
    before an experience after which the bases may be over `max_bytes`; NonFiniteCurvatureError at the end of one that
    diverged, when `protected` still holds what came before.
    """

    protect = Fixed[Protection](partial(check_kind, kind=Protection, example="InputSpace(Energy(0.95))"))
    projection = Fixed[Projection](partial(check_kind, kind=Projection, example="StepProjection()"))
    uncovered = Fixed[Uncovered](partial(check_kind, kind=Uncovered, example="FreezeUncovered()"))
    max_rank = Fixed[int | None](optional(check_count))
    selection = Fixed[Selection]()
    include, exclude = Forwarded("selection"), Forwarded("selection")
    max_bytes = Setting(partial(check_count, hint="It is a number of bytes."))
    batch_size = Setting(check_count)
    protected = Setting[ProtectedSpace](partial(check_kind, kind=ProtectedSpace, example="ProtectedSpace()"))

    def __init__(
        self,
        protect: Protection = InputSpace(),  # noqa: B008  a frozen value
        *,
        projection: Projection = StepProjection(),  # noqa: B008
        uncovered: Uncovered = FreezeUncovered(),  # noqa: B008
        max_rank: int | None = None,
        max_bytes: int = 4 * 2**30,
        batch_size: int = 256,
        include: Iterable[ParameterSelector] = (),
        exclude: Iterable[ParameterSelector] = (),
    ) -> None:
        super().__init__()
        self.protect, self.projection, self.uncovered = protect, projection, uncovered
        self.max_rank, self.max_bytes, self.batch_size = max_rank, max_bytes, batch_size
        self.selection = selection_of(include, exclude)
        projection.check_rank(max_rank)
        self.protected = ProtectedSpace()
        self._unprotected = Unprotected()
        self._projector: Projector | None = None  # for the length of an experience
        self._task_ends = _tasks.TaskEnds()
        self._resting: list[str] = []  # names of norm layers in eval mode for the length of an experience

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        _bridge.check_once(self, strategy)
        _check_optimizer(strategy.optimizer)

    def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        if not _tasks.tells_tasks(strategy):
            raise ValueError(
                "What a task needs is known at its end, and this online stream hides where its tasks end. Split it "
                "with access_task_boundaries=True, or take CurvatureEWC, which takes it part by part."
            )
        _bridge.check_experience(strategy)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        _bridge.preflight(strategy, self._try, self.selection)
        space = _bridge.current_space(strategy, self.selection).union(self.protected.space)
        self.protected.check(
            self.protect, space, _bridge.current_itemsize(strategy),
            max_rank=self.max_rank, max_bytes=self.max_bytes,
        )
        self.protected = self.protected.following(strategy.model)
        self._projector = Projector(self.protected, self.projection)
        resting = [module for module in self.protected.resting(strategy.model) if module.training]
        names = {id(module): name for name, module in strategy.model.named_modules()}
        self._resting = [names[id(module)] for module in resting]
        for module in resting:
            module.eval()

    def _try(self, risk: EmpiricalRisk) -> None:
        """Raises what would keep an experience from being absorbed, as seen on a few of its examples."""
        self.protect.check_loss(risk.loss)
        if not self.protected.experiences:
            tried = ProtectedSpace().absorb(risk, self.protect, uncovered=self.uncovered, max_rank=self.max_rank)
            if tried.held.size:
                _warn_held(self.protect, tried.held, risk.space)

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        self._unprotected.say(self.protected.unprotected(strategy.model))
        if self._projector is not None:
            if self._projector.space is not self.protected:
                self._projector = Projector(self.protected, self.projection)
            self._projector.before_step(strategy.model)

    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        if self._projector is not None:
            self._projector.after_step(strategy.model)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        for name in self._resting:
            strategy.model.get_submodule(name).train()
        self._resting, self._projector = [], None
        if self._task_ends.here(strategy):
            self._absorb(strategy)

    def state_dict(self) -> State:
        """What the plugin knows between two experiences, as tensors, numbers, strings, tuples and dictionaries, for
        `torch.save`: the protected space, and how far an online stream is in its task. Options are not in it."""
        return state_of(
            type(self).__name__, protected=self.protected.state_dict(), task_ends=self._task_ends.state_dict()
        )

    def load_state_dict(self, state: State) -> None:
        """Takes over what `state_dict` returned, as by `torch.load(path, weights_only=True)`, of a plugin with the same
        options. Raises ValueError for any other state, with what came; the plugin is then as it was."""
        parts = check_state(state, type(self).__name__, "protected", "task_ends")["fields"]
        protected = ProtectedSpace.load_state_dict(parts["protected"])
        self._task_ends.load_state_dict(parts["task_ends"])
        self.protected, self._projector = protected, None

    def _absorb(self, strategy: Any) -> None:
        risk = _bridge.current_risk(strategy, self.batch_size, selection=self.selection)
        try:
            self.protected = self.protected.absorb(
                risk, self.protect, uncovered=self.uncovered, max_rank=self.max_rank
            )
        except NonFiniteCurvatureError as error:
            raise NonFiniteCurvatureError(
                f"Experience {_bridge.current_number(strategy)}: {error} What the {self.protected.experiences} "
                "experiences before it need is kept in `protected`."
            ) from error


def _warn_held(protect: Protection, held: ParameterSpace, whole: ParameterSpace) -> None:
    """Warns that the parameters `held`, of the `whole`, will not move after the first experience, with the remedy."""
    warnings.warn(
        f"{type(protect).__name__} knows no directions of {held.size:,} of the {whole.size:,} parameters, which are of "
        f"other layers than it covers, or of layers that are called more than once: {in_words(held.names)}. They hold "
        "still from the end of the first experience on. protect=Eigenspace() protects directions of all parameters; "
        "uncovered=LeaveUncovered() lets these change, and the past be lost as far as it depends on them.",
        UserWarning,
        stacklevel=outside(),
    )


def _check_optimizer(optimizer: Any) -> None:
    """Raises TypeError where a step takes several evaluations of the loss."""
    accepted = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    _, *given = inspect.signature(type(optimizer).step).parameters.values()  # without self
    if any(p.kind in accepted and p.default is inspect.Parameter.empty for p in given):
        raise TypeError(
            f"{type(optimizer).__name__} needs a closure: it moves the parameters several times in one step, and what "
            "it learns of the loss on the way does not fit a projected step. Use SGD, Adam, AdamW or the like."
        )
