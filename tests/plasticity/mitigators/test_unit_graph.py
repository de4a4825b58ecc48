import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from avalanche_curv.plasticity.mitigators.unit_graph import HiddenLayer, UnitGraph


def readers(model):
    return {layer.name: layer.readers for layer in UnitGraph.of(model).hidden}


def test_units_are_followed_through_activations_pooling_norms_and_flattening():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.GELU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 8), nn.LayerNorm(8), nn.Tanh(), nn.Dropout(),
        nn.Linear(8, 3),
    )  # fmt: skip
    graph = UnitGraph.of(model)
    assert graph.hidden == (
        HiddenLayer("0", ("4",), ("1",), batched=True), HiddenLayer("4", ("8",)), HiddenLayer("8", ("12",), ("9",)),
    )  # fmt: skip
    assert graph.others == {"12": "its units are outputs of the model"}


@pytest.mark.parametrize("flatten", [
    lambda x: x.flatten(1), lambda x: torch.flatten(x, 1), lambda x: x.view(x.size(0), -1),
    lambda x: x.reshape(x.shape[0], -1),
])  # fmt: skip
def test_functions_and_methods_are_followed_as_modules_are(flatten, written):
    def forward(self, x):
        return self.b(flatten(F.max_pool2d(F.dropout(F.relu(self.a(x)), training=self.training), 2)))

    model = written(forward, a=nn.Conv2d(1, 4, 3), b=nn.Linear(16, 3))
    assert readers(model) == {"a": ("b",)}


@pytest.mark.parametrize("other", [
    lambda x: x.flatten(2), lambda x: torch.flatten(x, 0), lambda x: x.view(-1, 16), lambda x: x, lambda x: x.mean(2),
    lambda x: x.reshape(x.size(0) * 4, -1).relu(),
])  # fmt: skip
def test_a_linear_layer_that_regroups_channels_reads_no_units(other, written):
    def forward(self, x):
        return self.b(other(self.a(x).relu()))

    graph = UnitGraph.of(written(forward, a=nn.Conv2d(1, 4, 3), b=nn.Linear(16, 3)))
    assert not graph.hidden
    assert "regroups" in graph.others["a"] or "go into" in graph.others["a"]


def test_a_unit_may_have_several_readers(written):
    model = written(lambda self, x: (lambda h: self.b(h) + self.c(h))(self.a(x).relu()),
                    a=nn.Linear(4, 5), b=nn.Linear(5, 2), c=nn.Linear(5, 2))  # fmt: skip
    assert readers(model) == {"a": ("b", "c")}


def shared():
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    return nn.Sequential(a, nn.ReLU(), b, nn.ReLU(), nn.Linear(4, 2))


def two_through(first, second, x, written):
    """a and b with a norm layer each, which may be the same, both read by c."""
    model = written(lambda self, x: self.c(self.n(self.a(x)).relu()) + self.d(self.m(self.b(x)).relu()),
                    a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 2), d=nn.Linear(4, 2),
                    n=first, m=second)  # fmt: skip
    model(x)
    return UnitGraph.of(model)


def test_norm_layers_that_serve_two_layers_or_share_their_scale_are_no_units_own(written):
    x, norm, other = torch.randn(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    assert [layer.norms for layer in two_through(norm, other, x, written).hidden] == [("n",), ("m",)]
    called_twice = two_through(norm, norm, x, written)
    assert not called_twice.hidden
    assert called_twice.others["a"] == "the norm layer 'n' on its way is called several times"
    other.weight = norm.weight
    assert two_through(norm, other, x, written).others["b"] == "a weight on its way is shared"


@pytest.mark.parametrize(("norm", "batched"), [
    (nn.BatchNorm1d(4), True), (nn.GroupNorm(2, 4), True), (nn.LayerNorm(4), False), (nn.RMSNorm(4), False),
])  # fmt: skip
def test_batch_and_group_norms_know_units_in_batches_only(norm, batched):
    graph = UnitGraph.of(nn.Sequential(nn.Linear(4, 4), norm, nn.ReLU(), nn.Linear(4, 2)))
    assert graph.hidden == (HiddenLayer("0", ("3",), ("1",), batched),)


def test_an_instance_norm_behind_a_linear_layer_knows_no_units():
    graph = UnitGraph.of(nn.Sequential(nn.Linear(4, 4), nn.InstanceNorm1d(4, affine=True), nn.Linear(4, 2)))
    assert graph.others["0"] == "its units go into '1'"
    images = UnitGraph.of(nn.Sequential(nn.Conv1d(4, 4, 1), nn.InstanceNorm1d(4, affine=True), nn.Conv1d(4, 2, 1)))
    assert images.hidden == (HiddenLayer("0", ("2",), ("1",), batched=True),)


def test_a_weight_that_is_read_outside_of_its_layer_or_a_shared_bias_is_left_out(written):
    tied = written(lambda self, x: F.linear(self.b(self.a(x).relu()), self.a.weight), a=nn.Linear(4, 4),
                   b=nn.Linear(4, 4))  # fmt: skip
    assert "shared" in UnitGraph.of(tied).others["a"]
    biases = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    biases[0].bias = biases[2].bias
    assert "shared" in UnitGraph.of(biases).others["0"]


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_layers_without_units_are_left_out():
    graph = UnitGraph.of(nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3), nn.ReLU(), nn.Linear(3, 2)))
    assert graph.hidden == ()
    assert graph.others["0"] == graph.others["1"] == "it has no weights"


