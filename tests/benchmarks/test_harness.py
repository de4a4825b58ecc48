"""The harness keeps what has finished, recognises it, and reports it exactly."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from benchmarks import registry
from benchmarks.harness.engines import Engine, Lost, run_units
from benchmarks.harness.errors import UsageError
from benchmarks.harness.experiment import Unit, digest, grid
from benchmarks.harness.results import Results
from benchmarks.harness.signals import showing_stacks
from benchmarks.harness.store import Store, only_run_in
from benchmarks.harness.unit_run import Job, Outcome, _checked
from benchmarks.harness.warned import listening

HERE = Path(__file__).parent
CHOICES = "Choices: staged, tiny, titan."
COMMAND = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes what it starts in the background deaf to it
from benchmarks.harness.command import main
from benchmarks.registry import Registered
tiny = Registered("tiny_experiment:experiment", "a tiny experiment", "tiny_experiment:report")
sys.exit(main(sys.argv[1:], {"tiny": tiny}))
"""


def begin(tmp_path, *words):
    """A command line of the tiny experiment in a process of its own, in which b with seed 1 hangs."""
    environment = {**os.environ, "PYTHONPATH": str(HERE), "TINY_FAULT": "hang", "TINY_LOG": str(tmp_path / "log")}
    command = [sys.executable, "-c", COMMAND, *words, "--out", str(tmp_path / "out")]
    return subprocess.Popen(
        command, cwd=HERE.parents[1], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail("waited in vain")
        time.sleep(0.05)


@dataclass(frozen=True)
class Merge:
    decay: float


@dataclass(frozen=True)
class Refresh:
    decay: float


@dataclass(frozen=True)
class Config:
    label: str
    policy: object
    extra: object = None


UNIT = Unit("tiny", 1, Config("a", Merge(0.9), {"x": 1, "y": 2}), 0, False)


@pytest.mark.parametrize(
    "other",
    [
        replace(UNIT, seed=1),
        replace(UNIT, quick=True),
        replace(UNIT, version=2),
        replace(UNIT, config=replace(UNIT.config, policy=Merge(0.8))),
        replace(UNIT, config=replace(UNIT.config, policy=Refresh(0.9))),
    ],
    ids=["seed", "quick", "version", "nested value", "nested class"],
)
def test_digest_changes_with_what_changes_the_numbers(other):
    assert other.digest != UNIT.digest
    assert len(UNIT.digest) == 12


def test_digest_does_not_depend_on_the_order_of_keys():
    assert replace(UNIT, config=replace(UNIT.config, extra={"y": 2, "x": 1})).digest == UNIT.digest
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})


@pytest.mark.parametrize("name", registry.EXPERIMENTS)
def test_units_can_be_sent_to_another_process(name):
    experiment = registry.EXPERIMENTS[name].experiment
    try:
        units = grid(experiment, experiment.options_type(quick=True))
    except UsageError as error:  # of an extra that is not there
        pytest.skip(str(error))
    there, sent = pickle.loads(pickle.dumps((experiment, units)))
    assert there.name == name
    assert [unit.digest for unit in sent] == [unit.digest for unit in units]


def test_digest_refuses_what_has_no_canonical_description():
    with pytest.raises(TypeError, match="no canonical description"):
        digest(Config("a", lambda x: x))


def test_a_run_resumes_with_the_missing_units_only(tiny, capsys):
    assert tiny("run", "--seeds", "1") == 0
    before = tiny.units()
    assert tiny("run", "--seeds", "2") == 0
    assert "2 of 4 units already finished" in capsys.readouterr().err
    assert tiny.started() == ["a0", "b0", "a1", "b1"]
    assert before.items() <= tiny.units().items()


def test_a_killed_run_keeps_what_finished_and_its_rerun_gives_the_numbers_of_a_fresh_run(tiny, tmp_path):
    process = begin(tmp_path, "run", "tiny", "--seeds", "2", "--jobs", "2")
    wait_until(lambda: len(tiny.units()) == 3 and "b1" in tiny.started())
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(workers, timeout=5)[1]
    kept = tiny.units()
    assert len(kept) == 3

    assert tiny("run", "--seeds", "2") == 0
    assert tiny("run", "--seeds", "2", out="fresh") == 0
    assert kept.items() <= tiny.units().items()
    assert tiny.records() == tiny.records("fresh")
    assert [len(lines) for lines in tiny.records().values()] == [3] * 4
    assert len(list((tiny.out / "tensorboard-all" / "b" / "seed1").iterdir())) == 1


