"""A console's stream: opening, draining, pacing, and every way in which it ends."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.address import IPv4Address
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone, NoProtocol
from twisted.internet.interfaces import (
    IAddress,
    IConsumer,
    IPushProducer,
    IStreamClientEndpoint,
    ITransport,
)
from twisted.internet.protocol import Factory, Protocol
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from tests import lab
from tests.fakes_libvirt import (
    CRASHED,
    PAUSED,
    RUNNING,
    SHUT_OFF,
    FakeConnection,
    FakeStream,
    LibvirtError,
    Site,
)
from vmconsole.errors import (
    ConsoleBusy,
    ConsoleError,
    ConsoleGone,
    ConsoleTaken,
    ConsoleUnavailable,
    GuestGone,
    GuestMoved,
    GuestStopped,
    HostLost,
    HostUnreachable,
    InputLost,
)
from vmconsole.hypervisor.libvirt_eventloop import LibvirtEventLoop
from vmconsole.hypervisor.libvirt_host import HostPool
from vmconsole.hypervisor.libvirt_stream import ConsoleAddress, ConsoleStream
from vmconsole.hypervisor.pacing import Credit
from vmconsole.interfaces import ConsoleInfo, IConsoleTransport

KIB = 1024


class Keeper(Protocol):
    """Keeps what it gets."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.reasons: list[Failure] = []

    def dataReceived(self, data: bytes) -> None:
        self.received.append(data)

    def connectionLost(self, reason: Failure = None) -> None:  # type: ignore[assignment]
        self.reasons.append(reason)


@implementer(IPushProducer)
class Producer:
    """Notes how it is steered."""

    def __init__(self) -> None:
        self.steered: list[str] = []

    def pauseProducing(self) -> None:
        self.steered.append("pause")

    def resumeProducing(self) -> None:
        self.steered.append("resume")

    def stopProducing(self) -> None:
        self.steered.append("stop")


class ConsoleCase(SynchronousTestCase):
    """One VM, named vm, on node1; at the end nothing of it may be left on the host."""

    may_force = False

    def setUp(self) -> None:
        self.site = Site(may_force=self.may_force)
        self.daemon = self.site.daemon
        self.domain = self.daemon.add("1", "vm")
        self.addCleanup(self.check_leaks)

    def check_leaks(self) -> None:
        for threads in self.site.threads:
            threads.release()
        self.site.stop()
        self.site.settle(1)
        self.assertEqual(self.daemon.leaked, [])
        self.assertEqual(self.daemon.connections, [])
        self.assertEqual([call.func for call in self.site.reactor.getDelayedCalls()], [])

    @property
    def threads(self) -> Any:
        return self.site.threads[0]

    def start(self, force: bool = False, **info: Any) -> Deferred[Any]:
        console = ConsoleInfo(**{"vm_id": "1", "vm_name": "vm\x1b", "host": "node1", **info})
        endpoint: Any = self.site.hosts.console_endpoint(console, force)
        verifyObject(IStreamClientEndpoint, endpoint)
        connecting: Deferred[Any] = endpoint.connect(Factory.forProtocol(Keeper))
        return connecting

    def open(self, **info: Any) -> Keeper:
        connecting = self.start(**info)
        self.site.settle()
        protocol: Keeper = self.successResultOf(connecting)
        return protocol

    def stream(self) -> FakeStream:
        assert self.domain.stream is not None
        return self.domain.stream

    def connection(self) -> FakeConnection:
        """The console's own."""
        return next(c for c in self.daemon.connections if c.streams)

    def refused(self, kind: type[ConsoleError], seconds: float = 0.0) -> str:
        connecting = self.start()
        self.site.settle(seconds)
        text: str = self.failureResultOf(connecting, kind).getErrorMessage()
        return text

    def ending(
        self, protocol: Keeper, kind: type[ConsoleGone] = ConsoleGone, seconds: float = 2.0
    ) -> str:
        self.site.settle(seconds)
        (reason,) = protocol.reasons
        self.assertIs(reason.type, kind)
        return str(reason.value)


