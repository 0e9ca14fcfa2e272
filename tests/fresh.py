"""Runs a script in a fresh interpreter, for what is decided when the package is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import normscope


def run_python(script: str, expect_failure: bool = False, **environment: str) -> str:
    """Standard output of the script, or standard error where it is expected to fail."""
    paths = [str(Path(normscope.__file__).parents[1]), str(Path(__file__).parent)]
    inherited = {name: value for name, value in os.environ.items() if name != "NORMSCOPE_BACKEND"}
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env={**inherited, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode != 0) == expect_failure, ended.stderr
    return ended.stderr if expect_failure else ended.stdout
