"""A safetensors file: its header tells all but the values, and each tensor is mapped for as long as it is in use."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from normscope.checkpoints.entries import CheckpointError, Entry, natural_order, one_line
from normscope.errors import require

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


class SafetensorsFile:
    """A safetensors file.

    Args:
        path: the file.

    Raises:
        CheckpointError: it is damaged, or holds something this version of torch has no dtype for.
        MissingExtraError: safetensors is not installed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._safe_open = require("safetensors", "checkpoints").safe_open
        try:
            with self._safe_open(path, framework="pt") as file:
                found = {name: file.get_slice(name) for name in sorted(file.keys(), key=natural_order)}
                described = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in found.items()}
        except Exception as error:  # SafetensorError derives from Exception alone
            raise CheckpointError(f"{path} is a damaged or truncated safetensors file: {one_line(error)}") from error
        self.entries = {
            name: Entry(shape, self._dtype(name, dtype), name) for name, (shape, dtype) in described.items()
        }

    def _dtype(self, name: str, stored: str) -> torch.dtype:
        dtype = getattr(torch, _DTYPES.get(stored, ""), None)
        if dtype is None:
            raise CheckpointError(
                f"{self._path}: {name} is stored as {stored}, which this version of torch cannot hold"
            )
        return cast(torch.dtype, dtype)

    def load(self, name: str) -> Tensor:
        """That tensor, mapped from the file.

        Raises:
            CheckpointError: the file has changed since it was opened.
        """
        # A mapping of its own for each tensor: memory that was read is given back with the tensor, not with the file.
        try:
            with self._safe_open(self._path, framework="pt") as file:
                tensor = cast(Tensor, file.get_tensor(name))
        except Exception as error:
            raise CheckpointError(f"{self._path}: {name} cannot be read: {one_line(error)}") from error
        # Old writers did not pad the header, so that the values may lie where no pointer to them may point.
        return tensor.clone() if tensor.data_ptr() % tensor.dtype.itemsize else tensor
