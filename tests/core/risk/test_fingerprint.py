"""A fingerprint is that of the bits of a tensor, wherever one is another."""

import pytest
import torch

from avalanche_curv.core.risk.fingerprint import fingerprint

TYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.int64, torch.int16, torch.bool
]
LONG = 2**15 + 7  # more than one chunk


def same(a, b):
    return torch.equal(fingerprint(a), fingerprint(b))


def written(dtype, size=LONG):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, (size,), generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 5, LONG])
def test_equal_values_have_equal_fingerprints(dtype, size):
    values = written(dtype, size)
    kept, before = values.clone(), fingerprint(values)
    values.zero_()
    values.copy_(kept)
    assert torch.equal(fingerprint(values), before)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("place", [0, 1, 2**15 - 1, LONG - 1])
def test_any_bit_of_any_entry_counts(dtype, place):
    values = written(dtype)
    before, size = fingerprint(values), values.element_size()
    raw = values.view(torch.uint8)
    for bit in range(1 if dtype == torch.bool else 8 * size):
        raw[size * place + bit // 8] ^= 1 << (bit % 8)
        assert not torch.equal(fingerprint(values), before)
        raw[size * place + bit // 8] ^= 1 << (bit % 8)
    assert torch.equal(fingerprint(values), before)


CHANGES = {
    "all signs": lambda w: w.neg(),
    "the signs of a column": lambda w: torch.cat([w[:, :1], -w[:, 1:]], 1),
    "rows exchanged": lambda w: w.roll(1, 0),
    "columns exchanged": lambda w: w.flip(1),
    "chunks exchanged": lambda w: w.roll(2**14, 0),
    "one added to one and taken from another": lambda w: w + torch.eye(len(w), 1).sub(torch.eye(len(w), 1).roll(1)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_changes_that_a_plain_sum_does_not_see(change, dtype):
    """Of few whole numbers, whose sums over rows, columns or all are often those of before."""
    values = torch.arange(2**16).view(-1, 2).div(7, rounding_mode="floor").remainder(5).sub(2).to(dtype)
    assert not same(CHANGES[change](values).to(dtype), values)


def test_every_layout_of_memory_is_read():
    whole = torch.randn(6, 5, 4, 3, generator=torch.Generator().manual_seed(0))
    for view in (whole.permute(2, 0, 3, 1), whole[1:4], whole[:, 1:3], whole[..., 0], whole.expand(2, -1, -1, -1, -1)):
        before = fingerprint(view)
        assert torch.equal(fingerprint(view), before)
        view[(-1,) * view.ndim] += 1
        assert not torch.equal(fingerprint(view), before)
    odd = torch.arange(5, dtype=torch.bfloat16)[1:]  # begins between two words
    assert odd.storage_offset() == 1
    assert not torch.equal(fingerprint(odd), fingerprint(odd.flip(0)))
