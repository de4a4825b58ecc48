"""What happens to that of a past task which no directions can protect."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


class Uncovered(ABC):
    """Parameters of which a basis knows no directions, and running statistics of norm layers."""

    @abstractmethod
    def held(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Which of them hold still."""


@dataclass(frozen=True)
class Freeze(Uncovered):
    """They hold still from the end of the first task that uses them: nothing of the past is lost, and less is free."""

    def held(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return names


@dataclass(frozen=True)
class Leave(Uncovered):
    """They go on as in plain training, and the past is lost as far as it hangs on them."""

    def held(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return ()
