"""The strangers of the bench's storm: they do a whole key exchange, and do not log in."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import asyncssh
from msgspec.structs import replace
from twisted.trial.unittest import SynchronousTestCase

from bench import subreaper
from bench.errors import BenchError
from bench.handshake import Handshake
from bench.server import ADDRESS, free_port
from bench.strangers import Storm, Strangers, play, source
from tests.rawclient import ServerSide
from tests.sshpair import SSHPair
from tests.test_packets import ALL
from vmconsole.config import Limits

# Its child's child tells who its parent is when its own is gone.
ORPHAN = """
import os
gone, go = os.pipe()
told, tell = os.pipe()
child = os.fork()
if not child:
    if not os.fork():
        os.close(go)
        os.read(gone, 1)
        os.write(tell, b"%d" % os.getppid())
    os._exit(0)
os.waitpid(child, 0)
os.close(go)
print(os.read(told, 20).decode(), os.getpid())
"""


class HandshakeTests(SynchronousTestCase):
    """A stranger at our server, in memory."""

    def setUp(self) -> None:
        self.pair = SSHPair(ALL)
        self.pair.client_io.loseConnection()
        self.pair.flush()
        self.admission = self.pair.admission
        self.stranger = Handshake(bytes)
        self.server = self.pair.factory.buildProtocol(None)
        self.wire = ServerSide()
        self.server.makeConnection(self.wire)

    def said(self) -> bytes:
        """What the server has said since."""
        self.pair.clock.advance(0)
        data = bytes(self.wire.value())
        self.wire.clear()
        return data

    def exchange(self, piece: int = 65536) -> int:
        """Carry bytes, ``piece`` at a time to the stranger, until neither says anything more; how
        many times the server spoke."""
        turns = 0
        while data := self.said():
            turns += 1
            for start in range(0, len(data), piece):
                answer = self.stranger.receive(data[start : start + piece])
                if answer:
                    self.server.dataReceived(answer)
        return turns

    def test_whole(self) -> None:
        """The stranger is done when the server has answered with the new keys, in the third turn;
        it is still connected then, and nobody's login."""
        self.assertEqual(self.exchange(), 3)
        self.assertTrue(self.stranger.done)
        self.assertIsNotNone(self.server.sessionID)
        self.assertEqual((self.admission.total, self.admission.unauthenticated), (1, 1))
        self.assertFalse(self.wire.disconnecting)

    def test_not_sooner(self) -> None:
        """Without the server's last answer it is not done."""
        for _ in range(2):
            self.server.dataReceived(self.stranger.receive(self.said()))
        self.assertFalse(self.stranger.done)

    def test_pieces(self) -> None:
        """It does not matter in which pieces the server's bytes come."""
        self.exchange(1)
        self.assertTrue(self.stranger.done)

    def test_wrong_signature(self) -> None:
        """A signature that is not of this exchange is noticed."""
        self.server.dataReceived(self.stranger.receive(self.said()))
        reply = bytearray(self.said())
        payload_end = 4 + int.from_bytes(reply[:4], "big") - reply[4]
        reply[payload_end - 1] ^= 1
        with self.assertRaisesRegex(BenchError, "signature is wrong"):
            self.stranger.receive(bytes(reply))

    def test_changed_offer(self) -> None:
        """So is an offer that was changed on the way: the signature is about all of it."""
        said = bytearray(self.said())
        cookie = said.index(b"\n") + 1 + 6
        said[cookie] ^= 1
        self.server.dataReceived(self.stranger.receive(bytes(said)))
        with self.assertRaisesRegex(BenchError, "signature is wrong"):
            self.exchange()

    def test_refused(self) -> None:
        """A server that refuses the connection is quoted."""
        pair = SSHPair(replace(ALL, limits=Limits(per_address=0)))
        server = pair.factory.buildProtocol(None)
        wire = ServerSide("192.0.2.8")
        server.makeConnection(wire)
        with self.assertRaisesRegex(BenchError, "message 1 too many connections from your address"):
            self.stranger.receive(wire.value())

    def test_no_version(self) -> None:
        """So is one that speaks no ssh, as an sshd that has too many connections."""
        with self.assertRaisesRegex(BenchError, "Exceeded MaxStartups"):
            self.stranger.receive(b"Exceeded MaxStartups\r\n")


class StormTests(SynchronousTestCase):
    """Many of them, on a port."""

    def test_addresses(self) -> None:
        """Each stranger of a storm has an address of its own, and none has the user's."""
        addresses = {source(number) for number in range(1000)}
        self.assertEqual(len(addresses), 1000)
        for address in addresses:
            first, *middle, last = map(int, address.split("."))
            self.assertEqual(first, 127)
            self.assertNotEqual(middle, [0, 0])
            self.assertIn(last, range(1, 255))

    def test_all_come(self) -> None:
        """All of them come, one after the other where it says so; another ssh server than ours
        takes their key exchange, too."""
        addresses: list[str] = []

        class Server(asyncssh.SSHServer):
            def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
                addresses.append(conn.get_extra_info("peername")[0])

        async def storm() -> float:
            key = asyncssh.generate_private_key("ssh-ed25519")
            acceptor = await asyncssh.listen(
                ADDRESS, 0, server_factory=Server, server_host_keys=[key]
            )
            seconds = await play(acceptor.get_port(), Storm(12, 3, 0.01))
            acceptor.close()
            await acceptor.wait_closed()
            return seconds

        self.assertGreaterEqual(asyncio.run(storm()), 0.11)
        self.assertEqual(sorted(addresses), sorted(map(source, range(12))))

    def test_at_once(self) -> None:
        """No more of them are there than may be; and when one is not served the storm has failed,
        and says why."""
        connections: list[asyncio.StreamWriter] = []

        async def storm() -> None:
            async def come(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                connections.append(writer)
                if len(connections) == 3:
                    # Whoever else wants to come has the time for it.
                    for _ in range(100):
                        await asyncio.sleep(0)
                    for each in connections:
                        each.close()

            async with await asyncio.start_server(come, ADDRESS, 0) as server:
                await play(server.sockets[0].getsockname()[1], Storm(12, 3))

        with self.assertRaisesRegex(BenchError, "the connection ended"):
            asyncio.run(storm())
        self.assertEqual(len(connections), 3)

    def test_child(self) -> None:
        """The child tells what kept a stranger from being served, and goes on to the next storm."""
        with Strangers(free_port()) as strangers:
            for _ in range(2):
                strangers.begin(Storm(2, 2))
                with self.assertRaisesRegex(BenchError, "not served: ConnectionRefusedError"):
                    strangers.seconds()


class SubreaperTests(SynchronousTestCase):
    """What the alternative's sshd is started by."""

    def test_orphans(self) -> None:
        """The command gets the processes that its children leave behind."""
        done = subprocess.run(
            [sys.executable, "-I", subreaper.__file__, sys.executable, "-I", "-c", ORPHAN],
            stdout=subprocess.PIPE,
            check=True,
        )
        parent, itself = done.stdout.split()
        self.assertEqual(parent, itself)
