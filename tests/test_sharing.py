"""Several users on one console, over ssh in memory: what each of them sees, line by line."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ed25519
from twisted.conch.ssh.keys import Key
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes import console
from tests.sshpair import ALICE, SSHPair
from vmconsole.config import Config
from vmconsole.config import Console as Settings
from vmconsole.errors import ConsoleBusy, ConsoleUnavailable
from vmconsole.interfaces import AuthorizedKey, User

BOB, VERA = User(id="u-bob", name="bob@internal"), User(id="u-vera", name="vera@internal")
BOB_KEY, VERA_KEY = (Key(ed25519.Ed25519PrivateKey.generate()) for _ in range(2))
A, B = "alice@internal from 192.0.2.7", "bob@internal from 192.0.2.7"
OPENED = "vm1 on node1. To leave: ^] . (help: ^] ?)"
QUERY = b"\x1b[6n"
_LINE = re.compile(rb"^\[vmconsole: (.*)\]\r$", re.MULTILINE)


class SharingTestCase(SynchronousTestCase):
    """Alice and Bob may use vm1 and vm2; Vera may watch vm1."""

    settings = Settings(linger=0.0)

    def setUp(self) -> None:
        self.alice = SSHPair(Config(console=self.settings))
        self.engine, self.guests, self.pool = self.alice.engine, self.alice.guests, self.alice.pool
        for user, key in ((BOB, BOB_KEY), (VERA, VERA_KEY)):
            self.engine.keys.append(AuthorizedKey(user.id, user.name, key.public().blob()))
        for user in (ALICE, BOB):
            self.engine.vms[user.id] = [console("vm1"), console("vm2")]
        self.engine.vms[VERA.id] = [console("vm1", role="viewer")]
        self.alice.login()
        self.everybody = [self.alice]
        self.bob = self.logged_in(BOB_KEY)
        self.shown: dict[Any, int] = {}
        self.stops: list[Callable[[], Any]] = []

    def tearDown(self) -> None:
        """When all are gone nothing is left: no console, no stream, nothing that waits."""
        for pair in self.everybody:
            pair.client_io.loseConnection()
        for stop in self.stops:
            stop()
        self.flush()
        self.alice.advance(self.settings.linger and self.settings.linger + 1)
        self.assertEqual(len(self.pool), 0)
        self.assertFalse(any(guest.open for guest in self.guests.opened))
        for guest in self.guests.opened:
            self.assertEqual(guest.protocol.attachments, [])
        self.assertEqual(self.alice.timers(), [])

    def looks_again(self) -> None:
        """The engine is asked again, every 15 seconds."""
        self.alice.permissions.startService()
        self.stops.append(self.alice.permissions.stopService)

    def logged_in(self, key: Key) -> SSHPair:
        """Another user's connection."""
        pair = self.alice.beside()
        pair.auth.sign(b"vmproxy", key)
        pair.flush()
        self.assertTrue(pair.connection.up)
        self.everybody.append(pair)
        return pair

    def flush(self) -> None:
        """Let everybody finish what they have to say."""
        for pair in self.everybody * 2:
            pair.flush()

    def passes(self, seconds: float) -> None:
        """Time passes."""
        self.alice.clock.advance(seconds)
        self.flush()

    def on(self, pair: SSHPair, line: bytes = b"vm1", **options: Any) -> Any:
        """A user's channel on a console."""
        channel = pair.run(line, pty=True, **options)
        self.flush()
        self.assertIsNone(channel.status, channel.error)
        return channel

    def both(self) -> tuple[Any, Any]:
        """Alice has the keyboard, Bob watches; what they were told until now is of no interest."""
        channels = self.on(self.alice), self.on(self.bob)
        for channel in channels:
            self.lines(channel)
        return channels

    def type(self, channel: Any, data: bytes) -> None:
        """Somebody types."""
        channel.write(data)
        self.flush()

    def new(self, channel: Any) -> bytes:
        """What a user got since the last time."""
        self.flush()
        before = self.shown.get(channel, 0)
        self.shown[channel] = len(channel.output)
        return bytes(channel.output[before:])

    def lines(self, channel: Any) -> list[str]:
        """Our own lines among that."""
        return [line.decode() for line in _LINE.findall(self.new(channel))]

    @property
    def typed(self) -> bytes:
        """What the guest got."""
        return self.guests.guest.typed


