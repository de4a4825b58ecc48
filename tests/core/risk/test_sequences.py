"""Models of tokens and pixels, with padding and sequences of several lengths, against explicit loops."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from avalanche_curv import (
    EKFAC,
    GGN,
    Dense,
    Diagonal,
    EmpiricalFisher,
    EmpiricalRisk,
    Expand,
    Fisher,
    Hessian,
    Kronecker,
    LowRank,
    Rank,
    Reduce,
    estimate,
)
from avalanche_curv.core.fidelity import example_models

PADDING = -100


class Tagger(nn.Module):
    """Classes [N, C, T] of tokens [N, T]."""

    def __init__(self, words=5, classes=3) -> None:
        super().__init__()
        self.words, self.lstm = nn.Embedding(words, 2), nn.LSTM(2, 2, batch_first=True)
        self.head = nn.Linear(2, classes)

    def forward(self, tokens):
        return self.head(self.lstm(self.words(tokens))[0]).transpose(1, 2)


class Perceptron(nn.Module):
    """Classes [N, C, T] of tokens [N, T], each by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layers = nn.Embedding(5, 3), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, tokens):
        return self.layers(self.words(tokens)).transpose(1, 2)


def ragged():
    """Batches of 5, 3 and 4 tokens, of which some are padding, one example's all."""
    generator, batches = torch.Generator().manual_seed(0), []
    for examples, length in ((3, 5), (2, 3), (1, 4)):
        x = torch.randint(5, (examples, length), generator=generator)
        y = torch.randint(3, (examples, length), generator=generator)
        y[0, length - 2 :] = PADDING
        batches.append((x, y))
    batches[1][1][1] = PADDING
    return batches


class Loop:
    """Value, slope and curvature of each example by torch's own criterion and autograd."""

    def __init__(self, risk, criterion) -> None:
        self.risk, self.criterion = risk, criterion
        pairs = [pair for x, y in risk for pair in zip(x.split(1), y.split(1))]
        self.examples = [self._one(x, y) for x, y in pairs]
        self.value = sum(value for value, _, _ in self.examples) / len(self.examples)
        self.gradient = sum(slope for _, slope, _ in self.examples) / len(self.examples)
        self.ggn = sum(ggn for _, _, ggn in self.examples) / len(self.examples)
        self.empirical = sum(slope.outer(slope) for _, slope, _ in self.examples) / len(self.examples)

    def _loss(self, f, y):
        return self.criterion(f, y) if (y != PADDING).any() else 0 * f.sum()

    def _one(self, x, y):
        with torch.enable_grad():
            outputs = self.risk.model(x)
            rows = [torch.autograd.grad(f, self.risk.parameters, retain_graph=True) for f in outputs.reshape(-1)]
            flat = outputs.detach().reshape(-1)
            loss = lambda v: self._loss(v.view_as(outputs), y)  # noqa: E731
            slope = torch.autograd.functional.jacobian(loss, flat)
            second = torch.autograd.functional.hessian(loss, flat)
        jacobian = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
        return loss(flat).item(), jacobian.T @ slope, jacobian.T @ second @ jacobian


CRITERIA = {"mean": nn.CrossEntropyLoss(), "sum": nn.CrossEntropyLoss(reduction="sum"),
            "weighted": nn.CrossEntropyLoss(torch.tensor([0.5, 2.0, 1.1]).double(), label_smoothing=0.1)}  # fmt: skip


@pytest.mark.parametrize(("make", "criterion"), [(Tagger, "mean"), (Perceptron, "weighted"), (Perceptron, "sum")])
def test_ragged_sequences_with_padding_are_as_the_loop_says(make, criterion, make_model, close):
    model, criterion = make_model(make), CRITERIA[criterion]
    risk = EmpiricalRisk.snapshot(model, criterion, ragged())
    loop = Loop(risk, criterion)
    assert risk.examples == 6
    assert risk.value() == pytest.approx(loop.value, rel=1e-10)
    close(risk.gradient(), loop.gradient)
    vector = torch.linspace(-1, 1, risk.space.size)[:, None].double()
    for kind, expected in {GGN(): loop.ggn, EmpiricalFisher(): loop.empirical}.items():
        rows = torch.cat([*kind.rows(risk)])
        assert kind.row_count(risk) == len(rows)
        close(rows.T @ rows, expected)
        close(estimate(kind, Diagonal(), risk).curvature.dense(), expected.diagonal().diag())
        close(kind.operator(risk).matmat(vector), expected @ vector)
        assert estimate(kind, Kronecker(), risk).curvature.trace() > 0
    if criterion.weight is None:
        close(estimate(Fisher(), Diagonal(), risk).curvature.dense(), loop.ggn.diagonal().diag())


