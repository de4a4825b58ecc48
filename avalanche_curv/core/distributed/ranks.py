"""The processes of a distributed run: sums, gathers and checks over all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")

START = (
    "Launch the script by torchrun and call torch.distributed.init_process_group() first; for a single process, "
    "init_process_group('gloo', init_method='file:///tmp/some_new_file', rank=0, world_size=1) will do."
)


@dataclass(frozen=True)
class Ranks:
    """The processes of one group of torch.distributed; without a group, all of them.

    Every method talks to the other ranks: all must call it, in the same order. RuntimeError says that no process group
    has been initialised.
    """

    group: Any = None

    @property
    def size(self) -> int:
        """R, the number of ranks."""
        group = self._started()
        return distributed.get_world_size(group)

    @property
    def rank(self) -> int:
        """The number of this process in the group, from 0."""
        group = self._started()
        return distributed.get_rank(group)

    def sum(self, tensor: Tensor) -> Tensor:
        """Σ_r of the ranks' tensors of one shape, the same bits on all of them, in new memory."""
        return self._summed(tensor.detach().clone(memory_format=torch.contiguous_format))

    def sum_of(self, function: Callable[[], Tensor], like: Tensor) -> Tensor:
        """Σ_r of what `function` returns on each rank, of the shape and type of `like`.

        Where it fails on one rank, that rank raises its own error and the others RuntimeError. The failure travels
        with the sum as one more number.
        """
        own, failure = _attempt(function)
        numbers = own.detach() if failure is None else torch.zeros_like(like)
        failures = like.new_tensor([float(failure is not None)])
        total = self._summed(torch.cat([numbers.reshape(-1), failures]))
        if total[-1]:
            _raise(self.gather(_words(failure)), failure)
        return total[:-1].view(like.shape)

    def gather(self, value: T) -> list[T]:
        """The `value` of every rank, in the order of ranks; it must be small and picklable."""
        group, values = self._started(), [value] * self.size
        distributed.all_gather_object(values, value, group=group)
        return values

    def gather_of(self, function: Callable[[], T]) -> list[T]:
        """What `function` returns on every rank, in the order of ranks; it must be small and picklable.

        Where it fails on one rank, that rank raises its own error and the others RuntimeError.
        """
        value, failure = _attempt(function)
        every = self.gather((value, _words(failure)))
        _raise([words for _, words in every], failure)
        return [value for value, _ in every]

    def together(self, function: Callable[[], T]) -> T:
        """What `function` returns on this rank, once it has succeeded on all; it must not communicate itself.

        Where it fails on one rank, that rank raises its own error and the others RuntimeError, so that none waits for
        ever.
        """
        result, failure = _attempt(function)
        _raise(self.gather(_words(failure)), failure)
        return result

    def agree(self, facts: Mapping[str, str]) -> None:
        """Raises ValueError on all ranks unless the named `facts` are equal on all of them."""
        every = self.gather(dict(facts))
        for rank, theirs in enumerate(every):
            for name, value in every[0].items():
                if theirs.get(name) != value:
                    raise ValueError(
                        f"The ranks do not agree on the {name}: {value} on rank 0, {theirs.get(name)} on rank {rank}. "
                        "Run the same code on all ranks, with models of the same parameters; only the examples differ."
                    )

    def check_device(self, device: torch.device) -> None:
        """Raises RuntimeError for tensors on a device that the group's backend cannot send from."""
        group = self._started()
        backends = distributed.get_backend_config(group)
        if device.type not in backends:
            raise RuntimeError(
                f"The process group sends by {backends}, but the tensors are on '{device}'. Move the model to a device "
                "that it sends from, or initialise the group with 'cpu:gloo,cuda:nccl'."
            )

    def _summed(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, written into a tensor that is nobody else's."""
        self.check_device(tensor.device)
        distributed.all_reduce(tensor, group=self.group)
        return tensor

    def _started(self) -> Any:
        if not (distributed.is_available() and distributed.is_initialized()):
            raise RuntimeError(f"No process group of torch.distributed has been initialised. {START}")
        return self.group


def _attempt(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What it gives, or how it failed."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def _words(failure: Exception | None) -> str | None:
    """A failure as the other ranks hear of it."""
    return None if failure is None else f"{type(failure).__name__}: {failure}"


def _raise(words: list[str | None], failure: Exception | None) -> None:
    """Raises where a rank failed, given what each says: its own failure on that rank, RuntimeError on the others."""
    if failure is not None:
        raise failure
    for rank, message in enumerate(words):
        if message is not None:
            raise RuntimeError(f"Rank {rank} failed, and the others stop with it. {message}")
