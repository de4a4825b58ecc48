"""Steps projected by compiled loops: against float64 on paper, against torch's passes, and over many steps."""

import copy
import math
import shutil

import pytest
import torch
from torch import nn

from avalanche_curv import ParameterSpace
from avalanche_curv.core.projection import Projector, ProtectedSpace, SequentialProjection, StepProjection, packed
from avalanche_curv.core.projection.blocks import Layout, ProtectedBlock
from avalanche_curv.core.projection.packed import PackedRows
from avalanche_curv.core.projection.stepping import BlockSteps, StepMemory
from avalanche_curv.core.projection.subspace import Subspace, TaskShare

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler is at hand"),
]


@pytest.fixture
def any_size(monkeypatch):
    """Packs bases of any size, however much they leave."""
    monkeypatch.setattr(packed, "LARGE", 0)
    monkeypatch.setattr(packed, "LEAK", math.inf)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(count, size, seed=0):
    return torch.linalg.qr(drawn(size, count, seed=seed).double())[0].T.float().contiguous()


def unpacked(found, count, size):
    """The rows that 16 bits hold, in float64."""
    return torch.cat([*found.tiles.parts()])[:count, :size]


@pytest.mark.parametrize(("count", "size"), [(1, 700), (5, 3000), (16, 1024), (17, 2049), (70, 5000)])
def test_rows_in_16_bits_take_off_their_own_part(count, size, any_size):
    rows = orthonormal(count, size)
    found = PackedRows.of(rows)
    held = unpacked(found, count, size)
    assert (held - rows).norm(dim=1).max() < 5e-5
    for step in (drawn(size, seed=1), drawn(count, seed=1) @ rows):
        step = step / step.norm()
        outside = step.double() - held.T @ torch.linalg.solve(held @ held.T, held @ step.double())
        torch.testing.assert_close(found.outside(step).double(), outside, rtol=0, atol=3e-6)


def test_a_step_that_was_nan_leaves_nothing_behind(any_size):
    found = PackedRows.of(orthonormal(3, 700))
    step = drawn(700, seed=1)
    before = found.outside(step)
    assert found.outside(step * math.nan).isnan().all()
    assert torch.equal(found.outside(step), before)


def test_what_a_random_step_leaves_in_the_basis_is_the_closed_form(any_size):
    """‖Ũ − U‖_F / √d of its length."""
    rows = orthonormal(60, 20_000)
    found = PackedRows.of(rows)
    step = drawn(20_000, seed=1)
    left = float((rows.double() @ found.outside(step).double()).norm() / step.norm())
    assert left == pytest.approx(float((unpacked(found, 60, 20_000) - rows).norm()) / 20_000**0.5, rel=0.3)
    assert 3e-7 < left < 3e-6


def test_rounding_that_goes_along_a_row_does_not_count(any_size):
    """Two values of which one is rounded, always to the same side: the row's own length is known."""
    row = torch.tensor([1.0, 0.30001]).repeat(4096)[None]
    row /= row.norm()
    left = PackedRows.of(row).outside(row[0])
    assert abs(float(row[0].double() @ left.double())) < 3e-7


def test_float32_rows_are_packed_where_they_are_large_and_little_is_left():
    assert PackedRows.of(orthonormal(3, 1000)) is None
    assert PackedRows.of(orthonormal(400, 5300)) is None  # 3e-5 √(k/d) is too much
    rows = orthonormal(5, 2**19)
    assert PackedRows.of(rows) is not None
    assert PackedRows.of(rows.double()) is None
    torch.set_num_threads(2)
    assert PackedRows.of(rows) is None


def space_of(model, kind, count, stacked=False, seed=0):
    whole = ParameterSpace.of(model)
    if not stacked:
        return ProtectedSpace({"": block(Layout(whole), kind, count, seed)}, experiences=1)
    shapes = dict(zip(whole.names, whole.shapes))
    layers = [name.removesuffix(".weight") for name in whole.names if name.endswith(".weight")]
    own = {layer: (f"{layer}.weight", f"{layer}.bias") for layer in layers}
    parts = {layer: ParameterSpace(names, tuple(shapes[n] for n in names)) for layer, names in own.items()}
    blocks = {layer: block(Layout(part, stacked=True), kind, count, seed) for layer, part in parts.items()}
    return ProtectedSpace(blocks, experiences=1)


