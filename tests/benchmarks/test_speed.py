"""What a round of mitigated steps holds."""

from torch.optim.optimizer import register_optimizer_step_post_hook

from avalanche_curv.plasticity.mitigators.spectral import NOISE_EVERY
from benchmarks.experiments.speed import mitigators
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


def test_the_quick_grid_takes_short_rounds():
    (config,) = experiment.configs(Options(quick=True))
    assert config.period < 10
