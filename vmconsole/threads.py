"""Threads that do not keep the process: for what may hang in a library, or on a disk."""

from __future__ import annotations

from threading import Thread
from typing import Any

from twisted.python.threadpool import ThreadPool


class _DaemonThread(Thread):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, daemon=True, **options)


class DaemonThreadPool(ThreadPool):
    """A ThreadPool whose threads end with the process, whatever they wait for."""

    threadFactory = _DaemonThread
