"""Without triton nothing here runs; what needs its interpreter runs in a process of its own."""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from gpu.children import CHILDREN, Child, start

#: Triton reads it when it is imported: this process interprets kernels, or it compiles them.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if "TRITON_CACHE_DIR" not in os.environ:  # no kernel compiled by an earlier run is used, and none is left behind
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton-cache-")
    atexit.register(shutil.rmtree, os.environ["TRITON_CACHE_DIR"], ignore_errors=True)


class WithoutTriton(pytest.Module):
    """A file of tests that is skipped."""

    def collect(self) -> Iterable[pytest.Item]:
        """Says why."""
        pytest.skip("triton is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skips every file where triton is missing."""
    if importlib.util.find_spec("triton") is None:
        module: pytest.Module = WithoutTriton.from_parent(parent, path=module_path)
        return module
    return None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Tests in the interpreter and tests of compiled kernels never share a process."""
    interpreted = Path(__file__).parent / "interpreted" in collection_path.parents
    return True if collection_path.is_file() and interpreted != INTERPRETING else None


@pytest.fixture(scope="session", autouse=True)
def children(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Child]]:
    """Processes that ``test_interpreted.py`` waits for; they start with the first test of this folder."""
    asked = any(item.path.name == "test_interpreted.py" for item in request.session.items)
    running = {name: start(name, tmp_path_factory.mktemp("interpreted")) for name in CHILDREN} if asked else {}
    yield running
    for child in running.values():
        child.process.kill()
        child.process.wait()
