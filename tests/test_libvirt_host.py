"""Hosts: from name to URI, threads, the control connection, and what it tells its observer."""

from __future__ import annotations

import traceback
from collections.abc import Coroutine, Sequence
from itertools import pairwise
from typing import Any

from twisted.application.service import IService
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.protocol import Factory, Protocol
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from tests.fakes_libvirt import (
    CRASHED,
    PAUSED,
    PTY,
    SHUT_OFF,
    FakeConnection,
    FakeDaemon,
    FakeDomainObject,
    FakeLibvirt,
    FakeMonitor,
    FakeReactor,
    FakeThreadPool,
    LibvirtError,
    Site,
)
from vmconsole.config import Hosts
from vmconsole.errors import ConfigError, ConsoleUnavailable, HostUnreachable
from vmconsole.hypervisor.host_threads import HostThreads
from vmconsole.hypervisor.libvirt_connection import Connection
from vmconsole.hypervisor.libvirt_domains import console_problem
from vmconsole.hypervisor.libvirt_errors import host_unreachable
from vmconsole.hypervisor.libvirt_host import list_domains
from vmconsole.hypervisor.libvirt_uri import host_uri
from vmconsole.interfaces import (
    ConsoleInfo,
    Domain,
    DomainState,
    IConsoleEndpoints,
    IDomainObserver,
    IDomainSource,
)


class URITests(SynchronousTestCase):
    """From a host's name to its URI."""

    def test_order(self) -> None:
        """Overrides win over the URI that is given, and that over the rule."""
        hosts = Hosts(overrides={"a": "qemu:///system"})
        self.assertEqual(host_uri("a", "qemu+tls://given/system", hosts), "qemu:///system")
        self.assertEqual(host_uri("b", "qemu+tls://given/system", hosts), "qemu+tls://given/system")
        self.assertEqual(host_uri("b", "", hosts), "qemu+tls://b/system")

    def test_names(self) -> None:
        """DNS names, addresses and ports may stand there; a bare IPv6 address gets brackets."""
        for name, said in (
            ("node-1.example.com", "node-1.example.com"),
            ("10.0.0.1", "10.0.0.1"),
            ("node1:16515", "node1:16515"),
            ("fe80::1", "[fe80::1]"),
            ("[fe80::1]", "[fe80::1]"),
        ):
            self.assertEqual(host_uri(name, "", Hosts()), f"qemu+tls://{said}/system")

    def test_injection(self) -> None:
        """A name that would change the URI around it is refused, and shown harmlessly."""
        for name in (
            "a?command=/bin/sh",
            "a/system?pkipath=/tmp",
            "a#b",
            "a&b",
            "user@a",
            "a b",
            "a\n",
            "\x1b[2Ja",
            "a%2fb",
            "-a",
            "../a",
            "[::1]/x",
            "ä",
            "a" * 300,
            "{host}",
        ):
            with self.assertRaises(ConfigError) as caught:
                host_uri(name, "", Hosts())
            self.assertTrue(str(caught.exception).isprintable())
            self.assertIn("is no name of a host", str(caught.exception))

    def test_no_host(self) -> None:
        """No name at all is told apart."""
        with self.assertRaises(ConfigError) as caught:
            host_uri("", "", Hosts())
        self.assertIn("stands on no host", str(caught.exception))

    def test_rule_without_name(self) -> None:
        """A rule that is one URI for all takes any name."""
        self.assertEqual(host_uri("any thing", "", Hosts(uri="qemu:///system")), "qemu:///system")

    def test_schemes(self) -> None:
        """TLS and local sockets are taken; what runs commands, or is not encrypted, is not."""
        for uri in ("qemu:///system", "qemu+unix:///system?socket=/run/x", "qemu+tls://a/system"):
            self.assertEqual(host_uri("h", uri, Hosts()), uri)
        for scheme in ("qemu+ssh", "QEMU+SSH", "qemu+ext", "qemu+libssh", "qemu+libssh2"):
            with self.assertRaises(ConfigError):
                host_uri("h", f"{scheme}://a/system?command=/bin/sh", Hosts())
        for uri in ("qemu+tcp://a/system", "ssh://a", "unix:/run/x", "xen:///", "nonsense", "//a"):
            with self.assertRaises(ConfigError):
                host_uri("h", uri, Hosts())
            with self.assertRaises(ConfigError):
                host_uri("h", "", Hosts(uri=uri))
            with self.assertRaises(ConfigError):
                host_uri("h", "", Hosts(overrides={"h": uri}))

    def test_odd_characters(self) -> None:
        """Blanks, control characters and the like are refused anywhere in a URI."""
        for uri in (" qemu:///system", "qemu:///sys\ttem", "qemu:///system\n", "qemu://[/system"):
            with self.assertRaises(ConfigError):
                host_uri("h", uri, Hosts())

    def test_pki(self) -> None:
        """The folder of certificates is added, quoted, to TLS URIs that name none."""
        hosts = Hosts(pki="/etc/my pki&x")
        folder = "pkipath=/etc/my%20pki%26x"
        for uri, full in (
            ("qemu+tls://a/system", f"qemu+tls://a/system?{folder}"),
            ("qemu://a/system", f"qemu://a/system?{folder}"),
            ("qemu+tls://a/system?no_tty=1", f"qemu+tls://a/system?no_tty=1&{folder}"),
            ("qemu+tls://a/system?pkipath=/b", "qemu+tls://a/system?pkipath=/b"),
            ("qemu:///system", "qemu:///system"),
            ("qemu+unix:///system", "qemu+unix:///system"),
        ):
            self.assertEqual(host_uri("h", uri, hosts), full)