class OpenTests(ConsoleCase):
    """The way to a console."""

    def test_open(self) -> None:
        """A console is opened on a connection of its own, beside the control connection."""
        protocol = self.open()
        self.assertEqual(len(self.daemon.connections), 2)
        self.assertIsNone(self.stream().alias)
        self.assertIsInstance(protocol.transport, ConsoleStream)
        for interface in (IConsoleTransport, ITransport, IConsumer):
            verifyObject(interface, protocol.transport)

    def test_alias(self) -> None:
        """A console that is not the default is opened by its alias."""
        self.open(console="console1")
        self.assertEqual(self.stream().alias, "console1")

    def test_address(self) -> None:
        """Both ends tell which console it is."""
        protocol = self.open()
        peer = protocol.transport.getPeer()
        self.assertEqual(peer, ConsoleAddress("node1", "1", "vm\x1b"))
        self.assertEqual(protocol.transport.getHost(), peer)
        self.assertNotEqual(peer, IPv4Address("TCP", "127.0.0.1", 1))
        verifyObject(IAddress, peer)

    def test_control_is_shared(self) -> None:
        """Two consoles on one host have one control connection."""
        self.daemon.add("2", "other")
        self.open()
        self.open(vm_id="2")
        self.assertEqual(len(self.daemon.connections), 3)

    def test_errors(self) -> None:
        """What libvirt says becomes a sentence for the user, whatever the names have in them."""
        for error, kind, words in (
            (
                LibvirtError("Requested operation is not valid: domain is not running", 55),
                ConsoleUnavailable,
                "vm\\x1b is shut off. Start it, then connect again.",
            ),
            (
                LibvirtError("internal error: cannot find character device <null>", 1),
                ConsoleUnavailable,
                "vm\\x1b has no console device: add <console type='pty'/> to its XML.",
            ),
            (
                LibvirtError("internal error: character device console0 is not using a PTY", 1),
                ConsoleUnavailable,
                "The console of vm\\x1b is not a pty, which libvirt cannot open: use "
                "<console type='pty'/> in its XML.",
            ),
            (
                LibvirtError("this function is not supported by the connection driver", 3),
                ConsoleUnavailable,
                "The hypervisor of node1 has no consoles that can be opened: this function is not "
                "supported by the connection driver.",
            ),
            (
                LibvirtError("Cannot write data: Broken pipe", 38, 7),
                HostUnreachable,
                "The connection to node1 was lost: Cannot write data: Broken pipe.",
            ),
            (
                LibvirtError("internal error: on\x1b fire", 1),
                ConsoleUnavailable,
                "The console of vm\\x1b on node1 cannot be opened: internal error: on\\x1b fire.",
            ),
        ):
            self.domain.open_error = error
            self.assertEqual(self.refused(kind), words)
            self.assertEqual(len(self.daemon.connections), 1)

    def test_unknown(self) -> None:
        """A VM that the host does not know, or whose id is none, may have moved."""
        del self.daemon.domains["1"]
        self.assertEqual(
            self.refused(ConsoleUnavailable),
            "node1 does not know vm\\x1b [1] any more; it may have moved: try again.",
        )

    def test_busy(self) -> None:
        """A console that another program has is told as busy, after short patience."""
        self.domain.open_error = LibvirtError(
            "operation failed: Active console session exists for this domain", 9
        )
        connecting = self.start()
        self.site.settle(0.4)
        self.assertNoResult(connecting)
        self.site.settle(0.4)
        self.assertEqual(
            self.failureResultOf(connecting, ConsoleBusy).getErrorMessage(),
            "The console of vm\\x1b is in use by another program on node1 (virsh console, "
            "perhaps); ask its user to leave, then try again.",
        )

    def test_locked(self) -> None:
        """After a restart of libvirtd the console is locked for a moment: that is waited out."""
        self.domain.open_error = LibvirtError(
            "operation failed: Requested device '/dev/pts/1' is locked by lock file", 9
        )
        connecting = self.start()
        self.site.settle(1.5)
        self.assertNoResult(connecting)
        self.domain.open_error = None
        self.site.settle(0.3)
        self.successResultOf(connecting)

    def test_locked_for_good(self) -> None:
        """A lock that stays makes the console busy, after 2 s."""
        self.domain.open_error = LibvirtError(
            "operation failed: Requested device '/dev/pts/1' is locked by lock file", 9
        )
        self.assertIn("locked by another program", self.refused(ConsoleBusy, 2.3))

    def test_no_connection(self) -> None:
        """A host that refuses the connection is told as libvirt tells it."""
        self.daemon.open_error = LibvirtError("unable to connect to server at 'node1'", 38, 7)
        self.assertIn("Cannot connect to node1", self.refused(HostUnreachable))

    def test_no_answer(self) -> None:
        """After 10 s without an answer the caller is told; what comes late is closed."""
        connecting = self.start()
        self.threads.held = True
        self.site.settle(9.9)
        self.assertNoResult(connecting)
        self.site.settle(0.2)
        self.assertIn(
            "no answer within 10 s",
            self.failureResultOf(connecting, HostUnreachable).getErrorMessage(),
        )
        self.threads.release()
        self.site.settle()
        self.assertIsNone(self.domain.stream)

    def test_cancel_while_opening(self) -> None:
        """connect may be cancelled; the console that comes late is left again."""
        connecting = self.start()
        self.threads.slow = True
        self.site.settle()
        connecting.cancel()
        self.failureResultOf(connecting, CancelledError)
        self.threads.release()
        self.site.settle()
        self.assertEqual(self.daemon.opened, 2)
        self.assertIsNone(self.domain.stream)
        self.open()

    def test_cancel_while_waiting(self) -> None:
        """connect may be cancelled while it waits for a console that is busy."""
        self.domain.open_error = LibvirtError("Active console session exists", 9)
        connecting = self.start()
        self.site.settle(0.1)
        connecting.cancel()
        self.failureResultOf(connecting, CancelledError)
        opened = self.daemon.opened
        self.site.settle(5)
        self.assertEqual(self.daemon.opened, opened)

    def test_cancel_while_leaving(self) -> None:
        """connect may be cancelled while it waits for our own leaving; nothing is opened."""
        protocol = self.open()
        self.threads.held = True
        protocol.transport.loseConnection()
        self.site.settle()
        opened = self.daemon.opened
        connecting = self.start()
        self.site.settle(0.1)
        connecting.cancel()
        self.failureResultOf(connecting, CancelledError)
        self.threads.release()
        self.site.settle(6)
        self.assertEqual(self.daemon.opened, opened)

    def test_failing_factory(self) -> None:
        """A factory that fails, or refuses, gets its error back, and the console is left."""

        class Failing(Factory):
            def buildProtocol(self, addr: object) -> None:
                raise ZeroDivisionError

        class Refusing(Factory):
            def buildProtocol(self, addr: object) -> None:
                return None

        info = ConsoleInfo(vm_id="1", vm_name="vm", host="node1")
        for factory, kind in ((Failing(), ZeroDivisionError), (Refusing(), NoProtocol)):
            connecting = self.site.hosts.console_endpoint(info).connect(factory)
            self.site.settle()
            self.failureResultOf(connecting, kind)
            self.assertIsNone(self.domain.stream)

    def test_failing_connection_made(self) -> None:
        """A protocol that fails at once gets no console."""

        class Failing(Protocol):
            def connectionMade(self) -> None:
                raise ZeroDivisionError

        info = ConsoleInfo(vm_id="1", vm_name="vm", host="node1")
        endpoint = self.site.hosts.console_endpoint(info)
        connecting = endpoint.connect(Factory.forProtocol(Failing))
        self.site.settle()
        self.failureResultOf(connecting, ZeroDivisionError)
        self.assertIsNone(self.domain.stream)

    def test_leaving_at_once(self) -> None:
        """A protocol may leave in connectionMade."""

        class Leaving(Keeper):
            def connectionMade(self) -> None:
                self.transport.loseConnection()

        info = ConsoleInfo(vm_id="1", vm_name="vm", host="node1")
        endpoint = self.site.hosts.console_endpoint(info)
        connecting = endpoint.connect(Factory.forProtocol(Leaving))
        self.site.settle()
        (reason,) = self.successResultOf(connecting).reasons
        reason.trap(ConnectionDone)
        self.assertIsNone(self.domain.stream)
        self.assertEqual(self.site.hosts._hosts["node1"]._streams, set())

    def test_stop_while_opening(self) -> None:
        """Who is connecting when the service stops is told."""
        connecting = self.start()
        self.threads.held = True
        self.site.settle()
        self.site.stop()
        self.failureResultOf(connecting, HostUnreachable)