class ScreenTests(SharingTestCase):
    """What Alice and Bob see."""

    def test_alone(self) -> None:
        """Who is alone has the keyboard, and no line says so."""
        self.assertEqual(self.lines(self.on(self.alice)), [OPENED])

    def test_a_session(self) -> None:
        """Bob comes, asks, is given it, and Alice takes it back: each line of both."""
        alice = self.on(self.alice)
        self.guests.guest.print(b"login: ")
        self.type(alice, b"root")
        self.passes(130)
        bob = self.on(self.bob)
        self.assertEqual(
            self.new(bob),
            f"\r\n[vmconsole: {OPENED}]\r\n"
            f"\r\n[vmconsole: You watch. {A} has the keyboard, held for 2 minutes, idle for "
            "2 minutes. ^] t asks for the keyboard.]\r\n"
            "\r\n[vmconsole: What vm1 printed last:]\r\n\x1b[mlogin: ".encode(),
        )
        self.type(alice, b"\r")
        self.guests.guest.print(b"Password: ")
        self.assertEqual(self.new(bob), b"Password: ")
        self.lines(alice)
        self.type(bob, b"\x1dt")
        self.assertEqual(
            self.lines(bob),
            [
                f"{A} has the keyboard, held for 2 minutes, idle for 0 seconds. They were asked; "
                "60 seconds after their last key it passes. ^] t again takes it."
            ],
        )
        self.assertEqual(
            self.lines(alice),
            [
                f"{B} asks for the keyboard; 60 seconds after your last key it passes. ^] t gives "
                "it, ^] n keeps it."
            ],
        )
        self.type(alice, b"\x1dt")
        self.assertEqual(self.lines(bob), [f"{A} gave it. You have the keyboard."])
        self.assertEqual(
            self.lines(alice),
            [f"{A} gave it. {B} has the keyboard now; you watch. ^] t asks for it."],
        )
        self.type(bob, b"secret\r")
        self.type(alice, b"\x1dt\x1dt")
        self.assertEqual(self.lines(alice)[-1], f"{A} took it. You have the keyboard.")
        self.assertEqual(
            self.lines(bob)[-1],
            f"{A} took it. {A} has the keyboard now; you watch. ^] t asks for it.",
        )
        self.type(bob, b"lost")
        self.assertEqual(self.typed, b"root\rsecret\r")

    def test_keep(self) -> None:
        """``^] n`` keeps the keyboard; both hear it."""
        alice, bob = self.both()
        self.type(bob, b"\x1dt")
        self.lines(alice), self.lines(bob)
        self.type(alice, b"\x1dn")
        self.assertEqual(self.lines(alice), [f"You keep the keyboard; {B} is told."])
        self.assertEqual(self.lines(bob), [f"{A} keeps the keyboard. ^] t again takes it."])
        self.passes(100)
        self.type(alice, b"on")
        self.assertEqual(self.typed, b"on")

    def test_typed_without_it(self) -> None:
        """Keys of who watches go nowhere: the bell for each, and one line, again after the
        keyboard was theirs."""
        alice, bob = self.both()
        told = f"You watch. {A} has the keyboard, held for 0 seconds, idle for 0 seconds."
        self.type(bob, b"ls\r")
        self.assertEqual(
            self.new(bob), f"\x07\r\n[vmconsole: {told} ^] t asks for it.]\r\n".encode()
        )
        self.type(bob, b"x")
        self.assertEqual(self.new(bob), b"\x07")
        self.type(bob, b"\x1dt")
        self.type(alice, b"\x1dt")
        self.type(bob, b"bob")
        self.type(alice, b"\x1dt\x1dt")
        self.lines(bob)
        self.type(bob, b"x")
        self.assertEqual(len(self.lines(bob)), 1)
        self.type(bob, b"x\x1dzx")
        self.assertEqual(self.new(bob), b"\x07")
        self.assertEqual(self.typed, b"bob")

    def test_early_keys(self) -> None:
        """What was typed before the console was open is the guest's for who gets the keyboard; who
        does not is told that it went nowhere."""
        gate: Deferred[None] = Deferred()
        self.guests.answer = gate
        alice, bob = self.on(self.alice), self.on(self.bob)
        self.type(bob, b"from bob")
        self.type(alice, b"from alice")
        gate.callback(None)
        self.flush()
        self.assertEqual(self.typed, b"from alice")
        self.assertEqual(self.lines(alice), [OPENED])
        lines = self.lines(bob)
        self.assertEqual(lines[2:], ["What you typed until now went nowhere."])
        self.assertTrue(lines[1].startswith(f"You watch. {A} has the keyboard"))
        self.type(bob, b"x")
        self.assertEqual(self.new(bob), b"\x07")

    def test_queries(self) -> None:
        """What the guest asks of a terminal is asked of that of the holder alone."""
        alice, bob = self.both()
        self.guests.guest.print(b"a" + QUERY + b"b")
        self.assertEqual((self.new(alice), self.new(bob)), (b"a" + QUERY + b"b", b"ab"))
        self.type(bob, b"\x1dt\x1dt")
        self.new(alice), self.new(bob)
        self.guests.guest.print(b"a" + QUERY + b"b")
        self.assertEqual((self.new(alice), self.new(bob)), (b"ab", b"a" + QUERY + b"b"))

    def test_leaving(self) -> None:
        """Who leaves with the keyboard passes it on, by name; so does a connection that dies."""
        alice, bob = self.both()
        self.type(alice, b"\x1d.")
        self.assertEqual(self.lines(alice), ["You left vm1."])
        self.assertEqual(self.lines(bob), [f"{A} left. You have the keyboard."])
        alice = self.on(self.alice)
        self.lines(alice)
        self.type(bob, b"bob")
        self.bob.client_io.loseConnection()
        self.assertEqual(self.lines(alice), [f"{B} left. You have the keyboard."])
        self.type(alice, b"alice")
        self.assertEqual(self.typed, b"bobalice")

    def test_asked_of_the_dead(self) -> None:
        """A holder whose connection hangs keeps the keyboard no longer than a minute: and when it
        ends at last nothing changes."""
        alice, bob = self.both()
        alice.reads_no_more = True
        self.type(bob, b"\x1dt")
        self.passes(61)
        self.assertEqual(
            self.lines(bob)[-1], f"{A} was idle for 61 seconds. You have the keyboard."
        )
        self.alice.client_io.loseConnection()
        self.assertEqual(self.lines(bob), [])
        self.type(bob, b"bob")
        self.assertEqual(self.typed, b"bob")

    def test_watch(self) -> None:
        """``watch VM`` does not get a keyboard that is free; who comes next does, and is told of
        the watcher, and the watcher of them. When they leave it stays free."""
        bob = self.on(self.bob, b"watch vm1")
        self.assertEqual(
            self.lines(bob),
            [OPENED, "You watch. Nobody has the keyboard. ^] t takes the keyboard."],
        )
        alice = self.on(self.alice)
        self.assertEqual(
            self.lines(alice),
            [OPENED, "You have the keyboard; others watch. ^] w lists them."],
        )
        self.assertEqual(self.lines(bob), [f"{A} has the keyboard now."])
        self.type(alice, b"\x1d.")
        self.assertEqual(self.lines(bob), [f"{A} left. Nobody has the keyboard. ^] t takes it."])
        self.type(bob, b"x\x1dtbob")
        self.assertEqual(self.lines(bob)[-1], "You have the keyboard.")
        self.assertEqual(self.typed, b"bob")

    def test_viewer(self) -> None:
        """A viewer watches, and can do nothing else, whatever they press; nor do they inherit."""
        vera = self.on(self.logged_in(VERA_KEY))
        self.assertEqual(
            self.lines(vera), [OPENED, "You may only watch vm1. Nobody has the keyboard."]
        )
        alice = self.on(self.alice)
        self.type(alice, b"\x1dz")
        self.lines(vera)
        for keys in (b"x", b"\x1dt", b"\x1dt", b"\x1db", b"\x1dsh", b"\x1dz", b"\x1d\x1d"):
            self.type(vera, keys)
            for line in self.lines(vera):
                self.assertIn("You may only watch vm1", line)
        self.type(alice, b"\x1d.")
        self.type(vera, b"x")
        self.assertEqual(self.typed, b"stty rows 24 cols 80\r")
        self.assertEqual(self.lines(vera), [f"{A} left. Nobody has the keyboard."])
        self.assertEqual([what for _, what in self.guests.asked], ["open"])

    def test_own_second_session(self) -> None:
        """Two sessions of one user share as those of two do, also on one connection."""
        first, second = self.on(self.alice), self.on(self.alice)
        self.assertIn(f"You watch. {A} has the keyboard", self.lines(second)[1])
        self.type(second, b"\x1dt\x1dt")
        self.type(first, b"1")
        self.type(second, b"2")
        self.assertEqual(self.typed, b"2")

    def test_who_key(self) -> None:
        """``^] w`` lists everybody, the holder first, in lines below each other."""
        _, bob = self.both()
        self.new(bob)
        self.type(bob, b"\x1dw")
        self.assertEqual(
            self.new(bob),
            f"\r\n[vmconsole: {A}: here for 0 seconds, has the keyboard, idle for 0 seconds]\r\n"
            f"[vmconsole: {B}: here for 0 seconds, watches]\r\n".encode(),
        )

    def test_no_escape_character(self) -> None:
        """Where there is none, no line names a key."""
        self.settings = Settings(linger=0.0, escape="")
        self.setUp()
        _, bob = self.on(self.alice), self.on(self.bob)
        self.type(bob, b"x")
        self.assertNotIn("^]", "".join(self.lines(bob)))
        self.assertNotIn(b"{key}", bob.output)