class ConnectErrorTests(SynchronousTestCase):
    """What libvirt says when no connection can be made, as measured with libvirt 9."""

    def test_table(self) -> None:
        """Each cause is told apart, with what to do; the pki folder is named where it helps."""
        for code, said, words in (
            (38, "unable to connect to server at 'h:16514': Connection refused", "firewall"),
            (38, "Failed to connect socket to '/run/x': No such file or directory", "running"),
            (38, "Unable to resolve address 'h' service '16514': Name or service", "resolve"),
            (38, "Cannot read CA certificate '/p/cacert.pem': No such file", "in /p"),
            (38, "Our own certificate /p/c.pem failed validation against /p/ca.pem", "in /p"),
            (38, "The client certificate /p/clientcert.pem has expired", "in /p"),
            (38, "Unable to set x509 key and certificate: /p/clientkey.pem", "in /p"),
            (
                45,
                "authentication failed: Failed to verify peer's certificate",
                "cannot be verified",
            ),
            (38, "Unable to read TLS confirmation: Input/output error", "rejected our TLS"),
            (45, "authentication failed: TLS handshake failed An unexpected TLS", "No TLS"),
            (45, "authentication failed: no agent", "refused our login"),
            (80, "authentication unavailable: no polkit agent", "refused our login"),
            (5, "no connection driver available for foo:///system", "cannot be used"),
        ):
            error = host_unreachable(LibvirtError(said, code, 7), "h\x1b", "/p")
            text = str(error)
            self.assertIn(words, text)
            self.assertIn("h\\x1b", text)
            self.assertTrue(text.isprintable())
            self.assertTrue(text.endswith((".", "?")), text)


class ConsoleProblemTests(SynchronousTestCase):
    """Whether the console in a domain's XML can be opened."""

    def problem(self, devices: str) -> str:
        return console_problem(f"<domain><devices>{devices}</devices></domain>")

    def test_pty(self) -> None:
        """The first console counts; without one, the first serial port."""
        self.assertEqual(console_problem(PTY), "")
        self.assertEqual(self.problem("<serial type='pty'/>"), "")
        self.assertEqual(self.problem("<console type='pty'/><console type='tcp'/>"), "")

    def test_none(self) -> None:
        """No console device is told with its cure."""
        cure = "has no console device: add <console type='pty'/> to its XML"
        self.assertEqual(self.problem("<disk/>"), cure)
        self.assertEqual(console_problem("<domain/>"), cure)

    def test_no_pty(self) -> None:
        """A console of another kind is told with its cure."""
        for kind, said in (
            ("unix", "a unix socket (type='unix')"),
            ("tcp", "a TCP socket (type='tcp')"),
            ("null", "a device (type='null')"),
        ):
            self.assertEqual(
                self.problem(f"<console type='{kind}'/>"),
                f"its console is {said}, not a pty, which libvirt cannot open: use "
                "<console type='pty'/>",
            )


