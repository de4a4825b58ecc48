"""Parameters in half precision compute as their copies in float32 do, without being copied."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from avalanche_curv.core.risk import widened as module
from avalanche_curv.core.risk.widened import Widened, memory_of, widened

MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)), (3, 6)),
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 4)), (3, 2, 6)),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2)),
        (3, 2, 5, 5),
    ),
    "batch norm": (lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.PReLU()), (3, 6)),
    "attention": (lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), (3, 4, 6)),
    "recurrent": (lambda: Outputs(nn.LSTM(6, 5, batch_first=True)), (3, 4, 6)),
    "bilinear": (lambda: Twice(nn.Bilinear(6, 6, 3)), (3, 6)),
}


class Outputs(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0]


class Twice(Outputs):
    def forward(self, x):
        return self.inner(x, x)


def pair(name):
    """A model in float32 with values of bfloat16, the same one on memory in bfloat16, and inputs."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    plain = make().eval().bfloat16().requires_grad_(False)
    wide = copy.deepcopy(plain, {id(p): widened(p.data, torch.float32) for p in plain.parameters()}).float()
    assert all(isinstance(p, Widened) and isinstance(p, nn.Parameter) for p in wide.parameters())
    return plain.float(), wide, torch.randn(shape)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_derivatives_are_those_of_a_copy(name):
    plain, wide, x = pair(name)
    found = []
    for model in (plain, wide):
        here = x.clone().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention lack second derivatives
            outputs = model(here)
        with torch.no_grad():
            torch.testing.assert_close(model(x), outputs.detach())
        (slope,) = torch.autograd.grad(outputs.square().sum(), here, create_graph=True)
        (second,) = torch.autograd.grad(slope.square().sum(), here)
        found.append((outputs, slope, second))
    for own, other in zip(*found):
        assert type(other) is Tensor
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("name", ["linear", "tokens", "convolutions", "bilinear"])
def test_transforms_of_functions(name):
    plain, wide, x = pair(name)
    torch.testing.assert_close(jvp(plain, (x,), (x,)), jvp(wide, (x,), (x,)))

    def slopes(model):
        def slope(one):
            outputs, pull = vjp(lambda x: functional_call(model, {}, (x[None],)), one)
            return pull(torch.ones_like(outputs))[0]

        return vmap(slope)(x)

    torch.testing.assert_close(slopes(plain), slopes(wide))


@pytest.mark.parametrize("bias", [True, False])
def test_products_in_blocks_are_those_of_the_whole(bias, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 7)
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 6, bias=bias).bfloat16().float().requires_grad_(False), torch.randn(4, 5)
    wide = copy.deepcopy(layer, {id(layer.weight): widened(layer.weight.data.bfloat16(), torch.float32)})
    slopes = []
    for model in (layer, wide):
        here = x.clone().requires_grad_()
        torch.testing.assert_close(model(here), layer(x))
        slopes.extend(torch.autograd.grad(model(here).square().sum(), here))
    torch.testing.assert_close(*slopes)


def test_rows_are_looked_up_and_views_are_of_the_same_memory():
    table = widened(torch.randn(5, 4, dtype=torch.bfloat16), torch.float32)
    places = torch.tensor([[1, 4], [0, 1]])
    assert torch.equal(nn.functional.embedding(places, table), memory_of(table).float()[places])
    assert torch.equal(table[places[0]], memory_of(table).float()[places[0]])
    for view in (table.T, table[1:, 2], table.view(2, 10), *table.unbind(), *table.chunk(2), table.expand(3, 5, 4)):
        assert view.dtype == torch.float32
        start = memory_of(view).untyped_storage().data_ptr()
        assert start == memory_of(table).untyped_storage().data_ptr()
        assert torch.equal(view.clone(), memory_of(view).float())


def test_graphs_keep_no_copy():
    _, wide, x = pair("linear")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        wide(x.requires_grad_()).sum()
    weights = [t for t in kept if t.ndim == 2 and 3 not in t.shape]
    assert len(weights) == 2
    assert all(isinstance(t, Widened) for t in weights)


def test_it_is_not_written_into_and_has_no_address():
    wide = widened(torch.ones(2, dtype=torch.bfloat16), torch.float32)
    with torch.no_grad(), pytest.raises(TypeError, match="writes into a frozen parameter"):
        wide.add_(1)
    with pytest.raises(RuntimeError, match="asked for its address"):
        wide.data_ptr()
    assert torch.equal(memory_of(wide), torch.ones(2, dtype=torch.bfloat16))


def test_copies_and_files_stay_in_half_precision():
    wide = widened(torch.randn(3, dtype=torch.bfloat16), torch.float32)
    file = io.BytesIO()
    torch.save(wide, file)
    file.seek(0)
    for other in (copy.deepcopy(wide), torch.load(file, weights_only=False)):
        assert isinstance(other, Widened)
        assert isinstance(other, nn.Parameter)
        assert other.dtype == torch.float32
        assert memory_of(other).dtype == torch.bfloat16
        assert torch.equal(memory_of(other), memory_of(wide))
        assert memory_of(other).data_ptr() != memory_of(wide).data_ptr()
    assert widened(torch.ones(2), torch.float32).data_ptr()
