"""Whether the values of a tensor are those of before, without a copy of them."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor

INTEGERS = {4: torch.int32, 2: torch.int16, 1: torch.int8}
CHUNK = 2**15  # integers: what is computed of them stays in the cache of a processor


def fingerprint(tensor: Tensor) -> Int[Tensor, "chunks"]:
    """A sum h = Σ_i w_i b_i (mod 2⁶⁴) for each chunk of the memory of `tensor`, read as integers b of up to 32 bits,
    with 64-bit weights w drawn at random once and for all (Carter and Wegman 1979).

    Equal bits have equal fingerprints. Other bits have another one, whatever was changed, a single entry or the order,
    but for one in 2³² of all w, since differences of b are below 2³² in size. It takes one pass over the memory, some
    five times as long as `tensor.sum()` (half of that in half precision), and eight bytes for each chunk.

    >>> x = torch.zeros(3)
    >>> before = fingerprint(x)
    >>> x[1] = 1e-30
    >>> torch.equal(fingerprint(x), before)
    False
    """
    flat = _in_memory_order(tensor.detach())
    width = math.gcd(4, flat.nbytes, flat.storage_offset() * flat.element_size())
    bits, weights = flat.view(INTEGERS[width]), _weights(flat.device)
    whole = len(bits) // CHUNK * CHUNK
    at_once = torch.get_num_threads() if bits.device.type == "cpu" else 128
    parts = [*bits[:whole].view(-1, CHUNK).split(at_once), bits[None, whole:]]
    return torch.cat([torch.mul(part, weights[: part.shape[1]]).sum(1) for part in parts])


def _in_memory_order(tensor: Tensor) -> Tensor:
    """The entries as one axis: as they lie in memory where they fill it, so that nothing is copied."""
    axes = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(axes).reshape(-1).contiguous()


@lru_cache
def _weights(device: torch.device) -> Int[Tensor, "integers"]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (CHUNK,), generator=generator, device="cpu").to(device)
