"""A session outlives what happens to its guest, and to the guest's host."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

from twisted.internet import reactor
from twisted.internet.threads import deferToThread
from twisted.protocols.portforward import ProxyFactory, ProxyServer

from tests import lab
from tests.functional.case import FunctionalTestCase
from tests.functional.process import Child
from tests.functional.remote import RemoteTestCase
from tests.functional.site import booted, log_in

AWAY = rb"[^\]]*Waiting up to 5 minutes for %s; \^\] \. leaves\.\]"


class WireServer(ProxyServer):
    """One connection over a Wire."""

    def connectionMade(self) -> None:
        cast(Wire, self.factory).connections.append(self)
        if cast(Wire, self.factory).is_cut:
            self.transport.pauseProducing()
        else:
            super().connectionMade()


class Wire(ProxyFactory):
    """What leads to a port of a host, and may be cut: then nothing comes through any more, and
    nobody is told."""

    protocol = WireServer

    def __init__(self, host: str, port: int) -> None:
        super().__init__(host, port)
        self.is_cut = False
        self.connections: list[Any] = []

    def cut(self) -> None:
        """From now on all is silence, on new connections, too."""
        self.is_cut = True
        for each in self.connections:
            for end in (each, each.peer):
                if end is not None and end.transport.connected:
                    end.transport.pauseProducing()

    def mend(self) -> None:
        """The host has forgotten the old connections; new ones come through."""
        self.is_cut = False
        connections, self.connections = self.connections, []
        for each in connections:
            for end in (each, each.peer):
                if end is not None:
                    end.transport.abortConnection()


class FollowCase(FunctionalTestCase):
    """With one more guest, wanderer, which stands on node1 at first and echoes."""

    guest: lab.Guest = lab.LightGuest("wanderer")

    async def setUp(self) -> None:  # type: ignore[override]
        await super().setUp()
        await self.on(self.lab.node1.run, self.guest)
        self.addCleanup(self._remove)

    async def _remove(self) -> None:
        for host in (self.lab.node1, self.lab.node2):
            if "wanderer" in await self.on(host.virsh, "list", "--all", "--name"):
                await self.on(host.remove, "wanderer")

    async def on(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Do something on a host, which takes its time."""
        return await deferToThread(function, *arguments)

    async def attach(self, *command: str) -> Child:
        """Alice is on the wanderer's console."""
        ssh = self.site.ssh(self.alice, *(command or ("wanderer",)))
        await ssh.expect(rb"\[vmconsole: wanderer on node1\.")
        if isinstance(self.guest, lab.LightGuest):
            await booted(ssh)
        return ssh

    async def works(self, ssh: Child, words: bytes) -> None:
        """What is typed comes back."""
        ssh.type(words)
        await ssh.expect(re.escape(words))

    async def told(self, ssh: Child, what: bytes) -> None:
        """The user is told that the console is away, and why."""
        await ssh.expect(rb"\[vmconsole: " + what + AWAY % b"wanderer")

    async def back(self, ssh: Child, host: bytes = b"node1") -> None:
        """The user is told that it is back."""
        await ssh.expect(rb"\[vmconsole: wanderer is back, on %s\.\]" % host)


