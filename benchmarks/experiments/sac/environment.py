"""Tasks of the DeepMind control suite as gymnasium environments without a display, and an agent's episodes in them."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.harness.errors import UsageError, unknown

if TYPE_CHECKING:
    from gymnasium import Env

PREFIX, SUFFIX = "dm_control/", "-v0"


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