class FlowTests(SharingTestCase):
    """Somebody is slow."""

    def test_stuck_guest(self) -> None:
        """The keyboard passes also while the guest takes no input; what the old holder's client
        still holds back goes nowhere, what was typed before stays in order."""
        alice, bob = self.both()
        self.guests.guest.producer.pauseProducing()
        self.type(alice, b"a" * 1000000)
        taken = len(self.typed)
        self.assertLess(taken, 200000)
        self.type(bob, b"\x1dt\x1dtbob")
        self.guests.guest.producer.resumeProducing()
        self.flush()
        self.assertEqual(self.typed, b"a" * taken + b"bob")
        self.assertEqual(alice.buf, b"")
        self.assertIn(f"{B} took it.", self.lines(alice)[1])
        self.type(bob, b"b" * 1000000)
        self.assertEqual(len(self.typed), taken + 3 + 1000000)

    def test_leaves_while_stuck(self) -> None:
        """A watcher can leave while the guest takes no input."""
        alice, bob = self.both()
        self.guests.guest.producer.pauseProducing()
        self.type(bob, b"\x1d.")
        self.assertEqual(bob.status, 0)
        self.type(alice, b"\x1d.")
        self.assertEqual(alice.status, 0)

    def test_slow_holder(self) -> None:
        """A holder who reads nothing is asked, and loses it in time; what they see later is in
        order, and has no query in it."""
        alice = self.on(self.alice, window=300, reads_no_more=True)
        bob = self.on(self.bob)
        for output in (b"x" * 1000, QUERY):
            self.guests.guest.print(output)
            self.flush()
        self.type(bob, b"\x1dt")
        self.passes(61)
        self.type(bob, b"bob")
        self.guests.guest.print(b"later")
        self.flush()
        self.assertEqual(self.typed, b"bob")
        self.alice.connection.grant(alice, 1 << 20)
        self.flush()
        seen = alice.output.decode()
        self.assertNotIn("\x1b[6n", seen)
        self.assertRegex(
            seen,
            r"(?s)x{1000}.*\[vmconsole: bob\S+ from \S+ asks for the keyboard; .*"
            r"bob\S+ from \S+ has the keyboard now; you watch.*later$",
        )

    def test_tells_are_bounded(self) -> None:
        """What others do with the keyboard piles up for nobody who reads nothing."""
        slow = self.on(self.alice, b"watch vm1", window=300, reads_no_more=True)
        alice, bob = self.both()
        for _ in range(300):
            self.type(bob, b"\x1dt\x1dt")
            self.type(alice, b"\x1dt\x1dt")
        server = next(iter(self.alice.server.service.channels.values()))
        self.assertLess(server._waiting_output, 2000)
        [attachment] = [
            one for one in self.guests.guest.protocol.attachments if not one.wants_keyboard
        ]
        self.assertGreater(len(attachment._backlog), 30000)
        self.alice.connection.grant(slow, 1 << 20)
        self.flush()
        self.assertEqual(slow.output.count(b" took it."), 600)


