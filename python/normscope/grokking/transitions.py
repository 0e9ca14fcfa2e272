"""When a run memorised and when it grokked, read off its records (METRICS: grokking quantities)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from normscope.record import Record

MEMORISED = 0.99  # training accuracy
GENERALISED = 0.90  # test accuracy


@dataclass(frozen=True)
class Transitions:
    """T_mem, T_grok and the total weight norm at T_grok; None for what the records do not show.

    Both times are in the records' own unit: optimizer steps in a step loop, epochs in an epoch loop.
    """

    t_mem: int | None = None
    t_grok: int | None = None
    norm_at_grok: float | None = None


def find_transitions(records: Iterable[Record]) -> Transitions:
    """T_mem: first record with train accuracy >= 0.99. T_grok: first with test accuracy >= 0.90.

    Example:
        >>> def record(step, train, test):
        ...     return Record(step, "post_step", {"task/train_accuracy": train, "task/test_accuracy": test})
        >>> find_transitions([record(1, 0.5, 0.0), record(2, 1.0, 0.1), record(9, 1.0, 0.9)])
        Transitions(t_mem=2, t_grok=9, norm_at_grok=None)
    """
    t_mem = t_grok = norm_at_grok = None
    for record in records:
        if t_mem is None and record["task/train_accuracy"] >= MEMORISED:
            t_mem = record.step
        if t_grok is None and record["task/test_accuracy"] >= GENERALISED:
            t_grok, norm_at_grok = record.step, record.get("weight_norm/total")
    return Transitions(t_mem, t_grok, norm_at_grok)


def has_stayed_generalised(records: Sequence[Record], count: int) -> bool:
    """Whether the last ``count`` records all have a test accuracy of at least 0.90."""
    last = records[-count:]
    return len(last) == count and all(record["task/test_accuracy"] >= GENERALISED for record in last)