class GuestTests(FollowCase):
    """What happens to a guest."""

    async def test_shut_off(self) -> None:
        """A guest that is shut off and started again: what is typed meanwhile is refused with a
        bell, and said once; `^] .` leaves in between, too."""
        ssh = await self.attach()
        await self.works(ssh, b"<before>")
        await self.on(self.lab.node1.destroy, "wanderer")
        await self.told(ssh, rb"wanderer was powered off\.")
        ssh.type(b"lost")
        await ssh.expect(rb"\x07.*\[vmconsole: wanderer is away: what you type goes nowhere\.\]")
        ssh.type(b"again")
        await ssh.expect(rb"\x07")
        await self.on(self.lab.node1.create, "wanderer")
        await self.back(ssh)
        await booted(ssh)
        await self.works(ssh, b"<after>")
        self.assertEqual(ssh.seen.count(b"goes nowhere"), 1)
        self.assertNotIn(b"lost", ssh.seen)
        await self.on(self.lab.node1.destroy, "wanderer")
        await self.told(ssh, rb"wanderer was powered off\.")
        ssh.type(b"\x1d.")
        self.assertEqual(await ssh.ended(), 0)

    async def test_reset(self) -> None:
        """A guest that is reset, as when it reboots: its output just goes on."""
        ssh = await self.attach()
        await self.works(ssh, b"<before>")
        await self.on(self.lab.node1.reset, "wanderer")
        await ssh.expect(re.escape(lab.LIGHT_PROMPT))
        await self.works(ssh, b"<after>")

    async def test_paused(self) -> None:
        """A guest that is paused and goes on: what was typed meanwhile arrives."""
        ssh = await self.attach()
        await self.works(ssh, b"<before>")
        await self.on(self.lab.node1.suspend, "wanderer")
        await ssh.expect(rb"\[vmconsole: wanderer is paused\.\]")
        ssh.type(b"!")
        await self.on(self.lab.node1.resume, "wanderer")
        await ssh.expect(rb"(?=.*\[vmconsole: wanderer runs again\.\])(?=.*!)")

    async def test_saved(self) -> None:
        """A guest that is saved to disk and restored goes on in the same session."""
        ssh = await self.attach()
        await self.works(ssh, b"<before>")
        file = f"{self.lab.node1.directory}/wanderer.saved"
        await self.on(self.lab.node1.virsh, "save", "wanderer", file)
        await self.told(ssh, rb"wanderer was saved to disk\.")
        await self.on(self.lab.node1.virsh, "restore", file)
        await self.back(ssh)
        await self.works(ssh, b"<after>")

    async def test_taken_by_force(self) -> None:
        """A console that somebody takes by force on the host: it is said, never taken back, and
        goes on when it is free."""
        ssh = await self.attach()
        await self.works(ssh, b"<before>")
        virsh = Child("virsh").spawn(
            reactor,
            ["virsh", "-c", self.lab.node1.local_uri, "console", "wanderer", "--force"],
            terminal=True,
        )
        self.addCleanup(virsh.kill)
        await self.told(ssh, rb"[^\]]*wanderer [^\]]*force\.")
        await virsh.expect(rb"Escape character is")
        await self.works(virsh, b"<mine>")
        virsh.type(b"\x1d")
        await virsh.ended()
        await self.back(ssh)
        await self.works(ssh, b"<after>")
        self.assertNotIn(b"<mine>", ssh.seen)

    async def test_wait(self) -> None:
        """``connect --wait`` attaches before the VM runs, and sees it boot."""
        await self.on(self.lab.node1.destroy, "wanderer")
        ssh = self.site.ssh(self.alice, "connect --wait wanderer")
        await ssh.expect(
            rb"\[vmconsole: wanderer is shut off\.[^\]]* Waiting for it; Ctrl-C gives up\.\]"
        )
        impatient = self.site.ssh(self.alice, "wanderer")
        self.assertEqual(await impatient.ended(), 1)
        self.assertIn(b"ERROR: wanderer is shut off.", impatient.seen)
        await self.on(self.lab.node1.create, "wanderer")
        await ssh.expect(rb"\[vmconsole: wanderer on node1\.")
        await booted(ssh)
        await self.works(ssh, b"<after>")

    async def test_stuck(self) -> None:
        """A guest that takes no input for so long that its host drops the connection: it is said
        what may be lost, and the console comes back by itself."""
        ssh = await self.attach()
        await self.works(ssh, b"<before>")
        await self.on(self.lab.node1.suspend, "wanderer")
        ssh.type(b"x" * 40_000)
        await ssh.expect(
            rb"wanderer took no input for \d+ s, and node1's libvirtd dropped the connection; "
            rb"\d+ bytes typed may be lost\.",
            patience=60,
        )
        await self.back(ssh)
        await self.on(self.lab.node1.resume, "wanderer")
        await self.works(ssh, b"<after>")


