"""Checkpoints on disk, read tensor by tensor: safetensors and PyTorch files, alone or as the shards of a folder."""

from __future__ import annotations

from normscope.checkpoints.checkpoint import Checkpoint, open_checkpoint
from normscope.checkpoints.entries import CheckpointError, natural_order

__all__ = ["Checkpoint", "CheckpointError", "natural_order", "open_checkpoint"]
