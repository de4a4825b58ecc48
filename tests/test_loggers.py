import copy
import json
import math
import pickle

import dill
import numpy as np
import pytest
import torch
from avalanche.evaluation.metric_results import AlternativeValues, MetricValue
from avalanche.evaluation.metrics import accuracy_metrics, confusion_matrix_metrics, loss_metrics
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin
from torch import nn

from avalanche_curv.checkpointing import load_checkpoint, save_checkpoint
from avalanche_curv.loggers import JSONLLogger
from avalanche_curv.streams import SineBoundary


def records(path):
    return [json.loads(line, parse_constant=_not_json) for line in path.read_text().splitlines()]


def _not_json(token):
    raise AssertionError(f"{token} is not JSON")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "folder" / "metrics.jsonl"


@pytest.mark.parametrize(
    "value", [2, 2.0, np.float32(2), np.int64(2), torch.tensor(2.0), np.array(2.0), AlternativeValues("two", 2.0)]
)
def test_every_kind_of_scalar_becomes_one_record(path, value):
    logger = JSONLLogger(path)
    logger.log_metrics([MetricValue(None, "curvature/trace", value, 7)])
    logger.flush()
    assert records(path) == [{"metric": "curvature/trace", "value": 2.0, "step": 7}]


@pytest.mark.parametrize("value", ["text", torch.ones(1), torch.ones(2, 2), None, [1.0], 1j, AlternativeValues("a")])
def test_what_is_not_a_scalar_is_skipped(path, value):
    logger = JSONLLogger(path)
    logger.log_single_metric("matrix", value, 0)
    logger.close()
    assert path.read_text() == ""


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, torch.tensor(math.nan)])
def test_values_that_are_not_finite_are_null(path, value):
    logger = JSONLLogger(path)
    logger.log_single_metric("loss", value, 0)
    logger.close()
    assert records(path) == [{"metric": "loss", "value": None, "step": 0}]


def test_floats_are_written_without_loss(path):
    values = np.random.default_rng(0).normal(size=20).tolist()
    logger = JSONLLogger(path)
    for step, value in enumerate(values):
        logger.log_single_metric("x", value, np.int64(step))
    logger.close()
    assert [(r["step"], r["value"]) for r in records(path)] == list(enumerate(values))


def test_a_dictionary_of_values_is_one_record_per_key(path):
    logger = JSONLLogger(path)
    logger.log_metrics([MetricValue(None, "energy", {"top1": 0.5, "top2": 0.75}, 1)])
    logger.close()
    assert [(r["metric"], r["value"]) for r in records(path)] == [("energy/top1", 0.5), ("energy/top2", 0.75)]


def test_an_existing_file_is_continued(path):
    for step in (0, 1):
        logger = JSONLLogger(path)
        logger.log_single_metric("loss", 1.0, step)
        logger.close()
    assert [record["step"] for record in records(path)] == [0, 1]


