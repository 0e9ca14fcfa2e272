"""Where commands that read a checkpoint write: files that appear whole or not at all, and standard output."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from normscope.errors import NormscopeError, require
from normscope.grokking.run_folder import write_atomically

_PICTURES = (".png", ".pdf", ".svg")


class OutputError(NormscopeError, OSError):
    """A file cannot be written; the message names it."""


def prepare(path: Path) -> None:
    """Make the folder of ``path`` and check that a file can be there, before much is computed.

    Raises:
        OutputError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error
    if path.is_dir():
        raise OutputError(f"{path} cannot be written: it is a folder")


def check_picture(path: Path) -> None:
    """Check that a picture can be drawn to ``path``.

    Raises:
        MissingExtraError: matplotlib is not installed.
        BadParameter: the ending is none of a format that is drawn.
    """
    require("matplotlib.figure", "plot")
    if path.suffix not in _PICTURES:
        raise typer.BadParameter(f"--plot {path}: the ending must be one of {', '.join(_PICTURES)}")


def write(path: Path, content: bytes) -> None:
    """Put ``content`` into the file ``path``, or on standard output if it is ``-``.

    Raises:
        OutputError: the file cannot be written.
    """
    if str(path) == "-":
        sys.stdout.write(content.decode())
        return
    try:
        write_atomically(path, lambda file: file.write(content))
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error