def test_padding_is_as_if_it_were_not_there(make_model, close):
    """The same examples with padded tokens and, each in a batch of its own, without them."""
    model, batches = make_model(Perceptron), ragged()
    one = [(a[None, b >= 0], b[None, b >= 0]) for x, y in batches for a, b in zip(x, y) if (b >= 0).any()]
    here, there = (EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), data) for data in (batches, one))
    counted = 5 / 6  # the example without a token that counts stays in N
    assert here.value() == pytest.approx(counted * there.value(), rel=1e-12)
    close(here.gradient(), counted * there.gradient())
    for kind in (GGN(), EmpiricalFisher(), Hessian()):
        for structure in (Dense(), Diagonal(), LowRank(Rank(5))):
            found, wanted = (estimate(kind, structure, risk).curvature.dense() for risk in (here, there))
            torch.testing.assert_close(found, counted * wanted, atol=1e-8, rtol=1e-8)
    for kind in (GGN(), Fisher(), EmpiricalFisher()):
        for sharing in (Expand(), Reduce()):
            for factors in (Kronecker(sharing=sharing), EKFAC(sharing=sharing)):
                found, wanted = (estimate(kind, factors, risk).curvature.dense() for risk in (here, there))
                close(found, counted * wanted)
    moved = here.anchor + 0.1
    found, wanted = (example_models(GGN(), risk).compare(moved).quadratic for risk in (here, there))
    kept = torch.tensor([0, 1, 2, 3, 5])
    close(found.kappa[kept], wanted.kappa)
    close(found.increase[kept], wanted.increase)
    assert found.kappa[4] == 0


