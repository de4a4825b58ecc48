import pytest
import torch
from torch import Size, nn

from avalanche_curv import EmpiricalRisk, ParameterSpace
from avalanche_curv.core.risk.frozen import frozen_copy
from avalanche_curv.core.risk.parameters import canonical_name


class Wrapped(nn.Module):
    """Adds the prefix of DataParallel."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def space_of(**shapes):
    return ParameterSpace(tuple(shapes), tuple(Size(shape) for shape in shapes.values()))


def test_coordinates_follow_named_parameters(net):
    space = ParameterSpace.of(net)
    assert space.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert space.sizes == (20, 5, 15, 3)
    assert space.size == 43
    by_hand = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    assert torch.equal(space.vector(net), by_hand)


def test_the_vector_is_a_copy(net):
    vector = ParameterSpace.of(net).vector(net)
    before = vector.clone()
    with torch.no_grad():
        net[0].weight += 1
    assert torch.equal(vector, before)
    assert not vector.requires_grad


def test_the_vector_of_a_single_parameter_is_a_copy():
    layer = nn.Linear(3, 1, bias=False)
    ParameterSpace.of(layer).vector(layer).add_(1)
    assert not torch.equal(layer.weight, layer.weight + 1)
    vector = ParameterSpace.of(layer).vector(layer)
    assert vector.data_ptr() != layer.weight.data_ptr()


def test_split_undoes_flatten(net):
    space = ParameterSpace.of(net)
    parts = space.split(space.vector(net))
    assert all(torch.equal(part, p) for part, p in zip(parts, net.parameters(), strict=True))
    leading = space.split(torch.zeros(2, 7, space.size))
    assert [part.shape for part in leading] == [(2, 7, *p.shape) for p in net.parameters()]


def test_frozen_parameters_are_no_coordinates(net):
    net[0].requires_grad_(False)
    assert ParameterSpace.of(net).names == ("2.weight", "2.bias")


def test_scalars_are_coordinates():
    model = nn.ParameterDict({"scale": nn.Parameter(torch.tensor(2.0)), "row": nn.Parameter(torch.ones(2))})
    space = ParameterSpace.of(model)
    assert space.size == 3
    assert sorted(space.vector(model).tolist()) == [1.0, 1.0, 2.0]
    assert [part.shape for part in space.split(torch.zeros(3))] == [model[name].shape for name in space.names]


def test_a_tied_parameter_counts_once(make_model):
    model = make_model(lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    model[1].weight = model[0].weight
    assert ParameterSpace.of(model).names == ("0.weight", "0.bias", "1.bias")


@pytest.mark.parametrize("name", ["module.a.weight", "_orig_mod.a.weight", "module._orig_mod.a.weight", "a.weight"])
def test_wrappers_do_not_rename_parameters(name):
    assert canonical_name(name) == "a.weight"


def test_a_compiled_part_keeps_its_name():
    assert canonical_name("backbone._orig_mod.conv.weight") == "backbone.conv.weight"


def test_a_wrapped_model_is_read_through_the_space_of_the_bare_one(net):
    space = ParameterSpace.of(net)
    assert torch.equal(space.vector(Wrapped(net)), space.vector(net))
    assert ParameterSpace.of(Wrapped(net)) == space


def test_a_grown_model_is_cut_to_what_it_was_and_new_parameters_are_not_read(make_model):
    old = make_model(lambda: nn.Sequential(nn.Linear(3, 2)))
    grown = make_model(lambda: nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5)), seed=1)
    weight, bias = ParameterSpace.of(old).tensors(grown)
    assert torch.equal(weight, grown[0].weight[:2])
    assert torch.equal(bias, grown[0].bias[:2])


def test_the_gradient_reaches_only_the_rows_that_were_there(make_model):
    grown = make_model(lambda: nn.Linear(3, 5))
    space = space_of(weight=(2, 3), bias=(2,))
    sum(t.sum() for t in space.tensors(grown)).backward()
    assert torch.equal(grown.weight.grad, torch.tensor([1.0, 1, 0, 0, 0]).double()[:, None].expand(5, 3))


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float16, torch.float32), (torch.bfloat16, torch.float32)])
def test_half_precision_is_read_in_single_precision(dtype, expected, net):
    assert ParameterSpace.of(net).vector(net.to(dtype)).dtype == expected


def test_union_takes_the_larger_of_each_shape_in_the_order_of_the_first():
    a, b = space_of(w=(2, 3), only_a=(1,)), space_of(only_b=(2,), w=(4, 3))
    assert a.union(b) == space_of(w=(4, 3), only_a=(1,), only_b=(2,))
    assert b.union(a) == space_of(only_b=(2,), w=(4, 3), only_a=(1,))
    assert a.union(a) == a


def test_positions_on_paper():
    outer = space_of(bias=(3,), weight=(3, 2), new=(2,))
    #        bias: 0 1 2 | weight: 3 4 / 5 6 / 7 8 | new: 9 10
    assert outer.positions(space_of(weight=(2, 2), bias=(2,))).tolist() == [3, 4, 5, 6, 0, 1]
    assert outer.positions(space_of(weight=(3, 1))).tolist() == [3, 5, 7]
    assert outer.positions(space_of(new=(2,))).tolist() == [9, 10]
    assert outer.positions(outer).tolist() == list(range(11))


def test_positions_in_three_axes():
    outer = torch.arange(24).view(2, 3, 4)
    assert space_of(w=(2, 3, 4)).positions(space_of(w=(1, 2, 3))).tolist() == outer[:1, :2, :3].reshape(-1).tolist()


def test_positions_read_the_coordinates_of_the_inner_space(make_model):
    grown = make_model(lambda: nn.Linear(3, 5))
    inner, outer = space_of(weight=(2, 3), bias=(2,)), ParameterSpace.of(grown)
    assert torch.equal(outer.vector(grown)[outer.positions(inner)], inner.vector(grown))


def test_a_model_without_trainable_parameters_has_no_space(net):
    with pytest.raises(ValueError, match=r"Sequential has no trainable parameter.*Set requires_grad=True"):
        ParameterSpace.of(net.requires_grad_(False))


def test_parameters_without_values_are_named_with_the_remedy():
    batches = [(torch.ones(4, 3), torch.zeros(4).long())]
    for model, remedy in (
        (nn.Sequential(nn.LazyLinear(2)), r"Parameter '0.weight' has no shape yet. Pass a batch"),
        (nn.Sequential(nn.Linear(3, 2, device="meta")), r"Parameter '0.weight' is on the device meta.*to_empty"),
    ):
        with pytest.raises(ValueError, match=remedy):
            EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), batches)
        with pytest.raises(ValueError, match=remedy):
            frozen_copy(model)


def test_a_parameter_that_went_missing_is_named(net):
    with pytest.raises(ValueError, match=r"Parameter '2.weight'.*not in the model any more.*keep their names"):
        ParameterSpace.of(net).vector(net[:1])


@pytest.mark.parametrize("shape", [(1, 3), (2, 2), (2, 3, 1), (6,)])
def test_a_parameter_that_shrank_or_changed_its_axes_is_named(shape):
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(shape))})
    with pytest.raises(ValueError, match=r"'w' had shape \(2, 3\) at the anchor.*grow by appending.*estimate"):
        space_of(w=(2, 3)).vector(model)
