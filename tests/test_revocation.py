"""What a user sees of the engine's answers: old ones, and those that take a permission away."""

from __future__ import annotations

from typing import Any

from twisted.conch.ssh.common import NS
from twisted.internet.defer import Deferred
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes import console
from tests.sshpair import ALICE, ALICE_KEY, PTY, SSHPair
from vmconsole.config import Config, Console, Engine
from vmconsole.errors import EngineError, EngineUnreachable
from vmconsole.interfaces import AuthorizedKey
from vmconsole.keyoptions import KeyOptions
from vmconsole.ssh.session import LAST_OUTPUT

RECHECK = 15.0
FAILURE, SUCCESS = 51, 52


class PermissionsTestCase(SynchronousTestCase):
    """Alice may open vm1 and vm2, and it is looked at again every RECHECK seconds."""

    config = Config(console=Console(linger=0.0))

    def setUp(self) -> None:
        self.pair = SSHPair(self.config)
        self.engine = self.pair.engine
        self.engine.vms[ALICE.id] = [console("vm1"), console("vm2")]
        self.pair.permissions.startService()
        # What was fetched at the start is no longer new.
        self.pair.advance(6)
        self.addCleanup(self.pair.permissions.stopService)

    def connected(self, vm: bytes = b"vm1", **options: Any) -> Any:
        """A channel that is attached."""
        before = len(self.pair.guests.opened)
        channel = self.pair.run(vm, pty=True, **options)
        self.assertEqual(len(self.pair.guests.opened), before + 1, channel.error)
        return channel

    def look(self) -> None:
        """Time passes up to the next look at the keys, and not beyond."""
        self.pair.advance(RECHECK - self.pair.clock.seconds() % RECHECK)

    def period(self) -> None:
        """One passes."""
        for _ in range(10):
            self.pair.advance(RECHECK / 10)

    def the_reason(self, event: str) -> str:
        """In the one audit event of this kind."""
        [seen] = self.pair.events.named(event)
        reason: str = seen["reason"]
        return reason


