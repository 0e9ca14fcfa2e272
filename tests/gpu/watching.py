"""What tests of the triton backend need to see of it: the runs behind its tables, and results that nothing wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from normscope.ops import triton_launch
from normscope.ops.triton_plan import Run


@contextmanager
def runs_of_passes(watch: Callable[..., None]) -> Iterator[None]:
    """``watch(*tensors)`` is called with the tensors of each pass before it is launched, copies of strided ones too."""
    original = triton_launch.launch_pass

    def launch_pass(runs: Sequence[Run], *rest: Any) -> tuple[Tensor, dict[int, Tensor]]:
        watch(*(tensor for run in runs for tensor in (run.gradient, run.weight) if tensor is not None))
        return original(runs, *rest)

    triton_launch.launch_pass = launch_pass
    try:
        yield
    finally:
        triton_launch.launch_pass = original


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Memory that is allocated without values holds NaN, or the largest integer: what a kernel forgets is seen."""
    original = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        tensor = original(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    torch.empty = empty
    try:
        yield
    finally:
        torch.empty = original
