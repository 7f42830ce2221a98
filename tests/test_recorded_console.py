"""A console that is recorded: when a recording begins and ends, what is noted in it, and what
happens when there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock
from twisted.logger import Logger
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes import Events, Guests, GuestTransport, console
from tests.sshpair import ALICE, SSHPair
from tests.test_console import VM1, Terminal
from tests.test_follow import AWAY, DOWN, OFF, THERE, Access, Somebody
from tests.test_recording import SOON, START, Pool, Reactor, read
from vmconsole.config import Console as Settings
from vmconsole.console.attachment import Attachment, Party
from vmconsole.console.pool import ConsolePool
from vmconsole.console.recording import Recordings
from vmconsole.errors import ConsoleError, ConsoleGone, ConsoleUnavailable
from vmconsole.interfaces import ConsoleInfo

A, B = "alice from 192.0.2.1", "bob from 192.0.2.1"
FULL = "This console is not recorded any more: No space left on device."
NONE = ConsoleUnavailable("This console cannot be recorded: Permission denied.")


class Tape:
    """A Recording that notes what it is told."""

    def __init__(self, log: list[str], number: int) -> None:
        self.failed: Deferred[str] = Deferred()
        self.noted: list[str | bytes] = []
        self.closed = 0
        self._log = log
        self._number = number

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.noted.append(data)

    def mark(self, label: str) -> None:
        assert not self.closed
        self.noted.append(label)

    def close(self) -> None:
        self.closed += 1
        self._log.append(f"closed {self._number}")


class Tapes:
    """Recordings in memory; ``answer`` is as for Guests, and ``log`` has what happens when."""

    def __init__(self, required: bool = False) -> None:
        self.required = required
        self.answer: ConsoleError | Deferred[None] | None = None
        self.log: list[str] = []
        self.made: list[Tape] = []
        self.places: list[ConsoleInfo] = []
        self.cancelled = 0

    def open(self, info: ConsoleInfo) -> Deferred[Tape]:
        self.places.append(info)
        if isinstance(self.answer, ConsoleError):
            return fail(self.answer)
        if isinstance(self.answer, Deferred):
            waited: Deferred[None] = Deferred(lambda _: self._cancel())
            self.answer.addCallbacks(waited.callback, waited.errback)
            return waited.addCallback(lambda _: self._make())
        return succeed(self._make())

    def _make(self) -> Tape:
        self.made.append(Tape(self.log, len(self.made)))
        self.log.append(f"made {len(self.made) - 1}")
        return self.made[-1]

    def _cancel(self) -> None:
        self.cancelled += 1

    @property
    def tape(self) -> Tape:
        """The last one that was made."""
        return self.made[-1]

    @property
    def marks(self) -> list[str]:
        """What was marked in it."""
        return [each for each in self.tape.noted if isinstance(each, str)]


class RecordedCase(SynchronousTestCase):
    """A pool whose consoles are recorded."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.make()

    def make(self, required: bool = False, **settings: Any) -> None:
        """Another pool."""
        self.guests, self.tapes = Guests(), Tapes(required)
        endpoint = self.guests.console_endpoint

        def console_endpoint(console: ConsoleInfo, force: bool = False) -> Any:
            found: Any = endpoint(console, force)
            connect = found.connect

            def connected(factory: Any) -> Any:
                self.tapes.log.append("connect")
                return connect(factory)

            found.connect = connected
            return found

        self.guests.console_endpoint = console_endpoint  # type: ignore[method-assign]
        self.pool = ConsolePool(
            self.guests,
            self.clock,
            Settings(**{"linger": 0.0, **settings}),
            cast(Recordings, self.tapes),
        )
        self.pool.startService()

    def tearDown(self) -> None:
        """When all have left nothing is left, and each recording was closed once."""
        for opened in self.pool:
            for attachment in list(opened.attachments):
                if attachment.has_begun:
                    attachment.loseConnection()
                else:
                    attachment.opened.cancel()
        self.assertNothingLeft()

    def assertNothingLeft(self) -> None:
        """No console, no stream, no open recording, nothing that waits; nothing went wrong."""
        self.assertEqual(len(self.pool), 0)
        self.assertFalse(any(guest.open for guest in self.guests.opened))
        for tape in self.tapes.made:
            self.assertTrue(tape.closed or tape.failed.called)
            self.assertLessEqual(tape.closed, 1)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(self.flushLoggedErrors(), [])

    def comes(
        self, name: str = "alice", access: Access | None = None, patient: bool = False, **who: Any
    ) -> tuple[Deferred[Attachment], Terminal]:
        """Somebody wants to attach."""
        terminal = Somebody()
        party = Party(name, "192.0.2.1", access=access, **who)
        attaching = self.pool.attach(VM1, party, terminal, patient=patient)
        terminal.coming = Deferred.fromCoroutine(attaching)
        return terminal.coming, terminal

    def on(self, name: str = "alice", **who: Any) -> tuple[Attachment, Terminal]:
        """Somebody is attached; what they were told is of no interest."""
        attaching, terminal = self.comes(name, **who)
        attachment = self.successResultOf(attaching)
        terminal.told.clear()
        return attachment, terminal

    def passes(self, seconds: float) -> None:
        """Time passes, a quarter of a second at a time."""
        for _ in range(int(seconds * 4)):
            self.clock.advance(0.25)

    def breaks(self, tape: Tape | None = None) -> None:
        """The disk is full."""
        (tape or self.tapes.tape).failed.callback(FULL)