class CloggedTests(SharingTestCase):
    """A guest that takes no input."""

    def test_no_more(self) -> None:
        """When more waits for it than two clients can send at once, what else is typed goes
        nowhere, and who types is told, once."""
        alice = self.on(self.alice)
        self.lines(alice)
        self.guests.guest.unsent = 262145
        self.type(alice, b"a")
        self.type(alice, b"b")
        shown = self.new(alice)
        self.assertEqual(shown.count(b"\x07"), 2)
        self.assertEqual(shown.count(b"[vmconsole: vm1 takes no input: what you type now"), 1)
        self.assertEqual(self.typed, b"")
        self.guests.guest.unsent = 262144
        self.type(alice, b"c")
        self.assertEqual(self.typed, b"c")


class ReplayTests(SharingTestCase):
    """``^] r`` and who comes later."""

    def test_twice(self) -> None:
        """Each time the same, set apart by a line; output goes on after it."""
        alice = self.on(self.alice)
        self.guests.guest.print(b"one\r\n" + QUERY + b"$ ")
        self.flush()
        self.new(alice)
        self.type(alice, b"\x1dr\x1dr")
        again = b"\r\n[vmconsole: What vm1 printed last:]\r\n\x1b[mone\r\n$ "
        self.assertEqual(self.new(alice), again * 2)
        self.guests.guest.print(QUERY)
        self.assertEqual(self.new(alice), QUERY)
        self.assertEqual(self.typed, b"")

    def test_nothing(self) -> None:
        """Of a guest that has printed nothing nothing is shown, and no line."""
        alice = self.on(self.alice)
        self.new(alice)
        self.type(alice, b"\x1dr")
        self.assertEqual(self.new(alice), b"")

    def test_many(self) -> None:
        """Who asks for it, or for who is here, and takes no output gets no more than they take:
        the bell, until they have."""
        alice = self.on(self.alice, window=300, reads_no_more=True)
        self.guests.guest.print(b"x" * 60000)
        self.flush()
        self.type(alice, b"\x1dr\x1dw" * 10000)
        [attachment] = self.guests.guest.protocol.attachments
        self.assertLess(len(attachment._backlog), 70000)
        self.alice.connection.grant(alice, 1 << 20)
        self.flush()
        self.assertEqual(alice.output.count(b"x" * 60000), 1)
        self.assertIn(b"\x07", alice.output)
        self.type(alice, b"\x1dr")
        self.assertEqual(alice.output.count(b"printed last"), 1)

    def test_quiet_hint(self) -> None:
        """Who is shown what was printed last is not told that the guest is quiet."""
        self.settings = Settings(linger=60.0)
        self.setUp()
        alice = self.on(self.alice)
        self.guests.guest.print(b"$ ")
        self.type(alice, b"\x1d.")
        again = self.on(self.bob)
        self.passes(3)
        self.assertEqual(self.lines(again), [OPENED, "What vm1 printed last:"])
        self.assertEqual(len(self.guests.opened), 1)


