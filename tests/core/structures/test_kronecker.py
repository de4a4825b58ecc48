"""Kronecker factors on paper, what EKFAC corrects, what stays diagonal, sums and growth."""

import copy
import sys
import warnings
from dataclasses import dataclass, replace
from functools import reduce

import pytest
import torch
from curvlinops import KFACLinearOperator
from torch import Size, nn
from torch.nn.functional import unfold
from torchvision.models import VisionTransformer

from avalanche_curv import (
    EKFAC,
    GGN,
    BatchedEmpiricalFisher,
    Clip,
    Curvature,
    Dense,
    EmpiricalFisher,
    EmpiricalRisk,
    Energy,
    Fisher,
    FrobeniusOptimal,
    Hessian,
    KeepTerms,
    Kronecker,
    OutputCurvature,
    ParameterSpace,
    PartialTraces,
    PiWeighted,
    Rank,
    estimate,
    rule,
)
from avalanche_curv.core.losses.factor import as_factor
from avalanche_curv.core.per_example import layer_kinds
from avalanche_curv.core.per_example import passes as pieces
from avalanche_curv.core.structures import kronecker as rules
from avalanche_curv.core.structures.diagonal import DiagonalMatrix
from avalanche_curv.core.structures.kronecker_cut import LeadingPart, leading_part
from avalanche_curv.core.structures.kronecker_matrix import FactoredLayer, KroneckerMatrix
from avalanche_curv.core.structures.kronecker_terms import Corrected, Factors, without_rounding
from avalanche_curv.core.structures.rules import check_pair

EXAMPLES, BATCH, CLASSES = 7, 4, 3
CRITERIA = {"cross_entropy": nn.CrossEntropyLoss(), "mean_square": nn.MSELoss()}
KINDS = [EmpiricalFisher(), Fisher(), Fisher(samples=2, seed=1), GGN()]


def perceptron():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2, bias=False), nn.Tanh(), nn.Linear(2, CLASSES))


def convolutional():
    norm = nn.BatchNorm2d(2)
    norm.running_mean, norm.running_var = torch.tensor([0.3, -0.2]), torch.tensor([0.5, 2.0])
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    return nn.Sequential(
        nn.Conv2d(2, 2, 2, padding=1), norm, nn.Tanh(), nn.Conv2d(2, 3, (3, 2), stride=(1, 2), bias=False),
        nn.Tanh(), nn.Flatten(), nn.Linear(12, CLASSES),
    )  # fmt: skip


def tokens():
    return nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Tanh(), nn.Flatten(), nn.Linear(9, CLASSES))


SHAPES = {perceptron: (4,), convolutional: (2, 3, 4), tokens: (3, 2)}


@pytest.fixture(params=SHAPES, ids=lambda make: make.__name__)
def constructor(request):
    return request.param


@dataclass
class Case:
    model: nn.Module
    risk: EmpiricalRisk
    inputs: torch.Tensor
    targets: torch.Tensor

    def columns(self, kind):
        """S [N, C, R] of every example."""
        with torch.no_grad():
            outputs = self.model(self.inputs)
            return as_factor(kind.factor(self.risk.loss, outputs, self.targets, kind.generator())).tensor()


@pytest.fixture
def case(make_model):
    """case(constructor, criterion, ...): a model and a few examples of random targets."""

    def made(constructor, criterion="cross_entropy", examples=EXAMPLES, shape=None, batch=BATCH):
        generator = torch.Generator().manual_seed(0)
        model = make_model(constructor).eval()
        inputs = torch.randn(examples, *(shape or SHAPES[constructor]), generator=generator, dtype=torch.float64)
        if criterion == "cross_entropy":
            targets = torch.randint(CLASSES, (examples,), generator=generator)
        else:
            targets = torch.randn(examples, CLASSES, generator=generator, dtype=torch.float64)
        batches = list(zip(inputs.split(batch), targets.split(batch)))
        return Case(model, EmpiricalRisk.snapshot(model, CRITERIA[criterion], batches), inputs, targets)

    return made


def seen(layer, inputs):
    """What each position of a layer multiplies its weight with, [T, in], for one example."""
    if isinstance(layer, nn.Conv2d):
        return unfold(inputs, layer.kernel_size, padding=layer.padding, stride=layer.stride)[0].T
    return inputs.reshape(-1, layer.in_features)


def factors(layer, model, inputs, columns):
    """A = (1/NT) Σ a aᵀ and G = (1/N) Σ b bᵀ, an example and a column at a time."""
    a_sum, g_sum, kept = 0, 0, {}
    handle = layer.register_forward_hook(lambda _, args, out: kept.update(a=args[0].detach(), z=out))
    for x, s in zip(inputs, columns):
        with torch.enable_grad():
            f = model(x[None]).reshape(-1)
        a = seen(layer, kept["a"])
        if layer.bias is not None:
            a = torch.cat([a, torch.ones(len(a), 1).double()], dim=1)
        for column in s.T:
            (b,) = torch.autograd.grad(f, kept["z"], column, retain_graph=True)
            b = b[0].flatten(1).T if isinstance(layer, nn.Conv2d) else b.reshape(-1, layer.out_features)
            assert len(a) == len(b)
            g_sum = g_sum + b.T @ b
        a_sum = a_sum + a.T @ a / len(a)
    handle.remove()
    return a_sum / len(inputs), g_sum / len(inputs)