@pytest.mark.parametrize("library", [pickle, dill])
def test_a_pickled_logger_continues_its_file(path, library, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    logger = JSONLLogger("relative.jsonl")
    logger.log_single_metric("loss", 1.0, 0)
    packed = library.dumps(logger)
    logger.close()
    monkeypatch.chdir("/")
    resumed = library.loads(packed)
    resumed.log_single_metric("loss", 2.0, 1)
    resumed.close()
    assert [record["value"] for record in records(tmp_path / "relative.jsonl")] == [1.0, 2.0]


def test_a_pickled_logger_cuts_what_was_written_after_it_and_loading_alone_changes_nothing(path):
    logger = JSONLLogger(path)
    logger.log_single_metric("λ", 1.0, 0)
    packed = pickle.dumps(logger)
    logger.log_single_metric("λ", 2.0, 1)
    logger.close()
    with path.open("a") as file:
        file.write('{"metric": "los')  # killed in the middle of a line
    resumed = pickle.loads(pickle.dumps(pickle.loads(packed)))
    assert len(path.read_text().splitlines()) == 3
    for step in (1, 2):
        resumed.log_single_metric("λ", 5.0, step)
    resumed.close()
    assert [(r["step"], r["value"]) for r in records(path)] == [(0, 1.0), (1, 5.0), (2, 5.0)]
    superseded = path.with_name("metrics.jsonl.superseded").read_text()
    assert superseded == '{"metric": "\\u03bb", "value": 2.0, "step": 1}\n{"metric": "los'


def test_a_copy_continues_the_file_and_cuts_nothing(path):
    logger = JSONLLogger(path)
    copied = copy.deepcopy(logger)
    logger.log_single_metric("loss", 1.0, 0)
    logger.close()
    copied.log_single_metric("loss", 2.0, 1)
    copied.close()
    assert [record["step"] for record in records(path)] == [0, 1]


def test_a_file_that_is_gone_is_begun_anew(path):
    logger = JSONLLogger(path)
    logger.log_single_metric("loss", 1.0, 0)
    packed = pickle.dumps(logger)
    path.unlink()
    resumed = pickle.loads(packed)
    resumed.log_single_metric("loss", 2.0, 1)
    resumed.close()
    assert [record["step"] for record in records(path)] == [1]


@pytest.mark.parametrize("went_on", [False, True])
def test_a_resumed_run_appends_the_records_of_an_unbroken_one(went_on, tmp_path, plane, net, learner, train):
    def run(folder):
        metrics = [accuracy_metrics(minibatch=True, experience=True), loss_metrics(epoch=True)]
        return learner(copy.deepcopy(net), metrics=metrics, loggers=[JSONLLogger(tmp_path / folder / "log")])

    train(run("unbroken"), plane.train_stream)
    broken = train(run("broken"), plane.train_stream[:2])
    save_checkpoint(broken, tmp_path / "checkpoint.pt")
    if went_on:  # and was then killed
        broken.train(plane.train_stream[2])
    del broken
    resumed, start = load_checkpoint(run("broken"), tmp_path / "checkpoint.pt")
    for experience in plane.train_stream[start:]:
        resumed.train(experience)
    expected = (tmp_path / "unbroken" / "log").read_bytes()
    assert len(expected.splitlines()) == 3 * 4  # three iterations and an epoch in each experience
    assert (tmp_path / "broken" / "log").read_bytes() == expected


def test_lines_are_buffered_until_the_experience_ends(path):
    logger = JSONLLogger(path)
    for finish in (logger.after_training_exp, logger.after_eval_exp, logger.after_eval):
        before = path.read_text()
        logger.log_single_metric("loss", 1.0, 0)
        assert path.read_text() == before
        finish(None, [])
        assert len(path.read_text()) > len(before)


def test_lines_survive_a_logger_that_nobody_closed(path):
    logger = JSONLLogger(path)
    logger.log_single_metric("loss", 1.0, 0)
    del logger
    assert len(records(path)) == 1


def test_it_records_what_the_evaluator_of_a_strategy_collects(path):
    benchmark = SineBoundary(2, examples=20, seed=0)
    model = nn.Linear(2, 2)
    metrics = accuracy_metrics(experience=True, stream=True), loss_metrics(minibatch=True)
    evaluator = EvaluationPlugin(
        *metrics, confusion_matrix_metrics(num_classes=2, stream=True, save_image=False), loggers=[JSONLLogger(path)]
    )
    learner = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=4,
        evaluator=evaluator,
    )
    learner.train(benchmark.train_stream[0])
    assert [r["step"] for r in records(path)] == [0, 1, 2, 3]
    assert {r["metric"] for r in records(path)} == {"Loss_MB/train_phase/train_stream/Task000"}
    learner.eval(benchmark.test_stream)
    named = {r["metric"]: r["value"] for r in records(path)[4:]}
    assert set(named) == {
        "Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp000",
        "Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp001",
        "Top1_Acc_Stream/eval_phase/test_stream/Task000",
    }
    first, second, whole = named.values()
    assert whole == pytest.approx((first + second) / 2)
