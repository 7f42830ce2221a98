"""One connection to a libvirtd."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorFromThreads

from vmconsole.errors import HostUnreachable

T = TypeVar("T")


class Connection:
    """An open virConnect, shared by threads. All methods wait: they are for a host's threads.

    ``lost`` fires in the reactor's thread, with libvirt's reason, when it ends by itself;
    ``closed``, there too, when it is closed to the last trace after ``close``.
    """

    def __init__(self, reactor: IReactorFromThreads, libvirt: Any, uri: str) -> None:
        """Open it. Raises libvirtError. Follows virConnectOpen."""
        self.lost: Deferred[int] = Deferred()
        self.closed: Deferred[None] = Deferred()
        self._reactor = reactor
        self._libvirt = libvirt
        self._events: list[int] = []
        # libvirt frees a connection that is closed, also under a call of another thread:
        # so whoever is the last to leave closes it.
        self._lock = threading.Lock()
        self._users = 1
        self._raw = libvirt.open(uri)
        with suppress(libvirt.libvirtError):  # A driver inside this process has nothing to lose.
            self._raw.registerCloseCallback(self._ended, None)

    def use(self, function: Callable[[Any], T]) -> T:
        """Call ``function`` with the virConnect. Raises what it raises."""
        with self._lock:
            if not self._users:
                raise HostUnreachable("The connection to the host was closed.")
            self._users += 1
        try:
            return function(self._raw)
        except self._libvirt.libvirtError as error:
            # Its frames hold domains and streams, which would keep the connection open.
            raise error.with_traceback(None) from None
        finally:
            self._leave()

    def keep_alive(self, interval: int, count: int) -> None:
        """Be lost after ``count`` unanswered pings, ``interval`` seconds apart.

        The first call counts, libvirt takes no second. Follows virConnectSetKeepAlive.
        """
        with suppress(self._libvirt.libvirtError, HostUnreachable):
            self.use(lambda raw: raw.setKeepAlive(interval, count))

    def on_lifecycle(self, changed: Callable[[str, int, int], None]) -> None:
        """``changed``, in the reactor's thread, with the UUID of each domain that changes, the
        virDomainEventType and its detail.

        Raises libvirtError. Follows virConnectDomainEventRegisterAny.
        """

        def tell(_raw: Any, domain: Any, event: int, detail: int, _opaque: None) -> None:
            self._reactor.callFromThread(changed, domain.UUIDString(), event, detail)

        def register(raw: Any) -> None:
            # Noted within `use`: whoever closes the connection has to know of it.
            event = self._libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE
            self._events.append(raw.domainEventRegisterAny(None, event, tell, None))

        self.use(register)

    def close(self) -> None:
        """Close it as soon as nobody uses it. Once only."""
        self._leave()

    def _ended(self, _raw: Any, reason: int, _opaque: None) -> None:
        # libvirt may call this from any thread.
        self._reactor.callFromThread(self.lost.callback, reason)

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
        # Each of its callbacks holds a reference as well.
        raw, self._raw = self._raw, None
        for event in self._events:
            with suppress(self._libvirt.libvirtError):
                raw.domainEventDeregisterAny(event)
        with suppress(self._libvirt.libvirtError):
            raw.unregisterCloseCallback()
        with suppress(self._libvirt.libvirtError):
            raw.close()
        self._reactor.callFromThread(self.closed.callback, None)