class OrderTests(RecordedCase):
    """One recording for each stream."""

    def test_whole(self) -> None:
        """It is there before the stream opens, so that nothing is missing, has all that is printed
        and is closed with the stream."""
        made: list[list[Tape]] = []
        connect = Protocol.makeConnection

        def first_words(protocol: Any, transport: Any) -> None:
            made.append(list(self.tapes.made))
            connect(protocol, transport)
            if isinstance(transport, GuestTransport):
                transport.print(b"first words")

        self.patch(Protocol, "makeConnection", first_words)
        alice, _ = self.on()
        self.assertEqual(made[0], [self.tapes.tape])
        self.guests.guest.print(b"more")
        self.assertEqual(self.tapes.log, ["made 0", "connect"])
        alice.loseConnection()
        self.assertEqual(self.tapes.log, ["made 0", "connect", "closed 0"])
        self.assertEqual(self.tapes.tape.noted[0], b"first words")
        self.assertEqual(self.tapes.tape.noted[-2:], [b"more", f"{A} left"])
        self.assertEqual(self.tapes.places, [VM1])

    def test_what_is_gathered(self) -> None:
        """All output is noted as it comes, also what users get later."""
        self.on()
        for _ in range(100):
            self.guests.guest.print(b"x")
        self.assertEqual(self.tapes.tape.noted.count(b"x"), 100)
        self.clock.advance(1)
        self.assertEqual(self.tapes.tape.noted.count(b"x"), 100)

    def test_lingers(self) -> None:
        """It goes on while the console lingers, and with who comes next."""
        self.make(linger=60.0)
        alice, _ = self.on()
        alice.loseConnection()
        self.guests.guest.print(b"on")
        bob, _ = self.on("bob")
        self.assertEqual(
            self.tapes.tape.noted[-4:],
            [f"{A} left", b"on", f"{B} attached", f"{B} has the keyboard"],
        )
        bob.loseConnection()
        self.clock.advance(1)
        self.clock.advance(60)
        self.assertEqual(self.tapes.log, ["made 0", "connect", "closed 0"])

    def test_followed(self) -> None:
        """Each stream has its own, named for where it stands, and the old one is closed before."""
        access = Access()
        self.on(access=access)
        access.answer = THERE
        self.guests.guest.print(b"one")
        self.guests.guest.end(OFF)
        self.guests.guest.print(b"two")
        self.assertEqual(self.tapes.log, ["made 0", "connect", "closed 0", "made 1", "connect"])
        self.assertEqual(
            [(b"one" in tape.noted, b"two" in tape.noted) for tape in self.tapes.made],
            [(True, False), (False, True)],
        )
        self.assertEqual([place.host for place in self.tapes.places], ["node1", "node2"])

    def test_fails_to_open(self) -> None:
        """That of a stream that does not open is closed, with nothing in it; each try has its
        own."""
        self.guests.answer = DOWN
        coming, _ = self.comes()
        self.failureResultOf(coming, ConsoleError)
        self.assertEqual(self.tapes.log, ["made 0", "connect", "closed 0"])
        self.guests.answer = None
        self.on()
        self.guests.answer = DOWN
        self.guests.guest.end(OFF)
        self.passes(0.5)
        self.guests.answer = None
        self.passes(1)
        self.assertEqual([tape.closed for tape in self.tapes.made], [1, 1, 1, 1, 0])
        for number in (0, 2, 3):
            self.assertEqual(self.tapes.made[number].noted, [])

    def test_given_up_while_connecting(self) -> None:
        """So is that of one that is given up."""
        self.guests.answer = Deferred()
        coming, _ = self.comes()
        coming.cancel()
        self.failureResultOf(coming, CancelledError)
        self.assertEqual(self.tapes.log, ["made 0", "connect", "closed 0"])
        self.assertEqual(self.tapes.tape.noted, [])

    def test_given_up_before(self) -> None:
        """Who leaves while the recording is being made gives that up, and no stream is opened."""
        for patient in (False, True):
            self.make()
            self.tapes.answer = Deferred()
            coming, _ = self.comes(patient=patient)
            self.assertEqual((len(self.pool), self.tapes.log), (1, []))
            coming.cancel()
            self.failureResultOf(coming, CancelledError)
            self.assertEqual((self.tapes.cancelled, self.tapes.log), (1, []))
            self.assertNothingLeft()

    def test_left_before(self) -> None:
        """So does who waits for it to come back."""
        alice, _ = self.on()
        self.tapes.answer = Deferred()
        self.guests.guest.end(OFF)
        alice.loseConnection()
        self.assertEqual((self.tapes.cancelled, len(self.guests.opened)), (1, 1))
        self.assertNothingLeft()

    def test_one_leaves_before(self) -> None:
        """Who leaves while others wait for it is not in it."""
        alice, _ = self.on()
        self.on("bob")
        gate: Deferred[None] = Deferred()
        self.tapes.answer = gate
        self.guests.guest.end(OFF)
        alice.loseConnection()
        gate.callback(None)
        self.assertEqual(self.tapes.marks, [f"{B} attached", f"{B} has the keyboard"])

    def test_stopped_before(self) -> None:
        """A proxy that is stopped meanwhile leaves nothing."""
        self.tapes.answer = Deferred()
        coming, _ = self.comes()
        self.pool.stopService()
        self.failureResultOf(coming, ConsoleGone)
        self.assertNothingLeft()

    def test_ends(self) -> None:
        """When the console is over for good its recording is, too."""
        self.on()
        self.guests.guest.end(ConsoleGone("It is over."))
        self.assertEqual(self.tapes.tape.closed, 1)
        self.on()
        self.pool.stopService()
        self.assertEqual(self.tapes.tape.closed, 1)


