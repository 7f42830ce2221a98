"""BREAK, SysRq, and who may have a console: on real guests, beside a real virsh."""

from __future__ import annotations

from typing import Any

import libvirt
import libvirt_qemu
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory
from twisted.internet.task import LoopingCall
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from tests import lab
from tests.functional.process import Child
from tests.test_libvirt_stream import Expecter
from vmconsole.config import Hosts
from vmconsole.errors import (
    ConsoleBusy,
    ConsoleTaken,
    ConsoleUnavailable,
    GuestGone,
    GuestMoved,
    GuestStopped,
    HostLost,
)
from vmconsole.hypervisor.libvirt_host import HostPool
from vmconsole.interfaces import ConsoleInfo

HELP = b"sysrq: HELP : "


class GuestCase(TestCase):
    """A HostPool over the lab, and guests that go when the test does."""

    timeout = 120

    def setUp(self) -> None:
        self.lab = lab.get()
        self.node = self.lab.node1

    def start(
        self, may_force: bool = False, may_break: bool = False, *more: lab.LibvirtHost
    ) -> None:
        """Start the pool."""
        hosts = (self.lab.node1, self.lab.node2, *more)
        self.hosts = HostPool(
            reactor,  # type: ignore[arg-type]
            libvirt,
            Hosts(overrides={host.name: host.uri for host in hosts}),
            may_force=may_force,
            monitor=libvirt_qemu if may_break else None,
        )
        self.hosts.startService()
        self.addCleanup(self.hosts.stopService)

    def boot(self, guest: lab.Guest) -> ConsoleInfo:
        """Start a guest on node1."""
        self.node.run(guest)
        self.addCleanup(self.node.remove, guest.name)
        return ConsoleInfo(vm_id=self.node.uuid(guest.name), vm_name=guest.name, host="node1")

    async def open(self, console: ConsoleInfo, force: bool = False) -> Any:
        """Open its console."""
        return await self.hosts.console_endpoint(console, force).connect(
            Factory.forProtocol(Expecter)
        )

    async def refused(self, kind: type[Exception], console: ConsoleInfo, force: bool) -> None:
        """Open its console, which has to fail so."""
        await self.assertFailure(Deferred.fromCoroutine(self.open(console, force)), kind)

    async def echoes(self, protocol: Any) -> None:
        """The light guest on this console answers; what it is sent while it boots is lost."""
        answered = protocol.expect(b"ping")
        asking = LoopingCall(protocol.transport.write, b"ping")
        asking.start(1.0)
        answered.addBoth(lambda _: asking.stop())
        await answered


class SysRqTests(GuestCase):
    """A real Linux prints SysRq's help."""

    async def log_in(self, console: ConsoleInfo) -> Any:
        """The console, from the login's prompt on."""
        protocol = await self.open(console)
        protocol.transport.write(b"\r")
        await protocol.expect(b"login: ")
        return protocol

    def taint(self, console: ConsoleInfo) -> str:
        """What libvirt has against the domain."""
        return self.node.virsh("dominfo", console.vm_name).partition("Messages:")[2]

    async def test_break(self) -> None:
        """BREAK and a letter on a serial console are SysRq; it taints the domain."""
        self.start(may_break=True)
        console = self.boot(lab.LinuxGuest("control-serial"))
        protocol = await self.log_in(console)
        self.assertNotIn("custom", self.taint(console))
        await self.hosts.send_break(console)
        protocol.transport.write(b"h")
        await protocol.expect(HELP)
        self.assertIn("custom", self.taint(console))
        letter = await self.hosts.send_sysrq(console, "h")
        self.assertEqual(letter, b"h")
        protocol.transport.write(letter)
        await protocol.expect(HELP)

    async def test_keyboard(self) -> None:
        """Where BREAK is not allowed SysRq goes by the keyboard, without a taint; BREAK does
        not go."""
        self.start()
        console = self.boot(lab.LinuxGuest("control-keyboard"))
        protocol = await self.log_in(console)
        self.assertEqual(await self.hosts.send_sysrq(console, "h"), b"")
        await protocol.expect(HELP)
        await self.assertFailure(
            Deferred.fromCoroutine(self.hosts.send_break(console)), ConsoleUnavailable
        )
        self.assertNotIn("custom", self.taint(console))

    async def test_virtio(self) -> None:
        """A virtio console takes no BREAK; SysRq goes by the keyboard."""
        self.start(may_break=True)
        console = self.boot(lab.LinuxGuest("control-virtio", console="virtio"))
        protocol = await self.log_in(console)
        error = await self.assertFailure(
            Deferred.fromCoroutine(self.hosts.send_break(console)), ConsoleUnavailable
        )
        self.assertIn("is no serial port (target type='virtio')", str(error))
        self.assertEqual(await self.hosts.send_sysrq(console, "h"), b"")
        await protocol.expect(HELP)

    async def test_paused(self) -> None:
        """A guest that takes no input keeps nobody from sending BREAK: it acts when it goes on."""
        self.start(may_break=True)
        console = self.boot(lab.LinuxGuest("control-paused"))
        protocol = await self.log_in(console)
        await deferToThread(self.node.suspend, console.vm_name)
        await self.hosts.send_break(console)
        protocol.transport.write(b"h")
        await deferToThread(self.node.resume, console.vm_name)
        await protocol.expect(HELP)

    async def test_shut_off(self) -> None:
        """A guest that is off takes neither, and is told as such."""
        self.start(may_break=True)
        console = self.boot(lab.LightGuest("control-off"))
        protocol = await self.open(console)
        await deferToThread(self.node.destroy, console.vm_name)
        await protocol.ended
        for call in (self.hosts.send_break(console), self.hosts.send_sysrq(console, "h")):
            error = await self.assertFailure(Deferred.fromCoroutine(call), ConsoleUnavailable)
            self.assertIn("is shut off", str(error))


