"""Frozen parameters outside of the parameter space are not copied with a past, and a change of them is noticed."""

import copy
import io
import math
from itertools import accumulate

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from avalanche_curv import (
    EKFAC,
    GGN,
    Accumulate,
    AdaptiveRefresh,
    Diagonal,
    EmpiricalFisher,
    EmpiricalRisk,
    Fisher,
    Hessian,
    Kronecker,
    LowRank,
    MatrixFree,
    Merge,
    Past,
    Rank,
    Refresh,
    RelativeError,
    estimate,
)
from avalanche_curv.core.risk.frozen import frozen_copy, keep_what_trains
from avalanche_curv.core.risk.widened import memory_of

POLICIES = [
    Accumulate(), Merge(), Refresh(fraction=0.5), AdaptiveRefresh(RelativeError(1e-9), fraction=0.5, every=1),
]


class LargestStorage(TorchDispatchMode):
    """The bytes of the largest tensor with memory of its own that an operation returns."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = torch.utils._pytree.tree_leaves((args, kwargs))
        known = {memory_of(t).untyped_storage()._cdata for t in given if torch.is_tensor(t)}
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if torch.is_tensor(tensor) and (storage := memory_of(tensor).untyped_storage())._cdata not in known:
                self.bytes = max(self.bytes, storage.nbytes())
        return found


WIDE = 600  # so that nothing is as large that does not grow with the layer


def layers_around(width):
    """A frozen layer of that width between small trained ones."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, 3), nn.Linear(3, 2)
    )
    layers[2:5].requires_grad_(False)
    return layers.double()


@pytest.fixture
def model():
    return layers_around(WIDE)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(6, 4, generator=generator), torch.randint(2, (6,), generator=generator))]


def snapshot(model, data, **options):
    return EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), data, **options)


def test_a_frozen_copy_shares_what_is_frozen_and_copies_the_rest(model):
    model[5].weight.grad = torch.ones_like(model[5].weight)
    copied = frozen_copy(model)
    for place, layer in enumerate(model):
        for (name, own), other in zip(layer.named_parameters(), copied[place].parameters(), strict=True):
            assert (own.data_ptr() == other.data_ptr()) == (2 <= place < 5), name
            assert own.requires_grad == (not 2 <= place < 5)
            assert own is not other
    assert model[5].weight.grad is not None


