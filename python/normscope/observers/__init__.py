"""The observers normscope ships: gradient norms, token gradients and weights."""

from __future__ import annotations

from normscope.observer import Observer
from normscope.observers.gradients import Norms, TokenGradient
from normscope.observers.weights import WeightTracking

__all__ = ["SHIPPED", "Norms", "TokenGradient", "WeightTracking"]

#: Known to change nothing, so that no monitor checks that they did not; a subclass may.
SHIPPED: frozenset[type[Observer]] = frozenset({Norms, TokenGradient, WeightTracking})
