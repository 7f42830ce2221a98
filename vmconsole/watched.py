"""Files that are read again when they change: taken only whole, and never half of a pair."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.task import LoopingCall
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure

from vmconsole.clocks import utc_now
from vmconsole.errors import ConfigError
from vmconsole.threads import InThread

T = TypeVar("T")
Stamp = tuple[object, ...]

_log = Logger()
_LOOK_SECONDS = 5.0


class Expiry(NamedTuple):
    """A certificate's end that is near, or past. ``text`` names the file, the date, the cure."""

    text: str
    expired: bool


class _Sight(NamedTuple, Generic[T]):
    """What one look saw; without a value and a problem there was no reason to read."""

    stamp: Stamp
    value: T | None = None
    problem: str = ""


class Watched(Generic[T]):
    """Files that belong together: ``value`` is what ``load`` last made of them.

    Two values are the same when ``essence`` of them is. ``look`` is for a thread; ``take`` and
    ``value`` are not, and no two looks go on at a time.
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        load: Callable[[], T],
        essence: Callable[[T], object],
    ) -> None:
        self.files = files
        self._load = load
        self._essence = essence
        # From before the reading: a change in the middle of it shows at the first look.
        self._taken = self._seen = self._stamp()
        self._refused: tuple[Stamp, str] | None = None
        self.value = load()

    def look(self, asked: bool) -> _Sight[T]:
        """See whether there is something to take; ``asked``: whatever was seen before."""
        stamp = self._stamp()
        known = stamp == self._taken and self._refused is None
        if not asked and (known or stamp != self._seen):
            return _Sight(stamp)
        value, problem = None, ""
        try:
            value = self._load()
        except ConfigError as error:
            problem = str(error)
        after = self._stamp()
        if after == stamp:
            return _Sight(stamp, value, problem)
        return _Sight(after, problem=f"{self} changed while being read." if asked else "")

    def take(self, sight: _Sight[T], asked: bool) -> bool:
        """Go by what a look saw, and log that. Whether there is a new value."""
        self._seen = sight.stamp
        if sight.problem:
            refused = (sight.stamp, sight.problem)
            if asked or refused != self._refused:
                _log.warn("{text} What was read before stays in use.", text=sight.problem)
            self._refused = refused
            return False
        if sight.value is None:
            return False
        was_refused = self._refused is not None
        self._refused = None
        self._taken = sight.stamp
        if self._essence(sight.value) != self._essence(self.value):
            self.value = sight.value
            _log.info("{files}: changed, and in use from now on.", files=str(self))
            return True
        if self.files and (was_refused or asked):
            _log.info("{files}: in order, and the same as before.", files=str(self))
        return False

    def _stamp(self) -> Stamp:
        return tuple(_stamp(path) for path in self.files.values())

    def __str__(self) -> str:
        return ", ".join(f"{setting} ({path})" for setting, path in self.files.items())


def _stamp(path: Path) -> Stamp:
    try:
        status = os.stat(path)
    except OSError as error:
        return (error.errno,)
    # The last one shows a change of the mode, too, and a copy that keeps the time of the other.
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class WatchedFiles(Service):
    """Looks every few seconds whether files changed, while it runs.

    It takes what is whole, fits together, and was the same at two looks; until then what was read
    before stays in use, and the log says why.
    """

    def __init__(
        self,
        reactor: Any,
        watched: Sequence[Watched[Any]],
        in_thread: InThread | None,
        changed: Callable[[], object] = lambda: None,
    ) -> None:
        """``in_thread`` runs what waits for the disk; None: in the reactor's threads.

        ``changed`` is called after a look that took something.
        """
        self._reactor = reactor
        self._watched = watched
        self._in_thread = in_thread or threads_of(reactor)
        self._changed = changed
        self._one_at_a_time = DeferredLock()
        self._looking = LoopingCall(self._look, asked=False)
        self._looking.clock = reactor

    @property
    def has_files(self) -> bool:
        """Whether there is any file to read."""
        return any(watched.files for watched in self._watched)

    def reload(self) -> Deferred[None]:
        """Read all files now, and log what came of it. Takes also what changed only just now."""
        if not self.has_files:
            _log.info("There is no file that would have to be read again.")
        return self._look(asked=True)

    def expiries(self, now: datetime) -> Iterator[Expiry]:
        """Which certificates in use end soon, or have ended."""
        raise NotImplementedError

    def startService(self) -> None:
        """See IService."""
        super().startService()
        self._looking.start(_LOOK_SECONDS, now=False)

    def stopService(self) -> Deferred[None]:
        """See IService. Fires when no file is read any more."""
        super().stopService()
        if self._looking.running:
            self._looking.stop()
        return self._one_at_a_time.run(lambda: None)

    def _look(self, asked: bool) -> Deferred[None]:
        looked = self._one_at_a_time.run(lambda: Deferred.fromCoroutine(self._look_at_all(asked)))
        # An error would end the LoopingCall.
        return looked.addErrback(look_failed)

    async def _look_at_all(self, asked: bool) -> None:
        changed = False
        for watched in self._watched:
            if watched.files:
                sight = await self._in_thread(partial(watched.look, asked))
                changed |= watched.take(sight, asked)
        if changed:
            self._changed()
            tell(self.expiries(utc_now(self._reactor)))


def reload_all(services: Sequence[WatchedFiles]) -> None:
    """Have each of these read its files now; that there is nothing to read is logged once."""
    for service in [each for each in services if each.has_files] or services[:1]:
        service.reload()


def tell(found: Iterator[Expiry] | Sequence[Expiry]) -> None:
    """Log these expiries."""
    for expiry in found:
        if expiry.expired:
            _log.error("{text}", text=expiry.text)
        else:
            _log.warn("{text}", text=expiry.text)


def look_failed(failure: Failure) -> None:
    """Log an error that nobody thought of."""
    _log.failure("Looking at the certificates", failure)


def threads_of(reactor: Any) -> InThread:
    """The reactor's own threads."""
    # The pool is not there before it is needed: twistd forks in between.
    return lambda function: deferToThreadPool(reactor, reactor.getThreadPool(), function)