@pytest.mark.parametrize("structure", [Diagonal(), Kronecker()], ids=["diagonal", "kronecker"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_nothing_as_large_as_the_frozen_layer_is_made(policy, structure, model, data):
    past, noted = Past(), LargestStorage()
    with noted:
        for _ in range(2):
            past = policy.absorb(past, snapshot(model, data), GGN(), structure)
            with torch.no_grad():
                model[0].weight += 0.1
            past = policy.revise(past, model, 1, GGN(), structure)
            _ = past.model.penalty(model)
    assert 0 < noted.bytes < model[3].weight.nbytes / 4
    assert all(risk.base[3].weight.data_ptr() == model[3].weight.data_ptr() for risk in past.stored)


def in_place(p):
    with torch.no_grad():
        p.add_(1)


CHANGES = {
    "in place": in_place,
    "its data": lambda p: p.data.mul_(2),
    "one entry of its data": lambda p: p.data[7, 3:4].add_(1e-9),
    "one row of its data": lambda p: p.data[7].neg_(),
    "rows of its data exchanged": lambda p: p.data.copy_(p.data.roll(1, 0)),
    "loaded": lambda p: nn.Module.load_state_dict(holding(p), {"p": p + 1}),
}


def holding(parameter):
    module = nn.Module()
    module.p = parameter
    return module


@pytest.mark.parametrize("change", CHANGES)
def test_a_frozen_parameter_that_changes_is_noticed(change, model, data):
    risk = snapshot(model, data)
    before, owned = risk.value(), copy.deepcopy(risk)
    CHANGES[change](model[3].weight)
    with pytest.raises(ValueError, match=r"'3.weight' .* changed in place since.*copy.deepcopy\(risk\)"):
        risk.value()
    assert owned.value() == before
    assert snapshot(model, data).value() != before


@pytest.mark.parametrize("write", ["loaded", "there and back", "its data"])
def test_equal_values_that_are_written_are_no_change(write, model, data):
    risk, state = snapshot(model, data), copy.deepcopy(model.state_dict())
    matrix, vector = estimate(GGN(), MatrixFree(), risk).curvature, torch.ones(risk.space.size, dtype=torch.float64)
    before, product = risk.value(), matrix.product(vector)
    if write == "its data":
        model[3].weight.data.copy_(state["3.weight"])
    if write == "there and back":
        in_place(model[3].weight)
    model.load_state_dict(state)
    assert risk.value() == before
    assert torch.equal(matrix.product(vector), product)


def test_values_that_are_given_anew_or_are_not_finite_are_no_change(model, data):
    with torch.no_grad():
        model[4].bias[0] = math.nan
    risk = snapshot(model, data)
    model[3].weight.data = torch.zeros_like(model[3].weight)
    in_place(model[3].weight)
    assert math.isnan(risk.value())
    assert risk.base[3].weight.any()


def test_what_trains_without_being_in_the_space_is_copied(model, data):
    for options in ({"include": ["5"]}, {"exclude": ["0"]}):
        risk = snapshot(model, data, **options)
        before = risk.value()
        with torch.no_grad():
            model[0].weight += 1
        assert risk.value() == before


def test_parameters_that_train_later_are_copied_before_they_do(model, data):
    risk = snapshot(model, data)
    model[3].requires_grad_()
    wider = risk.covering(["3.weight", "3.bias"])
    before = wider.value()
    with torch.no_grad():
        model[3].weight += 1
    assert wider.value() == before
    assert wider.base[2].weight.data_ptr() == model[2].weight.data_ptr()


def test_a_risk_keeps_what_trains_later(model, data):
    risk, operator = (snapshot(model, data) for _ in range(2))
    matrix = estimate(GGN(), MatrixFree(), operator).curvature
    before, vector = risk.value(), torch.ones(risk.space.size, dtype=torch.float64)
    expected = matrix.product(vector)
    model[3].requires_grad_()
    keep_what_trains(model)
    in_place(model[3].weight)
    assert risk.value() == before
    assert torch.equal(matrix.product(vector), expected)
    assert risk.base[2].weight.data_ptr() == model[2].weight.data_ptr()


def test_a_product_that_keeps_graphs_notices_a_change_too(model, data):
    matrix = estimate(GGN(), MatrixFree(), snapshot(model, data)).curvature
    vector = torch.ones(matrix.size, dtype=torch.float64)
    matrix.product(vector)
    in_place(model[3].weight)
    with pytest.raises(ValueError, match="changed in place since"):
        matrix.product(vector)


def test_adaptive_refresh_goes_on_from_what_trains_now(model, data):
    policy = AdaptiveRefresh(fraction=1, every=1)
    past = policy.absorb(Past(), snapshot(model, data), GGN(), Diagonal())
    model[3].requires_grad_()
    in_place(model[3].weight)
    past = policy.revise(past, model, 1, GGN(), Diagonal())
    assert past.refreshes[0].reason.startswith("3.weight, 3.bias train now")
    assert past.loss == pytest.approx(nn.CrossEntropyLoss()(model(data[0][0].double()), data[0][1]).item(), rel=1e-12)


def test_a_state_is_read_into_what_the_model_has_frozen(model, data):
    policy, loss = Refresh(fraction=1), nn.CrossEntropyLoss()
    state = policy.absorb(Past(), snapshot(model, data), GGN(), Diagonal()).state_dict()
    loaded = Past.load_state_dict(state, model=model, criterion=loss).stored[0]
    assert loaded.base[3].weight.data_ptr() == model[3].weight.data_ptr()
    before = loaded.value()
    in_place(model[3].weight)
    changed = model[3].weight.clone()
    own = Past.load_state_dict(state, model=model, criterion=loss).stored[0]
    assert own.value() == before
    assert torch.equal(model[3].weight, changed)


def test_tables_with_a_norm_are_copied():
    table = nn.Sequential(nn.Embedding(3, 2, max_norm=0.1).requires_grad_(False), nn.Linear(2, 2))
    before = table[0].weight.clone()
    frozen_copy(table)
    assert torch.equal(table[0].weight, before)


HALVES = {
    "all": lambda model: model.bfloat16(),
    "float16": lambda model: model.half(),
    "frozen ones": lambda model: model.float()[2:5].bfloat16(),
    "a trained one": lambda model: model.float()[0].bfloat16(),
    "beside double": lambda model: model[0].bfloat16(),
}


@pytest.fixture(params=HALVES)
def half(request, model):
    HALVES[request.param](model)
    return model


def single(model):
    return copy.deepcopy(model).float()


def test_half_precision_is_shared_and_computes_in_single(half, data):
    risk = snapshot(half, data)
    for place, layer in enumerate(half):
        for own, other in zip(layer.parameters(), risk.base[place].parameters(), strict=True):
            assert other.dtype == torch.float32
            assert (memory_of(other).data_ptr() == own.data_ptr()) == (2 <= place < 5)
    own = copy.deepcopy(risk)
    expected = snapshot(single(half), data)
    for one in (risk, own, risk.covering(["3.weight"])):
        assert one.value() == expected.value()
    assert torch.equal(risk.gradient(), expected.gradient())
    in_place(half[3].weight)
    with pytest.raises(ValueError, match=r"'3.weight' .* changed in place since"):
        risk.value()
    assert own.value() == expected.value()


@pytest.mark.parametrize("kind", [GGN(), EmpiricalFisher(), Fisher(samples=1), Hessian()], ids=type)
@pytest.mark.parametrize("structure", [Diagonal(), Kronecker(), EKFAC(), LowRank(Rank(2)), MatrixFree()], ids=type)
def test_curvature_in_half_precision_is_that_of_a_copy_in_single(kind, structure, data):
    if isinstance(kind, Hessian) and isinstance(structure, (Kronecker, EKFAC)):
        return
    model = layers_around(30).bfloat16()
    vector = torch.linspace(1, 2, sum(p.numel() for p in model.parameters() if p.requires_grad))
    found, expected = (
        estimate(kind, structure, snapshot(one, data)).curvature.product(vector) for one in (model, single(model))
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_half_precision_that_trains_later_is_kept_and_covered(model, data):
    model.bfloat16()
    risk, operator = (snapshot(model, data) for _ in range(2))
    matrix = estimate(GGN(), MatrixFree(), operator).curvature
    before, vector = risk.value(), torch.ones(risk.space.size)
    product, wider = matrix.product(vector), risk.covering(["3.weight", "3.bias"])
    model[3].requires_grad_()
    keep_what_trains(model)
    in_place(model[3].weight)
    assert risk.value() == wider.value() == before
    assert torch.equal(matrix.product(vector), product)
    assert wider.value_at(wider.anchor + 1) != before
    assert memory_of(risk.base[2].weight).data_ptr() == model[2].weight.data_ptr()


def test_a_state_in_half_precision(model, data):
    policy, loss = Refresh(fraction=1), nn.CrossEntropyLoss()
    past = policy.absorb(Past(), snapshot(model.bfloat16(), data), GGN(), Diagonal())
    file = io.BytesIO()
    torch.save(past.state_dict(), file)
    for _ in range(2):
        file.seek(0)
        state = torch.load(file, weights_only=True)
        loaded = Past.load_state_dict(state, model=model, criterion=loss).stored[0]
        assert loaded.value() == past.stored[0].value()
        assert memory_of(loaded.base[2].weight).data_ptr() == model[2].weight.data_ptr()
        past = copy.deepcopy(past)
        in_place(model[3].weight)  # the second one has values of its own


def most_memory(compute):
    """The bytes that `compute()` holds at most beyond those from before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as noted:
        compute()
    events = [e for e in noted.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize("structure", [Diagonal(), Kronecker()], ids=["diagonal", "kronecker"])
@pytest.mark.parametrize("policy", [Merge(), POLICIES[-1]], ids=lambda policy: type(policy).__name__)
def test_half_precision_takes_one_layer_in_single_at_a_time(policy, structure, data):
    """Of sixteen frozen layers, before and after which something trains."""
    torch.manual_seed(0)
    body = [nn.Sequential(nn.Linear(256, 256), nn.Tanh()).requires_grad_(False) for _ in range(16)]
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 256).requires_grad_(False), *body, nn.Linear(256, 2)).bfloat16()
    layer = model[2][0].weight.numel() * 4

    def follow():
        past = Past()
        for _ in range(2):
            past = policy.absorb(past, snapshot(model, data), EmpiricalFisher(), structure)
            with torch.no_grad():
                model[0].weight += 0.1
            past = policy.revise(past, model, 1, EmpiricalFisher(), structure)
            _ = past.model.penalty(model)

    follow()
    layers = 3 if isinstance(structure, Diagonal) else 8  # the inputs of the head have a factor as large as a layer
    assert layer < most_memory(follow) < layers * layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_of_peft_costs_memory_of_its_own_size(dtype):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=40_000, n_positions=8, num_labels=2, pad_token_id=0
    )
    base = transformers.GPT2ForSequenceClassification(config)
    model = peft.get_peft_model(base, peft.LoraConfig(r=1, target_modules=["c_attn"], fan_in_fan_out=True)).to(dtype)
    batch = {"input_ids": torch.randint(1, 40_000, (3, 4)), "labels": torch.tensor([0, 1, 1])}
    policy, noted = AdaptiveRefresh(fraction=1, every=1), LargestStorage()

    def absorbed():
        past = policy.absorb(Past(), snapshot(model, [batch]), EmpiricalFisher(), Diagonal())
        return policy.revise(past, model, 1, EmpiricalFisher(), Diagonal())

    with noted:
        past = absorbed()
    table, risk = base.transformer.wte.weight, past.stored[0]
    assert noted.bytes < table.nbytes / 4
    assert most_memory(absorbed) < table.nbytes
    assert all("lora" in name for name in risk.space.names)
    assert memory_of(risk.base.base_model.model.transformer.wte.weight).data_ptr() == table.data_ptr()
    outputs = copy.deepcopy(model).float().eval()(batch["input_ids"]).logits
    assert risk.value() == pytest.approx(nn.CrossEntropyLoss()(outputs, batch["labels"]).item(), rel=1e-5)
    assert estimate(GGN(), Diagonal(), risk).curvature.is_finite()
