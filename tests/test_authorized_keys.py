"""Whose key a blob is, and how often the engine is asked."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from twisted.internet.base import DelayedCall
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from zope.interface import implementer
from zope.interface.verify import verifyObject

from tests.engine_kit import EngineTestCase, start
from tests.fakes import Engine
from vmconsole.engine.authorized_keys import AuthorizedKeys
from vmconsole.engine.last_answer import Lifetimes, Outage
from vmconsole.engine.slices import in_slices
from vmconsole.errors import EngineError, EngineUnreachable, KeyRefused
from vmconsole.interfaces import AuthorizedKey, ConsoleInfo, IEngine, KeyList, KeyOwner, User
from vmconsole.keyoptions import KeyOptions
from vmconsole.publickeys import fingerprint

ALICE = AuthorizedKey("1", "alice@internal", b"alice's key")
BOB = AuthorizedKey("2", "bob@internal", b"bob's key")
HERE = "192.0.2.7"


class KeysTestCase(EngineTestCase):
    """AuthorizedKeys of an engine with Alice's and Bob's keys."""

    def setUp(self) -> None:
        super().setUp()
        self.engine = Engine(ALICE, BOB)
        verifyObject(IEngine, self.engine)
        self.remember()

    def remember(self, cache_ttl: float = 5.0, stale_grace: float = 300.0) -> None:
        lifetimes = Lifetimes(cache_ttl, stale_grace)
        self.keys = AuthorizedKeys(self.engine, self.clock, lifetimes, Outage())

    def owner(self, blob: bytes) -> User | None:
        owner = self.result(self.keys.owner(blob, HERE))
        return owner and owner.user

    @property
    def asked(self) -> int:
        return len(self.engine.asked)


class LookupTests(KeysTestCase):
    """``AuthorizedKeys.owner``."""

    def test_found(self) -> None:
        """A known key gives its user; the second look-up asks nobody."""
        self.assertEqual(self.owner(ALICE.blob), User("1", "alice@internal"))
        self.assertEqual(self.owner(BOB.blob), User("2", "bob@internal"))
        self.assertEqual(self.asked, 1)

    def test_refreshed(self) -> None:
        """After cache_ttl the engine is asked again, and a removed key is gone."""
        self.owner(ALICE.blob)
        self.engine.keys = [BOB]
        self.clock.advance(5.0)
        self.assertIsNone(self.owner(ALICE.blob))
        self.assertEqual(self.asked, 2)

    def test_ahead(self) -> None:
        """Past half of cache_ttl the answer is renewed in the background: who logs in does not
        wait for it, also when it fails, and the next one finds the new keys."""
        self.owner(ALICE.blob)
        self.clock.advance(2.4)
        self.owner(ALICE.blob)
        self.assertEqual(self.asked, 1)
        self.clock.advance(0.2)
        self.engine.keys = [BOB]
        self.engine.keys_gate = Deferred()
        for _ in range(3):
            self.assertIsNotNone(self.owner(ALICE.blob))
        self.assertEqual(self.asked, 2)
        self.engine.keys_gate.callback(None)
        self.assertIsNone(self.owner(ALICE.blob))
        self.clock.advance(2.6)
        self.engine.error = EngineError("403")
        self.assertIsNotNone(self.owner(BOB.blob))
        self.assertIsNotNone(self.owner(BOB.blob))
        self.assertEqual(self.asked, 3)

    def test_clock_set_back(self) -> None:
        """An answer does not last longer because the clock went back, and a failure that is over
        does not come back."""
        self.owner(ALICE.blob)
        self.clock.rightNow -= 3600
        self.owner(ALICE.blob)
        self.assertEqual(self.asked, 2)
        self.clock.advance(6)
        self.engine.error = EngineError("403")
        self.failure(self.keys.owner(ALICE.blob, HERE), EngineError)
        self.engine.error = None
        self.clock.advance(1)
        self.owner(ALICE.blob)
        self.clock.rightNow -= 0.5
        self.assertIsNotNone(self.owner(ALICE.blob))

    def test_slow(self) -> None:
        """An answer is as old as its question; a failure counts from when it came."""
        self.engine.keys_gate = Deferred()
        waiting = start(self.keys.owner(ALICE.blob, HERE))
        self.clock.advance(3)
        self.engine.keys_gate.callback(None)
        self.assertIsNotNone(self.successResultOf(waiting))
        self.clock.advance(2)
        self.engine.keys_gate = Deferred()
        waiting = start(self.keys.owner(ALICE.blob, HERE))
        self.assertEqual(self.asked, 2)
        self.engine.error = EngineError("500")
        self.clock.advance(3)
        self.engine.keys_gate.callback(None)
        self.failureResultOf(waiting, EngineError)
        self.failure(self.keys.owner(ALICE.blob, HERE), EngineError)
        self.assertEqual(self.asked, 2)

    def test_strangers(self) -> None:
        """Unknown keys make us ask at most once a second; a new key is found after that."""
        self.owner(ALICE.blob)
        for number in range(100):
            self.assertIsNone(self.owner(b"stranger %d" % number))
        self.clock.advance(0.9)
        self.assertIsNone(self.owner(b"stranger"))
        self.assertEqual(self.asked, 1)
        carol = AuthorizedKey("3", "carol@internal", b"carol's key")
        self.engine.keys = [ALICE, BOB, carol]
        self.assertIsNone(self.owner(carol.blob))
        self.clock.advance(0.1)
        self.assertEqual(self.owner(carol.blob), User("3", "carol@internal"))
        self.assertEqual(self.asked, 2)

    def test_ttl_of_zero(self) -> None:
        """Without a cache each known key is asked about, and strangers' still are not."""
        self.remember(cache_ttl=0)
        for _ in range(3):
            self.owner(ALICE.blob)
        self.assertEqual(self.asked, 3)
        self.owner(b"stranger")
        self.assertEqual(self.asked, 3)

    def test_ambiguous(self) -> None:
        """A key of several users is nobody's, others are not affected, and the log has it once."""
        twin = AuthorizedKey("3", "carol\n@internal", ALICE.blob)
        third = AuthorizedKey("4", "dave@internal", ALICE.blob)
        self.engine.keys = [ALICE, BOB, twin, third, twin]
        for number in range(3):
            self.assertIsNone(self.owner(ALICE.blob))
            self.assertIsNotNone(self.owner(BOB.blob))
            self.clock.advance(6)
            self.engine.keys.append(AuthorizedKey("9", "more", b"%d" % number))
        [line] = self.logged(fingerprint(ALICE.blob))
        self.assertIn("alice@internal, carol\\n@internal, dave@internal", line)

    def test_many_ambiguous(self) -> None:
        """However many keys are shared, and by however many, the log stays short, and is written
        a little at a time."""
        blobs = [b"shared %d" % number for number in range(103)]
        self.engine.keys = [
            AuthorizedKey(str(user), f"user{user:02}", blob) for user in range(12) for blob in blobs
        ]
        self.clock = clock = _TickingClock()
        told: list[int] = []
        clock.pause = lambda: told.append(len(self.logged("belongs to several users")))
        self.remember()
        waiting = start(self.keys.fresh())
        clock.advance(0)
        self.successResultOf(waiting)
        for before, after in pairwise([*told, 100]):
            self.assertLessEqual(after - before, 11)
        lines = self.logged("belongs to several users")
        self.assertEqual(len(lines), 100)
        self.assertEqual({line.count("user0") for line in lines}, {10})
        self.assertFalse([line for line in lines if "user1" in line])
        self.assertEqual(len(self.logged("So are 3 more keys")), 1)

    def test_same_user_twice(self) -> None:
        """A key that a user has twice is the user's."""
        self.engine.keys = [ALICE, ALICE]
        self.assertEqual(self.owner(ALICE.blob), User("1", "alice@internal"))

    def test_shared(self) -> None:
        """All who wait for one answer share the request; who gives up spoils nothing."""
        self.engine.keys_gate = Deferred()
        first, *others = [start(self.keys.owner(ALICE.blob, HERE)) for _ in range(3)]
        first.addErrback(lambda _: None)
        first.cancel()
        self.engine.keys_gate.callback(None)
        for lookup in others:
            self.assertIsNotNone(self.successResultOf(lookup))
        self.assertEqual(self.asked, 1)

    def test_same_answer(self) -> None:
        """An answer with the same digest as the last is not read; another one is."""
        self.owner(ALICE.blob)
        self.clock.advance(6)
        self.owner(ALICE.blob)
        self.assertEqual((self.asked, self.engine.read), (2, 2))
        self.engine.keys = [ALICE]
        self.clock.advance(6)
        self.owner(ALICE.blob)
        self.assertEqual((self.asked, self.engine.read), (3, 3))

    def test_old_index(self) -> None:
        """An index that was replaced is emptied, a little at a time, and not the new one."""
        old = self.result(self.keys.fresh())
        self.engine.keys = [BOB]
        new = self.result(self.keys.fresh())
        self.assertIsNot(old, new)
        self.clock.advance(0)
        self.assertEqual((len(old.users), len(new.users)), (0, 1))
        self.result(self.keys.fresh())
        self.clock.advance(0)
        self.assertEqual(len(new.users), 1)

    def test_half_an_answer(self) -> None:
        """Of an answer that turns out to be no use nothing counts; the one before serves on."""
        self.owner(ALICE.blob)
        self.engine.keys = [BOB]
        self.engine.broken_after = 1
        self.clock.advance(3)
        for _ in range(2):
            self.assertIsNotNone(self.owner(ALICE.blob))
        self.clock.advance(3)
        self.failure(self.keys.owner(ALICE.blob, HERE), EngineError)

    def test_failure_holds_nothing(self) -> None:
        """A failure that is remembered does not hold what was read of the answer."""

        class Large:
            pass

        def keys() -> Iterator[AuthorizedKey]:
            large = Large()
            held.append(weakref.ref(large))
            yield ALICE
            raise EngineError("The answer is cut.")

        held: list[weakref.ref[Large]] = []
        self.patch(self.engine, "_read", lambda _: keys())
        self.failure(self.keys.owner(ALICE.blob, HERE), EngineError)
        gc.collect()
        self.assertEqual([reference() for reference in held], [None])
        self.failure(self.keys.owner(ALICE.blob, HERE), EngineError)
        self.assertEqual(self.asked, 1)