class ForceTests(GuestCase):
    """One console, two programs."""

    async def virsh(self, console: ConsoleInfo, *options: str) -> Child:
        """A virsh that has the console."""
        child = Child("virsh").spawn(
            reactor,
            ["virsh", "-c", self.node.local_uri, "console", console.vm_name, *options],
            terminal=True,
        )
        self.addCleanup(child.kill)
        await child.expect(rb"Escape character is")
        child.type(b"pong")
        await child.expect(rb"pong")
        return child

    async def test_taking(self) -> None:
        """What virsh has is busy; by force it is ours, and virsh ends."""
        self.start(may_force=True)
        console = self.boot(lab.LightGuest("control-theirs"))
        virsh = await self.virsh(console)
        await self.refused(ConsoleBusy, console, force=False)
        self.assertIsNone(virsh.status)
        protocol = await self.open(console, force=True)
        await virsh.ended()
        await self.echoes(protocol)

    async def test_not_allowed(self) -> None:
        """Where force is not allowed virsh keeps the console."""
        self.start()
        console = self.boot(lab.LightGuest("control-kept"))
        virsh = await self.virsh(console)
        await self.refused(ConsoleUnavailable, console, force=True)
        virsh.type(b"still here")
        await virsh.expect(rb"still here")

    async def test_taken(self) -> None:
        """When virsh takes it by force, that is told; virsh is left in peace, and when it has
        gone the console can be had again."""
        self.start(may_force=True)
        console = self.boot(lab.LightGuest("control-ours"))
        protocol = await self.open(console)
        await self.echoes(protocol)
        virsh = await self.virsh(console, "--force")
        error = await protocol.ended
        self.assertIs(type(error), ConsoleTaken)
        await self.refused(ConsoleBusy, console, force=False)
        virsh.type(b"still here")
        await virsh.expect(rb"still here")
        virsh.type(b"\x1d")
        await virsh.ended()
        await self.echoes(await self.open(console))


class EndTests(GuestCase):
    """How an open console ends is told by the type."""

    async def test_stopped(self) -> None:
        """Shut off, the guest stopped; saved, it will go on. Started again, its console can be
        had."""
        self.start()
        console = self.boot(lab.LightGuest("control-stopped"))
        for command, kind, text in (
            ("destroy", GuestStopped, "control-stopped was powered off."),
            ("managedsave", GuestGone, "control-stopped was saved to disk."),
        ):
            protocol = await self.open(console)
            await self.echoes(protocol)
            stopping = deferToThread(self.node.virsh, command, console.vm_name)
            error = await protocol.ended
            await stopping
            self.assertEqual((type(error), str(error)), (kind, text))
            await deferToThread(self.node.create, console.vm_name)

    async def test_moved(self) -> None:
        """A live migration moves the guest; its console can be had on the other host."""
        self.start()
        console = self.boot(lab.LightGuest("control-moved"))
        self.addCleanup(self.lab.node2.virsh, "destroy", console.vm_name)
        protocol = await self.open(console)
        await self.echoes(protocol)
        moving = deferToThread(self.node.migrate, console.vm_name, self.lab.node2)
        self.assertIs(type(await protocol.ended), GuestMoved)
        there = ConsoleInfo(vm_id=console.vm_id, vm_name=console.vm_name, host="node2")
        await self.echoes(await self.open(there))
        await moving

    async def test_libvirtd_killed(self) -> None:
        """A libvirtd that is killed is a host that is lost; after its restart the console can be
        had again, though it is locked for a moment, against which force is no help."""
        node = await deferToThread(self.lab.add_host, "node3")
        self.addCleanup(node.close)
        self.start(True, False, node)
        await deferToThread(node.run, lab.LightGuest("control-lost"))
        uuid = await deferToThread(node.uuid, "control-lost")
        console = ConsoleInfo(vm_id=uuid, vm_name="control-lost", host="node3")
        protocol = await self.open(console)
        await self.echoes(protocol)
        await deferToThread(node.kill)
        self.assertIs(type(await protocol.ended), HostLost)
        await deferToThread(node.start)
        await self.echoes(await self.open(console, force=True))
