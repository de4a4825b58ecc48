"""Exact diagonals of every kind of layer, against explicit loops over examples and outputs."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torchvision.models import VisionTransformer, resnet18

from avalanche_curv import (
    GGN,
    Dense,
    Diagonal,
    EmpiricalFisher,
    EmpiricalRisk,
    Fisher,
    Kronecker,
    LowRank,
    Rank,
    estimate,
)
from avalanche_curv.core.per_example import layer_kinds
from avalanche_curv.core.per_example import passes as pieces
from avalanche_curv.core.per_example.layers import Layers

EXAMPLES, BATCH, CLASSES = 7, 4, 3  # 4 + 3: a ragged last batch
CRITERIA = {"cross_entropy": nn.CrossEntropyLoss(), "mean_square": nn.MSELoss()}
KINDS = [EmpiricalFisher(), Fisher(), Fisher(samples=2, seed=1), GGN()]


def before(head, *layers):
    """Layers, a nonlinearity that keeps all of them in play, and a head for so many features."""
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(head, CLASSES))


def remembering(norm):
    """Running statistics other than 0 and 1, an affine map other than the identity."""
    count = norm.num_features
    norm.running_mean, norm.running_var = torch.linspace(-0.5, 0.5, count), torch.linspace(0.5, 2, count)
    return moved(norm)


def moved(norm):
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return norm


class Words(nn.Module):
    """Seven words, of which the first is padding; sentences of four with repetitions."""

    def __init__(self, **options):
        super().__init__()
        self.words, self.head = nn.Embedding(7, 3, **options), nn.Linear(3, CLASSES)
        nn.init.normal_(self.words.weight)

    def forward(self, index):
        return self.head(self.words(index.long().remainder(7)).tanh().mean(1))


class Folded(nn.Module):
    """Tokens become examples: [N·T, in]."""

    def __init__(self):
        super().__init__()
        self.mix, self.norm, self.head = nn.Linear(2, 4), moved(nn.LayerNorm(4)), nn.Linear(12, CLASSES)

    def forward(self, inputs):
        tokens = self.norm(self.mix(inputs.flatten(0, 1))).tanh()
        return self.head(tokens.view(len(inputs), -1))


class SequenceFirst(nn.Module):
    """Examples lie on axis 1 of what the layers see."""

    def __init__(self, fold=False):
        super().__init__()
        self.fold = fold
        self.mix, self.norm, self.head = nn.Linear(2, 4), moved(nn.LayerNorm(4)), nn.Linear(4, CLASSES)

    def forward(self, inputs):
        tokens = inputs.transpose(0, 1)
        shape = tokens.shape[:2]
        tokens = tokens.flatten(0, 1) if self.fold else tokens
        mixed = self.norm(self.mix(tokens)).tanh()
        return self.head(mixed.view(*shape, 4).mean(0))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, inputs):
        return self.head(self.shared(self.shared(inputs).tanh()))


class ConvolvedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.norm = nn.Conv1d(2, 2, 3, padding=1), moved(nn.GroupNorm(1, 2))
        self.head = nn.Linear(10, CLASSES)

    def forward(self, inputs):
        for _ in range(2):
            inputs = self.norm(self.shared(inputs)).tanh()
        return self.head(inputs.flatten(1))


class Tied(nn.Module):
    """Words in and words out share one table."""

    def __init__(self):
        super().__init__()
        self.words, self.mix = nn.Embedding(5, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 5, bias=True)
        self.out.weight = self.words.weight
        self.head = nn.Linear(5, CLASSES)

    def forward(self, index):
        return self.head(self.out(self.mix(self.words(index.long().remainder(5)).mean(1)).tanh()))


class Conv1D(nn.Module):
    """The linear layer of GPT-2: x W + b with W [in, out]."""

    def __init__(self, out, inputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, out)), nn.Parameter(torch.randn(out))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Positions(nn.Module):
    """Words in and words out share one table; to each word its position is added, which is the same in all examples."""

    def __init__(self, index, place):
        super().__init__()
        self.index, self.place = index, place
        self.words, self.places, self.mix = nn.Embedding(5, 4), nn.Embedding(3, 4), Conv1D(4, 4)
        self.out = nn.Linear(4, 5, bias=True)
        self.out.weight = self.words.weight
        self.head = nn.Linear(5, CLASSES)

    def forward(self, index):
        x = self.words(index.long().remainder(5)) + self.place(self.places(self.index))
        return self.head(self.out(self.mix(x).tanh()).tanh().mean(1))


def positions(*axes, place=lambda x: x):
    return lambda: Positions(torch.arange(3).view(*axes, 3), place)


class Attention(nn.Module):
    """One head, with layers of its own for q, k and v: no output depends on the bias of k."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return (self.q(x) @ self.k(x).mT).softmax(2) @ self.v(x)