class NamesTests(KeysTestCase):
    """``AuthorizedKeys.user_named``, which certificates go by."""

    def named(self, *names: str) -> str | None:
        """The id of the user."""
        owner = self.result(self.keys.user_named(names))
        return owner and owner.user.id

    def test_first(self) -> None:
        """The first name that is exactly a user's, with a key or without; the same answer serves
        for keys and for names."""
        self.engine.keys.append(User("3", "carol"))
        self.assertEqual(self.named("nobody", "carol", "alice@internal"), "3")
        self.assertEqual(self.named("bob@internal", "carol"), "2")
        self.assertIsNotNone(self.owner(ALICE.blob))
        self.clock.advance(2)
        self.assertEqual(self.named("carol"), "3")
        self.assertEqual(self.asked, 1)
        for name in ("carol ", "Carol", "", "alice"):
            self.assertIsNone(self.named(name), name)

    def test_shared(self) -> None:
        """A name that two users have is nobody's, in whatever order they come, which is said when
        no other name is somebody's; one user with several keys, or told twice, is one."""
        carol, other = User("3", "carol"), AuthorizedKey("4", "carol", b"another")
        for users in ([carol, other], [other, carol], [carol, other, carol]):
            self.remember()
            self.engine.keys = [ALICE, *users]
            text = self.failure(self.keys.user_named(["x", "carol"]), KeyRefused)
            self.assertEqual(text, "several users are called carol")
            self.assertEqual(self.named("carol", "alice@internal"), "1")
        self.remember()
        self.engine.keys = [carol, carol, AuthorizedKey("3", "carol", b"x"), ALICE, ALICE]
        self.assertEqual((self.named("carol"), self.named("alice@internal")), ("3", "1"))
        self.assertEqual(self.result(self.keys.fresh()).keyless, [carol])

    def test_unknown(self) -> None:
        """An unknown name makes the engine be asked again, but not more than once in a second."""
        self.assertIsNone(self.named("carol"))
        self.engine.keys.append(User("3", "carol"))
        self.clock.advance(0.9)
        self.assertIsNone(self.named("carol"))
        self.clock.advance(0.2)
        self.assertEqual(self.named("carol"), "3")
        self.assertEqual(self.asked, 2)

    def test_outage(self) -> None:
        """In an outage the last answer serves, and says from when it is; a name that it does not
        have is no answer."""
        self.named("alice@internal")
        answered = self.clock.seconds()
        self.engine.error = EngineUnreachable("refused")
        self.clock.advance(10)
        owner = self.result(self.keys.user_named(["x", "alice@internal"]))
        self.assertEqual(owner, KeyOwner(User("1", "alice@internal"), False, answered))
        text = self.failure(self.keys.user_named(["carol"]), EngineUnreachable)
        self.assertIn("names no one user of this name", text)
        self.engine.error = EngineError("403")
        self.clock.advance(2)
        self.failure(self.keys.user_named(["alice@internal"]), EngineError)

    def test_freed(self) -> None:
        """Of an answer that was replaced nothing is kept."""
        self.engine.keys.append(User("3", "carol"))
        self.named("carol")
        old = self.keys._last.value
        assert old is not None
        self.engine.keys = [BOB]
        self.clock.advance(6)
        self.assertIsNone(self.named("carol"))
        self.clock.advance(1)
        self.assertEqual((old.users, old.names, old.keyless), ({}, {}, []))


