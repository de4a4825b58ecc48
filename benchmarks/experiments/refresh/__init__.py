"""The research log's Table 1: a quadratic picture kept at each task's end against one refreshed there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import Experiment, Options
from benchmarks.harness.experiment import Context, Record
from benchmarks.harness.plots import Curves, plot_curves
from benchmarks.harness.summary import Summary
from benchmarks.harness.tables import Column, table

if TYPE_CHECKING:
    from avalanche_curv import Policy
    from benchmarks.harness.results import Results


@dataclass(frozen=True)
class Config:
    """One policy on the sine stream, with the log's model and training."""

    label: str
    policy: Policy | None
    strength: float
    experiences: int = 9
    steps: int = 100
    batch: int = 32
    rate: float = 1e-2
    weight_decay: float = 1e-3
    memory: float = 0.1
    every: int = 1

    @property
    def cost(self) -> float:
        return 1.0 if self.policy is None else 2.0


STRENGTHS = {"accumulate": 0.1, "refresh": 1.0, "refresh with gradient": 1.0}  # `run tune --target refresh --seeds 2`

PUBLISHED = {
    ("final", "accumulate"): (Summary(0.688, 0.053, 0), Summary(0.654, 0.051, 0), Summary(3.382, 1.015, 0),
                              Summary(6.354, 0.334, 0)),
    ("final", "refresh"): (Summary(0.742, 0.037, 0), Summary(0.725, 0.025, 0), Summary(0.056, 0.064, 0),
                           Summary(5.522, 0.593, 0)),
    ("trajectory", "accumulate"): (Summary(0.668, 0.053, 0), Summary(0.662, 0.026, 0), Summary(2.845, 0.872, 0),
                                   Summary(6.379, 0.571, 0)),
    ("trajectory", "refresh"): (Summary(0.710, 0.069, 0), Summary(0.705, 0.021, 0), Summary(0.407, 0.134, 0),
                                Summary(5.825, 0.392, 0)),
}
MEASURES = ("all_accuracy", "stored_accuracy", "kappa_abs", "gamma", "kappa", "alpha", "gamma_linear", "alpha_linear")


class Refresh(Experiment):
    """Both pictures along each trajectory at every step; the picture that the policy trains with enters the table."""

    name = "refresh"

    def configs(self, options: Options) -> Sequence[Config]:
        from avalanche_curv import Accumulate
        from avalanche_curv import Refresh as RefreshPolicy

        policies = {
            "sequential": None,
            "accumulate": Accumulate(fraction=0.1),
            "refresh": RefreshPolicy(fraction=0.1),
            "refresh with gradient": RefreshPolicy(fraction=0.1, gradient=True),
        }
        size = {"experiences": 3, "steps": 10} if options.quick else {}
        return [Config(name, policy, STRENGTHS.get(name, 0.0), **size) for name, policy in policies.items()]

    def run(self, config: Config, seed: int, context: Context) -> Sequence[Record]:
        from benchmarks.experiments.refresh.run import run

        return run(config, seed, context)

    def report(self, results: Results, out: Path) -> str:
        config = next(results.config(label) for label in results.labels if results.config(label))
        _figure(results, out, config["steps"])
        return "\n\n".join([
            "# Refreshing the curvature: the research log's Table 1",
            f"Sine stream of {config['experiences']} tasks, MLP 2-100-2 with ReLU (502 parameters), true Fisher, "
            f"dense, {config['memory']:.0%} of each task's training examples stored; Adam {config['rate']}, decay "
            f"{config['weight_decay']}, cosine per task, {config['steps']} steps a task, batch {config['batch']}. "
            "κ is |κ| and γ the gradient error, means over the stored examples of all past tasks, in the picture that "
            "the row trains with, without linear term; mean ± standard deviation over n seeds.",
            _table(results),
            _pictures(results),
            "![Error of both pictures](refresh.png)",
        ])


def picture_of(label: str) -> str:
    """The picture that a row trains with; the sequential trajectory is read with the accumulated one."""
    return "refresh" if label.startswith("refresh") else "accumulate"


def _table(results: Results) -> str:
    columns = [
        Column("strategy"), Column("λ"), Column("all acc."), Column("stored acc."), Column("κ"), Column("γ"),
        Column("n"),
    ]
    rows: list[list] = []
    for moment, title in (("final", "final step"), ("trajectory", "trajectory average")):
        for label in results.labels:
            picture = picture_of(label)
            own = [results.final(f"{moment}/{picture}/{measure}", label) for measure in MEASURES[:4]]
            rows.append([f"{label}, {title}", f"{results.config(label).get('strength', 0):g}", *own,
                         own[0].n if own[0] else 0])
            if (moment, label) in PUBLISHED:
                rows.append([f"published: {label}, {title}", "?", *PUBLISHED[moment, label], "?"])
    return table(columns, rows)


def _pictures(results: Results) -> str:
    """Both pictures on each trajectory."""
    columns = [
        Column("trajectory"), Column("κ accumulate"), Column("κ refresh"), Column("γ accumulate"),
        Column("γ refresh"), Column("γ refresh, linear term"), Column("α refresh, linear term"),
    ]
    names = ("accumulate/kappa_abs", "refresh/kappa_abs", "accumulate/gamma", "refresh/gamma",
             "refresh/gamma_linear", "refresh/alpha_linear")
    rows = [[label, *(results.final(f"trajectory/{name}", label) for name in names)] for label in results.labels]
    return "Both pictures on every trajectory, trajectory averages:\n\n" + table(columns, rows)


def _figure(results: Results, out: Path, steps: int) -> None:
    kappa, accuracy = ({label: results.curve(name, label) for label in results.labels} for name in ("kappa_abs", "acc"))
    last = max((point[0] for curve in accuracy.values() for point in curve), default=0)
    marks = [float(step) for step in range(steps, int(last) + 1, steps)]
    panels = [
        Curves(accuracy, "accuracy on seen tasks", "Accuracy", marks=marks),
        Curves(kappa, "mean |κ|", "Error of the picture that each strategy trains with", log=True, marks=marks),
    ]
    plot_curves(out / "refresh.png", panels, xlabel="training iteration", labels=results.labels)


experiment = Refresh()
