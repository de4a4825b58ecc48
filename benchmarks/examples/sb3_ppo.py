"""stable-baselines3: the policy of a first environment is the past of the agent that goes on to another."""

from typing import Any

import gymnasium
import torch
from stable_baselines3 import PPO
from torch import nn

from avalanche_curv.core import CurvatureRegularizer, Kronecker


class Reversed(gymnasium.ActionWrapper):
    """The cart goes left where it is told to go right."""

    def action(self, action: int) -> int:
        return 1 - action


def logits(policy: Any, observations: torch.Tensor) -> torch.Tensor:
    """The model whose loss is pictured: log-probabilities of actions."""
    return policy.get_distribution(observations).distribution.logits


def agreement(strength: float) -> float:
    """The part of the states of the first environment where the agent still does what it did in them, after both."""
    first, second = gymnasium.make("CartPole-v1"), Reversed(gymnasium.make("CartPole-v1"))
    agent = PPO("MlpPolicy", first, n_steps=128, batch_size=64, learning_rate=3e-3, seed=0, device="cpu")
    regularizer = CurvatureRegularizer(strength, structure=Kronecker())  # the Fisher of the policy
    regularizer.attach(agent.policy.optimizer, agent.policy)
    agent.learn(1_024)
    states, actions = (torch.tensor(getattr(agent.rollout_buffer, name)) for name in ("observations", "actions"))
    states, actions = states.flatten(0, -2), actions.flatten().long()
    regularizer.absorb(agent.policy, nn.CrossEntropyLoss(), [(states, actions)], forward=logits)
    before = logits(agent.policy, states).argmax(1)
    agent.set_env(second)
    agent.learn(1_024)
    return float((logits(agent.policy, states).argmax(1) == before).float().mean())


if __name__ == "__main__":
    for strength in 0.0, 300.0:  # the second asks for the opposite: what is kept of the first is not learned of it
        print(f"strength {strength:g}: as before in {agreement(strength):.1%} of the first states")
