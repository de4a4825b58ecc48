import copy

import pytest


@pytest.fixture
def assert_resumes(net, learner, train, plane, tmp_path):
    """assert_resumes(metrics): saved after two experiences and loaded, a run publishes what it would have anyway."""
    from avalanche_curv import load_checkpoint, save_checkpoint

    def check(metrics):
        strategy = train(learner(net, metrics=metrics), plane.train_stream[:2])
        save_checkpoint(strategy, tmp_path / "checkpoint.pt")
        train(strategy, plane.train_stream[2:], seed=1)
        resumed, start = load_checkpoint(learner(copy.deepcopy(net)), tmp_path / "checkpoint.pt")
        train(resumed, plane.train_stream[start:], seed=1)
        assert strategy.evaluator.get_all_metrics() == resumed.evaluator.get_all_metrics()

    return check
