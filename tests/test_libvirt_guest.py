"""BREAK and SysRq: what they need, how they go, and what is told when they cannot."""

from __future__ import annotations

import string
import traceback
from typing import Any
from xml.etree import ElementTree

from twisted.trial.unittest import SynchronousTestCase

from tests.fakes_libvirt import (
    SHUT_OFF,
    FakeConnection,
    FakeDaemon,
    FakeDomainObject,
    FakeMonitor,
    FakeReactor,
    LibvirtError,
)
from vmconsole.errors import ConsoleError, ConsoleUnavailable, HostUnreachable
from vmconsole.hypervisor.libvirt_guest import Devices, guest_devices, send_break, send_sysrq
from vmconsole.interfaces import ConsoleInfo

KEYBOARD = "<input type='keyboard' bus='ps2'><alias name='input1'/></input>"
SERIAL = (
    "<serial type='pty'><target type='isa-serial' port='0'/><alias name='serial0'/></serial>"
    "<console type='pty'><target type='serial' port='0'/><alias name='serial0'/></console>"
)
VIRTIO = "<console type='pty'><target type='virtio' port='0'/><alias name='console0'/></console>"


def live(*devices: str) -> str:
    """The XML of a running domain."""
    return f"<domain type='kvm' id='7'><devices>{''.join(devices)}</devices></domain>"


class DevicesTests(SynchronousTestCase):
    """What a domain's XML says."""

    def devices(self, *devices: str, console: str = "default") -> Devices | None:
        return guest_devices(ElementTree.fromstring(live(*devices)), console)

    def test_console_for_a_serial_port(self) -> None:
        """The default console is the first; where it stands for a serial port, that one counts."""
        self.assertEqual(self.devices(SERIAL, KEYBOARD), Devices("serial0", "isa-serial", True))
        self.assertEqual(self.devices(SERIAL, VIRTIO), Devices("serial0", "isa-serial", False))
        self.assertEqual(self.devices(VIRTIO), Devices("console0", "virtio", False))

    def test_serial_port_alone(self) -> None:
        """A domain without a console has its first serial port."""
        port = SERIAL.partition("<console")[0]
        self.assertEqual(self.devices(port), Devices("serial0", "isa-serial", False))
        # As libvirt opens it.
        self.assertEqual(self.devices(port, VIRTIO), Devices("console0", "virtio", False))

    def test_named(self) -> None:
        """Another console is found by its alias."""
        self.assertEqual(
            self.devices(SERIAL, VIRTIO, console="console0"), Devices("console0", "virtio", False)
        )
        self.assertIsNone(self.devices(SERIAL, console="console0"))

    def test_none(self) -> None:
        """A domain may have no console, or no devices at all."""
        self.assertIsNone(self.devices(KEYBOARD))
        self.assertIsNone(guest_devices(ElementTree.fromstring("<domain/>"), "default"))

    def test_mouse(self) -> None:
        """Only a keyboard is one."""
        devices = self.devices(SERIAL, "<input type='mouse' bus='ps2'/>")
        assert devices is not None
        self.assertFalse(devices.has_keyboard)

    def test_who_passes_break(self) -> None:
        """The devices that pass BREAK on are those which QEMU lets do so."""
        for target in ("serial", "isa-serial", "pci-serial", "usb-serial", "system-serial"):
            self.assertTrue(Devices("x", target, False).passes_break, target)
        for target in ("virtio", "spapr-vio-serial", "sclp-serial", "isa-debugcon", "xen"):
            self.assertFalse(Devices("x", target, False).passes_break, target)
        bare = self.devices("<console type='pty'><alias name='serial0'/></console>")
        assert bare is not None
        self.assertTrue(bare.passes_break)


class GuestCase(SynchronousTestCase):
    """One VM, named vm, with a serial console and a keyboard."""

    def setUp(self) -> None:
        self.daemon = FakeDaemon(FakeReactor())
        self.domain = self.daemon.add("1", "vm", xml=live(SERIAL, KEYBOARD))
        self.connection: Any = FakeConnection(self.daemon)
        self.console = ConsoleInfo(vm_id="1", vm_name="vm\x1b", host="node1\x1b")

    def send_break(self, monitor: FakeMonitor | None) -> None:
        send_break(self.connection, monitor, self.console)

    def send_sysrq(self, monitor: FakeMonitor | None, letter: str = "h") -> bytes:
        return send_sysrq(self.connection, monitor, self.console, letter)

    def refused(self, kind: type[ConsoleError], call: Any, *arguments: Any) -> str:
        with self.assertRaises(kind) as caught:
            call(*arguments)
        self.assertTrue(str(caught.exception).isprintable())
        return str(caught.exception)