class UsersTests(KeysTestCase):
    """``AuthorizedKeys.user_ids``."""

    def ids(self) -> list[str]:
        return list(self.result(self.keys.user_ids()))

    def test_each_once(self) -> None:
        """Each user with a key of their own, or with none, once, however many keys they have; not
        those who have none but what others have, too."""
        self.engine.keys = [
            BOB,
            ALICE,
            AuthorizedKey("1", "alice@internal", b"another"),
            AuthorizedKey("3", "carol", b"shared"),
            AuthorizedKey("4", "dave", b"shared"),
            AuthorizedKey("4", "dave", b"dave's"),
        ]
        self.assertEqual(self.ids(), ["2", "1", "4"])
        self.engine.keys += [User("5", "erin"), User("1", "alice@internal")]
        self.assertEqual(self.ids(), ["2", "1", "4", "5"])
        self.engine.keys = []
        self.assertEqual(self.ids(), [])

    def test_asked_anew(self) -> None:
        """The engine is asked each time; who asks at the same time shares the answer."""
        self.ids()
        self.engine.keys = [BOB]
        self.assertEqual((self.ids(), self.asked), (["2"], 2))
        self.engine.keys_gate = Deferred()
        ids, owner = start(self.keys.user_ids()), start(self.keys.owner(b"unknown", HERE))
        self.engine.keys_gate.callback(None)
        self.assertEqual(self.successResultOf(ids), ["2"])
        self.successResultOf(owner)
        self.assertEqual(self.asked, 3)

    def test_no_answer(self) -> None:
        """Without an answer of now there is none: no old one serves."""
        self.ids()
        for error in (EngineUnreachable("refused"), EngineError("500")):
            self.clock.advance(2)
            self.engine.error = error
            self.assertEqual(self.failure(self.keys.user_ids(), type(error)), str(error))

    def test_many(self) -> None:
        """Of many users it takes a millisecond at a time, in which others' keys are served; a
        list that comes meanwhile changes nothing."""
        ids = self.under_way()
        self.assertEqual(len(self.clock.getDelayedCalls()), 1)
        self.assertEqual(self.owner(b"7"), User("7", "7"))
        self.engine.keys = [BOB]
        self.result(self.keys.fresh())
        for _ in range(200):
            self.clock.advance(0)
        self.assertEqual(self.successResultOf(ids), [str(n) for n in range(500)])

    def under_way(self) -> Deferred[Sequence[str]]:
        """500 users are asked for, and each look at the clock takes a tenth of a millisecond."""
        self.engine.keys = [AuthorizedKey(str(n), str(n), b"%d" % n) for n in range(500)]
        self.result(self.keys.fresh())

        def seconds() -> float:
            self.clock.rightNow += 0.0001
            return self.clock.rightNow

        self.patch(self.clock, "seconds", seconds)
        ids = start(self.keys.user_ids())
        self.assertNoResult(ids)
        return ids

    def test_cancelled(self) -> None:
        """It may be given up midway."""
        ids = self.under_way()
        ids.cancel()
        self.failureResultOf(ids, CancelledError)
        self.assertEqual(self.clock.getDelayedCalls(), [])