def block(layout, kind, count, seed):
    rows = orthonormal(count, layout.columns.size, seed).to(kind)
    coordinates = torch.eye(count, dtype=torch.float64)
    shares = [TaskShare(part, torch.ones(len(part)), math.nan, n) for n, part in enumerate(coordinates.split(2))]
    return ProtectedBlock(layout, Subspace(rows, tuple(shares)))


def net(kind=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 3)).to(kind)


def walked(model, space, projection, steps=20, size=1e-2, through_state=False):
    projector, start = Projector(space, projection), space.values(model)
    start = {name: value.clone() for name, value in start.items()}
    for step in range(steps):
        if through_state and step == steps // 2:
            state, projector = projector.state_dict(), Projector(copy.deepcopy(space), projection)
            projector.load_state_dict(state)
        with projector.around_step(model), torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter += size * drawn(*parameter.shape, seed=10 * step + number).to(parameter.dtype)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), space.leakage(space.values(model), start)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("projection", [StepProjection(), SequentialProjection()])
def test_loops_walk_as_passes_of_torch_do(stacked, projection, monkeypatch):
    model = net()
    space = space_of(model, torch.float32, 6, stacked)
    expected, _ = walked(net(torch.float64), space_of(model, torch.float64, 6, stacked), projection)
    version = model[0].weight._version
    by_loops, _ = walked(model, space, projection)
    assert model[0].weight._version > version + 20  # autograd sees what loops write
    monkeypatch.setattr(packed, "library", lambda: None)
    by_torch, _ = walked(net(), space, projection)
    assert not torch.equal(by_loops, by_torch)  # they round elsewhere
    for found in (by_loops, by_torch):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_rest_is_what_rounding_has_taken_to_the_bit():
    """θ' + rest' = θ + (what is left of Δ) + rest, in float64."""
    model = net()
    found = BlockSteps(space_of(model, torch.float32, 6).blocks[""])
    values = {name: p.detach() for name, p in model.named_parameters()}
    layout, total = found.block.layout, 0.0
    start = layout.difference(values, None, torch.zeros(1, dtype=torch.float64))
    for number in range(10):
        found.begin(values)
        for value in values.values():
            value += 1e-3 * drawn(*value.shape, seed=number)
        found.finish(values)
        total = total + found._step.double()
    now = layout.difference(values, None, torch.zeros(1, dtype=torch.float64))
    assert found.rest.abs().max() > 0
    torch.testing.assert_close(now + found.rest.double(), start + total, rtol=0, atol=1e-9)


def transposed(model):
    model[0].weight.data = model[0].weight.data.T.contiguous().T


def of_a_subclass(model):
    model[2].bias = type("Bias", (nn.Parameter,), {})(model[2].bias.data)


@pytest.mark.parametrize("change", [transposed, of_a_subclass])
@pytest.mark.parametrize("stacked", [False, True])
def test_parameters_that_are_not_plain_are_left_to_torch(change, stacked, monkeypatch):
    model = net()
    change(model)
    space = space_of(model, torch.float32, 6, stacked)
    found, leak = walked(model, space, StepProjection())
    monkeypatch.setattr(packed, "library", lambda: None)
    torch.testing.assert_close(found, walked(net(), space, StepProjection())[0], rtol=0, atol=1e-6)
    assert leak < 1e-6


def test_a_walk_goes_on_bit_identically_with_rows_in_16_bits(any_size):
    space = space_of(net(), torch.float32, 6)
    whole, _ = walked(net(), space, StepProjection())
    assert torch.equal(walked(net(), space, StepProjection(), through_state=True)[0], whole)
    memory = StepMemory(space)
    memory.begin(net())
    assert copy.deepcopy(memory)._named.model is not memory._named.model  # copies hold no model
    assert memory.blocks[""]._packed is not None


@pytest.mark.parametrize("size", [1e-2, 1e-5])
def test_drift_with_rows_in_16_bits_is_as_that_with_float32(size, monkeypatch):
    """‖U Δ‖ / ‖Δ‖ ≤ 1e-6 over 30 steps of half a million parameters, large ones and such as rounding is felt in."""
    model = nn.Linear(700, 750)
    space = space_of(model, torch.float32, 8)
    assert StepMemory(space).blocks[""]._packed is not None
    start = copy.deepcopy(model)
    found, leak = walked(model, space, StepProjection(), steps=30, size=size)
    monkeypatch.setattr(packed, "LARGE", math.inf)
    other, by_rows = walked(start, space, StepProjection(), steps=30, size=size)
    assert leak < 1e-6
    assert by_rows < 1e-6
    torch.testing.assert_close(found, other, rtol=0, atol=30 * size * 1e-5 + 1e-7)
