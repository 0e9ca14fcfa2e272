"""A state dict saved by ``torch.save``: loaded with ``weights_only=True``, so that no code in the file runs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normscope.checkpoints.entries import CheckpointError, Entry, one_line

#: Where training scripts put the state dict in what they save; ``trainer`` is where ``normscope grok`` has its own.
_NESTED = ("state_dict", "model_state_dict", "model", "trainer")
#: A mapping is renewed before more than this was read through it: what was read counts as this process's memory.
_RENEW_BYTES = 64 << 20


class PyTorchFile:
    """A ``.pt``, ``.pth`` or ``.bin`` file with a state dict, also one under ``state_dict`` or ``model``.

    The file is mapped. The format from before PyTorch 1.6 cannot be, and is read as a whole.

    Args:
        path: the file.

    Raises:
        CheckpointError: it is damaged, holds something else, or could run code.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with open(path, "rb") as file:
            self._is_mapped = file.read(2) == b"PK"
        self._tensors = self._state_dict()
        self._bytes_read = 0
        first: dict[object, str] = {}
        self.entries = {
            name: Entry(tuple(tensor.shape), tensor.dtype, first.setdefault(_place(tensor), name))
            for name, tensor in self._tensors.items()
        }

    def load(self, name: str) -> Tensor:
        """That tensor, mapped from the file."""
        size = self._tensors[name].numel() * self._tensors[name].itemsize
        if self._is_mapped and self._bytes_read and self._bytes_read + size > _RENEW_BYTES:
            self._tensors = self._state_dict()
            self._bytes_read = 0
            if name not in self._tensors:
                raise CheckpointError(f"{self._path} has changed while it was read")
        self._bytes_read += size
        return self._tensors[name].detach()

    def _state_dict(self) -> dict[str, Tensor]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of TorchScript archives, which are refused below
                found = torch.load(self._path, map_location="cpu", weights_only=True, mmap=self._is_mapped)
        except Exception as error:  # zip, pickle, key, type, struct: a damaged file fails in many ways
            raise CheckpointError(f"{self._path} {_reason(error, is_zip=self._is_mapped)}") from error
        return _tensors_of(found, self._path)


def _place(tensor: Tensor) -> object:
    """What is equal for tensors that are the same elements of the same memory."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _reason(error: Exception, *, is_zip: bool) -> str:
    text = str(error)
    if "TorchScript" in text:
        return "is a TorchScript archive, which holds code; save the model's state_dict() instead"
    held = re.search(r"unsupported (?:global: )?(?:global|class) ([\w.]+)", text, re.IGNORECASE)
    if held:
        return f"holds a pickled {held[1]}, and unpickling objects can run code; save the model's state_dict() instead"
    if "Weights only load failed" in text:
        return "is no PyTorch file, is damaged, or holds pickled objects that could run code"
    if is_zip:
        return "is truncated, damaged, or another kind of zip archive than torch.save writes"
    return f"is damaged, truncated or no PyTorch file: {one_line(error)}"


def _tensors_of(found: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in what a file holds.

    Raises:
        CheckpointError: there is none.
    """
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not a state dict")
    for key in _NESTED:
        if isinstance(found.get(key), Mapping):
            return _tensors_of(found[key], path)
    # Modules may keep more than tensors, under names that end like this.
    state = {name: value for name, value in found.items() if not str(name).endswith("_extra_state")}
    for name, value in state.items():
        if not isinstance(value, Tensor) or not isinstance(name, str):
            raise CheckpointError(
                f"{path} is not a state dict: it maps {name!r} to a {type(value).__name__}, and none was found under "
                + ", ".join(_NESTED[:3])
            )
    return state
