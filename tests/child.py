"""Runs a function in a forked child, so that a child that hangs or dies fails the test instead of ending it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def in_child(function: Callable[[], T], timeout: float = 60.0) -> T:
    """What ``function`` returns in a forked child of this process.

    Raises:
        TimeoutError: no answer within ``timeout`` seconds.
        EOFError: the child died without an answer; standard error says of what.
    """
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=lambda: sender.send(function()), daemon=True)
    child.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            raise TimeoutError(f"the forked child gave no answer in {timeout} s")
        answer: T = receiver.recv()
    finally:
        child.kill()
        child.join()
        receiver.close()
    return answer
