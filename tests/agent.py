"""A small ssh-agent (draft-miller-ssh-agent) for software security keys."""

from __future__ import annotations

from typing import NamedTuple

from twisted.conch.ssh.common import NS, getNS
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory
from twisted.protocols.basic import Int32StringReceiver

from tests.authenticator import USER_PRESENT, Authenticator

_FAILURE = 5
_REQUEST_IDENTITIES, _IDENTITIES_ANSWER = 11, 12
_SIGN_REQUEST, _SIGN_RESPONSE = 13, 14


class Held(NamedTuple):
    """A key, the flags with which it signs, and what for."""

    authenticator: Authenticator
    flags: int = USER_PRESENT
    application: bytes = b"ssh:"


class AgentProtocol(Int32StringReceiver):
    """Lists the keys, and signs with them; all else is a failure."""

    factory: Agent

    def stringReceived(self, string: bytes) -> None:
        keys = self.factory.keys
        if string[0] == _REQUEST_IDENTITIES:
            listed = b"".join(NS(blob) + NS(b"software") for blob in keys)
            self.sendString(bytes((_IDENTITIES_ANSWER,)) + len(keys).to_bytes(4, "big") + listed)
            return
        if string[0] == _SIGN_REQUEST:
            blob, message, _ = getNS(string[1:], 2)
            if blob in keys:
                key = keys[blob]
                signature = key.authenticator.sign(message, key.flags, application=key.application)
                self.sendString(bytes((_SIGN_RESPONSE,)) + NS(signature))
                self.factory.signatures += 1
                return
        self.sendString(bytes((_FAILURE,)))


class Agent(Factory):
    """Listen with it on a unix socket. ``visits`` and ``signatures`` count what clients did."""

    noisy = False

    def __init__(self, *keys: Held) -> None:
        self.keys = {key.authenticator.blob: key for key in keys}
        self.visits = 0
        self.signatures = 0

    def buildProtocol(self, addr: IAddress | None) -> AgentProtocol:
        self.visits += 1
        protocol = AgentProtocol()
        protocol.factory = self
        return protocol