def factored(model):
    """The layers that have one weight matrix, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def coordinates(space, *names):
    """[out, in]: where the weight and the bias of one layer stand in the whole vector, the bias as the last column."""
    parts = dict(zip(space.names, space.split(torch.arange(space.size))))
    found = [parts[name].flatten(1) if parts[name].ndim > 1 else parts[name][:, None] for name in names]
    return torch.cat(found, dim=1).reshape(-1)


def blocks(case, matrix):
    """For each factored layer: its name, its coordinates, and its term."""
    for layer in matrix.layers:
        names = [name for name in (layer.weight, layer.bias) if name is not None]
        yield names[0].rpartition(".")[0], coordinates(case.risk.space, *names), layer.terms[0]


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_factors_are_those_of_loops_over_examples(kind, criterion, constructor, case, close):
    here = case(constructor, criterion)
    matrix = estimate(kind, Kronecker(), here.risk).curvature
    assert {name for name, _, _ in blocks(here, matrix)} == set(factored(here.model))
    for name, where, term in blocks(here, matrix):
        a, g = factors(factored(here.model)[name], here.model, here.inputs, here.columns(kind))
        close(term.a, a)
        close(term.g, g)
        close(matrix.dense()[where[:, None], where], torch.kron(g, a))


@pytest.mark.parametrize("structure", [Kronecker(), EKFAC()], ids=str)
@pytest.mark.parametrize("kind", [GGN(), Fisher(samples=2, seed=1)], ids=str)
def test_neither_batches_nor_pieces_matter(kind, structure, constructor, case, close, monkeypatch):
    expected = estimate(kind, structure, case(constructor).risk).curvature.dense()
    for module, attribute, value in (
        (layer_kinds, "CACHED", 1), (pieces, "CHUNK", 3), (pieces, "CHUNK_BYTES", 1), (rules, "BLOCK", 2)
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, attribute, value)
            close(estimate(kind, structure, case(constructor, batch=2).risk).curvature.dense(), expected, 1e-9)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("kind", "fisher_type"), [(GGN(), "type-2"), (EmpiricalFisher(), "empirical")])
def test_factors_agree_with_those_of_curvlinops(kind, fisher_type, criterion, case, close):
    """Conventions: `expand`, weight and bias together, mean over examples. For a mean square over C outputs, curvlinops
    3.0.1 takes the gradients of C independent losses, so that its empirical factors are C times those of the loss."""
    def images():
        return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(18, CLASSES))

    for constructor in (perceptron, images):
        here = case(constructor, criterion, shape=SHAPES.get(constructor, (2, 3, 4)))
        model, size = copy.deepcopy(here.model), here.risk.space.size
        operator = KFACLinearOperator(
            model, CRITERIA[criterion], list(model.parameters()), list(here.risk.batches), check_deterministic=False,
            fisher_type=fisher_type, kfac_approx="expand", separate_weight_and_bias=False,
        )  # fmt: skip
        theirs = operator @ torch.eye(size).double()
        factor = CLASSES if (fisher_type, criterion) == ("empirical", "mean_square") else 1
        close(factor * estimate(kind, Kronecker(), here.risk).curvature.dense(), theirs)


@pytest.mark.parametrize("structure", [Kronecker(), EKFAC()], ids=str)
def test_products_traces_and_tops_are_those_of_the_entries(structure, constructor, case, close):
    matrix = estimate(GGN(), structure, case(constructor).risk).curvature
    whole = matrix.dense()
    v = torch.linspace(-1, 1, matrix.size).double()
    close(whole, whole.T)
    close(matrix.product(v), whole @ v)
    assert matrix.trace() == pytest.approx(float(whole.trace()))
    values, vectors = matrix.top(5)
    exact = torch.linalg.eigvalsh(whole).flip(0)[:5]
    close(values, exact, 1e-8)
    close(vectors @ vectors.T, torch.eye(5).double(), 1e-8)
    close(whole @ vectors.T, vectors.T * values, 1e-8)


@pytest.mark.parametrize("structure", [Kronecker(), EKFAC()], ids=str)
def test_the_top_of_a_sum_is_that_of_its_entries(structure, case):
    one = estimate(GGN(), structure, case(perceptron).risk).curvature
    total = one.plus(estimate(EmpiricalFisher(), structure, case(perceptron, "mean_square").risk).curvature)
    values, _ = total.top(3)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(total.dense()).flip(0)[:3], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("structure", [Kronecker(), EKFAC()], ids=str)
def test_one_example_of_one_position_and_one_column_is_exact(structure, case, close):
    """b aᵀ is a Kronecker product itself."""
    here = case(perceptron, examples=1)
    exact = estimate(EmpiricalFisher(), Dense(), here.risk).curvature.dense()
    matrix = estimate(EmpiricalFisher(), structure, here.risk).curvature
    for _, where, _ in blocks(here, matrix):
        close(matrix.dense()[where[:, None], where], exact[where[:, None], where])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_linear_model_with_squared_error_is_exact(criterion, case, close):
    """There ∇²_f ℓ is the same for every example, so that A ⊗ G is no approximation."""
    here = case(lambda: nn.Linear(4, CLASSES), criterion, shape=(4,))
    exact = estimate(GGN(), Dense(), here.risk).curvature.dense()
    difference = estimate(GGN(), Kronecker(), here.risk).curvature.dense() - exact
    if criterion == "mean_square":
        close(difference, torch.zeros_like(exact))
    else:
        assert difference.norm() > 1e-3 * exact.norm()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_ekfac_has_the_exact_variances_along_the_eigenvectors_of_the_factors(kind, criterion, constructor, case, close):
    here = case(constructor, criterion)
    exact = estimate(kind, Dense(), here.risk).curvature.dense()
    plain, corrected = (estimate(kind, structure, here.risk).curvature for structure in (Kronecker(), EKFAC()))
    assert corrected.trace() == pytest.approx(float(exact.trace()))
    columns = here.columns(kind)
    for (name, where, term), (_, _, factor) in zip(blocks(here, corrected), blocks(here, plain)):
        own = exact[where[:, None], where]
        a, g = factors(factored(here.model)[name], here.model, here.inputs, columns)
        q = torch.kron(term.g, term.a)
        close(q @ q.T, torch.eye(len(q)).double())
        turned = q.T @ torch.kron(g, a) @ q
        close(turned, turned.diagonal().diag(), 1e-9)  # q diagonalises A ⊗ G
        found = corrected.dense()[where[:, None], where]
        close(found, q @ (q.T @ own @ q).diagonal().diag() @ q.T)
        assert (found - own).norm() <= (factor.dense() - own).norm() * (1 + 1e-9) + 1e-12


class Words(nn.Module):
    """Embedding, a layer called twice, a tied one, a grouped convolution, a bare tensor, and a head."""

    def __init__(self):
        super().__init__()
        self.words, self.norm, self.scale = nn.Embedding(5, 4), nn.LayerNorm(4), nn.Parameter(torch.tensor(1.5))
        self.twice, self.mix = nn.Linear(4, 4), nn.Conv1d(4, 4, 2, groups=2)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.head = nn.Linear(4, CLASSES)

    def forward(self, index):
        x = self.norm(self.words(index.long().remainder(5))).tanh()
        x = self.mix(self.twice(self.twice(x).tanh()).mT).mean(2)
        return self.head(self.scale * self.two(self.one(x).tanh()))


def vision_transformer():
    model = VisionTransformer(8, 4, 1, 2, 4, 6, num_classes=CLASSES)
    for parameter in (model.class_token, *model.heads.parameters()):
        nn.init.normal_(parameter, std=0.5)  # zero at first
    return model


def frozen():
    model = convolutional()
    for name in ("0.weight", "1.bias", "6.bias"):
        model.get_parameter(name).requires_grad_(False)
    return model


@pytest.mark.parametrize("structure", [Kronecker(), EKFAC()], ids=str)
@pytest.mark.parametrize("kind", [GGN(), EmpiricalFisher(), Fisher(samples=2, seed=1)], ids=str)
@pytest.mark.parametrize(
    ("other", "shape", "expected"),
    [
        (Words, (4,), {"head.weight"}),
        (vision_transformer, (3, 8, 8), {
            "conv_proj.weight", "encoder.layers.encoder_layer_0.mlp.0.weight",
            "encoder.layers.encoder_layer_0.mlp.3.weight", "heads.head.weight",
        }),
        (convolutional, (2, 3, 4), {"0.weight", "3.weight", "6.weight"}),
        (frozen, (2, 3, 4), {"0.bias", "3.weight", "6.weight"}),
    ],
)  # fmt: skip
def test_all_other_parameters_have_their_exact_diagonal(other, shape, expected, kind, structure, case, close):
    here = case(other, shape=shape)
    matrix = estimate(kind, structure, here.risk).curvature
    assert {layer.weight or layer.bias for layer in matrix.layers} == expected
    entries, exact = matrix.dense(), estimate(kind, Dense(), here.risk).curvature.dense()
    outside = torch.ones(len(exact), dtype=torch.bool)
    for _, where, _ in blocks(here, matrix):
        outside[where] = False
        block = entries[where[:, None], where]
        entries[where[:, None], where] = 0
        assert block.any()
    close(entries, (exact.diagonal() * outside).diag())
    assert (exact.diagonal() * outside).any()


def test_eigenvalues_that_are_rounding_alone_are_zero():
    """Of three examples a layer of 40 inputs has eigenvalues of 3 × 3 changes; the others are squares of rounding."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, CLASSES))
        batch = torch.randn(3, 40), torch.tensor([0, 1, 2])
    exact = [(batch[0].double(), batch[1])]
    found, wide = (
        estimate(EmpiricalFisher(), EKFAC(PartialTraces()), EmpiricalRisk.snapshot(one, nn.CrossEntropyLoss(), data))
        for one, data in ((model, [batch]), (copy.deepcopy(model).double(), exact))
    )
    moved = found + replace(found, anchor=found.anchor + 1)
    for one in (found, moved):
        for layer in one.curvature.layers:
            values = layer.terms[0].values
            assert values[values != 0].min() >= torch.finfo(torch.float32).eps ** 2 * values.max()
    torch.testing.assert_close(found.curvature.dense().double(), wide.curvature.dense(), rtol=1e-4, atol=1e-7)
    for undefined in (torch.nan, torch.inf):
        assert not without_rounding(torch.tensor([[undefined, 1.0]])).isfinite().all()


