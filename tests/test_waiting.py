"""``connect --wait`` for a VM that is not there yet."""

from __future__ import annotations

from typing import Any

import msgspec
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes import console
from tests.sshpair import ALICE, SSHPair
from vmconsole.config import Config, Engine
from vmconsole.config import Console as Settings
from vmconsole.errors import ConsoleUnavailable, EngineError, EngineUnreachable
from vmconsole.ssh.request import CommandSyntaxError, Request, parse

NOT_THERE = "web1 is not there: not running, unknown, or not yours. `list` shows yours."
WAITING = f"[vmconsole: {NOT_THERE} Waiting for it; Ctrl-C gives up.]\r\n".encode()
GAVE_UP = WAITING + b"ERROR: You gave up.\r\n"
OPENED = b"[vmconsole: web1 on node1. To leave: ^] . (help: ^] ?)]"
BELL = b"\x07"


def line(text: str) -> bytes:
    """As it is shown on a console."""
    return f"[vmconsole: {text}]\r\n".encode()


class WaitTestCase(SynchronousTestCase):
    """Alice, and an engine that tells of no VM that does not run."""

    def setUp(self) -> None:
        self.make()

    def make(self, url: str = "https://engine/", **settings: Any) -> None:
        """Another proxy, at which Alice is logged in."""
        # It remembers its answers for a minute.
        engine = Engine(url=url, certificate="c", key="k", cache_ttl=60.0)
        self.pair = SSHPair(Config(engine=engine, console=Settings(linger=0.0, **settings)))
        self.engine, self.guests = self.pair.engine, self.pair.guests
        self.engine.vms[ALICE.id] = [console("db")]
        self.pair.login()
        self.engine.asked.clear()

    def tearDown(self) -> None:
        """When all is over nothing is left, and nothing went wrong."""
        self.pair.client_io.loseConnection()
        self.pair.flush()
        self.assertEqual((len(self.pair.pool), self.pair.clock.getDelayedCalls()), (0, []))
        self.assertEqual(self.flushLoggedErrors(), [])

    def waits(self, line: bytes = b"connect --wait web1") -> Any:
        """A channel on which Alice waits for web1."""
        channel = self.pair.run(line, pty=True)
        self.assertEqual((channel.status, channel.error), (None, WAITING))
        self.assertEqual(self.engine.asked, [ALICE.id, ALICE.id])
        self.engine.asked.clear()
        return channel

    def runs(self, *names: str) -> None:
        """The engine tells of these VMs, too."""
        self.engine.vms[ALICE.id] += [console(name) for name in names]


