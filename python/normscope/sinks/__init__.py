"""Where records go: a file, TensorBoard or the terminal; any callable that takes a record is a sink too."""

from __future__ import annotations

from normscope.sinks.base import Sink
from normscope.sinks.console import Console
from normscope.sinks.csv_file import CSV
from normscope.sinks.jsonl import JSONL, read_records
from normscope.sinks.tensorboard import TensorBoard

__all__ = ["CSV", "JSONL", "Console", "Sink", "TensorBoard", "read_records"]
