"""BREAK and SysRq: what they need, how they go, and what is told when they cannot; what a host
tells of its guests."""

from __future__ import annotations

import string
import traceback
from typing import Any
from xml.etree import ElementTree

from twisted.internet.protocol import Factory, Protocol
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from tests.fakes_libvirt import (
    PAUSED,
    RUNNING,
    SHUT_OFF,
    FakeConnection,
    FakeDaemon,
    FakeDomainObject,
    FakeMonitor,
    FakeReactor,
    LibvirtError,
    Site,
)
from vmconsole.errors import ConsoleError, ConsoleUnavailable, HostUnreachable
from vmconsole.hypervisor.libvirt_guest import Devices, guest_devices, send_break, send_sysrq
from vmconsole.hypervisor.libvirt_host import Host
from vmconsole.interfaces import ConsoleInfo, GuestNews, IGuestObserver

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


RUNS = GuestNews(True)


@implementer(IGuestObserver)
class Observer:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, GuestNews]] = []

    def guest_changed(self, vm_id: str, news: GuestNews) -> None:
        self.told.append((vm_id, news))

    def take(self) -> list[tuple[str, GuestNews]]:
        told, self.told = self.told, []
        return told


class NewsTests(SynchronousTestCase):
    """What the hosts tell of guests, when there is nobody who watches their domains."""

    def setUp(self) -> None:
        self.site = Site()
        self.daemon = self.site.daemon
        self.daemon.add("1", "a")
        self.observer = Observer()
        verifyObject(IGuestObserver, self.observer)
        self.site.hosts.guest_observer = self.observer
        self.addCleanup(self.check_leaks)

    def check_leaks(self) -> None:
        self.site.stop()
        self.assertEqual((self.daemon.leaked, self.daemon.connections), ([], []))

    def open(self, vm_id: str = "1") -> Any:
        """The protocol on an open console."""
        info = ConsoleInfo(vm_id=vm_id, vm_name="a", host="node1")
        endpoint: Any = self.site.hosts.console_endpoint(info)
        connecting = endpoint.connect(Factory.forProtocol(Protocol))
        self.site.settle()
        return self.successResultOf(connecting)

    def tell(self, event: int, detail: int, vm_id: str = "1") -> None:
        """The host tells of an event."""
        self.daemon.tell(vm_id, event=event, detail=detail)
        self.site.settle()

    @property
    def host(self) -> Host:
        """The one that is in use."""
        return self.site.hosts._hosts["node1"]

    def test_paused_and_running(self) -> None:
        """A guest that is paused, and why; one that runs again, one that was started, or arrived;
        of its other events nothing is told, nor that it has moved away."""
        self.open()
        for event, told in (
            ((3, 0), GuestNews(False, "is paused")),
            ((3, 2), GuestNews(False, "is paused by an I/O error on its host")),
            ((3, 3), GuestNews(False, "is paused by its watchdog")),
            ((4, 0), RUNS),
            ((4, 1), RUNS),
            ((2, 0), RUNS),
            ((2, 1), RUNS),
            ((3, 1), None),
            ((3, 4), None),
            ((3, 99), None),
            ((5, 0), None),
            ((5, 3), None),
            ((0, 0), None),
            ((1, 0), None),
            ((7, 0), None),
            ((99, 0), None),
        ):
            self.tell(*event)
            self.assertEqual(self.observer.take(), [("1", told)] if told else [], event)

    def test_any_guest(self) -> None:
        """So it is told of guests whose consoles nobody has open, on a host that is in use; the
        host is not asked about them."""
        protocol = self.open()
        threads = self.site.threads[0]
        calls: list[None] = []
        threads.on_call = lambda: calls.append(None)
        self.tell(2, 0, "7")
        self.assertEqual(self.observer.take(), [("7", RUNS)])
        self.assertEqual(calls, [])
        # Nor are they noted for later: nobody would ever take them.
        control: Any = self.host._control
        self.assertEqual(control._stale, {})
        threads.on_call = lambda: None
        protocol.transport.loseConnection()
        self.site.settle(121)
        self.tell(2, 0, "7")
        self.assertEqual((self.observer.take(), self.daemon.connections), ([], []))

    def test_watched(self) -> None:
        """So it is when the host's domains are watched, and when its connection was lost; those
        that run already when they are listed may have started while nobody listened."""
        self.daemon.add("2", "b", state=(SHUT_OFF, 1))
        self.daemon.add("3", "c", state=(PAUSED, 1))
        self.site.hosts.watch("node1", "")
        self.site.settle()
        self.assertEqual(self.observer.take(), [("1", RUNS)])
        self.tell(2, 0)
        self.assertEqual(self.observer.take(), [("1", RUNS)])
        self.daemon.drop()
        self.daemon.domains["2"].state = (RUNNING, 1)
        self.site.settle(5)
        self.assertEqual(self.observer.take(), [("1", RUNS), ("2", RUNS)])
        self.tell(4, 0)
        self.assertEqual(self.observer.take(), [("1", RUNS)])

    def test_nobody_to_tell(self) -> None:
        """With nobody to tell it is remembered all the same."""
        self.site.hosts.guest_observer = None
        self.open()
        self.tell(3, 0)
        self.assertEqual(self.host.last_events, {"1": (3, 0)})

    def test_remembered(self) -> None:
        """Of each domain the last event is kept, of the 1000 newest ones; a start counts only
        behind a stop."""
        self.open()
        for number in range(1002):
            self.daemon.tell(str(number), event=3, detail=2)
        self.site.settle()
        self.assertEqual(list(self.host.last_events), [str(each) for each in range(2, 1002)])
        self.tell(4, 0, "2")
        self.tell(4, 0, "new")
        self.assertEqual(len(self.host.last_events), 1000)
        self.assertEqual(list(self.host.last_events)[-2:], ["2", "new"])
        self.assertNotIn("3", self.host.last_events)
        for events, last in (
            (((4, 0),), (4, 0)),
            (((3, 0), (2, 0)), (3, 0)),
            (((5, 1), (2, 0)), (2, 0)),
            (((4, 0), (5, 1)), (5, 1)),
        ):
            for event in events:
                self.tell(*event, "2")
            self.assertEqual(self.host.last_events["2"], last, events)
        self.tell(2, 0, "unheard of")
        self.assertNotEqual(self.host.last_events["unheard of"], (2, 0))

    def test_forgotten(self) -> None:
        """When its console is opened, what was told of a domain before counts no more; what was
        told of others does."""
        self.open()
        self.daemon.add("2", "b")
        self.tell(5, 1, "2")
        self.tell(5, 1, "3")
        self.open("2")
        self.assertEqual(self.host.last_events, {"3": (5, 1)})

    def test_not_opened(self) -> None:
        """A console that cannot be opened makes nothing forgotten."""
        self.open()
        self.daemon.add("2", "b", state=(SHUT_OFF, 1))
        self.tell(5, 1, "2")
        info = ConsoleInfo(vm_id="2", vm_name="b", host="node1")
        endpoint: Any = self.site.hosts.console_endpoint(info)
        connecting = endpoint.connect(Factory.forProtocol(Protocol))
        self.site.settle()
        self.failureResultOf(connecting, ConsoleError)
        self.assertEqual(self.host.last_events, {"2": (5, 1)})
