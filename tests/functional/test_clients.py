"""The ssh clients that people have, each with each type of key, through the proxy to a guest."""

from __future__ import annotations

from pathlib import Path

from twisted.internet import reactor
from twisted.internet.threads import deferToThread

from tests.functional.case import FunctionalTestCase
from tests.functional.clients import (
    KEY_TYPES,
    AsyncSSH,
    Client,
    Dbclient,
    Door,
    OpenSSH,
    Paramiko,
    Plink,
    Session,
    make_key,
)
from tests.functional.process import Child


class ClientTests(FunctionalTestCase):
    """Each client, with an ed25519, an RSA and an ECDSA key of the same user: a list, the menu, a
    console and the way out of it, and the exit status of what goes well and of what does not."""

    async def start_site(self) -> None:
        """The proxy knows the keys from its start: a new one counts a second later."""
        self.keys = [await deferToThread(make_key, self.site.folder, kind) for kind in KEY_TYPES]
        for key in self.keys:
            await self.site.run("key", "add", "alice", f"{key}.pub")
        await super().start_site()

    async def test_openssh(self) -> None:
        """OpenSSH's ssh."""
        await self.with_each_key(OpenSSH())

    async def test_plink(self) -> None:
        """PuTTY's plink."""
        await self.with_each_key(Plink())

    async def test_dbclient(self) -> None:
        """dropbear's dbclient."""
        await self.with_each_key(Dbclient())

    async def test_paramiko(self) -> None:
        """paramiko."""
        await self.with_each_key(Paramiko())

    async def test_asyncssh(self) -> None:
        """asyncssh."""
        await self.with_each_key(AsyncSSH())

    async def with_each_key(self, client: Client) -> None:
        """All that a client is to do, once for each type of key."""
        for key in self.keys:
            await self.lists(client, key)
            await self.uses_console(client, key)
            await self.is_refused(client, key)

    def start(self, client: Client, key: Path, *words: str, terminal: bool = False) -> Child:
        """Start a client; it ends with the test."""
        door = Door(self.site.port, self.site.known_hosts, self.site.folder)
        child = client.command(Session(door, key, words, terminal)).start(reactor, terminal)
        self.addCleanup(child.kill)
        return child

    async def lists(self, client: Client, key: Path) -> None:
        """A command without a terminal: all of its output, none of it changed, and a 0."""
        listing = self.start(client, key, "list")
        self.assertEqual(await listing.ended(), 0, (client.name, key, listing.errors))
        self.assertRegex(listing.seen, rb"^([0-9a-f-]{36}\t\w+\n){6}$")

    async def uses_console(self, client: Client, key: Path) -> None:
        """The shell, which is the menu; a console from it by its number, some words into that and
        back, and out of it, which is a 0."""
        console = self.start(client, key, terminal=True)
        menu = await console.expect(rb"(\d)\. light2 \[[0-9a-f-]{36}\]\r\n.*> ")
        console.type(menu[1] + b"\r")
        await console.expect(rb"\[vmconsole: light2 on node2\. To leave: \^\] \. ")
        for words in (b"typed by " + client.name.encode(), b"\x03\x04\x1a\x1c~.", b"q" * 5000):
            console.type(words)
            await console.expect(words.replace(b"~.", rb"~\."))
        console.type(b"\x1d.")
        await console.expect(rb"\[vmconsole: You left light2\.\]")
        self.assertEqual(await console.ended(), 0, (client.name, key))

    async def is_refused(self, client: Client, key: Path) -> None:
        """What does not go well says why on standard error, and is a 1 or a 2."""
        for words, status, said in (
            ("log nonesuch", 1, rb"ERROR: nonesuch is none of your VMs"),
            ("frobnicate the VM", 2, rb"ERROR: frobnicate is no command"),
        ):
            refused = self.start(client, key, words)
            self.assertEqual(await refused.ended(), status, (client.name, key, refused.errors))
            self.assertRegex(refused.errors, said)
            self.assertEqual(refused.seen, b"")
