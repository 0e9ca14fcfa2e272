"""Without triton nothing here runs; what needs its interpreter runs in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

# Before triton is imported: no compiled kernel of another run is used, and none is left behind.
os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="triton-cache-"))

collect_ignore_glob: list[str] = []
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["*"]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Tests of the interpreter and of compiled kernels never share a process."""
    interpreted = (Path(__file__).parent / "interpreted") in collection_path.parents
    if collection_path.suffix == ".py" and interpreted != INTERPRETING:
        return True
    return None
