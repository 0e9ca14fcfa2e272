"""Where records go: files, the terminal, services; any callable that takes a record is a sink too."""

from __future__ import annotations

from normscope.sinks.base import Sink
from normscope.sinks.console import Console
from normscope.sinks.csv_file import CSV
from normscope.sinks.jsonl import JSONL, read_records
from normscope.sinks.mlflow_run import MLflow
from normscope.sinks.parquet import Parquet
from normscope.sinks.queued import Queued
from normscope.sinks.tensorboard import TensorBoard
from normscope.sinks.trackio_run import Trackio
from normscope.sinks.wandb_run import WandB

__all__ = [
    "CSV",
    "JSONL",
    "Console",
    "MLflow",
    "Parquet",
    "Queued",
    "Sink",
    "TensorBoard",
    "Trackio",
    "WandB",
    "read_records",
]