class Beside(nn.Module):
    """The weight of a layer is used beside the layer, and another layer is never called."""

    def __init__(self):
        super().__init__()
        self.body, self.unused, self.head = nn.Linear(4, 4), nn.Linear(3, 2), nn.Linear(4, CLASSES)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, inputs):
        return self.head((self.scale * self.body(inputs) + linear(inputs, self.body.weight)).tanh())


class Named(nn.Module):
    """A layer called by keyword, whose output is overwritten."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, inputs):
        return self.head(self.body(input=inputs).tanh_())


def frozen(*names):
    def make():
        model = before(6, nn.Conv1d(2, 3, 2, stride=2), moved(nn.GroupNorm(3, 3)))
        for name in names:
            model.get_parameter(name).requires_grad_(False)
        return model

    return make


def vision_transformer():
    model = VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12, num_classes=CLASSES
    )
    for parameter in (model.class_token, *model.heads.parameters()):
        nn.init.normal_(parameter, std=0.5)  # zero at first
    return model


def encoder_layer():
    return nn.Sequential(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), nn.Flatten(), nn.Linear(12, CLASSES))


MIXED = "mix.weight", "mix.bias", "norm.weight", "norm.bias"

# name: (model, shape of one example, the parameters that no layer explains)
MODELS = {
    "conv1d": (lambda: before(6, nn.Conv1d(2, 3, 2, stride=2)), (2, 5), ()),
    "strided and padded": (lambda: before(27, nn.Conv2d(2, 3, (3, 2), stride=(2, 3), padding=(1, 2))), (2, 5, 4), ()),
    "same padding, dilated": (lambda: before(60, nn.Conv2d(2, 3, (3, 2), padding="same", dilation=2)), (2, 5, 4), ()),
    "grouped": (lambda: before(24, nn.Conv2d(4, 6, 2, groups=2)), (4, 3, 3), ()),
    "depthwise": (lambda: before(16, nn.Conv2d(2, 4, 2, groups=2, bias=False)), (2, 3, 3), ()),
    "circular": (lambda: before(48, nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular")), (2, 4, 2), ()),
    "reflected": (lambda: before(48, nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")), (2, 4, 4), ()),
    "replicated, same": (lambda: before(15, nn.Conv1d(2, 3, 4, padding="same", padding_mode="replicate")), (2, 5), ()),
    "conv3d": (lambda: before(24, nn.Conv3d(2, 3, 2, padding=(0, 1, 0))), (2, 2, 3, 3), ()),
    "transposed": (lambda: before(12, nn.ConvTranspose1d(2, 3, 2)), (2, 3), ("0.weight", "0.bias")),
    "batch norm": (lambda: before(12, nn.Conv2d(2, 3, 2), remembering(nn.BatchNorm2d(3))), (2, 3, 3), ()),
    "batch norm of features": (lambda: before(3, nn.Linear(4, 3), remembering(nn.BatchNorm1d(3))), (4,), ()),
    "group norm": (lambda: before(16, nn.Conv2d(2, 4, 2), moved(nn.GroupNorm(2, 4))), (2, 3, 3), ()),
    "group norm of features": (lambda: before(4, nn.Linear(4, 4), moved(nn.GroupNorm(2, 4))), (4,), ()),
    "instance norm": (
        lambda: before(12, nn.Conv2d(2, 3, 2), moved(nn.InstanceNorm2d(3, affine=True))), (2, 3, 3), ()
    ),
    "layer norm of tokens": (lambda: before(12, nn.Linear(2, 4), moved(nn.LayerNorm(4))), (3, 2), ()),
    "layer norm of images": (
        lambda: before(12, nn.Conv2d(2, 3, 2), moved(nn.LayerNorm((3, 2, 2)))), (2, 3, 3), ()
    ),
    "layer norm without bias": (lambda: before(4, moved(nn.LayerNorm(4, bias=False))), (4,), ()),
    "rms norm": (lambda: before(12, nn.Linear(2, 4), moved(nn.RMSNorm(4))), (3, 2), ()),
    "words": (Words, (4,), ()),
    "words with padding": (lambda: Words(padding_idx=0), (4,), ()),
    "words scaled by frequency": (lambda: Words(scale_grad_by_freq=True), (4,), ()),
    "tokens": (lambda: before(12, nn.Linear(2, 4)), (3, 2), ()),
    "tokens on two axes": (lambda: before(24, nn.Linear(2, 4, bias=False)), (3, 2, 2), ()),
    "folded tokens": (Folded, (3, 2), ()),
    "sequence first": (SequenceFirst, (6, 2), MIXED),
    "folded sequence first": (lambda: SequenceFirst(True), (6, 2), MIXED),
    "called twice": (Twice, (4,), ()),
    "convolved twice": (ConvolvedTwice, (2, 5), ()),
    "tied": (Tied, (3,), ()),
    "transposed linear": (lambda: before(12, Conv1D(4, 2)), (3, 2), ()),
    "transposed linear on matrices": (lambda: before(3, Conv1D(3, 2)), (2,), ()),
    "positions": (positions(), (3,), ()),
    "positions on one row": (positions(1), (3,), ()),
    "positions along the first axis": (positions(place=lambda x: x.sum(0)), (3,), ("places.weight",)),
    "positions by a place of their own": (positions(place=lambda x: x[[2, 1, 0]]), (3,), ("places.weight",)),
    "attention": (lambda: before(12, Attention()), (3, 4), ()),
    "beside a layer": (Beside, (4,), ("scale", "body.weight", "body.bias")),
    "called by keyword": (Named, (4,), ()),
    "frozen weight": (frozen("0.weight", "1.bias"), (2, 4), ()),
    "frozen layer": (frozen("0.weight", "0.bias"), (2, 4), ()),
    "encoder": (encoder_layer, (3, 4), ("0.self_attn.in_proj_weight", "0.self_attn.in_proj_bias",
                                        "0.self_attn.out_proj.weight", "0.self_attn.out_proj.bias")),
    "vision transformer": (vision_transformer, (3, 8, 8), (
        "class_token", "encoder.pos_embedding",
        *(f"encoder.layers.encoder_layer_{i}.self_attention.{name}" for i in (0, 1)
          for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")),
    )),
}  # fmt: skip


def data_for(shape, criterion, seed=0, examples=EXAMPLES):
    generator = torch.Generator().manual_seed(seed)
    inputs = 2 * torch.randn(examples, *shape, generator=generator, dtype=torch.float64)
    if isinstance(criterion, nn.CrossEntropyLoss):
        return inputs, torch.randint(CLASSES, (examples,), generator=generator)
    return inputs, torch.randn(examples, CLASSES, generator=generator, dtype=torch.float64)


def risk_of(model, criterion, inputs, targets, batch=BATCH):
    return EmpiricalRisk.snapshot(model, criterion, list(zip(inputs.split(batch), targets.split(batch))))


def jacobian(model, x):
    """∂f/∂θ [C, P] of one example, an output at a time."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.enable_grad():
        outputs = model(x[None]).reshape(-1)
    rows = []
    for output in outputs:
        parts = torch.autograd.grad(output, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return outputs.detach(), torch.stack(rows)


def output_matrix(kind, f, y, draws):
    """E[∇_f ℓ ∇_f ℓᵀ] or ∇²_f ℓ of one example, as on paper."""
    if isinstance(kind, Fisher) and kind.samples:
        # Gaussian noise of variance C/2 times the slope 2/C, or p minus one-hot
        g = draws * (2 / CLASSES) ** 0.5 if y.ndim else f.softmax(0)[:, None] - draws
        return g @ g.T / kind.samples
    if isinstance(kind, EmpiricalFisher):
        g = 2 / CLASSES * (f - y) if y.ndim else f.softmax(0) - nn.functional.one_hot(y, CLASSES)
        return torch.outer(g, g)
    if y.ndim:
        return 2 / CLASSES * torch.eye(CLASSES).double()
    return f.softmax(0).diag() - torch.outer(f.softmax(0), f.softmax(0))


def own_labels(kind, outputs, targets):
    """[N, C, m]: one-hot labels of the model, or standard normal noise, from the draws in the order of examples."""
    uniform = torch.rand(len(outputs), kind.samples, CLASSES, generator=kind.generator(), dtype=torch.float64)
    if targets.ndim == 2:
        return torch.special.ndtri(uniform).mT
    below = outputs.softmax(1).cumsum(1)[:, None] <= uniform[:, :, :1]
    return nn.functional.one_hot(below.sum(2).clamp_max(CLASSES - 1), CLASSES).double().mT


def diagonals(model, inputs, targets):
    """For each kind, (1/N) Σ_i diag(J_iᵀ M_i J_i)."""
    pairs = [jacobian(model, x) for x in inputs]
    outputs = torch.stack([f for f, _ in pairs])
    totals = {}
    for kind in KINDS:
        draws = own_labels(kind, outputs, targets) if getattr(kind, "samples", None) else [None] * len(outputs)
        parts = [
            torch.einsum("cp,cd,dp->p", j, output_matrix(kind, f, y, some), j)
            for (f, j), y, some in zip(pairs, targets, draws)
        ]
        totals[kind] = torch.stack(parts).mean(0)
    return totals


@pytest.mark.parametrize(
    ("name", "criterion"),
    [*((name, "cross_entropy") for name in MODELS), ("words", "mean_square"), ("tied", "mean_square")],
)
def test_diagonals_are_sums_of_squares_over_examples(name, criterion, make_model, close):
    constructor, shape, _ = MODELS[name]
    model = make_model(constructor).eval()
    inputs, targets = data_for(shape, CRITERIA[criterion])
    risk = risk_of(model, CRITERIA[criterion], inputs, targets)
    if isinstance(getattr(model, "words", None), nn.Embedding):
        model.words.scale_grad_by_freq = False  # what it gives then is no derivative of the loss
    for kind, expected in diagonals(model, inputs, targets).items():
        assert expected.abs().max() > 1e-6
        close(estimate(kind, Diagonal(), risk).curvature.values, expected)


@pytest.mark.parametrize("name", MODELS)
def test_only_parameters_outside_known_layers_are_left_to_plain_differentiation(name, make_model):
    constructor, shape, rest = MODELS[name]
    criterion = CRITERIA["cross_entropy"]
    risk = risk_of(make_model(constructor), criterion, *data_for(shape, criterion))
    assert Layers.of(risk).rest == rest


@pytest.mark.parametrize(
    "name", ["tokens", "grouped", "group norm", "words with padding", "conv1d", "folded tokens", "positions"]
)
def test_results_do_not_depend_on_how_many_examples_are_worked_on_at_once(name, make_model, close, monkeypatch):
    constructor, shape, _ = MODELS[name]
    model, criterion = make_model(constructor).eval(), CRITERIA["cross_entropy"]
    inputs, targets = data_for(shape, criterion)
    expected = diagonals(model, inputs, targets)
    for module, attribute, value in (
        (layer_kinds, "CACHED", 1), (layer_kinds, "CACHED", 50), (pieces, "CHUNK", 3), (pieces, "CHUNK_BYTES", 1),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, attribute, value)
            for batch in (2, EXAMPLES):
                risk = risk_of(model, criterion, inputs, targets, batch)
                for kind in KINDS:
                    close(estimate(kind, Diagonal(), risk).curvature.values, expected[kind])


@pytest.mark.parametrize("structure", [Diagonal(), Kronecker(), LowRank(Rank(3))])
@pytest.mark.parametrize("name", ["strided and padded", "words", "tied", "vision transformer"])
def test_the_model_its_gradients_and_its_hooks_are_left_as_they_were(name, structure, make_model):
    constructor, shape, _ = MODELS[name]
    model, criterion = make_model(constructor).train(), CRITERIA["cross_entropy"]
    before_ = {key: value.clone() for key, value in model.state_dict().items()}
    risk = risk_of(model, criterion, *data_for(shape, criterion))
    estimate(EmpiricalFisher(), structure, risk)
    assert all(torch.equal(value, before_[key]) for key, value in model.state_dict().items())
    for module in (*model.modules(), *risk.base.modules()):
        assert not module._forward_hooks
        assert all(p.grad is None for p in module.parameters())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("batch", [1, 2, EXAMPLES])
@pytest.mark.parametrize("name", ["sequence first", "folded sequence first", "batch norm", "folded tokens"])
def test_a_first_batch_of_any_size_shows_which_axis_holds_the_examples(name, batch, make_model, close):
    """One example alone does not: six steps of six examples look like six examples of six steps."""
    constructor, shape, _ = MODELS[name]
    model, criterion = make_model(constructor).eval(), CRITERIA["cross_entropy"]
    inputs, targets = data_for(shape, criterion, examples=6)
    risk = risk_of(model, criterion, inputs, targets, batch)
    close(estimate(GGN(), Diagonal(), risk).curvature.values, diagonals(model, inputs, targets)[GGN()])


@pytest.mark.parametrize("name", ["tokens", "sequence first", "batch norm", "words with padding"])
def test_one_example_is_enough(name, make_model, close):
    constructor, shape, _ = MODELS[name]
    model, criterion = make_model(constructor).eval(), CRITERIA["mean_square"]
    inputs, targets = data_for(shape, criterion, examples=1)
    risk = risk_of(model, criterion, inputs, targets)
    close(estimate(GGN(), Diagonal(), risk).curvature.values, diagonals(model, inputs, targets)[GGN()])


class Recurrent(nn.Module):
    """Calls its cell once for each step, and its table of positions with one row for each."""

    def __init__(self):
        super().__init__()
        self.cell, self.places, self.head = nn.Linear(3, 3), nn.Embedding(4, 3), nn.Linear(3, CLASSES)

    def forward(self, x):
        x = x + self.places(torch.arange(x.shape[1]))
        state = 0
        for step in x.unbind(1):
            state = self.cell(step + state).tanh()
        return self.head(state)


def test_a_layer_that_is_called_otherwise_for_later_examples_falls_out_then(make_model, close):
    model, criterion = make_model(Recurrent).eval(), CRITERIA["cross_entropy"]
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(3, steps, 3, generator=generator, dtype=torch.float64), torch.arange(3)) for steps in (4, 1, 2)
    ]
    risk = EmpiricalRisk.snapshot(model, criterion, batches)
    assert Layers.of(risk).rest == ()
    expected = torch.stack([diagonals(model, *batch)[GGN()] for batch in batches]).mean(0)
    close(estimate(GGN(), Diagonal(), risk).curvature.values, expected)
    assert Layers.of(risk).rest == ("cell.weight", "cell.bias")