class ForceTests(ConsoleCase):
    """Taking a console from another program on the host."""

    may_force = True

    def setUp(self) -> None:
        super().setUp()
        self.virsh = FakeConnection(self.daemon)
        self.addCleanup(self.daemon.connections.remove, self.virsh)

    def take(self) -> FakeStream:
        """Another program opens it, by force."""
        stream = self.virsh.newStream(0)
        force = self.site.libvirt.VIR_DOMAIN_CONSOLE_FORCE
        self.virsh.lookupByUUIDString("1").openConsole(None, stream, force)
        return stream

    def test_force(self) -> None:
        """By force the console is had at once, and the other program's stream breaks."""
        theirs = self.take()
        connecting = self.start(force=True)
        self.site.settle()
        self.successResultOf(connecting)
        self.assertIsNot(self.stream(), theirs)
        self.assertRaises(LibvirtError, theirs.recv, 1)

    def test_without_force(self) -> None:
        """Without it the other program keeps the console, also where force is allowed."""
        theirs = self.take()
        self.assertIn("in use by another program", self.refused(ConsoleBusy, 0.8))
        self.assertIs(self.stream(), theirs)

    def test_free(self) -> None:
        """A console that nobody has may be forced as well."""
        connecting = self.start(force=True)
        self.site.settle()
        self.successResultOf(connecting)

    def test_not_allowed(self) -> None:
        """Where it is not allowed the setting is named, and the host is not asked."""
        site = Site()
        info = ConsoleInfo(vm_id="1", vm_name="vm", host="node1")
        connecting: Any = site.hosts.console_endpoint(info, True).connect(Factory())
        self.assertEqual(
            self.failureResultOf(connecting, ConsoleUnavailable).getErrorMessage(),
            "Consoles may not be taken from other programs by force: set console.force in the "
            "proxy's configuration.",
        )
        self.assertEqual(site.threads, [])

    def test_locked(self) -> None:
        """Force does not help against libvirtd's lock after its restart: that is waited out."""
        self.domain.open_error = LibvirtError(
            "operation failed: Requested device '/dev/pts/1' is locked by lock file", 9
        )
        connecting = self.start(force=True)
        self.site.settle(0.5)
        self.assertNoResult(connecting)
        self.domain.open_error = None
        theirs = self.take()
        self.site.settle(0.3)
        self.successResultOf(connecting)
        self.assertIsNot(self.stream(), theirs)

    def test_never_back(self) -> None:
        """Whoever takes it back by force keeps it: the endpoint's next connect is not forced."""
        info = ConsoleInfo(vm_id="1", vm_name="vm", host="node1")
        endpoint: Any = self.site.hosts.console_endpoint(info, True)
        self.take()
        connecting = endpoint.connect(Factory.forProtocol(Keeper))
        self.site.settle()
        protocol = self.successResultOf(connecting)
        theirs = self.take()
        self.assertIn("by force", self.ending(protocol, ConsoleTaken))
        again = endpoint.connect(Factory.forProtocol(Keeper))
        self.site.settle(3)
        self.failureResultOf(again, ConsoleBusy)
        self.assertIs(self.stream(), theirs)
        theirs.abort()
        again = endpoint.connect(Factory.forProtocol(Keeper))
        self.site.settle()
        self.successResultOf(again)

    def test_force_that_failed(self) -> None:
        """A connect that failed has not used the force up."""
        info = ConsoleInfo(vm_id="1", vm_name="vm", host="node1")
        endpoint: Any = self.site.hosts.console_endpoint(info, True)
        self.domain.open_error = LibvirtError("out of order")
        connecting = endpoint.connect(Factory.forProtocol(Keeper))
        self.site.settle()
        self.failureResultOf(connecting, ConsoleUnavailable)
        self.domain.open_error = None
        self.take()
        connecting = endpoint.connect(Factory.forProtocol(Keeper))
        self.site.settle()
        self.successResultOf(connecting)


