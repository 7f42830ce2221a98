"""What a connection on which somebody is logged in needs as time passes: keepalives, new keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.conch.ssh.transport import DISCONNECT_BY_APPLICATION
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from vmconsole.config import SSH

if TYPE_CHECKING:
    from vmconsole.ssh.transport import ConsoleTransport

# Keepalives that may stay without an answer.
_MAX_MISSED = 3
# Seconds that a client has for a key exchange. Before it sees ours, it has to take the output that
# is on the way, over a slow line perhaps.
EXCHANGE_SECONDS = 300.0


class Upkeep:
    """Asks a silent client whether it still lives, and gives the connection new keys in time.

    Every ``keepalive`` seconds without a packet from the client it is sent a request that it has
    to answer; a failure is an answer, too. Three missed end the connection. New keys come after
    ``rekey_bytes`` of traffic or ``rekey_seconds``.
    """

    def __init__(self, transport: ConsoleTransport, clock: IReactorTime, settings: SSH) -> None:
        self._transport = transport
        self._clock = clock
        self._settings = settings
        self._heard = transport.heard
        self._missed = 0
        self._calls: dict[str, IDelayedCall] = {}

    def start(self) -> None:
        """Begin."""
        self._transport.rekey_bytes = self._settings.rekey_bytes
        self._later("keepalive", self._settings.keepalive)
        self._later("rekey", self._settings.rekey_seconds)
        if self._transport.exchanging:
            # It was begun while the engine was asked.
            self.exchange_begun()

    def stop(self) -> None:
        """The connection is over."""
        for call in self._calls.values():
            if call.active():
                call.cancel()
        self._calls.clear()

    def alive(self) -> None:
        """The client took something that waited for it, which is as good as an answer."""
        self._missed = 0

    def exchange_begun(self) -> None:
        """A key exchange is under way."""
        self._later("exchange", EXCHANGE_SECONDS)

    def exchange_done(self) -> None:
        """There are new keys."""
        self._stop("exchange")
        self._later("rekey", self._settings.rekey_seconds)

    def _keepalive(self) -> None:
        service: Any = self._transport.service
        if self._transport.heard != self._heard:
            self._heard = self._transport.heard
            self._missed = 0
        elif self._transport.exchanging:
            # What is sent now waits for the new keys, for which there is a limit of its own.
            pass
        elif self._missed == _MAX_MISSED:
            self._end("the client does not answer")
            return
        else:
            self._missed += 1
            # Some never answer, but send other things; and what an answer says is no matter.
            if len(service.deferreds["global"]) <= _MAX_MISSED:
                service.sendGlobalRequest(b"keepalive@openssh.com", b"", wantReply=True).addErrback(
                    lambda _: None
                )
        self._later("keepalive", self._settings.keepalive)

    def _rekey(self) -> None:
        self._transport.renew_keys()

    def _exchange(self) -> None:
        self._end("no key exchange within the time limit")

    def _end(self, text: str) -> None:
        self._transport.sendDisconnect(DISCONNECT_BY_APPLICATION, text.encode())

    def _later(self, what: str, seconds: float) -> None:
        self._stop(what)
        self._calls[what] = self._clock.callLater(seconds, getattr(self, f"_{what}"))

    def _stop(self, what: str) -> None:
        call = self._calls.get(what)
        if call is not None and call.active():
            call.cancel()