@pytest.mark.parametrize("name", ["positions", "called twice", "transposed linear"])
@pytest.mark.parametrize("structure", [Dense(), LowRank(Rank(100))], ids=str)
def test_rows_of_tied_layers_are_sums_over_their_calls(name, structure, make_model, close):
    constructor, shape, _ = MODELS[name]
    model, criterion = make_model(constructor).eval(), CRITERIA["mean_square"]
    inputs, targets = data_for(shape, criterion, examples=5)
    expected = torch.stack([2 / CLASSES * j.T @ j for _, j in (jacobian(model, x) for x in inputs)]).mean(0)
    close(estimate(GGN(), structure, risk_of(model, criterion, inputs, targets)).curvature.dense(), expected)


def first_stages():
    """ResNet-18 without its stages of 256 and 512 channels, which are as the one before."""
    model = resnet18()
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, CLASSES)
    return model


def test_a_residual_network_is_explained_by_its_layers_alone(make_model, close):
    model, criterion = make_model(first_stages).eval(), CRITERIA["cross_entropy"]
    inputs, targets = data_for((3, 32, 32), criterion, examples=3)
    risk = risk_of(model, criterion, inputs, targets, 2)
    assert Layers.of(risk).rest == ()
    for kind, expected in diagonals(model, inputs, targets).items():
        close(estimate(kind, Diagonal(), risk).curvature.values, expected)
