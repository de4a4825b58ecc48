"""What a round of mitigated steps holds."""

import copy

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from avalanche_curv.plasticity.mitigators.spectral import NOISE_EVERY
from benchmarks.experiments.speed import mitigators
from benchmarks.experiments.speed.attached import _times
from benchmarks.experiments.speed.experiment import Config, experiment
from benchmarks.experiments.speed.mitigators import EXACT_STEPS, MITIGATORS, ROUNDS, mitigated
from benchmarks.harness import Options


def test_whatever_a_mitigator_does_from_time_to_time_falls_into_every_round():
    made = {name: make() for name, make in MITIGATORS.items() if make is not None}
    periods = [made["wasserstein"].resort, made["shrink_perturb"].when.reuse, made["redo"].every, NOISE_EVERY]
    periods += [one.every for one in made.values() if hasattr(one, "every")]
    assert max(periods) <= Config().period


def test_a_round_takes_the_steps_of_a_period_and_two_of_exact_decompositions(monkeypatch):
    counts = {}

    def counted(works, rounds):
        for name, work in works.items():
            steps = []
            hook = register_optimizer_step_post_hook(lambda *_, steps=steps: steps.append(1))
            work()
            hook.remove()
            counts[name] = len(steps)
        return {"rounds": [rounds]}

    monkeypatch.setattr(mitigators, "interleaved", counted)
    assert mitigated(Config(width=4, batch=2, period=9)) == {"rounds": [ROUNDS]}
    assert counts == {name: EXACT_STEPS if name == "exact" else 9 for name in MITIGATORS}


def test_timed_steps_have_the_penalty_attached_or_in_the_loss():
    start = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    batch = torch.randn(6, 3, dtype=torch.float64), torch.randint(2, (6,))
    models = []

    def build():
        models.append(copy.deepcopy(start))
        return models[-1]

    times = _times(build, batch, rounds=2, steps=3)
    plain, attached, added = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models)
    assert [(name, len(seconds)) for name, seconds in times.items()] == [("plain", 2), ("attached", 2), ("added", 2)]
    assert torch.equal(attached, added)
    assert not torch.equal(attached, plain)


def test_the_quick_grid_takes_short_rounds():
    (config,) = experiment.configs(Options(quick=True))
    assert config.period < 10
