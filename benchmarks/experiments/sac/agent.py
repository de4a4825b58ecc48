"""stable-baselines3's SAC with layer normalisation, the spectral regulariser on actor and critic, and full resets."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from avalanche_curv import SpectralRegularizer
from benchmarks.experiments.sac import Config
from benchmarks.experiments.sac.environment import environment

if TYPE_CHECKING:
    from stable_baselines3 import SAC


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
    """All weights drawn anew, and moments and temperature as at the start; the replay buffer stays, as in Nikishin et
    al. (2022). Optimisers and what is attached to them stay too."""
    fresh = build(config, buffer=1)
    weights: Any = fresh.get_parameters()
    agent.set_parameters(weights, device="cpu")
    if agent.log_ent_coef is not None and fresh.log_ent_coef is not None:
        agent.log_ent_coef.data.copy_(fresh.log_ent_coef.data)
