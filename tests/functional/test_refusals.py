"""What goes wrong is told truthfully, hurts nobody else, and leaves no traceback."""

from __future__ import annotations

import subprocess
from pathlib import Path

from twisted.internet import reactor
from twisted.internet.threads import deferToThread

from tests.functional.case import FunctionalTestCase
from tests.functional.process import Child
from tests.functional.site import booted


class LoginTests(FunctionalTestCase):
    """Who does not get in."""

    configuration = "[engine]\ncache_ttl = 0.0\n"

    async def refused(self, key: Path, user: str = "vmproxy") -> bytes:
        """ssh's stderr, of a login that has to fail with ssh's own refusal."""
        ssh = self.site.ssh(key, "list", user=user, terminal=False)
        self.assertEqual(await ssh.ended(), 255)
        self.assertIn(b"Permission denied (publickey)", ssh.errors)
        return ssh.errors

    async def others_are_served(self) -> None:
        """Somebody else logs in as ever."""
        ssh = self.site.ssh(self.bob, "list", terminal=False)
        self.assertEqual(await ssh.ended(), 0)

    async def test_strange_key(self) -> None:
        """A key that nobody knows gets ssh's own refusal, and an audit line."""
        key = self.site.folder / "strange.key"
        await deferToThread(
            subprocess.run, ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True
        )
        await self.refused(key)
        await self.site.log(
            rb"login refused session=\w+ login_name='vmproxy' fingerprints=\['SHA256:[^']+'\] "
            rb"address=127\.0\.0\.1 reason='the engine knows no user with this key'"
        )
        await self.others_are_served()

    async def test_wrong_name(self) -> None:
        """Another user name gets ssh's refusal, and a banner that says which would do."""
        errors = await self.refused(self.alice, user="root")
        self.assertIn(b"[vmconsole: log in as ovirt-vmconsole or vmproxy.]", errors)

    async def test_removed_key(self) -> None:
        """A key that was removed while the proxy runs no longer logs in."""
        ssh = self.site.ssh(self.alice, "info", terminal=False)
        self.assertEqual(await ssh.ended(), 0)
        fingerprint = ssh.seen.split(b"key: ")[1].split()[0].decode()
        await self.site.run("key", "remove", fingerprint)
        await self.refused(self.alice)
        await self.others_are_served()

    async def test_many_keys(self) -> None:
        """An agent's worth of strange keys before the right one is no reason to be refused."""
        options = []
        for number in range(8):
            key = self.site.folder / f"k{number}"
            await deferToThread(
                subprocess.run,
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key],
                check=True,
            )
            options.append(f"IdentityFile={key}")
        ssh = self.site.ssh(
            self.site.folder / "k0",
            "list",
            terminal=False,
            options=(*options, f"IdentityFile={self.bob}"),
        )
        self.assertEqual(await ssh.ended(), 0, ssh.errors)


class EngineTests(FunctionalTestCase):
    """When the engine does not answer, and nothing older may serve."""

    configuration = "[engine]\ncache_ttl = 0.0\nstale_grace = 0.0\n"

    async def test_engine_stopped(self) -> None:
        """The banner says so before ssh's refusal; once it is back, all is well again."""
        socket = self.site.state / "engine.sock"
        hidden = socket.with_name("hidden")
        socket.rename(hidden)
        ssh = self.site.ssh(self.alice, "list", terminal=False)
        self.assertEqual(await ssh.ended(), 255)
        self.assertRegex(
            ssh.errors,
            rb"(?s)\[vmconsole: the engine, which knows your key, does not answer\. It is not "
            rb"your key's fault: try again later\.\].*Permission denied \(publickey\)",
        )
        hidden.rename(socket)
        # That there was no answer is believed for a second.
        for _ in range(200):
            ssh = self.site.ssh(self.alice, "list", terminal=False)
            if await ssh.ended() == 0:
                return
        self.fail(self.site.logs)

    async def test_engine_stops_after_the_login(self) -> None:
        """An open session goes on; a new command on it is told."""
        control = ("ControlMaster=auto", f"ControlPath={self.site.folder}/c", "ControlPersist=no")
        ssh = self.site.ssh(self.alice, "light1", options=control)
        await ssh.expect(rb"light1 on node1")
        socket = self.site.state / "engine.sock"
        socket.rename(socket.with_name("hidden"))
        second = self.site.ssh(self.alice, "list", terminal=False, options=control)
        self.assertEqual(await second.ended(), 1)
        self.assertRegex(second.errors, rb"ERROR: .*engine")
        ssh.type(b"goes on")
        await ssh.expect(rb"goes on")