class HostTests(FollowCase):
    """What happens to its host."""

    async def test_libvirtd_is_killed(self) -> None:
        """A libvirtd that dies and is started again: the guest never noticed."""
        ssh = await self.attach()
        await self.works(ssh, b"<before>")
        await self.on(self.lab.node1.kill)
        await self.told(ssh, rb"The connection to node1 was lost: [^\]]*")
        await self.on(self.lab.node1.start)
        await self.back(ssh)
        await self.works(ssh, b"<after>")

    async def test_silent(self) -> None:
        """A host that falls silent: after some 20 seconds that is said, with what may be lost of
        what was typed; when it answers again the session goes on."""
        wire = Wire("127.0.0.1", self.lab.node1.port)
        port = reactor.listenTCP(0, wire, interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        uri = self.lab.node1.uri.replace(f":{self.lab.node1.port}/", f":{port.getHost().port}/")
        await self.site.run("host", "remove", "node1")
        await self.site.run("host", "add", "node1", uri)
        await self.site.log(rb"node1 has")
        ssh = await self.attach()
        await self.works(ssh, b"<before>")
        wire.cut()
        ssh.type(b"lost?")
        await ssh.expect(
            rb"\[vmconsole: The connection to node1 was lost: [^\]]*does not answer\. "
            rb"Bytes typed that may be lost: \d+\. Waiting up to 5 minutes for wanderer; ",
            patience=60,
        )
        wire.mend()
        await self.back(ssh)
        await self.works(ssh, b"<after>")


class MigrationTests(FollowCase):
    """A guest that moves."""

    guest = lab.LinuxGuest("wanderer")

    async def test_counter(self) -> None:
        """A live migration to another host: a counter that runs in the guest goes on in the same
        session, less than two seconds after the guest was resumed there."""
        ssh = await self.attach()
        await log_in(ssh, "wanderer")
        ssh.type(b"i=0; while :; do echo n=$i=; i=$((i+1)); usleep 20000; done\r")
        await ssh.expect(rb"n=30=")
        await self.on(self.lab.node1.migrate, "wanderer", self.lab.node2)
        await self.told(ssh, rb"wanderer moved to another host\.")
        await self.back(ssh, b"node2")
        await ssh.expect(rb"n=\d+=\r\n.*n=\d+=\r\n")
        numbers = [int(number) for number in re.findall(rb"n=(\d+)=", ssh.seen)]
        self.assertEqual(numbers, sorted(set(numbers)))
        # Its terminal's answer. Between two commands the shell itself may miss a Ctrl-C.
        ssh.type(b"\x03")
        await ssh.expect(rb"\^C")


class OVirtTests(RemoteTestCase):
    """With an oVirt Engine, which lists only VMs that run, and hears of a migration late."""

    settings = "recheck = 0.5\ncache_ttl = 0.5\n"

    async def setUp(self) -> None:  # type: ignore[override]
        await super().setUp()
        uuid = await deferToThread(self.lab.node1.run, lab.LightGuest("rover"))
        self.addCleanup(self._remove)
        self.rover = self.engine.add_vm(uuid, "rover", "node1")
        for user in ("alice", "bob"):
            self.engine.grant(user, self.rover)

    async def _remove(self) -> None:
        for host in (self.lab.node1, self.lab.node2):
            if "rover" in await deferToThread(host.virsh, "list", "--all", "--name"):
                await deferToThread(host.remove, "rover")

    async def test_migrated(self) -> None:
        """A VM that moved while the Engine still lists the old host, and then none for a while: the
        sessions go on once it lists the new one; that of a user who lost the VM meanwhile ends."""
        alice, bob = await self.opened(self.alice, "rover"), self.site.ssh(self.bob, "rover")
        await bob.expect(rb"You watch\.")
        await deferToThread(self.lab.node1.migrate, "rover", self.lab.node2)
        for ssh in (alice, bob):
            await ssh.expect(rb"\[vmconsole: rover moved to another host\. Waiting")
        for _ in range(3):
            await self.engine.next("available_consoles")
        self.engine.unplace(self.rover)
        for _ in range(4):
            await self.engine.next("available_consoles")
        self.engine.revoke("bob", self.rover)
        self.engine.place(self.rover, "node2")
        await alice.expect(rb"\[vmconsole: rover is back, on node2\.\]")
        await self.works(alice)
        await bob.expect(rb"\[vmconsole: You no longer have access to rover\.\]")
        await bob.ended()
        self.assertNotIn(b"back", bob.seen)
        await self.site.log(rb"resumed session=[^\n]*host='node2'")

    async def test_wait(self) -> None:
        """``connect --wait`` waits for a VM that the Engine does not list: it does not run yet."""
        await deferToThread(self.lab.node1.destroy, "rover")
        self.engine.unplace(self.rover)
        ssh = self.site.ssh(self.alice, "connect --wait rover")
        await ssh.expect(
            rb"\[vmconsole: rover is not there: [^\]]* Waiting for it; Ctrl-C gives up"
        )
        await deferToThread(self.lab.node1.create, "rover")
        self.engine.place(self.rover, "node1")
        await ssh.expect(rb"\[vmconsole: rover on node1\. To leave")
        await booted(ssh)
        await self.works(ssh)
        impatient = self.site.ssh(self.alice, "connect --wait nonesuch")
        await impatient.expect(rb"Waiting for it; Ctrl-C gives up")
        impatient.type(b"\x03")
        self.assertEqual(await impatient.ended(), 1)
        self.assertIn(b"ERROR: You gave up.", impatient.seen)
