"""The ssh server's transport against real clients: each algorithm, and rekeying under load."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from twisted.internet.threads import deferToThread

from tests.functional.clients import (
    ANY,
    CLIENTS,
    CTR,
    ML_KEM,
    AsyncSSH,
    Client,
    Dbclient,
    OpenSSH,
    Paramiko,
    Plink,
    Wishes,
)
from tests.functional.interop import InteropCase, Sink
from vmconsole.config import SSH, Config
from vmconsole.ssh.algorithms import CIPHERS, KEX, MACS

MIB = 1048576
BULK = 100 * MIB
# Key exchanges, when there is one for each MiB: some count more than the payload, some look late.
MANY = 10
# What this process may need more, in the middle of a bulk transfer; the file is 100 MiB.
MEMORY = 8 * MIB
# Seconds for a bulk transfer; a quiet machine needs a twentieth.
PATIENCE = 240.0


class AlgorithmTests(InteropCase):
    """Each algorithm of the offer with each client that knows it: a login, bytes both ways, an
    exit status."""

    async def exchange(self, client: Client, wishes: Wishes = ANY) -> dict[str, str]:
        """What was agreed on for a connection that then worked."""
        told = await self.run_to_end(self.command(client, "exit", "7", wishes=wishes))
        self.assertEqual(told.status, 7, (client.name, wishes, told.errors))
        echo = self.start(self.command(client, "echo", wishes=wishes))
        await echo.expect(b"ready;")
        for size in (1, 1000, 70000):
            text = os.urandom(size).hex().encode()
            echo.type(text)
            await echo.expect(text)
        echo.end_input()
        self.assertEqual(await echo.ended(), 0, (client.name, wishes, echo.errors))
        return self.connection.agreed

    async def test_by_itself(self) -> None:
        """A client that insists on nothing gets an AEAD cipher, or EtM, and curve25519 or better;
        and our ed25519 host key where it has no reason to prefer the other."""
        for client in CLIENTS:
            agreed = await self.exchange(client)
            self.assertIn(agreed["cipher"], client.ciphers, client.name)
            # Newer ones than Debian's may know ML-KEM, too.
            self.assertIn(agreed["kex"], (*client.kex, *ML_KEM), client.name)
            self.assertIn(agreed["host_key"], ("ssh-ed25519", "rsa-sha2-512"), client.name)

    async def test_ciphers(self) -> None:
        """Each cipher of the offer, with each client that knows it."""
        self.assertEqual({name.encode() for name in OpenSSH.ciphers}, set(CIPHERS))
        for client in CLIENTS:
            for cipher in client.ciphers:
                agreed = await self.exchange(client, Wishes(cipher))
                self.assertEqual((agreed["cipher"], agreed["cipher_back"]), (cipher, cipher))

    async def test_macs(self) -> None:
        """Each MAC of the offer, with each client that knows it."""
        self.assertEqual({name.encode() for name in OpenSSH.macs}, set(MACS))
        for client in CLIENTS:
            for mac in client.macs:
                agreed = await self.exchange(client, Wishes(CTR[0], mac))
                self.assertEqual((agreed["mac"], agreed["mac_back"]), (mac, mac))

    async def test_key_exchanges(self) -> None:
        """Each key exchange of the offer, with each client that knows it; ML-KEM with paramiko and
        asyncssh."""
        self.assertEqual({name.encode() for name in AsyncSSH.kex}, set(KEX))
        with_ml_kem = []
        for client in CLIENTS:
            for kex in client.kex:
                agreed = await self.exchange(client, Wishes(kex=kex))
                self.assertEqual(agreed["kex"], kex)
                if kex in ML_KEM:
                    with_ml_kem.append(client.name)
        self.assertEqual(with_ml_kem, ["paramiko", "asyncssh"])

    async def test_host_keys(self) -> None:
        """Each of our host keys' algorithms is taken by each client."""
        for name in ("ssh-ed25519", "rsa-sha2-512", "rsa-sha2-256"):
            self.server = self.make_server(Config(ssh=SSH(host_key_algorithms=(name,))))
            for client in CLIENTS:
                command = self.command(client, "exit", "7")
                told = await self.run_to_end(command)
                if name == "rsa-sha2-512" and isinstance(client, Dbclient):
                    # It knows RSA with SHA-2 as rsa-sha2-256 alone.
                    self.assertNotEqual(told.status, 7)
                else:
                    self.assertEqual(told.status, 7, (client.name, name, told.errors))
                    self.assertEqual(self.connection.agreed["host_key"], name)

    async def test_strict(self) -> None:
        """All these clients ask for strict key exchange, and get it."""
        for client in CLIENTS:
            await self.exchange(client)
            self.assertTrue(self.connection.strict, client.name)

    async def test_typed_into_a_flood(self) -> None:
        """What is typed arrives while the server sends all that the client takes; some clients
        have a window of gigabytes."""
        for client in CLIENTS:
            sink: Sink = self.start(self.command(client, "flood"), Sink(client.name))
            await sink.first
            sink.type(b"stop")
            self.assertEqual(await sink.ended(), 0, (client.name, sink.errors))
            self.assertLess(sink.size, BULK, client.name)

    async def test_weak(self) -> None:
        """A client that insists on what is weak is refused by name."""
        for wishes in (Wishes("aes128-cbc"), Wishes(CTR[0], "hmac-sha1")):
            refused = await self.run_to_end(self.command(OpenSSH(), "exit", "7", wishes=wishes))
            self.assertEqual(refused.status, 255)
            self.assertRegex(refused.errors, rb"no matching (cipher|MAC) found\. Their offer: \S+")


