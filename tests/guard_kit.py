"""What the tests of guards stand on: harm, done with a guard and without it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

from twisted.conch.ssh.common import NS
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes import console
from tests.rawclient import RawClient
from tests.sshpair import ALICE, ALICE_KEY, PTY, SSHPair
from tests.test_packets import ALL


class GuardTestCase(SynchronousTestCase):
    """``harm`` does something to a server, and tells how much it cost: with the guard little,
    without it much. So the test would notice if the guard were gone."""

    def setUp(self) -> None:
        self.pair = SSHPair(ALL)
        self.pair.engine.vms[ALICE.id] = [console("vm1")]

    def turn(self) -> None:
        """The server's reactor goes round."""
        self.pair.clock.advance(0)

    def client(self) -> RawClient:
        """A client with keys."""
        server = self.pair.factory.buildProtocol(None)
        return RawClient(server, turn=self.turn).start()

    def user(self) -> RawClient:
        """A client that is logged in."""
        return self.client().login(b"vmproxy", ALICE_KEY)

    def compare(
        self, harm: Callable[[], float], limit: float, target: Any, name: str, without: Any
    ) -> None:
        """With the guard ``harm`` is at most ``limit``; with ``target.name`` replaced by
        ``without``, more than twice as much."""
        self.assertLessEqual(harm(), limit)
        self.setUp()
        undo = self.patch(target, name, without)
        self.assertGreater(harm(), 2 * limit)
        undo.restore()
        self.flushLoggedErrors()

    def growth(self, work: Callable[[], object]) -> int:
        """Bytes that are still held after ``work``."""
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()

    def on_a_console(self, client: RawClient, window: int = 1 << 20) -> int:
        """A terminal's session on the guest's console; the result is the server's number for it."""
        channel = client.open_session(window)
        client.request(channel, b"pty-req", PTY)
        client.request(channel, b"exec", NS(b"vm1"))
        self.pair.clock.advance(0.005)
        return channel
