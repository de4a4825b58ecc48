"""What is left of the classes of earlier experiences under a penalty."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from avalanche_curv.core.quadratic.stability import StrengthSuggestion

MOST = 0.9  # of what is not recognised


@dataclass(frozen=True)
class Kept:
    """What predictions say of `examples` of classes that earlier experiences had and the newest has not: the share that
    is `right`, and that is `renamed`, taken for a class of the newest experience; `guessed` is the share that guessing
    among the classes known gets right."""

    examples: int
    right: float
    renamed: float
    guessed: float

    @property
    def nothing(self) -> bool:
        """Whether guessing does as well."""
        return self.examples > 0 and self.right <= self.guessed

    @property
    def displaced(self) -> bool:
        """Whether the others are taken for the newest classes, as where classes grow and nothing is stored."""
        return self.renamed >= MOST * (1 - self.right)

    def in_words(self, strength: float, stored: bool, suggestion: StrengthSuggestion) -> str:
        """What to say where `nothing` is left of them, and what to try; `stored` is whether examples are."""
        found = (
            f"At strength {strength:g} nothing is left of earlier classes: of {self.examples} examples "
            f"{self.right:.1%} are recognised, and guessing gets {self.guessed:.1%}"
        )
        if not self.displaced:
            return f"{found}. {suggestion}"
        remedy = "Store examples: policy=AdaptiveRefresh() with strength=1, or Avalanche's ReplayPlugin"
        if stored:
            remedy = (
                "Of the policies that store examples AdaptiveRefresh() holds best, at strength 1 or, where that is not "
                f"stable, at one of {suggestion.numbers}; or replay the examples (Avalanche's ReplayPlugin)"
            )
        return (
            f"{found}; {self.renamed:.0%} are taken for the newest classes. Where classes are added and told apart "
            f"from all others, no strength of a penalty with a fixed anchor prevents that. {remedy}; or, where the "
            "task is known at test time, give task labels and a head for each task (MultiHeadClassifier)."
        )


class EarlierClasses:
    """Counts, in evaluations after an experience, what is left of the classes of the experiences before it. Classes are
    pairs (task label, class)."""

    def __init__(self) -> None:
        self._earlier: set[tuple[int, int]] = set()
        self._newest: set[tuple[int, int]] = set()
        self._training = False
        self.restart()

    def restart(self) -> None:
        """Before an evaluation."""
        self._examples, self._right, self._renamed, self._guessed = 0, 0, 0, 0.0

    def begin(self, classes: set[tuple[int, int]]) -> None:
        """Before an experience with these classes. Evaluations in the middle of it do not count."""
        self._earlier, self._newest, self._training = self._earlier | self._newest, classes, True

    def end(self) -> None:
        """After that experience."""
        self._training = False

    def see(self, predicted: Tensor, targets: Tensor, tasks: Tensor) -> None:
        """Counts a batch that is being evaluated."""
        if self._training or not self._earlier:
            return
        for task in tasks.unique().tolist():
            earlier, newest = (_with_label(known, task) for known in (self._earlier, self._newest))
            lost = torch.tensor(sorted(earlier - newest), device=targets.device, dtype=targets.dtype)
            past = (tasks == task) & torch.isin(targets, lost)
            taken = torch.isin(predicted[past], torch.tensor(sorted(newest), device=targets.device))
            count = int(past.sum())
            self._examples += count
            self._right += int((predicted[past] == targets[past]).sum())
            self._renamed += int(taken.sum())
            self._guessed += count / max(1, len(earlier | newest))

    @property
    def kept(self) -> Kept:
        """What was counted since `restart`."""
        n = max(1, self._examples)
        return Kept(self._examples, self._right / n, self._renamed / n, self._guessed / n)


def _with_label(known: set[tuple[int, int]], label: int) -> set[int]:
    return {number for task, number in known if task == label}