def test_entries_of_eigenvectors_that_are_nothing_beside_their_length_are_zero():
    """Those of [[1, t], [t, 1/2]] are turned by 2 t: by less than rounding for t = 1e-15, products with which soon are
    subnormal numbers, and by 2e-4 for t = 1e-4."""
    for turn, expected in ((1e-15, 0.0), (1e-4, 2e-4)):
        factor = torch.tensor([[1.0, turn], [turn, 0.5]])
        for vectors in Factors(factor, factor).eigen()[1:]:
            assert vectors.abs().min().item() == pytest.approx(expected, rel=1e-3, abs=0)


def test_a_trainable_bias_of_a_frozen_weight_has_the_second_factor_alone(case, close):
    here = case(frozen, shape=(2, 3, 4))
    matrix = estimate(GGN(), Kronecker(), here.risk).curvature
    (layer,) = [layer for layer in matrix.layers if layer.weight is None]
    assert layer.bias == "0.bias"
    assert layer.terms[0].a.tolist() == [[1.0]]
    close(layer.terms[0].g, factors(here.model[0], here.model, here.inputs, here.columns(GGN()))[1])
    foreseen = Kronecker().bytes(here.risk.space, 8), Kronecker().cost(here.risk.space)
    done = sum(len(x.terms[0].g) * len(x.terms[0].a) * x.terms[0].work for x in matrix.layers)
    assert foreseen == (matrix.nbytes, 2 * matrix.size + done)


@pytest.mark.parametrize("structure", [Kronecker(), EKFAC()], ids=str)
@pytest.mark.parametrize("kind", [Hessian(), Hessian(Clip()), BatchedEmpiricalFisher(2)], ids=str)
def test_kinds_without_a_factor_of_each_example_are_refused(kind, structure, case):
    message = rf"No {type(structure).__name__} factorisation is known for .*{type(kind).__name__}.* Use Fisher\(\)"
    with pytest.raises(TypeError, match=message):
        estimate(kind, structure, case(perceptron).risk)