class RevocationTests(PermissionsTestCase):
    """When a permission goes."""

    def setUp(self) -> None:
        super().setUp()
        self.pair.login()

    def test_key(self) -> None:
        """A key that was removed ends each of its sessions with a line that says so, and then
        the connection."""
        console, other, menu = self.connected(), self.connected(b"vm2"), self.pair.run(pty=True)
        self.pair.guests.guest.print(b"login: ")
        self.engine.keys.clear()
        self.look()
        line = b"[vmconsole: Your key no longer lets you in: the engine does not know it as yours.]"
        for channel in (console, other):
            self.assertIn(line, channel.output)
            self.assertEqual((channel.error, channel.status), (b"", 0))
        self.assertIn(line, menu.error)
        self.assertEqual(menu.status, 1)
        self.assertTrue(console.gone and other.gone and menu.gone)
        self.assertFalse(any(guest.open for guest in self.pair.guests.opened))
        self.assertIn("no longer lets you in", self.the_reason("revoked"))
        [revoked] = self.pair.events.named("revoked")
        self.assertIn("reason='Your key no longer", formatEvent(revoked))
        for detached in self.pair.events.named("detached"):
            self.assertIn("no longer lets you in", detached["reason"])
        assert self.pair.client.disconnected is not None
        code, text = self.pair.client.disconnected
        self.assertEqual(code, 11)
        self.assertIn(b"no longer lets you in", text)
        self.assertEqual(self.pair.events.named("checked"), [])

    def test_idle_connection(self) -> None:
        """A connection without any session ends as well, at once."""
        self.engine.keys.clear()
        self.look()
        self.assertIsNotNone(self.pair.client.disconnected)

    def test_connecting(self) -> None:
        """So does a session that is still waiting for its console; nothing is opened later."""
        self.pair.guests.answer = Deferred()
        channel = self.pair.run(b"vm1", pty=True)
        self.engine.keys.clear()
        self.period()
        self.assertIn(b"no longer lets you in", channel.error)
        self.assertEqual(channel.status, 1)
        self.assertEqual(self.pair.guests.cancelled, 1)
        self.assertIsNotNone(self.pair.client.disconnected)

    def test_connecting_and_stalled(self) -> None:
        """Also when its client reads nothing: the way to the guest is given up at once."""
        self.pair.guests.answer = Deferred()
        self.pair.run(b"vm1", pty=True, window=1, reads_no_more=True)
        self.engine.keys.clear()
        self.look()
        self.assertEqual(self.pair.guests.cancelled, 1)
        self.assertIsNone(self.pair.client.disconnected)

    def test_no_command_yet(self) -> None:
        """So does a channel on which nothing was asked for."""
        channel = self.pair.open()
        self.engine.keys.clear()
        self.period()
        self.assertEqual(channel.status, 1)
        self.assertIsNotNone(self.pair.client.disconnected)

    def test_stalled_client(self) -> None:
        """A client that reads nothing does not keep its connection: the guest is free at once,
        and the connection ends when its last output has waited long enough."""
        channel = self.connected(window=200, reads_no_more=True)
        self.pair.guests.guest.print(b"x" * 1000)
        self.engine.keys.clear()
        self.pair.advance(RECHECK)
        self.assertFalse(self.pair.guests.guest.open)
        self.assertIsNone(self.pair.client.disconnected)
        second = self.pair.open()
        self.assertTrue(second.open_failed)
        self.pair.advance(LAST_OUTPUT)
        self.assertIsNotNone(self.pair.client.disconnected)
        self.assertTrue(channel.gone)

    def test_slow_client(self) -> None:
        """A client that is slow gets what was printed, and the line, once, before the end; the
        sessions that have ended before do not hurry it."""
        slow = self.connected(window=200, reads_no_more=True)
        self.pair.guests.guest.print(b"x" * 1000)
        other = self.pair.open()
        self.engine.keys.clear()
        self.look()
        self.assertTrue(other.gone)
        self.assertIsNone(self.pair.client.disconnected)
        self.pair.connection.grant(slow, 1 << 20)
        self.pair.flush()
        self.assertEqual(slow.output.count(b"x"), 1000)
        self.assertEqual(slow.output.count(b"no longer lets you in"), 1)
        self.assertEqual((slow.error, slow.status), (b"", 0))
        self.assertIsNotNone(self.pair.client.disconnected)

    def test_gone_before_the_end(self) -> None:
        """A client that goes while its last output waits leaves nothing that waits."""
        before = len(self.pair.timers())
        self.pair.run(pty=True, window=10, reads_no_more=True)
        self.engine.keys.clear()
        self.look()
        self.assertIsNone(self.pair.client.disconnected)
        self.pair.client_io.loseConnection()
        self.pair.flush()
        self.assertEqual(len(self.pair.timers()), before)

    def test_grant(self) -> None:
        """A VM that is no longer the user's ends its session with a line, and nothing else."""
        first, second = self.connected(b"vm1"), self.connected(b"vm2")
        self.engine.vms[ALICE.id] = [console("vm2")]
        for _ in range(3):
            self.period()
        self.assertIn(b"[vmconsole: You no longer have access to vm1.]", first.output)
        self.assertEqual((first.status, second.status), (0, None))
        self.assertEqual(self.the_reason("detached"), "You no longer have access to vm1.")
        self.assertIsNone(self.pair.client.disconnected)
        self.pair.type(second, b"on")
        self.assertEqual(self.pair.guests.guest.typed, b"on")

    def test_grants(self) -> None:
        """Several that go at the same time end as one does."""
        channels = [self.connected(vm) for vm in (b"vm1", b"vm2")]
        self.engine.vms[ALICE.id] = []
        for _ in range(2):
            self.period()
        self.assertEqual([channel.status for channel in channels], [0, 0])

    def test_old_menu(self) -> None:
        """What is chosen from a menu that has stood there is looked up again: a VM that is no
        longer the user's is not opened, one that has moved is opened where it is now."""
        for vms, opened, told in (
            ([console("vm2")], 0, b"ERROR: You no longer have access to vm1, or it is gone."),
            ([console("vm1", host="node9")], 1, b"vm1 on node9"),
        ):
            self.engine.vms[ALICE.id] = [console("vm1"), console("vm2")]
            self.pair.advance(6)
            channel = self.pair.run(pty=True)
            self.engine.vms[ALICE.id] = vms
            self.pair.advance(6)
            self.pair.type(channel, b"1\r\rroot\r")
            self.assertEqual(len(self.pair.guests.opened), opened)
            self.assertIn(told, channel.error + channel.output)
        self.assertEqual(self.pair.guests.guest.typed, b"\rroot\r")

    def test_exec_after_revocation(self) -> None:
        """A channel that was opened before, and asks for a console only afterwards, gets none:
        whether its client takes no notice of the end, or no output."""
        for window in (1 << 20, 1):
            pair = self.pair = SSHPair()
            pair.permissions.startService()
            self.addCleanup(pair.permissions.stopService)
            pair.engine.vms[ALICE.id] = [console("vm1")]
            pair.login()
            channel = pair.open(window, reads_no_more=True)
            channel.closed = channel.closeReceived = lambda: None  # type: ignore[method-assign]
            pair.engine.keys.clear()
            pair.advance(RECHECK)
            if not channel.localClosed:
                pair.connection.sendRequest(channel, b"pty-req", PTY)
                pair.connection.sendRequest(channel, b"exec", NS(b"vm1"))
                pair.flush()
            self.assertEqual(pair.guests.opened, [])

    def test_revoked_in_the_same_turn(self) -> None:
        """A command that has not begun when the login ends never does, and the client hears why."""
        channel = self.pair.open()
        self.pair.connection.sendRequest(channel, b"pty-req", PTY)
        self.pair.connection.sendRequest(channel, b"exec", NS(b"vm1"))
        self.pair.pump.flush()
        self.pair.server.avatar.revoke("no more")
        self.pair.flush()
        self.assertEqual(self.pair.guests.opened, [])
        self.assertEqual(self.pair.client.disconnected, (11, b"no more"))

    def test_namesakes(self) -> None:
        """Of VMs with the same name the one that was chosen is opened."""
        self.engine.vms[ALICE.id] = [console("vm1", "1"), console("vm1", "2", host="node2")]
        channel = self.pair.run(pty=True)
        self.pair.type(channel, b"2\r")
        self.assertIn(b"vm1 on node2", channel.output)

    def test_left(self) -> None:
        """Who has left is not looked at any more."""
        channel = self.connected()
        self.pair.type(channel, b"\x1d.")
        self.period()
        self.engine.asked.clear()
        self.period()
        self.assertEqual(self.engine.asked, ["keys"])
        self.pair.client_io.loseConnection()
        self.pair.flush()
        self.engine.asked.clear()
        self.period()
        self.assertEqual(self.engine.asked, [])

    def test_outage(self) -> None:
        """Open sessions outlive an outage and useless answers; the audit has since when they are
        unchecked, and when they are checked again."""
        channel = self.connected()
        self.period()
        for error in (EngineUnreachable("refused"), EngineError("500")):
            self.engine.error = error
            for _ in range(40):
                self.period()
        self.pair.type(channel, b"on")
        self.assertEqual(self.pair.guests.guest.typed, b"on")
        [unchecked] = self.pair.events.named("unchecked")
        self.assertEqual(unchecked["since"], "1970-01-01T00:00:15+00:00")
        self.assertEqual(unchecked["user"], ALICE.name)
        self.assertIn("since=1970-01-01T00:00:15+00:00", formatEvent(unchecked))
        self.assertEqual(self.pair.events.named("checked"), [])
        self.engine.error = None
        self.period()
        self.assertEqual(len(self.pair.events.named("checked")), 1)
        self.engine.keys.clear()
        self.period()
        self.assertEqual(channel.status, 0)


