"""The ssh server's factory: host keys, algorithms, and what each connection is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.conch.ssh import factory
from twisted.cred.portal import Portal
from twisted.internet.interfaces import IAddress, IReactorTime, IStreamServerEndpoint
from twisted.logger import Logger

from vmconsole.audit import Audit
from vmconsole.clocks import posix_now
from vmconsole.config import Config
from vmconsole.endpoints import server_endpoint
from vmconsole.errors import ConfigError
from vmconsole.refusals import Refusals
from vmconsole.ssh.admission import Admission
from vmconsole.ssh.algorithms import Algorithms, choose_all_algorithms
from vmconsole.ssh.auth import UserAuth
from vmconsole.ssh.checker import USER_KEY_ALGORITHMS
from vmconsole.ssh.connection import ConsoleConnection
from vmconsole.ssh.handshakes import Handshakes
from vmconsole.ssh.hostkeys import HostKeys
from vmconsole.ssh.session_counts import SessionCounts
from vmconsole.ssh.transport import ConsoleTransport
from vmconsole.ssh.turns import Turns


class ConsoleSSHFactory(factory.SSHFactory):
    """Builds a ConsoleTransport for each client. ``random`` gives so many random bytes.

    The host keys are given with ``use_host_keys`` before it listens.
    """

    noisy = False
    _log = Logger()
    protocol = ConsoleTransport
    services = {  # noqa: RUF012 - Conch's own way to say it
        b"ssh-userauth": UserAuth,
        b"ssh-connection": ConsoleConnection,
    }
    user_key_algorithms = tuple(USER_KEY_ALGORITHMS)

    def __init__(
        self,
        portal: Portal,
        config: Config,
        audit: Audit,
        clock: IReactorTime,
        random: Callable[[int], bytes],
        admission: Admission,
    ) -> None:
        self.portal = portal
        self.audit = audit
        self.clock = clock
        self.limits = config.limits
        self.banner = config.ssh.banner
        self.user_names = [name.encode() for name in config.ssh.users]
        self.random = random
        self.settings = config.ssh
        self.admission = admission
        self.handshakes = Handshakes(clock)
        self.turns = Turns(clock)
        self.refusals = Refusals(self._log, clock)
        self.session_counts = SessionCounts(config.limits.sessions_per_user, clock)
        # Conch would say for each connection that it has none; group exchange is not offered.
        self.primes = {0: []}

    def use_host_keys(self, host_keys: HostKeys) -> None:
        """Take the host's keys and certificates, for new connections. Raises ConfigError when the
        configured algorithms leave nothing to offer."""
        self._algorithms = choose_all_algorithms(self.settings, host_keys.algorithms)
        self.host_keys = host_keys
        # Conch wants to see some at the start; which are used, the transport decides.
        self.privateKeys = {key.sshType(): key for key in reversed(host_keys.keys)}
        self.publicKeys = {kind: key.public() for kind, key in self.privateKeys.items()}

    def make_session_id(self) -> str:
        """An id for one connection, for the log and the audit."""
        return self.random(8).hex()

    def buildProtocol(self, addr: IAddress | None) -> ConsoleTransport:
        """See IFactory."""
        protocol = self.protocol()
        protocol.factory = self
        protocol.host_keys = self.host_keys
        protocol.algorithms = self._offered()
        protocol.random = self.random
        protocol.server_sig_algs = self.user_key_algorithms
        return protocol

    def _offered(self) -> Algorithms:
        usable = self.host_keys.offered(posix_now(self.clock))
        names = [name for name in self._algorithms.host_keys if name in usable]
        return self._algorithms._replace(host_keys=names)

    def getService(self, transport: Any, service: bytes) -> Any:
        """``ssh-userauth`` until somebody is logged in, ``ssh-connection`` from then on."""
        wanted = b"ssh-connection" if hasattr(transport, "avatar") else b"ssh-userauth"
        return self.services[service] if service == wanted else None


def make_endpoint(reactor: Any, description: str) -> IStreamServerEndpoint:
    """What ``ssh.listen`` names; see endpoints.server_endpoint.

    Raises ConfigError.
    """
    try:
        return server_endpoint(reactor, description)
    except ValueError as error:
        raise ConfigError(
            f"ssh.listen: {description!r} is no Twisted endpoint (tcp:2222, "
            f"tcp:2222:interface=127.0.0.1): {error}."
        ) from error
