"""libvirt's event loop on Twisted's reactor.

libvirt calls the six functions from any thread while it holds locks of its own. So an id is handed
out at once, and whatever touches the reactor happens in the reactor's thread: later, but for the
updates that come from there, of which each keystroke causes several and which call nobody back.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from twisted.internet.interfaces import (
    IDelayedCall,
    IReactorFDSet,
    IReactorFromThreads,
    IReactorTime,
    IReadWriteDescriptor,
)
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer


class IHostReactor(IReactorTime, IReactorFDSet, IReactorFromThreads):
    """What the ways to the hosts ask of a reactor."""


class LibvirtEventLoop:
    """Drives libvirt's descriptors and timers; see virEventRegisterImpl."""

    _log = Logger()
    # libvirt takes one implementation per process: the first of each libvirt module stays.
    _registered: ClassVar[WeakKeyDictionary[Any, LibvirtEventLoop]] = WeakKeyDictionary()

    def __init__(self, reactor: IHostReactor, libvirt: Any) -> None:
        """To be made in the reactor's thread."""
        self._reactor = reactor
        self._libvirt = libvirt
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._thread = threading.get_ident()
        # What libvirt wants of each watch (events) and timer (milliseconds), as it said last.
        self._wanted: dict[int, int] = {}
        self._watches: dict[int, _Watch] = {}
        self._timers: dict[int, _Timer] = {}
        self._unfreed = 0

    def register(self) -> LibvirtEventLoop:
        """Hand the loop to libvirt, before the first connection. Returns the one in use.

        A second call does nothing. Raises RuntimeError when another reactor was here first.
        """
        loop = self._registered.get(self._libvirt)
        if loop is None:
            loop = self._registered[self._libvirt] = self
            # Errors are raised as well; libvirt would print each one to stderr besides.
            self._libvirt.registerErrorHandler(lambda _context, _error: None, None)
            self._libvirt.virEventRegisterImpl(
                self._add_handle,
                self._update_handle,
                self._remove_handle,
                self._add_timeout,
                self._update_timeout,
                self._remove_timeout,
            )
        elif loop._reactor is not self._reactor:
            raise RuntimeError("libvirt's event loop already runs on another reactor")
        return loop

    def is_idle(self) -> bool:
        """No descriptor, no timer, and nothing that is yet to be freed."""
        return not (self._wanted or self._watches or self._timers or self._unfreed)

    def _new_id(self, wanted: int) -> int:
        with self._lock:
            id = next(self._ids)
            self._wanted[id] = wanted
        return id

    def _update(self, id: int, wanted: int) -> None:
        with self._lock:
            if id not in self._wanted:
                return
            self._wanted[id] = wanted
        if threading.get_ident() == self._thread:
            self._apply(id)
        else:
            self._reactor.callFromThread(self._apply, id)

    def _apply(self, id: int) -> None:
        # The last word counts, also when an earlier one arrives after it from another thread.
        wanted = self._wanted.get(id)
        if wanted is None:
            return
        if watch := self._watches.get(id):
            watch.arm(wanted)
        elif timer := self._timers.get(id):
            timer.set(wanted)

    def _retire(self, id: int) -> bool:
        """From now on the id's callback is not called, also before the reactor takes it out."""
        with self._lock:
            if self._wanted.pop(id, None) is None:
                return False
            self._unfreed += 1
        return True

    def _call(self, id: int, callback: Callable[..., object], *arguments: object) -> None:
        if id in self._wanted:
            try:
                callback(id, *arguments)
            except Exception:
                self._log.failure("libvirt's callback {id} failed", id=id)

    # Only ever in a turn of the reactor's own: freeing takes locks that libvirt may hold around
    # removeHandle and removeTimeout.
    def _free(self, opaque: Any) -> None:
        try:
            self._libvirt.virEventInvokeFreeCallback(opaque)
        finally:
            with self._lock:
                self._unfreed -= 1

    def _add_handle(
        self, fd: int, events: int, callback: Callable[..., object], opaque: Any
    ) -> int:
        try:
            # libvirt may close its own right after removeHandle, while the reactor still has it;
            # and two watches may share one.
            ours = os.dup(fd)
        except OSError:
            self._log.failure("no descriptor is left for libvirt")
            return -1
        id = self._new_id(events)

        def deliver(happened: int) -> None:
            self._call(id, callback, fd, happened, opaque)

        def start() -> None:
            self._watches[id] = _Watch(self._reactor, self._libvirt, ours, deliver, opaque)
            self._apply(id)

        self._reactor.callFromThread(start)
        return id

    def _update_handle(self, id: int, events: int) -> None:
        # libvirt repeats itself with each message. (A timer's repetition starts it anew.)
        if self._wanted.get(id) != events:
            self._update(id, events)

    def _remove_handle(self, id: int) -> int:
        def remove() -> None:
            watch = self._watches.pop(id)
            watch.close()
            self._free(watch.opaque)

        if not self._retire(id):
            return -1
        self._reactor.callFromThread(remove)
        return 0

    def _add_timeout(self, interval: int, callback: Callable[..., object], opaque: Any) -> int:
        id = self._new_id(interval)

        def start() -> None:
            self._timers[id] = _Timer(
                self._reactor, lambda: self._call(id, callback, opaque), opaque
            )
            self._apply(id)

        self._reactor.callFromThread(start)
        return id

    def _update_timeout(self, id: int, interval: int) -> None:
        self._update(id, interval)

    def _remove_timeout(self, id: int) -> int:
        def remove() -> None:
            timer = self._timers.pop(id)
            timer.set(-1)
            self._free(timer.opaque)

        if not self._retire(id):
            return -1
        self._reactor.callFromThread(remove)
        return 0