class RoleTests(PermissionsTestCase):
    """Who may only watch."""

    def setUp(self) -> None:
        super().setUp()
        self.pair.login()
        self.engine.vms[ALICE.id] = [console("vm1", role="viewer")]

    def test_viewer(self) -> None:
        """A viewer sees the guest, is told once that typing goes nowhere, and can leave."""
        channel = self.connected()
        self.assertIn(b"[vmconsole: You may only watch vm1.", channel.output)
        guest = self.pair.guests.guest
        guest.print(b"login: ")
        self.pair.type(channel, b"root\r")
        self.pair.type(channel, b"\x1d\x1d")
        self.pair.type(channel, b"x" * 100000)
        self.assertEqual(guest.typed, b"")
        self.assertEqual(channel.output.count(b"[vmconsole: You may only watch vm1;"), 1)
        self.assertIn(b"login: ", channel.output)
        self.pair.advance(5)
        self.assertNotIn(b"quiet", channel.output)
        self.pair.type(channel, b"\x1d.")
        self.assertEqual(channel.status, 0)

    def test_quiet(self) -> None:
        """A viewer of a guest that prints nothing is not told to press Enter."""
        channel = self.connected()
        self.pair.advance(5)
        self.assertNotIn(b"quiet", channel.output)

    def test_typed_ahead(self) -> None:
        """What a viewer types before the console is open goes nowhere either."""
        gate: Deferred[None] = Deferred()
        self.pair.guests.answer = gate
        channel = self.pair.run(b"vm1", pty=True)
        self.pair.type(channel, b"root\r")
        gate.callback(None)
        self.pair.flush()
        self.assertEqual(self.pair.guests.guest.typed, b"")

    def test_change(self) -> None:
        """A role that changes counts from the next look on, and the user is told."""
        channel = self.connected()
        self.engine.vms[ALICE.id] = [console("vm1")]
        self.period()
        self.assertIn(b"[vmconsole: From now on you may type on vm1.]", channel.output)
        self.pair.type(channel, b"on")
        self.engine.vms[ALICE.id] = [console("vm1", role="viewer")]
        self.period()
        self.assertIn(b"[vmconsole: From now on you may only watch vm1.]", channel.output)
        self.pair.type(channel, b"off")
        self.assertEqual(self.pair.guests.guest.typed, b"on")
        self.assertNotIn(b"what you type goes nowhere", channel.output)