@pytest.mark.parametrize("structure", [Kronecker(), EKFAC()], ids=str)
@pytest.mark.parametrize(
    ("model", "shape"),
    [(lambda: nn.ConvTranspose1d(4, CLASSES, 1), (4, 1)), (lambda: nn.Conv1d(3, 3, 1, groups=3), (3, 1))],
)
def test_a_model_with_nothing_to_factorise_is_refused(model, shape, structure, case):
    with pytest.raises(TypeError, match=r"No layer of .* can be factorised.*0.weight, 0.bias. Use LowRank or Diagonal"):
        estimate(GGN(), structure, case(lambda: nn.Sequential(model(), nn.Flatten()), shape=shape).risk)


@pytest.mark.parametrize("structure", [Kronecker(), EKFAC()], ids=str)
def test_class_weights_go_with_the_ggn_and_not_with_the_fisher(structure, case, close):
    here = case(perceptron)
    weights = torch.tensor([0.5, 2.0, 1.3]).double()
    risk = EmpiricalRisk.snapshot(here.model, nn.CrossEntropyLoss(weights), list(here.risk.batches))
    here.risk = risk
    matrix = estimate(GGN(), structure, risk).curvature
    p = here.model(here.inputs).detach().softmax(1)
    roots = []
    for one, y in zip(p, here.targets):
        values, vectors = torch.linalg.eigh(weights[y] / weights.mean() * (one.diag() - torch.outer(one, one)))
        roots.append(vectors * values.clamp_min(0).sqrt())
    exact = estimate(GGN(), Dense(), risk).curvature.dense()
    for name, where, term in blocks(here, matrix):
        a, g = factors(factored(here.model)[name], here.model, here.inputs, torch.stack(roots))
        if isinstance(structure, EKFAC):
            assert term.trace() == pytest.approx(float(exact[where, where].sum()))
        else:
            close(term.dense(), torch.kron(g, a), 1e-7)
    for kind in (Fisher(), Fisher(samples=1, seed=0)):
        with pytest.raises(ValueError, match="not defined for class-weighted"):
            estimate(kind, structure, risk)


def test_too_many_numbers_are_refused_with_a_remedy(case):
    risk = case(perceptron).risk
    numbers = 5**2 + 5**2 + 5**2 + 2**2 + 3**2 + 3**2  # A and G of three layers, the second without bias
    for recipe, more in ((Kronecker, 0), (EKFAC, risk.space.size)):
        needed = (numbers + more + risk.space.size) * 8
        assert recipe().bytes(risk.space, 8) == needed
        estimate(GGN(), recipe(max_bytes=needed), risk)
        with pytest.raises(MemoryError, match=rf"{recipe.__name__}\(\) needs .* Use LowRank\(Rank\(20\)\) or Diagonal"):
            estimate(GGN(), recipe(max_bytes=needed - 1), risk)


