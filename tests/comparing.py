"""How results are compared: in units of float64 rounding; NaN, a wrong dtype and a value off the bound all fail."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps


def assert_close(actual: Tensor, expected: Tensor, *, ulps: float, scale: Tensor | float | None = None) -> None:
    """Fail unless every ``abs(actual - expected) <= ulps * eps * scale``; NaN and inf must stand in the same places.

    Args:
        actual: float64.
        expected: float64, of the same shape.
        ulps: bound in units of float64's eps.
        scale: what rounding errors are relative to; by default ``abs(expected)``. For sums with cancellation pass the
            sum of the magnitudes.
    """
    assert actual.dtype == expected.dtype == torch.float64, f"{actual.dtype} against {expected.dtype}"
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    finite = expected.isfinite()
    same = torch.where(expected.isnan(), actual.isnan(), actual == expected)
    bound = ulps * EPS * (expected.abs() if scale is None else torch.as_tensor(scale, dtype=torch.float64))
    error = torch.where(finite, (actual - expected).abs(), 0.0)
    ok = torch.where(finite, error <= bound, same)
    if not bool(ok.all()):
        first = int((~ok.reshape(-1)).nonzero()[0])
        raise AssertionError(
            f"element {first}: {actual.reshape(-1)[first].item()!r}, expected {expected.reshape(-1)[first].item()!r}, "
            f"bound {bound.broadcast_to(expected.shape).reshape(-1)[first].item():.3g}"
        )


def bits(tensor: Tensor) -> list[int]:
    """The bit patterns of a float64 tensor, so that NaN equals NaN and -0.0 differs from 0.0."""
    return tensor.contiguous().view(torch.int64).flatten().tolist()
