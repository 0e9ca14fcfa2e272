"""Named values on a device: what a metric function returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Values(NamedTuple):
    """Metric names and their float64 values, ``[len(keys)]`` on the device they were computed on."""

    keys: Sequence[str]
    values: Tensor

    def to_dict(self) -> dict[str, float]:
        """The values on the host; this waits for the device."""
        return dict(zip(self.keys, self.values.tolist(), strict=True))
