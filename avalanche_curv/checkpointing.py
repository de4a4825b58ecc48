"""Save a strategy after an experience, and resume it in another process as if it had never stopped."""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from pickle import UnpicklingError
from types import GeneratorType, SimpleNamespace
from typing import Any, TypeVar

import dill
import torch
from avalanche import checkpointing
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.templates.base import BaseTemplate
from torch.utils.data.dataloader import _BaseDataLoaderIter

from avalanche_curv.core.options import in_short

Strategy = TypeVar("Strategy")

MADE_ANEW = ("pos_neg_loaders",)  # of ER_AML: used-up loaders, which each experience but the first replaces


def save_checkpoint(strategy: Any, path: str | Path) -> None:
    """Writes the strategy with its model, optimizer, plugins, metrics and loggers, and the global random states.

    The file is one that Avalanche's `maybe_load_checkpoint` reads too. Avalanche's own `save_checkpoint` fails under
    recent torch, at classes of `__main__` that build on one another, and at the loaders that AGEM and MIR keep.
    Classes are stored by name, so the program that resumes has to define those that this one defines. The file is
    written beside `path` and then moved there, so that an interrupted call leaves the checkpoint before it whole.

    Raises RuntimeError while the strategy trains or evaluates, TypeError where it holds what cannot be stored, such as
    a loader that is half-way through its data (`RARPlugin`).
    """
    _check_strategy("save_checkpoint", strategy)
    if strategy.experience is not None:
        raise RuntimeError(
            "A checkpoint can be resumed between experiences only, but the strategy is in the middle of one. "
            "Save after strategy.train(experience) has returned, not from a plugin."
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    stored = copy.copy(strategy)
    for name in MADE_ANEW:
        stored.__dict__.pop(name, None)
    contents = {"strategy": stored, "rng_manager": RNGManager, "exp_counter": strategy.clock.train_exp_counter}
    try:
        torch.save(contents, partial, pickle_module=_PICKLING)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(strategy: Strategy, path: str | Path) -> tuple[Strategy, int]:
    """The saved strategy and the number of experiences it was trained on, where training goes on.

    **Loading a checkpoint executes what is in the file**: it is a pickle, and one that somebody else has written can
    run any code with your rights. Load only files that you trust. What the `state_dict()` of plugins, of
    a `Past`, a `ProtectedSpace` and of mitigators returns is tensors, numbers and names alone, which
    `torch.load(path, weights_only=True)` reads.

    `strategy` takes over everything saved, so go on with `strategy.model`, `strategy.optimizer` and its plugins: the
    ones it was made with are left behind. Where there is no file, it comes back as it is, with 0. Global random states
    are set. Raises AttributeError where the file holds objects of a class that this program does not define, ValueError
    for a file of another kind.

        strategy, start = load_checkpoint(strategy, path)
        for experience in benchmark.train_stream[start:]:
            strategy.train(experience)
            save_checkpoint(strategy, path)
    """
    _check_strategy("load_checkpoint", strategy)
    try:
        return checkpointing.maybe_load_checkpoint(strategy, Path(path))
    except AttributeError as error:
        raise AttributeError(
            f"{path} holds an object of a class that is not where it was: {error}. Define the class in the program "
            "that loads the checkpoint, as in the one that saved it, or put it in a module that both import."
        ) from error
    except (KeyError, UnpicklingError) as error:
        raise ValueError(
            f"{path} is no checkpoint ({type(error).__name__}: {error}). Give a file that save_checkpoint has written; "
            "what state_dict() of a plugin returned goes into its load_state_dict."
        ) from error


def _check_strategy(called: str, strategy: Any) -> None:
    if not isinstance(strategy, BaseTemplate):
        raise TypeError(f"{called}(strategy, path) takes an Avalanche strategy first; got {in_short(strategy)}.")


class _Pickler(dill.Pickler):
    """dill's pickler, which also stores classes by name wherever they are found by it, and iterators not yet begun.

    dill does not find those of `torch.optim`, which deletes the names of its submodules, and stores these and the
    classes of `__main__` by value: it then meets what it cannot store, or loses the classes that they derive from.
    """

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, type) and _named(thing.__module__, thing.__qualname__) is thing:
            return thing.__qualname__
        if isinstance(thing, GeneratorType):
            return _not_begun(thing)
        if isinstance(thing, _BaseDataLoaderIter):
            raise TypeError(f"{_half_way('a data loader')}")
        return NotImplemented


_PICKLING = SimpleNamespace(Pickler=_Pickler, __name__="dill", __version__=dill.__version__)  # a module, for torch.save


def _not_begun(generator: GeneratorType) -> tuple[Any, ...]:
    """How to make a generator again that has not begun, such as that of an infinite loader: by the function and the
    arguments that it was made with. Raises TypeError for another."""
    code, frame, name = generator.gi_code, generator.gi_frame, generator.__qualname__
    whole = not code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    if frame is None or inspect.getgeneratorstate(generator) != inspect.GEN_CREATED or not whole:
        raise TypeError(_half_way(f"the generator {name}"))
    module = frame.f_globals.get("__name__", "")
    if getattr(_named(module, name), "__code__", None) is not code:
        raise TypeError(f"The strategy holds the generator {name}, which cannot be stored. Make it where it is used.")
    count = code.co_argcount + code.co_kwonlyargcount
    given = [frame.f_locals[argument] for argument in code.co_varnames[:count]]
    named = dict(zip(code.co_varnames[code.co_argcount : count], given[code.co_argcount :]))
    return _begin, (module, name, given[: code.co_argcount], named)


def _begin(module: str, name: str, given: list[Any], named: dict[str, Any]) -> Iterator[Any]:
    importlib.import_module(module)
    return _named(module, name)(*given, **named)


def _named(module: str | None, name: str) -> Any:
    """What a loaded module holds under a qualified name; None where it holds nothing."""
    try:
        return attrgetter(name)(sys.modules.get(module or ""))
    except AttributeError:
        return None


def _half_way(what: str) -> str:
    return (
        f"The strategy holds {what} half-way through its data, whose place cannot be stored: a resumed run would "
        "not equal an unbroken one. Let the plugin that holds it make a new one in before_training_exp, and drop it in "
        "after_training_exp."
    )
