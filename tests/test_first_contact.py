"""What a newcomer types: reprs, signatures, and names and arguments of other libraries."""

import inspect
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from avalanche.training import Naive
from avalanche.training.plugins import ReplayPlugin
from torch import nn
from torch.utils.data import TensorDataset

import avalanche_curv
from avalanche_curv import (
    GGN,
    L2,
    AdaptiveRefresh,
    AfterTask,
    CurvatureEWC,
    CurvatureEWCPlugin,
    CurvatureRegularizer,
    Diagonal,
    EmpiricalRisk,
    Energy,
    Evidence,
    Fisher,
    GradientProjection,
    InputSpace,
    Kronecker,
    LowRank,
    Merge,
    MitigatorPlugin,
    OrthogonalProjection,
    OrthogonalProjectionPlugin,
    Past,
    Projector,
    ProtectedSpace,
    ReDO,
    Refresh,
    ShrinkAndPerturb,
    SpectralReg,
    SpectralRegPlugin,
    StepProjection,
    WarnIfUnstable,
    alignment,
    curvature_drift,
    estimate,
    fidelity_metrics,
    landscape,
    save_checkpoint,
    weight_spectra,
)
from avalanche_curv.core import hints
from avalanche_curv.core.quadratic.adaptive import AdaptivePast
from avalanche_curv.core.quadratic.policies import RefreshEvent


def made(kind, **given):
    model = nn.Linear(3, 2)
    return kind(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **given)


def risk_of(examples=4):
    batches = [(torch.ones(examples, 3), torch.zeros(examples, dtype=torch.long))]
    return EmpiricalRisk.snapshot(nn.Linear(3, 2), nn.CrossEntropyLoss(), batches)


def shown():
    refreshed = AdaptivePast(experiences=2, refreshes=(RefreshEvent(1, 5, "error", 1.0, 0.5),))
    past = Refresh().absorb(Past(), risk_of(), Fisher(), Diagonal())
    options = {"curvature": GGN(), "structure": Kronecker(), "policy": AdaptiveRefresh(fraction=0.5)}
    space = ProtectedSpace().absorb(risk_of(), InputSpace())
    chosen = made(CurvatureEWC, strength=Evidence())
    chosen.strength = 12.3456
    return {
        "CurvatureEWCPlugin(strength=1.0, curvature=GGN(), structure=Kronecker(), "
        "policy=AdaptiveRefresh(fraction=0.5))": CurvatureEWCPlugin(1, **options),
        "CurvatureEWCPlugin(strength=2.0, guard=None, past=Past(1 experience), include=('head', Linear))":
            CurvatureEWCPlugin(2.0, guard=None, past=past, include=["head", nn.Linear]),
        "CurvatureRegularizer(strength=Evidence(first=3.0), guard=None)":
            CurvatureRegularizer(Evidence(3), guard=None),
        "CurvatureEWC(strength=Evidence() at 12.35)": chosen,
        "CurvatureEWC(strength=3.0, policy=Merge(decay=0.5))": made(CurvatureEWC, strength=3, policy=Merge(0.5)),
        "OrthogonalProjection(projection=GradientProjection(), max_rank=5)":
            made(OrthogonalProjection, projection=GradientProjection(), max_rank=5),
        "OrthogonalProjectionPlugin(protect=InputSpace(cuts=Energy(fraction=0.9)))":
            OrthogonalProjectionPlugin(InputSpace(Energy(0.9))),
        "SpectralReg(strength=0.1)": made(SpectralReg, strength=0.1),
        "SpectralRegPlugin(strength=0.1, every=3)": SpectralRegPlugin(0.1, every=3),
        "MitigatorPlugin(mitigator=L2(strength=0.5))": MitigatorPlugin(L2(0.5)),
        "ReDO(every=10)": ReDO(every=10),
        "ShrinkAndPerturb(shrink=0.1, noise=0.2, when=AfterTask())": ShrinkAndPerturb(0.1, 0.2, when=AfterTask()),
        "FidelityMetric(every=5, curvature=Fisher(), fraction=0.1, seed=0)": fidelity_metrics(every=5)[0],
        "Past()": Past(),
        "Past(2 experiences, 1 refresh)": refreshed,
        "QuadraticModel(8 parameters, DiagonalMatrix(8 × 8, 32.0 B))": estimate(Fisher(), Diagonal(), risk_of()),
        "EmpiricalRisk(4 examples, CrossEntropy of Linear, 8 parameters)": risk_of(),
        "ProtectedSpace()": ProtectedSpace(),
        "Projector(space=ProtectedSpace(1 experience, 2 of 8 dimensions), projection=StepProjection())":
            Projector(space, StepProjection()),
    }  # fmt: skip