class NextTokens(nn.Module):
    """Classes [N, C, T − 1] of next tokens, from causal attention over tokens [N, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(5, 3), nn.Linear(3, 4), nn.Linear(4, 5)

    def forward(self, tokens):
        x = self.mix(self.words(tokens))
        seen = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return self.head(torch.tanh(seen))[:, :-1].transpose(1, 2)


def answers(length):
    """Twelve sentences of 3, 6 and 4 tokens, of which the first two are a question, padded to a length; or each by
    itself."""
    generator = torch.Generator().manual_seed(0)
    sentences = [torch.randint(5, (1, own), generator=generator) for own in 4 * (3, 6, 4)]
    pairs = [(x, torch.where(torch.arange(1, x.shape[1]) < 2, PADDING, x[:, 1:])) for x in sentences]
    if length is None:
        return pairs
    padded = (
        torch.cat([F.pad(part, (0, width - part.shape[1]), value=value) for part in parts])
        for parts, width, value in zip(zip(*pairs), (length, length - 1), (1, PADDING))
    )
    return [tuple(padded)]


@pytest.mark.parametrize("sharing", [Expand(), Reduce()], ids=str)
def test_padded_next_tokens_have_the_factors_of_those_without(sharing, make_model, close):
    """Layers have a position more than there are targets. What is padded with reaches no output that counts."""
    model = make_model(NextTokens)
    without, padded = (EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), answers(n)) for n in (None, 8))
    for kind in (GGN(), Fisher(), EmpiricalFisher()):
        for factors in (Kronecker(sharing=sharing), EKFAC(sharing=sharing)):
            close(*(estimate(kind, factors, risk).curvature.dense() for risk in (padded, without)))


def test_a_question_counts_where_its_answer_depends_on_it(make_model, close):
    """Before attention, of all tokens but the last; in the head, of those with a target."""
    model = make_model(NextTokens)
    risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), answers(8))
    seen = {}
    model.head.register_forward_pre_hook(lambda _, args: seen.update(head=args[0].detach()))
    wanted = {"mix": 0, "head": 0}
    for x, _ in answers(None):
        model(x)
        for name, inputs in {"mix": model.words(x).detach()[0, :-1], "head": seen["head"][0, 1:-1]}.items():
            rows = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
            wanted[name] = wanted[name] + rows.T @ rows / len(rows) / 12
    found = estimate(GGN(), Kronecker(), risk).curvature.layers
    for place, a in zip(found, wanted.values()):
        close(place.terms[0].a, a)


def test_draws_of_tokens_do_not_depend_on_the_batch_size(make_model, close):
    x, y = ragged()[0]
    risk = EmpiricalRisk.snapshot(make_model(Perceptron), nn.CrossEntropyLoss(), [(x, y)])
    kind = Fisher(samples=2, seed=1)
    whole = estimate(kind, Dense(), risk).curvature.dense()
    close(estimate(kind, Dense(), risk.rebatched(2)).curvature.dense(), whole)
    close(estimate(kind, Diagonal(), risk).curvature.dense(), whole.diagonal().diag())


def test_the_monte_carlo_fisher_of_tokens_is_unbiased(make_model):
    x, y = ragged()[0]
    risk = EmpiricalRisk.snapshot(make_model(Perceptron), nn.CrossEntropyLoss(), [(x, y)])
    exact = estimate(Fisher(), Dense(), risk).curvature.dense()
    drawn = estimate(Fisher(samples=2_000, seed=0), Dense(), risk).curvature.dense()
    torch.testing.assert_close(drawn, exact, atol=0.06 * float(exact.max()), rtol=0)


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for part in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.entries = max(self.entries, part.untyped_storage().nbytes() // part.element_size())
        return found


VOCABULARY = 50_000


class Vocabulary(nn.Module):
    """[N, 50,000, T], with few parameters: the vocabulary's own weights are random and fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(7, 2), nn.Linear(2, 3)
        self.register_buffer("head", torch.randn(VOCABULARY, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, tokens):
        return F.linear(self.layer(self.words(tokens)), self.head).transpose(1, 2)


@pytest.mark.parametrize(
    "measured",
    [
        lambda risk: GGN().operator(risk).matmat(torch.ones(risk.space.size, 2)),
        lambda risk: estimate(Fisher(samples=1, seed=0), Diagonal(), risk),
        lambda risk: estimate(EmpiricalFisher(), Diagonal(), risk),
        lambda risk: estimate(Fisher(samples=2, seed=0), Kronecker(), risk),
        lambda risk: example_models(GGN(), risk).compare(risk.anchor + 0.1),
    ],
    ids=["GGN products", "Monte-Carlo diagonal", "empirical diagonal", "Monte-Carlo Kronecker", "fidelity"],
)
def test_a_vocabulary_needs_a_few_numbers_for_each_output(measured, make_model):
    examples, length = 2, 3
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(7, (examples, length), generator=generator)
    y = torch.randint(VOCABULARY, (examples, length), generator=generator)
    risk = EmpiricalRisk.snapshot(make_model(Vocabulary).float(), nn.CrossEntropyLoss(), [(x, y)])
    with Largest() as seen:
        measured(risk)
    outputs = examples * length * VOCABULARY
    assert outputs <= seen.entries <= 8 * outputs  # classes by classes would be 50,000 times the outputs of a token


class UNet(nn.Module):
    """Three levels, [N, C, H, W] of images [N, 1, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)])
        self.bottom, self.pool = nn.Conv2d(2, 2, 3, padding=1), nn.MaxPool2d(2)
        self.up = nn.ModuleList([nn.ConvTranspose2d(2, 2, 2, stride=2), nn.ConvTranspose2d(2, 2, 2, stride=2)])
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        first = self.down[0](x).tanh()
        second = self.down[1](self.pool(first)).tanh()
        risen = self.up[0](self.bottom(self.pool(second)).tanh()) + second
        return self.head(torch.cat([self.up[1](risen.tanh()), first], dim=1))


class Logits(nn.Module):
    def __init__(self, module) -> None:
        super().__init__()
        self.module = module

    def forward(self, tokens):
        return self.module(input_ids=tokens).logits.transpose(1, 2)


def gpt2():
    transformers = pytest.importorskip("transformers")
    options = {"vocab_size": 5, "n_positions": 5, "n_embd": 4, "n_layer": 1, "n_head": 2}
    return Logits(transformers.GPT2LMHeadModel(transformers.GPT2Config(**options, attn_implementation="eager")))


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=5, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4,
        max_position_embeddings=5, attn_implementation="eager", num_labels=3,
    )  # fmt: skip
    return Logits(transformers.BertForTokenClassification(config))


def images():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1, 4, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (3, 4, 4), generator=generator)
    y[0, 1:, 2:] = PADDING
    return [(x[:2], y[:2]), (x[2:], y[2:])]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "data"), [(UNet, images), (gpt2, ragged), (bert, ragged)])
def test_networks_of_tokens_and_pixels_are_as_the_loop_says(make, data, make_model, close):
    model, criterion = make_model(make).eval(), nn.CrossEntropyLoss()
    risk = EmpiricalRisk.snapshot(model, criterion, data())
    loop = Loop(risk, criterion)
    assert risk.value() == pytest.approx(loop.value, rel=1e-10)
    close(risk.gradient(), loop.gradient)
    for kind, expected in ((GGN(), loop.ggn), (Fisher(), loop.ggn), (EmpiricalFisher(), loop.empirical)):
        close(estimate(kind, Dense(), risk).curvature.dense(), expected)
        close(estimate(kind, Diagonal(), risk).curvature.dense(), expected.diagonal().diag())
        for structure in (Kronecker(), EKFAC()) if make is not gpt2 else ():  # whose layers are of another kind
            assert estimate(kind, structure, risk).curvature.dense().isfinite().all()
    kind = Fisher(samples=2, seed=0)
    whole = estimate(kind, Dense(), risk).curvature.dense()
    close(estimate(kind, Diagonal(), risk).curvature.dense(), whole.diagonal().diag())
