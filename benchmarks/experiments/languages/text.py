"""Text that is on every machine with this package: English, Python, C++ and YAML, as bytes, in three disjoint parts."""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

Document = tuple[str, str]
"""A name, by which a document is in one of the parts, and its text."""

SHORTEST = 24  # characters of a paragraph that is kept once only; shorter ones repeat by nature
BLOCK = 16  # paragraphs
PARTS = ("train",) * 8 + ("held_out", "test")  # by the digest of a document's name modulo 10


@dataclass(frozen=True)
class Parts:
    """The bytes of a language: to train on, to tune on, and to report. No document is in two of them, and no
    paragraph of `SHORTEST` characters or more occurs twice."""

    train: UInt8[Tensor, "n"]
    held_out: UInt8[Tensor, "m"]
    test: UInt8[Tensor, "k"]

    @property
    def digest(self) -> str:
        """Which text this is: releases of Python and torch differ in theirs."""
        joined = b"|".join(getattr(self, field.name).numpy().tobytes() for field in fields(self))
        return hashlib.sha256(joined).hexdigest()[:12]


@cache
def language(name: str, size: int) -> Parts:
    """The first `size` bytes of a language for training, and an eighth as many for each of the other parts. Raises
    KeyError for an unknown name, and ValueError where there is less text."""
    seen: set[str] = set()
    sizes = {"train": size, "held_out": size // 8, "test": size // 8}
    found = {part: bytearray() for part in sizes}
    for title, text in LANGUAGES[name]():
        part = PARTS[int(hashlib.sha256(title.encode()).hexdigest(), 16) % len(PARTS)]
        if new := "\n\n".join(_new_paragraphs(text, seen)):
            found[part] += f"{new}\n\n".encode()
        if all(len(found[part]) >= sizes[part] for part in sizes):
            return Parts(**{part: torch.frombuffer(found[part][: sizes[part]], dtype=torch.uint8) for part in sizes})
    raise ValueError(
        f"Expected {size} bytes of {name} for training and {size // 8} each to tune and to test on; there are only "
        f"{', '.join(f'{len(content)} ({part})' for part, content in found.items())}. Ask for fewer."
    )


def _new_paragraphs(text: str, seen: set[str]) -> Iterator[str]:
    """Those of a text that are not in `seen`, which they join: licences and generated code repeat."""
    for paragraph in re.split(r"\n\s*\n", text.replace("\r\n", "\n").strip("\n")):
        key = " ".join(paragraph.split())
        if len(key) < SHORTEST or key not in seen:
            seen.add(key)
            yield paragraph


def english() -> Iterator[Document]:
    """The topics of Python's `help()`: its language reference."""
    from pydoc_data.topics import topics

    for title, text in sorted(topics.items()):
        yield from _blocks(title, text)


def python() -> Iterator[Document]:
    """The modules of the standard library that are single files."""
    yield from _files(Path(sysconfig.get_paths()["stdlib"]), "*.py")


def cpp() -> Iterator[Document]:
    """The headers of c10, torch's core library."""
    yield from _files(_package("torch") / "include" / "c10", "**/*.h")


def yaml() -> Iterator[Document]:
    """The declarations of torch's operators."""
    declared = _package("torchgen") / "packaged" / "ATen" / "native" / "native_functions.yaml"
    yield from _blocks(declared.stem, declared.read_text("utf-8"))


LANGUAGES: dict[str, Callable[[], Iterator[Document]]] = {
    "English": english, "Python": python, "C++": cpp, "YAML": yaml,
}  # fmt: skip


def _blocks(name: str, text: str) -> Iterator[Document]:
    """A text in blocks of `BLOCK` paragraphs, where there are few long ones."""
    paragraphs = text.split("\n\n")
    for start in range(0, len(paragraphs), BLOCK):
        yield f"{name} {start}", "\n\n".join(paragraphs[start : start + BLOCK])


def _files(folder: Path, pattern: str) -> Iterator[Document]:
    """The files below a folder, by their relative paths."""
    for path in sorted(folder.glob(pattern)):
        yield path.relative_to(folder).as_posix(), path.read_text("utf-8", errors="replace")


def _package(name: str) -> Path:
    """The folder of an installed package. Raises ModuleNotFoundError where it is not installed."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"The experiment reads texts that come with the package {name}, which is missing.")
    return Path(spec.origin).parent