class OptionsTests(KeysTestCase):
    """Keys whose options say from where, until when, and how."""

    def options(self, *lines: KeyOptions) -> None:
        """Alice's key has a line for each."""
        self.engine.keys = [
            AuthorizedKey("1", "alice@internal", ALICE.blob, options) for options in lines
        ]

    def owns(self, address: str = HERE) -> KeyOwner | None:
        return self.result(self.keys.owner(ALICE.blob, address))

    def test_from(self) -> None:
        """A key is let in from its addresses, and refused from others, with a reason."""
        self.options(KeyOptions(sources=("192.0.2.0/24",)))
        self.assertIsNotNone(self.owns())
        text = self.failure(self.keys.owner(ALICE.blob, "198.51.100.1"), KeyRefused)
        self.assertIn("198.51.100.1", text)

    def test_expiry(self) -> None:
        """A key is let in until it expires, also while no new answer came, and not when it
        expires while the engine is asked."""
        self.options(KeyOptions(expires=self.clock.seconds() + 3))
        self.assertIsNotNone(self.owns())
        self.clock.advance(4)
        self.failure(self.keys.owner(ALICE.blob, HERE), KeyRefused)
        self.options(KeyOptions(expires=self.clock.seconds() + 3))
        self.remember()
        self.engine.keys_gate = Deferred()
        waiting = start(self.keys.owner(ALICE.blob, HERE))
        self.clock.advance(4)
        self.engine.keys_gate.callback(None)
        self.failureResultOf(waiting, KeyRefused)

    def test_clock_is_set(self) -> None:
        """It expires by the time of day."""
        day = 1000.0
        self.clock.time_of_day = lambda: day
        self.options(KeyOptions(expires=1001.0))
        self.clock.advance(4)
        self.assertIsNotNone(self.owns())
        day = 1001.1
        self.failure(self.keys.owner(ALICE.blob, HERE), KeyRefused)

    def test_verify(self) -> None:
        """What a line demands of the signature is passed on."""
        for lines, required in (
            ([KeyOptions()], False),
            ([KeyOptions(verify_required=True)], True),
            ([KeyOptions(verify_required=True), KeyOptions()], False),
            ([KeyOptions(), KeyOptions(verify_required=True)], False),
            ([KeyOptions(verify_required=True)] * 2, True),
            ([KeyOptions(verify_required=True), KeyOptions(sources=("198.51.100.1",))], True),
        ):
            self.remember()
            self.options(*lines)
            owner = self.owns()
            assert owner is not None
            self.assertEqual(owner.verify_required, required, lines)

    def test_several_lines(self) -> None:
        """Of a user's lines with one key, one that lets it in is enough; when none does, the
        first one's reason is told."""
        self.options(KeyOptions(sources=("198.51.100.1",)), KeyOptions(sources=(HERE,)))
        self.assertIsNotNone(self.owns())
        self.assertIsNotNone(self.owns("198.51.100.1"))
        self.failure(self.keys.owner(ALICE.blob, "203.0.113.1"), KeyRefused)
        self.remember()
        self.options(KeyOptions(sources=("198.51.100.1",)), KeyOptions(expires=1.0))
        self.assertIn(HERE, self.failure(self.keys.owner(ALICE.blob, HERE), KeyRefused))

    def test_too_many_lines(self) -> None:
        """Of a user's lines with one key the first 16 count; that is logged, once a key."""
        sources = [KeyOptions(sources=(f"198.51.100.{number}",)) for number in range(20)]
        self.options(*sources)
        for number in range(2):
            self.assertIsNotNone(self.owns("198.51.100.15"))
            self.failure(self.keys.owner(ALICE.blob, "198.51.100.16"), KeyRefused)
            self.engine.keys.append(AuthorizedKey("9", "more", b"%d" % number))
            self.clock.advance(6)
        self.assertEqual(len(self.logged("in more than 16 lines")), 1)
        self.assertEqual(len(self.logged(fingerprint(ALICE.blob))), 1)
        self.engine.keys = [
            AuthorizedKey("1", "alice@internal", b"%d" % number, options)
            for number in range(102)
            for options in sources
        ]
        self.result(self.keys.fresh())
        self.assertEqual(len(self.logged("in more than 16 lines")), 1 + 100)


