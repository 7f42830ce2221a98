"""Threads for what waits for a host; see law 1 in docs/architecture.md."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Thread
from typing import Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred, fail
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

from vmconsole.errors import HostUnreachable
from vmconsole.hypervisor.libvirt_eventloop import IHostReactor
from vmconsole.text import printable
from vmconsole.threads import DaemonThreadPool

T = TypeVar("T")

_BASE = 4
# Calls to a dead host that nobody waits for any more: as many are given a substitute.
_STUCK = 64


class HostThreads:
    """A small pool of one host's own, so that a host that hangs holds up nobody else's calls.

    It starts with the first call.
    """

    _log = Logger()

    def __init__(
        self,
        reactor: IHostReactor,
        host: str,
        make_pool: Callable[[int, int, str], ThreadPool] | None = None,
    ) -> None:
        self._reactor = reactor
        self._host = host
        self._pool = (make_pool or DaemonThreadPool)(0, _BASE, f"host {host}")
        self._lent = 0
        self._stuck = 0
        self._waiting: set[Deferred[Any]] = set()
        self._stopped = False

    def call(
        self,
        function: Callable[[], T],
        limit: float | None = None,
        late: Callable[[T], object] | None = None,
    ) -> Deferred[T]:
        """The result of ``function``, called in a thread.

        After ``limit`` seconds the Deferred fails with HostUnreachable. When it comes after that,
        or after a cancel, the result goes to ``late``, in a thread; with ``late``, which undoes it,
        what has not begun by then is left undone.
        """
        if self._stopped:
            return fail(self._stopping())
        if not self._pool.started:
            self._pool.start()
        begun = stuck = False

        def cancelled(_: object) -> None:
            nonlocal stuck
            if begun or late is None:
                stuck = True
                self._count_stuck(1)

        def run() -> T:
            nonlocal begun
            begun = True
            if waiting.called and late is not None:
                raise CancelledError
            return function()

        waiting: Deferred[T] = Deferred(cancelled)
        self._waiting.add(waiting)

        def deliver(succeeded: bool, result: Any) -> None:
            if not waiting.called:
                waiting.callback(result) if succeeded else waiting.errback(result)
                return
            if stuck:
                self._count_stuck(-1)
            if succeeded and late is not None:
                self._run(partial(late, result))

        def forget(result: Any) -> Any:
            self._waiting.discard(waiting)
            return result

        waiting.addBoth(forget)
        if limit is not None:
            waiting.addTimeout(limit, self._reactor, self._no_answer)
        self._pool.callInThreadWithCallback(partial(self._reactor.callFromThread, deliver), run)
        return waiting

    def lend(self, threads: int) -> None:
        """Let the pool have so many more threads; negative: take them back."""
        self._lent += threads
        self._adjust()

    def stop(self) -> Deferred[None]:
        """End the threads; who still waits is told at once. Fires when the last thread is gone."""
        self._stopped = True
        for waiting in tuple(self._waiting):
            waiting.errback(self._stopping())
        stopped: Deferred[None] = Deferred()

        def stop() -> None:
            self._pool.stop()
            self._reactor.callFromThread(stopped.callback, None)

        # It joins the threads, of which one may hang.
        Thread(target=stop, daemon=True).start()
        return stopped

    def _run(self, function: Callable[[], object]) -> None:
        if self._stopped:
            Thread(target=function, daemon=True).start()
        else:
            self._pool.callInThread(function)

    def _count_stuck(self, change: int) -> None:
        self._stuck += change
        self._adjust()

    def _adjust(self) -> None:
        if not self._stopped:
            self._pool.adjustPoolsize(0, _BASE + self._lent + min(self._stuck, _STUCK))

    def _no_answer(self, result: Any, limit: float) -> Any:
        if isinstance(result, Failure):
            result.trap(CancelledError)
        raise HostUnreachable(
            f"{printable(self._host)} gave no answer within {limit:g} s. Is the host up, and does "
            "its libvirtd answer?"
        )

    def _stopping(self) -> HostUnreachable:
        return HostUnreachable("vmconsole is stopping.")
