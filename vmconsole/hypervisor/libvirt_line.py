"""An open console as libvirt has it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vmconsole.hypervisor.libvirt_errors import console_error
from vmconsole.interfaces import ConsoleInfo

if TYPE_CHECKING:
    from vmconsole.hypervisor.libvirt_host import Host

_WOULD_BLOCK = -2
# Bytes; as much as libvirt puts in one message.
_RECEIVE = 65536


class Line:
    """A virStream to a console, on a connection of its own.

    To open, ``ping`` and ``close`` it waits: that is for the host's threads. The rest is for the
    reactor's thread, and raises libvirtError.
    """

    def __init__(self, host: Host, console: ConsoleInfo, force: bool = False) -> None:
        """Open it, with ``force`` also when another program has it. Raises ConsoleError.

        Follows virDomainOpenConsole.
        """
        self._libvirt = libvirt = host.libvirt
        self._stream: Any = None
        self._callback: dict[str, Any] = {}
        self._on_event: Callable[[bool], None] | None = None
        self._events = (
            libvirt.VIR_STREAM_EVENT_READABLE
            | libvirt.VIR_STREAM_EVENT_ERROR
            | libvirt.VIR_STREAM_EVENT_HANGUP
        )
        flags = libvirt.VIR_DOMAIN_CONSOLE_FORCE if force else libvirt.VIR_DOMAIN_CONSOLE_SAFE

        def open_stream(raw: Any) -> Any:
            # Looked up here, because a domain object that lives keeps the connection open.
            domain = raw.lookupByUUIDString(console.vm_id)
            stream = raw.newStream(libvirt.VIR_STREAM_NONBLOCK)
            alias = None if console.console == "default" else console.console
            domain.openConsole(alias, stream, flags)
            return stream

        self.connection = host.connect()
        try:
            self._stream = self.connection.use(open_stream)
            return
        except libvirt.libvirtError as error:
            problem = console_error(error, host.name, console.vm_name, console.vm_id)
        finally:
            if self._stream is None:
                self.connection.close()
        raise problem

    def ping(self) -> None:
        """One round trip on the console's connection. Raises libvirtError."""
        self.connection.use(lambda raw: raw.getLibVersion())

    def close(self) -> None:
        """Leave the console and close the connection, within some 3 s. Once only."""
        # A stuck guest would hold up the abort until libvirtd drops the connection.
        self.connection.keep_alive(1, 2)
        stream, self._stream = self._stream, None
        with suppress(self._libvirt.libvirtError):
            stream.abort()
        # While it lives, the connection is not closed.
        del stream
        self.connection.close()

    def start(self, on_event: Callable[[bool], None]) -> None:
        """Call ``on_event`` while there is something to receive, or room if that is wanted.

        Its argument tells whether there is room to send. Follows virStreamEventAddCallback.
        """
        # Not by virStream.eventAddCallback: it has libvirt hold the stream, and libvirt 9 never
        # lets go of what a callback holds. This dictionary is ours to empty.
        self._callback["stream"] = self
        self._on_event = on_event
        added = self._libvirt.libvirtmod.virStreamEventAddCallback(
            self._stream._o, self._events, self._callback
        )
        if added < 0:
            raise self._libvirt.libvirtError("virStreamEventAddCallback() failed")

    def _dispatchStreamEventCallback(self, events: int, _callback: object) -> int:
        if self._on_event is not None:
            self._on_event(bool(events & self._libvirt.VIR_STREAM_EVENT_WRITABLE))
        return 0

    def want_room(self, wanted: bool) -> None:
        """Say whether ``on_event`` is to be called when there is room."""
        writable = self._libvirt.VIR_STREAM_EVENT_WRITABLE if wanted else 0
        self._stream.eventUpdateCallback(self._events | writable)

    def receive(self) -> bytes | None:
        """What the guest printed; None: nothing now; empty: the console ended."""
        received = self._stream.recv(_RECEIVE)
        return None if received == _WOULD_BLOCK else received

    def send(self, data: bytes) -> int:
        """Type into the guest. Returns how many bytes were taken."""
        taken: int = self._stream.send(data)
        return max(0, taken)

    def stop(self) -> None:
        """Call ``on_event`` no more."""
        self._on_event = None
        with suppress(self._libvirt.libvirtError):
            self._stream.eventRemoveCallback()
        self._callback.clear()
