"""Clients that come through a balancer: the PROXY protocol, versions 1 and 2 (HAProxy's
doc/proxy-protocol.txt).

Twisted's own wrapper tells nobody that the header has come until the client says something, and a
client may wait for us to speak first; it also drops a version 2 header whose first bytes come in
two pieces. So its parsers are not used here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from ipaddress import IPv4Address as IPv4
from ipaddress import IPv6Address as IPv6
from typing import Any, NamedTuple

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.interfaces import IAddress, IProtocol, IProtocolFactory, IReactorTime
from twisted.logger import Logger
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory

from vmconsole.refusals import SummedRefusals
from vmconsole.ssh.addresses import source_of

_V1 = b"PROXY "
_V1_LONGEST = 107
_V2 = b"\r\n\r\n\0\r\nQUIT\n"
_V2_FIXED = 16
# Addresses and what a balancer adds to them; the specification has no limit of its own.
_V2_LONGEST = 4096
_LOCAL, _PROXY = 0x20, 0x21
_TCP4, _TCP6 = 0x11, 0x21


class BadHeader(ValueError):
    """A balancer did not send what the PROXY protocol says."""


class Client(NamedTuple):
    """Who is at the other end."""

    address: str
    """The IP address, or ``unknown``."""
    is_balancer: bool
    """It is a connection of the balancer itself, such as a health check."""

    @property
    def source(self) -> str | None:
        """Whose limits count for it; see addresses.source_of."""
        return None if self.is_balancer else source_of(self.address)


class Header(NamedTuple):
    """A header, and its length."""

    source: IPv4Address | IPv6Address | None
    """None: the connection is the balancer's own, or it does not know the client's address."""
    size: int


def read_header(data: bytes) -> Header | None:
    """The header at the beginning of ``data``; None: it is not whole yet. Raises BadHeader."""
    if data.startswith(_V2[: len(data)]):
        return _read_v2(data) if len(data) >= _V2_FIXED else None
    if data.startswith(_V1[: len(data)]):
        return _read_v1(data)
    raise BadHeader("it is no PROXY header")


def _read_v1(data: bytes) -> Header | None:
    end = data.find(b"\r\n", 0, _V1_LONGEST)
    if end < 0:
        if len(data) >= _V1_LONGEST:
            raise BadHeader("the line is too long")
        return None
    words = data[:end].decode("latin-1").split(" ")
    if words[1] == "UNKNOWN":
        return Header(None, end + 2)
    try:
        _, protocol, source, _destination, port, _destination_port = words
        if "%" in source:
            # ipaddress takes any text as a zone, and addresses are logged as they are.
            raise ValueError("an address with a zone")
        if protocol == "TCP4":
            return Header(IPv4Address("TCP", str(IPv4(source)), int(port)), end + 2)
        if protocol == "TCP6":
            return Header(IPv6Address("TCP", str(IPv6(source)), int(port)), end + 2)
    except ValueError as error:
        raise BadHeader(f"the line makes no sense: {error}") from error
    raise BadHeader("it is neither TCP4 nor TCP6")


def _read_v2(data: bytes) -> Header | None:
    command, family, length = struct.unpack_from(">BBH", data, len(_V2))
    end = _V2_FIXED + length
    if command not in (_LOCAL, _PROXY):
        raise BadHeader("it has an unknown version or command")
    if end > _V2_LONGEST:
        raise BadHeader("it is too long")
    if len(data) < end:
        return None
    source: IPv4Address | IPv6Address | None = None
    try:
        if command == _PROXY and family == _TCP4:
            address, _, port, _ = struct.unpack_from(">4s4sHH", data[:end], _V2_FIXED)
            source = IPv4Address("TCP", str(IPv4(address)), port)
        elif command == _PROXY and family == _TCP6:
            address, _, port, _ = struct.unpack_from(">16s16sHH", data[:end], _V2_FIXED)
            source = IPv6Address("TCP", str(IPv6(address)), port)
    except struct.error as error:
        raise BadHeader("its addresses are cut") from error
    return Header(source, end)


class ProxiedConnection(ProtocolWrapper):
    """A connection from a balancer; the transport of the protocol for its client.

    That is connected at once, so that it bounds the time until the header; ``when_known`` tells
    it when that is there. ``getPeer`` is the balancer before that, and the client afterwards.
    """

    factory: BehindBalancer
    transport: Any

    def __init__(self, factory: BehindBalancer, wrappedProtocol: IProtocol) -> None:
        super().__init__(factory, wrappedProtocol)
        self._header = b""
        self._read: Header | None = None
        self._tell: Callable[[Client], None] | None = None

    def when_known(self, tell: Callable[[Client], None]) -> None:
        """Call ``tell`` when the header is there."""
        self._tell = tell

    def dataReceived(self, data: bytes) -> None:
        """The header first, then what the client sends."""
        if self._read is None:
            self._header += data
            try:
                self._read = read_header(self._header)
            except BadHeader as error:
                self.factory.refuse(self.transport.getPeer(), str(error))
                self._header = b""
                self.transport.abortConnection()
                return
            if self._read is None:
                return
            data, self._header = self._header[self._read.size :], b""
            if self._tell is not None:
                self._tell(Client(_host(self.getPeer()), self._read.source is None))
        if data:
            self.wrappedProtocol.dataReceived(data)

    def getPeer(self) -> IAddress:
        """The client, once it is known."""
        if self._read is not None and self._read.source is not None:
            return self._read.source
        peer: IAddress = self.transport.getPeer()
        return peer


class BehindBalancer(WrappingFactory[ProxiedConnection]):
    """Believes the PROXY header of whoever connects: for a port that only balancers reach."""

    noisy = False
    protocol = ProxiedConnection
    _log = Logger()

    def __init__(self, wrappedFactory: IProtocolFactory, clock: IReactorTime) -> None:
        super().__init__(wrappedFactory)
        self._refusals = SummedRefusals(self._log, clock)

    def refuse(self, peer: IAddress, why: str) -> None:
        """Somebody connected who is no balancer, or one that is not set up for this."""
        self._refusals.tell("Refused a connection without a PROXY header", f"{_host(peer)}: {why}")


def when_known(transport: Any, tell: Callable[[Client], None]) -> None:
    """Call ``tell`` once it is known whose connection ``transport`` is: at once, but behind a
    balancer with its header; never if that does not come."""
    if isinstance(transport, ProxiedConnection):
        transport.when_known(tell)
    else:
        tell(Client(_host(transport.getPeer()), is_balancer=False))


def _host(peer: IAddress) -> str:
    return str(getattr(peer, "host", "unknown"))
