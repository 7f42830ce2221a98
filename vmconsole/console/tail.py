"""What a guest prints, for a file, a pipe, or somebody who reads along."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, cast

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IConsumer
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure

from vmconsole.console.attachment import Attachment
from vmconsole.console.terminal import RESET, Sanitizer
from vmconsole.errors import ConsoleInterrupted
from vmconsole.interfaces import Role
from vmconsole.text import lasting

_CTRL_C = b"\x03"


class Tail(Protocol):
    """The protocol on an Attachment: copies the last ``size`` bytes of what was printed (None: all
    that is kept) to ``output``, and then what comes; as it is when ``raw``, else without what would
    make a terminal answer, since it may end up on one.

    ``ended`` fires with the reason.
    """

    def __init__(
        self,
        output: IConsumer,
        size: int | None,
        notify: Callable[[str], None],
        raw: bool = False,
        on_terminal: bool = False,
    ) -> None:
        """``notify`` is told that the console was interrupted, and that it is back; a terminal is
        set back in the end."""
        self._output = output
        self._notify = notify
        self._size = size
        self._sanitizer = None if raw else Sanitizer()
        self._on_terminal = on_terminal
        self._opening: Deferred[Attachment] | None = None
        self._why = ""
        self.left = False
        """Whether the reader left."""
        self.ended: Deferred[str] = Deferred()

    async def open(self, attaching: Coroutine[Any, Any, Attachment]) -> Attachment | None:
        """Wait for the console; None: the reader left meanwhile. Raises ConsoleError."""
        if self.left:
            attaching.close()
            return None
        self._opening = Deferred.fromCoroutine(attaching)
        try:
            return await self._opening
        except CancelledError:
            if self.left:
                return None
            raise
        finally:
            self._opening = None

    def connectionMade(self) -> None:
        """From here on the output holds the attachment back when its reader is slow."""
        attachment = cast(Attachment, self.transport)
        self._output.registerProducer(attachment, True)
        self.dataReceived(attachment.console.scrollback.tail(self._size))

    def begun(self) -> None:
        """See IScreen."""

    def tell(self, text: str, hint: str = "") -> None:
        """See IScreen: nothing goes between what the guest printed."""

    def waiting(self, reason: str) -> None:
        """See IScreen."""

    def interrupted(self, reason: ConsoleInterrupted, patience: float) -> None:
        """See IScreen."""
        self._notify(f"{reason} Waiting up to {lasting(patience)} for the console.")

    def resumed(self) -> None:
        """See IScreen."""
        self._notify("The console is back.")

    def revoked(self, reason: str) -> None:
        """See IScreen."""
        self.end(reason)

    def role_changed(self, role: Role) -> None:
        """See IScreen: who reads along does not type."""

    def dataReceived(self, data: bytes) -> None:
        """The guest printed."""
        self._output.write(data if self._sanitizer is None else self._sanitizer.feed(data))

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The console ended, or was left."""
        self._output.unregisterProducer()
        if self._on_terminal:
            self._output.write(RESET)
        self.ended.callback(self._why if reason.check(ConnectionDone) else str(reason.value))

    def leave(self) -> None:
        """The reader wants no more."""
        self.left = True
        if self._opening is not None:
            self._opening.cancel()
        self.end("The reader left.")

    def end(self, reason: str) -> None:
        """The reader may not, or will not, go on."""
        self._why = self._why or reason
        if self.transport is not None:
            self.transport.loseConnection()


class TailInput(Protocol):
    """The protocol on the reader's channel: Ctrl-C on a terminal leaves."""

    def __init__(self, tail: Tail) -> None:
        self._tail = tail

    def dataReceived(self, data: bytes) -> None:
        """The reader typed."""
        if _CTRL_C in data:
            self._tail.leave()

    def revoke(self, reason: str) -> None:
        """The reader may not go on."""
        self._tail.revoked(reason)