class Branching(nn.Module):
    """Control flow on values, which torch.fx cannot follow."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x) if x.sum() > 0 else x


LINEAR = {"a": lambda: nn.Linear(4, 4), "b": lambda: nn.Linear(4, 4), "c": lambda: nn.Linear(4, 2)}
LEFT = {
    "addition": (lambda self, x: self.c((lambda h: h + self.b(h).relu())(self.a(x).relu())), "'add'"),
    "softmax": (lambda self, x: self.c(self.b(x).relu()) + self.c(self.a(x).softmax(1)), "'softmax'"),
    "attribute": (lambda self, x: self.c(self.b(x)) + self.a(x).T.sum(), "'T'"),
    "twice": (lambda self, x: self.c(self.b(self.a(self.a(x)))), "called several times"),
    "reader twice": (lambda self, x: self.c(self.b(self.b(self.a(x)))), "'b' is called several times"),
    "unused": (lambda self, x: (self.a(x), self.c(self.b(x)))[1], "nothing reads"),
}


@pytest.mark.parametrize("way", LEFT)
def test_layers_whose_units_go_another_way_are_left_out_with_the_reason(way, written):
    forward, reason = LEFT[way]
    graph = UnitGraph.of(written(forward, **{name: layer() for name, layer in LINEAR.items()}))
    assert reason in graph.others["a"]


def test_shared_weights_grouped_readers_and_transposed_convolutions_are_left_out():
    assert "shared" in UnitGraph.of(shared()).others["0"]
    grouped = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 1, 1))
    assert readers(grouped) == {"2": ("4",)}
    transposed = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3))
    assert "transposed" in UnitGraph.of(transposed).others["0"]
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2))
    assert "computed from other parameters" in UnitGraph.of(normed).others["0"]


def test_a_part_that_cannot_be_traced_is_taken_as_a_whole():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), Branching(), nn.Linear(4, 2))
    graph = UnitGraph.of(model)
    assert readers(model) == {"0": ("2",)}
    assert "'4'" in graph.others["2"]
    assert "no step that could be traced" in graph.others["4.inner"]


def test_a_model_that_cannot_be_traced_at_all_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"Branching cannot be traced .* Or move what depends on the values of inputs"):
        UnitGraph.of(Branching())


def test_tracing_leaves_model_and_randomness_as_they_were(written):
    model = written(lambda self, x: self.b(F.relu(self.a(x)) * torch.randn(4)), a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    attributes, state = {**model.__dict__}, torch.get_rng_state()
    UnitGraph.of(model)
    assert model.__dict__.keys() == attributes.keys()
    assert torch.equal(torch.get_rng_state(), state)


def test_names_are_those_inside_of_wrappers():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    assert UnitGraph.of(nn.DataParallel(copy.deepcopy(model))) == UnitGraph.of(model)


def test_known_architectures_have_the_hidden_layers_that_their_pictures_show():
    from torchvision.models import VisionTransformer, resnet18

    hidden = readers(resnet18())
    assert len(hidden) == 8  # the first convolution of each block; the others go into additions
    assert hidden["layer1.0.conv1"] == ("layer1.0.conv2",)
    vit = VisionTransformer(16, 8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12)
    assert readers(vit) == {f"encoder.layers.encoder_layer_{n}.mlp.0": (f"encoder.layers.encoder_layer_{n}.mlp.3",)
                            for n in range(2)}  # fmt: skip
