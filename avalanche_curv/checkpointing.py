"""Save a strategy after an experience, and resume it in another process as if it had never stopped."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from avalanche import checkpointing

Strategy = TypeVar("Strategy")


def save_checkpoint(strategy: Any, path: str | Path) -> None:
    """Writes the strategy with its model, optimizer, plugins, metrics and loggers, and the global random states.

    It is Avalanche's `save_checkpoint`, which fails by itself under recent torch: `torch.optim` deletes the names of
    its submodules, so that dill does not find an optimizer's class, stores it by value and meets what it cannot store.
    Here the names are back for the length of the call, and the class is stored by name. The file is written beside
    `path` and then moved there, so that an interrupted call leaves the checkpoint before it whole.

    Raises RuntimeError while the strategy trains or evaluates.
    """
    if strategy.experience is not None:
        raise RuntimeError(
            "A checkpoint can be resumed between experiences only, but the strategy is in the middle of one. "
            "Save after strategy.train(experience) has returned, not from a plugin."
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with _optimizers_by_name():
            checkpointing.save_checkpoint(strategy, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(strategy: Strategy, path: str | Path) -> tuple[Strategy, int]:
    """The saved strategy and the number of experiences it was trained on, where training goes on.

    `strategy` takes over everything saved, so go on with `strategy.model`, `strategy.optimizer` and its plugins: the
    ones it was made with are left behind. Where there is no file, it comes back as it is, with 0. Global random states
    are set. A checkpoint is a pickle: load only what you trust.

        strategy, start = load_checkpoint(strategy, path)
        for experience in benchmark.train_stream[start:]:
            strategy.train(experience)
            save_checkpoint(strategy, path)
    """
    return checkpointing.maybe_load_checkpoint(strategy, Path(path))


@contextmanager
def _optimizers_by_name() -> Iterator[None]:
    """Puts the submodules back into `torch.optim`, then takes them out again."""
    prefix = "torch.optim."
    loaded = {name.removeprefix(prefix): module for name, module in [*sys.modules.items()] if name.startswith(prefix)}
    absent = {name: module for name, module in loaded.items() if "." not in name and not hasattr(torch.optim, name)}
    for name, module in absent.items():
        setattr(torch.optim, name, module)
    try:
        yield
    finally:
        for name in absent:
            delattr(torch.optim, name)
