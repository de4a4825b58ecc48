"""Options: dataclasses that tyro turns into command lines, with errors of one line that name the remedy."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from benchmarks.harness.errors import UsageError, nearest, unknown

T = TypeVar("T")
CONFIG = (tyro.conf.UseAppendAction, tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)


def checked(metavar: str, parse: Callable[[str], Any]) -> PrimitiveConstructorSpec:
    """How one word of the command line becomes a value; `parse` raises ValueError with what was expected."""

    def value(words: list[str]) -> Any:
        try:
            return parse(words[0])
        except ValueError as error:
            return error  # until `parsed` can name the option

    return PrimitiveConstructorSpec(
        nargs=1, metavar=metavar, instance_from_str=value, is_instance=lambda value: True,
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    )  # fmt: skip


def one_of(what: str, choices: Iterable[str]) -> PrimitiveConstructorSpec:
    """A name among the choices: ``stream: Annotated[str, one_of("stream", STREAMS)] = "sine"``."""
    names = tuple(choices)

    def parse(given: str) -> str:
        if given not in names:
            raise ValueError(unknown(what, given, names))
        return given

    return checked(f"{{{','.join(names)}}}" if len(names) < 6 else what.upper(), parse)


def positive(metavar: str = "N") -> PrimitiveConstructorSpec:
    """A whole number of at least 1: ``steps: Annotated[int | None, positive()] = None``."""
    return _number(metavar, int, lambda number: number >= 1, "a whole number of at least 1")


def fraction(metavar: str = "X") -> PrimitiveConstructorSpec:
    """A number in (0, 1]."""
    return _number(metavar, float, lambda number: 0.0 < number <= 1.0, "a number above 0 and at most 1")


def _number(metavar: str, kind: Any, fits: Callable[[Any], bool], expected: str) -> PrimitiveConstructorSpec:
    def parse(given: str) -> Any:
        try:
            number = kind(given)
        except ValueError:
            number = float("nan")
        if not fits(number):
            raise ValueError(f"expected {expected}, got '{given}'.")
        return number

    return checked(metavar, parse)


def folder() -> PrimitiveConstructorSpec:
    """A folder, which may not exist yet."""

    def parse(given: str) -> Path:
        path = Path(given).expanduser()
        if path.exists() and not path.is_dir():
            raise ValueError(f"expected a folder, but '{given}' is a file.")
        return path

    return checked("DIR", parse)


@dataclass(frozen=True)
class Options:
    """The options of an experiment on the command line.

    A subclass adds some: each field with a default is an option of the same name, the string below it is its help, and
    a tuple makes it repeatable.
    """

    seeds: Annotated[int, positive()] = 5
    """run seeds 0 to SEEDS - 1"""
    quick: bool = False
    """a small version that ends in a minute or so"""
    dataset_root: Annotated[Path | None, folder()] = None
    """where data sets are"""


def parsed(kind: type[T], words: Sequence[str], program: str) -> T:
    """The dataclass `kind` from the words of a command line. Raises UsageError for words that do not fit."""
    said = io.StringIO()
    parse: Any = tyro.cli  # a type that is made while the program runs
    try:
        with redirect_stderr(said):
            found, rest = parse(kind, prog=program, args=list(words), config=CONFIG, return_unknown_args=True)
    except SystemExit as end:
        if not end.code:
            raise
        raise UsageError(f"{_first(said.getvalue())} See {program} --help.") from None
    sys.stderr.write(said.getvalue())
    options = dict(_options(found))
    if rest:
        guess = nearest(rest[0].partition("=")[0], [*options])
        hint = f"; did you mean {guess[0]}?" if guess else "."
        raise UsageError(f"unknown option '{rest[0]}'{hint} See {program} --help.")
    for option, value in options.items():
        for error in value if isinstance(value, tuple) else (value,):
            if isinstance(error, ValueError):
                raise UsageError(f"argument {option}: {error}")
    return found


def _options(chosen: Any) -> Iterator[tuple[str, Any]]:
    """The options of a dataclass and of those in it, with their values."""
    for field in fields(chosen):
        value = getattr(chosen, field.name)
        yield from _options(value) if is_dataclass(value) else [(f"--{field.name.replace('_', '-')}", value)]


def _first(box: str) -> str:
    """The message of tyro's error box, without its frame and what follows the rule below it."""
    lines = [line.strip("│| ") for line in box.splitlines() if line.startswith(("│", "|"))]
    end = next((place for place, line in enumerate(lines) if line.startswith(("─", "--"))), len(lines))
    text = " ".join(lines[:end]).replace("Error parsing ", "argument ")
    return text if text.endswith(".") else f"{text}."
