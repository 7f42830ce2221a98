"""A console that is interrupted and comes back: what its users see, line by line, over ssh."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred

from tests.fakes import console
from tests.sshpair import ALICE
from tests.test_sharing import VERA_KEY, A, B, SharingTestCase
from vmconsole.config import Console as Settings
from vmconsole.console.terminal import GIVE_UP, RESET
from vmconsole.errors import (
    ConsoleBusy,
    ConsoleError,
    ConsoleGone,
    ConsoleInterrupted,
    ConsoleTaken,
    GuestMoved,
    GuestStopped,
    HostLost,
    HostUnreachable,
    InputLost,
)

OFF = GuestStopped("vm1 was shut off.")
LOST = HostLost("The connection to node1 was lost.")
DOWN = HostUnreachable("node1 does not answer.")
WAITING = "Waiting up to 5 minutes for vm1; ^] . leaves."
AWAY = f"{OFF} {WAITING}"
BACK = "vm1 is back, on node1."
NOWHERE = "vm1 is away: what you type goes nowhere."
NO_ACCESS = "You no longer have access to vm1."


def line(text: str) -> bytes:
    """As it is shown."""
    return f"\r\n[vmconsole: {text}]\r\n".encode()


class FollowTestCase(SharingTestCase):
    """Alice, Bob and Vera, who may only watch, on vm1."""

    settings = Settings(linger=0.0, follow=300.0)

    def setUp(self) -> None:
        super().setUp()
        self.engine.asked.clear()

    def interrupt(self, reason: ConsoleError = OFF) -> None:
        """The stream ends."""
        self.guests.guest.end(reason)
        self.flush()

    def away(
        self, reason: ConsoleError = OFF, answer: ConsoleError | Deferred[None] = DOWN
    ) -> None:
        """The stream ends, and cannot be opened again for now."""
        self.guests.answer = answer
        self.interrupt(reason)

    def back(self) -> None:
        """It can be opened again."""
        self.guests.answer = None
        self.passes(5)

    def events(self, *names: str) -> list[tuple[str, str]]:
        """What the audit was told, and about whom."""
        return [
            (str(seen["event"]), str(seen["user"]).split("@")[0])
            for seen in self.alice.events.seen
            if seen["event"] in (names or ("attached", "interrupted", "resumed", "detached"))
        ]


class BackTests(FollowTestCase):
    """It goes away, and comes back."""

    def test_a_reboot(self) -> None:
        """One line says what happened, another that it is back; that is all, and the terminal is
        set back when the guest is another one."""
        alice = self.on(self.alice)
        self.guests.guest.print(b"login: ")
        self.new(alice)
        self.away()
        self.assertEqual(self.new(alice), RESET + line(AWAY))
        self.passes(20)
        self.assertEqual(self.new(alice), b"")
        self.back()
        self.assertEqual(self.new(alice), line(BACK))
        self.guests.guest.print(b"login: ")
        self.type(alice, b"root")
        self.assertEqual((self.new(alice), self.typed), (b"login: ", b"root"))
        self.type(alice, b"\x1d.")
        self.assertEqual(self.lines(alice), ["You left vm1."])
        self.assertEqual((alice.status, alice.error), (0, b""))

    def test_whatever_happens(self) -> None:
        """The line has the reason; the screen stays as it is where the guest runs on."""
        alice = self.on(self.alice)
        for reason in (
            LOST,
            GuestMoved("vm1 moved to another host."),
            ConsoleTaken("Another program took the console."),
            InputLost("vm1 took no input; 5 bytes typed may be lost."),
            ConsoleInterrupted("Something else."),
        ):
            self.new(alice)
            self.interrupt(reason)
            said = GIVE_UP + line(f"{reason} {WAITING}") + line(BACK)
            self.assertEqual(self.new(alice), said)
            self.passes(1)

    def test_moved(self) -> None:
        """Where it is back is said, and audited; and of the next interruption, where it was."""
        alice = self.on(self.alice)
        self.engine.vms[ALICE.id] = [console("vm1", host="node\x1b2")]
        self.interrupt(GuestMoved("vm1 moved."))
        self.assertEqual(self.lines(alice)[-1], "vm1 is back, on node\\x1b2.")
        self.passes(1)
        self.interrupt()
        self.type(alice, b"\x1d.")
        hosts = [
            (seen["event"], seen["host"])
            for seen in self.alice.events.seen
            if seen["event"] in ("attached", "interrupted", "resumed", "detached")
        ]
        moved = "node\\x1b2"
        self.assertEqual(
            hosts,
            [
                ("attached", "node1"),
                ("interrupted", "node1"),
                ("resumed", moved),
                ("interrupted", moved),
                ("resumed", moved),
                ("detached", moved),
            ],
        )

    def test_audit(self) -> None:
        """The audit is told of each of them, with the reason; once that they left, with all that
        was typed and printed."""
        alice, _ = self.both()
        self.guests.guest.print(b"one")
        self.type(alice, b"a")
        self.away()
        self.type(alice, b"lost")
        self.back()
        self.guests.guest.print(b"two")
        self.type(alice, b"b\x1d.")
        self.assertEqual(
            self.events(),
            [
                ("attached", "alice"),
                ("attached", "bob"),
                ("interrupted", "alice"),
                ("interrupted", "bob"),
                ("resumed", "alice"),
                ("resumed", "bob"),
                ("detached", "alice"),
            ],
        )
        self.assertEqual(self.alice.events.named("interrupted")[0]["reason"], str(OFF))
        [detached] = self.alice.events.named("detached")
        self.assertEqual((detached["bytes_in"], detached["bytes_out"]), (2, 6))
        self.assertGreater(detached["seconds"], 5)

    def test_typed_meanwhile(self) -> None:
        """What is typed meanwhile, also by who watches, goes nowhere: a bell each time, and one
        line for each interruption."""
        channels = self.both()
        for _ in range(2):
            self.away()
            for channel in channels:
                self.new(channel)
                self.type(channel, b"ls")
                self.assertEqual(self.new(channel), b"\x07" + line(NOWHERE))
                self.type(channel, b"\r\x1dz\x1d\x1d")
                self.assertEqual(self.new(channel), b"\x07")
            self.back()
            for channel in channels:
                self.assertEqual(self.lines(channel), [BACK])
        self.assertEqual(self.typed, b"")
        alice, bob = channels
        self.type(alice, b"on")
        self.type(bob, b"x")
        self.assertEqual(self.typed, b"on")
        self.assertIn("You watch.", self.lines(bob)[0])

    def test_said_anew(self) -> None:
        """Who watched, and typed, before it went away is told anew that it goes nowhere."""
        _, bob = self.both()
        self.type(bob, b"x")
        self.away()
        self.new(bob)
        self.type(bob, b"x")
        self.assertEqual(self.new(bob), b"\x07" + line(NOWHERE))

    def test_half_a_command(self) -> None:
        """The prefix before it and the key after it are still one command."""
        alice = self.on(self.alice)
        self.type(alice, b"\x1d")
        self.away()
        self.passes(5)
        self.lines(alice)
        self.type(alice, b".")
        self.assertEqual(self.lines(alice), ["You left vm1."])

    def test_not_confirmed(self) -> None:
        """Keys that the host had not confirmed are told as lost, perhaps; not where the reason
        says it all."""
        alice = self.on(self.alice)
        for reason, told in (
            (LOST, f"{LOST} Bytes typed that may be lost: 5. {WAITING}"),
            (OFF, AWAY),
            (InputLost("No input."), f"No input. {WAITING}"),
        ):
            self.lines(alice)
            self.guests.guest.unsent = 5
            self.interrupt(reason)
            self.assertEqual(self.lines(alice), [told, BACK])
            self.passes(1)
        self.interrupt(LOST)
        self.assertEqual(self.lines(alice)[0], f"{LOST} {WAITING}")

    def test_roles(self) -> None:
        """Who watches watches on, who may only watch, too; the keyboard stays, and what a guest
        asks of a terminal is asked of that of its holder."""
        vera, bob = self.on(self.logged_in(VERA_KEY)), self.on(self.bob, b"watch vm1")
        alice = self.on(self.alice)
        self.interrupt()
        channels = (alice, bob, vera)
        for channel in channels:
            self.assertEqual(self.lines(channel)[-2:], [AWAY, BACK])
            self.type(channel, b"x")
        self.assertEqual(self.typed, b"x")
        for channel in channels:
            self.new(channel)
        self.guests.guest.print(b"a\x1b[6nb")
        self.assertEqual([self.new(each) for each in channels], [b"a\x1b[6nb", b"ab", b"ab"])

    def test_keys_while_away(self) -> None:
        """Who is there, the keyboard, and what was printed: all that works while it is away, and
        holds when it is back."""
        alice, bob = self.both()
        self.guests.guest.print(b"printed")
        self.away()
        self.lines(alice), self.lines(bob)
        self.type(bob, b"\x1dw")
        self.assertEqual(len(self.lines(bob)), 2)
        self.type(bob, b"\x1dr")
        self.assertIn(b"printed", self.new(bob))
        self.type(bob, b"\x1dt\x1dt")
        self.assertEqual(self.lines(alice)[-1].split(". ")[0], f"{B} took it")
        self.assertIn(b"printed", self.alice.run(b"log vm1").output)
        self.back()
        self.type(bob, b"bob")
        self.assertEqual(self.typed, b"bob")

    def test_control_while_away(self) -> None:
        """BREAK and SysRq are refused with a line, by key and by the client's own request."""
        alice = self.on(self.alice)
        self.away()
        for keys, what in ((b"\x1db", "BREAK"), (b"\x1dsh", "SysRq h")):
            self.lines(alice)
            self.type(alice, keys)
            self.assertEqual(self.lines(alice), [f"vm1 is away: {what} cannot be sent."])
            self.back()
            self.away()
        self.lines(alice)
        self.alice.connection.sendRequest(alice, b"break", b"\0\0\1\0")
        self.assertEqual(self.lines(alice), ["vm1 is away: BREAK cannot be sent."])
        self.assertEqual({what for _, what in self.guests.asked}, {"open"})

    def test_sysrq_in_flight(self) -> None:
        """A SysRq whose guest goes away before its letter is typed types nothing into the next
        one, and holds nobody up; ``^] .`` leaves meanwhile."""
        gate: Deferred[None] = Deferred()
        send = self.guests.send_sysrq

        async def send_sysrq(info: Any, letter: str) -> bytes:
            await gate
            return await send(info, letter)

        self.guests.send_sysrq = send_sysrq  # type: ignore[method-assign]
        alice, bob = self.both()
        self.type(alice, b"\x1dshheld")
        self.away(LOST)
        self.assertEqual(self.lines(bob), [f"{LOST} Bytes typed that may be lost: 4. {WAITING}"])
        self.type(alice, b"x" * 100)
        self.back()
        self.type(alice, b"new")
        self.assertEqual(self.typed, b"new")
        gate.callback(None)
        self.type(alice, b" on")
        self.assertEqual(self.typed, b"new on")
        self.type(alice, b"\x1d.")
        self.assertEqual(alice.status, 0)

    def test_leaves_while_sysrq_is_in_flight(self) -> None:
        """Also who typed as much as their window takes can leave by then."""
        gate: Deferred[bytes] = Deferred()

        async def send_sysrq(info: Any, letter: str) -> bytes:
            return await gate

        self.guests.send_sysrq = send_sysrq  # type: ignore[method-assign]
        alice = self.on(self.alice)
        self.type(alice, b"\x1dsh" + b"x" * 1000000)
        self.assertNotEqual(alice.buf, b"")
        self.away()
        self.type(alice, b"\x1d.")
        self.assertEqual(alice.status, 0)
        gate.callback(b"h")

    def test_stuck_guest(self) -> None:
        """What the window held back when a guest that took no input went away is refused like all
        else, and ``^] .`` behind it leaves."""
        alice = self.on(self.alice)
        self.guests.guest.producer.pauseProducing()
        self.type(alice, b"x" * 1000000 + b"\x1d.")
        self.away()
        self.assertEqual(alice.status, 0)

    def test_slow_client(self) -> None:
        """For who does not read the lines wait in their turn."""
        alice = self.on(self.alice, window=200, reads_no_more=True)
        self.guests.guest.print(b"x" * 1000)
        self.interrupt()
        self.guests.guest.print(b"y")
        self.alice.connection.grant(alice, 1 << 20)
        self.flush()
        self.assertTrue(
            alice.output.endswith(b"x" * 100 + RESET + line(AWAY) + line(BACK) + b"y"),
            alice.output[-300:],
        )

    def test_no_escape_character(self) -> None:
        """Where there is none, the line says how ssh itself is left."""
        self.settings = Settings(linger=0.0, escape="", follow=90.0)
        self.setUp()
        alice = self.on(self.alice)
        self.lines(alice)
        self.away()
        self.assertEqual(
            self.lines(alice),
            [f"{OFF} Waiting up to 90 seconds for vm1; ending ssh leaves: Enter, ~, dot."],
        )


