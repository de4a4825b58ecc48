"""Every strategy by name, in every scenario it claims, and what the tables say of it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.harness import UsageError
from benchmarks.strategies import STRATEGIES, chosen

STEPS, BATCH, EXAMPLES, FRACTION = 3, 8, 40, 0.25
FEATURES, HIDDEN = 64, 8
OUTPUTS = {"task": 2, "domain": 2, "class": 10}
NO_EFFECT = {"task": {"Naive"}, "domain": {"Naive", "SI"}, "class": {"Naive", "SI"}}


@pytest.fixture(scope="module")
def streams(stream_of):
    """scenario ↦ two experiences of two digits each."""
    from avalanche_curv import SplitDigits

    parts = [list(e.dataset.eval())[:EXAMPLES] for e in SplitDigits(5, seed=0).train_stream[:2]]
    pairs = [(torch.stack([item[0] for item in part]), torch.tensor([item[1] for item in part])) for part in parts]
    binary = [(inputs, (targets == targets.max()).long()) for inputs, targets in pairs]
    return {"task": stream_of(binary, [0, 1]), "domain": stream_of(binary), "class": stream_of(pairs)}


@pytest.fixture(scope="module")
def network(make):
    """network(scenario): a small one, always with the same weights."""

    def build(scenario):
        from avalanche.models import MTSimpleMLP

        def heads():
            return MTSimpleMLP(input_size=FEATURES, hidden_size=HIDDEN)

        def one_head():
            outputs = OUTPUTS[scenario]
            return nn.Sequential(nn.Flatten(), nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs))

        return make(heads if scenario == "task" else one_head)

    return build


@pytest.fixture(scope="module")
def run(streams, network, train):
    """run(method, scenario, ...) -> the strategy, trained on both experiences."""
    from avalanche.training.plugins import EvaluationPlugin

    from benchmarks.methods import Learner
    from benchmarks.training import Steps

    def trained(method, scenario, *plugins, steps=STEPS, batch=BATCH, model=None):
        model = model or network(scenario)
        learner = Learner(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5),
            criterion=nn.CrossEntropyLoss(),
            batch=batch,
            epochs=steps,
            examples=2 * EXAMPLES,
            classes=OUTPUTS[scenario],
            evaluator=EvaluationPlugin(loggers=[]),
            plugins=[*plugins, Steps(steps)],
        )
        stream = streams[scenario].train_stream
        return train(method.build(learner), [stream] if method.joint else stream, eval_streams=[])

    return trained


@pytest.fixture
def watch():
    """watch(hook, look) -> a plugin whose list `seen` has what `look(strategy)` gave at each call of the hook."""
    from avalanche.training.plugins import SupervisedPlugin

    def plugin(hook, look):
        watcher = SupervisedPlugin()
        watcher.seen = []
        setattr(watcher, hook, lambda strategy, **kwargs: watcher.seen.append(look(strategy)))
        return watcher

    return plugin


def weights(strategy):
    return torch.cat([p.detach().flatten() for p in strategy.model.parameters()])


@pytest.mark.parametrize("scenario", OUTPUTS)
def test_strategies_start_alike_repeat_themselves_and_differ_from_naive_where_they_claim_to_run(
    run, streams, network, watch, scenario
):
    from benchmarks.methods import methods

    naive, by_name = weights(run(methods(FRACTION)["Naive"], scenario)), methods(FRACTION)
    assert list(by_name) == list(STRATEGIES)
    initial = torch.cat([p.detach().flatten() for p in network(scenario).parameters()])
    for name, entry in STRATEGIES.items():
        if scenario in entry.unfit:
            assert len(entry.unfit[scenario]) > 20, name
            continue
        watcher = watch("before_training_iteration", weights)
        found = run(by_name[name], scenario, watcher)
        assert torch.equal(watcher.seen[0][: len(initial)], initial), name
        assert torch.isfinite(weights(found)).all(), name
        assert torch.equal(weights(found), naive) == (name in NO_EFFECT[scenario]), name
        if "CurvatureEWC" in name:  # plugins are tested by themselves
            continue
        if scenario == next(one for one in OUTPUTS if one not in entry.unfit):
            assert torch.equal(weights(found), weights(run(by_name[name], scenario))), name
        found.eval(streams[scenario].test_stream)


def test_an_unknown_strategy_is_answered_with_the_nearest_one():
    with pytest.raises(UsageError, match="did you mean 'EWC online'"):
        chosen("class", ["EWC onlime"])


def test_facts_about_strategies_cost_no_import_of_torch_or_avalanche():
    code = "import sys, benchmarks.strategies; print([m for m in ('torch', 'avalanche') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "[]", done.stderr


def test_a_strength_is_replaced_where_there_is_one_and_every_grid_has_one_to_replace():
    from benchmarks.methods import GDumb, methods

    for name, method in methods(0.1).items():
        for strength in STRATEGIES[name].grid:
            assert method.with_strength(strength).strength == strength, name
    with pytest.raises(TypeError, match="no strength"):
        GDumb(0.1).with_strength(1.0)


def test_fixed_si_follows_the_equations_of_its_paper_step_by_step(run, streams, network, watch):
    from benchmarks.methods import FixedSI

    batches = watch("after_forward", lambda strategy: (strategy.mb_x.clone(), strategy.mb_y.clone()))
    c, damping = 5.0, 0.1
    strategy = run(FixedSI(c, damping), "class", batches)

    model = network("class")
    theta = [p.detach().clone() for p in model.parameters()]
    omega, anchor, velocity = ([torch.zeros_like(p) for p in theta] for _ in range(3))
    for experience in range(2):
        start, path = [p.clone() for p in theta], [torch.zeros_like(p) for p in theta]
        for x, y in batches.seen[experience * STEPS : (experience + 1) * STEPS]:
            at = [p.clone().requires_grad_() for p in theta]
            task = cross_entropy(torch.func.functional_call(model, dict(zip(dict(model.named_parameters()), at)), x), y)
            surrogate = sum((o * (a - p) ** 2).sum() for o, a, p in zip(omega, anchor, at))
            of_task = torch.autograd.grad(task, at, retain_graph=True)
            of_both = torch.autograd.grad(task + c * surrogate, at)
            velocity = [0.5 * v + g for v, g in zip(velocity, of_both)]
            moved = [p - 0.1 * v for p, v in zip(theta, velocity)]
            path = [w - g * (new - old) for w, g, new, old in zip(path, of_task, moved, theta)]
            theta = moved
        raw = [o + w / ((p - s) ** 2 + damping) for o, w, p, s in zip(omega, path, theta, start)]
        omega, anchor = [value.relu() for value in raw], theta
    torch.testing.assert_close(list(strategy.model.parameters()), theta, rtol=1e-4, atol=1e-6, check_stride=False)
    torch.testing.assert_close(list(strategy.plugins[0].importance.values()), omega, rtol=1e-3, atol=1e-6)


def test_the_path_integral_of_small_steps_is_the_drop_of_the_loss(streams, network, learner, watch):
    """Zenke et al. 2017, equation 3: Σ_k ω_k = L(start) − L(end) along a gradient flow."""
    from benchmarks.methods import PathIntegral

    plugin, model = PathIntegral(0.0, damping=1e-12), network("class")
    experience = streams["class"].train_stream[0]
    inputs, targets = torch.stack([i[0] for i in experience.dataset]), torch.tensor(list(experience.dataset.targets))
    before = cross_entropy(model(inputs), targets).item()
    path = watch("after_training_epoch", lambda strategy: sum(w.sum().item() for w in plugin.path.values()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002)
    strategy = learner(model, plugin, path, optimizer=optimizer, train_mb_size=EXAMPLES, train_epochs=50)
    strategy.train(experience, eval_streams=[])
    drop = before - cross_entropy(model(inputs), targets).item()
    assert drop > 0.01
    assert path.seen[-1] == pytest.approx(drop, rel=0.02)


def test_an_importance_of_fixed_si_is_never_negative():
    from types import SimpleNamespace

    from benchmarks.methods import PathIntegral

    plugin, strategy = PathIntegral(1.0, damping=0.5), SimpleNamespace(model=nn.Linear(1, 2, bias=False))
    plugin.before_training_exp(strategy)
    plugin.path["weight"] = torch.tensor([[-1.0], [2.0]])
    plugin.after_training_exp(strategy)
    torch.testing.assert_close(plugin.importance["weight"], torch.tensor([[0.0], [4.0]]))


def test_stored_bytes_are_the_examples_and_tensors_that_each_method_keeps(run, network):
    from benchmarks.methods import methods
    from benchmarks.storage import stored_bytes

    image, parameters = 4 * FEATURES, 4 * sum(p.numel() for p in network("class").parameters())
    kept = round(FRACTION * 2 * EXAMPLES)
    reservoir = 4 * 2 * EXAMPLES
    known = {
        "Naive": 0,
        "Cumulative": 2 * EXAMPLES * image,
        "JointTraining": 2 * EXAMPLES * image,
        "Replay": kept * image,
        "GDumb": kept * image + parameters,
        "DER": kept * (image + 4 * OUTPUTS["class"]),
        "iCaRL": kept * (image + 4) + parameters + 3 * 4 * OUTPUTS["class"] * HIDDEN,  # means thrice
        "GEM": kept * (image + 16) + parameters,
        "AGEM": kept * image + parameters,
        "EWC": 4 * parameters,
        "EWC online": 2 * parameters,
        "MAS": 2 * parameters,
        "SI fixed": 2 * parameters,
        "LwF": parameters,
    }
    for name, size in known.items():
        found = stored_bytes(run(methods(FRACTION)[name], "class"))
        assert size <= found <= size + (reservoir if name in ("Replay", "GDumb", "DER") else 0), name


def test_a_model_is_split_before_its_last_linear_layer(network):
    from benchmarks.methods.rehearsal import split

    model, whole = network("class"), network("class")
    features, classifier = split(model)
    inputs = torch.rand(3, FEATURES)
    assert features(inputs).shape == (3, HIDDEN)
    torch.testing.assert_close(classifier(features(inputs)), whole(inputs))
    with pytest.raises(ValueError, match="none inside"):
        split(nn.Linear(2, 2))
