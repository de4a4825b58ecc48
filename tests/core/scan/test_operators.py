"""torch's database of operators: rows by `vmap` and products with the Hessian are right, or refused."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NEEDED = ("expecttest",)  # of torch.testing._internal


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in NEEDED),
    reason=f"torch's database of operators needs {', '.join(NEEDED)}: python -m pip install {' '.join(NEEDED)}",
)
def test_rows_and_products_of_every_operator_are_right_or_refused():
    script, root = Path(__file__).with_name("operators.py"), Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert not report["wrong"], "\n".join(["", *report["wrong"]])
    assert len(set(report["right"])) > 300
    assert len(report["refused"]) < len(report["right"]) / 10, "\n".join(["", *report["refused"]])
