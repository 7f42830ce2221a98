"""What the tests of the ssh server against real clients stand on."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from shutil import rmtree
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from tests.functional.clients import ANY, Client, Command, Door, Session, Wishes, make_key
from tests.functional.process import Child
from tests.functional.server import Server, WatchedTransport
from vmconsole.config import Config


class Sink(Child):
    """A program of whose output only the size and the digest are kept."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.size = 0
        self.digest = hashlib.sha256()
        self.first: Deferred[None] = Deferred()
        """Fires when it has printed a mebibyte."""

    def outReceived(self, data: bytes) -> None:
        self.size += len(data)
        self.digest.update(data)
        if self.size >= 1048576 and not self.first.called:
            self.first.callback(None)


class InteropCase(TestCase):
    """A server in this process, and a user with a key."""

    timeout = 300
    config = Config()

    async def setUp(self) -> None:  # type: ignore[override]
        # A short path: that of a unix socket has at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="vmc-"))
        self.addCleanup(rmtree, self.folder)
        self.key = await deferToThread(make_key, self.folder, "ed25519")
        self.server = self.make_server(self.config)

    def make_server(self, config: Config, *public_lines: str) -> Server:
        """Another server that knows the user's key, and these."""
        own = self.key.with_name(f"{self.key.name}.pub").read_text()
        server = Server(reactor, config, own, *public_lines)
        server.listen(self.folder / "known_hosts")
        self.addCleanup(server.close)
        return server

    @property
    def door(self) -> Door:
        """Where clients are to go."""
        return Door(self.server.port, self.folder / "known_hosts", self.folder)

    def command(self, client: Client, *words: str, wishes: Wishes = ANY) -> Command:
        """How this client runs that on the server, without a terminal."""
        return client.command(Session(self.door, self.key, words, wishes=wishes))

    def start(self, command: Command, child: Child | None = None) -> Any:
        """Start it; it ends with the test."""
        started = command.start(reactor, child=child)
        self.addCleanup(started.kill)
        return started

    async def run_to_end(self, command: Command, patience: float = 30.0) -> Child:
        """Start it, close its input, and wait for its end."""
        child: Child = self.start(command)
        child.end_input()
        await child.ended(patience)
        return child

    @property
    def connection(self) -> WatchedTransport:
        """The server's side of the last connection."""
        return self.server.connections[-1]
