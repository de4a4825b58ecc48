"""Language models of Hugging Face's library, and LoRA adapters on them, against explicit Jacobians in float64."""

import pytest
import torch
from torch import nn

from avalanche_curv import (
    EKFAC,
    GGN,
    Dense,
    Diagonal,
    EmpiricalFisher,
    EmpiricalRisk,
    Energy,
    InputSpace,
    Kronecker,
    LowRank,
    ProtectedSpace,
    Rank,
    estimate,
)
from avalanche_curv.core.per_example.layers import Layers
from avalanche_curv.core.projection.subspace import principal_angles

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow  # the library takes seconds to import
WORDS, STEPS, EXAMPLES = 7, 3, 5


class Flat(nn.Module):
    """Logits of all positions, side by side, for indices."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, index):
        return self.inner(input_ids=index).logits.flatten(1)


def gpt2(**options):
    sizes = {"vocab_size": WORDS, "n_positions": 4, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_inner": 5}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **options))


def bert():
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 5}
    config = transformers.BertConfig(vocab_size=WORDS, max_position_embeddings=4, type_vocab_size=2, **sizes)
    return transformers.BertForTokenClassification(config)


def masked_bert():
    return transformers.BertForMaskedLM(bert().config)


def adapted(*adapters, targets=("c_attn", "c_fc"), dropout=0.5):
    """Adapters on GPT-2, the last one active, with dropout that eval mode switches off."""
    peft = pytest.importorskip("peft")
    options = {"r": 2, "lora_alpha": 3, "target_modules": [*targets], "lora_dropout": dropout, "fan_in_fan_out": True}
    model = peft.get_peft_model(gpt2(), peft.LoraConfig(**options), adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, peft.LoraConfig(**options))
    model.base_model.set_adapter([*adapters])
    return model


MODELS = {
    "GPT-2": (gpt2, ()),
    "GPT-2, head of its own": (lambda: gpt2(tie_word_embeddings=False), ()),
    "BERT, tagger": (bert, ()),
    "BERT, masked": (masked_bert, ()),
    "LoRA": (lambda: adapted("one"), ()),
    "two adapters": (lambda: adapted("one", "two"), ()),
    "LoRA of the embedding": (lambda: adapted("one", targets=("c_attn", "wte")), None),
}


@pytest.fixture
def made(make_model):
    """made(name): a model with all parameters in play, a risk of squared errors, J [N, C, P] and the errors' gradients
    [N, C]."""

    def make(name):
        model = make_model(lambda: Flat(MODELS[name][0]())).eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data = 0.6 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        index = torch.randint(WORDS, (EXAMPLES, STEPS), generator=generator)
        with torch.no_grad():
            outputs = model(index)
        targets = outputs + torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
        risk = EmpiricalRisk.snapshot(model, nn.MSELoss(), list(zip(index.split(3), targets.split(3))))
        j = torch.stack([jacobian(model, x) for x in index])
        return model, risk, j, 2 * (outputs - targets) / outputs.shape[1]

    return make


def jacobian(model, x):
    """∂f/∂θ [C, P] of one example, an output at a time."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for output in model(x[None])[0]:
        parts = torch.autograd.grad(output, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", MODELS)
def test_every_structure_is_that_of_explicit_jacobians(name, made, close):
    model, risk, j, residual = made(name)
    rest = Layers.of(risk).rest
    assert MODELS[name][1] is None or rest == MODELS[name][1]
    g = torch.einsum("ncp,nc->np", j, residual)
    matrices = {GGN(): torch.einsum("ncp,ncq->pq", j, j) * 2 / j.shape[1] / EXAMPLES,
                EmpiricalFisher(): g.T @ g / EXAMPLES}  # fmt: skip
    for kind, exact in matrices.items():
        assert exact.diagonal().min() >= 0
        close(estimate(kind, Dense(), risk).curvature.dense(), exact)
        close(estimate(kind, Diagonal(), risk).curvature.values, exact.diagonal())
        close(estimate(kind, LowRank(Rank(400)), risk).curvature.dense(), exact, 1e-8)
        corrected = estimate(kind, EKFAC(), risk).curvature
        assert corrected.trace() == pytest.approx(float(exact.trace()))
        plain = estimate(kind, Kronecker(), risk).curvature
        diagonal = plain.diagonal
        close(diagonal[diagonal != 0], exact.diagonal()[diagonal != 0])
        factored = {layer.weight for layer in plain.layers}
        assert factored == {
            name for name, p in model.named_parameters()
            if p.requires_grad and p.ndim == 2 and "embed" not in name and ".wte" not in name and ".wpe" not in name
        }


def test_factors_of_a_layer_are_those_of_its_inputs_and_outputs(made, close):
    """The fused q, k, v of GPT-2, whose weight is [in, out]."""
    model, risk, _, residual = made("GPT-2")
    layer = model.inner.transformer.h[0].attn.c_attn
    seen = {}
    layer.register_forward_hook(lambda _, args, out: seen.update(a=args[0].detach(), z=out))
    index = torch.cat([x for x, _ in risk])
    (b,) = torch.autograd.grad((model(index) * residual).sum(), seen["z"])
    a = torch.cat([seen["a"], torch.ones(EXAMPLES, STEPS, 1).double()], dim=2)
    found = estimate(EmpiricalFisher(), Kronecker(), risk).curvature
    (place,) = [one for one in found.layers if one.weight.endswith("c_attn.weight")]
    close(place.terms[0].a, torch.einsum("nti,ntj->ij", a, a) / (EXAMPLES * STEPS))
    close(place.terms[0].g, torch.einsum("nti,ntj->ij", b, b) / EXAMPLES)
    parts = found.product(torch.ones(found.size).double())
    weight = dict(zip(risk.space.names, risk.space.split(parts)))[place.weight]
    close(weight, (place.terms[0].g @ torch.ones(12, 5).double() @ place.terms[0].a)[:, :4].T)


def test_what_enters_the_layers_of_gpt2_is_protected(made):
    """The span of (a, 1) over tokens, from explicit inputs, also where the weight is [in, out]."""
    model, risk, *_ = made("GPT-2")
    layers = {name: layer for name, layer in model.named_modules() if type(layer).__name__ == "Conv1D"}
    seen = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, args, out, name=name: seen.update({name: args[0].detach().flatten(0, 1)}))
    with torch.no_grad():
        model(torch.cat([x for x, _ in risk]))
    space = ProtectedSpace().absorb(risk, InputSpace(Energy(1.0, most_pairs=100)))
    assert {*space.blocks} == {*layers}
    for name, inputs in seen.items():
        exact = torch.linalg.qr(torch.cat([inputs, torch.ones(len(inputs), 1).double()], dim=1).T)[0].T
        assert principal_angles(space.blocks[name].subspace.rows, exact).max() < 1e-6
    others = {name for name in risk.space.names if name.rpartition(".")[0] not in layers}
    assert {*space.held.names} == others
    assert {name.split(".")[-2] for name in others} == {"wte", "wpe", "ln_1", "ln_2", "ln_f"}