class WaitTests(WaitTestCase):
    """Until it is listed, or it is over."""

    def test_found(self) -> None:
        """The engine is asked every 2 seconds, past what is remembered, for as long as it takes;
        then its console opens as if it had been there."""
        channel = self.waits()
        self.pair.advance(1.9)
        self.assertEqual(self.engine.asked, [])
        for looks in range(1, 101):
            self.pair.advance(2)
            self.assertEqual(self.engine.asked, [ALICE.id] * looks)
        self.runs("web1")
        self.pair.advance(2)
        self.assertIn(OPENED, channel.output)
        self.pair.type(channel, b"root\x03")
        self.assertEqual(self.guests.guest.typed, b"root\x03")
        self.pair.type(channel, b"\x1d.")
        self.assertEqual((channel.status, channel.error), (0, WAITING))

    def test_ways_to_name_it(self) -> None:
        """It can be waited for by its name, or its id, in any case of that."""
        for named in (b"web1", b"--vm-name web1", b"--vm-id ID-web1", b"id-WEB1"):
            self.make()
            channel = self.pair.run(b"connect --wait " + named, pty=True)
            self.assertIn(b"Waiting for it", channel.error)
            self.runs("web1")
            self.pair.advance(2)
            self.assertIn(OPENED, channel.output)
            self.pair.type(channel, b"\x1d.")
            self.assertEqual(channel.status, 0)

    def test_beginning(self) -> None:
        """Another one whose name or id begins like that is not what is waited for, whether it is
        there before or comes meanwhile."""
        self.runs("web10")
        channel = self.waits()
        self.runs("web11")
        self.pair.advance(4)
        self.assertEqual((self.guests.asked, channel.status), ([], None))
        self.runs("web1")
        self.pair.advance(2)
        self.assertEqual(self.guests.asked, [("web1", "open")])

    def test_there_by_now(self) -> None:
        """One that is there, or has come since the engine was asked last, is not waited for."""
        self.pair.run(b"list")
        self.runs("web1")
        channel = self.pair.run(b"connect --wait web1", pty=True)
        self.assertEqual(channel.error, b"")
        self.assertIn(OPENED, channel.output)

    def test_gives_up(self) -> None:
        """Ctrl-C, and ``^] .``, give up at once, with a line and 1; the engine is asked no more."""
        for keys in (b"\x03", b"ls\r\x03more", b"\x1d.", b"\x1dq", b"x\x1d.\x1d"):
            self.make()
            channel = self.waits()
            self.pair.advance(3)
            self.pair.type(channel, keys)
            self.assertEqual((channel.status, channel.error), (1, GAVE_UP), keys)
            self.engine.asked.clear()
            self.runs("web1")
            self.pair.advance(60)
            self.assertEqual((self.engine.asked, self.guests.asked), ([], []))

    def test_gives_up_key_by_key(self) -> None:
        """The escape character and its key may come apart; typed twice it means nothing."""
        channel = self.waits()
        for key in b"\x1d\x1d.":
            self.pair.type(channel, bytes([key]))
        self.assertIsNone(channel.status)
        for key in b"\x1d.":
            self.pair.type(channel, bytes([key]))
        self.assertEqual(channel.status, 1)

    def test_gives_up_and_it_is_found(self) -> None:
        """Who gave up while the engine was asked is not on a console then, whatever it says."""
        channel = self.waits()
        gate: Deferred[None] = Deferred()
        self.engine.consoles_gate = gate
        self.pair.advance(2)
        self.pair.type(channel, b"\x03")
        self.runs("web1")
        gate.callback(None)
        self.pair.flush()
        self.assertEqual((channel.status, channel.error), (1, GAVE_UP))
        self.assertEqual(self.guests.asked, [])

    def test_gives_up_while_the_engine_thinks(self) -> None:
        """It gives up at once also when the engine takes its time."""
        channel = self.waits()
        self.engine.consoles_gate = Deferred()
        self.pair.advance(2)
        self.pair.type(channel, b"\x03")
        self.assertEqual((channel.status, channel.error), (1, GAVE_UP))

    def test_gave_up_before(self) -> None:
        """Ctrl-C that was typed before it was known that one has to wait gives up, too."""
        gate: Deferred[None] = Deferred()
        self.engine.consoles_gate = gate
        channel = self.pair.run(b"connect --wait web1", pty=True)
        self.pair.type(channel, b"\x03")
        self.engine.consoles_gate = None
        gate.callback(None)
        self.pair.flush()
        self.assertEqual((channel.status, channel.error), (1, GAVE_UP))

    def test_other_keys(self) -> None:
        """Any other key rings the bell, and does not reach the guest when it is there."""
        channel = self.waits()
        for keys in (b"l", b"s\r", b"\x1dt", b"\x1b[A"):
            channel.output = b""
            self.pair.type(channel, keys)
            self.assertEqual(channel.output, BELL, keys)
        self.runs("web1")
        self.pair.advance(2)
        self.assertIn(OPENED, channel.output)
        self.pair.type(channel, b"on")
        self.assertEqual(self.guests.guest.typed, b"on")

    def test_no_escape(self) -> None:
        """Without an escape character Ctrl-C is the one way."""
        self.make(escape="")
        channel = self.waits()
        self.pair.type(channel, b"\x1d.")
        self.assertEqual((channel.status, channel.output), (None, BELL))
        self.pair.type(channel, b"\x03")
        self.assertEqual(channel.status, 1)

    def test_a_flood_of_keys(self) -> None:
        """Who types a lot takes no memory of ours: their window stays open, or is shut."""
        channel = self.waits()
        for _ in range(20):
            self.pair.type(channel, b"x" * 65536)
        self.assertIsNone(channel.status)
        self.assertLessEqual(len(channel.output), 65536)
        self.assertEqual(set(channel.output), {7})
        self.assertEqual(channel.buf, b"")

    def test_engine_errors(self) -> None:
        """While the engine fails, or does not answer, one waits on; old answers are told once."""
        channel = self.waits()
        for error in (EngineError("500"), EngineUnreachable("no answer")):
            self.engine.error = error
            for _ in range(10):
                self.pair.advance(2)
            self.assertIsNone(channel.status)
        self.assertEqual(
            channel.error,
            WAITING + b"[engine unreachable: using its answer from 22 seconds ago]\r\n",
        )
        self.pair.advance(300)
        self.runs("web1")
        self.engine.error = None
        self.pair.advance(2)
        self.assertIn(OPENED, channel.output)

    def test_ambiguous(self) -> None:
        """When it turns out that several have the name it is over at once."""
        channel = self.waits()
        self.engine.vms[ALICE.id] += [console("web1", "1"), console("web1", "2")]
        self.pair.advance(2)
        self.assertEqual(channel.status, 1)
        self.assertIn(b"ERROR: web1 could be web1 [1], web1 [2].", channel.error)
        self.assertEqual(self.guests.asked, [])

    def test_channel_closes(self) -> None:
        """It ends with the channel, whatever is under way."""
        for thinks in (False, True):
            self.make()
            channel = self.waits()
            self.engine.consoles_gate = Deferred() if thinks else None
            self.pair.advance(2.5)
            channel.loseConnection()
            self.pair.flush()
            self.assertTrue(channel.gone)
            self.assertEqual(self.pair.timers(), [])
            self.assertEqual(channel.error, WAITING)
            self.engine.asked.clear()
            self.pair.advance(10)
            self.assertEqual(self.engine.asked, [])

    def test_login_is_revoked(self) -> None:
        """It ends with the login."""
        self.pair.permissions.startService()
        channel = self.pair.run(b"connect --wait web1", pty=True)
        self.engine.keys = []
        for _ in range(20):
            self.pair.advance(2)
        self.assertEqual(channel.status, 1)
        self.assertNotIn(b"gave up", channel.error)
        self.engine.asked.clear()
        self.pair.permissions.stopService()
        self.pair.advance(10)
        self.assertEqual(self.engine.asked, [])

    def test_input_ends(self) -> None:
        """Who can type no more waits, and has left again soon after it has come."""
        channel = self.waits()
        self.pair.connection.sendEOF(channel)
        self.pair.advance(10)
        self.assertIsNone(channel.status)
        self.runs("web1")
        for _ in range(10):
            self.pair.advance(2)
        self.assertIn(OPENED, channel.output)
        self.assertEqual(channel.status, 0)

    def test_others(self) -> None:
        """Two wait for it, each for themselves; who gives up leaves the other waiting."""
        first = self.waits()
        second = self.pair.run(b"connect --wait web1", pty=True)
        self.pair.type(first, b"\x03")
        self.runs("web1")
        self.pair.advance(2)
        self.assertEqual((first.status, second.status), (1, None))
        self.assertIn(OPENED, second.output)


