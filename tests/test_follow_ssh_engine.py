"""What the engine says while a console is away, and who comes then: over ssh."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred

from tests.fakes import console
from tests.sshpair import ALICE
from tests.test_follow_ssh import (
    AWAY,
    BACK,
    DOWN,
    LOST,
    NO_ACCESS,
    NOWHERE,
    OFF,
    FollowTestCase,
    line,
)
from tests.test_sharing import BOB, OPENED, VERA, VERA_KEY
from vmconsole.console.terminal import RESET
from vmconsole.errors import (
    ConsoleBusy,
    ConsoleUnavailable,
    EngineError,
    EngineUnreachable,
)


class PermissionTests(FollowTestCase):
    """What the engine says meanwhile."""

    def test_asked_anew(self) -> None:
        """Before each try the engine is asked about each of them, past what is remembered."""
        self.both()
        self.engine.asked.clear()
        self.interrupt()
        self.assertEqual(sorted(self.engine.asked), [ALICE.id, BOB.id])

    def test_gone(self) -> None:
        """Whose permission is gone sees nothing any more of what the guest prints, and is told so;
        the other goes on."""
        alice, bob = self.both()
        self.engine.vms[BOB.id] = [console("vm2")]
        self.away(LOST)
        self.new(bob)
        self.passes(30)
        self.assertEqual(self.new(bob), b"")
        self.guests.answer = None
        self.back()
        self.guests.guest.print(b"secret")
        self.assertEqual(self.new(bob), RESET + line(NO_ACCESS))
        self.assertEqual((bob.status, bob.error), (0, b""))
        self.assertIn(b"secret", self.new(alice))
        self.assertEqual(self.alice.events.named("detached")[0]["reason"], NO_ACCESS)
        self.assertEqual(self.events("resumed"), [("resumed", "alice")])

    def test_alone_and_not_listed(self) -> None:
        """A VM that the engine does not list for anybody is awaited: it may be off."""
        alice = self.on(self.alice)
        self.engine.vms[ALICE.id] = []
        self.interrupt()
        self.passes(60)
        self.engine.vms[ALICE.id] = [console("vm1")]
        self.passes(5)
        self.assertEqual(self.lines(alice)[1:], [AWAY, BACK])

    def test_missing_once(self) -> None:
        """Who is missing in one answer, and there in the next, goes on."""
        _, bob = self.both()
        ask, missing = self.engine.consoles, [True]

        async def consoles(user_id: str) -> Any:
            found = await ask(user_id)
            return () if user_id == BOB.id and missing and missing.pop() else found

        self.engine.consoles = consoles  # type: ignore[method-assign]
        self.interrupt()
        self.assertEqual((self.lines(bob), missing), ([AWAY, BACK], []))

    def test_role(self) -> None:
        """A role that changed meanwhile holds when it is back, and is told before that."""
        alice, vera = self.on(self.alice), self.on(self.logged_in(VERA_KEY))
        self.engine.vms[ALICE.id] = [console("vm1", role="viewer")]
        self.engine.vms[VERA.id] = [console("vm1")]
        self.lines(alice), self.lines(vera)
        self.interrupt()
        told = self.lines(alice)
        self.assertEqual(told[:2], [AWAY, "From now on you may only watch vm1."])
        self.assertEqual(told[-1], BACK)
        told = self.lines(vera)
        self.assertIn("From now on you may type on vm1.", told)
        self.assertIn("You have the keyboard.", " ".join(told))
        self.type(alice, b"a")
        self.type(vera, b"v")
        self.assertEqual(self.typed, b"v")

    def test_no_answer(self) -> None:
        """An engine that does not answer, or with nothing of use, keeps nobody from going on, as
        what they were; of an old answer that serves they are told."""
        alice, vera = self.on(self.alice), self.on(self.logged_in(VERA_KEY))
        for error in (EngineError("500"), EngineUnreachable("refused")):
            self.passes(6)
            self.lines(alice), self.lines(vera)
            self.engine.error = error
            self.interrupt()
            for channel in (alice, vera):
                self.assertEqual(self.lines(channel), [AWAY, BACK])
        self.assertIn(b"[engine unreachable: using its answer from", alice.error)
        self.type(alice, b"\x1d.")
        self.type(vera, b"v")
        self.assertEqual(self.typed, b"")

    def test_old_answer(self) -> None:
        """An old answer, which serves while the engine gives none, takes nothing away: a VM that
        is missing in it may have been off then."""
        alice, bob = self.both()
        self.engine.silent.add(BOB.id)
        self.away()
        self.engine.vms[BOB.id] = []
        self.guests.answer = None
        self.passes(5)
        for channel in (alice, bob):
            self.assertEqual(self.lines(channel), [AWAY, BACK])

    def test_gone_before_an_outage(self) -> None:
        """What the engine said last before it fell silent holds: nobody comes back by its
        silence."""
        alice, bob = self.both()
        self.engine.vms[BOB.id] = []
        self.away()
        self.engine.silent.add(BOB.id)
        self.guests.answer = None
        self.passes(5)
        self.guests.guest.print(b"secret")
        self.assertEqual(self.lines(alice), [AWAY, BACK])
        shown = self.new(bob)
        self.assertIn(b"You no longer have access to vm1.", shown)
        self.assertNotIn(b"secret", shown)

    def test_look_stops(self) -> None:
        """While it is away nobody looks whether it is still the user's: an engine may not list
        what stands nowhere. When it is back somebody does, again."""
        self.looks_again()
        alice = self.on(self.alice)
        gate: Deferred[None] = Deferred()
        self.away(answer=gate)
        self.engine.vms[ALICE.id] = []
        self.lines(alice)
        self.engine.asked.clear()
        for _ in range(60):
            self.passes(1.5)
        self.assertEqual(self.engine.asked.count(ALICE.id), 0)
        self.guests.answer = None
        gate.callback(None)
        self.assertEqual(self.lines(alice), [BACK])
        for _ in range(30):
            self.passes(1.5)
        self.assertEqual((self.lines(alice), alice.status), ([NO_ACCESS], 0))

    def test_look_is_one(self) -> None:
        """After several interruptions there is one look, and after the end none."""
        self.looks_again()
        alice = self.on(self.alice)
        for _ in range(3):
            self.interrupt()
            self.passes(1)
        [watch] = [each for each in self.alice.permissions._watches if each.user.id == ALICE.id]
        self.assertEqual(len(watch.consoles), 1)
        self.type(alice, b"\x1d.")
        self.assertEqual(watch.consoles, [])

    def test_look_at_the_new_role(self) -> None:
        """A role that changed over the interruption is not told again by the next look."""
        self.looks_again()
        alice = self.on(self.alice)
        self.engine.vms[ALICE.id] = [console("vm1", role="viewer")]
        self.interrupt()
        self.lines(alice)
        for _ in range(30):
            self.passes(1.5)
        self.assertEqual(self.lines(alice), [])
        self.engine.vms[ALICE.id] = [console("vm1")]
        for _ in range(15):
            self.passes(1.5)
        self.assertIn("From now on you may type on vm1.", self.lines(alice))

    def test_look_at_everybodys_role(self) -> None:
        """The look knows of each what they were when it came back, whoever else is there."""
        self.looks_again()
        self.on(self.alice)
        vera = self.on(self.logged_in(VERA_KEY))
        self.interrupt()
        self.lines(vera)
        self.engine.vms[VERA.id] = [console("vm1")]
        for _ in range(15):
            self.passes(1.5)
        self.assertIn("From now on you may type on vm1.", self.lines(vera))

    def test_key_removed(self) -> None:
        """A key that is removed while it is away ends the session all the same."""
        self.looks_again()
        alice = self.on(self.alice)
        self.away()
        self.engine.keys[:] = [key for key in self.engine.keys if key.user_id != ALICE.id]
        for _ in range(15):
            self.passes(1.5)
        self.assertTrue(alice.gone)
        self.assertIn(b"Your key no longer lets you in", alice.error)
        self.assertEqual(len(self.pool), 0)

    def test_leaves_while_the_engine_is_asked(self) -> None:
        """Who leaves while the engine is being asked leaves nothing, and no trouble in the log."""
        alice, bob = self.both()
        self.engine.consoles_gate = gate = Deferred()
        self.interrupt()
        for channel in (alice, bob):
            self.lines(channel)
            self.type(channel, b"\x1d.")
            self.assertEqual((self.lines(channel), channel.status), (["You left vm1."], 0))
        self.assertEqual(len(self.pool), 0)
        gate.callback(None)
        self.flush()
        self.assertEqual(self.flushLoggedErrors(), [])
        self.assertEqual(len(self.guests.asked), 1)


class ComeTests(FollowTestCase):
    """Who comes while it is away, or before it runs."""

    def test_one_try(self) -> None:
        """Who comes while it is away is told the error of a try that is made at once; the one who
        waits is told nothing."""
        alice = self.on(self.alice)
        self.away()
        self.passes(20)
        self.lines(alice)
        tries = len(self.guests.asked)
        bob = self.bob.run(b"vm1", pty=True)
        self.flush()
        self.assertEqual((bob.status, bob.error), (1, f"ERROR: {DOWN}\r\n".encode()))
        self.assertEqual(bob.output, b"")
        self.assertEqual(len(self.guests.asked), tries + 1)
        self.assertEqual(self.events("attach_failed"), [("attach_failed", "bob")])
        self.assertEqual(self.lines(alice), [])
        self.back()
        self.assertEqual(self.lines(alice), [BACK])

    def test_comes_in_time(self) -> None:
        """When that try succeeds it is back for both."""
        alice = self.on(self.alice)
        self.guests.guest.print(b"before")
        self.away()
        self.guests.answer = None
        self.lines(alice)
        bob = self.on(self.bob)
        self.assertEqual(self.lines(alice), [BACK])
        self.assertIn(b"before", bob.output)
        self.type(bob, b"x")
        self.type(alice, b"a")
        self.assertEqual(self.typed, b"a")

    def test_slow_try(self) -> None:
        """During a try that takes long they are told that they wait, and Ctrl-C gives up."""
        alice = self.on(self.alice)
        self.away(answer=Deferred())
        bob = self.on(self.bob)
        self.passes(2)
        self.assertEqual(self.lines(bob), ["Connecting to vm1 on node1... Ctrl-C gives up."])
        self.type(bob, b"\x03")
        self.assertEqual(bob.status, 1)
        self.type(alice, b"\x1d.")
        self.assertEqual(self.guests.cancelled, 1)

    def test_wait(self) -> None:
        """``connect --wait`` says once what is wrong, and again when that changes; it is attached
        when the VM runs, however long that takes."""
        self.guests.answer = ConsoleUnavailable("vm1 is off.")
        alice = self.on(self.alice, b"connect --wait vm1")
        self.assertEqual(self.new(alice), line("vm1 is off. Waiting for it; Ctrl-C gives up."))
        for _ in range(100):
            self.passes(10)
        self.assertEqual(self.new(alice), b"")
        self.guests.answer = DOWN
        self.passes(5)
        self.assertEqual(self.lines(alice), [f"{DOWN} Waiting for it; Ctrl-C gives up."])
        self.assertEqual(self.events(), [])
        self.back()
        self.assertEqual(self.lines(alice), [OPENED])
        self.assertEqual(self.events(), [("attached", "alice")])
        self.type(alice, b"on")
        self.assertEqual(self.typed, b"on")
        self.interrupt()
        self.assertEqual(self.lines(alice), [AWAY, BACK])

    def test_wait_runs(self) -> None:
        """For one that runs ``--wait`` makes no difference."""
        alice = self.on(self.alice, b"connect --wait vm1")
        self.assertEqual(self.lines(alice), [OPENED])

    def test_wait_gives_up(self) -> None:
        """Ctrl-C, and ``^] .``, give up at once; the audit has it."""
        self.guests.answer = DOWN
        for number, keys in enumerate((b"\x03", b"\x1d.", b"ls\x03"), 1):
            alice = self.on(self.alice, b"connect --wait vm1")
            self.passes(3)
            self.type(alice, keys)
            self.assertEqual((alice.status, alice.error), (1, b"ERROR: You gave up vm1.\r\n"), keys)
            self.assertEqual(len(self.pool), 0)
            self.assertEqual(len(self.events("attach_failed")), number)

    def test_wait_ctrl_c_is_typed(self) -> None:
        """Once it is open Ctrl-C is the guest's again."""
        self.guests.answer = DOWN
        alice = self.on(self.alice, b"connect --wait vm1")
        self.back()
        self.type(alice, b"\x03")
        self.assertEqual((self.typed, alice.status), (b"\x03", None))

    def test_wait_typed(self) -> None:
        """What is typed while one waits is refused with a bell and a line, once; what was typed
        before it was known that one waits is said to be lost."""
        self.guests.answer = gate = Deferred()
        alice = self.on(self.alice, b"connect --wait vm1")
        self.type(alice, b"early" * 200000)
        self.assertNotEqual(alice.buf, b"")
        self.guests.answer = DOWN
        gate.errback(DOWN)
        self.assertEqual(
            self.lines(alice),
            [
                f"{DOWN} Waiting for it; Ctrl-C gives up.",
                "What you typed until now went nowhere.",
                NOWHERE,
            ],
        )
        self.assertEqual(alice.buf, b"")
        self.type(alice, b"ls")
        self.assertEqual(self.new(alice), b"\x07")
        self.back()
        self.type(alice, b"a")
        self.assertEqual(self.typed, b"a")
        self.assertEqual(self.lines(alice), [OPENED])

    def test_wait_permission(self) -> None:
        """Whose permission is gone by the time that it opens is told so, and sees nothing."""
        self.guests.answer = DOWN
        bob = self.on(self.bob, b"connect --wait vm1")
        self.engine.vms[BOB.id] = []
        self.passes(20)
        self.assertIsNone(bob.status)
        self.guests.answer = None
        alice = self.on(self.alice)
        self.guests.guest.print(b"secret")
        self.flush()
        self.assertEqual((bob.status, bob.error), (1, f"ERROR: {NO_ACCESS}\r\n".encode()))
        self.assertNotIn(b"secret", bob.output)
        self.assertEqual(
            sorted(self.events("attached", "attach_failed")),
            [("attach_failed", "bob"), ("attached", "alice")],
        )
        self.assertIn(b"secret", alice.output)

    def test_who(self) -> None:
        """Who asks who is there is told that they wait for it."""
        self.on(self.alice)
        self.away()
        who = self.bob.run(b"who vm1").output
        self.assertRegex(who, rb"^vm1\talice@\S+ from \S+: here for \d+ seconds?, waits for it to")

    def test_wait_beside_others(self) -> None:
        """Who waits for it is there for those who ask who is, and may outlast them."""
        alice = self.on(self.alice)
        self.away()
        bob = self.on(self.bob, b"connect --wait vm1")
        self.assertIn(b"waits for it to open", self.alice.run(b"who vm1").output)
        self.type(alice, b"\x1d.")
        self.back()
        self.assertEqual(self.lines(bob)[-1], OPENED)
        self.type(bob, b"b")
        self.assertEqual(self.typed, b"b")

    def test_force(self) -> None:
        """Who comes with ``--force`` during a try that fails has another one, with force, and for
        all; it is not forced again later."""
        alice = self.on(self.alice)
        self.away(answer=(gate := Deferred()))
        bob = self.on(self.bob, b"connect --force vm1")
        self.guests.answer = None
        gate.errback(ConsoleBusy("In use."))
        self.assertEqual(self.lines(alice)[-1], BACK)
        self.assertEqual(self.lines(bob)[0], OPENED)
        self.passes(1)
        self.interrupt()
        self.assertEqual([how for _, how in self.guests.asked], ["open", "open", "force", "open"])


