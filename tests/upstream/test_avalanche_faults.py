"""Faults of Avalanche that this package works around or says beside its tables. A test that fails here says that
Avalanche is mended: take out the workaround or the note that its docstring names, and the test."""

import csv
import os

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

pytest.importorskip("avalanche")


def weights(strategy):
    return torch.cat([p.detach().flatten() for p in strategy.model.parameters()])


def dropout():
    return nn.Sequential(nn.Linear(2, 5), nn.Dropout(0.5), nn.Linear(5, 4))


def test_a_checkpoint_cannot_be_saved(fit_pairs, tmp_path):
    """Worked around in avalanche_curv/checkpointing.py. torch.optim deletes the names of its submodules, so that dill
    does not find an optimizer's class by its name."""
    from avalanche.checkpointing import save_checkpoint

    assert not hasattr(torch.optim, "sgd")
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(fit_pairs(), tmp_path / "checkpoint.pkl")


def test_ewc_squares_the_gradients_of_mini_batch_means(fit_pairs, two_pairs):
    """Said in benchmarks/strategies.py; `BatchedEmpiricalFisher` is for comparisons with it."""
    from avalanche.training.plugins import EWCPlugin

    plugin = EWCPlugin(0.0)
    strategy = fit_pairs(plugin)
    inputs, targets, *_ = zip(*two_pairs.train_stream[1].dataset)
    batches = zip(torch.stack(inputs).split(8), torch.tensor(targets).split(8))
    parameters = list(strategy.model.parameters())
    rows = [torch.autograd.grad(cross_entropy(strategy.model(x), y), parameters) for x, y in batches]
    squares = [torch.cat([part.flatten() for part in row]) ** 2 for row in rows]
    found = torch.cat([importance.data.flatten() for importance in plugin.importances[1].values()])
    torch.testing.assert_close(found, torch.stack(squares).mean(0))


def test_synaptic_intelligence_has_no_effect_on_a_cpu(fit_pairs):
    """Worked around in benchmarks/methods/penalties.py (`FixedSI`): its stored weights alias the live ones."""
    from avalanche.training.plugins import SynapticIntelligencePlugin

    assert torch.equal(weights(fit_pairs(SynapticIntelligencePlugin(1e4))), weights(fit_pairs()))


def test_mas_takes_a_loss_of_zero_for_none(fit_pairs):
    """Worked around in benchmarks/methods/penalties.py (`MAS`)."""
    from avalanche.training.plugins import MASPlugin

    class Zero(nn.Module):
        def forward(self, outputs, targets):
            return 0 * outputs.sum()

    with pytest.raises(ValueError, match="Loss is not available"):
        fit_pairs(MASPlugin(0.1), criterion=Zero())


def test_mas_measures_importance_with_dropout(fit_pairs, make):
    """Said in benchmarks/strategies.py."""
    from avalanche.training.plugins import MASPlugin

    model, seen = make(dropout), []
    plugin = MASPlugin(0.1)
    inner = plugin._get_importance
    plugin._get_importance = lambda strategy: (inner(strategy), seen.append(strategy.model.training))[0]
    fit_pairs(plugin, model=model, epochs=1)
    assert all(seen)


def test_rwalk_trains_in_eval_mode_and_is_nan_after_few_steps(fit_pairs, seen_at):
    """Worked around in benchmarks/methods/penalties.py (`RWalk`), the second; the first is said in
    benchmarks/strategies.py."""
    from avalanche.training.plugins import RWalkPlugin

    assert not any(seen_at("after_forward", lambda strategy: strategy.model.training, RWalkPlugin()))
    assert not torch.isfinite(weights(fit_pairs(RWalkPlugin(), epochs=1))).all()


def test_the_teacher_of_lwf_stays_in_train_mode(fit_pairs, make):
    """Said in benchmarks/strategies.py."""
    from avalanche.training.plugins import LwFPlugin

    plugin, x = LwFPlugin(), torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    fit_pairs(plugin, model=make(dropout), epochs=1)
    assert not torch.equal(plugin.lwf.prev_model(x), plugin.lwf.prev_model(x))


def test_der_replays_nothing_while_its_memory_is_smaller_than_the_batch(seen_at):
    """Said in benchmarks/strategies.py."""
    from avalanche.training import DER

    def sizes(memory):
        return set(seen_at("after_forward", lambda strategy: len(strategy.mb_x), kind=DER, mem_size=memory))

    assert sizes(7) == {8}
    assert sizes(8) == {8, 16}


def test_icarl_averages_a_class_over_its_images_and_their_mirror_images():
    """Said in benchmarks/strategies.py."""
    from types import SimpleNamespace

    from avalanche.training.supervised.icarl import _ICaRLPlugin

    plugin = _ICaRLPlugin(4, None, True)
    image = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    plugin.x_memory, plugin.y_memory, plugin.embedding_size = [image], [[0]], 4
    classifier = SimpleNamespace(replace_class_means_dict=lambda means: None)
    model = SimpleNamespace(feature_extractor=nn.Flatten(), eval_classifier=classifier)
    experience = SimpleNamespace(benchmark=SimpleNamespace(n_classes_per_exp=[1, 1]))
    plugin.compute_class_means(SimpleNamespace(experience=experience, device="cpu", model=model))
    torch.testing.assert_close(plugin.class_means[0], torch.tensor([0.5**0.5, 0.5**0.5, 0.0, 0.0]))
    assert plugin.class_means[1].norm() == 0


def test_an_evaluation_moves_the_random_state(fit_pairs, two_pairs):
    """Worked around in avalanche_curv/plugins/_batches.py and core/risk/batches.py: passes of ours draw nothing."""
    strategy = fit_pairs(epochs=1)
    before = torch.get_rng_state()
    strategy.eval(two_pairs.train_stream[:1])
    assert not torch.equal(torch.get_rng_state(), before)


def test_a_masked_multi_head_does_not_take_the_classes_of_a_timeline(two_pairs):
    """Worked around in avalanche_curv/streams/_benchmark.py: experiences know their classes as lists, where
    `with_classes_timeline` gives sets."""
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.scenarios.supervised import with_classes_timeline
    from avalanche.benchmarks.scenarios.task_aware import with_task_labels
    from avalanche.models import MultiHeadClassifier

    sets = [experience.dataset for experience in two_pairs.train_stream]
    stream = with_classes_timeline(with_task_labels(benchmark_from_datasets(train=sets))).train_stream
    with pytest.raises(IndexError):
        MultiHeadClassifier(2, masking=True).adaptation(stream[0])


def test_the_csv_logger_drops_metrics_that_it_does_not_know(learner, train, two_pairs, make, tmp_path):
    """Worked around in avalanche_curv/loggers.py (`JSONLLogger`)."""
    from avalanche.evaluation.metrics import cpu_usage_metrics
    from avalanche.logging import CSVLogger

    logger = CSVLogger(str(tmp_path))
    model = make(lambda: nn.Linear(2, 4))
    train(learner(model, metrics=[cpu_usage_metrics(epoch=True)], loggers=[logger]), two_pairs.train_stream[:1])
    logger.close()
    rows = [row for name in os.listdir(tmp_path) for row in csv.reader((tmp_path / name).open())]
    assert not any("CPU" in cell for row in rows for cell in row)
