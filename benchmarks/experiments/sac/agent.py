"""stable-baselines3's SAC with layer normalisation, spectral regularisation and resets; its training, and what is
measured every so many environment steps."""

from __future__ import annotations

import time
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from avalanche_curv import SpectralRegularizer
from avalanche_curv.plasticity.measures import weight_spectra
from benchmarks.experiments.sac.environment import environment, play
from benchmarks.harness.experiment import Context, Record

if TYPE_CHECKING:
    from stable_baselines3 import SAC

    from benchmarks.experiments.sac.experiment import Config

PROBED = 1_000_000  # seeds of the episodes that measure, apart from those of training


def run(config: Config, seed: int, context: Context) -> list[Record]:
    """Curves over environment steps, the random ones included; then means over the curve, and the training time."""
    from stable_baselines3.common.logger import configure

    setting, agent = config.setting, build(config, seed)
    agent.set_logger(configure(str(context.tensorboard_dir), ["tensorboard"]))
    gradients = {name: GradientNorms(network) for name, network in networks(agent).items()}  # before the regulariser
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