class OutageTests(KeysTestCase):
    """When the engine does not answer."""

    def setUp(self) -> None:
        super().setUp()
        self.owner(ALICE.blob)
        self.answered = self.clock.seconds()
        self.engine.error = EngineUnreachable("The engine does not answer.")

    def test_stale(self) -> None:
        """Within stale_grace the last answer serves, and says from when it is."""
        for seconds in (10, 200, 89.9):
            self.clock.advance(seconds)
            owner = self.result(self.keys.owner(ALICE.blob, HERE))
            self.assertEqual(owner, KeyOwner(User("1", "alice@internal"), False, self.answered))
        self.clock.advance(0.1)
        text = self.failure(self.keys.owner(ALICE.blob, HERE), EngineUnreachable)
        self.assertIn("does not answer. Its last answer, from 5 minutes ago, is too old", text)

    def test_options(self) -> None:
        """What an old answer demands of a key, and of its signature, holds."""
        self.remember()
        verify = KeyOptions(verify_required=True)
        here = KeyOptions(sources=(HERE,))
        self.engine.error = None
        self.engine.keys = [
            AuthorizedKey("1", "alice@internal", ALICE.blob, verify),
            AuthorizedKey("2", "bob@internal", BOB.blob, here),
        ]
        self.owner(ALICE.blob)
        answered = self.clock.seconds()
        self.engine.error = EngineUnreachable("refused")
        self.clock.advance(10)
        owner = self.result(self.keys.owner(ALICE.blob, HERE))
        self.assertEqual(owner, KeyOwner(User("1", "alice@internal"), True, answered))
        self.failure(self.keys.owner(BOB.blob, "198.51.100.1"), KeyRefused)

    def test_grows_old_meanwhile(self) -> None:
        """An answer that was young enough when it was wanted serves, however long the engine then
        takes to fail."""
        self.clock.advance(299)
        self.engine.keys_gate = Deferred()
        waiting = start(self.keys.owner(ALICE.blob, HERE))
        self.clock.advance(5)
        self.engine.keys_gate.callback(None)
        owner = self.successResultOf(waiting)
        self.assertEqual(owner.answered, self.answered)

    def test_fresh(self) -> None:
        """Who wants a fresh answer waits for it, in an outage, too."""
        self.clock.advance(6)
        self.owner(ALICE.blob)
        self.clock.advance(1)
        self.engine.error, self.engine.keys_gate = None, Deferred()
        waiting = start(self.keys.fresh())
        self.clock.advance(4)
        self.assertNoResult(waiting)
        self.engine.keys_gate.callback(None)
        self.assertIn(ALICE.blob, self.successResultOf(waiting).users)

    def test_never(self) -> None:
        """With a stale_grace of 0 it never does."""
        self.remember(stale_grace=0)
        self.engine.error = None
        self.owner(ALICE.blob)
        self.engine.error = EngineUnreachable("refused")
        self.clock.advance(6)
        self.failure(self.keys.owner(ALICE.blob, HERE), EngineUnreachable)

    def test_no_answer_before(self) -> None:
        """Without any answer before, the error comes through; it is believed for a second."""
        self.remember()
        self.engine.asked.clear()
        for _ in range(10):
            text = self.failure(self.keys.owner(ALICE.blob, HERE), EngineUnreachable)
            self.assertEqual(text, "The engine does not answer.")
        self.assertEqual(self.asked, 1)
        self.engine.error = None
        self.clock.advance(1.0)
        self.assertIsNotNone(self.owner(ALICE.blob))

    def test_strange_key(self) -> None:
        """Nobody knows whether a key that is not in the old answer is a new one: that is told."""
        self.clock.advance(120)
        text = self.failure(self.keys.owner(b"stranger", HERE), EngineUnreachable)
        self.assertIn("its last answer, from 2 minutes ago, names no one user", text)

    def test_strange_key_at_once(self) -> None:
        """So it is when the last answer is only a moment old."""
        self.remember(cache_ttl=0.5)
        self.engine.error = None
        self.owner(ALICE.blob)
        self.engine.error = EngineUnreachable("refused")
        self.clock.advance(0.6)
        self.assertIsNotNone(self.result(self.keys.owner(ALICE.blob, HERE)).answered)
        self.failure(self.keys.owner(b"stranger", HERE), EngineUnreachable)

    def test_back(self) -> None:
        """Once it is back its new answer counts."""
        self.clock.advance(100)
        self.owner(ALICE.blob)
        self.engine.error, self.engine.keys = None, [BOB]
        self.clock.advance(1)
        self.assertIsNone(self.owner(ALICE.blob))

    def test_useless_answers(self) -> None:
        """An answer that is no use is an answer: the older one does not serve."""
        self.engine.error = EngineError("403")
        self.clock.advance(6)
        self.assertEqual(self.failure(self.keys.owner(ALICE.blob, HERE), EngineError), "403")

    def test_hanging(self) -> None:
        """In an outage nobody waits longer than a second for an engine that hangs; one that
        still answers in time is believed."""
        self.clock.advance(6)
        self.owner(ALICE.blob)
        self.clock.advance(6)
        self.engine.keys_gate = Deferred()
        waiting = start(self.keys.owner(ALICE.blob, HERE))
        self.clock.advance(0.9)
        self.assertNoResult(waiting)
        self.clock.advance(0.1)
        owner = self.successResultOf(waiting)
        self.assertEqual(owner.answered, self.answered)
        self.engine.error, self.engine.keys = None, [BOB]
        waiting = start(self.keys.owner(ALICE.blob, HERE))
        self.engine.keys_gate.callback(None)
        self.assertIsNone(self.successResultOf(waiting))