@pytest.mark.parametrize(("text", "value"), shown().items(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_repr_is_one_line_of_what_was_chosen(text, value):
    assert repr(value) == text


def test_the_repr_of_a_risk_makes_no_pass_over_its_data():
    passes = []

    class Loader:
        def __iter__(self):
            passes.append(1)
            yield torch.ones(2, 3), torch.zeros(2, dtype=torch.long)

    risk = EmpiricalRisk.snapshot(nn.Linear(3, 2), nn.CrossEntropyLoss(), Loader())
    before = len(passes)
    assert repr(risk) == "EmpiricalRisk(examples to be loaded, CrossEntropy of Linear, 8 parameters)"
    assert len(passes) == before


def test_signatures_show_what_avalanche_takes_with_its_defaults():
    theirs = inspect.signature(Naive).parameters
    for kind in (CurvatureEWC, OrthogonalProjection, SpectralReg):
        own = inspect.signature(kind).parameters
        assert own.keys() >= theirs.keys() - {"base_kwargs"}
        assert all(own[name].default == theirs[name].default for name in theirs.keys() - {"base_kwargs", "criterion"})
        assert isinstance(own["criterion"].default, nn.CrossEntropyLoss)
        assert not any(p.kind is p.VAR_KEYWORD for p in own.values())
    text = pydoc.render_doc(CurvatureEWC, renderer=pydoc.plaintext)
    head = next(line for line in text.splitlines() if "CurvatureEWC(*" in line)
    wanted = ("strength", "curvature", "structure", "policy", "criterion", "train_mb_size", "train_epochs", "device")
    assert all(f"{name}: " in head for name in (*wanted, "plugins", "evaluator", "eval_every"))


WRONG = [
    (lambda: made(CurvatureEWC, ewc_lambda=1), "no argument ewc_lambda.* is `strength`: Avalanche's ewc_lambda is str"),
    (lambda: made(CurvatureEWC, strength=1, train_mbsize=2), "CurvatureEWC.. takes no argument train_mbsize. Did you"),
    (lambda: made(CurvatureEWC, strength=1, epochs=2), "number of epochs is `train_epochs`"),
    (lambda: made(OrthogonalProjection, threshold=0.9), r"protect=InputSpace\(Energy"),
    (lambda: CurvatureEWCPlugin(importance=1), "The strength of a penalty is `strength`"),
    (lambda: CurvatureEWCPlugin(1, mode="online"), r"Online EWC is policy=Merge\(decay=0.9\)"),
    (lambda: CurvatureEWCPlugin(1, strenght=1), r"CurvatureEWCPlugin\(\) takes no argument strenght. Did you mean str"),
    (lambda: CurvatureEWCPlugin(1, zzz=1), "no argument zzz. It takes batch_size, curvature, examples_per_"),
    (lambda: L2(lambda_=1), r"L2\(\) takes no argument lambda_. The strength"),
    (lambda: SpectralRegPlugin(lambda_=1), r"SpectralRegPlugin\(\) takes no argument lambda_"),
    (lambda: fidelity_metrics(curvatur=GGN()), r"fidelity_metrics\(\) takes no argument curvatur. Did you mean curvat"),
    (lambda: CurvatureEWCPlugin(1, curvature=GGN), r"be a Curvature; got the class GGN. Did you mean GGN\(\)\?"),
    (lambda: CurvatureEWCPlugin(1, structure=LowRank), r"Did you mean LowRank\(\.\.\.\)\?"),
    (lambda: CurvatureEWCPlugin(1, guard=WarnIfUnstable), r"Did you mean WarnIfUnstable\(\)\?"),
    (lambda: made(CurvatureEWC, strength=1, policy=Merge), r"Did you mean Merge\(\)\?"),
    (lambda: made(CurvatureEWC, strength=1, plugins=[CurvatureEWC]), r"Give its plugin, such as CurvatureEWCPlugin"),
    (lambda: made(CurvatureEWC, strength=1, plugins=[ReplayPlugin]), r"Did you mean ReplayPlugin\("),
    (lambda: made(CurvatureEWC, strength=1, plugins=ReplayPlugin(9)), r"must be a list of plugins"),
    (lambda: made(CurvatureEWC, strength=1, plugins=[L2(1)]), r"Did you mean MitigatorPlugin\(L2\(strength=1.0\)\)"),
    (lambda: made(SpectralReg, strength=1, plugins=fidelity_metrics()), r"evaluator=EvaluationPlugin"),
    (lambda: CurvatureEWC(model=[], optimizer=None, strength=1), r"model must be a Module; got \[\]"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "said"), WRONG, ids=range(len(WRONG)))
def test_an_argument_that_is_none_leads_to_the_one_that_is_meant(make, said):
    with pytest.raises(TypeError, match=said):
        make()


MODEL, CE = nn.Linear(3, 2), nn.CrossEntropyLoss()
X, Y = torch.ones(4, 3), torch.tensor([0, 1, 0, 1])
BATCHES, RISK = [(X, Y)], EmpiricalRisk.snapshot(MODEL, CE, [(X, Y)])
ORDER = r"EmpiricalRisk.snapshot\(model, criterion, batches\) takes a module, .*, in this order; got "
snapshot = EmpiricalRisk.snapshot

GIVEN = [
    (lambda: estimate(Diagonal(), GGN(), RISK), r"estimate\(curvature, structure, risk\) takes these in this order"),
    (lambda: estimate(RISK, GGN(), Diagonal()), r"in this order; got EmpiricalRisk\(4 examples"),
    (lambda: estimate(GGN, Diagonal(), RISK), r"got the class GGN. Did you mean GGN\(\)\?"),
    (lambda: estimate(GGN(), Diagonal(), MODEL), "risk must be an EmpiricalRisk; got Linear"),
    (lambda: estimate(GGN(), Diagonal(), RISK, grad=True), "no argument grad. Did you mean gradient"),
    (lambda: Merge().absorb(RISK, Past(), GGN(), Diagonal()), r"Merge.absorb\(past, risk, curvature, struct"),
    (lambda: AdaptiveRefresh().absorb(Past(), RISK, Diagonal(), GGN()), "absorb.* in this order"),
    (lambda: ProtectedSpace().absorb(InputSpace(), RISK), r"absorb\(risk, protection\) takes these in this order"),
    (lambda: estimate(GGN(), Diagonal(), RISK).penalty(X), "model must be a Module; got <Tensor>"),
    (lambda: RISK.value_at(MODEL), "parameters must be a Tensor; got Linear"),
    (lambda: RISK.subset(5, 0), r"fraction must lie in \(0, 1\]; got 5"),
    (lambda: landscape(GGN(), MODEL), "risk must be an EmpiricalRisk"),
    (lambda: curvature_drift(RISK, RISK), "then must be a Landscape"),
    (lambda: alignment(RISK, X), "vector must be a Tensor"),
    (lambda: weight_spectra(X), "model must be a Module"),
    (lambda: snapshot(BATCHES, CE, MODEL), ORDER + r"<list>, CrossEntropyLoss\(\), Linear"),
    (lambda: snapshot(CE, MODEL, BATCHES), ORDER),
    (lambda: snapshot(MODEL, BATCHES, CE), ORDER),
    (lambda: snapshot(nn.Linear, CE, BATCHES), r"Did you mean Linear\(\.\.\.\)\?"),
    (lambda: snapshot(made(CurvatureEWC, strength=1), CE, BATCHES), "Give the model of the strategy"),
    (lambda: snapshot(MODEL, CE, BATCHES, includ=["a"]), "no argument includ. Did you mean include"),
    (lambda: snapshot(MODEL, nn.TripletMarginLoss(), BATCHES), r"cannot be called .* in two lines:\n    criterion ="),
    (lambda: snapshot(MODEL, nn.CrossEntropyLoss, BATCHES), r"Did you mean nn.CrossEntropyLoss\(\)\?"),
    (lambda: snapshot(MODEL, "mse_loss", BATCHES), r"Did you mean nn.MSELoss\(\)\?"),
    (lambda: snapshot(MODEL, nn.NLLLoss(), BATCHES), r"or give its logits to nn.CrossEntropyLoss"),
    (lambda: snapshot(MODEL, CE, X), r"a list or a loader; got a Tensor of shape \(4, 3\). Give \[\(inputs"),
    (lambda: snapshot(MODEL, CE, (X, Y)), r"got a Tensor of shape \(4, 3\). Put a pair in a list"),
    (lambda: snapshot(MODEL, CE, [[*torch.ones(784, 3)]]), "got a list of 784, the first a Tensor"),
    (lambda: snapshot(MODEL, CE, TensorDataset(X, Y)), r"single example .*DataLoader\(dataset, batch_size=64\)"),
    (lambda: snapshot(MODEL, CE, None), "pairs .* in a list or a loader; got NoneType"),
    (lambda: snapshot(MODEL, nn.MSELoss(), BATCHES), r"got classes, torch.int64.*CrossEntropyLoss.*one_hot\(tar"),
    (lambda: made(CurvatureEWC, strength=1, criterion="cross_entropy"), r"Did you mean nn.CrossEntropyLoss\(\)\?"),
    (lambda: made(OrthogonalProjection, criterion=nn.CrossEntropyLoss), r"Did you mean nn.CrossEntropyLoss\(\)\?"),
    (lambda: made(CurvatureEWC, strength=1, train_mb_size="64"), "train_mb_size must be an integer of at least 1"),
    (lambda: made(CurvatureEWC, strength=1, evaluator=fidelity_metrics()), r"Give EvaluationPlugin\(\*metrics\)"),
    (lambda: MitigatorPlugin(CurvatureEWC), "mitigator must be a Mitigator; got the class CurvatureEWC. Give a value"),
    (lambda: fidelity_metrics(stream="test"), r"got 'test'. Did you mean stream=benchmark.test_stream\?"),
    (lambda: fidelity_metrics(stream=[X]), "must be a stream of experiences; got .*Give benchmark.test_stream"),
    (lambda: fidelity_metrics(of=made(CurvatureEWC, strength=1)), "of must be a CurvatureEWCPlugin.*strategy.ewc"),
    (lambda: fidelity_metrics(curvature=GGN), r"Did you mean GGN\(\)\?"),
    (lambda: save_checkpoint("path", made(CurvatureEWC, strength=1)), r"save_checkpoint\(strategy, path\) takes"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "said"), GIVEN, ids=range(len(GIVEN)))
def test_arguments_are_checked_where_they_are_given(call, said):
    with pytest.raises((TypeError, ValueError), match=said):
        call()


def test_names_from_elsewhere_lead_to_ours():
    with pytest.raises(ImportError, match=r"^KFAC is structure=Kronecker\(\)"):
        from avalanche_curv import KFAC  # noqa: F401
    with pytest.raises(AttributeError, match=r"no attribute 'GPM'. GPM is OrthogonalProjection\(protect=InputSpace"):
        _ = avalanche_curv.GPM
    with pytest.raises(AttributeError, match=r"no attribute 'CurvatureEwc'. Did you mean CurvatureEWC\?"):
        _ = avalanche_curv.CurvatureEwc
    assert not hasattr(avalanche_curv, "OnlineEWC")
    from avalanche_curv import strategies  # a module that is not imported by the package is found as before

    assert strategies.CurvatureEWC is CurvatureEWC


def test_what_hints_name_exists():
    known = {name.lower() for name in avalanche_curv.__all__}
    assert not known & hints.NAMES.keys()
    for remedy in (*hints.NAMES.values(), *(meaning for _, meaning in hints.ARGUMENTS.values())):
        for name in re.findall(r"\b([A-Z][A-Za-z]+)\(", remedy.replace("torch.optim.SGD(", "").replace("nn.Cross", "")):
            assert name == "EntropyLoss" or hasattr(avalanche_curv, name), name


SNIPPET = """
import torch
from torch import nn
from avalanche_curv import GGN, CurvatureEWC, CurvatureEWCPlugin, EmpiricalRisk, Kronecker, Merge, estimate
model = nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
CurvatureEWC(model=model, optimizer=optimizer, strength=1.0, train_mb_size=4, evaluator=None, eval_every=1)
CurvatureEWCPlugin(1.0, curvature=GGN(), structure=Kronecker(), policy=Merge(0.9))
CurvatureEWC(model=model, optimizer=optimizer, strength=1.0, train_mbsize=4)
CurvatureEWC(model=model, optimizer=optimizer, strength=1.0, train_epochs="4")
CurvatureEWC(model=model, optimizer=optimizer, strength=1.0, curvature=GGN)
CurvatureEWCPlugin(1.0, structure=Kronecker)
CurvatureEWCPlugin(1.0, policy=Merge)
estimate(Kronecker(), GGN(), EmpiricalRisk.snapshot(model, nn.MSELoss(), [(torch.ones(1, 2), torch.ones(1, 2))]))
"""


@pytest.mark.slow
def test_mypy_refuses_what_the_constructor_refuses(tmp_path):
    path = tmp_path / "snippet.py"
    path.write_text(SNIPPET)
    root = Path(avalanche_curv.__file__).parents[1]
    mypy = [sys.executable, "-m", "mypy", "--config-file", str(root / "pyproject.toml"), str(path)]
    found = subprocess.run(mypy, capture_output=True, text=True, cwd=root).stdout
    assert sorted({int(n) for n in re.findall(r"snippet.py:(\d+): error", found)}) == [9, 10, 11, 12, 13, 14]