class BulkCase(InteropCase):
    """100 MiB through one session: every byte arrives, in order, and the server needs no more
    memory for it than for a little."""

    async def setUp(self) -> None:  # type: ignore[override]
        await super().setUp()
        self.file = self.folder / "bulk"
        self.digest = await deferToThread(_fill, self.file)

    async def gives(self, client: Client, wishes: Wishes) -> int:
        """The server sends all of it; the result is how many key exchanges that took."""
        await self.run_to_end(self.command(client, "exit", "7"))
        before = _start_of_peak()
        sink: Sink = self.start(
            self.command(client, "give", str(self.file), wishes=wishes), Sink(client.name)
        )
        status = await sink.ended(PATIENCE)
        self.assertEqual((status, sink.size), (0, BULK), (client.name, sink.errors))
        self.assertEqual(sink.digest.hexdigest(), self.digest, client.name)
        self.assertLess(_memory("VmHWM") - before, MEMORY, client.name)
        return self.connection.exchanges

    async def takes(self, client: Client, wishes: Wishes) -> int:
        """The client sends all of it; the result is how many key exchanges that took."""
        before = _start_of_peak()
        command = self.command(client, "digest", wishes=wishes).fed(self.file)
        child = self.start(command)
        status = await child.ended(PATIENCE)
        self.assertEqual(status, 0, (client.name, child.errors))
        self.assertEqual(child.seen.split(), [self.digest.encode()], client.name)
        self.assertLess(_memory("VmHWM") - before, MEMORY, client.name)
        return self.connection.exchanges


class BulkTests(BulkCase):
    """With a key exchange that the client starts for each MiB."""

    async def test_openssh(self) -> None:
        """OpenSSH, with RekeyLimit 1M, both ways, with each cipher that it may use."""
        for cipher in OpenSSH.ciphers:
            exchanges = await self.gives(OpenSSH(), Wishes(cipher, rekey=MIB))
            self.assertGreater(exchanges, MANY, cipher)
        exchanges = await self.takes(OpenSSH(), Wishes(rekey=MIB))
        self.assertGreater(exchanges, MANY)

    async def test_asyncssh(self) -> None:
        """asyncssh, with rekey_bytes, of which it counts only those that it sends."""
        self.assertEqual(await self.gives(AsyncSSH(), Wishes(rekey=MIB)), 1)
        self.assertGreater(await self.takes(AsyncSSH(), Wishes(rekey=MIB)), MANY)

    async def test_paramiko(self) -> None:
        """paramiko, told to rekey after each MiB, both ways."""
        self.assertGreater(await self.gives(Paramiko(), Wishes(rekey=MIB)), MANY)
        self.assertGreater(await self.takes(Paramiko(), Wishes(rekey=MIB)), MANY)

    async def test_plink(self) -> None:
        """plink, with RekeyBytes of a saved session, both ways."""
        self.assertGreater(await self.gives(Plink(), Wishes(rekey=MIB)), MANY)
        self.assertGreater(await self.takes(Plink(), Wishes(rekey=MIB)), MANY)

    async def test_dbclient(self) -> None:
        """dbclient, which rekeys by itself only at 1 GiB, both ways."""
        self.assertEqual(await self.gives(Dbclient(), Wishes()), 1)
        self.assertEqual(await self.takes(Dbclient(), Wishes()), 1)


class ServerRekeyTests(BulkCase):
    """With a key exchange that the server starts for each MiB."""

    config = Config(ssh=SSH(rekey_bytes=MIB))

    async def test_each_client(self) -> None:
        """Each client follows, both ways."""
        for client in CLIENTS:
            self.assertGreater(await self.gives(client, Wishes()), MANY, client.name)
            self.assertGreater(await self.takes(client, Wishes()), MANY, client.name)


def _fill(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(BULK // MIB):
            piece = os.urandom(MIB)
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def _memory(what: str) -> int:
    [line] = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(f"{what}:")
    ]
    return int(line.split()[1]) * 1024


def _start_of_peak() -> int:
    """Forget the most memory that there was (proc(5), clear_refs); the result is what there is."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")