class NoWaitTests(WaitTestCase):
    """When nobody waits."""

    def test_not_asked_to(self) -> None:
        """Without ``--wait`` it is refused at once, with what is known of it."""
        for line in (b"web1", b"connect web1", b"watch web1", b"log web1", b"who web1"):
            channel = self.pair.run(line, pty=True)
            self.assertEqual((channel.status, channel.output), (1, b""))
            self.assertEqual(channel.error, f"ERROR: {NOT_THERE}\r\n".encode())

    def test_all_are_listed(self) -> None:
        """Where the engine tells of VMs that are off, too, one that is not listed is none."""
        self.make("")
        channel = self.pair.run(b"connect --wait web1", pty=True)
        self.assertEqual(channel.status, 1)
        self.assertTrue(channel.error.startswith(b"ERROR: web1 is none of your VMs"))

    def test_engine_is_away(self) -> None:
        """When it cannot even be asked first, that is told."""
        self.engine.error = EngineUnreachable("The engine does not answer.")
        channel = self.pair.run(b"connect --wait web1", pty=True)
        self.assertEqual((channel.status, channel.error[:6]), (1, b"ERROR:"))

    def test_no_terminal(self) -> None:
        """Nobody waits without a terminal."""
        channel = self.pair.run(b"connect --wait web1")
        self.assertEqual(channel.status, 1)
        self.assertIn(b"needs a terminal", channel.error)

    def test_no_vm(self) -> None:
        """``connect --wait`` alone is for the VM that is chosen, and one that is there."""
        channel = self.pair.run(b"connect --wait", pty=True)
        self.assertIn(b"db on node1", channel.output)
        self.engine.vms[ALICE.id] = []
        self.pair.advance(60)
        channel = self.pair.run(b"connect --wait", pty=True)
        self.assertEqual(channel.status, 1)
        self.assertIn(b"There is no console for alice@internal: no VM is running", channel.error)