class OutputTests(ConsoleCase):
    """What the guest prints."""

    def test_burst(self) -> None:
        """All that is there is handed over at once."""
        protocol = self.open()
        self.stream().put(b"a", b"b", b"c")
        self.site.settle()
        self.assertEqual(protocol.received, [b"abc"])

    def test_before_the_protocol(self) -> None:
        """What was printed before the protocol was there is not lost."""
        connecting = self.start()
        self.threads.held = True
        self.site.settle()
        while not self.domain.stream:
            self.threads.release(1)
        self.stream().put(b"early")
        self.threads.release()
        self.site.settle()
        self.assertEqual(self.successResultOf(connecting).received, [b"early"])

    def test_flood(self) -> None:
        """A flood is taken in bursts of 256 KiB, a turn of the reactor each, in order."""
        protocol = self.open()
        flood = bytes(range(256)) * 8 * KIB
        turns: list[float] = []
        receive = protocol.dataReceived

        def received(data: bytes) -> None:
            turns.append(self.site.reactor.seconds())
            receive(data)

        protocol.dataReceived = received  # type: ignore[method-assign]
        self.stream().put(flood)
        self.site.settle()
        self.assertEqual(b"".join(protocol.received), flood)
        self.assertEqual({len(data) for data in protocol.received}, {256 * KIB})
        self.assertEqual(len(set(turns)), 8)

    def test_drained_while_input_waits(self) -> None:
        """Output is taken also while the guest takes no input."""
        protocol = self.open()
        self.threads.held = True
        protocol.transport.write(bytes(100 * KIB))
        self.stream().put(b"still here")
        self.site.settle()
        self.assertEqual(protocol.received, [b"still here"])

    def test_failing_protocol(self) -> None:
        """A protocol's mistake is logged, and ends its console with that reason."""
        protocol = self.open()
        protocol.dataReceived = lambda data: 1 // 0  # type: ignore[method-assign, assignment, return-value]
        self.stream().put(b"x")
        self.site.settle()
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        (reason,) = protocol.reasons
        reason.trap(ZeroDivisionError)
        self.assertIsNone(self.domain.stream)


class InputTests(ConsoleCase):
    """What is typed."""

    def test_keystroke(self) -> None:
        """A keystroke on a quiet console goes out at once, without a thread."""
        protocol = self.open()
        calls: list[None] = []
        self.threads.on_call = lambda: calls.append(None)
        protocol.transport.write(b"x")
        self.assertEqual(self.domain.typed, b"x")
        self.assertEqual(calls, [])

    def test_order(self) -> None:
        """Everything arrives in order, however it was cut."""
        protocol = self.open()
        data = bytes(range(256)) * 100
        protocol.transport.write(data[:5000])
        protocol.transport.writeSequence([data[5000:5001], data[5001:]])
        protocol.transport.write(b"")
        self.site.settle()
        self.assertEqual(self.domain.typed, data)
        self.assertEqual(protocol.transport.unsent, 0)

    def test_stuck(self) -> None:
        """Without an answer no more than 4 KiB go out, in pieces of 1 KiB, with one question."""
        protocol = self.open()
        self.threads.held = True
        protocol.transport.write(bytes(100 * KIB))
        self.site.settle(5)
        self.assertEqual(len(self.domain.typed), 4 * KIB)
        self.assertEqual(len(self.threads.waiting), 1)
        self.assertEqual(protocol.transport.unsent, 100 * KIB)
        self.threads.release(1)
        self.site.settle()
        self.assertEqual(len(self.domain.typed), 8 * KIB)
        self.assertEqual(protocol.transport.unsent, 96 * KIB)

    def test_confirm(self) -> None:
        """The host is asked about a single key when somebody wants to know, once, and also when an
        older question is still out; otherwise it is not."""
        protocol = self.open()
        protocol.transport.write(b"x")
        self.site.settle()
        self.assertEqual(protocol.transport.unsent, 1)
        protocol.transport.confirm()
        self.site.settle()
        self.assertEqual(protocol.transport.unsent, 0)
        self.threads.held = True
        protocol.transport.write(bytes(KIB))
        protocol.transport.write(b"y")
        protocol.transport.confirm()
        self.threads.release(1)
        self.site.settle()
        self.assertEqual(len(self.threads.waiting), 1)
        self.threads.release()
        self.site.settle()
        self.assertEqual(protocol.transport.unsent, 0)
        protocol.transport.write(b"z")
        self.site.settle()
        self.assertEqual(protocol.transport.unsent, 1)
        protocol.transport.confirm()
        protocol.transport.loseConnection()
        protocol.transport.confirm()

    def test_single_bytes_to_a_stuck_guest(self) -> None:
        """Messages are counted as well as bytes: 64 past the last answer; later ones join up."""
        protocol = self.open()
        self.threads.held = True
        sizes: list[int] = []
        stream = self.stream()
        send = stream.send
        stream.send = lambda data: (sizes.append(len(data)), send(data))[1]  # type: ignore[method-assign, func-returns-value]
        for _ in range(1000):
            protocol.transport.write(b"x")
        self.site.settle()
        self.assertEqual(sizes, [1] * 64)
        self.threads.release()
        self.site.settle()
        self.assertEqual(sizes, [1] * 64 + [936])

    def test_nothing_while_asking(self) -> None:
        """While the host is asked nothing is sent: libvirt could block the reactor's thread."""
        protocol = self.open()
        self.threads.held = True
        protocol.transport.write(b"x")
        self.site.settle(1.5)
        self.assertEqual(len(self.threads.waiting), 1)
        protocol.transport.write(b"y")
        self.site.settle()
        self.assertEqual(self.domain.typed, b"x")
        self.threads.release(1)
        self.site.settle()
        self.assertEqual(self.domain.typed, b"xy")

    def test_no_room(self) -> None:
        """What libvirt does not take is kept, and sent when there is room; nothing twice."""
        protocol = self.open()
        self.domain.sends = [3, -2]
        protocol.transport.write(b"abcdef")
        self.assertEqual(self.domain.typed, b"abc")
        protocol.transport.write(b"ghi")
        self.assertEqual(self.domain.typed, b"abc")
        self.site.settle()
        self.assertEqual(self.domain.typed, b"abcdefghi")
        self.domain.sends = [0, 0, 1]
        protocol.transport.write(b"jkl")
        self.site.settle()
        self.assertEqual(self.domain.typed, b"abcdefghijkl")
        self.assertFalse(self.stream().events & self.site.libvirt.VIR_STREAM_EVENT_WRITABLE)

    def test_producer(self) -> None:
        """A producer is paused above 16 KiB that wait, and resumed below 4 KiB."""
        protocol = self.open()
        producer = Producer()
        protocol.transport.registerProducer(producer, True)
        self.threads.held = True
        protocol.transport.write(bytes(20 * KIB))
        self.assertEqual(producer.steered, [])
        protocol.transport.write(b"x")
        self.assertEqual(producer.steered, ["pause"])
        while len(self.domain.typed) <= 16 * KIB:
            self.assertEqual(producer.steered, ["pause"])
            self.threads.release(1)
            self.site.settle()
        self.threads.release(1)
        self.site.settle()
        self.assertEqual(producer.steered, ["pause", "resume"])

    def test_producer_on_a_full_console(self) -> None:
        """A producer that comes when too much waits is paused at once; one that went is left."""
        protocol = self.open()
        self.threads.held = True
        protocol.transport.write(bytes(30 * KIB))
        producer = Producer()
        protocol.transport.registerProducer(producer, True)
        self.assertEqual(producer.steered, ["pause"])
        protocol.transport.unregisterProducer()
        self.threads.release()
        self.site.settle()
        self.assertEqual(producer.steered, ["pause"])

    def test_producers_refused(self) -> None:
        """Pull producers, and a second one, are refused; after the end one is told to stop."""
        protocol = self.open()
        self.assertRaises(ValueError, protocol.transport.registerProducer, Producer(), False)
        producer, late = Producer(), Producer()
        protocol.transport.registerProducer(producer, True)
        self.assertRaises(RuntimeError, protocol.transport.registerProducer, late, True)
        protocol.transport.loseConnection()
        self.assertEqual(producer.steered, ["stop"])
        protocol.transport.registerProducer(late, True)
        self.assertEqual(late.steered, ["stop"])

    def test_confirmed_soon(self) -> None:
        """Within a second the host is asked by itself whether it took a single key."""
        protocol = self.open()
        protocol.transport.write(b"x")
        self.site.settle(0.9)
        self.assertEqual(protocol.transport.unsent, 1)
        self.site.settle(0.2)
        self.assertEqual(protocol.transport.unsent, 0)
        pings = self.connection().pings
        self.site.settle(10)
        self.assertEqual(self.connection().pings, pings)

    def test_write_after_the_end(self) -> None:
        """What is written after the end is dropped."""
        protocol = self.open()
        protocol.transport.loseConnection()
        protocol.transport.write(b"x")
        self.site.settle()
        self.assertEqual(self.domain.typed, b"")


