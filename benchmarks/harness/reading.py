"""Checks of what is read from a results folder, which may be damaged or come from elsewhere: the manifest, the file of
a unit, its records; and their strings as text that a report can hold."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

DIGEST = re.compile(r"[0-9a-f]{12}")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
LIVE = re.compile(r"(?<!\\)((?:\\\\)*)\](?=\s?[(\[:])")
TAG = re.compile(r"<(?=[a-zA-Z/!?])")


class Broken(Exception):
    """A file that does not hold what it should; the message names it and says what is wrong."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")


def content(path: Path, parse: Callable[[str], Any]) -> Any:
    """`parse` of the text of a file. Raises `Broken` where it cannot be read, is not UTF-8, or does not parse."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        reason = "not UTF-8"
    except json.JSONDecodeError as error:
        reason = f"not JSON, or cut off ({error})"
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise Broken(path, reason) from None


def manifest(text: str) -> dict[str, Any]:
    """The manifest in a text. Raises ValueError where reports could not work with it."""
    found = mapping(json.loads(text), "a manifest", experiment=str, command=str, units=list)
    for key in ("options", "device"):
        if not isinstance(found.get(key, {}), dict):
            raise ValueError(f"expected an object as {key!r}, got {shortened(found[key])}")
    seen = set()
    for unit in found["units"]:
        mapping(unit, "an entry of 'units'", label=str, seed=int, digest=str)
        if not DIGEST.fullmatch(unit["digest"]):  # it names a file
            raise ValueError(f"expected a digest of 12 hexadecimal digits, got {shortened(unit['digest'])}")
        if (name := (unit["label"], unit["seed"])) in seen:
            raise ValueError(f"lists {shortened(unit['label'])} with seed {unit['seed']} twice")
        seen.add(name)
    if not seen:
        raise ValueError("lists no unit")
    return found


def unit(text: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the records in the text of a unit's file. Raises ValueError for any other text."""
    if not text:
        raise ValueError("empty")
    if not text.endswith("\n"):
        raise ValueError("cut off")
    first, *rest = (json.loads(line) for line in text.split("\n")[:-1])
    return header(first), [record(line) for line in rest]


def header(found: Any) -> dict[str, Any]:
    """The header of a unit. Raises ValueError where one of its values is missing or of another type."""
    mapping(found, "a header", label=str, seed=int)
    if not isinstance(found.get("config", {}), dict):
        raise ValueError(f"expected a configuration, got {shortened(found['config'])}")
    for key in ("seconds", "peak_memory"):
        if found.get(key) is not None:
            number(found[key], key)
    return found


def record(found: Any) -> dict[str, Any]:
    """A record. Raises ValueError where one of its values is missing or of another type."""
    mapping(found, 'a record {"metric": str, "value": float, "step": int | None, ...}', metric=str)
    number(found.get("value"), "value")
    if "step" not in found:
        raise ValueError(f"expected a record with a step, which may be null, got {shortened(found)}")
    if found["step"] is not None:
        number(found["step"], "step")
    return found


def mapping(found: Any, what: str, **types: type) -> dict[str, Any]:
    """`found`, an object with values of those types. Raises ValueError for anything else."""
    if not isinstance(found, dict):
        raise ValueError(f"expected {what}, got {shortened(found)}")
    for key, kind in types.items():
        if not isinstance(found.get(key), kind) or isinstance(found[key], bool):
            raise ValueError(f"expected {what} with a value of type {kind.__name__} as {key!r}, got {shortened(found)}")
    return found


def number(found: Any, what: str) -> None:
    """Raises ValueError for what is no number, or too large for one of double precision; it may be infinite or NaN."""
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ValueError(f"expected a number as {what!r}, got {shortened(found)}")
    if isinstance(found, int) and abs(found) > 2**1000:
        raise ValueError(f"expected a number as {what!r}, got one of {found.bit_length()} bits")


def shortened(found: Any, most: int = 80) -> str:
    """The value as Python writes it, on one line of at most so many characters."""
    text = repr(found)
    return text if len(text) <= most else text[: most - 1] + "…"


@lru_cache(maxsize=10_000)
def plain(text: str) -> str:
    """A text such that Markdown takes none of it for an image, a link, HTML or a new line; most texts stay as they are.

    >>> print(plain("in [0, 1], x < y"))
    in [0, 1], x < y
    >>> print(plain("![a](b.png) <script>\\n# c"))
    ![a\\](b.png) &lt;script> # c
    """
    return TAG.sub("&lt;", LIVE.sub(r"\1\\]", CONTROL.sub(" ", text)))


def plain_values(value: Any) -> Any:
    """JSON with all strings and keys in it `plain`."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, Mapping):
        return {plain(str(key)): plain_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(inner) for inner in value]
    return value


def code(text: str) -> str:
    """A text as code in Markdown, whatever backticks it holds.

    >>> code("run x"), code("a `b`")
    ('`run x`', '`` a `b` ``')
    """
    line = CONTROL.sub(" ", text)
    longest = max(map(len, re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence}{line}{fence}" if not longest else f"{fence} {line} {fence}"
