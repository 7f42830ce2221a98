"""Threads that do not keep the process: for what may hang in a library, or on a disk."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Any, Protocol, TypeVar

from twisted.internet.defer import Deferred
from twisted.python.threadpool import ThreadPool

T = TypeVar("T")


class InThread(Protocol):
    """Calls a function that waits where it holds up nobody."""

    def __call__(self, function: Callable[[], T], /) -> Deferred[T]:
        """What it returns."""


class _DaemonThread(Thread):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, daemon=True, **options)


class DaemonThreadPool(ThreadPool):
    """A ThreadPool whose threads end with the process, whatever they wait for."""

    threadFactory = _DaemonThread
