"""Conch narrates every packet; here it speaks when something is wrong."""

from __future__ import annotations

from twisted.logger import (
    FilteringLogObserver,
    Logger,
    LogLevel,
    LogLevelFilterPredicate,
    globalLogPublisher,
)


def conch_logger(namespace: str) -> Logger:
    """A logger for a subclass of Conch's, that lets warnings and worse through."""
    predicate = LogLevelFilterPredicate(defaultLogLevel=LogLevel.warn)
    return Logger(namespace, observer=FilteringLogObserver(globalLogPublisher, [predicate]))