class StaleTests(PermissionsTestCase):
    """Old answers, and none."""

    def outage(self, seconds: float) -> None:
        """Alice was here before, and so long ago the engine went."""
        self.pair.login()
        self.pair.run(b"list")
        self.engine.error = EngineUnreachable("The engine does not answer.")
        self.pair.advance(seconds)
        self.pair = self.pair.beside()

    def test_login(self) -> None:
        """Within the grace an old answer lets in, and the user is told in one line; a second
        command on the connection is told for itself."""
        self.outage(125)
        with capturedLogs() as events:
            self.pair.login()
            self.pair.run(b"info")
        lines = [formatEvent(event) or "" for event in events]
        for words in ("is let in by its answer from 2 minutes", "is served by its answer from 2 m"):
            [line] = [line for line in lines if words in line]
            self.assertIn(f"{ALICE.name} {words}", line)
        for _ in range(2):
            listing = self.pair.run(b"list")
            self.assertEqual(
                listing.error, b"[engine unreachable: using its answer from 2 minutes ago]\n"
            )
            self.assertIn(b"vm1", listing.output)
            self.assertEqual(listing.status, 0)
        channel = self.pair.run(b"vm1", pty=True)
        self.assertEqual(channel.error.count(b"engine unreachable"), 1)
        menu = self.pair.run(pty=True)
        self.pair.type(menu, b"2\r")
        self.assertIn(b"vm2 on node1", menu.output)
        self.assertEqual(menu.error.count(b"engine unreachable"), 1)

    def test_the_older_one(self) -> None:
        """When the answer about the key and that about the consoles are of different times, the
        user is told how old the older one is."""
        for before, later, told in ((3, 0, b"103 seconds ago"), (0, 9, b"109 seconds ago")):
            self.setUp()
            self.pair.login()
            self.pair.advance(before)
            self.pair.run(b"list")
            self.pair.advance(later)
            self.engine.error = EngineUnreachable("refused")
            self.pair.advance(100)
            self.pair = self.pair.beside()
            self.pair.login()
            self.assertIn(told, self.pair.run(b"list").error)

    def test_told_by_any_command(self) -> None:
        """A login by an old answer is told by the first command that is about the user."""
        self.outage(30)
        self.pair.login()
        for line in (b"help", b"nonsense of mine", b"connect"):
            self.assertNotIn(b"unreachable", self.pair.run(line).error)
        line = b"[engine unreachable: using its answer from 30 seconds ago]\n"
        self.assertEqual(self.pair.run(b"info").error, line)
        self.assertEqual(self.pair.run(b"info").error, b"")

    def test_looked_for(self) -> None:
        """Who looks for a VM that an old answer does not have is told that it is one."""
        self.pair.login()
        self.pair.run(b"list")
        self.engine.error = EngineUnreachable("refused")
        channel = self.pair.run(b"vm9", pty=True)
        self.assertIn(b"engine unreachable", channel.error)
        self.assertIn(b"vm9", channel.error)

    def test_too_old(self) -> None:
        """After the grace the login is refused with a banner that says why."""
        self.outage(300)
        self.pair.auth.sign(b"vmproxy", ALICE_KEY)
        self.pair.flush()
        self.assertEqual(self.pair.auth.answers, [FAILURE])
        [banner] = self.pair.auth.banners
        self.assertIn("the engine, which knows your key, does not answer", banner)

    def test_answers_of_no_use(self) -> None:
        """403 and 500 are answers: no old one serves beside them."""
        self.outage(10)
        self.engine.error = EngineError("403")
        self.pair.advance(2)
        self.pair.auth.sign(b"vmproxy", ALICE_KEY)
        self.pair.flush()
        self.assertEqual(self.pair.auth.answers, [FAILURE])
        self.assertIn("gave no usable answer", self.pair.auth.banners[0])

    def test_back(self) -> None:
        """Once the engine is back nothing is told any more."""
        self.outage(100)
        self.pair.login()
        self.pair.run(b"list")
        self.engine.error = None
        self.pair.advance(2)
        listing = self.pair.run(b"list")
        self.assertEqual((listing.error, listing.status), (b"", 0))