@implementer(IReadWriteDescriptor)
class _Watch:
    """One descriptor that libvirt watches: our own duplicate of it."""

    def __init__(
        self,
        reactor: IHostReactor,
        libvirt: Any,
        fd: int,
        deliver: Callable[[int], None],
        opaque: Any,
    ) -> None:
        self.opaque = opaque
        self._reactor = reactor
        self._libvirt = libvirt
        self._fd = fd
        self._deliver = deliver
        self._hung_up = False

    def arm(self, events: int) -> None:
        """Watch for these events from now on; after a hang-up for none, because it would spin."""
        if self._hung_up:
            return
        if events & self._libvirt.VIR_EVENT_HANDLE_READABLE:
            self._reactor.addReader(self)
        else:
            self._reactor.removeReader(self)
        if events & self._libvirt.VIR_EVENT_HANDLE_WRITABLE:
            self._reactor.addWriter(self)
        else:
            self._reactor.removeWriter(self)

    def close(self) -> None:
        """Stop watching and close the duplicate."""
        self.arm(0)
        os.close(self._fd)

    def fileno(self) -> int:
        return self._fd

    def logPrefix(self) -> str:
        return "libvirt"

    def doRead(self) -> None:
        self._deliver(self._libvirt.VIR_EVENT_HANDLE_READABLE)

    def doWrite(self) -> None:
        self._deliver(self._libvirt.VIR_EVENT_HANDLE_WRITABLE)

    def connectionLost(self, reason: Failure) -> None:
        # The reactor has taken us out already.
        self._hung_up = True
        self._deliver(self._libvirt.VIR_EVENT_HANDLE_ERROR | self._libvirt.VIR_EVENT_HANDLE_HANGUP)


class _Timer:
    """One timer of libvirt: it repeats until it is set anew."""

    def __init__(self, reactor: IHostReactor, deliver: Callable[[], None], opaque: Any) -> None:
        self.opaque = opaque
        self._reactor = reactor
        self._deliver = deliver
        self._next: IDelayedCall | None = None

    def set(self, interval: int) -> None:
        """Milliseconds; 0: in each turn of the reactor; -1: not at all."""
        if self._next is not None:
            self._next.cancel()
            self._next = None
        if interval >= 0:
            self._next = self._reactor.callLater(interval / 1000, self._fire, interval)

    def _fire(self, interval: int) -> None:
        self._next = self._reactor.callLater(interval / 1000, self._fire, interval)
        self._deliver()