def test_a_table_of_words_does_not_count_as_a_layer_that_is_too_large(case):
    """Its factors would have (10 000)² numbers."""

    def words():
        return nn.Sequential(nn.Embedding(10_000, 2), nn.Flatten(), nn.Linear(6, CLASSES))

    class Indices(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = words()

        def forward(self, index):
            return self.body(index.abs().long())

    estimate(GGN(), Kronecker(max_bytes=2**20), case(Indices, shape=(3,)).risk)


# Sums and growth

SPACE = ParameterSpace(("new", "bias", "scale", "weight"), (Size((2,)), Size((3,)), Size(()), Size((3, 2))))


def positive(size, generator):
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return root @ root.T / size


def random_kronecker(seed, sums=None, space=SPACE, out=3, inputs=3):
    generator = torch.Generator().manual_seed(seed)
    factor = Factors(positive(inputs, generator), positive(out, generator))
    diagonal = torch.rand(space.size, generator=generator, dtype=torch.float64)
    options = {} if sums is None else {"sums": sums}
    return KroneckerMatrix(space, (FactoredLayer("weight", "bias", (factor,)),), diagonal, **options)


def test_sums_are_exact_and_keep_their_terms(close):
    one, two, three = (random_kronecker(seed) for seed in range(3))
    total = one.plus(two).compressed().plus(three).compressed()
    close(total.dense(), one.dense() + two.dense() + three.dense())
    close(total.product(torch.arange(12.0).double()), total.dense() @ torch.arange(12.0).double())
    assert [len(layer.terms) for layer in total.layers] == [3]
    assert total.trace() == pytest.approx(sum(m.trace() for m in (one, two, three)))
    with pytest.raises(TypeError, match="eigenvalues of a sum"):
        total.map_spectrum(torch.exp)


def test_corrected_and_plain_terms_add_up(case, close):
    risk = case(convolutional).risk
    one, two = (estimate(GGN(), structure, risk).curvature for structure in (Kronecker(), EKFAC()))
    close(one.plus(two).dense(), one.dense() + two.dense())


def test_merged_factors_are_those_of_the_formula(close):
    one, two = (random_kronecker(seed, PiWeighted()) for seed in range(2))
    (a1, g1), (a2, g2) = ((m.layers[0].terms[0].a, m.layers[0].terms[0].g) for m in (one, two))
    pi = (a1.trace() * g2.trace() / (a2.trace() * g1.trace())).sqrt()
    expected = torch.kron(g1 + g2 / pi, a1 + pi * a2)
    expected *= (a1.trace() * g1.trace() + a2.trace() * g2.trace()) / expected.trace()
    close(one.plus(two).compressed().layers[0].terms[0].dense(), expected)
    close(two.plus(one).compressed().layers[0].terms[0].dense(), expected)


@pytest.mark.parametrize("shared", ["a", "g", "both"])
def test_merging_is_exact_where_a_factor_is_shared_and_the_others_have_one_trace(shared, close):
    """A ⊗ G₁ + A ⊗ G₂ = A ⊗ (G₁ + G₂): π is 1 there."""
    generator = torch.Generator().manual_seed(0)
    a, g, other = positive(3, generator), positive(3, generator), positive(3, generator)
    other *= {"a": g, "g": a, "both": g}[shared].trace() / other.trace()
    second = {"a": Factors(a, other), "g": Factors(other, g), "both": Factors(a, g)}[shared]
    one, two = merging(Factors(a, g)), merging(second)
    close(one.plus(two).compressed().dense(), one.dense() + two.dense())


def merging(term):
    layers = (FactoredLayer("weight", "bias", (term,)),)
    return KroneckerMatrix(SPACE, layers, torch.zeros(SPACE.size).double(), PiWeighted())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("sums", [PartialTraces(), PiWeighted(), FrobeniusOptimal()], ids=str)
def test_equal_summands_give_a_multiple(sums, scale, close):
    one = random_kronecker(0, sums)
    (term,) = one.plus(one.scaled(scale)).compressed().layers[0].terms
    close(term.dense(), (1 + scale) * one.layers[0].terms[0].dense())


def random_corrected(seed, sums=None):
    generator = torch.Generator().manual_seed(seed)
    q_g, q_a = (torch.linalg.qr(torch.randn(3, 3, generator=generator).double()).Q for _ in "ga")
    values = torch.rand(3, 3, generator=generator).double()
    layers = (FactoredLayer("weight", "bias", (Corrected(values, q_g, q_a),)),)
    return KroneckerMatrix(SPACE, layers, torch.zeros(SPACE.size).double(), sums or PiWeighted())


@pytest.mark.parametrize("sums", [PartialTraces(), PiWeighted(), FrobeniusOptimal()], ids=str)
def test_corrected_eigenvalues_of_a_merged_sum_are_those_of_the_exact_sum_in_one_basis(sums, close):
    one, two = random_corrected(0, sums), random_corrected(1, sums)
    (term,) = one.plus(two).compressed().layers[0].terms
    q = torch.kron(term.g, term.a)
    exact = sum(m.layers[0].terms[0].dense() for m in (one, two))
    close(q.T @ q, torch.eye(9).double())
    close(term.values.reshape(-1), (q.T @ exact @ q).diagonal())
    assert term.trace() == pytest.approx(float(exact.trace()))
    # the eigenvectors are those of the merged partial traces
    parts = [Factors(*(torch.einsum(traced, m.layers[0].terms[0].dense().view(3, 3, 3, 3)) / exact_root(m)
                       for traced in ("ijik->jk", "ikjk->ij"))) for m in (one, two)]  # fmt: skip
    (expected,) = sums.of(tuple(parts))
    for basis, factor in ((term.g, expected.g), (term.a, expected.a)):
        turned = basis.T @ factor @ basis
        close(turned, turned.diagonal().diag())


def exact_root(matrix):
    return matrix.layers[0].terms[0].dense().trace().sqrt()


def test_a_corrected_sum_of_matrices_with_the_same_eigenvectors_is_exact(close):
    one = random_corrected(0)
    (term,) = one.layers[0].terms
    other = replace(one, layers=(replace(one.layers[0], terms=(replace(term, values=term.values.flip(0) ** 2),)),))
    close(one.plus(other).compressed().dense(), one.dense() + other.dense())


def rearranged(terms):
    """Σ_i vec(A_i) vec(G_i)ᵀ from the entries of the sum of kron(G_i, A_i), without the factors."""
    whole = sum(torch.kron(term.g, term.a) for term in terms)
    g, a = len(terms[0].g), len(terms[0].a)
    return whole.view(g, a, g, a).permute(1, 3, 0, 2).reshape(a * a, g * g)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_frobenius_optimal_pair_is_the_best_product_but_for_the_trace(count, close):
    generator = torch.Generator().manual_seed(count)
    terms = tuple(Factors(positive(4, generator), 3 * positive(3, generator)) for _ in range(count))
    (found,) = FrobeniusOptimal().of(terms)
    u, s, v = torch.linalg.svd(rearranged(terms))
    best = torch.kron(v[0].view(3, 3), u[:, 0].view(4, 4)) * s[0]
    close(found.dense(), best * (sum(term.trace() for term in terms) / best.trace()))
    assert torch.linalg.eigvalsh(found.dense()).min() > -1e-12


def test_a_shared_factor_makes_the_frobenius_optimal_pair_exact(close):
    generator = torch.Generator().manual_seed(0)
    a, terms = positive(4, generator), []
    terms = tuple(Factors(a * scale, positive(3, generator)) for scale in (1.0, 20.0, 0.1))
    (found,) = FrobeniusOptimal().of(terms)
    close(found.dense(), sum(term.dense() for term in terms))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_no_pi_weighted_pair_holds_a_direction_less_than_its_share_of_the_sum(count):
    generator = torch.Generator().manual_seed(count)
    terms = tuple(Factors(10**n * positive(4, generator), positive(3, generator)) for n in range(count))
    (found,) = PiWeighted().of(terms)
    traces = torch.tensor([term.trace() for term in terms])
    share = traces.sum() / traces.sqrt().sum().square()
    assert 1 / count <= share < 1
    assert torch.linalg.eigvalsh(found.dense() - share * sum(term.dense() for term in terms)).min() > -1e-9
    for other in torch.rand(50, count, generator=generator).double():
        pair = Factors(sum(w * t.a for w, t in zip(other, terms)), sum(t.g / w for w, t in zip(other, terms)))
        assert pair.trace() >= float(traces.sqrt().sum().square()) * (1 - 1e-6)


def test_partial_traces_are_those_of_the_sum_and_the_same_merged_one_by_one(close):
    generator = torch.Generator().manual_seed(0)
    terms = tuple(Factors(10**n * positive(4, generator), positive(3, generator)) for n in range(4))
    (pair,) = PartialTraces().of(terms)
    close(reduce(lambda held, term: PartialTraces().of((*held, term)), terms[1:], terms[:1])[0].dense(), pair.dense())
    exact, found = (matrix.view(3, 4, 3, 4) for matrix in (sum(term.dense() for term in terms), pair.dense()))
    for traced in ("iaib->ab", "iaja->ij"):
        close(torch.einsum(traced, found), torch.einsum(traced, exact))
    least = min(term.trace() for term in terms) / pair.trace()
    assert torch.linalg.eigvalsh(pair.dense() - least * exact.reshape(12, 12)).min() > -1e-9


def test_terms_of_one_trace_weigh_alike_in_partial_traces_and_the_newest_most_where_pi_weighs_them():
    """On terms e_k e_kᵀ ⊗ G, whose weights in A are what stands on its diagonal."""
    terms = tuple(Factors(torch.eye(5)[k].diag().double(), torch.eye(2).double()) for k in range(5))
    for sums, newest in ((PartialTraces(), 1 / 5), (PiWeighted(), 1 / (1 + 4**0.5))):
        (pair,) = reduce(lambda held, term, sums=sums: sums.of((*held, term)), terms[1:], terms[:1])
        weights = pair.a.diagonal() / pair.a.trace()
        assert float(weights[-1]) == pytest.approx(newest)
        assert float(weights.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("most", [2, 3])
def test_a_bounded_list_keeps_the_newest_terms_beside_one_pair_of_the_others(most, close):
    parts = [random_kronecker(seed, KeepTerms(most=most)) for seed in range(5)]
    total = reduce(lambda one, two: one.plus(two).compressed(), parts)
    oldest, *newest = total.layers[0].terms
    assert len(newest) == most - 1
    for kept, part in zip(newest, parts[-most + 1 :]):
        assert kept is part.layers[0].terms[0]
    (pair,) = PartialTraces().of(tuple(m.layers[0].terms[0] for m in parts[: -most + 1]))
    close(oldest.dense(), pair.dense())
    assert total.trace() == pytest.approx(sum(m.trace() for m in parts))


def test_merging_with_nothing_changes_nothing(close):
    for one in (random_kronecker(0, PiWeighted()), random_kronecker(0, FrobeniusOptimal()), random_corrected(0)):
        for total in (one.plus(one.scaled(0.0)), one.scaled(0.0).plus(one)):
            close(total.compressed().dense(), one.dense())
    nothing = one.scaled(0.0)
    assert [len(layer.terms) for layer in nothing.plus(nothing).compressed().layers] == [1]


# Cuts


def orthogonal(size, seed):
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double()).Q


def spiked(values_g, values_a, seed=0):
    """Factors with these eigenvalues."""
    q_g, q_a = orthogonal(len(values_g), seed), orthogonal(len(values_a), seed + 1)
    g, a = (torch.as_tensor(v).double() for v in (values_g, values_a))
    return Factors((q_a * a) @ q_a.T, (q_g * g) @ q_g.T)


def one_layer(term, cut=None, sums=None):
    out, inputs = (len(side) for side in (term.g, term.a))
    space = ParameterSpace(("weight", "bias"), (Size((out, inputs - 1)), Size((out,))))
    layers = (FactoredLayer("weight", "bias", (term,)),)
    return KroneckerMatrix(space, layers, torch.zeros(space.size).double(), sums or PiWeighted(), cut)


FALLING = ([9.0, 3.0, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1], [20.0, 5.0, 1.0, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05])


@pytest.mark.parametrize("cut", [Rank(1), Rank(3), Energy(0.5), Energy(0.9)], ids=str)
@pytest.mark.parametrize("corrected", [False, True])
def test_a_cut_keeps_leading_eigenvalues_and_the_means_of_the_others(cut, corrected, close):
    term = spiked(*FALLING)
    if corrected:
        values, g, a = term.eigen()
        term = Corrected(values * torch.rand(values.shape, generator=torch.Generator().manual_seed(2)), g, a)
    (found,) = one_layer(term, cut).compressed().layers[0].terms
    values, g, a = term.eigen()
    rows, columns = (values.sum(dim).argsort(descending=True) for dim in (1, 0))
    values, g, a = values[rows][:, columns], g[:, rows], a[:, columns]
    r, s = found.g.shape[1], found.a.shape[1]
    expected = values.clone()
    for row, column in ((slice(r), slice(s, None)), (slice(r, None), slice(s)), (slice(r, None), slice(s, None))):
        part = values[row, column]
        kept = part.mean() if row.start == r and column.start == s else part.mean(0 if row.start == r else 1, True)
        expected[row, column] = kept
    vectors = torch.kron(g, a)
    close(found.dense(), (vectors * expected.reshape(-1)) @ vectors.T)
    assert found.trace() == pytest.approx(term.trace())
    assert torch.linalg.eigvalsh(found.dense()).min() > 0
    error = torch.linalg.norm(found.dense() - term.dense())
    assert 0 < float(error**2) <= float((expected - values).square().sum()) * (1 + 1e-9)
    whole = one_layer(found)
    v = torch.randn(whole.size, generator=torch.Generator().manual_seed(3)).double()
    close(whole.product(v), whole.dense() @ v)


@pytest.mark.parametrize("names", [("weight", "bias"), ("weight", None), (None, "bias")], ids=str)
def test_products_with_what_was_cut_go_without_weight_or_bias(names, close):
    out, inputs = 8, (names[0] is not None) * 8 + (names[1] is not None)
    term = spiked(FALLING[0], FALLING[1][:inputs])
    shapes = {"weight": Size((out, 2, 2, 2)), "bias": Size((out,))}
    space = ParameterSpace(*zip(*((name, shapes[name]) for name in names if name)))
    whole = KroneckerMatrix(space, (FactoredLayer(*names, (term,)),), torch.zeros(space.size).double(), cut=Rank(1))
    matrix = whole.compressed()
    assert isinstance(matrix.layers[0].terms[0], LeadingPart)
    v = torch.randn(matrix.size, generator=torch.Generator().manual_seed(3)).double()
    close(matrix.product(v), matrix.dense() @ v)
    close(matrix.dense().trace(), whole.dense().trace())


def test_an_energy_cut_takes_the_fewest_eigenvectors_that_hold_it_between_them():
    values_g, values_a = FALLING
    part = torch.outer(*(torch.tensor(v).double() for v in FALLING)).cumsum(0).cumsum(1)
    part = part / part[-1, -1]
    for fraction in (0.3, 0.6, 0.75, 0.9):
        r, s = Energy(fraction).corner(torch.outer(torch.tensor(values_g), torch.tensor(values_a)))
        assert part[r - 1, s - 1] >= fraction
        fewer = [i + j + 2 for i in range(8) for j in range(9) if part[i, j] >= fraction]
        assert r + s == min(fewer)
    assert Energy(1.0, most_pairs=2).corner(torch.ones(8, 9)) == (2, 2)
    assert Rank(3).corner(torch.ones(8, 2)) == (3, 2)


def test_what_would_not_become_cheaper_stays_whole_and_so_does_a_cut_of_all_that_is_there(close):
    even = spiked([1.0] * 8, [1.0] * 9)
    assert one_layer(even, Energy(0.9)).compressed().layers[0].terms == (even,)
    low = spiked([2.0, 1.0, 0, 0, 0, 0, 0, 0], [3.0, 1.0, 0, 0, 0, 0, 0, 0, 0])
    (found,) = one_layer(low, Rank(2)).compressed().layers[0].terms
    close(found.dense(), low.dense())
    close(found.map_spectrum(lambda x: 2 * x).dense(), 2 * low.dense())
    close(found.scaled(2.0).dense(), 2 * low.dense())


@pytest.mark.parametrize("corrected", [False, True])
def test_what_was_cut_is_merged_as_if_it_were_whole_and_cut_again(corrected, close):
    terms = [spiked(*FALLING, seed=seed) for seed in (0, 5)]
    if corrected:
        terms = [term.map_spectrum(lambda x: x + x.square()) for term in terms]
    one, two = (one_layer(term, Rank(3)).compressed() for term in terms)
    total = one.plus(two).compressed()
    (found,) = total.layers[0].terms
    assert total.trace() == pytest.approx(one.trace() + two.trace())
    parts = [matrix.layers[0].terms[0] for matrix in (one, two)]
    whole = [part.whole() if corrected else part.factors() for part in parts]
    for part, other in zip(parts, whole):
        close(part.dense(), other.dense())
    close(found.dense(), leading_part(*PiWeighted().of(tuple(whole)), Rank(3)).dense())
    close(one.plus(one).compressed().dense(), 2 * one.dense())


SUMS = [KeepTerms(most=2), PartialTraces(), PiWeighted(), FrobeniusOptimal()]


@pytest.mark.parametrize("cut", [None, Energy(0.6), Rank(2)], ids=str)
@pytest.mark.parametrize("sums", SUMS, ids=str)
@pytest.mark.parametrize("structure", [Kronecker, EKFAC])
def test_every_bounded_sum_is_positive_semidefinite_and_keeps_the_trace_of_all(structure, sums, cut, close):
    """A cut moves no eigenvalue by more than the largest that it drops."""
    terms = [spiked(*(FALLING if seed % 2 else (FALLING[1][1:], FALLING[1])), seed=seed) for seed in range(4)]
    if structure is EKFAC:
        terms = [term.map_spectrum(lambda x: x + x.square()) for term in terms]
    parts = [one_layer(term, cut, sums).compressed() for term in terms]
    held = reduce(lambda one, two: one.plus(two).compressed(), parts[:3]).plus(parts[3])
    total = held.compressed()
    found, dense, v = total.layers[0].terms, total.dense(), torch.arange(72.0).double()
    assert len(found) == (2 if isinstance(sums, KeepTerms) else 1)
    assert all(isinstance(term, LeadingPart) is (cut is not None) for term in found)
    assert total.trace() == pytest.approx(sum(term.trace() for term in terms)) == pytest.approx(float(dense.trace()))
    assert torch.linalg.eigvalsh(dense).min() > -1e-12
    close(total.product(v), dense @ v)
    if cut is not None:
        whole = sums.of(held.layers[0].terms)[0].dense()
        off = torch.eye(72).double() - torch.kron(found[0].g @ found[0].g.T, found[0].a @ found[0].a.T)
        dropped = float(torch.linalg.matrix_norm(off @ whole @ off, 2))
        assert 0 < float(torch.linalg.matrix_norm(found[0].dense() - whole, 2)) <= dropped


def test_a_limit_that_leaves_too_little_is_said_where_a_layer_is_cut():
    with pytest.warns(UserWarning, match=r"leading 2 and 2 eigenvectors .*hold together 87.3% of the trace, not 90.0%"):
        assert leading_part(spiked(*FALLING), Energy(0.9, most_pairs=2)).a.shape == (9, 2)
    even = spiked([1.0] * 8, [1.0] * 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert leading_part(even, Energy(0.9, most_pairs=7)) is even
        assert leading_part(spiked(*FALLING), Rank(1)).a.shape == (9, 1)


def test_a_cut_layer_that_grows_keeps_its_entries_and_gives_nothing_to_new_rows(close):
    small, large = (ParameterSpace(("weight", "bias"), (Size((out, 8)), Size((out,)))) for out in (8, 10))
    term = spiked(*FALLING)
    corrected = term.map_spectrum(lambda x: x + x.square())
    matrix = one_layer(term, Rank(2)).compressed()
    where = large.positions(small)
    expected = torch.zeros(large.size, large.size).double()
    expected[where[:, None], where] = matrix.dense()
    grown = matrix.embedded(small, large)
    close(grown.dense(), expected)
    assert grown.compressed() is grown
    twice = replace(grown.plus(grown), cut=None).compressed()  # as a list merges its oldest terms
    pair = one_layer(corrected).plus(one_layer(term)).embedded(small, large).compressed()
    for old in (twice, pair, one_layer(term).embedded(small, large)):
        close(replace(old, cut=Rank(2)).compressed().dense(), old.dense())
    new = one_layer(spiked([*FALLING[0], 0.1, 0.1], FALLING[1], 3), Rank(2))
    total = grown.plus(new.compressed()).compressed()
    assert total.trace() == pytest.approx(matrix.trace() + new.trace())
    assert isinstance(total.layers[0].terms[0], LeadingPart)


@pytest.mark.parametrize("structure", [Kronecker, EKFAC])
@pytest.mark.parametrize("cut", [Rank(2), Energy(0.5, most_pairs=4)], ids=str)
def test_a_cut_estimate_is_that_of_the_whole_cut_and_its_bytes_are_foreseen(structure, cut, new_problem, make_model):
    model = make_model(lambda: nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 3)))
    risk = new_problem(model, "cross_entropy").risk
    whole, found = (estimate(GGN(), one, risk).curvature for one in (structure(), structure(cut=cut)))
    for layer, other in zip(found.layers, whole.layers):
        torch.testing.assert_close(layer.terms[0].dense(), leading_part(other.terms[0], cut).dense())
    assert isinstance(found.layers[0].terms[0], LeadingPart)
    assert found.trace() == pytest.approx(whole.trace())
    foreseen = [one.bytes(risk.space, 8) for one in (structure(), structure(cut=cut))]
    assert whole.nbytes == foreseen[0]
    assert found.nbytes <= foreseen[1] < foreseen[0]
    assert found.nbytes == foreseen[1] or cut != Rank(2)
    costs = [one.cost(risk.space) for one in (structure(), structure(cut=cut))]
    terms = [[layer.terms[0] for layer in matrix.layers] for matrix in (whole, found)]
    done = [sum(len(term.g) * len(term.a) * term.work for term in some) for some in terms]
    assert done[0] + 2 * risk.space.size == costs[0]
    assert done[1] + 2 * risk.space.size <= costs[1] < costs[0]