class _TickingClock(Clock):
    """Each look at it takes a tenth of a millisecond. ``pause`` is called when somebody lets go."""

    pause: Callable[[], None]

    def seconds(self) -> float:
        self.rightNow += 0.0001
        return super().seconds()

    def callLater(self, delay: float, *arguments: Any, **keywords: Any) -> DelayedCall:
        self.pause()
        return super().callLater(delay, *arguments, **keywords)


@implementer(IEngine)
class _LongAnswer:
    """Many keys, that take a while to read."""

    def __init__(self, count: int) -> None:
        self.read = 0
        self.digest = b""
        self._count = count

    async def authorized_keys(self) -> KeyList:
        return KeyList(self.digest, self._keys())

    def _keys(self) -> Iterator[AuthorizedKey]:
        for number in range(self._count):
            self.read += 1
            yield AuthorizedKey(str(number), "user", b"%d" % number)

    async def consoles(self, user_id: str) -> Sequence[ConsoleInfo]:
        return ()


class SliceTests(EngineTestCase):
    """Long work is done in slices."""

    def test_many_keys(self) -> None:
        """A long answer is indexed a slice at a time, and slices are not much shorter than they
        may be; so is an index emptied that was replaced."""
        clock = _TickingClock()
        engine = _LongAnswer(200)
        pauses = [0]
        clock.pause = lambda: pauses.append(engine.read)
        keys = AuthorizedKeys(engine, clock, Lifetimes(5, 300), Outage())
        waiting = start(keys.owner(b"99", HERE))
        clock.advance(0)
        self.assertIsNotNone(self.successResultOf(waiting))
        self.assertGreater(len(pauses), 10)
        self.assertLess(len(pauses), 50)
        for before, after in pairwise(pauses):
            self.assertLessEqual(after - before, 11)
        old = self.result(keys.fresh())
        engine.digest = b"another"
        pauses[:] = []
        clock.pause = lambda: pauses.append(len(old.users))
        waiting = start(keys.fresh())
        clock.advance(0)
        self.successResultOf(waiting)
        clock.advance(0)
        self.assertEqual(len(old.users), 0)
        for before, after in pairwise([*pauses, 0]):
            self.assertLessEqual(before - after, 11)

    def test_clock_set_back(self) -> None:
        """A clock that is set back does not make one slice of all the rest."""
        clock = Clock()
        clock.advance(1000)
        taken = []

        def steps() -> Iterator[None]:
            for number in range(10):
                clock.rightNow -= 1
                taken.append(number)
                yield

        done = start(in_slices(steps(), clock))
        self.assertLess(len(taken), 10)
        for _ in range(10):
            clock.advance(0)
        self.successResultOf(done)
        self.assertEqual(len(taken), 10)

    def test_failure(self) -> None:
        """What a step raises comes through."""

        def steps() -> Iterator[None]:
            yield
            raise EngineError("half")

        self.failure(in_slices(steps(), self.clock), EngineError)
