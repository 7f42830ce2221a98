"""A guest's output, and what happens on its console, on the way to a user's channel."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IConsumer
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure

from vmconsole.console.attachment import Attachment
from vmconsole.errors import ConsoleInterrupted
from vmconsole.interfaces import Role

if TYPE_CHECKING:
    from vmconsole.console.console_session import ConsoleSession


class Screen(Protocol):
    """The protocol on an Attachment. ``ended`` fires with the reason of its end."""

    def __init__(self, channel: IConsumer, session: ConsoleSession) -> None:
        self._channel = channel
        self._session = session
        self.ended: Deferred[BaseException] = Deferred()

    def connectionMade(self) -> None:
        """From here on the channel holds the output back when the user is slow."""
        attachment = cast(Attachment, self.transport)
        self._channel.registerProducer(attachment, True)
        self._session.opened(attachment)

    def dataReceived(self, data: bytes) -> None:
        """The guest printed."""
        self._channel.write(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The console is left, or over."""
        self._channel.unregisterProducer()
        self.ended.callback(reason.value or ConnectionDone())

    # --- IScreen

    def begun(self) -> None:
        """See IScreen."""
        self._session.begun(cast(Attachment, self.transport))

    def tell(self, text: str, hint: str = "") -> None:
        """See IScreen."""
        self._session.tell(text, hint)

    def waiting(self, reason: str) -> None:
        """See IScreen."""
        self._session.waiting(reason)

    def interrupted(self, reason: ConsoleInterrupted, patience: float) -> None:
        """See IScreen."""
        self._session.interrupted(reason, patience)

    def resumed(self) -> None:
        """See IScreen."""
        self._session.resumed()

    def revoked(self, reason: str) -> None:
        """See IScreen."""
        self._session.revoke(reason)

    def role_changed(self, role: Role) -> None:
        """See IScreen."""
        self._session.role_changed(role)
