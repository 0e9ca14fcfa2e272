"""Files of lines that survive a kill: whole lines are appended, a torn last one is mended, a rewrite is atomic."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

_TAIL_BLOCK = 1 << 16  # bytes read at a time while looking for the last line break


class LineAppender:
    """Appends lines to ``path``, each with one ``write()`` of the operating system and nothing kept back."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()

    def append(self, line: bytes) -> None:
        """Append ``line`` and a line break.

        Raises:
            OSError: the line did not fit (a full disk, say); the file is as it was before.
        """
        data = line + b"\n"
        written = self._file.write(data)
        if written != len(data):
            self._file.truncate(self._file.tell() - written)
            raise OSError(f"{self._file.name}: no room for a line of {len(data)} bytes")

    def close(self) -> None:
        self._file.close()


def mend_last_line(path: Path, is_whole: Callable[[bytes], bool]) -> None:
    """Make the file ``path`` end with a line break, if it holds anything.

    A last line without one is what a killed writer leaves. It is cut off, unless ``is_whole(line)``: then only its
    line break is missing.
    """
    with open(path, "rb+") as file:
        end = start = file.seek(0, os.SEEK_END)
        tail = b""
        while start > 0 and b"\n" not in tail:
            size = min(_TAIL_BLOCK, start)
            start = file.seek(start - size)
            tail = file.read(size) + tail
        last_line = tail[tail.rfind(b"\n") + 1 :]
        if last_line and is_whole(last_line):
            file.seek(end)
            file.write(b"\n")
        elif last_line:
            file.truncate(end - len(last_line))


def replace_content(path: Path, lines: Iterable[bytes]) -> None:
    """Replace what ``path`` holds by ``lines`` in one step: whoever looks sees the old content or the new one."""
    target = path.resolve()
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with open(handle, "wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