class PacingTests(SynchronousTestCase):
    """The law of input: never more than 4 KiB past the last answer."""

    @settings(max_examples=150, deadline=None)
    @given(
        st.lists(
            st.one_of(
                st.binary(min_size=1, max_size=3),
                st.integers(1, 12 * KIB).map(bytes),
                st.just(None),
            ),
            max_size=120,
        ),
        st.lists(st.integers(-2, 2 * KIB), max_size=6),
    )
    def test_credit(self, steps: list[bytes | None], sends: list[int]) -> None:
        """Whatever is written, taken and answered in whatever order, the law holds."""
        site = Site()
        domain = site.daemon.add("1", "vm")
        info = ConsoleInfo(vm_id="1", vm_name="vm", host="node1")
        connecting: Any = site.hosts.console_endpoint(info).connect(Factory.forProtocol(Keeper))
        site.settle()
        transport = self.successResultOf(connecting).transport
        threads = site.threads[0]
        domain.sends = [size if size else -2 for size in sends]
        assert domain.stream is not None
        asked: list[tuple[int, int]] = []
        answered, messages, written, sent = 0, 0, bytearray(), []
        send = domain.stream.send
        domain.stream.send = lambda data: sent.append(send(data)) or sent[-1]  # type: ignore[method-assign, func-returns-value]
        threads.on_call = lambda: asked.append((len(domain.typed), sum(n > 0 for n in sent)))
        threads.held = True

        def check() -> None:
            self.assertLessEqual(len(domain.typed) - answered, 4 * KIB)
            self.assertLessEqual(sum(n > 0 for n in sent) - messages, 67)
            self.assertLessEqual(len(threads.waiting), 1)
            self.assertEqual(transport.unsent, len(written) - answered)

        for step in steps:
            if step is None:
                site.settle()
                if threads.waiting:
                    answered, messages = asked[-1]
                    threads.release(1)
            else:
                written += step
                transport.write(step)
            site.settle()
            check()
        while threads.waiting:
            answered, messages = asked[-1]
            threads.release(1)
            site.settle()
            check()
        self.assertLess(transport.unsent, KIB)
        self.assertEqual(domain.typed, written)

    @given(st.lists(st.one_of(st.integers(1, KIB), st.just(0)), max_size=300))
    def test_account(self, steps: list[int]) -> None:
        """The account never goes below zero nor above its limits."""
        credit = Credit()
        for step in steps:
            if step:
                if size := min(step, credit.room):
                    credit.sent(size)
            elif credit.is_asking:
                credit.answered()
            asking = credit.is_asking
            self.assertFalse(credit.ask() and asking)
            self.assertTrue(0 <= credit.unanswered <= 4 * KIB)
            self.assertTrue(0 <= credit.room <= KIB)