class OverTests(WaitTestCase):
    """It is listed, and cannot be opened yet."""

    def test_waits_on(self) -> None:
        """One waits there, too, without being told why twice; keys go nowhere, which is said
        once, and each rings the bell."""
        channel = self.waits()
        self.guests.answer = ConsoleUnavailable("web1 has no console yet.")
        self.runs("web1")
        self.pair.type(channel, b"x")
        channel.output = b""
        self.pair.advance(2)
        self.assertEqual(
            channel.output,
            b"\r\n" + line("web1 has no console yet. Waiting for it; Ctrl-C gives up."),
        )
        self.pair.advance(60)
        channel.output = b""
        nowhere = b"\r\n" + line("web1 is away: what you type goes nowhere.")
        for shown in (BELL + nowhere, BELL):
            self.pair.type(channel, b"ls")
            self.assertEqual(channel.output, shown)
            channel.output = b""
        self.guests.answer = None
        self.pair.advance(5)
        self.assertIn(OPENED, channel.output)
        self.pair.type(channel, b"on")
        self.assertEqual(self.guests.guest.typed, b"on")

    def test_known_problem(self) -> None:
        """One whose console the engine says cannot be opened is tried for all the same: what its
        host says is told, one waits on, and is on the console when that can be opened."""
        self.guests.answer = ConsoleUnavailable("web1 has no console device.")
        self.engine.vms[ALICE.id] = [
            msgspec.structs.replace(console("web1"), problem="no console device")
        ]
        channel = self.pair.run(b"connect --wait web1", pty=True)
        self.pair.advance(60)
        self.assertIsNone(channel.status)
        self.assertIn(
            line("web1 has no console device. Waiting for it; Ctrl-C gives up."), channel.output
        )
        self.guests.answer = None
        self.pair.advance(5)
        self.assertIn(OPENED, channel.output)

    def test_gives_up(self) -> None:
        """Ctrl-C gives up there, too; the audit has it."""
        channel = self.waits()
        self.guests.answer = ConsoleUnavailable("web1 has no console yet.")
        self.runs("web1")
        self.pair.advance(3)
        self.pair.type(channel, b"\x03")
        self.assertEqual(channel.status, 1)
        self.assertEqual(channel.error, WAITING + b"ERROR: You gave up web1.\r\n")
        self.assertEqual(len(self.pair.events.named("attach_failed")), 1)

    def test_gone_again(self) -> None:
        """One that is gone again by then is waited for on."""
        channel = self.waits()
        self.guests.answer = ConsoleUnavailable("web1 has no console yet.")
        self.runs("web1")
        self.pair.advance(2)
        self.engine.vms[ALICE.id] = []
        self.pair.advance(60)
        self.assertIsNone(channel.status)
        self.runs("web1")
        self.guests.answer = None
        self.pair.advance(5)
        self.assertIn(OPENED, channel.output)


class ParseTests(SynchronousTestCase):
    """What a command line asks for."""

    def test_wait(self) -> None:
        """``--wait`` stands anywhere behind ``connect``, and needs it."""
        for text, request in (
            (b"connect --wait web1", Request(vm="web1", wait=True)),
            (b"connect web1 --wait", Request(vm="web1", wait=True)),
            (b"connect --wait --vm-id 1", Request(vm_id="1", wait=True)),
            (b"connect --vm-name=web1 --wait", Request(vm_name="web1", wait=True)),
            (b"connect --force web1 --wait", Request(vm="web1", wait=True, force=True)),
            (b"connect --wait", Request(wait=True)),
            (b"connect web1", Request(vm="web1")),
            (b"connect -- --wait", Request(vm="--wait")),
            (b"connect connect", Request(vm="connect")),
            (b"web1", Request(vm="web1")),
        ):
            self.assertEqual(parse(text), request, text)

    def test_mistakes(self) -> None:
        """A VM is named in one way, and once; an option has its whole name, and no value."""
        for text in (
            b"connect web1 --vm-id 1",
            b"connect --vm-id 1 web1",
            b"connect --wait --vm-id 1 web1",
            b"connect web1 --vm-name web1",
            b"connect --vm-id 1 --vm-name web1",
            b"connect web1 web2",
            b"connect ''",
            b"connect --vm-id ''",
            b"connect --vm-id",
            b"connect --wai web1",
            b"connect --wait=1 web1",
            b"--wait web1",
            b"--wait",
            b"web1 --wait",
            b"watch --wait web1",
            b"log --wait web1",
        ):
            self.assertRaises(CommandSyntaxError, parse, text)

    def test_many_words(self) -> None:
        """A line of more words than any command has is refused before argparse sees it, which
        would take long."""
        parse(b"connect --vm-id 1" + b" --wait" * 13)
        for text in (b"connect --vm-id 1" + b" --wait" * 14, b"connect" + b" --a" * 1000):
            with self.assertRaisesRegex(CommandSyntaxError, "more than 16 words"):
                parse(text)

    def test_names_vm(self) -> None:
        """It is known whether a VM is named."""
        for text, named in ((b"connect --wait", False), (b"connect --vm-id 1", True)):
            self.assertEqual(parse(text).names_vm, named)
