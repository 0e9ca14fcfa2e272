"""Gradient norms: ``total_norm``, ``max_component``, ``mean_component``, ``nonfinite`` and ``norm_{layer}``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from normscope.metrics.values import Values, concatenate
from normscope.stats import COLUMN_INDEX, Stats, merge, root

_SUM_ABS, _MAX_ABS, _NONFINITE = (COLUMN_INDEX[name] for name in ("sum_abs", "max_abs", "nonfinite"))


@lru_cache(maxsize=64)
def _keys(names: tuple[str, ...]) -> tuple[str, ...]:
    summaries = ("total_norm", "max_component", "mean_component", "nonfinite")
    return (*summaries, *(f"norm_{name}" for name in names))


def norms(stats: Stats, names: Sequence[str]) -> Values:
    """Norms of the gradients in ``stats``, whose parameters are called ``names``.

    ===================  ====================================================================
    ``total_norm``       L2 norm of the concatenation of all gradients
    ``max_component``    largest ``abs(g_i)`` over all gradients; NaN if none has an element
    ``mean_component``   mean ``abs(g_i)`` over all gradients; NaN if none has an element
    ``nonfinite``        number of components that are NaN or infinite
    ``norm_{layer}``     L2 norm of the gradient of that parameter
    ===================  ====================================================================
    """
    whole = merge(stats.sums)
    elements = sum(stats.counts)
    summaries = [
        root(whole, "sum_squares"),
        whole[_MAX_ABS] if elements else whole[_MAX_ABS] * math.nan,
        whole[_SUM_ABS] / elements if elements else whole[_SUM_ABS] * math.nan,
        whole[_NONFINITE],
    ]
    return Values(_keys(tuple(names)), concatenate([*summaries, stats.roots("sum_squares")]))