class EndTests(ConsoleCase):
    """Every way in which a console ends."""

    def test_leave(self) -> None:
        """Who leaves is told at once, and once; the host is left afterwards, in a thread."""
        for leave in ("loseConnection", "abortConnection"):
            protocol = self.open()
            stream = self.stream()
            held_by_libvirt = stream.data
            self.threads.held = True
            getattr(protocol.transport, leave)()
            protocol.transport.loseConnection()
            (reason,) = protocol.reasons
            reason.trap(ConnectionDone)
            self.site.settle()
            self.assertEqual(stream.aborted, 0)
            self.threads.release()
            self.site.settle()
            self.assertEqual(stream.aborted, 1)
            # libvirt 9 never frees it.
            self.assertEqual(held_by_libvirt, {})
            self.assertEqual(len(protocol.reasons), 1)
            self.assertEqual(len(self.daemon.connections), 1)

    def test_leave_in_a_callback(self) -> None:
        """Leaving while output is handed over is as good: no more of it comes."""
        protocol = self.open()
        protocol.dataReceived = lambda data: protocol.transport.loseConnection()  # type: ignore[method-assign]
        calls: list[None] = []
        self.threads.on_call = lambda: calls.append(None)
        self.stream().put(b"x", b"")
        self.site.settle(3)
        (reason,) = protocol.reasons
        reason.trap(ConnectionDone)
        # Nobody asks any more why it ended.
        self.assertEqual(len(calls), 1)

    def test_leaving_is_bounded(self) -> None:
        """Before the abort, which a stuck guest holds up, the connection gets a keepalive."""
        protocol = self.open()
        connection = self.connection()
        self.assertEqual(connection.keepalive, [])
        protocol.transport.loseConnection()
        self.site.settle()
        self.assertEqual(connection.keepalive, [(1, 2)])

    def test_eof(self) -> None:
        """When the console ends, the domain's state tells why, in words and by the type."""
        for state, kind, text in (
            ((SHUT_OFF, 1), GuestStopped, "vm\\x1b was shut off."),
            ((SHUT_OFF, 2), GuestStopped, "vm\\x1b was powered off."),
            ((SHUT_OFF, 3), GuestStopped, "vm\\x1b crashed."),
            ((CRASHED, 1), GuestStopped, "vm\\x1b crashed."),
            ((SHUT_OFF, 4), GuestMoved, "vm\\x1b moved to another host."),
            ((SHUT_OFF, 5), GuestGone, "vm\\x1b was saved to disk."),
            ((SHUT_OFF, 6), GuestStopped, "vm\\x1b failed: see its log on the host."),
            ((PAUSED, 2), GuestMoved, "vm\\x1b moved to another host."),
            (
                (RUNNING, 1),
                ConsoleTaken,
                "The console of vm\\x1b was closed by node1; another program may have taken it by "
                "force.",
            ),
        ):
            self.domain.state = (RUNNING, 1)
            protocol = self.open()
            self.stream().put(b"last words", b"")
            self.domain.state = state
            self.assertEqual(self.ending(protocol, kind), text)
            self.assertEqual(protocol.received, [b"last words"])
            self.assertIsNone(self.domain.stream)

    def test_domain_ends_later(self) -> None:
        """A console ends a little before its domain does: the state is looked at again."""
        protocol = self.open()
        self.stream().put(b"")
        self.site.settle(0.5)
        self.assertEqual(protocol.reasons, [])
        self.domain.state = (SHUT_OFF, 2)
        self.assertEqual(self.ending(protocol, GuestStopped), "vm\\x1b was powered off.")

    def test_gone(self) -> None:
        """A domain that the host does not know any more is told as gone."""
        protocol = self.open()
        self.stream().put(b"")
        del self.daemon.domains["1"]
        self.assertEqual(
            self.ending(protocol, GuestGone),
            "vm\\x1b is gone from node1: it was shut off, removed or moved.",
        )

    def test_gone_with_news(self) -> None:
        """What a transient domain's host told of it last says what became of it; also when that
        was told before its console was opened again, it counts no more."""
        for event, kind, text in (
            ((5, 1), GuestStopped, "vm\\x1b was powered off."),
            ((5, 2), GuestStopped, "vm\\x1b crashed."),
            ((5, 4), GuestGone, "vm\\x1b was saved to disk."),
            ((5, 0), GuestStopped, "vm\\x1b was shut off."),
            ((3, 1), GuestMoved, "vm\\x1b moved to another host."),
            ((5, 3), GuestMoved, "vm\\x1b moved to another host."),
        ):
            protocol = self.open()
            self.daemon.tell("1", event=event[0], detail=event[1])
            self.stream().put(b"")
            domain = self.daemon.domains.pop("1")
            self.assertEqual(self.ending(protocol, kind), text)
            self.daemon.domains["1"] = domain
        protocol = self.open()
        self.stream().put(b"")
        self.assertIn("was closed by node1", self.ending(protocol, ConsoleTaken))

    def test_news_is_late(self) -> None:
        """What the host tells of it may come a little later than it is gone."""
        protocol = self.open()
        self.stream().put(b"")
        domain = self.daemon.domains.pop("1")
        self.site.settle(0.05)
        self.assertEqual(protocol.reasons, [])
        self.daemon.tell("1", event=5, detail=3)
        self.assertEqual(self.ending(protocol, GuestMoved), "vm\\x1b moved to another host.")
        self.daemon.domains["1"] = domain

    def test_started_again(self) -> None:
        """A domain that runs when it is looked at, and was started meanwhile, had stopped; one
        that came back from a migration that failed had not."""
        protocol = self.open()
        self.stream().put(b"")
        self.daemon.tell("1", event=5, detail=1)
        self.daemon.tell("1", event=4, detail=0)
        self.daemon.tell("1", event=2, detail=0)
        self.assertEqual(
            self.ending(protocol, GuestStopped), "vm\\x1b was stopped, and started again."
        )
        protocol = self.open()
        # That was late: it is from before.
        self.daemon.tell("1", event=2, detail=0)
        self.stream().put(b"")
        self.ending(protocol, ConsoleTaken)
        protocol = self.open()
        self.daemon.tell("1", event=3, detail=1)
        self.daemon.tell("1", event=4, detail=1)
        self.stream().put(b"")
        self.ending(protocol, ConsoleTaken)

    def test_typed_until_the_reason(self) -> None:
        """What is typed until it is known why the console ended goes nowhere and counts as lost;
        who types too much of it is held back."""
        protocol = self.open()
        producer = Producer()
        protocol.transport.registerProducer(producer, True)
        self.stream().put(b"")
        self.site.settle()
        protocol.transport.write(b"lost")
        self.assertEqual(protocol.transport.unsent, 4)
        protocol.transport.write(bytes(17 * KIB))
        self.assertEqual(producer.steered, ["pause"])
        self.ending(protocol, ConsoleTaken)
        self.assertEqual(producer.steered, ["pause", "stop"])
        protocol.transport.write(b"late")
        self.assertEqual(protocol.transport.unsent, 17 * KIB + 4)
        self.assertEqual(self.domain.typed, b"")

    def test_taken(self) -> None:
        """A stream that breaks while the domain runs on was taken by force."""
        protocol = self.open()
        self.stream().put(b"last", LibvirtError("stream had I/O failure", 39, 38))
        self.assertEqual(
            self.ending(protocol, ConsoleTaken),
            "Another program on node1 took the console of vm\\x1b by force.",
        )
        self.assertEqual(protocol.received, [b"last"])

    def test_taken_while_typing(self) -> None:
        """The break may show in a send first; the protocol is not told inside its write."""
        protocol = self.open()
        stream = self.stream()

        def send(data: bytes) -> int:
            raise LibvirtError("stream had I/O failure", 39, 38)

        stream.send = send  # type: ignore[method-assign]
        protocol.transport.write(b"x")
        self.assertEqual(protocol.reasons, [])
        self.assertIn("by force", self.ending(protocol, ConsoleTaken))

    def test_lost_while_typing(self) -> None:
        """A send that fails because its connection is lost does not make somebody a taker."""
        protocol = self.open()
        connection = self.connection()
        connection.close_callback = None
        connection.dead = True
        self.daemon.connections.remove(connection)
        protocol.transport.write(b"x")
        self.assertEqual(self.ending(protocol, HostLost), LOST)

    def test_lost_while_draining(self) -> None:
        """Nor does a stream that breaks because its connection is lost."""
        protocol = self.open()
        self.stream().put(LibvirtError("client socket is closed", 1, 7))
        self.assertEqual(self.ending(protocol, HostLost), LOST)

    def test_why_takes_too_long(self) -> None:
        """If the host does not tell why within 2 s, the connection counts as lost."""
        protocol = self.open()
        self.stream().put(b"")
        self.site.settle(1)
        self.threads.held = True
        self.site.settle(0.9)
        self.assertEqual(protocol.reasons, [])
        self.assertEqual(self.ending(protocol, HostLost, 0.2), LOST)

    def test_leave_while_asking_why(self) -> None:
        """Who leaves while the reason is being looked for is told at once, and once."""
        protocol = self.open()
        self.stream().put(b"")
        self.site.settle(0.1)
        protocol.transport.loseConnection()
        (reason,) = protocol.reasons
        reason.trap(ConnectionDone)
        self.site.settle(3)
        self.assertEqual(len(protocol.reasons), 1)

    def test_connection_lost(self) -> None:
        """A connection that is lost ends its console, though no stream event fires."""
        protocol = self.open()
        self.daemon.drop(0)
        self.assertEqual(self.ending(protocol, HostLost, 0.1), LOST)

    def test_control_lost(self) -> None:
        """The loss of the control connection leaves consoles alone, but they have to answer."""
        protocol = self.open()
        console = self.connection()
        control = next(c for c in self.daemon.connections if c is not console)
        control.drop(2)
        self.site.settle(5)
        self.assertEqual(protocol.reasons, [])
        self.assertEqual(console.keepalive, [(2, 3)])
        self.assertEqual(len(self.daemon.connections), 2)

    def test_stuck_guest(self) -> None:
        """A guest that takes no input is told apart from a host that is lost, with the damage."""
        protocol = self.open()
        self.threads.held = True
        protocol.transport.write(bytes(10 * KIB))
        self.site.settle(30)
        self.threads.held = False
        self.connection().drop(1)
        self.assertEqual(
            self.ending(protocol, InputLost),
            "vm\\x1b took no input for 30 s, and node1's libvirtd dropped the connection; 10240 "
            "bytes typed may be lost.",
        )

    def test_stuck_guest_on_a_lost_host(self) -> None:
        """If the host does not answer either, it is the host that is lost."""
        protocol = self.open()
        self.threads.held = True
        protocol.transport.write(bytes(10 * KIB))
        self.site.settle(30)
        self.daemon.open_error = LibvirtError("unable to connect to server", 38, 7)
        self.threads.held = False
        self.daemon.drop(1)
        self.assertNotIn("took no input", self.ending(protocol, HostLost))

    def test_failing_question(self) -> None:
        """A question that fails ends the console too, where no close callback is to be had."""
        protocol = self.open()
        connection = self.connection()
        connection.close_callback = None
        connection.dead = True
        connection.getLibVersion = lambda: connection.check()  # type: ignore[method-assign, assignment, return-value]
        stream = self.stream()
        stream.send = lambda data: len(data)  # type: ignore[method-assign]
        protocol.transport.write(bytes(KIB))
        self.assertEqual(self.ending(protocol, HostLost, 0.1), LOST)
        self.daemon.connections.remove(connection)

    def test_stop(self) -> None:
        """When the service stops, each console ends with that reason and is left."""
        protocol = self.open()
        stream = self.stream()
        self.assertLess(self.site.stop(), 1)
        self.assertEqual(self.ending(protocol), "vmconsole is stopping.")
        self.assertEqual(stream.aborted, 1)

    def test_stop_on_a_host_that_hangs(self) -> None:
        """Stopping does not wait for a host that hangs."""
        protocol = self.open()
        self.threads.held = True
        self.assertLessEqual(self.site.stop(), 3.2)
        self.assertEqual(len(protocol.reasons), 1)


