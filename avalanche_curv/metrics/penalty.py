"""The penalty on its own: what CurvatureEWC adds to the loss."""

from __future__ import annotations

from typing import Any

from avalanche.evaluation.metric_results import MetricValue

from avalanche_curv.metrics._published import ScalarMetric
from avalanche_curv.plugins import CurvatureEWCPlugin


def penalty_metrics(*, every: int = 1) -> list[ScalarMetric]:
    """`penalty/raw` = q(θ) and `penalty/weighted` = strength · q(θ), every n iterations.

    They are read from the strategy's CurvatureEWCPlugin; with several, numbered `penalty_1/...` and so on. A strategy
    without one emits nothing.
    """
    return [PenaltyMetric(every)]


class PenaltyMetric(ScalarMetric):
    """See `penalty_metrics`."""

    def after_training_iteration(self, strategy: Any) -> list[MetricValue]:
        if not self.due(strategy):
            return []
        values: dict[str, float] = {}
        found = [plugin for plugin in strategy.plugins if isinstance(plugin, CurvatureEWCPlugin)]
        for number, plugin in enumerate(found):
            if plugin.penalty is not None:
                group = f"penalty_{number}" if number else "penalty"
                raw = plugin.penalty.item()
                values |= {f"{group}/raw": raw, f"{group}/weighted": plugin.strength * raw}
        return self.publish(strategy, values)
