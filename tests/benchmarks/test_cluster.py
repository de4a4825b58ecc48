"""Units run on the workers of a Dask scheduler, each exactly once, whatever becomes of the workers."""

import json
import os
import random
import signal
import threading
import time
from contextlib import contextmanager

import pytest

from benchmarks.harness import engines
from benchmarks.harness.board import options as board_options
from benchmarks.harness.engines import Cluster, ThisProcess, _run_if_shared, _wait_until_visible, run_units
from benchmarks.harness.errors import UsageError
from benchmarks.harness.experiment import grid
from benchmarks.harness.store import Store
from benchmarks.harness.unit_run import Job, Outcome

distributed = pytest.importorskip("distributed")

QUIET = {"dashboard_address": None, "silence_logs": 50}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder, from which the folder of the results is relative."""
    monkeypatch.chdir(tmp_path)


@contextmanager
def drawing():
    """While the context is open, another thread of this process draws from `random`, as the loop of a worker does."""

    def draw():
        while not ended.wait(1e-4):
            random.random()

    ended = threading.Event()
    thread = threading.Thread(target=draw)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def run(tiny, address, seeds=2):
    return tiny.main("run", "tiny", "--seeds", str(seeds), "--scheduler", address, "--out", "far")


def test_a_scheduler_runs_every_unit_once_with_the_numbers_of_this_process(tiny, tmp_path):
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=False, **QUIET) as workers, drawing():
        assert run(tiny, workers.scheduler_address) == 0
        assert workers.scheduler.transition_counter >= 4
    assert sorted(tiny.started()) == ["a0", "a1", "b0", "b1"]
    assert json.loads((tmp_path / "far/tiny/manifest.json").read_text())["jobs"] is None
    assert tiny("run", "--seeds", "2", out="near") == 0
    assert tiny.records("far") == tiny.records("near")
    assert len(tiny.records("far")) == 4


@pytest.mark.slow
def test_agem_has_the_records_of_this_process_whatever_its_worker_draws(tmp_path):
    """AGEM shuffles its memory by the global `random`, from which the loop of a worker draws too."""
    from benchmarks.experiments.compare.experiment import experiment

    def records(engine, folder):
        store = Store(tmp_path / folder)
        store.root.mkdir()
        store.manifest.touch()
        (end,) = run_units(Job(experiment, store, None, None, table), units, engine)
        assert end.error is None
        return [record for record in store.read(units[0].digest, "AGEM", 0)[1] if not record.get("timing")]

    options = experiment.options_type(seeds=1, quick=True, strategy=("AGEM",))
    units = [unit for unit in grid(experiment, options) if unit.label == "AGEM"]
    table = board_options(units)
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=False, **QUIET) as workers, drawing():
        far = records(Cluster(workers.scheduler_address), "far")
    assert far == records(ThisProcess(), "near")


def test_workers_with_several_threads_are_refused_before_any_unit_runs(tiny, capsys):
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=False, **QUIET) as workers:
        assert run(tiny, workers.scheduler_address) == 2
    assert "has 2. Start workers with `dask worker ADDRESS --nthreads 1" in capsys.readouterr().err
    assert tiny.started() == []


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nowhere", "tcp://127.0.0.1", "no://127.0.0.1:80"])
def test_an_address_without_a_scheduler_says_how_to_start_one(tiny, capsys, monkeypatch, address):
    monkeypatch.setattr(engines, "CONNECT", 0.5)
    if not address.endswith(":9"):
        monkeypatch.setattr(distributed, "Client", None)  # the client of what is no address takes 20 s to close
    assert run(tiny, address) == 2
    error = capsys.readouterr().err
    assert f"error: no Dask scheduler answers at '{address}'" in error
    assert "`dask scheduler`" in error


def test_without_dask_the_message_names_the_extra(tiny, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    assert run(tiny, "tcp://127.0.0.1:9") == 2
    assert capsys.readouterr().err == "error: --scheduler needs Dask: python -m pip install -e '.[cluster]'.\n"


def test_a_folder_that_the_machines_do_not_share_is_named(tmp_path, monkeypatch):
    store = Store(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"do not see the same files in .*elsewhere"):
        _run_if_shared(store, b"")
    monkeypatch.setattr(engines, "VISIBLE", 0.0)
    unit = type("Unit", (), {"digest": "0" * 12})
    with pytest.raises(UsageError, match=r"do not see the same files in .*elsewhere"):
        _wait_until_visible(store, Outcome(unit))
    _wait_until_visible(store, Outcome(unit, error="failed, so that there is no file"))


@pytest.mark.slow
def test_a_worker_killed_while_it_runs_a_unit_loses_none_and_none_counts_twice(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_FAULT", "hang once")

    def kill():
        end = time.monotonic() + 60
        while len(tiny.records("far")) < 5 or "b1" not in tiny.started():
            assert time.monotonic() < end
            time.sleep(0.1)
        (busy,) = (worker for worker, tasks in client.processing().items() if tasks)
        os.kill(pids[busy], signal.SIGKILL)

    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, **QUIET) as workers,
        distributed.Client(workers, set_as_default=False) as client,
    ):
        pids = client.run(os.getpid)
        killer = threading.Thread(target=kill)
        killer.start()
        assert run(tiny, workers.scheduler_address, seeds=3) == 0
        killer.join()
    assert sorted(tiny.started()) == ["a0", "a1", "a2", "b0", "b1", "b1", "b2"]
    units = json.loads((tmp_path / "far/tiny/manifest.json").read_text())["units"]
    assert [unit["seconds"] is not None for unit in units] == [True] * 6
    assert tiny("run", "--seeds", "3", out="near") == 0
    assert tiny.records("far") == tiny.records("near")
    assert len(list((tmp_path / "far/tiny/tensorboard-all/b/seed1").iterdir())) == 1


@pytest.mark.slow
def test_a_unit_that_kills_every_worker_fails_alone(tiny, monkeypatch, capsys):
    monkeypatch.setenv("TINY_FAULT", "die")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, **QUIET) as workers:
        workers.scheduler.allowed_failures = 0
        assert run(tiny, workers.scheduler_address) == 1
    said = "b seed 1: the worker process died twice, the second time with no other unit beside it (exit code SIGKILL(-"
    assert said in capsys.readouterr().err
    assert len(tiny.records("far")) == 3
    assert tiny.started().count("b1") == 2


def test_the_engine_of_a_cluster_leaves_the_number_of_jobs_to_it():
    assert Cluster("tcp://127.0.0.1:8786").jobs is None