LOST = "The connection to node1 was lost: its libvirtd stopped, or the host does not answer."


class ReopenTests(ConsoleCase):
    """Opening a console that we have just left."""

    def test_waits_for_our_own_leaving(self) -> None:
        """A new open waits until the old one has been left: it is not refused as busy."""
        for _ in range(50):
            protocol = self.open()
            protocol.transport.loseConnection()
            again = self.start()
            self.site.settle()
            self.successResultOf(again).transport.loseConnection()
            self.site.settle()

    def test_slow_leaving(self) -> None:
        """A leaving that takes a while holds up the new open, which then goes through."""
        protocol = self.open()
        self.threads.held = True
        protocol.transport.loseConnection()
        self.site.settle()
        again = self.start()
        self.site.settle(4.5)
        self.assertNoResult(again)
        self.threads.release()
        self.site.settle()
        self.successResultOf(again)

    def test_other_console(self) -> None:
        """It does not hold up another VM's console."""
        self.daemon.add("2", "other")
        protocol = self.open()
        self.threads.held = True
        protocol.transport.loseConnection()
        self.site.settle()
        connecting = self.start(vm_id="2")
        self.site.settle()
        self.threads.release(2)  # The leaving waits there first.
        self.site.settle()
        self.successResultOf(connecting)

    def test_left_behind(self) -> None:
        """If the host goes on believing in the old session, the text says whose it is."""
        protocol = self.open()
        self.threads.held = True
        protocol.transport.loseConnection()
        self.site.settle()
        again = self.start()
        self.site.settle()
        self.domain.open_error = LibvirtError("Active console session exists", 9)
        self.site.settle(1.5)
        self.threads.release()
        self.site.settle(1.9)
        self.assertNoResult(again)
        self.site.settle(0.5)
        ours = (
            "node1 still clears up the last session on the console of vm\\x1b, which takes no "
            "input; try again in half a minute."
        )
        self.assertEqual(self.failureResultOf(again, ConsoleBusy).getErrorMessage(), ours)
        self.site.settle(15)
        self.assertEqual(self.refused(ConsoleBusy, 2.5), ours)
        self.site.settle(15)
        self.assertIn("in use by another program", self.refused(ConsoleBusy, 2.5))


