"""Spectral regularisation in reinforcement learning: SAC with 16 gradient steps for each environment step.

Lewandowski et al. (2024), section 5.4 and appendix B: so many updates overfit what was seen first (primacy bias), and
spectral norms, gradients and Q-values grow. Layer normalisation alone, with full resets, and with the regulariser on
actor and critic, beside plain SAC. Needs the extra `rl`: stable-baselines3, and the DeepMind control suite by shimmy.
"""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from avalanche_curv import SpectralRegularizer
from avalanche_curv.plasticity.measures import weight_spectra
from benchmarks.harness import Context, Experiment, Options, Record, UsageError
from benchmarks.harness.errors import unknown
from benchmarks.harness.options import one_of, positive

if TYPE_CHECKING:
    from gymnasium import Env
    from stable_baselines3 import SAC

PROBED = 1_000_000  # seeds of the episodes that measure, apart from those of training
PREFIX, SUFFIX = "dm_control/", "-v0"  # of the suite's tasks in gymnasium's registry


@dataclass(frozen=True)
class Setting:
    """What all agents share: two layers of `width`, a single critic, Adam at `rate`, and `replay_ratio` gradient steps
    for each of `steps` environment steps after `prefill` random ones; `episodes` measure it every `every` steps."""

    task: str
    steps: int
    prefill: int
    every: int
    reset_every: int
    width: int = 256
    batch: int = 256
    buffer: int = 1_000_000
    rate: float = 3e-4
    replay_ratio: int = 16
    episodes: int = 3


@dataclass(frozen=True)
class Config:
    """One agent: with LayerNorm before each ReLU or without, the regulariser's strength, and whether it is reset."""

    label: str
    setting: Setting
    layer_norm: bool = True
    strength: float = 0.0
    resets: bool = False


STRENGTH = 1e-4  # for actor and critic, Lewandowski et al. (2024), appendix B
SETTINGS = {
    "short": Setting("cartpole-swingup", steps=4_000, prefill=1_000, every=500, reset_every=1_000),
    # Lewandowski et al. (2024), appendix B, whose text names no task, length or interval of resets: that of D'Oro et
    # al. (2022) is 2.56 million updates.
    "paper": Setting("quadruped-run", steps=1_000_000, prefill=10_000, every=10_000, reset_every=160_000),
}
QUICK = {"steps": 200, "prefill": 100, "every": 50, "reset_every": 50, "width": 64, "batch": 64, "episodes": 1}
PACKAGES = ("stable_baselines3", "gymnasium", "shimmy", "dm_control", "mujoco")


@dataclass(frozen=True)
class SACOptions(Options):
    """Three seeds unless asked for others."""

    seeds: Annotated[int, positive()] = 3
    """run seeds 0 to SEEDS - 1"""
    preset: Annotated[str, one_of("preset", SETTINGS)] = "short"
    """paper: days for each agent on one CPU"""
    task: str | None = None
    """DOMAIN-TASK of the control suite instead of the preset's, such as walker-run"""


