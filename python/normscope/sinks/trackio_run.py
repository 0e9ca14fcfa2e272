"""The Trackio sink: one log call a record, to the local database or a Space."""

from __future__ import annotations

from typing import Any

from normscope.errors import require
from normscope.record import Record
from normscope.sinks.console_table import describe_nonfinite
from normscope.sinks.queued import Queued


class Trackio(Queued):
    """Log each record to a run of Trackio, from a thread of its own (see ``Queued``).

    Keys and step are the record's own; Trackio takes steps in any order, and several records of one step. It keeps NaN
    and infinities. ``normscope/clip_stage`` is logged as text where it changes, and ``normscope/nonfinite``, with the
    parameter's name, at each record of a gradient that holds NaN or inf. Without a Space everything stays in the
    folder ``TRACKIO_DIR``. Needs the extra ``trackio``.

    Args:
        run: the run; by default the active one, or, where there is none, a new one, which ``close`` finishes.
        size, timeout: as in ``Queued``.
        **init: what ``trackio.init`` takes, for a new run; ``project`` at least.

    Raises:
        MissingExtraError: trackio is not installed.

    Example:
        >>> import normscope as ns
        >>> sink = ns.sinks.Trackio(project="grokking")           # doctest: +SKIP
        >>> monitor = ns.Monitor(model, [ns.Norms()], [sink])     # doctest: +SKIP
    """

    def __init__(self, run: Any = None, *, size: int = 1000, timeout: float = 30.0, **init: Any) -> None:
        trackio = require("trackio", "trackio")
        self._active = require("trackio.context_vars", "trackio").current_run
        active = run if run is not None else self._active.get()
        self._run = active if active is not None else trackio.init(**init)
        self._is_new = active is None
        super().__init__(_Log(self._run, finish=self._is_new), size=size, timeout=timeout)

    def _close(self) -> None:
        super()._close()
        if self._is_new and self._active.get() is self._run:
            self._active.set(None)  # what trackio.finish() does, and the thread, in a context of its own, cannot


class _Log:
    """Writes records to the run, and finishes it in the end if so told."""

    def __init__(self, run: Any, finish: bool) -> None:
        self._run, self._finish = run, finish
        self._clip_stage: str | None = None

    def write(self, record: Record) -> None:
        row: dict[str, object] = dict(record)
        if record.clip_stage not in (None, self._clip_stage):
            self._clip_stage = row["normscope/clip_stage"] = record.clip_stage
        if record.nonfinite_parameters:
            row["normscope/nonfinite"] = describe_nonfinite(record)
        self._run.log(row, step=record.step)

    def close(self) -> None:
        if self._finish:
            self._run.finish()

    def __repr__(self) -> str:
        return f"Trackio({self._run.name!r})"