class LabTests(TestCase):
    """The same with a real libvirtd over TLS and a real guest: what no double can vouch for."""

    timeout = 60

    def setUp(self) -> None:
        import libvirt
        from twisted.internet import reactor

        from vmconsole.config import Hosts

        self.node = lab.get().node1
        self.vm_id = self.node.run(lab.LightGuest("stream-test"))
        self.addCleanup(self.node.remove, "stream-test")
        self.hosts = HostPool(
            reactor,  # type: ignore[arg-type]
            libvirt,
            Hosts(overrides={"node1": self.node.uri}),
        )
        self.hosts.startService()
        self.loop = LibvirtEventLoop(reactor, libvirt).register()  # type: ignore[arg-type]
        self.addCleanup(self.hosts.stopService)

    async def open(self) -> Any:
        info = ConsoleInfo(vm_id=self.vm_id, vm_name="stream-test", host="node1")
        protocol: Any = await self.hosts.console_endpoint(info).connect(
            Factory.forProtocol(Expecter)
        )
        return protocol

    async def test_bytes(self) -> None:
        """All 256 byte values, and more than one credit, come back as they went."""
        protocol = await self.open()
        protocol.transport.write(b"x")
        await protocol.expect(b"x")
        data = bytes(range(256)) * 40
        protocol.transport.write(data)
        await protocol.expect(data)

    async def test_leaves_no_trace(self) -> None:
        """After the stop libvirt watches nothing any more: every connection is really closed."""
        for _ in range(2):
            protocol = await self.open()
            protocol.transport.write(b"x")
            await protocol.expect(b"x")
            await self.assertFailure(Deferred.fromCoroutine(self.open()), ConsoleBusy)
            protocol.transport.loseConnection()
        await self.hosts.stopService()
        from twisted.internet import reactor
        from twisted.internet.task import deferLater

        while not self.loop.is_idle():
            await deferLater(reactor, 0.01, lambda: None)  # type: ignore[arg-type]

    async def test_destroyed(self) -> None:
        """A guest whose plug is pulled ends its console with that word."""
        from twisted.internet.threads import deferToThread

        protocol = await self.open()
        destroying = deferToThread(self.node.destroy, "stream-test")
        reason = await protocol.ended
        self.assertEqual(str(reason), "stream-test was powered off.")
        await destroying


class Expecter(Protocol):
    """Waits for what comes."""

    def __init__(self) -> None:
        self.ended: Deferred[BaseException] = Deferred()
        self._received = b""
        self._waiting: tuple[bytes, Deferred[None]] | None = None

    def expect(self, words: bytes) -> Deferred[None]:
        """Fires when ``words`` have been received, and forgets all up to there."""
        waiting: Deferred[None] = Deferred()
        self._waiting = (words, waiting)
        self.dataReceived(b"")
        return waiting

    def dataReceived(self, data: bytes) -> None:
        self._received += data
        if self._waiting is not None and self._waiting[0] in self._received:
            words, waiting = self._waiting
            self._waiting = None
            self._received = self._received.partition(words)[2]
            waiting.callback(None)

    def connectionLost(self, reason: Failure = None) -> None:  # type: ignore[assignment]
        self.ended.callback(reason.value)