def test_sigquit_shows_the_stacks_of_a_process_and_its_workers_and_both_go_on(capfd):
    code = "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start();"  # or one of BLAS
    code += "from benchmarks.harness.signals import *; leave_signals_to_parent(); print(1, flush=True); input()"
    pipes = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE)
    worker = subprocess.Popen([sys.executable, "-c", code], cwd=HERE.parents[1], text=True, **pipes)
    assert worker.stdout.readline() == "1\n"
    before = signal.getsignal(signal.SIGQUIT)
    with showing_stacks(lambda: [worker.pid]):
        worker.send_signal(signal.SIGQUIT)  # as a terminal sends to all
        os.kill(os.getpid(), signal.SIGQUIT)
    said = capfd.readouterr().err
    assert f'File "{__file__}", line' in said
    assert "in test_sigquit_shows_the_stacks_of_a_process_and_its_workers_and_both_go_on" in said
    assert signal.getsignal(signal.SIGQUIT) == before
    _, said = worker.communicate("\n", timeout=20)
    assert 'File "<string>", line 1 in <module>' in said
    assert worker.returncode == 0


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_and_says_how_to_resume(tiny, tmp_path):
    process = begin(tmp_path, "run", "tiny", "--seeds", "2", "--jobs", "2")
    wait_until(lambda: len(tiny.units()) == 3 and "b1" in tiny.started())
    process.send_signal(signal.SIGQUIT)  # shows what it hangs at, and goes on
    time.sleep(2.0)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=15)
    assert process.returncode == 130
    assert 'tests/benchmarks/tiny_experiment.py", line' in errors  # of the worker
    assert "in _run_missing" in errors
    assert "Stopped with 3 of 4 units finished. The same command resumes: python -m benchmarks run tiny" in errors
    assert "Traceback" not in errors


def test_a_unit_that_asks_python_to_end_has_failed(tiny, monkeypatch, capsys):
    monkeypatch.setenv("TINY_FAULT", "exit")
    assert tiny("run", "--seeds", "2") == 1
    assert "b seed 1: SystemExit: 0" in capsys.readouterr().err
    assert len(tiny.units()) == 3


def test_a_unit_that_raises_does_not_lose_the_others(tiny, monkeypatch, capsys):
    monkeypatch.setenv("TINY_FAULT", "raise")
    assert tiny("run", "--seeds", "3") == 1
    printed = capsys.readouterr()
    assert "1 units failed" in printed.err
    assert "b seed 1: ArithmeticError: the loss is not finite" in printed.err
    assert printed.out.splitlines()[3].endswith("  2")
    assert len(tiny.units()) == 5
    (trace,) = (tiny.out / "units").glob("*.error.txt")
    assert "in fail" in trace.read_text()

    monkeypatch.delenv("TINY_FAULT")
    assert tiny("run", "--seeds", "3") == 0
    assert not trace.exists()


@pytest.mark.slow
def test_a_unit_whose_process_dies_runs_again_alone_and_fails_if_that_dies_too(tiny, monkeypatch, capsys):
    monkeypatch.setenv("TINY_FAULT", "die")
    assert tiny("run", "--seeds", "3", jobs=2) == 1
    said = "b seed 1: the worker process died twice, the second time with no other unit beside it (exit code SIGKILL"
    assert said in capsys.readouterr().err
    assert len(tiny.units()) == 5
    assert tiny.started().count("b1") == 2