class ControlTests(SharingTestCase):
    """BREAK, SysRq, and the size."""

    def gated(self) -> Deferred[bytes]:
        """The host takes its time for a SysRq."""
        gate: Deferred[bytes] = Deferred()

        async def send_sysrq(info: Any, letter: str) -> bytes:
            self.guests.asked.append((info.vm_name, f"sysrq {letter}"))
            return await gate

        self.guests.send_sysrq = send_sysrq  # type: ignore[method-assign]
        return gate

    def asked(self) -> list[str]:
        """What was asked of the host, beside opening consoles."""
        return [what for _, what in self.guests.asked if what != "open"]

    def test_break(self) -> None:
        """``^] b`` and ssh's own break send BREAK, and say so; nothing is typed."""
        alice = self.on(self.alice)
        self.lines(alice)
        self.type(alice, b"\x1db")
        sent = self.alice.connection.sendRequest(
            alice, b"break", struct.pack(">L", 500), wantReply=True
        )
        self.assertEqual(self.lines(alice), ["BREAK was sent."] * 2)
        self.successResultOf(sent)
        self.assertEqual((self.asked(), self.typed), (["break", "break"], b""))

    def test_break_elsewhere(self) -> None:
        """Where there is no console a break is refused, as is one that makes no sense."""
        menu = self.alice.run(pty=True)
        alice = self.on(self.alice)
        for channel, data in ((menu, struct.pack(">L", 500)), (alice, b"")):
            sent = self.alice.connection.sendRequest(channel, b"break", data, wantReply=True)
            self.flush()
            self.failureResultOf(sent)
        self.assertEqual(self.asked(), [])

    def test_sysrq(self) -> None:
        """``^] s`` and a key is a SysRq; the letter that completes it is typed."""
        alice = self.on(self.alice)
        self.lines(alice)
        self.type(alice, b"\x1dsH!")
        self.guests.types_sysrq = False
        self.type(alice, b"\x1dsb!")
        self.assertEqual(self.lines(alice), ["SysRq h was sent.", "SysRq b was sent."])
        self.assertEqual((self.asked(), self.typed), (["sysrq h", "sysrq b"], b"h!!"))

    def test_refusal(self) -> None:
        """When it cannot be sent the user is told why, and typing goes on."""
        self.guests.refusal = ConsoleUnavailable("BREAK is not allowed here.")
        alice = self.on(self.alice)
        self.lines(alice)
        self.type(alice, b"\x1dbx\x1dshy")
        self.assertEqual(self.lines(alice), ["BREAK is not allowed here."] * 2)
        self.assertEqual(self.typed, b"xy")

    def test_a_bug(self) -> None:
        """An error of our own is logged, and typing goes on."""
        gate = self.gated()
        alice = self.on(self.alice)
        self.type(alice, b"\x1dshx")
        gate.errback(ZeroDivisionError())
        self.flush()
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.type(alice, b"y")
        self.assertEqual(self.typed, b"xy")

    def test_without_the_keyboard(self) -> None:
        """Who watches sends neither, and is told who has the keyboard."""
        _, bob = self.both()
        self.type(bob, b"\x1db\x1dsh")
        self.bob.connection.sendRequest(bob, b"break", struct.pack(">L", 500))
        lines = self.lines(bob)
        self.assertEqual(len(lines), 3)
        for line in lines:
            self.assertTrue(line.startswith(f"You watch. {A} has the keyboard"), line)
        self.assertEqual((self.asked(), self.typed), ([], b""))

    def test_typed_meanwhile(self) -> None:
        """Keys that are typed while a SysRq is under way come after its letter; another one
        meanwhile only rings."""
        gate = self.gated()
        alice = self.on(self.alice)
        self.type(alice, b"before\x1dsh")
        self.type(alice, b"af")
        self.new(alice)
        for keys in (b"\x1dsb", b"\x1dbter"):
            self.type(alice, keys)
            self.assertEqual(self.new(alice), b"\x07")
        self.assertEqual((self.asked(), self.typed), (["sysrq h"], b"before"))
        gate.callback(b"h")
        self.flush()
        self.assertEqual(self.typed, b"beforehafter")

    def test_passes_meanwhile(self) -> None:
        """A keyboard that passes while a SysRq is under way puts nothing between BREAK and the
        letter, whatever the new holder types."""
        gate = self.gated()
        alice, bob = self.both()
        self.type(alice, b"\x1dsh")
        self.type(bob, b"\x1dt\x1dtb")
        self.assertEqual(self.lines(bob)[-1], f"{B} took it. You have the keyboard.")
        self.type(alice, b"lost")
        self.assertEqual(self.typed, b"")
        gate.callback(b"h")
        self.flush()
        self.assertEqual(self.typed, b"hb")
        self.assertEqual(self.lines(alice)[-1], "SysRq h was sent.")
        self.type(bob, b"on")
        self.assertEqual(self.typed, b"hbon")

    def test_leaves_meanwhile(self) -> None:
        """Who leaves while theirs is under way completes it all the same; its line is shown on no
        other screen, as the menu is."""
        gate = self.gated()
        alice, bob = self.both()
        self.type(alice, b"\x1dsh\x1dm")
        self.assertTrue(self.new(alice).endswith(b"\r\n> "))
        self.type(bob, b"b")
        gate.callback(b"h")
        self.flush()
        self.assertEqual(self.typed, b"hb")
        self.assertEqual(self.new(alice), b"")

    def test_counts_as_use(self) -> None:
        """A holder who sends BREAK is not idle."""
        alice, bob = self.both()
        self.type(bob, b"\x1dt")
        self.passes(50)
        self.type(alice, b"\x1db")
        self.passes(50)
        self.type(alice, b"alice")
        self.assertEqual(self.typed, b"alice")

    def test_size(self) -> None:
        """``^] z`` types the size of the window as it is now."""
        alice = self.on(self.alice)
        self.alice.connection.sendRequest(
            alice, b"window-change", struct.pack(">4L", 132, 43, 0, 0)
        )
        self.type(alice, b"\x1dz")
        self.assertEqual(self.typed, b"stty rows 43 cols 132\r")