class BreakTests(GuestCase):
    """BREAK."""

    def test_break(self) -> None:
        """It goes to the chardev of the console through QEMU's monitor."""
        self.send_break(FakeMonitor())
        self.assertEqual(
            self.domain.commands,
            [{"execute": "chardev-send-break", "arguments": {"id": "charserial0"}}],
        )

    def test_alias(self) -> None:
        """The chardev is that of the alias which the user gave the device."""
        self.domain.xml = self.domain.xml.replace("serial0", "ua-com")
        self.send_break(FakeMonitor())
        self.assertEqual(self.domain.commands[0]["arguments"], {"id": "charua-com"})

    def test_not_allowed(self) -> None:
        """Where it is not allowed the setting is named, and the host is not asked."""
        self.daemon.call_error = LibvirtError("must not be called")
        self.assertEqual(
            self.refused(ConsoleUnavailable, self.send_break, None),
            "BREAK is not allowed here: set console.break in the proxy's configuration.",
        )

    def test_no_serial_port(self) -> None:
        """A console that would swallow it is told, and gets none."""
        self.domain.xml = live(VIRTIO, KEYBOARD)
        self.assertEqual(
            self.refused(ConsoleUnavailable, self.send_break, FakeMonitor()),
            "The console of vm\\x1b takes no BREAK: it is no serial port (target type='virtio').",
        )
        self.assertEqual(self.domain.commands, [])

    def test_qemu_refuses(self) -> None:
        """QEMU's error, which comes as an answer, is told."""
        self.domain.answer = (
            '{"id": "libvirt-12", "error": '
            '{"class": "GenericError", "desc": "Chardev \\u001b not found"}}'
        )
        self.assertEqual(
            self.refused(ConsoleUnavailable, self.send_break, FakeMonitor()),
            "BREAK cannot be sent to vm\\x1b: QEMU says: Chardev \\x1b not found.",
        )

    def test_shut_off(self) -> None:
        """A VM that is off, or goes off meanwhile, is told as such, whatever devices it lacks."""
        said = "vm\\x1b is shut off. Start it, then connect again."
        self.domain.state = (SHUT_OFF, 1)
        for xml in (
            self.domain.xml,
            "<domain><devices><console><target type='virtio'/></console></devices></domain>",
        ):
            self.domain.xml = xml
            for call in (self.send_break, self.send_sysrq):
                self.assertEqual(self.refused(ConsoleUnavailable, call, FakeMonitor()), said)

    def test_no_console(self) -> None:
        """A VM without the console is told what it lacks."""
        self.domain.xml = live(KEYBOARD)
        self.assertEqual(
            self.refused(ConsoleUnavailable, self.send_break, FakeMonitor()),
            "vm\\x1b has no console device: add <console type='pty'/> to its XML.",
        )

    def test_errors(self) -> None:
        """What libvirt says is told, with who said it."""
        for error, kind, words in (
            (
                LibvirtError("access denied: 'domain' denied", 88),
                ConsoleUnavailable,
                "BREAK cannot be sent to vm\\x1b: access denied: 'domain' denied.",
            ),
            (
                LibvirtError("Cannot write data: Broken pipe", 38, 7),
                HostUnreachable,
                "The connection to node1\\x1b was lost: Cannot write data: Broken pipe.",
            ),
            (
                LibvirtError("Domain not found", 42),
                ConsoleUnavailable,
                "node1\\x1b does not know vm\\x1b [1] any more; it may have moved: try again.",
            ),
        ):
            self.daemon.call_error = error
            self.assertEqual(self.refused(kind, self.send_break, FakeMonitor()), words)

    def test_mistakes_pass(self) -> None:
        """What libvirt did not say is not taken for its word."""
        self.domain.xml = "<domain"
        self.assertRaises(ElementTree.ParseError, self.send_break, FakeMonitor())
        self.connection.lookupByUUIDString = lambda id: 1 // 0
        self.assertRaises(ZeroDivisionError, self.send_break, FakeMonitor())

    def test_error_holds_nothing(self) -> None:
        """An error carries no frame that would keep a domain, and so the connection, alive."""

        def fail(_domain: FakeDomainObject) -> str:
            raise LibvirtError("broken")

        self.patch(FakeDomainObject, "XMLDesc", fail)
        with self.assertRaises(ConsoleUnavailable) as caught:
            self.send_break(FakeMonitor())
        for error in (caught.exception, caught.exception.__context__):
            names = [frame.name for frame in traceback.extract_tb(error and error.__traceback__)]
            self.assertNotIn("fail", names)
            self.assertNotIn("<lambda>", names)