class LoginTests(PermissionsTestCase):
    """Keys with options, and clients that do not wait."""

    def test_from(self) -> None:
        """A key that may not be used from here is refused, at the query too, and its user is
        told; the audit has the reason."""
        blob = ALICE_KEY.public().blob()
        options = KeyOptions(sources=("198.51.100.0/24",))
        self.engine.keys[:] = [AuthorizedKey(ALICE.id, ALICE.name, blob, options)]
        self.pair.auth.query(b"vmproxy", ALICE_KEY)
        self.pair.auth.sign(b"vmproxy", ALICE_KEY)
        self.pair.flush()
        self.assertEqual(self.pair.auth.answers, [FAILURE, FAILURE])
        self.assertEqual(len(self.pair.auth.banners), 1)
        self.assertIn("192.0.2.7", self.pair.auth.banners[0])
        self.pair.client_io.loseConnection()
        self.pair.flush()
        self.assertIn("192.0.2.7", self.the_reason("login_refused"))

    def test_gone_while_the_engine_thinks(self) -> None:
        """A client that goes before its login is answered leaves nothing to look at."""
        self.engine.keys_gate = Deferred()
        self.pair.auth.sign(b"vmproxy", ALICE_KEY)
        self.pair.flush()
        self.pair.client_io.loseConnection()
        self.pair.flush()
        self.engine.keys_gate.callback(None)
        self.assertEqual(self.pair.events.named("login_accepted"), [])
        self.engine.asked.clear()
        self.period()
        self.assertEqual(self.engine.asked, [])


class PlacedOnlyTests(PermissionsTestCase):
    """With an engine that lists only the VMs that run, as an oVirt Engine does."""

    config = Config(
        engine=Engine(url="https://engine.example.com/ovirt-engine/"),
        console=Console(linger=0.0),
    )

    def setUp(self) -> None:
        super().setUp()
        self.pair.login()

    def test_not_there(self) -> None:
        """A VM that is not listed may be off: the message says all that it may be."""
        for line in (b"vm9", b"connect --vm-id vm9", b"connect --vm-name vm9"):
            channel = self.pair.run(line, pty=True)
            self.assertIn(
                b"ERROR: vm9 is not there: not running, unknown, or not yours.", channel.error
            )
            self.assertEqual(channel.status, 1)

    def test_none(self) -> None:
        """So may all of them."""
        self.engine.vms.clear()
        channel = self.pair.run(pty=True)
        self.assertIn(b"no VM is running that you have access to", channel.error)
