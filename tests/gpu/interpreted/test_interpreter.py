"""What the checked interpreter sees, and what it computes rightly where the stock one does not."""

from __future__ import annotations

import torch

from gpu import sample_kernels as kernels
from gpu.tools.interpreter import assert_no_races, checked
from gpu.tools.memory_map import guarded


def test_a_right_kernel_passes() -> None:
    x, out = guarded(torch.randn(1000)), guarded(torch.zeros(1000))
    with checked() as report:
        kernels.doubled[(8,)](x, out, 1000, BLOCK=128)
    assert_no_races(report)
    assert torch.equal(out, 2 * x)
    assert report.kernels == ["doubled"]