class SpectralSAC(Experiment):
    """Return, Q-values, and what grows in actor and critic."""

    name = "sac"
    options_type = SACOptions

    def variant(self, options: SACOptions) -> str:
        named = re.sub(r"[^\w-]", "_", options.task or "")
        return "-".join(part for part in (options.preset if options.preset != "short" else "", named) if part)

    def configs(self, options: SACOptions) -> Sequence[Config]:
        absent = [name for name in PACKAGES if find_spec(name) is None]
        if absent:
            raise UsageError(f"experiment 'sac' needs {', '.join(absent)}: pip install -e '.[rl]'.")
        setting = SETTINGS[options.preset]
        setting = replace(setting, task=options.task or setting.task, **(QUICK if options.quick else {}))
        check_task(setting.task)
        return [
            Config("SAC", setting, layer_norm=False),
            Config("LayerNorm", setting),
            Config("LayerNorm, resets", setting, resets=True),
            Config("LayerNorm, spectral", setting, strength=STRENGTH),
        ]

    def run(self, config: Config, seed: int, context: Context) -> list[Record]:
        """Curves over environment steps, the random ones included; then means over the curve, and the training time."""
        from stable_baselines3.common.logger import configure

        setting, agent = config.setting, build(config, seed)
        agent.set_logger(configure(str(context.tensorboard_dir), ["tensorboard"]))
        watched = networks(agent).items()
        gradients = {name: GradientNorms(network) for name, network in watched}  # before the regulariser is attached
        regularise(agent, config.strength)
        probe, seconds = environment(setting.task), 0.0
        records: list[Record] = []
        returns = []
        for step in range(setting.every, setting.steps + 1, setting.every):
            begin = time.perf_counter()
            agent.learn(setting.every, reset_num_timesteps=False)
            seconds += time.perf_counter() - begin
            values = measure(agent, probe, setting.episodes)
            values |= {f"gradient_norm/{name}": norms.mean() for name, norms in gradients.items() if norms.seen}
            for name, value in values.items():
                agent.logger.record(name, value)
            agent.logger.dump(step)
            records += [{"metric": name, "value": value, "step": step} for name, value in values.items()]
            if step > setting.prefill:
                returns.append(values["return"])
            if config.resets and step % setting.reset_every == 0 and setting.prefill < step < setting.steps:
                reset(agent, config)
        scalars = {"mean_return": float(np.mean(returns)), "seconds": seconds}
        return records + [{"metric": name, "value": value} for name, value in scalars.items()]


def networks(agent: SAC) -> dict[str, Any]:
    return {"actor": agent.actor, "critic": agent.critic}


def measure(agent: SAC, env: Any, episodes: int) -> dict[str, float]:
    """Mean return of episodes with the mean action, mean Q(s, a) and discounted return on their steps, and the size of
    the weights. The same starts each time."""
    played = [play(agent, env, PROBED + episode) for episode in range(episodes)]
    q_values = [q_value(agent, episode.observations, episode.actions) for episode in played]
    observed = [episode.discounted_returns(agent.gamma) for episode in played]
    values = {
        "return": float(np.mean([episode.rewards.sum() for episode in played])),
        "q_value": float(np.mean(np.concatenate(q_values))),
        "discounted_return": float(np.mean(np.concatenate(observed))),
    }
    for name, network in networks(agent).items():
        values[f"spectral_norm/{name}"] = mean_spectral_norm(network)
        values[f"parameter_norm/{name}"] = float(parameters_to_vector(network.parameters()).detach().norm())
    return values


