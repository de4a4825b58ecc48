from collections import Counter

import pytest
import torch
import torchvision
from torch import nn

from avalanche_curv.plasticity.roles import ScaleRole, ShiftRole, WeightRole, parameter_roles, weight_matrices


def counted(model):
    found = parameter_roles(model)
    return Counter(type(role) for role in found.values()), found


def test_every_parameter_of_a_residual_network_has_a_role():
    model = torchvision.models.resnet18(num_classes=10)
    counts, found = counted(model)
    assert counts == {WeightRole: 21, ShiftRole: 21, ScaleRole: 20}  # 20 convolutions and a head; 20 norms
    assert len(found) == len(list(model.parameters()))


def test_every_parameter_of_a_vision_transformer_has_a_role():
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32)
    counts, found = counted(model)
    # patches, head, and of each block in_proj, out_proj and two of the MLP; five norms; token and position are shifts
    assert counts == {WeightRole: 2 + 2 * 4, ShiftRole: (2 + 2 * 4) + 5 + 2, ScaleRole: 5}
    assert found[model.class_token] == found[model.encoder.pos_embedding] == ShiftRole()
    assert len(found) == len(list(model.parameters()))
    assert sum("[" in name for name in weight_matrices(model)) == 2 * 3


@pytest.mark.parametrize(("make", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1), (nn.LSTMCell, 4), (nn.GRUCell, 3)])
def test_gates_of_recurrent_layers_are_matrices_of_their_own(make, gates):
    model = make(5, 7)
    assert {tuple(matrix.shape) for matrix in weight_matrices(model).values()} == {(7, 5), (7, 7)}
    assert len(weight_matrices(model)) == 2 * gates
    assert {role.blocks for role in parameter_roles(model).values()} == {gates}


def test_a_transposed_convolution_puts_its_outputs_first():
    layer = nn.ConvTranspose2d(3, 5, 2)
    expected = layer.weight.detach().permute(1, 0, 2, 3).reshape(5, 12)
    assert torch.equal(weight_matrices(layer)["weight"], expected)


def test_wrappers_do_not_show_in_names():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    wrapped = nn.DataParallel(model)
    assert weight_matrices(wrapped).keys() == weight_matrices(model).keys()


NAMES = {
    WeightRole(): ("token_mixing", "decomposition", "embedding_proj", "unbias"),
    ShiftRole(): ("pos_encoding", "rel_pos_h", "pos_embed_x", "cls_token", "pos_embed", "relative_position_bias_table",
                  "bias_k"),
}  # fmt: skip


@pytest.mark.parametrize(("role", "name"), [(role, name) for role, names in NAMES.items() for name in names])
def test_custom_parameters_are_known_by_whole_parts_of_their_names(name, role):
    module = nn.Module()
    module.register_parameter(name, nn.Parameter(torch.randn(8, 8)))
    assert list(parameter_roles(module).values()) == [role]


def test_a_computed_weight_is_seen_as_it_is_and_left_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)),
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = weight_matrices(model)
    assert list(found) == ["0.weight", "1.weight"]
    assert torch.equal(found["0.weight"], model[0].weight)
    assert float(torch.linalg.svdvals(found["1.weight"])[0]) == pytest.approx(1, abs=1e-3)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