class MenuTests(SharingTestCase):
    """Back to the menu."""

    menu = b"1. vm1 [id-vm1]\r\n2. vm2 [id-vm2]\r\n> "

    def test_back(self) -> None:
        """``^] m`` leaves for the menu, with the terminal set back before; the next console begins
        as the first did, and the keyboard of the one that was left passes on."""
        alice, bob = self.both()
        self.type(alice, b"\x1dm")
        self.assertEqual(self.lines(bob), [f"{A} left. You have the keyboard."])
        shown = self.new(alice)
        self.assertTrue(shown.endswith(b"\r\n[vmconsole: You left vm1.]\r\n" + self.menu), shown)
        self.assertTrue(shown.startswith(b"\x18\x1b\\"))
        self.type(alice, b"2\r")
        self.assertEqual(self.lines(alice), ["vm2 on node1. To leave: ^] . (help: ^] ?)"])
        self.type(alice, b"two")
        self.assertEqual(self.typed, b"two")
        self.type(alice, b"\x1dm")
        self.type(alice, b"q\r")
        self.assertEqual(alice.status, 0)
        reasons = [event["reason"] for event in self.alice.events.named("detached")]
        self.assertEqual(reasons, ["You left vm1.", "You left vm2."])

    def test_typed_ahead(self) -> None:
        """What is typed behind ``^] m`` is the menu's, and behind the choice the guest's."""
        alice = self.on(self.alice)
        self.type(alice, b"one\x1dm2\rtwo\r")
        self.assertEqual([guest.typed for guest in self.guests.opened], [b"one", b"two\r"])
        self.assertIn(self.menu + b"2\r\n", alice.output)

    def test_one_vm(self) -> None:
        """With a single VM the menu shows that, and leads back to it or out."""
        self.engine.vms[BOB.id] = [console("vm1")]
        bob = self.on(self.bob, b"")
        self.new(bob)
        self.type(bob, b"\x1dm")
        self.assertTrue(
            self.new(bob).endswith(b"[vmconsole: You left vm1.]\r\n1. vm1 [id-vm1]\r\n> ")
        )
        self.type(bob, b"1\rbob")
        self.type(bob, b"\x1dm")
        self.assertEqual(self.typed, b"bob")
        self.type(bob, b"\x04")
        self.assertEqual(bob.status, 0)

    def test_no_vm(self) -> None:
        """When no VM is left to choose, that is said, and the session ends."""
        bob = self.on(self.bob)
        self.engine.vms[BOB.id] = []
        self.passes(10)
        self.type(bob, b"\x1dm")
        self.assertIn(b"ERROR: There is no console for bob@internal", bob.error)
        self.assertEqual(bob.status, 1)

    def test_while_connecting(self) -> None:
        """``^] m`` leads to the menu also from a console that does not open."""
        self.guests.answer = Deferred()
        alice = self.on(self.alice)
        self.type(alice, b"early\x1dm")
        self.assertTrue(self.new(alice).endswith(self.menu))
        self.assertEqual((self.guests.cancelled, len(self.pool)), (1, 0))
        self.guests.answer = None
        self.type(alice, b"2\rtwo")
        self.assertEqual(self.typed, b"two")
        self.assertEqual(len(self.alice.events.named("attach_failed")), 1)

    def test_lone_escape_before(self) -> None:
        """A lone ``^]`` before the console is open shows the help there, and not in the menu nor
        after the end."""
        gate: Deferred[None] = Deferred()
        self.guests.answer = gate
        alice = self.on(self.alice)
        self.type(alice, b"\x1d")
        gate.callback(None)
        self.flush()
        self.passes(0.1)
        self.type(alice, b"m")
        self.passes(3)
        self.assertNotIn(b"and then", alice.output)
        self.guests.answer = gate = Deferred()
        bob = self.on(self.bob)
        self.type(bob, b"\x1d")
        gate.errback(ConsoleBusy("In use."))
        self.flush()
        self.assertEqual(bob.status, 1)
        self.assertEqual(self.alice.timers(), [])

    def test_force_is_for_one(self) -> None:
        """``--force`` is not meant for what is chosen from the menu later."""
        alice = self.on(self.alice, b"connect --vm-name vm1 --force")
        self.type(alice, b"\x1dm2\r")
        self.assertEqual(self.guests.asked, [("vm1", "force"), ("vm2", "open")])

    def test_watch_stays(self) -> None:
        """Who came to watch only watches what they choose from the menu, too."""
        alice = self.on(self.alice, b"watch vm1")
        self.type(alice, b"\x1dm2\r")
        self.assertIn("You watch. Nobody has the keyboard", self.lines(alice)[-1])

    def test_resized(self) -> None:
        """The menu knows the size of the window as it is now."""
        for user in (ALICE, BOB):
            self.engine.vms[user.id] = [console(f"vm{number}") for number in range(100)]
        menu = self.alice.run(pty=True)
        self.alice.connection.sendRequest(menu, b"window-change", struct.pack(">4L", 80, 10, 0, 0))
        self.flush()
        self.new(menu)
        self.type(menu, b"\r")
        self.assertEqual(self.new(menu).count(b" [id-vm"), 8)
        self.type(menu, b"q\r")

    def test_end_of_input(self) -> None:
        """With no input left the menu is left as well."""
        alice = self.on(self.alice)
        alice.write(b"\x1dm")
        self.alice.connection.sendEOF(alice)
        self.flush()
        self.assertEqual(alice.status, 0)
        self.passes(0.25)