class EndTests(FollowTestCase):
    """It is left, or does not come back."""

    def test_leave(self) -> None:
        """``^] .`` leaves while it is away, for good; the others wait on, with the keyboard."""
        alice, bob = self.both()
        self.guests.guest.print(b"root@vm1:~# ")
        self.away()
        self.lines(alice), self.lines(bob)
        self.type(alice, b"\x1d.")
        self.assertEqual((self.lines(alice), alice.status), (["You left vm1."], 0))
        self.assertEqual(self.lines(bob), [f"{A} left. You have the keyboard."])
        self.back()
        self.type(bob, b"bob")
        self.assertEqual((self.typed, self.lines(bob)), (b"bob", [BACK]))
        self.assertEqual(self.events("detached"), [("detached", "alice")])

    def test_menu(self) -> None:
        """``^] m`` goes to the menu, and from there to another console, or to the same."""
        alice = self.on(self.alice)
        self.away()
        self.type(alice, b"\x1dm")
        self.assertEqual(len(self.pool), 0)
        self.guests.answer = None
        self.type(alice, b"2\r")
        self.assertIn("vm2 on node1.", self.lines(alice)[-1])
        self.type(alice, b"\x1dm1\r")
        self.type(alice, b"x")
        self.assertEqual(self.typed, b"x")

    def test_client_dies(self) -> None:
        """A connection that dies while it is away ends the tries; nobody is left."""
        self.on(self.alice)
        self.away()
        self.alice.client_io.loseConnection()
        self.flush()
        self.assertEqual(len(self.pool), 0)
        self.assertEqual(self.events("detached"), [("detached", "alice")])

    def test_deadline(self) -> None:
        """After ``follow`` seconds the session ends, with a line that has the last error."""
        alice = self.on(self.alice)
        self.away()
        self.lines(alice)
        for _ in range(40):
            self.passes(7)
        self.assertIsNone(alice.status)
        for _ in range(10):
            self.passes(7)
        told = f"vm1 did not come back within 5 minutes. {DOWN}"
        self.assertEqual((self.lines(alice), alice.status, alice.error), ([told], 0, b""))
        [detached] = self.alice.events.named("detached")
        self.assertEqual(detached["reason"], told)

    def test_not_followed(self) -> None:
        """With ``follow = 0``, and when it is over for good, the session ends with the reason."""
        for follow, reason in ((0.0, OFF), (300.0, ConsoleGone("vm1 has no console any more."))):
            self.settings = Settings(linger=0.0, follow=follow)
            self.setUp()
            alice = self.on(self.alice)
            self.lines(alice)
            self.interrupt(reason)
            self.assertEqual((self.lines(alice), alice.status), ([str(reason)], 0))
            self.assertEqual(self.events(), [("attached", "alice"), ("detached", "alice")])

    def test_proxy_stops(self) -> None:
        """When the proxy is stopped each session that waits ends with a line that says so, and
        one that waits for its console to open with an error."""
        alice = self.on(self.alice)
        self.away()
        bob = self.on(self.bob, b"connect --wait vm1")
        self.lines(alice)
        self.pool.stopService()
        self.assertEqual(self.lines(alice), ["The proxy is being stopped."])
        self.assertEqual((alice.status, bob.status), (0, 1))
        self.assertIn(b"ERROR: The proxy is being stopped.", bob.error)

    def test_no_input(self) -> None:
        """Who can type no more does not wait: neither when the input ended before, nor when it
        ends while it is away."""
        alice, bob = self.both()
        self.alice.connection.sendEOF(alice)
        self.flush()
        self.away()
        self.assertEqual((self.lines(alice), alice.status), ([str(OFF)], 0))
        self.lines(bob)
        self.bob.connection.sendEOF(bob)
        self.passes(0.5)
        self.assertIsNone(bob.status)
        for _ in range(8):
            self.passes(0.25)
        self.assertEqual((self.lines(bob), bob.status), (["The input ended; you left vm1."], 0))
        self.assertEqual(
            self.events()[-1:] + self.events("detached"),
            [("detached", "bob"), ("detached", "alice"), ("detached", "bob")],
        )

    def test_shell_left_open(self) -> None:
        """Who leaves while it is away is not told of a shell: nobody knows what is there now."""
        alice = self.on(self.alice)
        self.guests.guest.print(b"root@vm1:~# ")
        self.away(LOST)
        self.lines(alice)
        self.type(alice, b"\x1d.")
        self.assertEqual(self.lines(alice), ["You left vm1."])

    def test_taken(self) -> None:
        """A console that was taken by force is not forced back, also by who has forced it before;
        it is back when it is free."""
        alice = self.on(self.alice, b"connect --force vm1")
        self.away(ConsoleTaken("Another program took it."), ConsoleBusy("In use."))
        for _ in range(10):
            self.passes(1)
        self.assertEqual(self.lines(alice)[1:], [f"Another program took it. {WAITING}"])
        self.back()
        self.assertEqual(self.lines(alice), [BACK])
        hows = [how for _, how in self.guests.asked]
        self.assertEqual((hows[0], set(hows[1:])), ("force", {"open"}))
        self.assertGreater(len(hows), 4)