def q_value(agent: SAC, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Q(s, a) of the critic for each step [T]; actions as the environment takes them."""
    scaled = torch.as_tensor(agent.policy.scale_action(actions), dtype=torch.float32)
    with torch.no_grad():
        (found,) = agent.critic(torch.as_tensor(observations), scaled)
    return found[:, 0].numpy()


def mean_spectral_norm(network: nn.Module) -> float:
    """Mean over weight matrices of σ₁, by the singular value decomposition."""
    return fmean(spectrum.spectral_norm for spectrum in weight_spectra(network).values())


class GradientNorms:
    """The norm of a network's gradient before each step of its optimiser: its mean since the last call of `mean`.

    Made before a regulariser is attached, it sees the gradient of the loss alone. Reading `.grad` after a step would
    not do: SB3's actor loss adds to the critic's gradients.
    """

    def __init__(self, network: Any) -> None:
        self.seen: list[Tensor] = []
        self._parameters = list(network.parameters())
        network.optimizer.register_step_pre_hook(self._watch)

    def mean(self) -> float:
        found, self.seen = float(torch.stack(self.seen).mean()), []
        return found

    def _watch(self, *_: Any) -> None:
        self.seen.append(torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None]))


def build(config: Config, seed: int | None = None, buffer: int | None = None) -> SAC:
    """The agent of a configuration, on the CPU, with room for `buffer` transitions instead of the setting's.

    A seed also seeds the global random states, which SB3 draws from; without one it goes on with them.
    """
    from stable_baselines3 import SAC

    setting = config.setting
    policy: dict[str, Any] = {"net_arch": [setting.width] * 2, "n_critics": 1}
    if config.layer_norm:
        # SB3 makes what follows each hidden layer by calling this, and asks no more of it
        policy["activation_fn"] = partial(normalised_relu, setting.width)
    return SAC(
        "MlpPolicy", environment(setting.task), learning_rate=setting.rate, buffer_size=buffer or setting.buffer,
        learning_starts=setting.prefill, batch_size=setting.batch, train_freq=1, gradient_steps=setting.replay_ratio,
        policy_kwargs=policy, seed=seed, device="cpu",
    )


def normalised_relu(width: int) -> nn.Module:
    """ReLU(LayerNorm(x)) for `width` units."""
    return nn.Sequential(nn.LayerNorm(width), nn.ReLU())


def regularise(agent: SAC, strength: float) -> None:
    """Spectral regularisation of actor and critic, each in its own optimiser: nothing for the target, which follows
    the critic by Polyak averaging, nor for the temperature, which a third optimiser steps."""
    SpectralRegularizer(strength).attach(agent.actor.optimizer, agent.actor)
    SpectralRegularizer(strength).attach(agent.critic.optimizer, agent.critic)


def reset(agent: SAC, config: Config) -> None:
    """Draw all weights anew, and set moments and temperature as at the start; the replay buffer stays, as in Nikishin
    et al. (2022), and so do the optimisers with what is attached to them."""
    fresh = build(config, buffer=1)
    weights: Any = fresh.get_parameters()
    agent.set_parameters(weights, device="cpu")
    if agent.log_ent_coef is not None and fresh.log_ent_coef is not None:
        agent.log_ent_coef.data.copy_(fresh.log_ent_coef.data)


def suite() -> Any:
    """The module gymnasium, with the suite's tasks among its own."""
    os.environ.setdefault("MUJOCO_GL", "disable")  # nothing is drawn; dm_control reads it as it is imported
    import gymnasium
    import shimmy  # noqa: F401  registers the tasks

    return gymnasium


def check_task(task: str) -> None:
    """Raises UsageError for a task that the suite has not."""
    known = {name[len(PREFIX) : -len(SUFFIX)] for name in suite().registry if name.startswith(PREFIX)}
    tasks = {name for name in known if "-" in name and name[0].islower()} - {"compatibility-env"}
    if task not in tasks:
        raise UsageError(unknown("task", task, tasks))


def environment(task: str) -> Env:
    """A task, its observations one vector of float32."""
    made = suite().make(f"{PREFIX}{task}{SUFFIX}", disable_env_checker=True)
    from gymnasium.wrappers import DtypeObservation, FlattenObservation

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that float32 is less precise
        return DtypeObservation(FlattenObservation(made), np.float32)


@dataclass(frozen=True)
class Episode:
    """What an agent saw, did and got: observations [T, d], actions [T, a] and rewards [T]."""

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray

    def discounted_returns(self, discount: float) -> np.ndarray:
        """G_t = Σ_k discount^k r_{t+k} to the end of the episode, shape [T].

        >>> Episode(np.zeros(0), np.zeros(0), np.ones(3)).discounted_returns(0.5).tolist()
        [1.75, 1.5, 1.0]
        """
        returns, later = np.zeros(len(self.rewards)), 0.0
        for step in reversed(range(len(self.rewards))):
            later = returns[step] = self.rewards[step] + discount * later
        return returns


def play(agent: Any, env: Env, seed: int) -> Episode:
    """An episode of the agent's mean actions; `seed` decides where it begins."""
    observation, _ = env.reset(seed=seed)
    steps, ended = [], False
    while not ended:
        action, _ = agent.predict(observation, deterministic=True)
        following, reward, terminated, truncated, _ = env.step(action)
        steps.append((observation, action, float(reward)))
        observation, ended = following, terminated or truncated
    observations, actions, rewards = (np.asarray(part) for part in zip(*steps))
    return Episode(observations, actions, rewards)


experiment = SpectralSAC()
