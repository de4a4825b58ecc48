"""Spectral regularisation in reinforcement learning: SAC with 16 gradient steps for each environment step.

Lewandowski et al. (2024), section 5.4 and appendix B: so many updates overfit what was seen first (primacy bias), and
spectral norms, gradients and Q-values grow. Layer normalisation alone, with full resets, and with the regulariser on
actor and critic, beside plain SAC. Needs the extra `rl`: stable-baselines3, and the DeepMind control suite by shimmy.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.sac.report import report
from benchmarks.harness import Experiment, Options, UsageError, one_of
from benchmarks.harness.experiment import Context, Record

if TYPE_CHECKING:
    from benchmarks.harness.results import Results


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


@dataclass(frozen=True)
class SACOptions(Options):
    """`preset` is one of `SETTINGS`; `task`, "domain-task" of the control suite, takes the place of its own."""

    preset: str = "short"
    task: str | None = None


STRENGTH = 1e-4  # for actor and critic, Lewandowski et al. (2024), appendix B
SETTINGS = {
    "short": Setting("cartpole-swingup", steps=4_000, prefill=1_000, every=500, reset_every=1_000),
    # Lewandowski et al. (2024), appendix B, whose text names no task, length or interval of resets: that of D'Oro et
    # al. (2022) is 2.56 million updates.
    "paper": Setting("quadruped-run", steps=1_000_000, prefill=10_000, every=10_000, reset_every=160_000),
}
QUICK = {"steps": 200, "prefill": 100, "every": 50, "reset_every": 50, "width": 64, "batch": 64, "episodes": 1}
PACKAGES = ("stable_baselines3", "gymnasium", "shimmy", "dm_control", "mujoco")


class SAC(Experiment):
    """Return, Q-values, and what grows in actor and critic."""

    name = "sac"
    options_type = SACOptions

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--preset", type=one_of("preset", SETTINGS), default="short",
                            help="paper: days for each agent on one CPU (default %(default)s)")
        parser.add_argument("--task", metavar="DOMAIN-TASK", help="of the control suite, such as walker-run")
        parser.set_defaults(seeds=3)

    def variant(self, options: SACOptions) -> str:
        named = re.sub(r"[^\w-]", "_", options.task or "")
        return "-".join(part for part in (options.preset if options.preset != "short" else "", named) if part)

    def configs(self, options: SACOptions) -> Sequence[Config]:
        absent = [name for name in PACKAGES if find_spec(name) is None]
        if absent:
            raise UsageError(f"experiment 'sac' needs {', '.join(absent)}: pip install -e '.[rl]'.")
        from benchmarks.experiments.sac.environment import check_task

        setting = SETTINGS[options.preset]
        setting = replace(setting, task=options.task or setting.task, **(QUICK if options.quick else {}))
        check_task(setting.task)
        return [
            Config("SAC", setting, layer_norm=False),
            Config("LayerNorm", setting),
            Config("LayerNorm, resets", setting, resets=True),
            Config("LayerNorm, spectral", setting, strength=STRENGTH),
        ]

    def run(self, config: Config, seed: int, context: Context) -> Sequence[Record]:
        from benchmarks.experiments.sac.agent import run

        return run(config, seed, context)

    def report(self, results: Results, out: Path) -> str:
        return report(results, out)


experiment = SAC()