class ListDomainsTests(SynchronousTestCase):
    """The list for whoever has a connection and no reactor."""

    def test_list(self) -> None:
        """All domains, by name, with state and what is wrong with their consoles."""
        daemon = FakeDaemon(FakeReactor())
        daemon.add("1", "b", state=(SHUT_OFF, 1))
        daemon.add("2", "a")
        daemon.add("3", "c", state=(PAUSED, 1), xml="<domain><devices/></domain>")
        daemon.add("4", "d", state=(CRASHED, 1))
        daemon.add("5", "e", state=(7, 1))
        problem = "has no console device: add <console type='pty'/> to its XML"
        self.assertEqual(
            list_domains(FakeConnection(daemon)),
            [
                Domain("2", "a", DomainState.RUNNING),
                Domain("1", "b", DomainState.SHUT_OFF),
                Domain("3", "c", DomainState.PAUSED, problem),
                Domain("4", "d", DomainState.SHUT_OFF),
                Domain("5", "e", DomainState.PAUSED),
            ],
        )

    def test_domain_that_goes_away(self) -> None:
        """A domain that vanishes while the list is made is left out; other errors are not."""
        daemon = FakeDaemon(FakeReactor())
        daemon.add("1", "a")
        connection = FakeConnection(daemon)
        domains = connection.listAllDomains()
        connection.listAllDomains = lambda: domains  # type: ignore[method-assign]
        del daemon.domains["1"]
        self.assertEqual(list_domains(connection), [])
        daemon.call_error = LibvirtError("broken", 1)
        self.assertRaises(LibvirtError, list_domains, connection)


