"""Metrics of the plasticity of a model along training, for any strategy of Avalanche."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import Any

from avalanche.evaluation.metric_results import MetricValue

from avalanche_curv.core.hints import known_arguments
from avalanche_curv.core.options import Setting, check_count, check_number, check_seed
from avalanche_curv.core.quadratic.policies import part_seed
from avalanche_curv.core.risk.batches import random_part
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.metrics._published import ScalarMetric, finite
from avalanche_curv.metrics.training_accuracy import FromScratch, TrainingAccuracyMetric
from avalanche_curv.plasticity.measures import (
    WeightSpectrum,
    gradient_diversity,
    hidden_activations,
    parameter_norm,
    representation_change,
    representations,
    weight_spectra,
)
from avalanche_curv.plasticity.measures.representation import Activations
from avalanche_curv.plugins import _bridge, _tasks


@known_arguments
def plasticity_metrics(
    *,
    every: int = 100,
    examples: int = 128,
    threshold: float = 0.025,
    seed: int = 0,
    from_scratch: FromScratch | None = None,
) -> list[ScalarMetric]:
    """Metrics of the loss of plasticity itself, and of the weights, activations and gradients that go with it.

    They are published every `every` iterations, counted from the first of the experience, as `plasticity/...`, and at
    the end of each task as `plasticity_experience/...`:

    - `{spectral_norm, frobenius_norm, stable_rank, effective_rank, condition_number}` of the weights, their mean
      and, below it, of each (`/0.weight`): see `plasticity.WeightSpectrum`; `parameter_norm` = ‖θ‖₂;
    - `{dormant_units, zero_units}`: the fraction of all hidden units, and of those of each layer, with score s_i ≤
      `threshold`, and that are exactly zero on the probe; `{feature_effective_rank, feature_stable_rank}` of its
      activations, the mean over layers and of each: see `plasticity.Representation`;
    - `{gradient_effective_rank, gradient_condition_number}` of the probe's single gradients, over the whole network:
      see `plasticity.GradientDiversity`.

    The probe consists of so many random `examples` of the task, drawn by `seed`, in eval mode. Only at the end of each
    task:

    - `plasticity_experience/accuracy` on all training examples of the task; with `from_scratch`, which doubles the cost
      of training, also `.../accuracy_from_scratch` of a network that learned this task only, and how much better that
      is, `.../loss_of_plasticity`;
    - at the start of the next task, `plasticity_experience/representation_change` since the start of the one that
      ended, on its probe: see `plasticity.representation_change`.

    For a multilayer perceptron 784-256×4-10 one measurement takes two forward passes and one backward pass over the
    probe and a decomposition of each weight: as long as some ten steps of batch 128, which is a tenth of the training
    with `every=100`. The accuracy takes a forward pass over all examples of the task at its end; `from_scratch` trains
    once more. Text loggers print `plasticity/{spectral_norm,dormant_units,feature_effective_rank}` and
    `plasticity_experience/{accuracy,loss_of_plasticity}`; other loggers get all, those of each layer included.

    Values that are not finite are not published, such as those of a run that diverged, or the condition number of a
    singular weight and with it the mean over weights. Measuring draws no random numbers and leaves training
    bit-identical. Raises TypeError or ValueError for unusable options, and before training for a criterion without
    per-example form and a model without hidden layers.

    >>> [type(metric).__name__ for metric in plasticity_metrics(every=50)]
    ['WeightMetric', 'ProbeMetric', 'TrainingAccuracyMetric']
    """
    return [WeightMetric(every), ProbeMetric(every, examples, threshold, seed), TrainingAccuracyMetric(from_scratch)]


class WeightMetric(ScalarMetric):
    """Publishes norms, ranks and condition numbers of the weights, and ‖θ‖₂; see `plasticity_metrics`."""

    def __init__(self, every: int) -> None:
        super().__init__(every, ["plasticity/spectral_norm"])
        self._task_ends = _tasks.TaskEnds()

    def before_training(self, strategy: Any) -> None:
        weight_spectra(strategy.model)  # which raises where there is none

    def after_training_iteration(self, strategy: Any) -> list[MetricValue]:
        return self._published(strategy, "plasticity") if self.due(strategy) else []

    def after_training_exp(self, strategy: Any) -> list[MetricValue]:
        return self._published(strategy, "plasticity_experience") if self._task_ends.here(strategy) else []

    def _published(self, strategy: Any, group: str) -> list[MetricValue]:
        spectra = weight_spectra(strategy.model)
        values = {"parameter_norm": parameter_norm(strategy.model)}
        for quantity in (field.name for field in fields(WeightSpectrum)):
            values |= _with_mean(quantity, {name: getattr(one, quantity) for name, one in spectra.items()})
        return self.publish(strategy, finite(group, values))


class ProbeMetric(ScalarMetric):
    """Publishes measures of the activations and gradients of some examples of the task; see `plasticity_metrics`."""

    examples = Setting(partial(check_count, hint="128 is a fair probe."))
    threshold = Setting(partial(check_number, at_least=0, hint="The source takes 0.025."))
    seed = Setting(check_seed)

    def __init__(self, every: int, examples: int, threshold: float, seed: int) -> None:
        super().__init__(every, ["plasticity/dormant_units", "plasticity/feature_effective_rank"])
        self.examples, self.threshold, self.seed = examples, threshold, seed
        self._task_ends = _tasks.TaskEnds()
        self._tasks = 0
        self._begun = False  # the task, of which an online stream gives one part after another
        self._probe: EmpiricalRisk | None = None  # of the newest task, as frozen at its start

    def before_training_exp(self, strategy: Any) -> list[MetricValue]:
        if self._begun:
            return []
        _bridge.preflight(strategy, gradient_diversity)
        values: dict[str, float] = {}
        if self._probe is not None:
            now = self._probe.frozen_at(strategy.model)
            values = {"representation_change": representation_change(_activations(self._probe), _activations(now))}
        self._probe, self._begun = self._drawn(strategy), True
        _activations(self._probe)  # which raises where there is none
        return self.publish(strategy, finite("plasticity_experience", values))

    def after_training_iteration(self, strategy: Any) -> list[MetricValue]:
        return self._published(strategy, "plasticity") if self.due(strategy) else []

    def after_training_exp(self, strategy: Any) -> list[MetricValue]:
        if not self._task_ends.here(strategy):
            return []
        self._begun, self._tasks = False, self._tasks + 1
        return self._published(strategy, "plasticity_experience")

    def _drawn(self, strategy: Any) -> EmpiricalRisk:
        """The probe of the task that begins, a random part of its training examples."""
        _bridge.check_experience(strategy)
        size = len(_tasks.data_of(strategy.experience))
        part = random_part(size, min(1.0, self.examples / size), part_seed(self.seed, self._tasks))
        return _bridge.current_risk(strategy, self.examples, part.tolist())

    def _published(self, strategy: Any, group: str) -> list[MetricValue]:
        if self._probe is None:
            raise RuntimeError("Plasticity is measured in training; this experience has not begun.")
        now = self._probe.frozen_at(strategy.model)
        gradients = gradient_diversity(now)
        values = self._of_activations(now) | {
            "gradient_effective_rank": gradients.effective_rank,
            "gradient_condition_number": gradients.condition_number,
        }
        return self.publish(strategy, finite(group, values))

    def _of_activations(self, probe: EmpiricalRisk) -> dict[str, float]:
        layers = representations(_activations(probe), self.threshold)
        units = sum(one.units for one in layers.values())
        values: dict[str, float] = {}
        for name in ("dormant", "zero"):
            shares = {layer: getattr(one, name) for layer, one in layers.items()}
            values[f"{name}_units"] = sum(share * layers[layer].units for layer, share in shares.items()) / units
            values |= {f"{name}_units/{layer}": share for layer, share in shares.items()}
        for name in ("effective_rank", "stable_rank"):
            values |= _with_mean(f"feature_{name}", {layer: getattr(one, name) for layer, one in layers.items()})
        return values


def _activations(probe: EmpiricalRisk) -> Activations:
    inputs, _ = next(iter(probe))
    return hidden_activations(probe.model, inputs)


def _with_mean(quantity: str, by_layer: Mapping[str, float]) -> dict[str, float]:
    """The quantity of each layer, by name, and its mean over layers."""
    mean = sum(by_layer.values()) / len(by_layer)
    return {quantity: mean} | {f"{quantity}/{layer}": value for layer, value in by_layer.items()}
