"""The ports that ssh clients connect to, which can be paused."""

from __future__ import annotations

from typing import Any

from twisted.application.internet import StreamServerEndpointService
from twisted.application.service import MultiService
from twisted.internet import tcp
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IListeningPort, IProtocolFactory
from twisted.logger import Logger

from vmconsole.ssh.factory import make_endpoint
from vmconsole.ssh.proxy_protocol import BehindBalancer

_HAPROXY = "haproxy:"


class Ports(MultiService):
    """All of them. While they are paused the kernel has those who connect wait, as many as
    ``backlog=`` in ``ssh.listen`` says."""

    def __init__(self) -> None:
        super().__init__()
        self.paused = False

    def pause(self) -> None:
        """Accept nobody, on ports that are opened meanwhile, too."""
        self.paused = True
        for port in self:
            port.pause()

    def resume(self) -> None:
        """Accept connections again."""
        self.paused = False
        for port in self:
            port.resume()


class SSHPort(StreamServerEndpointService):
    """One port; its parent is Ports. Raises at its start when it cannot listen."""

    parent: Ports
    _log = Logger()
    _waitingForPort: Deferred[Any]
    # Unix sockets and adopted ones are such ports, too.
    _port: tcp.Port | None = None

    def privilegedStartService(self) -> None:
        """Listen."""
        # Else it would only log that it cannot.
        self._raiseSynchronously = True
        super().privilegedStartService()
        self._waitingForPort.addCallback(self._listening)

    def pause(self) -> None:
        """Accept nobody."""
        if self._port is not None:
            self._port.pauseProducing()

    def resume(self) -> None:
        """Accept connections again."""
        if self._port is not None:
            self._port.resumeProducing()

    def _listening(self, port: IListeningPort | None) -> IListeningPort | None:
        if isinstance(port, tcp.Port):
            self._port = port
            _accept_one_a_turn(port)
            if self.parent.paused:
                self.pause()
        elif port is not None:
            self._log.warn("{port} cannot be paused: limits.unauthenticated is no limit", port=port)
        return port


def make_port(reactor: Any, description: str, factory: IProtocolFactory) -> SSHPort:
    """What ``ssh.listen`` names; see factory.make_endpoint. Only behind ``haproxy:`` is a PROXY
    header believed. Raises ConfigError."""
    endpoint = make_endpoint(reactor, description.removeprefix(_HAPROXY))
    if description.startswith(_HAPROXY):
        factory = BehindBalancer(factory, reactor)
    return SSHPort(endpoint, factory)


def _accept_one_a_turn(port: Any) -> None:
    # Twisted accepts 100 at once, and more and more of them while they come; and a pause counts
    # from the next turn on only.
    accept = port.doRead

    def accept_one() -> Any:
        port.numberAccepts = 1
        return accept()

    port.doRead = accept_one
