"""Frozen parameters outside of the parameter space are not copied with a past, and a change of them is noticed."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from avalanche_curv import (
    GGN,
    Accumulate,
    AdaptiveRefresh,
    Diagonal,
    EmpiricalFisher,
    EmpiricalRisk,
    Kronecker,
    MatrixFree,
    Merge,
    Past,
    Refresh,
    RelativeError,
    estimate,
)
from avalanche_curv.core.risk.frozen import frozen_copy, keep_what_trains

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
        known = {t.untyped_storage()._cdata for t in given if torch.is_tensor(t)}
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if torch.is_tensor(tensor) and tensor.untyped_storage()._cdata not in known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return found


WIDE = 600  # so that nothing is as large that does not grow with the layer


@pytest.fixture
def model():
    """A large frozen layer between small trained ones."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, WIDE), nn.Linear(WIDE, WIDE), nn.Linear(WIDE, 3), nn.Linear(3, 2)
    )
    layers[2:5].requires_grad_(False)
    return layers.double()


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


def test_half_precision_and_tables_with_a_norm_are_copied():
    half = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)).half()
    assert all(p.dtype == torch.float32 for p in frozen_copy(half).parameters())
    table = nn.Sequential(nn.Embedding(3, 2, max_norm=0.1).requires_grad_(False), nn.Linear(2, 2))
    before = table[0].weight.clone()
    frozen_copy(table)
    assert torch.equal(table[0].weight, before)


def test_an_adapter_of_peft_costs_memory_of_its_own_size():
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=20_000, n_positions=8, num_labels=2, pad_token_id=0
    )
    base = transformers.GPT2ForSequenceClassification(config)
    model = peft.get_peft_model(base, peft.LoraConfig(r=1, target_modules=["c_attn"], fan_in_fan_out=True))
    batch = {"input_ids": torch.randint(1, 20_000, (3, 4)), "labels": torch.tensor([0, 1, 1])}
    policy, noted = AdaptiveRefresh(fraction=1, every=1), LargestStorage()
    with noted:
        risk = snapshot(model, [batch])
        past = policy.absorb(Past(), risk, EmpiricalFisher(), Diagonal())
        past = policy.revise(past, model, 1, EmpiricalFisher(), Diagonal())
    table = base.transformer.wte.weight
    assert noted.bytes < table.nbytes / 4
    assert all("lora" in name for name in risk.space.names)
    assert past.stored[0].base.base_model.model.transformer.wte.weight.data_ptr() == table.data_ptr()
    outputs = model.eval()(batch["input_ids"]).logits
    assert risk.value() == pytest.approx(nn.CrossEntropyLoss()(outputs, batch["labels"]).item(), rel=1e-5)
    assert estimate(GGN(), Diagonal(), risk).curvature.is_finite()