class TailTests(FollowTestCase):
    """``log --follow``."""

    def follow(self, **options: Any) -> Any:
        """Bob follows vm1."""
        log = self.bob.run(b"log vm1 --follow", **options)
        self.flush()
        self.assertIsNone(log.status, log.error)
        return log

    def test_goes_on(self) -> None:
        """It goes on; what is said of that goes to standard error, and nothing between the
        output."""
        log = self.follow()
        self.guests.guest.print(b"one ")
        self.away()
        self.passes(20)
        told = f"[vmconsole: {OFF} Waiting up to 5 minutes for the console.]\n"
        self.assertEqual(log.error.decode(), told)
        self.back()
        self.guests.guest.print(b"two")
        self.flush()
        self.assertEqual(log.error.decode(), told + "[vmconsole: The console is back.]\n")
        self.assertEqual((log.output, log.status), (b"one two", None))
        self.assertEqual(
            self.events(), [(event, "bob") for event in ("attached", "interrupted", "resumed")]
        )

    def test_ends(self) -> None:
        """That it did not come back is an error; so is a permission that is gone."""
        log = self.follow()
        self.away()
        for _ in range(50):
            self.passes(7)
        self.assertEqual(log.status, 1)
        self.assertTrue(
            log.error.endswith(f"ERROR: vm1 did not come back within 5 minutes. {DOWN}\n".encode())
        )
        self.guests.answer = None
        self.on(self.alice)
        log = self.follow()
        self.engine.vms[BOB.id] = []
        self.interrupt()
        self.guests.guest.print(b"secret")
        self.flush()
        self.assertEqual((log.status, log.output), (1, b""))
        self.assertTrue(log.error.endswith(f"ERROR: {NO_ACCESS}\n".encode()))
        self.assertEqual(self.events("attach_failed"), [])

    def test_leaves(self) -> None:
        """Ctrl-C on a terminal leaves meanwhile, and closing the channel does."""
        log = self.follow(pty=True)
        self.away()
        self.type(log, b"\x03")
        self.assertEqual((log.status, len(self.pool)), (0, 0))
        self.guests.answer = None
        log = self.follow()
        self.away()
        self.bob.connection.sendClose(log)
        self.flush()
        self.assertEqual((log.gone, len(self.pool)), (True, 0))

    def test_end_of_input(self) -> None:
        """The end of its input, as a script's, does not end it, also while it is away."""
        log = self.follow()
        self.bob.connection.sendEOF(log)
        self.away()
        self.passes(20)
        self.back()
        self.guests.guest.print(b"on")
        self.flush()
        self.assertEqual((log.output, log.status), (b"on", None))

    def test_comes_while_away(self) -> None:
        """Who wants to follow it while it is away is told the error of one try."""
        self.on(self.alice)
        self.away()
        log = self.bob.run(b"log vm1 --follow")
        self.assertEqual((log.status, log.error), (1, f"ERROR: {DOWN}\n".encode()))