class ConsoleTests(FunctionalTestCase):
    """Consoles that cannot be opened: each has its own line, and exit status 1."""

    async def refused(self, key: Path, vm: str) -> bytes:
        """The line that ssh shows."""
        ssh = self.site.ssh(key, vm)
        self.assertEqual(await ssh.ended(), 1, ssh.seen)
        return ssh.seen

    async def test_each(self) -> None:
        """No grants, somebody else's VM, an unknown one, one that is off, one without a console
        device, one whose console is no pty."""
        for key, vm, line in (
            (self.carol, "", rb"ERROR: There is no console for carol@internal: no VM"),
            (self.bob, "light2", rb"ERROR: light2 is none of your VMs"),
            (self.alice, "nonesuch", rb"ERROR: nonesuch is none of your VMs"),
            (self.alice, "off1", rb"ERROR: off1 is shut off\. Start it, then connect again"),
            (self.alice, "none1", rb"ERROR: none1 has no console device: add <console "),
            (self.alice, "socket1", rb"ERROR: .*socket1.*not a pty.*"),
        ):
            self.assertRegex(await self.refused(key, vm), rb"^" + line, vm)

    async def test_no_terminal(self) -> None:
        """Without a pty the message says to use ssh -t."""
        ssh = self.site.ssh(self.bob, terminal=False)
        self.assertEqual(await ssh.ended(), 1)
        self.assertIn(b"ERROR: A console needs a terminal. Run ssh with -t", ssh.errors)

    async def test_bad_syntax(self) -> None:
        """A line that makes no sense ends with 2."""
        ssh = self.site.ssh(self.bob, "frobnicate the vm", terminal=False)
        self.assertEqual(await ssh.ended(), 2)
        self.assertIn(b"ERROR: frobnicate is no command", ssh.errors)

    async def test_busy(self) -> None:
        """A console that a virsh on the host has is refused with a clear word, and virsh does not
        notice."""
        virsh = await self.virsh(rb"Escape character")
        line = await self.refused(self.bob, "light1")
        self.assertRegex(line, rb"ERROR: The console of light1 is in use by another program on ")
        virsh.type(b"undisturbed")
        await virsh.expect(rb"undisturbed")

    async def test_busy_for_virsh(self) -> None:
        """A console that is open here is refused to a virsh, also for a while after it was left;
        here, it is shared."""
        first = self.site.ssh(self.alice, "light1")
        await first.expect(rb"light1 on node1")
        virsh = await self.virsh(rb"Active console session exists")
        self.assertEqual(await virsh.ended(), 1)
        second = self.site.ssh(self.bob, "light1")
        await second.expect(rb"light1 on node1.*You watch\. alice@internal from ")
        for ssh in (first, second):
            ssh.type(b"\x1d.")
            self.assertEqual(await ssh.ended(), 0)
        virsh = await self.virsh(rb"Active console session exists")
        self.assertEqual(await virsh.ended(), 1)

    async def virsh(self, pattern: bytes) -> Child:
        """A virsh that wants light1's console, and says so much."""
        virsh = Child("virsh").spawn(
            reactor,
            ["/usr/bin/virsh", "-c", self.lab.node1.uri, "console", "light1"],
            terminal=True,
        )
        self.addCleanup(virsh.kill)
        await virsh.expect(pattern)
        return virsh

    async def test_host_stopped(self) -> None:
        """While a host's libvirtd is stopped its VMs are told apart from the others, which are
        served; after its start all is well, without a restart of the proxy."""
        vm_id = await deferToThread(self.lab.node2.uuid, "light2")
        open_there = self.site.ssh(self.alice, "light2")
        await open_there.expect(rb"light2 on node2")
        await deferToThread(self.lab.node2.stop)
        try:
            await open_there.expect(rb"\[vmconsole: .*node2[^\]]*lost[^\]]*\]")
            line = await self.refused(self.alice, vm_id.strip())
            self.assertRegex(line, rb"^ERROR: .*node2")
            ssh = self.site.ssh(self.alice, "light1")
            await ssh.expect(rb"light1 on node1")
            ssh.type(b"served")
            await ssh.expect(rb"served")
        finally:
            await deferToThread(self.lab.node2.start)
        await open_there.expect(rb"\[vmconsole: light2 is back, on node2\.\]")
        await self.site.log(rb"node2 has")
        ssh = self.site.ssh(self.bob)
        await ssh.expect(rb"light1 on node1")

    async def test_frozen_host(self) -> None:
        """A libvirtd that hangs holds up nobody else; who waits for it is told, and may give
        up."""
        await deferToThread(self.lab.node2.freeze)
        try:
            waiting = self.site.ssh(self.alice, "light2")
            await waiting.expect(rb"\[vmconsole: Connecting to light2 on node2\.\.\. Ctrl-C ")
            ssh = self.site.ssh(self.bob)
            await ssh.expect(rb"light1 on node1", 5)
            ssh.type(b"quick")
            await ssh.expect(rb"quick", 5)
            waiting.type(b"\x03")
            self.assertEqual(await waiting.ended(), 1)
        finally:
            await deferToThread(self.lab.node2.thaw)

    async def test_stuck_guest(self) -> None:
        """A paused guest takes no input: its user may leave at once, and others on the same host
        do not notice."""
        await deferToThread(self.lab.node1.suspend, "linux1")
        try:
            stuck = self.site.ssh(self.alice, "linux1")
            await stuck.expect(rb"To leave")
            stuck.type(b"x" * 60000)
            ssh = self.site.ssh(self.bob)
            await ssh.expect(rb"light1 on node1")
            for number in range(50):
                ssh.type(b"%d;" % number)
                await ssh.expect(b"%d;" % number, 5)
            stuck.type(b"\x1d.")
            await stuck.expect(rb"You left linux1", 5)
            self.assertEqual(await stuck.ended(), 0)
        finally:
            await deferToThread(self.lab.node1.resume, "linux1")