def test_a_weight_that_is_held_transposed_is_foreseen_with_its_bias():
    space = ParameterSpace(("weight", "bias"), (Size((7, 3)), Size((3,))))
    assert Kronecker().bytes(space, 1) == 24 + 3**2 + (7 + 1) ** 2


def test_a_larger_convolution_has_the_entries_of_the_smaller_at_their_places(close):
    small, large = (ParameterSpace(("weight",), (Size(shape),)) for shape in ((2, 2, 2, 3), (3, 4, 2, 3)))
    generator = torch.Generator().manual_seed(0)
    term = Factors(positive(12, generator), positive(2, generator))
    matrix = KroneckerMatrix(small, (FactoredLayer("weight", None, (term,)),), torch.zeros(24).double())
    where = torch.arange(72).view(3, 4, 2, 3)[:2, :2].reshape(-1)
    expected = torch.zeros(72, 72).double()
    expected[where[:, None], where] = matrix.dense()
    close(matrix.embedded(small, large).dense(), expected)


def test_a_layer_that_loses_its_bias_to_freezing_adds_up(new_problem, net):
    before = estimate(GGN(), Kronecker(), new_problem(net, "cross_entropy").risk)
    net[0].bias.requires_grad_(False)
    after = estimate(GGN(), Kronecker(), new_problem(net, "cross_entropy", seed=1).risk)
    net[0].bias.requires_grad_(True)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1
    for one, other in ((before, after), (after, before)):
        assert float((one + other)(net)) == pytest.approx(float(one(net) + other(net)))


