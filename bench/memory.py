"""Peak memory of a call, as sampling the process shows it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak_extra_bytes(run: Callable[[], object]) -> int:
    """Growth of resident memory while ``run`` runs, sampled by another thread."""
    start, peak, done = _resident_bytes(), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _resident_bytes())
            time.sleep(0.0002)

    sampler = threading.Thread(target=sample)
    sampler.start()
    run()
    done.set()
    sampler.join()
    return peak - start