class MarkTests(RecordedCase):
    """Who was there, and who had the keyboard."""

    def test_in_order(self) -> None:
        """Who attached, left, and got the keyboard is marked as it happened."""
        (alice, _), (bob, _) = self.on(), self.on("bob")
        bob.console.keyboard.ask(bob)
        alice.console.keyboard.ask(alice)
        bob.loseConnection()
        alice.write(b"a")
        self.assertEqual(
            self.tapes.marks,
            [
                f"{A} attached",
                f"{A} has the keyboard",
                f"{B} attached",
                f"{B} has the keyboard",
                f"{B} left",
                f"{A} has the keyboard",
            ],
        )

    def test_passes_on(self) -> None:
        """When its holder leaves, it is marked who has the keyboard then."""
        (alice, _), _ = self.on(), self.on("bob", watch=False)
        alice.loseConnection()
        self.assertEqual(self.tapes.marks[-2:], [f"{A} left", f"{B} has the keyboard"])

    def test_viewers(self) -> None:
        """Who only watches never has it."""
        self.on("bob", role="viewer")
        self.on(watch=True)
        self.assertEqual(self.tapes.marks, [f"{B} attached", f"{A} attached"])

    def test_hidden(self) -> None:
        """Who is none of the people is not marked."""
        hidden, _ = self.on("vmconsole", watch=True, hidden=True)
        self.on()
        self.guests.guest.end(OFF)
        hidden.loseConnection()
        self.assertEqual(self.tapes.marks, [f"{A} attached", f"{A} has the keyboard"])

    def test_anew(self) -> None:
        """After an interruption the new recording has who is there, and who has the keyboard."""
        (alice, _), (bob, _) = self.on(), self.on("bob")
        bob.console.keyboard.ask(bob)
        alice.console.keyboard.ask(alice)
        self.guests.guest.end(OFF)
        self.assertEqual(
            self.tapes.marks, [f"{A} attached", f"{B} attached", f"{B} has the keyboard"]
        )

    def test_anew_with_who_came(self) -> None:
        """So it has who came meanwhile, once."""
        self.on()
        gate: Deferred[None] = Deferred()
        self.guests.answer = gate
        self.guests.guest.end(OFF)
        self.comes("bob")
        gate.callback(None)
        self.assertEqual(
            self.tapes.marks, [f"{A} attached", f"{A} has the keyboard", f"{B} attached"]
        )

    def test_revoked_meanwhile(self) -> None:
        """Who may not go on after an interruption is not in it."""
        access = Access()
        self.on(access=access)
        self.on("bob")
        access.answer = None
        self.guests.guest.end(OFF)
        self.assertEqual(self.tapes.marks, [f"{B} attached", f"{B} has the keyboard"])

    def test_moved_meanwhile(self) -> None:
        """What becomes of the keyboard while the stream is being opened is marked once, behind who
        is there."""
        (alice, _), _ = self.on(), self.on("bob")
        gate: Deferred[None] = Deferred()
        self.guests.answer = gate
        self.guests.guest.end(OFF)
        alice.loseConnection()
        gate.callback(None)
        self.assertEqual(self.tapes.marks, [f"{B} attached", f"{B} has the keyboard"])

    def test_empty(self) -> None:
        """A stream that does not open has no recording with marks, whatever its users do."""
        (alice, _), _ = self.on(), self.on("bob")
        gate: Deferred[None] = Deferred()
        self.guests.answer = gate
        self.guests.guest.end(OFF)
        alice.loseConnection()
        gate.errback(DOWN)
        self.assertEqual((self.tapes.tape.closed, self.tapes.marks), (1, []))


