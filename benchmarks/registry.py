"""The experiments by name. Nothing is imported until one is asked for, so ``list`` is immediate.

To add an experiment, add one entry: its name, the place of its `Experiment` object, and one line for ``list``.
"""

from benchmarks.harness.registered import Registered

EXPERIMENTS = {
    "refresh": Registered(
        "benchmarks.refresh:experiment",
        "How wrong a quadratic model of past loss becomes, kept at its anchor or refreshed",
    ),
    "compare": Registered(
        "benchmarks.compare:experiment",
        "Accuracy and forgetting of the strategies of this package and of Avalanche, on one stream",
    ),
    "tune": Registered(
        "benchmarks.tune:experiment",
        "Strengths for the other experiments, on seeds that they never report",
    ),
    "speed": Registered(
        "benchmarks.speed:experiment",
        "Cost of a penalty step, of estimates and of fidelity, as ratios to plain training work",
    ),
    "cost": Registered(
        "benchmarks.cost:experiment",
        "Price and accuracy of every curvature and structure, beside other tools",
    ),
}
