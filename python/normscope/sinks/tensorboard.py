"""The TensorBoard sink: each value of a record is a scalar under its own key."""

from __future__ import annotations

import os
from typing import Any

from normscope.errors import require
from normscope.record import Record
from normscope.sinks.base import Sink


class TensorBoard(Sink):
    """Write each record as scalars for TensorBoard, through ``torch.utils.tensorboard``.

    TensorBoard keeps float32; NaN and infinities are passed on, and it marks them in its plots. What was written is on
    disk when ``write`` returns. Needs the extra ``tensorboard``.

    Args:
        log_dir: the run's folder; it may hold events of an earlier part of the same run.
        purge_step: hide what the folder already holds of this step and later; give the checkpoint's step + 1 when a
            run resumes. None hides nothing.

    Raises:
        MissingExtraError: tensorboard is not installed.

    Example:
        >>> import tempfile
        >>> import normscope as ns
        >>> with ns.sinks.TensorBoard(tempfile.mkdtemp()) as sink:
        ...     sink.write(ns.Record(10, ns.LifecyclePoint.POST_STEP, {"norms/total_norm": 0.1}))
    """

    def __init__(self, log_dir: str | os.PathLike[str], *, purge_step: int | None = None) -> None:
        super().__init__(os.fspath(log_dir))
        self._summary = require("tensorboard.compat.proto.summary_pb2", "tensorboard").Summary
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(os.fspath(log_dir), purge_step=purge_step)

    def _write(self, record: Record) -> None:
        # One event for all values: add_scalar would make one each, ten times slower.
        values = [self._summary.Value(tag=key, simple_value=value) for key, value in record.items()]
        self._writer.file_writer.add_summary(self._summary(value=values), record.step)
        self._writer.flush()

    def _close(self) -> None:
        self._writer.close()
