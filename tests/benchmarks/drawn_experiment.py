"""Two strategies on two slices of the plane, with every metric, for the tests of what TensorBoard shows."""

from dataclasses import dataclass

from benchmarks.harness import Experiment


@dataclass(frozen=True)
class Trained:
    policy: object
    strength: float
    clipped: bool = True


@dataclass(frozen=True)
class DrawnConfig:
    label: str
    method: object = None
    steps: int = 6


class Drawn(Experiment):
    name = "drawn"

    def configs(self, options):
        from avalanche_curv import Refresh

        return [DrawnConfig("Naive"), DrawnConfig("CurvatureEWC, refresh", Trained(Refresh(fraction=0.2), 10.0))]

    def run(self, config, seed, context):
        import torch
        from avalanche.logging import TensorboardLogger
        from avalanche.training import Naive
        from avalanche.training.plugins import EvaluationPlugin
        from torch import nn

        from avalanche_curv import CurvatureEWCPlugin, SineBoundary, fidelity_metrics, landscape_metrics

        benchmark = SineBoundary(2, examples=60, seed=seed)
        model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2))
        method = config.method
        plugins = [CurvatureEWCPlugin(method.strength, policy=method.policy)] if method else []
        metrics = [*fidelity_metrics(every=1, fraction=0.2), *landscape_metrics(every=2, fraction=0.2)]
        evaluator = EvaluationPlugin(*metrics, loggers=[TensorboardLogger(context.tensorboard_dir)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        strategy = Naive(
            model=model, optimizer=optimizer, train_mb_size=16, train_epochs=1, plugins=plugins, evaluator=evaluator
        )
        for experience in benchmark.train_stream:
            strategy.train(experience)
        for metric in ("accuracy/stored", "fidelity/refresh/kappa_abs", "fidelity/refresh/kappa/experience_0"):
            for step, value in zip(*evaluator.get_all_metrics()[metric]):
                yield {"metric": metric, "value": value, "step": step}
        yield {"metric": "average_accuracy", "value": 0.5 + 0.25 * bool(plugins)}
        yield {"metric": "forgetting", "value": 0.125 + seed}


def report(results, out):
    return "nothing"


experiment = Drawn()