class CannotTests(RecordedCase):
    """No recording can be made."""

    def test_required(self) -> None:
        """Who attaches is told why, and no stream is opened; later there may be one."""
        self.make(required=True)
        self.tapes.answer = NONE
        coming, _ = self.comes()
        self.assertIs(self.failureResultOf(coming, ConsoleUnavailable).value, NONE)
        self.assertEqual((self.guests.opened, self.tapes.log), ([], []))
        self.assertNothingLeft()
        self.tapes.answer = None
        self.on()

    def test_required_and_patient(self) -> None:
        """Who would wait waits."""
        self.make(required=True)
        self.tapes.answer = NONE
        coming, terminal = self.comes(patient=True)
        self.passes(30)
        self.assertNoResult(coming)
        self.assertEqual(set(terminal.told), {f"waiting: {NONE}"})
        self.tapes.answer = None
        self.passes(5)
        self.successResultOf(coming)

    def test_required_and_followed(self) -> None:
        """So does who is on it when it is interrupted; in the end they are told why."""
        self.make(required=True, follow=10.0)
        _, terminal = self.on()
        self.tapes.answer = NONE
        self.guests.guest.end(OFF)
        self.passes(5)
        self.tapes.answer = None
        self.passes(5)
        self.assertEqual(terminal.told[1:], ["resumed"])
        self.tapes.answer = NONE
        self.guests.guest.end(OFF)
        self.passes(11)
        self.assertEqual(
            terminal.told[3:], [f"revoked: vm1 did not come back within 10 seconds. {NONE}"]
        )

    def test_not_required(self) -> None:
        """Else it goes without, and nothing is marked anywhere."""
        self.tapes.answer = NONE
        alice, terminal = self.on()
        self.guests.guest.print(b"one")
        alice.write(b"a")
        self.assertEqual((terminal.seen, self.guests.guest.typed), (b"one", b"a"))
        self.assertIsNone(alice.console.recording)
        self.tapes.answer = None
        self.guests.guest.end(OFF)
        self.assertEqual(terminal.told, [AWAY, "resumed"])
        self.assertEqual(self.tapes.marks, [f"{A} attached", f"{A} has the keyboard"])

    def test_no_recordings(self) -> None:
        """Where nothing is recorded nothing is asked for."""
        pool = ConsolePool(self.guests, self.clock, Settings(linger=0.0))
        attaching = pool.attach(VM1, Party("alice", ""), Terminal())
        alice = self.successResultOf(Deferred.fromCoroutine(attaching))
        self.assertEqual(self.tapes.places, [])
        alice.loseConnection()

    def test_bug(self) -> None:
        """What nobody thought of is no reason to go without."""
        self.tapes.open = lambda info: fail(ZeroDivisionError())  # type: ignore[method-assign]
        coming, _ = self.comes()
        self.failureResultOf(coming, ConsoleGone)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertEqual(self.guests.opened, [])