@pytest.mark.slow
def test_a_worker_killed_once_costs_no_unit(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("TINY_FAULT", "die once")
    assert tiny("run", "--seeds", "2", jobs=2) == 0
    assert tiny("run", "--seeds", "2", out="fresh") == 0
    assert tiny.records() == tiny.records("fresh")


class Breaking(Engine):
    """Loses the units that are running beside a culprit, as a pool does that breaks."""

    jobs = 2

    def __init__(self, *culprits):
        self.culprits = culprits
        self.alone = []

    def ends(self, job, units):
        first, rest = units[:2], units[2:]
        if any(unit.config.label in self.culprits for unit in first):
            yield from (Lost(unit, "killed") for unit in first)
            return
        if len(units) == 1:
            self.alone.append(units[0].config.label)
        yield from (Outcome(unit) for unit in first)
        if rest:
            yield from self.ends(job, rest)


def test_only_the_unit_that_dies_alone_fails_and_each_ends_once(tmp_path):
    units = [Unit("tiny", 1, Config(label, Merge(0.9)), 0, False) for label in "abcdefg"]
    engine = Breaking("c", "f")
    ended = list(run_units(Job(None, Store(tmp_path), None, None, {}), units, engine))
    assert sorted(end.unit.config.label for end in ended) == list("abcdefg")
    assert {end.unit.config.label for end in ended if end.error} == {"c", "f"}
    assert engine.alone == ["g", "d", "e"]  # g was left over; d and e ran beside a culprit


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_ends_the_run_with_one_message_and_the_same_command_resumes(tiny, monkeypatch, capsys, jobs):
    monkeypatch.setenv("TINY_FAULT", "full")
    assert tiny("run", "--seeds", "2", jobs=jobs) == 2
    folder = tiny.out
    expected = f"error: no space is left on the disk of {folder}. What has finished is kept: make space, and the same"
    assert expected in capsys.readouterr().err
    kept = tiny.units()
    assert not list(folder.glob("units/*.error.txt"))
    assert len(kept) >= 2 if jobs == 1 else kept

    monkeypatch.delenv("TINY_FAULT")
    assert tiny("run", "--seeds", "2", jobs=jobs) == 0
    assert kept.items() <= tiny.units().items()
    assert len(tiny.units()) == 4


@pytest.mark.parametrize("where", ["in a thread", "when a logger closes", "while logging"])
def test_a_unit_whose_events_met_a_full_disk_unseen_has_not_finished(tiny, monkeypatch, capsys, where):
    monkeypatch.setenv("TINY_FAULT", f"full, {where}")
    assert tiny("run", "--seeds", "2") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: no space is left on the disk of {tiny.out}.")
    assert len(tiny.units()) == 3
    assert tiny.started()[4:] == ["closed"] * (where != "in a thread")  # and not when Python exits, after the message
    assert not list(tiny.out.glob("units/*.error.txt"))
    monkeypatch.delenv("TINY_FAULT")
    assert tiny("run", "--seeds", "2") == 0


@pytest.mark.parametrize("write", [2, 3, 6], ids=["a unit", "the manifest", "the report"])
def test_wherever_the_disk_is_full_no_half_file_is_left(tiny, monkeypatch, capsys, write):
    calls = iter(range(1, 100))
    sync = os.fsync

    def fsync(file):
        if next(calls) >= write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(os, "fsync", fsync)
    assert tiny("run", "--seeds", "1") == 2
    assert f"error: no space is left on the disk of {tiny.out}." in capsys.readouterr().err
    assert not list(tiny.out.rglob("*.tmp"))
    for content in tiny.units().values():
        assert [json.loads(line) for line in content.decode().splitlines()]


def test_a_prerequisite_runs_first_and_decides_the_options(tiny, tmp_path, monkeypatch, capsys):
    words = ["run", "staged", "--jobs", "1", "--seeds", "1", "--out", str(tmp_path / "out")]
    monkeypatch.setenv("TINY_FAULT", "raise")
    assert tiny.main(*words) == 1
    assert "'staged' has not begun, because 'tiny' has not finished." in capsys.readouterr().err
    assert not (tmp_path / "out" / "staged" / "units").exists()
    monkeypatch.delenv("TINY_FAULT")
    assert tiny.main(*words) == 0
    manifest = json.loads((tmp_path / "out" / "staged" / "manifest.json").read_text())
    assert [unit["label"] for unit in manifest["units"]] == ["slope2_"]  # the better of the two in the prerequisite
    assert tiny.started() == ["a0", "b0", "a1", "b1", "b1", "slope2_0"]
    assert tiny.main(*words, "--seeds", "1") == 0
    assert len(tiny.started()) == 6


def test_a_folder_is_one_runs_at_a_time(tiny, tmp_path, capsys):
    with only_run_in(tiny.out):
        assert tiny("run", "--seeds", "1") == 2
    said = f"error: another run is at work in {tiny.out}: wait for it, or choose another --out.\n"
    assert capsys.readouterr().err == said
    assert not (tmp_path / "log").exists()
    assert tiny("run", "--seeds", "1") == 0


def test_a_run_and_its_prerequisite_keep_their_folders_while_they_work(tiny, tmp_path, monkeypatch):
    kept = []

    def attempt(folder):
        with pytest.raises(UsageError, match="another run is at work"), only_run_in(tmp_path / "out" / folder):
            pass
        kept.append(folder)

    from tiny_experiment import Staged

    class Watched(Staged):
        def settled(self, options, results):
            attempt("tiny")  # its results have just been read
            return super().settled(options, results)

    def watched(results, out):
        if len(results.labels) == 1:  # of the staged one
            attempt("staged")
            with only_run_in(tmp_path / "out" / "tiny"):
                pass
        return "nothing"

    monkeypatch.setattr("tiny_experiment.staged", Watched())
    monkeypatch.setattr("tiny_experiment.report", watched)
    words = ["run", "staged", "--jobs", "1", "--seeds", "1", "--out", str(tmp_path / "out")]
    assert tiny.main(*words) == 0
    assert kept == ["tiny", "staged"]


def test_the_folder_of_a_killed_run_is_free(tmp_path):
    code = f"""
import pathlib
from benchmarks.harness.store import only_run_in
with only_run_in(pathlib.Path({str(tmp_path)!r})):
    print("in", flush=True)
    input()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=HERE.parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "in\n"
    with pytest.raises(UsageError, match="another run is at work"), only_run_in(tmp_path):
        pass
    process.kill()
    process.communicate()
    with only_run_in(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_named_before_any_unit_runs(tiny, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert tiny("run", "--seeds", "1", out="file/out") == 2
    folder = tmp_path / "file" / "out" / "tiny"
    said = f"error: results cannot be written in {folder} (Not a directory): choose another folder with --out DIR.\n"
    assert capsys.readouterr().err == said
    assert not (tmp_path / "log").exists()


def test_a_report_that_fails_leaves_the_last_one_as_it_was(tiny, monkeypatch):
    tiny("run", "--seeds", "1")
    names = ("accuracy.png", "report.md", "report.html", "old.png")
    (tiny.out / "old.png").write_bytes(b"a figure that no report has now")
    before = {name: (tiny.out / name).read_bytes() for name in names}

    def report(results, out):
        (out / "accuracy.png").write_bytes(b"half a figure")
        raise UsageError("a unit is missing")

    with monkeypatch.context() as patch:
        patch.setattr("tiny_experiment.report", report)
        assert tiny("report") == 2
    assert {name: (tiny.out / name).read_bytes() for name in names} == before
    listed = {path.name for path in tiny.out.iterdir()}
    assert listed == {*names, "units", "tensorboard", "tensorboard-all", "manifest.json", ".lock"}
    assert tiny("report") == 0
    assert {path.name for path in tiny.out.iterdir()} == listed - {"old.png"}


def test_report_from_files_equals_the_report_of_the_run(tiny, capsys):
    tiny("run", "--seeds", "2")
    at_run, printed = (tiny.out / "report.md").read_text(), capsys.readouterr().out
    (tiny.out / "report.md").unlink()
    assert tiny("report") == 0
    assert (tiny.out / "report.md").read_text() == at_run
    assert capsys.readouterr().out == printed
    assert f"tensorboard --logdir {tiny.out}/tensorboard" in printed
    assert "![" not in printed
    assert "|" not in printed


def test_report_of_an_incomplete_run_says_what_is_missing(tiny, capsys):
    tiny("run", "--seeds", "2")
    next((tiny.out / "units").glob("*.jsonl")).unlink()
    assert tiny("report") == 0
    assert "1 of 4 units are missing" in capsys.readouterr().err
    assert (tiny.out / "report.md").read_text().startswith("> 1 of 4 units are missing")


def test_a_broken_unit_is_left_out_of_the_report_and_runs_again(tiny, capsys):
    tiny("run", "--seeds", "2")
    kept = tiny.units()
    for name, content in zip(kept, (b"", kept[[*kept][1]][:-9])):
        (tiny.out / "units" / name).write_bytes(content)
    capsys.readouterr()
    assert tiny("report") == 1
    said = capsys.readouterr().err
    assert said.count("left out: ") == 2
    assert "2 files could not be read; all others are in the report." in said
    assert tiny("run", "--seeds", "2") == 0
    assert capsys.readouterr().err.count("It is set aside, and its unit runs again.") == 2
    assert len(tiny.started()) == 6
    assert tiny.units().keys() == kept.keys()
    assert len(list(tiny.out.glob("units/*.broken"))) == 2
    assert tiny("report") == 0


def test_results_of_another_experiment_or_version_are_said_to_be_such(tiny, capsys):
    tiny("run", "--seeds", "1")
    manifest = json.loads((tiny.out / "manifest.json").read_text())
    (tiny.out / "manifest.json").write_text(json.dumps(manifest | {"version": 7}))
    capsys.readouterr()
    assert tiny("report") == 0
    assert "holds results of version 7 of 'tiny', which is at version 1 now" in capsys.readouterr().err
    (tiny.out / "manifest.json").write_text(json.dumps(manifest | {"experiment": "other"}))
    assert tiny("report") == 2
    assert capsys.readouterr().err == f"error: {tiny.out} holds results of 'other', not of 'tiny'.\n"


def test_options_may_come_before_the_name_of_the_experiment(tiny, tmp_path, capsys):
    words = ["--seeds", "1", "--quick", "--out", str(tmp_path / "out")]
    assert tiny.main("run", *words, "tiny", "--jobs", "1") == 0
    assert tiny.main("report", *words[2:], "tiny") == 0
    assert (tmp_path / "out" / "tiny-quick" / "report.md").exists()
    capsys.readouterr()
    assert tiny.main("run", "--out", "tiny", "titan") == 2
    said = "error: the name of the experiment comes first: python -m benchmarks run NAME --out tiny titan\n"
    assert capsys.readouterr().err == said


def test_report_without_results_says_how_to_get_them(tiny, capsys):
    assert tiny("report") == 2
    message = capsys.readouterr().err
    expected = f"error: there are no results in {tiny.out}. Run them first: python -m benchmarks run tiny --out"
    assert message.startswith(expected)
    assert message.count("\n") == 1


def test_manifest_names_versions_and_every_unit(tiny):
    tiny("run", "--seeds", "1")
    manifest = json.loads((tiny.out / "manifest.json").read_text())
    assert {"python", "torch", "avalanche", "curvlinops", "avalanche_curv", "numpy"} <= manifest.keys()
    assert {"commit", "dirty", "device", "cpus", "threads_per_worker", "command", "seconds"} <= manifest.keys()
    assert [(unit["label"], unit["seed"]) for unit in manifest["units"]] == [("a", 0), ("b", 0)]
    for unit in manifest["units"]:
        header = json.loads((tiny.out / "units" / f"{unit['digest']}.jsonl").read_text().splitlines()[0])
        assert header["config"]["slope"]["class"] == "Slope"
        assert header["peak_memory"] == unit["peak_memory"] > 2**20


def test_quick_runs_and_variants_have_folders_of_their_own(tiny):
    tiny("run", "--seeds", "1", "--quick", "--stream", "digits")
    assert (tiny.out.parent / "tiny-digits-quick" / "report.md").exists()
    assert not tiny.out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "tinny"], f"unknown experiment 'tinny'; did you mean 'tiny'? {CHOICES}"),
        (["run", "xyz"], f"unknown experiment 'xyz'. {CHOICES}"),
        (
            ["run", "tiny", "--stream", "sin"],
            "argument --stream: unknown stream 'sin'; did you mean 'sine'? Choices: digits, sine.",
        ),
        (["run", "tiny", "--seeds", "0"], "argument --seeds: expected a whole number of at least 1, got '0'."),
        (["run", "tiny", "--jobs", "two"], "argument --jobs: expected a whole number of at least 1, got 'two'."),
        (
            ["run", "tiny", "--jobs", "2", "--scheduler", "tcp://10.0.0.1:8786"],
            "--scheduler and --jobs exclude each other. See python -m benchmarks run tiny --help.",
        ),
        (["run", "tiny", "--out", __file__], f"argument --out: expected a folder, but '{__file__}' is a file."),
    ],
)
def test_a_wrong_request_is_one_line_that_names_the_choices(tiny, capsys, words, message):
    assert tiny.main(*words) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_what_is_answered_at_once_imports_neither_torch_nor_matplotlib_nor_pandas():
    code = """
import sys
from contextlib import suppress
from benchmarks.harness.command import main
main(["list"])
for words in (["run", "compare", "--help"], ["run", "tune_compare", "--help"]):
    with suppress(SystemExit):
        main(words)
main(["run", "compare", "--strategy", "CurvatureEWC"])
print({"torch", "avalanche", "matplotlib", "pandas"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE.parents[1], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    listed = sorted(registry.EXPERIMENTS)
    assert [line.split()[0] for line in lines[: len(listed)]] == listed
    assert done.stderr.startswith("error: 18 strategies begin with 'CurvatureEWC':")
    assert lines[-1] == "set()"


def test_warnings_are_kept_in_a_file_and_those_of_this_package_shown_once(tiny, monkeypatch, capsys):
    monkeypatch.setenv("TINY_FAULT", "warn")
    assert tiny("run", "--seeds", "2") == 0
    said = capsys.readouterr()
    shown = "warning: UserWarning: of avalanche_curv.plugins (in b, seed 1)\n"
    assert said.err.endswith(shown)
    assert "of avalanche.training" not in said.err
    assert "of a logger" not in said.err
    assert f"Warnings: {tiny.out / 'warnings.log'} (3 different, in 1 unit)\n" in said.out
    log = (tiny.out / "warnings.log").read_text()
    texts = ["of avalanche.training", "of avalanche_curv.plugins", "of a logger"]
    assert [log.count(text) for text in texts] == [1, 1, 1]
    assert f"{HERE / 'tiny_experiment.py'}:" in log
    monkeypatch.delenv("TINY_FAULT")
    assert tiny("run", "--seeds", "2") == 0  # nothing runs: what was warned of before is still said
    assert capsys.readouterr().err.endswith(shown)
    assert tiny("run", "--seeds", "1") == 0
    assert not (tiny.out / "warnings.log").exists()


@pytest.mark.slow
def test_warnings_of_workers_are_kept_too(tiny, monkeypatch, capfd):
    monkeypatch.setenv("TINY_FAULT", "warn")
    assert tiny("run", "--seeds", "2", jobs=2) == 0
    assert capfd.readouterr().err.count("warning: UserWarning: of avalanche_curv.plugins (in b, seed 1)") == 1
    assert "of avalanche.training" in (tiny.out / "warnings.log").read_text()


def test_what_torch_warns_of_on_behalf_of_this_package_is_not_the_packages():
    import torch

    code = "import numpy, torch; a = numpy.zeros(1); a.flags.writeable = False; torch.from_numpy(a)"
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with listening() as heard:
            exec(code, {"__name__": "avalanche_curv.core"})
    finally:
        torch.set_warn_always(before)
    ((text, ours),) = [(warned.text, warned.ours) for warned in heard]
    assert "not writable" in text
    assert not ours


def test_timings_are_marked_among_the_records():
    given = [{"metric": name, "value": 1.0} for name in ("accuracy", "metric_seconds")]
    assert [record.get("timing") for record in _checked(given)] == [None, True]


@pytest.mark.parametrize("record", [{"metric": "loss"}, {"value": 1.0}, {"metric": 1, "value": 1.0}])
def test_a_record_without_metric_or_value_is_refused(record):
    with pytest.raises(ValueError, match="A record is"):
        _checked([record])


def rows(metric, values):
    """Rows of label "a" from (seed, step): value."""
    return tuple(
        {"label": "a", "seed": seed, "metric": metric, "step": step, "value": value}
        for (seed, step), value in values.items()
    )


def test_final_takes_the_last_step_of_each_seed():
    results = Results(("a",), rows("loss", {(0, 0): 9.0, (0, 5): 1.0, (1, 0): 7.0, (1, 4): 3.0}))
    final = results.final("loss", "a")
    assert (final.mean, final.std, final.n) == (2.0, 2.0**0.5, 2)
    assert results.final("accuracy", "a") is None


def test_a_curve_has_the_steps_that_all_seeds_have():
    results = Results(("a",), rows("loss", {(0, 0): 1.0, (1, 0): 3.0, (0, 5): 4.0}))
    ((step, summary),) = results.curve("loss", "a")
    assert (step, summary.mean, summary.n) == (0.0, 2.0, 2)
