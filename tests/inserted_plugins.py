"""A pytest plugin for the test suite of Avalanche: every strategy gets plugins of strength 0, which change nothing.

`pytest -p inserted_plugins --insert` inserts them. The outcome of each test, and for one that failed by an error of
our plugins the hook that raised it and the error, are written as JSON to the file `--outcomes`.
"""

import json
import traceback
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--insert", action="store_true")
    parser.addoption("--outcomes", type=Path)


def pytest_configure(config):
    config.outcomes = {}
    if not config.getoption("--insert"):
        return
    from avalanche.training.templates.base import BaseTemplate

    from avalanche_curv import CurvatureEWCPlugin, SpectralRegPlugin

    made = BaseTemplate.__init__

    def with_ours(self, **options):
        made(self, **options)
        self.plugins += [CurvatureEWCPlugin(0.0), SpectralRegPlugin(0.0)]

    BaseTemplate.__init__ = with_ours


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if call.when == "call" or report.failed:
        item.config.outcomes[item.nodeid.rpartition("/")[2]] = {
            "outcome": report.outcome,
            "hook": _hook(call.excinfo.tb) if report.failed else None,
            "error": f"{call.excinfo.typename}: {call.excinfo.value}" if report.failed else None,
        }


def pytest_unconfigure(config):
    if config.getoption("--outcomes"):
        config.getoption("--outcomes").write_text(json.dumps(config.outcomes))


def _hook(trace):
    """The first function of our plugins on the way to an error."""
    frames = traceback.extract_tb(trace)
    return next((frame.name for frame in frames if "avalanche_curv/plugins/" in frame.filename), None)