class BrokenTests(RecordedCase):
    """A recording fails midway."""

    def test_not_required(self) -> None:
        """Everybody is told, once, and goes on; so does the keyboard."""
        (alice, alices), (_, bobs) = self.on(), self.on("bob")
        tape = self.tapes.tape
        before = list(tape.noted)
        self.breaks()
        self.assertEqual((alices.told, bobs.told), ([FULL], [FULL]))
        self.guests.guest.print(b"one")
        alice.write(b"a")
        self.on("carol")
        self.assertEqual((alices.seen, self.guests.guest.typed), (b"one", b"a"))
        self.assertEqual((tape.noted, tape.closed), (before, 0))
        self.assertEqual(len(self.tapes.made), 1)

    def test_next_time(self) -> None:
        """The next stream has one again."""
        _, terminal = self.on()
        self.breaks()
        self.guests.guest.end(OFF)
        self.assertEqual(terminal.told, [FULL, AWAY, "resumed"])
        self.assertEqual((len(self.tapes.made), self.tapes.made[0].closed), (2, 0))
        self.assertEqual(len(self.tapes.marks), 2)

    def test_required(self) -> None:
        """All sessions end, with the sentence, and are not followed."""
        self.make(required=True, linger=60.0)
        (_, alices), (_, bobs) = self.on(), self.on("bob")
        self.breaks()
        for terminal in (alices, bobs):
            assert terminal.lost is not None
            self.assertEqual(terminal.lost.check(ConsoleGone), ConsoleGone)
            self.assertEqual(terminal.lost.getErrorMessage(), FULL)
            self.assertEqual(terminal.told, [])
        self.assertEqual(len(self.guests.places), 1)
        self.assertNothingLeft()
        self.on("carol")
        self.assertEqual(len(self.tapes.made), 2)
        self.pool.stopService()

    def test_required_while_connecting(self) -> None:
        """So it is when it fails before the stream is open, for who comes and for who waits."""
        for away in (False, True):
            self.make(required=True)
            if away:
                _, terminal = self.on()
            self.guests.answer = Deferred()
            if away:
                self.guests.guest.end(OFF)
            coming, _ = self.comes("bob", patient=True)
            self.breaks()
            self.assertEqual(self.failureResultOf(coming, ConsoleGone).getErrorMessage(), FULL)
            if away:
                assert terminal.lost is not None
                self.assertEqual(terminal.lost.getErrorMessage(), FULL)
            self.assertEqual(self.guests.cancelled, 1)
            self.assertNothingLeft()

    def test_while_connecting(self) -> None:
        """Else it opens without; who was on it before is told, and who comes is not."""
        _, alices = self.on()
        gate: Deferred[None] = Deferred()
        self.guests.answer = gate
        self.guests.guest.end(OFF)
        coming, bobs = self.comes("bob")
        self.breaks()
        gate.callback(None)
        bob = self.successResultOf(coming)
        self.assertIsNone(bob.console.recording)
        self.assertEqual(alices.told, [AWAY, FULL, "resumed"])
        self.assertNotIn(FULL, bobs.told)
        self.assertEqual(self.tapes.tape.noted, [])

    def test_too_late(self) -> None:
        """What fails when the console has gone on to another recording, or is closed, concerns
        nobody: the other one goes on."""
        for required in (False, True):
            self.make(required)
            alice, terminal = self.on()
            self.guests.guest.end(OFF)
            self.breaks(self.tapes.made[0])
            self.assertEqual((terminal.told, terminal.lost), ([AWAY, "resumed"], None))
            self.guests.guest.print(b"two")
            self.assertEqual(self.tapes.tape.noted[-1], b"two")
            self.passes(1)
            self.guests.answer = DOWN
            self.guests.guest.end(OFF)
            for tape in self.tapes.made[1:]:
                self.breaks(tape)
            self.assertEqual(len(self.tapes.made), 3)
            self.assertEqual((terminal.told[2:], terminal.lost), ([AWAY], None))
            alice.loseConnection()
            self.assertNothingLeft()

    def test_nobody_is_on_it(self) -> None:
        """It may fail while the console lingers; where it is required that is the end of it."""
        for required in (False, True):
            self.make(required, linger=60.0)
            alice, _ = self.on()
            alice.loseConnection()
            self.breaks()
            self.assertEqual(len(self.pool), not required)
            self.clock.advance(1)
            self.clock.advance(60)
            self.assertNothingLeft()