class SysRqTests(GuestCase):
    """SysRq."""

    def test_by_break(self) -> None:
        """On a serial port where BREAK is allowed it is BREAK, and a letter to be typed."""
        self.assertEqual(self.send_sysrq(FakeMonitor()), b"h")
        self.assertEqual([c["execute"] for c in self.domain.commands], ["chardev-send-break"])
        self.assertEqual(self.domain.keys, [])

    def test_by_the_keyboard(self) -> None:
        """Else Alt, SysRq and the letter are held on the keyboard, and nothing is to be typed."""
        self.assertEqual(self.send_sysrq(None), b"")
        self.domain.xml = live(VIRTIO, KEYBOARD)
        self.assertEqual(self.send_sysrq(FakeMonitor(), "b"), b"")
        self.assertEqual(self.domain.keys, [(100, [56, 99, 35]), (100, [56, 99, 48])])
        self.assertEqual(self.domain.commands, [])

    def test_keys(self) -> None:
        """Every letter and digit is the key that Linux calls so (input-event-codes.h)."""
        codes = {}
        for letter in string.ascii_lowercase + string.digits:
            self.send_sysrq(None, letter)
            codes[letter] = self.domain.keys[-1][1][2]
        self.assertEqual(len(set(codes.values())), 36)
        for letter, code in (
            *(("1", 2), ("9", 10), ("0", 11), ("q", 16), ("p", 25)),
            *(("a", 30), ("l", 38), ("z", 44), ("m", 50), ("s", 31), ("u", 22), ("t", 20)),
        ):
            self.assertEqual(codes[letter], code, letter)

    def test_other_letters(self) -> None:
        """Nothing else is sent, and it is shown harmlessly."""
        for letter, shown in (("", "''"), ("H", "'H'"), ("hh", "'hh'"), ("\x1b", "'\\x1b'")):
            self.assertEqual(
                self.refused(ConsoleUnavailable, self.send_sysrq, FakeMonitor(), letter),
                f"SysRq takes a letter from a to z or a digit, not {shown}.",
            )
        self.assertEqual((self.domain.commands, self.domain.keys), ([], []))

    def test_neither(self) -> None:
        """When neither can be done it is told which setting or device is missing."""
        add = "add <input type='keyboard' bus='usb'/> to its XML"
        self.domain.xml = live(SERIAL)
        self.assertEqual(
            self.refused(ConsoleUnavailable, self.send_sysrq, None),
            f"vm\\x1b has no keyboard, and BREAK is not allowed: {add}, or set console.break in "
            "the proxy's configuration.",
        )
        self.domain.xml = live(VIRTIO)
        for monitor in (None, FakeMonitor()):
            self.assertEqual(
                self.refused(ConsoleUnavailable, self.send_sysrq, monitor),
                "vm\\x1b has no keyboard, and its console takes no BREAK, as it is no serial port "
                f"(target type='virtio'): {add}.",
            )
        self.assertEqual((self.domain.commands, self.domain.keys), ([], []))

    def test_break_fails(self) -> None:
        """When BREAK fails there is no letter to be typed."""
        self.domain.answer = '{"error":{"class":"GenericError","desc":"no"}}'
        self.assertIn("no.", self.refused(ConsoleUnavailable, self.send_sysrq, FakeMonitor()))

    def test_keyboard_fails(self) -> None:
        """What libvirt says of the keyboard is told."""

        def fail(*_: object) -> int:
            raise LibvirtError("Timed out: cannot acquire state change lock", 68)

        self.patch(FakeDomainObject, "sendKey", fail)
        self.assertEqual(
            self.refused(ConsoleUnavailable, self.send_sysrq, None),
            "SysRq cannot be sent to vm\\x1b: Timed out: cannot acquire state change lock.",
        )
