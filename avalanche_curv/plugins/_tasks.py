"""Where tasks end and which examples are theirs, in streams of tasks and in online streams that split them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from avalanche.benchmarks import OnlineCLExperience

from avalanche_curv.core.options import check_whole


class TaskEnds:
    """Decides whether an experience ends a task; `here(strategy)` is to be called once at the end of each.

    Every experience ends a task, except in an online stream, where the last sub-experience of a task does: also where
    the stream hides it from the learner, which is to ask `tells_tasks` first. Sub-experiences are counted, because
    Avalanche does not mark the last one where they are of equal size.
    """

    def __init__(self) -> None:
        self._seen = 0

    def state_dict(self) -> dict[str, Any]:
        """How much of the current task was seen."""
        return {"seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self._seen = check_whole("seen", state["seen"])

    def here(self, strategy: Any) -> bool:
        experience = strategy.experience
        if not isinstance(experience, OnlineCLExperience):
            return True
        experience = experience.logging()
        self._seen = 1 if experience.is_first_subexp else self._seen + 1
        return bool(experience.is_last_subexp) or self._seen == experience.sub_stream_length


def tells_tasks(strategy: Any) -> bool:
    """Whether the ends of tasks are known: not in an online stream that hides them."""
    experience = strategy.experience
    return not isinstance(experience, OnlineCLExperience) or bool(experience.access_task_boundaries)


def updates_of(strategy: Any) -> int:
    """The number of updates that the current experience takes, without what plugins make of its batches."""
    batches = -(-len(strategy.experience.dataset) // strategy.train_mb_size)
    return strategy.train_epochs * batches


def told_data(experience: Any) -> Any:
    """The examples without training augmentation that a learner may look at: all of a task that an online stream splits
    with known boundaries, and of one that hides them the part alone."""
    hidden = isinstance(experience, OnlineCLExperience) and not experience.access_task_boundaries
    return experience.dataset.eval() if hidden else data_of(experience)


def data_of(experience: Any) -> Any:
    """The examples of an experience without training augmentation; of a part that an online stream gives, those of the
    whole task, which metrics may know. Raises ValueError where there is no task, since tasks overlap."""
    if not isinstance(experience, OnlineCLExperience):
        return experience.dataset.eval()
    whole = experience.logging().origin_experience
    if whole is None:
        raise ValueError(
            "This online stream has parts that belong to no task, of which past tasks could be measured. Leave this "
            "metric out, or split tasks one after another with split_online_stream."
        )
    return whole.dataset.eval()


def place_in_stream(experience: Any, default: int) -> int:
    """The number of an experience in the stream it comes from, also where training starts later or leaves some out;
    `default` where the experience has none."""
    online = isinstance(experience, OnlineCLExperience)
    own = experience.logging().origin_experience if online else experience
    place = getattr(own, "current_experience", None)
    return default if place is None else place