class RealTests(SynchronousTestCase):
    """With real recordings, in a directory."""

    def setUp(self) -> None:
        self.reactor = Reactor()
        self.reactor.rightNow = START
        self.directory = Path(self.mktemp()).absolute()
        self.threads: Any = Pool()
        self.events = Events()
        self.patch(Recordings, "_log", Logger(observer=self.events))
        self.guests = Guests()

    def recordings(self, **settings: Any) -> Recordings:
        """Running."""
        made = Recordings(
            self.reactor, self.directory, make_pool=lambda *_: self.threads, **settings
        )
        made.startService()
        self.addCleanup(made.stopService)
        return made

    def files(self) -> list[Path]:
        """By their time."""
        return sorted(self.directory.rglob("*.cast"))

    def test_session(self) -> None:
        """A whole session, with an interruption: two files, with all that was printed, and who was
        there. The tries in between that fail leave none."""
        pool = ConsolePool(
            self.guests, self.reactor, Settings(linger=0.0), self.recordings(required=True)
        )
        terminal = Terminal()
        attaching = pool.attach(VM1, Party("alice", "192.0.2.1"), terminal)
        alice = self.successResultOf(Deferred.fromCoroutine(attaching))
        self.reactor.advance(1)
        self.guests.guest.print(b"login: ")
        alice.write(b"secret")
        self.guests.answer = DOWN
        self.guests.guest.end(OFF)
        for _ in range(20):
            self.reactor.advance(1)
        self.guests.answer = None
        for _ in range(5):
            self.reactor.advance(1)
        self.guests.guest.print(b"again")
        alice.loseConnection()
        self.reactor.advance(SOON)
        first, second = (read(path)[1] for path in self.files())
        there = [["m", f"{A} attached"], ["m", f"{A} has the keyboard"]]
        self.assertEqual([event[1:] for event in first], [*there, ["o", "login: "]])
        self.assertEqual(
            [event[1:] for event in second], [*there, ["o", "again"], ["m", f"{A} left"]]
        )
        self.assertEqual((terminal.seen, len(pool)), (b"login: again", 0))
        self.assertEqual({path.parent.name for path in self.files()}, {"vm1,id-vm1"})

    def test_cancelled(self) -> None:
        """Who gives up while the file is being made leaves none."""
        recordings = self.recordings()
        self.threads.held = True
        pool = ConsolePool(self.guests, self.reactor, Settings(linger=0.0), recordings)
        attaching = Deferred.fromCoroutine(pool.attach(VM1, Party("alice", ""), Terminal()))
        attaching.cancel()
        self.failureResultOf(attaching, CancelledError)
        self.threads.release()
        self.reactor.advance(SOON)
        self.assertEqual((self.files(), len(pool), self.guests.opened), ([], 0, []))

    def test_over_ssh(self) -> None:
        """Over ssh the errors are lines of ours: none can be made, and one fails midway."""
        recordings = self.recordings(required=True)
        pair = SSHPair(recordings=recordings)
        pair.engine.vms[ALICE.id] = [console("vm1")]
        pair.login()
        self.directory.rmdir()
        self.directory.write_text("no directory")
        channel = pair.run(b"vm1", pty=True)
        self.assertEqual(channel.status, 1)
        self.assertTrue(
            channel.error.startswith(b"ERROR: This console cannot be recorded: "), channel.error
        )
        self.directory.unlink()
        channel = pair.run(b"vm1", pty=True)
        self.assertIsNone(channel.status, channel.error)
        (recording,) = recordings._recordings
        recording.fail("No space left on device")
        pair.flush()
        self.assertEqual(channel.status, 0)
        self.assertIn(f"[vmconsole: {FULL}]".encode(), channel.output)
        self.assertFalse(pair.guests.guest.open)
