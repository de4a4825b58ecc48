"""The penalty that CurvatureEWC adds to the loss."""

from __future__ import annotations

from typing import Any

from avalanche.evaluation.metric_results import MetricValue

from avalanche_curv.core.hints import known_arguments
from avalanche_curv.core.quadratic.policies import RefreshEvent
from avalanche_curv.metrics._published import ScalarMetric
from avalanche_curv.plugins import CurvatureEWCPlugin


@known_arguments
def penalty_metrics(*, every: int = 1) -> list[ScalarMetric]:
    """Metrics of the penalty: `penalty/raw` = q(θ) and `penalty/weighted` = strength · q(θ), every n iterations.

    Under `AdaptiveRefresh` also `penalty/refreshes`, the number of refreshes during experiences so far, and, right
    after one, `penalty/error` = |L − q| of the stored examples before it. They are read from the strategy's
    CurvatureEWCPlugin; with several, numbered `penalty_1/...` and so on. A strategy without one emits nothing. Raises
    ValueError unless `every` is an integer of at least 1.

    The penalty is that of the step and is not computed anew: a measurement takes microseconds, and `every=1` is right.
    Text loggers print `penalty/weighted` and `penalty/refreshes`.
    """
    return [PenaltyMetric(every)]


class PenaltyMetric(ScalarMetric):
    """The values `penalty/...` of `penalty_metrics`."""

    def __init__(self, every: int) -> None:
        super().__init__(every, ["penalty*/weighted", "penalty*/refreshes"])
        self._events: dict[str, int] = {}

    def after_training_iteration(self, strategy: Any) -> list[MetricValue]:
        values: dict[str, float] = {}
        found = [plugin for plugin in strategy.plugins if isinstance(plugin, CurvatureEWCPlugin)]
        for number, plugin in enumerate(found):
            group = f"penalty_{number}" if number else "penalty"
            if self.due(strategy) and plugin.last_penalty is not None:
                raw = plugin.last_penalty.item()
                values |= {f"{group}/raw": raw, f"{group}/weighted": plugin.weight * raw}
            if plugin.policy.revises:
                values |= self._refreshed(strategy, plugin.past.refreshes, group)
        return self.publish(strategy, values)

    def _refreshed(self, strategy: Any, events: tuple[RefreshEvent, ...], group: str) -> dict[str, float]:
        values = {f"{group}/refreshes": float(len(events))} if self.due(strategy) else {}
        if len(events) > self._events.get(group, 0):
            self._events[group] = len(events)
            values |= {f"{group}/refreshes": float(len(events)), f"{group}/error": events[-1].error}
        return values
