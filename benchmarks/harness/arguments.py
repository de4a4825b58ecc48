"""Argument types of experiments that still declare their options to argparse."""  # until every experiment is converted

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.harness.errors import UsageError, unknown


class Parser(argparse.ArgumentParser):
    """argparse, raising `UsageError` where it would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message if message.endswith(".") else f"{message}. See {self.prog} --help.")


def one_of(what: str, choices: Iterable[str]) -> Callable[[str], str]:
    """The argument type of a name among the choices: ``add_argument("--stream", type=one_of("stream", STREAMS))``."""
    names = tuple(choices)

    def parse(given: str) -> str:
        if given not in names:
            raise argparse.ArgumentTypeError(unknown(what, given, names))
        return given

    return parse


def positive(given: str) -> int:
    """The argument type of a whole number of at least 1."""
    if not given.isdecimal() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got '{given}'.")
    return int(given)


def fraction(given: str) -> float:
    """The argument type of a number in (0, 1]."""
    try:
        number = float(given)
    except ValueError:
        number = 0.0
    if not 0.0 < number <= 1.0:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, got '{given}'.")
    return number


def folder(given: str) -> Path:
    """The argument type of a folder, which may not exist yet."""
    path = Path(given).expanduser()
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, but '{given}' is a file.")
    return path


def parse(kind: Any, experiment: Any, words: Sequence[str]) -> Any:
    """The command line of such an experiment, as the dataclass of the new ones."""
    parser = Parser(prog=f"python -m benchmarks {' '.join(words[:2])}", allow_abbrev=False)
    parser.add_argument("--seeds", type=positive, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dataset-root", type=folder)
    parser.add_argument("--out", type=folder, default=Path("results"))
    experiment.add_arguments(parser)
    own = [field.name for field in fields(kind) if field.name not in ("options", "out")]
    for name in own:
        parser.add_argument(f"--{name}", type=positive if name == "jobs" else str)
    chosen = parser.parse_args(words[2:])
    options = experiment.options_type(**{f.name: getattr(chosen, f.name) for f in fields(experiment.options_type)})
    return kind(options, chosen.out, **{name: getattr(chosen, name) for name in own})
