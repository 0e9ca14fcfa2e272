"""What every sink of the package shares: it is closed once, works as a context manager, and names itself in errors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar

from normscope.errors import SinkError
from normscope.record import Record

if TYPE_CHECKING:
    from typing_extensions import Self


class Sink(ABC):
    """A receiver of records.

    The monitor needs no more than ``write(record)`` and ``close()``, so a sink of one's own need not derive from this.

    Args:
        target: what the sink writes to, as its ``repr`` shows it.
    """

    _reserved: ClassVar[frozenset[str]] = frozenset()  # keys that the sink's format uses itself

    def __init__(self, target: str) -> None:
        self._target = target
        self._closed = False

    def write(self, record: Record) -> None:
        """Write one record.

        Raises:
            SinkError: the sink is closed, or the record has a key that the sink's format uses itself.
        """
        if self._closed:
            raise SinkError(f"{self!r} is closed; the record of step {record.step} was not written")
        # A sink that reserves no key leaves the values alone: reading a record may wait for a device.
        taken = self._reserved.intersection(record) if self._reserved else frozenset()
        if taken:
            raise SinkError(f"{self!r} uses the key {min(taken)!r} itself; give that value of the record another name")
        self._write(record)

    def close(self) -> None:
        """Write what is pending and release the target; closing twice is allowed."""
        if not self._closed:
            self._closed = True
            self._close()

    @abstractmethod
    def _write(self, record: Record) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._target!r})"