class ThreadsTests(SynchronousTestCase):
    """The threads of a host."""

    def setUp(self) -> None:
        self.reactor = FakeReactor()
        self.pools: list[FakeThreadPool] = []

        def make_pool(_smallest: int, largest: int, _name: str) -> Any:
            self.pools.append(FakeThreadPool(self.reactor, largest))
            return self.pools[-1]

        self.threads = HostThreads(self.reactor, "no\x07de", make_pool)  # type: ignore[arg-type]
        self.pool = self.pools[0]

    def test_lazy(self) -> None:
        """No thread starts before the first call."""
        self.assertFalse(self.pool.started)
        called = self.threads.call(lambda: 3)
        self.assertTrue(self.pool.started)
        self.reactor.settle()
        self.assertEqual(self.successResultOf(called), 3)

    def test_error(self) -> None:
        """What the function raises is what the caller gets."""
        called = self.threads.call(lambda: 1 // 0)
        self.reactor.settle()
        self.failureResultOf(called, ZeroDivisionError)

    def test_limit(self) -> None:
        """After the limit the caller is told which host did not answer; the result goes to late."""
        self.pool.slow = True
        late: list[int] = []
        called = self.threads.call(lambda: 3, 10.0, late.append)
        self.reactor.settle(9.9)
        self.assertNoResult(called)
        self.reactor.settle(0.2)
        error = self.failureResultOf(called, HostUnreachable)
        self.assertIn("no\\x07de gave no answer within 10 s", error.getErrorMessage())
        self.assertEqual(late, [])
        self.pool.release()
        self.reactor.settle()
        self.assertEqual(late, [3])

    def test_cancel(self) -> None:
        """A call may be cancelled; its result goes to late, its error nowhere."""
        self.pool.slow = True
        late: list[int] = []
        called, failing = (
            self.threads.call(lambda: 3, None, late.append),
            self.threads.call(lambda: 1 // 0, None, late.append),
        )
        self.reactor.settle()
        called.cancel()
        failing.cancel()
        self.failureResultOf(called, CancelledError)
        self.failureResultOf(failing, CancelledError)
        self.pool.release()
        self.reactor.settle()
        self.assertEqual(late, [3])

    def test_not_begun(self) -> None:
        """What has not begun when nobody waits for it any more is left undone, if it would have to
        be undone; anything else is done all the same, such as what leaves a console."""
        self.pool.held = True
        done: list[str] = []
        undone = self.threads.call(
            lambda: done.append("open"), 10.0, lambda _: done.append("close")
        )
        left = self.threads.call(lambda: done.append("leave"), 10.0)
        self.reactor.settle(10.1)
        self.assertEqual(self.pool.max, 5)
        for each in (undone, left):
            self.failureResultOf(each, HostUnreachable)
        self.pool.release()
        self.reactor.settle()
        self.assertEqual((done, self.pool.max), (["leave"], 4))

    def test_growth(self) -> None:
        """The pool grows by what is lent, and for each call that hangs, up to a limit."""
        self.assertEqual(self.pool.max, 4)
        self.threads.lend(2)
        self.assertEqual(self.pool.max, 6)
        self.threads.lend(-2)
        self.assertEqual(self.pool.max, 4)
        self.pool.held = True
        for _ in range(100):
            self.failureResultOf(self._hang(), HostUnreachable)
        self.assertEqual(self.pool.max, 68)
        self.pool.release()
        self.reactor.settle()
        self.assertEqual(self.pool.max, 4)

    def _hang(self) -> Deferred[int]:
        called = self.threads.call(lambda: 3, 0.01)
        self.reactor.settle(0.02)
        return called

    def test_stop(self) -> None:
        """On stop, who waits is told; later calls are refused; late results are still cared for."""
        self.pool.slow = True
        closed: list[int] = []
        waiting = self.threads.call(lambda: 3, None, closed.append)
        self.reactor.settle()
        stopped = self.threads.stop()
        self.assertIn("stopping", self.failureResultOf(waiting, HostUnreachable).getErrorMessage())
        self.failureResultOf(self.threads.call(lambda: 3), HostUnreachable)
        self.pool.release()
        for _ in range(1000):
            self.reactor.settle(0.001)
            if stopped.called and closed:
                break
        self.successResultOf(stopped)
        self.assertEqual(closed, [3])
        self.assertTrue(self.pool.stopped)


@implementer(IDomainObserver)
class Observer:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def domains_listed(self, host: str, domains: Sequence[Domain]) -> None:
        self.told.append(("listed", host, [domain.name for domain in domains]))

    def domain_changed(self, host: str, domain: Domain) -> None:
        self.told.append(("changed", host, domain.name, domain.state.value))

    def domain_removed(self, host: str, domain_id: str) -> None:
        self.told.append(("removed", host, domain_id))

    def host_lost(self, host: str, reason: str) -> None:
        self.told.append(("lost", host, reason))

    def take(self) -> list[tuple[Any, ...]]:
        told, self.told = self.told, []
        return told


SERIAL = """<domain id='1'><devices><input type='keyboard' bus='ps2'/>
    <serial type='pty'><target type='isa-serial'/><alias name='serial0'/></serial>
    <console type='pty'><target type='serial'/><alias name='serial0'/></console>
</devices></domain>"""
LOST = "The connection to node1 was lost: its libvirtd stopped, or the host does not answer."


class WatchTests(SynchronousTestCase):
    """What stands on the hosts."""

    def setUp(self) -> None:
        self.site = Site()
        self.daemon = self.site.daemon
        self.daemon.add("1", "a")
        self.observer = Observer()
        self.site.hosts.observer = self.observer
        self.addCleanup(self.check_leaks)

    def check_leaks(self) -> None:
        self.site.stop()
        self.assertEqual(self.daemon.leaked, [])
        self.assertEqual(self.daemon.connections, [])

    def watch(self) -> None:
        self.site.hosts.watch("node1", "")
        self.site.settle()

    def test_interfaces(self) -> None:
        """The pool is what it says it is."""
        for interface in (IConsoleEndpoints, IDomainSource, IService):
            verifyObject(interface, self.site.hosts)
        verifyObject(IDomainObserver, self.observer)

    def test_list(self) -> None:
        """At connect all domains are told; the connection is kept, with a keepalive."""
        self.watch()
        self.assertEqual(self.observer.take(), [("listed", "node1", ["a"])])
        self.assertEqual([c.keepalive for c in self.daemon.connections], [[(5, 3)]])
        self.site.settle(100)
        self.assertEqual(self.observer.take(), [])
        self.assertEqual(self.daemon.opened, 1)

    def test_watched_before_start(self) -> None:
        """A host may be watched before the service starts."""
        site = Site()
        site.daemon.add("1", "a")
        site.stop()
        site.hosts.observer = self.observer
        site.hosts.watch("node1", "")
        site.settle()
        self.assertEqual(self.observer.take(), [])
        site.hosts.startService()
        site.settle()
        self.assertEqual(self.observer.take(), [("listed", "node1", ["a"])])
        site.stop()

    def test_events(self) -> None:
        """Changes are told with the state of now, and removals."""
        self.watch()
        self.observer.take()
        self.daemon.domains["1"].state = (SHUT_OFF, 1)
        self.daemon.add("2", "b")
        self.daemon.tell("1")
        for _ in range(3):
            self.daemon.tell("2")
            self.daemon.tell("1")
        self.site.settle()
        off, new = ("changed", "node1", "a", "shut off"), ("changed", "node1", "b", "running")
        # What changes while it is being looked at is looked at once more.
        self.assertEqual(self.observer.take(), [off, new, off])
        del self.daemon.domains["1"]
        self.daemon.tell("1")
        self.site.settle()
        self.assertEqual(self.observer.take(), [("removed", "node1", "1")])

    def test_event_while_listing(self) -> None:
        """A change while the list is made is not missed: it is told after the list."""
        list_all = FakeConnection.listAllDomains

        def change_meanwhile(connection: FakeConnection) -> list[FakeDomainObject]:
            found = list_all(connection)
            self.daemon.add("2", "b")
            self.daemon.tell("2")
            return found

        self.patch(FakeConnection, "listAllDomains", change_meanwhile)
        self.watch()
        self.assertEqual(
            self.observer.take(),
            [("listed", "node1", ["a"]), ("changed", "node1", "b", "running")],
        )

    def test_lost_and_found(self) -> None:
        """A loss is told at once; tries follow after growing delays; the list is told anew."""
        self.watch()
        self.observer.take()
        self.daemon.open_error = LibvirtError("unable to connect to server: refused", 38, 7)
        self.daemon.drop()
        self.site.settle()
        self.assertEqual(self.observer.take(), [("lost", "node1", LOST)])
        self.site.settle(0.9)
        self.assertEqual(self.observer.take(), [])
        self.site.settle(1.2)
        self.assertIn("refused", self.observer.take()[0][2])
        self.site.settle(300)
        self.assertEqual(self.observer.take(), [])
        self.daemon.open_error = None
        self.site.settle(31)
        self.assertEqual(self.observer.take(), [("listed", "node1", ["a"])])
        for _ in range(2):
            self.daemon.drop()
            self.site.settle(3)
            self.assertEqual(
                self.observer.take(), [("lost", "node1", LOST), ("listed", "node1", ["a"])]
            )

    def test_backoff(self) -> None:
        """The delays grow from 1 s to at most 30 s, and start anew after a success."""
        tries: list[float] = []

        def refuse(uri: str) -> None:
            tries.append(self.site.reactor.seconds())
            raise LibvirtError("unable to connect to server", 38, 7)

        opens = self.site.libvirt.open
        self.site.libvirt.open = refuse  # type: ignore[method-assign, assignment]
        self.site.hosts.watch("node1", "")
        self.site.settle(200)
        delays = [after - before for before, after in pairwise(tries)]
        for delay, (least, most) in zip(
            delays, [(1, 2), (2, 3), (4, 5), (8, 9), (16, 17), (29, 30), (29, 30)], strict=False
        ):
            self.assertTrue(least <= delay <= most + 0.1, delays)
        self.site.libvirt.open = opens  # type: ignore[method-assign]
        self.site.settle(31)
        self.site.libvirt.open = refuse  # type: ignore[method-assign, assignment]
        tries.clear()
        start = self.site.reactor.seconds()
        self.daemon.drop()
        self.site.settle(2.2)
        self.assertTrue(1 <= tries[0] - start <= 2.1)

    def test_no_answer_at_connect(self) -> None:
        """A host that does not answer is lost after 10 s; the late connection is closed."""
        self.site.hosts.watch("node1", "")
        self.site.threads[0].slow = True
        self.site.settle(10.1)
        self.assertIn("no answer within 10 s", self.observer.take()[0][2])
        self.site.threads[0].release()
        self.site.settle()
        self.assertEqual(self.daemon.opened, 1)
        self.assertEqual(self.daemon.connections, [])

    def test_failing_list(self) -> None:
        """A host whose list fails is lost, its connection closed, and tried again."""
        self.daemon.call_error = LibvirtError("out of order", 1)
        self.watch()
        self.assertEqual(
            self.observer.take(), [("lost", "node1", "The libvirtd of node1 failed: out of order.")]
        )
        self.assertEqual(self.daemon.connections, [])
        self.daemon.call_error = None
        self.site.settle(3)
        self.assertEqual(self.observer.take(), [("listed", "node1", ["a"])])

    def test_broken_xml(self) -> None:
        """What we do not understand is logged, and does not end the watching."""
        from xml.etree.ElementTree import ParseError

        self.daemon.domains["1"].xml = "<domain"
        self.watch()
        self.assertEqual(len(self.flushLoggedErrors(ParseError)), 1)
        self.assertIn("see its log", self.observer.take()[0][2])
        self.daemon.domains["1"].xml = PTY
        self.site.settle(3)
        self.assertEqual(self.observer.take(), [("listed", "node1", ["a"])])

    def test_failing_observer(self) -> None:
        """An observer's mistake is logged, and the watching goes on."""
        self.observer.domains_listed = lambda *_: 1 // 0  # type: ignore[method-assign]
        self.watch()
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.daemon.tell("1")
        self.site.settle()
        self.assertEqual(self.observer.take(), [("changed", "node1", "a", "running")])

    def test_no_observer(self) -> None:
        """With nobody to tell, the watching goes on in silence."""
        self.site.hosts.observer = None
        self.watch()
        self.assertEqual(self.daemon.opened, 1)

    def test_unwatch(self) -> None:
        """Unwatching closes the connection and tells no more; a second time does nothing."""
        self.watch()
        self.observer.take()
        self.site.hosts.unwatch("node1")
        self.site.hosts.unwatch("node1")
        self.site.settle()
        self.assertEqual(self.daemon.connections, [])
        self.daemon.tell("1")
        self.site.settle(100)
        self.assertEqual(self.observer.take(), [])
        self.assertEqual(self.site.hosts._hosts, {})

    def test_unwatch_while_connecting(self) -> None:
        """Unwatching while the connection is being made closes it when it comes."""
        self.site.hosts.watch("node1", "")
        self.site.threads[0].held = True
        self.site.settle()
        self.site.hosts.unwatch("node1")
        self.site.threads[0].release()
        self.site.settle()
        self.assertEqual(self.daemon.connections, [])
        self.assertEqual(self.observer.take(), [])

    def test_other_uri(self) -> None:
        """Watching with another URI reconnects there; with the same one it changes nothing."""
        self.watch()
        self.watch()
        self.assertEqual(self.daemon.opened, 1)
        other = self.site.libvirt.daemons["qemu+tls://node2/system"]
        other.add("9", "z")
        self.site.hosts.watch("node1", "qemu+tls://node2/system")
        self.site.settle()
        self.assertEqual(
            self.observer.take(), [("listed", "node1", ["a"]), ("listed", "node1", ["z"])]
        )
        self.assertEqual(self.daemon.connections, [])
        self.assertEqual(len(other.connections), 1)

    def test_refused_uri(self) -> None:
        """A URI that may not be used is refused when it is given."""
        with self.assertRaises(ConfigError):
            self.site.hosts.watch("node1", "qemu+ssh://node1/system")
        self.site.settle()
        self.assertEqual(self.site.threads, [])
        self.site.stop()
        with self.assertRaises(ConfigError):
            self.site.hosts.watch("node1", "qemu+ssh://node1/system")

    def test_stop_with_a_host_that_hangs(self) -> None:
        """Stopping takes no longer than 3 s, whatever a host does."""
        self.watch()
        self.site.threads[0].held = True
        self.assertLessEqual(self.site.stop(), 3.2)
        self.site.threads[0].release()
        self.site.settle()


class ConnectionTests(SynchronousTestCase):
    """One connection, shared by threads."""

    def setUp(self) -> None:
        self.reactor = FakeReactor()
        self.libvirt = FakeLibvirt()
        self.daemon = self.libvirt.daemons["qemu:///system"] = FakeDaemon(self.reactor)
        self.connection = Connection(self.reactor, self.libvirt, "qemu:///system")

    def test_closed_by_the_last_user(self) -> None:
        """A connection that is closed while a call is under way is closed after that call."""

        def use(raw: FakeConnection) -> None:
            self.connection.close()
            self.assertFalse(raw.dead)

        self.connection.use(use)
        self.assertEqual(self.daemon.connections, [])
        self.assertNoResult(self.connection.closed)
        self.reactor.settle()
        self.successResultOf(self.connection.closed)

    def test_use_after_close(self) -> None:
        """Nobody gets at a connection that was closed."""
        self.connection.close()
        self.assertRaises(HostUnreachable, self.connection.use, lambda raw: None)
        self.connection.keep_alive(1, 2)

    def test_lost(self) -> None:
        """The loss is told on the reactor's thread, and what holds it open is given up."""
        self.connection.on_lifecycle(lambda id: None)
        self.daemon.drop(2)
        self.assertNoResult(self.connection.lost)
        self.reactor.settle()
        self.assertEqual(self.successResultOf(self.connection.lost), 2)
        self.connection.close()
        self.assertEqual(self.daemon.leaked, [])

    def test_error_holds_nothing(self) -> None:
        """An error carries no frame that would keep a domain, and so the connection, alive."""

        def fail(raw: FakeConnection) -> None:
            raw.lookupByUUIDString("none")

        try:
            self.connection.use(fail)
        except LibvirtError as error:
            names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        self.assertEqual(names, ["test_error_holds_nothing", "use"])


class GuestControlTests(SynchronousTestCase):
    """BREAK and SysRq through the pool."""

    def setUp(self) -> None:
        self.site = Site(monitor=FakeMonitor())
        self.domain = self.site.daemon.add("1", "a", xml=SERIAL)
        self.info = ConsoleInfo(vm_id="1", vm_name="a", host="node1")
        self.site.hosts.console_endpoint(self.info).connect(Factory.forProtocol(Protocol))
        self.site.settle()

    def send(self, call: Coroutine[Deferred[Any], Any, Any]) -> Deferred[Any]:
        sending = Deferred.fromCoroutine(call)
        self.site.settle()
        return sending

    def test_on_the_control_connection(self) -> None:
        """They go over the control connection: a guest that takes no input holds neither up."""
        opened = self.site.daemon.opened
        next(c for c in self.site.daemon.connections if c.streams).dead = True
        self.assertIsNone(self.successResultOf(self.send(self.site.hosts.send_break(self.info))))
        sysrq = self.send(self.site.hosts.send_sysrq(self.info, "h"))
        self.assertEqual(self.successResultOf(sysrq), b"h")
        self.assertEqual(len(self.domain.commands), 2)
        self.assertEqual(self.site.daemon.opened, opened)

    def test_break_not_allowed(self) -> None:
        """A pool that was given no monitor sends no BREAK, and SysRq by the keyboard."""
        site = self.site = Site()
        domain = site.daemon.add("1", "a", xml=SERIAL)
        site.hosts.console_endpoint(self.info).connect(Factory.forProtocol(Protocol))
        site.settle()
        error = self.failureResultOf(
            self.send(site.hosts.send_break(self.info)), ConsoleUnavailable
        )
        self.assertIn("set console.break", error.getErrorMessage())
        sysrq = self.send(site.hosts.send_sysrq(self.info, "h"))
        self.assertEqual(self.successResultOf(sysrq), b"")
        self.assertEqual((domain.commands, len(domain.keys)), ([], 1))

    def test_no_answer(self) -> None:
        """A host that does not answer is told after 10 s."""
        self.site.threads[0].held = True
        sending = self.send(self.site.hosts.send_break(self.info))
        self.site.settle(9.9)
        self.assertNoResult(sending)
        self.site.settle(0.2)
        self.failureResultOf(sending, HostUnreachable)

    def test_no_connection(self) -> None:
        """Without a connection to the host that is told, whether it was lost or never made."""
        self.site.daemon.drop()
        self.site.settle()
        for host, said in (("node1", LOST), ("node2", "There is no connection to node2 now.")):
            info = ConsoleInfo(vm_id="1", vm_name="a", host=host)
            error = self.failureResultOf(
                self.send(self.site.hosts.send_sysrq(info, "h")), HostUnreachable
            )
            self.assertEqual(error.getErrorMessage(), said)


class ConsoleHostTests(SynchronousTestCase):
    """The host of a console."""

    def connect(self, site: Site, host: str, vm_id: str = "1") -> Deferred[Any]:
        info = ConsoleInfo(vm_id=vm_id, vm_name="a\x07", host=host)
        connecting: Deferred[Any] = site.hosts.console_endpoint(info).connect(
            Factory.forProtocol(Protocol)
        )
        site.settle()
        return connecting

    def test_no_host(self) -> None:
        """A VM that stands nowhere is told as shut off."""
        error = self.failureResultOf(self.connect(Site(), ""), ConsoleUnavailable)
        self.assertEqual(
            error.getErrorMessage(),
            "a\\x07 stands on no host: it is shut off, perhaps. Start it, then connect again.",
        )

    def test_bad_name(self) -> None:
        """A name that is none is refused without a connection."""
        site = Site()
        error = self.failureResultOf(self.connect(site, "a?command=x"), HostUnreachable)
        self.assertIn("a?command=x is no name of a host", error.getErrorMessage())
        self.assertEqual(site.threads, [])

    def test_stopped(self) -> None:
        """After the stop nothing is opened."""
        site = Site()
        site.stop()
        error = self.failureResultOf(self.connect(site, "node1"), HostUnreachable)
        self.assertEqual(error.getErrorMessage(), "vmconsole is stopping.")

    def test_unused_host_is_given_up(self) -> None:
        """A minute after its last console, a host that nobody watches holds nothing."""
        site = Site()
        site.daemon.add("1", "a")
        protocol = self.successResultOf(self.connect(site, "node1"))
        self.assertEqual(len(site.daemon.connections), 2)
        site.settle(200)
        self.assertEqual(len(site.daemon.connections), 2)
        protocol.transport.loseConnection()
        site.settle(121)
        self.assertEqual(site.daemon.connections, [])
        self.assertEqual(site.hosts._hosts, {})
        self.assertEqual(site.daemon.leaked, [])

    def test_stop_waits_for_all(self) -> None:
        """The stop waits until every console has been left."""
        site = Site()
        for vm_id in ("1", "2"):
            site.daemon.add(vm_id, "a")
        self.successResultOf(self.connect(site, "node1"))
        self.successResultOf(self.connect(site, "node1", "2"))
        threads = site.threads[0]
        threads.held = True
        stopping = site.hosts.stopService()
        site.settle()
        threads.release(2)  # The control connection, and one console.
        site.settle(0.1)
        self.assertEqual(len(site.daemon.connections), 1)
        self.assertFalse(threads.stopped)
        threads.release()
        while not stopping.called:
            site.settle(0.001)
        self.assertEqual(site.daemon.connections, [])

    def test_threads_grow_with_consoles(self) -> None:
        """Each console brings threads along, and takes them with it."""
        site = Site()
        site.daemon.add("1", "a")
        protocol = self.successResultOf(self.connect(site, "node1"))
        self.assertEqual(site.threads[0].max, 6)
        self.failureResultOf(self.connect(site, "node2"), ConsoleUnavailable)
        self.assertEqual(site.threads[1].max, 4)
        protocol.transport.loseConnection()
        site.settle()
        self.assertEqual(site.threads[0].max, 4)