class LingerTests(SharingTestCase):
    """A console that nobody is on stays open for a while."""

    settings = Settings(linger=60.0)

    def test_second_user(self) -> None:
        """Who comes within that time is on the same stream, has the keyboard, and sees what was
        printed meanwhile."""
        alice = self.on(self.alice)
        self.type(alice, b"make\r\x1d.")
        self.guests.guest.print(b"done\r\n$ ")
        self.passes(59)
        bob = self.on(self.bob)
        self.assertTrue(
            self.new(bob).endswith(b"\r\n[vmconsole: What vm1 printed last:]\r\n\x1b[mdone\r\n$ ")
        )
        self.passes(120)
        self.type(bob, b"ls\r")
        self.assertEqual(self.typed, b"make\rls\r")
        self.assertEqual(len(self.guests.opened), 1)

    def test_log(self) -> None:
        """What was printed can be had for that long, and no longer."""
        self.type(self.on(self.alice), b"\x1d.")
        self.guests.guest.print(b"done\r\n")
        self.passes(50)
        self.assertEqual(self.bob.run(b"log vm1").output, b"done\r\n")
        self.passes(10)
        log = self.bob.run(b"log vm1")
        self.assertEqual(
            log.error, b"ERROR: Nothing is kept of vm1: nobody has its console open.\n"
        )
        self.assertEqual((log.output, log.status), (b"", 1))