# Rules of one's own


class Weird(Curvature):
    """A kind known by its products only."""

    def operator(self, risk):
        return GGN().operator(risk)


class Mine(OutputCurvature):
    """A kind with a factor of each example."""

    def factor(self, loss, outputs, targets, generator):
        return loss.hessian_factor(outputs, targets).scaled(2.0)


@pytest.fixture
def clean_registry(monkeypatch):
    registry = sys.modules["avalanche_curv.core.structures.rules"]
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))


def test_a_rule_of_ones_own_lifts_the_refusal(case, clean_registry):
    risk = case(perceptron).risk
    with pytest.raises(TypeError, match=r"register one with @rule\(Weird, Kronecker\)"):
        check_pair(Weird(), Kronecker())

    @rule(Weird, Kronecker)
    def mine(curvature, structure, risk):
        return DiagonalMatrix(torch.ones_like(risk.anchor))

    assert estimate(Weird(), Kronecker(), risk).curvature.trace() == risk.space.size
    with pytest.raises(TypeError, match="Hessian"):
        check_pair(Hessian(), Kronecker())


def test_a_rule_for_plain_factors_is_not_taken_for_corrected_ones(case, clean_registry):
    @rule(Mine, Kronecker)
    def mine(curvature, structure, risk):
        return DiagonalMatrix(torch.ones_like(risk.anchor))

    risk = case(perceptron).risk
    exact = estimate(Mine(), Dense(), risk).curvature.dense()
    assert estimate(Mine(), EKFAC(), risk).curvature.trace() == pytest.approx(float(exact.trace()))


@pytest.mark.parametrize("structure", [Kronecker(), EKFAC()], ids=str)
def test_an_output_curvature_of_ones_own_needs_no_rule(structure, case, close):
    risk = case(perceptron).risk
    close(
        estimate(Mine(), structure, risk).curvature.dense(), 4 * estimate(GGN(), structure, risk).curvature.dense()
    )