class FloodTests(FunctionalTestCase):
    """A guest that prints without end."""

    async def test_reader_stops(self) -> None:
        """A client that stops reading gets the newest output later and is told of the gap; the
        others' keystrokes are served meanwhile."""
        from tests import lab

        await deferToThread(self.lab.node1.run, lab.FloodGuest("flood1"))
        self.addCleanup(deferToThread, self.lab.node1.remove, "flood1")
        ssh = self.site.ssh(self.alice, "flood1")
        await ssh.expect(rb"To leave.*\r\n")
        await booted(ssh, b"g", rb"\d+.*\n")
        ssh.transport.stopReading()
        other = self.site.ssh(self.bob)
        await other.expect(rb"light1 on node1")
        for number in range(200):
            other.type(b"%d;" % number)
            await other.expect(b"%d;" % number, 5)
        ssh.transport.startReading()
        ssh.type(b"s")
        ssh.type(b"\x1d.")
        await ssh.expect(rb"You left flood1")
        self.assertEqual(await ssh.ended(), 0)


class TooManyTests(FunctionalTestCase):
    """More connections from an address than there may be."""

    configuration = "[limits]\nper_address = 1\n"

    async def test_told(self) -> None:
        """Each is told so, whatever it was sending at that moment; when the first is gone the
        next comes in."""
        first = self.site.ssh(self.bob)
        await first.expect(rb"To leave")
        for _ in range(20):
            ssh = self.site.ssh(self.bob, "list", terminal=False)
            self.assertEqual(await ssh.ended(), 255)
            self.assertIn(b"too many connections from your address; try again later", ssh.errors)
        first.type(b"\x1d.")
        self.assertEqual(await first.ended(), 0)
        await self.site.log(rb"detached session=")
        ssh = self.site.ssh(self.bob, "list", terminal=False)
        self.assertEqual(await ssh.ended(), 0, ssh.errors)
