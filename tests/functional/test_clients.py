"""The other ssh clients that people have: PuTTY's plink, paramiko, asyncssh."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from typing import Any

import asyncssh
import paramiko
from twisted.internet import reactor
from twisted.internet.threads import deferToThread

from tests.functional.case import FunctionalTestCase
from tests.functional.process import Child, Unexpected

PATIENCE = 20.0


class ClientTests(FunctionalTestCase):
    """Each lists, opens a console, types, leaves, and gets the exit status."""

    async def test_plink(self) -> None:
        """PuTTY's plink."""
        ppk = self.site.folder / "bob.ppk"
        convert = Child("puttygen").spawn(
            reactor,
            ["/usr/bin/puttygen", str(self.bob), "-o", str(ppk), "-O", "private"],
        )
        self.assertEqual(await convert.ended(), 0, convert.errors)
        blob = (self.site.state / "ssh_host_ed25519_key.pub").read_text().split()[1]
        digest = hashlib.sha256(base64.b64decode(blob)).digest()
        shown = "SHA256:" + base64.b64encode(digest).decode().rstrip("=")

        def plink(*words: str) -> Child:
            options = ["-batch", "-ssh", "-t", "-P", str(self.site.port), "-i", str(ppk)]
            child = Child("plink").spawn(
                reactor,
                [
                    "/usr/bin/plink",
                    *options,
                    "-hostkey",
                    shown,
                    "vmproxy@127.0.0.1",
                    *words,
                ],
                env={"HOME": str(self.site.folder)},
                terminal=True,
            )
            self.addCleanup(child.kill)
            return child

        listing = plink("list")
        await listing.expect(rb"\tlight1")
        self.assertEqual(await listing.ended(), 0)
        console = plink()
        await console.expect(rb"light1 on node1.*\r\n")
        console.type(b"typed by plink")
        await console.expect(rb"typed by plink")
        console.type(b"\x1d.")
        self.assertEqual(await console.ended(), 0)

    async def test_paramiko(self) -> None:
        """paramiko, which knows ML-KEM."""

        def talk() -> tuple[bytes, int, bytes, int]:
            with paramiko.SSHClient() as client:
                client.load_host_keys(str(self.site.known_hosts))
                client.connect(
                    "127.0.0.1",
                    self.site.port,
                    "vmproxy",
                    key_filename=str(self.bob),
                    allow_agent=False,
                    look_for_keys=False,
                    timeout=PATIENCE,
                )
                _, out, _ = client.exec_command("list", timeout=PATIENCE)
                listing = out.read(), out.channel.recv_exit_status()
                transport = client.get_transport()
                assert transport is not None
                channel = transport.open_session()
                channel.settimeout(PATIENCE)
                channel.get_pty()
                channel.invoke_shell()
                seen = b""

                def read_until(text: bytes) -> None:
                    nonlocal seen
                    while text not in seen:
                        data = channel.recv(4096)
                        if not data:
                            raise Unexpected(f"{text!r} did not come: {seen!r}")
                        seen += data

                read_until(b"To leave")
                channel.sendall(b"typed by paramiko")
                read_until(b"typed by paramiko")
                channel.sendall(b"\x1d.")
                while data := channel.recv(4096):
                    seen += data
                return *listing, seen, channel.recv_exit_status()

        listing, status, seen, left = await deferToThread(talk)
        self.assertRegex(listing, rb"\tlight1\n$")
        self.assertIn(b"You left light1", seen)
        self.assertEqual((status, left), (0, 0))

    async def test_asyncssh(self) -> None:
        """asyncssh, whose event loop runs in a thread of its own."""

        async def talk() -> tuple[Any, bytes, int | None]:
            async with asyncssh.connect(
                "127.0.0.1",
                self.site.port,
                username="vmproxy",
                client_keys=[str(self.bob)],
                known_hosts=str(self.site.known_hosts),
                config=None,
                agent_path=None,
            ) as connection:
                listing = await connection.run("list")
                async with connection.create_process(term_type="xterm", encoding=None) as process:
                    seen = await process.stdout.readuntil(b"To leave")
                    process.stdin.write(b"typed by asyncssh")
                    seen += await process.stdout.readuntil(b"typed by asyncssh")
                    process.stdin.write(b"\x1d.")
                    seen += await process.stdout.read()
                    await process.wait()
                    return listing, seen, process.exit_status

        limited = asyncio.wait_for
        listing, seen, left = await deferToThread(lambda: asyncio.run(limited(talk(), PATIENCE)))
        self.assertRegex(listing.stdout, r"\tlight1\n$")
        self.assertEqual(listing.exit_status, 0)
        self.assertIn(b"You left light1", seen)
        self.assertEqual(left, 0)
