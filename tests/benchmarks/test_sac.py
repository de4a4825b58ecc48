"""The regulariser on stable-baselines3's SAC: what it reaches, what it leaves alone, and one run of the experiment."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.experiments.sac import experiment as sac
from benchmarks.experiments.sac.experiment import SETTINGS, Config, SACOptions, Setting, experiment
from benchmarks.experiments.sac.report import COLUMNS, PANELS, report
from benchmarks.harness import Context, Results, UsageError
from benchmarks.harness.experiment import describe

TINY = Setting("cartpole-balance", steps=60, prefill=20, every=30, reset_every=30, width=32, batch=16, episodes=1)
NORMALISED, PLAIN = Config("LayerNorm", TINY), Config("SAC", TINY, layer_norm=False)


def test_without_the_extra_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sac, "find_spec", lambda name: None if name == "shimmy" else object())
    with pytest.raises(UsageError, match=r"^experiment 'sac' needs shimmy: pip install -e '\.\[rl\]'\.$"):
        experiment.configs(SACOptions())


def test_a_preset_and_a_task_have_a_folder_of_their_own():
    assert experiment.variant(SACOptions()) == ""
    assert experiment.variant(SACOptions(preset="paper", task="walker-run")) == "paper-walker-run"


def test_a_report_of_few_results_says_what_it_has(tmp_path):
    row = {"metric": "mean_return", "label": "LayerNorm", "seed": 0, "step": None, "value": 7.0}
    header = {"label": "LayerNorm", "seed": 0, "config": describe(NORMALISED)}
    written = report(Results(("SAC", "LayerNorm"), (row,), (header,)), tmp_path)
    assert "| LayerNorm |       **7** |" in written
    assert (tmp_path / "sac.png").exists()


@pytest.fixture(scope="module")
def rl():
    """Skips where the extra is absent."""
    for name in ("stable_baselines3", "shimmy", "dm_control"):
        pytest.importorskip(name, reason="needs pip install -e '.[rl]'")


@pytest.fixture
def train(rl):
    """Make an agent with a regulariser of some strength, and train it so many updates on the same random steps."""

    def make(strength, updates, config=NORMALISED):
        agent = sac.build(config, seed=0)
        sac.regularise(agent, strength)
        agent.learn(TINY.prefill)
        if updates:
            agent.train(updates, batch_size=TINY.batch)
        return agent

    return make


def values(network):
    return [p.detach().clone() for p in network.parameters()]


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_actor_and_critic_are_regularised_but_not_the_target_nor_the_temperature(train):
    start, plain, held = train(0.0, 0), train(0.0, 1), train(10.0, 1)
    assert not same(values(plain.critic), values(held.critic))
    assert not same(values(plain.actor), values(held.actor))
    assert torch.equal(plain.log_ent_coef, held.log_ent_coef)
    assert torch.equal(plain.log_ent_coef.grad, held.log_ent_coef.grad)
    assert not torch.equal(start.log_ent_coef, held.log_ent_coef)
    assert all(p.grad is None for p in held.critic_target.parameters())
    # SB3 still averages the regularised critic into its target, and that is all that moves the target
    for old, critic, target in zip(*map(values, (start.critic_target, held.critic, held.critic_target))):
        assert torch.allclose(target, (1 - held.tau) * old + held.tau * critic, atol=1e-7)


@pytest.mark.parametrize("name", ["actor", "critic"])
def test_a_step_adds_the_gradient_of_the_penalty_to_that_of_the_loss(train, name):
    """An m × n weight of entries c has σ₁ = c √(mn) and u vᵀ = 1/√(mn): ∂/∂W λ (σ₁² − 1)² = 4 λ (σ₁² − 1) c."""
    gradients = []
    for strength in (0.0, 2.0):
        agent = train(strength, 0, PLAIN)
        network = getattr(agent, name)
        weight = next(p for p in network.parameters() if p.ndim == 2)
        nn.init.constant_(weight, 0.1)

        def look(*_, own=weight):
            gradients.append(own.grad.clone())

        network.optimizer.register_step_pre_hook(look)
        agent.train(1, batch_size=TINY.batch)
    expected = 4 * 2.0 * (0.01 * weight.numel() - 1) * 0.1
    added = gradients[1] - gradients[0]
    assert torch.allclose(added, torch.full_like(added, expected), rtol=1e-4)


def test_spectral_norms_of_the_critic_grow_and_are_held_by_the_regulariser(rl, train):
    fast = replace(PLAIN, setting=replace(TINY, rate=3e-3))
    start, plain, held = (
        sac.mean_spectral_norm(train(*how, fast).critic) for how in ((0.0, 0), (0.0, 200), (1e-2, 200))
    )
    assert plain > start + 0.2
    assert abs(held - 1) < 0.5 * abs(plain - 1)


@pytest.mark.parametrize("normalised", [True, False])
def test_layer_norm_stands_before_each_relu_of_actor_critic_and_target(rl, normalised):
    agent = sac.build(NORMALISED if normalised else PLAIN)
    for network in (agent.actor.latent_pi, agent.critic.qf0, agent.critic_target.qf0):
        kinds = [type(module) for module in network.modules() if not isinstance(module, nn.Sequential)]
        hidden = [nn.Linear, nn.LayerNorm, nn.ReLU] if normalised else [nn.Linear, nn.ReLU]
        assert kinds[: 2 * len(hidden)] == hidden * 2
        assert nn.LayerNorm not in kinds[2 * len(hidden) :]


def test_a_reset_draws_weights_anew_and_keeps_the_buffer_and_what_is_attached(rl, train):
    agent = train(0.0, 5)
    trained, optimizers, stored = values(agent.critic), agent.critic.optimizer, agent.replay_buffer.size()
    called = []
    agent.critic.optimizer.register_step_pre_hook(lambda *_: called.append(True))
    sac.reset(agent, NORMALISED)
    weights = [p for p in agent.critic.parameters() if p.ndim == 2]
    assert not any(torch.equal(p, old) for p, old in zip(weights, (v for v in trained if v.ndim == 2)))
    assert same(values(agent.critic), values(agent.critic_target))
    assert agent.critic.optimizer is optimizers
    assert not agent.critic.optimizer.state
    assert not agent.actor.optimizer.state
    assert not agent.ent_coef_optimizer.state
    assert float(agent.log_ent_coef.detach()) == 0
    assert agent.replay_buffer.size() == stored == TINY.prefill
    agent.train(1, batch_size=TINY.batch)
    assert called == [True]
    assert not same(values(agent.critic), values(agent.critic_target))


def test_gradient_norms_are_those_of_the_loss_alone(rl):
    def norm(strength):
        agent = sac.build(NORMALISED, seed=0)
        norms = sac.GradientNorms(agent.critic)
        sac.regularise(agent, strength)
        agent.learn(TINY.prefill)
        agent.train(1, batch_size=TINY.batch)
        return norms.mean()

    assert norm(0.0) == norm(10.0) > 0


def test_q_values_are_taken_at_the_actions_that_the_critic_trains_on(rl, train):
    from gymnasium.spaces import Box

    agent = train(0.0, 1)
    agent.policy.action_space = Box(-3.0, 3.0, (1,))  # the critic sees actions scaled to [-1, 1]
    buffer = agent.replay_buffer
    observations, actions = buffer.observations[:8, 0], buffer.actions[:8, 0]
    (expected,) = agent.critic(torch.as_tensor(observations), torch.as_tensor(actions))
    played = agent.policy.unscale_action(actions)
    assert torch.allclose(torch.as_tensor(sac.q_value(agent, observations, played)), expected[:, 0].detach(), atol=1e-6)


def test_an_episode_is_a_thousand_steps_that_begin_where_the_seed_says(rl):
    agent, env = sac.build(NORMALISED, seed=0), sac.environment(TINY.task)
    first, again, other = (sac.play(agent, env, seed) for seed in (3, 3, 4))
    assert first.observations.shape == (1000, 5)
    assert first.actions.shape == (1000, 1)
    assert np.array_equal(first.rewards, again.rewards)
    assert not np.array_equal(first.rewards, other.rewards)


def test_a_task_that_the_suite_has_not_is_answered_with_the_nearest(rl):
    with pytest.raises(UsageError, match="unknown task 'walker-rum'; did you mean 'walker-run'"):
        experiment.configs(SACOptions(task="walker-rum"))


def test_the_grid_holds_the_settings_of_the_paper(rl):
    configs = {config.label: config for config in experiment.configs(SACOptions(preset="paper"))}
    assert configs["LayerNorm, spectral"].strength == 1e-4
    assert {c.setting for c in configs.values()} == {SETTINGS["paper"]}
    paper = SETTINGS["paper"]
    assert (paper.width, paper.prefill, paper.buffer, paper.replay_ratio) == (256, 10_000, 1_000_000, 16)
    agent = sac.build(configs["LayerNorm"], buffer=1)
    assert agent.gradient_steps == 16
    assert agent.learning_starts == 10_000
    assert len(agent.critic.q_networks) == 1


def test_one_run_records_what_the_report_shows(rl, tmp_path):
    config = Config("LayerNorm, spectral, resets", TINY, strength=1e-4, resets=True)
    records = experiment.run(config, 0, Context(0, True, None, tmp_path))
    assert all(math.isfinite(record["value"]) for record in records)
    assert {*COLUMNS, *PANELS} <= {record["metric"] for record in records}
    assert [r["step"] for r in records if r["metric"] == "return"] == [30, 60]
    assert [r["step"] for r in records if r["metric"] == "gradient_norm/critic"] == [30, 60]
    assert list(tmp_path.glob("events.out.tfevents.*"))