class WhoTests(SharingTestCase):
    """``who``."""

    def test_who(self) -> None:
        """A line for each who is on a console, with the VM's name before; those of VMs that the
        user may not open are not shown."""
        for pair, line in ((self.alice, b"vm1"), (self.bob, b"watch vm1"), (self.alice, b"vm2")):
            self.on(pair, line)
        self.passes(5)
        vm1 = [
            f"vm1\t{A}: here for 5 seconds, has the keyboard, idle for 5 seconds\n",
            f"vm1\t{B}: here for 5 seconds, watches\n",
        ]
        vm2 = f"vm2\t{A}: here for 5 seconds, has the keyboard, idle for 5 seconds\n"
        vera = self.logged_in(VERA_KEY)
        for pair, line, shown in (
            (self.alice, b"who", [*vm1, vm2]),
            (self.alice, b"who vm2", [vm2]),
            (vera, b"who", vm1),
        ):
            who = pair.run(line)
            self.assertEqual((who.output.decode(), who.status), ("".join(shown), 0))
        who = vera.run(b"who vm2")
        self.assertEqual((who.output, who.status), (b"", 1))
        self.assertIn(b"ERROR: vm2 is none of your VMs", who.error)

    def test_nobody(self) -> None:
        """When nobody is there nothing is printed, with 0."""
        who = self.bob.run(b"who")
        self.assertEqual((who.output, who.error, who.status), (b"", b"", 0))

    def test_followers(self) -> None:
        """Who follows with ``log`` is listed, too; who waits for a console as such."""
        self.bob.run(b"log vm1 --follow")
        self.guests.answer = Deferred()
        self.on(self.alice, b"vm2")
        self.assertEqual(
            self.alice.run(b"who").output.decode(),
            f"vm1\t{B}: here for 0 seconds, watches\n"
            f"vm2\t{A}: here for 0 seconds, waits for it to open\n",
        )

    def test_names(self) -> None:
        """Names with control characters act on nobody's terminal: of users, and of VMs."""
        evil = "e\x1b[2J\nx"
        self.engine.keys[0] = AuthorizedKey(ALICE.id, evil, self.engine.keys[0].blob)
        for user in (ALICE, BOB):
            self.engine.vms[user.id] = [console(evil, "id-vm1")]
        self.passes(30)
        mallory = self.alice.beside()
        mallory.login()
        self.everybody.append(mallory)
        self.on(mallory, b"id-vm1")
        bob = self.on(self.bob, b"id-vm1")
        self.type(bob, b"x\x1dw\x1dt\x1dt\x1dr")
        who = self.bob.run(b"who")
        for output in (bob.output, who.output):
            self.assertIn(rb"e\x1b[2J\nx from 192.0.2.7", output)
            self.assertNotIn(b"\x1b[2J", output)
        self.assertIn(rb"e\x1b[2J\nx" + b"\t", who.output)


class CancelledTests(SharingTestCase):
    """Commands that are ended from outside leave no attachment behind; see tearDown."""

    def test_login_ends(self) -> None:
        """A login that ends takes its attachments with it, whatever they wait for, and the
        keyboard goes to somebody else."""
        alice, bob = self.both()
        log = self.alice.run(b"log vm1 --follow")
        self.type(bob, b"\x1dt")
        self.lines(bob)
        self.alice.server.avatar.revoke("Your key is gone.")
        self.assertIn(f"{A} left. You have the keyboard.", self.lines(bob))
        self.assertEqual([one.name for one in self.guests.guest.protocol.attachments], [B])
        self.assertIn(b"Your key is gone.", alice.output + alice.error + log.error)
        self.type(bob, b"bob")
        self.assertEqual(self.typed, b"bob")

    def test_connecting(self) -> None:
        """So does one that waits for the same console as another: that one still gets it."""
        gate: Deferred[None] = Deferred()
        self.guests.answer = gate
        self.on(self.alice)
        bob = self.on(self.bob)
        self.alice.client_io.loseConnection()
        self.flush()
        gate.callback(None)
        self.flush()
        self.assertEqual(self.guests.cancelled, 0)
        self.assertEqual(self.lines(bob), [OPENED])
        self.type(bob, b"bob")
        self.assertEqual(self.typed, b"bob")

    def test_help_after_the_end(self) -> None:
        """A lone ``^]`` before a login ends shows no help afterwards."""
        alice = self.on(self.alice)
        self.type(alice, b"\x1d")
        self.alice.server.avatar.revoke("Your key is gone.")
        self.passes(2)
        self.assertNotIn(b"and then", alice.output)


class RoleTests(SharingTestCase):
    """A role that changes."""

    def test_demoted(self) -> None:
        """A holder who may only watch from now on loses the keyboard; they and the heir hear who
        has it. Back, they wait for it."""
        self.looks_again()
        alice, bob = self.both()
        self.type(alice, b"x")
        self.engine.vms[ALICE.id] = [console("vm1", role="viewer")]
        for _ in range(10):
            self.passes(1.5)
        self.assertEqual(
            self.lines(alice),
            ["From now on you may only watch vm1.", f"{B} has the keyboard."],
        )
        self.assertEqual(self.lines(bob), [f"{A} may only watch now. You have the keyboard."])
        self.type(alice, b"alice")
        self.type(bob, b"bob")
        self.engine.vms[ALICE.id] = [console("vm1")]
        for _ in range(10):
            self.passes(1.5)
        self.lines(bob)
        first, second = self.lines(alice)
        self.assertEqual(first, "From now on you may type on vm1.")
        self.assertTrue(second.startswith(f"{B} has the keyboard"), second)
        self.type(bob, b"\x1d.")
        self.type(alice, b"alice")
        self.assertEqual(self.typed, b"xbobalice")
