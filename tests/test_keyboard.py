"""Who of those on a console has its keyboard, and what each of them is told."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as some
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from vmconsole.console.keyboard import Keyboard

_HAS = re.compile(r"(\w+) (?:has|have|keeps?) the keyboard")


class Somebody:
    """A Typist, who notes what they are told, and what they know by it."""

    def __init__(self, keyboard: Keyboard, name: str, may_type: bool, wants: bool) -> None:
        self.keyboard = keyboard
        self.name = name
        self.may_type = may_type
        self.wants_keyboard = wants
        self.typed_at = 0.0
        self.lines: list[str] = []
        self.moves: list[bool] = []
        """For each time that the keyboard moved to or from them, whether they had it then."""
        # Who is told nothing at the start has it.
        self.believes = name

    def keyboard_moved(self) -> None:
        self.moves.append(self.has_it)

    def tell(self, text: str, hint: str = "") -> None:
        self.lines.append(f"{text} {hint.format(key='^]')}".rstrip())
        for who in _HAS.findall(text):
            if who != "not":
                self.believes = self.name if who in ("You", "you") else who

    @property
    def has_it(self) -> bool:
        return self.keyboard.holder is self

    def told(self) -> list[str]:
        """The lines since the last time."""
        lines, self.lines = self.lines, []
        return lines


class KeyboardTestCase(SynchronousTestCase):
    """A keyboard that passes after 60 seconds without a key, and may be taken."""

    takeover = True

    def setUp(self) -> None:
        self.clock = Clock()
        self.keyboard = Keyboard(self.clock, "vm1", self.takeover, 60.0)

    def comes(self, name: str, may_type: bool = True, wants: bool = True) -> Somebody:
        """Somebody attaches."""
        who = Somebody(self.keyboard, name, may_type, wants)
        self.keyboard.join(who)
        return who

    def types(self, who: Somebody) -> None:
        """They type now."""
        self.assertTrue(who.has_it)
        who.typed_at = self.clock.seconds()

    def alice_and_bob(self) -> tuple[Somebody, Somebody]:
        """Alice has it; Bob has come, and has read that."""
        alice, bob = self.comes("alice"), self.comes("bob")
        bob.told()
        return alice, bob

    def assertOver(self) -> None:
        """Nothing waits any more."""
        self.assertEqual(self.clock.getDelayedCalls(), [])


class ArrivalTests(KeyboardTestCase):
    """Who comes."""

    def test_alone(self) -> None:
        """The first one has the keyboard, and needs no line for it."""
        alice = self.comes("alice")
        self.assertTrue(alice.has_it)
        self.assertEqual(alice.told(), [])

    def test_in_use(self) -> None:
        """Who comes later is told who has it, since when, how long idle, and what can be done; the
        holder is not bothered."""
        alice = self.comes("alice")
        self.clock.advance(300)
        self.types(alice)
        self.clock.advance(3)
        bob = self.comes("bob")
        self.assertEqual(
            bob.told(),
            [
                "You watch. alice has the keyboard, held for 5 minutes, idle for 3 seconds. "
                "^] t asks for the keyboard."
            ],
        )
        self.assertEqual(alice.told(), [])

    def test_held_since(self) -> None:
        """Since when is since they got the keyboard, not since they came."""
        alice, bob = self.alice_and_bob()
        self.clock.advance(500)
        self.keyboard.leave(alice)
        self.clock.advance(7)
        carol = self.comes("carol")
        self.assertIn("bob has the keyboard, held for 7 seconds, idle for 7 s", carol.told()[0])
        self.assertTrue(bob.has_it)

    def test_watches_only(self) -> None:
        """Who wants to watch only does not get a keyboard that is free, but may take it."""
        bob = self.comes("bob", wants=False)
        self.assertIsNone(self.keyboard.holder)
        self.assertEqual(
            bob.told(), ["You watch. Nobody has the keyboard. ^] t takes the keyboard."]
        )
        self.keyboard.ask(bob)
        self.assertTrue(bob.has_it)
        self.assertEqual(bob.told(), ["You have the keyboard."])

    def test_watched_only_once(self) -> None:
        """Who took it although they came to watch only wants it from then on, as others do."""
        alice, bob = self.comes("alice"), self.comes("bob", wants=False)
        self.comes("carol")
        self.keyboard.ask(bob)
        self.keyboard.ask(bob)
        self.keyboard.ask(alice)
        self.keyboard.ask(alice)
        self.assertTrue(alice.has_it)
        self.keyboard.leave(alice)
        self.assertTrue(bob.has_it)

    def test_viewer(self) -> None:
        """A viewer is told that they may only watch, gets no hint, and can do nothing else."""
        vera = self.comes("vera", may_type=False)
        self.assertEqual(vera.told(), ["You may only watch vm1. Nobody has the keyboard."])
        for _ in range(2):
            self.keyboard.ask(vera)
            self.assertEqual(vera.told(), ["You may only watch vm1."])
        self.keyboard.keep(vera)
        self.assertEqual(vera.told(), ["You do not have the keyboard."])
        self.keyboard.refuse(vera)
        self.assertEqual(vera.told(), ["You may only watch vm1; what you type goes nowhere."])
        self.assertIsNone(self.keyboard.holder)
        alice = self.comes("alice")
        self.keyboard.ask(vera)
        self.keyboard.leave(alice)
        self.assertIsNone(self.keyboard.holder)

    def test_watchers_are_told(self) -> None:
        """Who gets a free keyboard by coming is told that others watch, and those who has it."""
        bob, vera = self.comes("bob", wants=False), self.comes("vera", may_type=False)
        bob.told(), vera.told()
        alice = self.comes("alice")
        self.assertEqual(alice.told(), ["You have the keyboard; others watch. ^] w lists them."])
        for who in (bob, vera):
            self.assertEqual(who.told(), ["alice has the keyboard now."])

    def test_typed_without_it(self) -> None:
        """Who types without the keyboard is told who has it, and how to get it."""
        _, bob = self.alice_and_bob()
        self.keyboard.refuse(bob)
        self.assertEqual(
            bob.told(),
            [
                "You watch. alice has the keyboard, held for 0 seconds, idle for 0 seconds. "
                "^] t asks for it."
            ],
        )
        watcher = self.comes("watcher", wants=False)
        self.keyboard.leave(bob)
        self.keyboard.leave(self.keyboard.holder)  # type: ignore[arg-type]
        watcher.told()
        self.keyboard.refuse(watcher)
        self.assertEqual(watcher.told(), ["Nobody has the keyboard. ^] t takes it."])


class RequestTests(KeyboardTestCase):
    """Asking for it."""

    def test_ask(self) -> None:
        """Both see the request, and the holder the two keys that answer it; nothing has moved."""
        alice, bob = self.alice_and_bob()
        self.keyboard.ask(bob)
        self.assertEqual(
            alice.told(),
            [
                "bob asks for the keyboard; 60 seconds after your last key it passes. "
                "^] t gives it, ^] n keeps it."
            ],
        )
        [line] = bob.told()
        self.assertIn("alice has the keyboard", line)
        self.assertIn("They were asked; 60 seconds after their last key it passes.", line)
        self.assertTrue(line.endswith("^] t again takes it."))
        self.assertTrue(alice.has_it)

    def test_give(self) -> None:
        """The holder gives it; all hear who gave it, and who has it."""
        alice, bob = self.alice_and_bob()
        carol = self.comes("carol")
        self.keyboard.ask(bob)
        for who in (alice, bob, carol):
            who.told()
        self.keyboard.ask(alice)
        self.assertTrue(bob.has_it)
        self.assertEqual(
            alice.told(),
            ["alice gave it. bob has the keyboard now; you watch. ^] t asks for it."],
        )
        self.assertEqual(bob.told(), ["alice gave it. You have the keyboard."])
        self.assertEqual(carol.told(), ["alice gave it. bob has the keyboard now."])
        self.assertOver()

    def test_nothing_to_give(self) -> None:
        """Without a request the keys that answer one say so, and nothing moves."""
        alice, bob = self.alice_and_bob()
        self.keyboard.ask(alice)
        self.keyboard.keep(alice)
        self.assertEqual(
            alice.told(), ["You have the keyboard.", "Nobody has asked for the keyboard."]
        )
        self.keyboard.keep(bob)
        self.assertEqual(bob.told(), ["You do not have the keyboard."])
        self.assertTrue(alice.has_it)

    def test_passes_when_idle(self) -> None:
        """60 seconds after the holder's last key it passes by itself, and not before."""
        alice, bob = self.alice_and_bob()
        self.keyboard.ask(bob)
        self.clock.advance(50)
        self.types(alice)
        self.clock.advance(59)
        self.assertTrue(alice.has_it)
        alice.told(), bob.told()
        self.clock.advance(1)
        self.assertTrue(bob.has_it)
        self.assertEqual(bob.told(), ["alice was idle for 60 seconds. You have the keyboard."])
        self.assertEqual(
            alice.told(),
            [
                "alice was idle for 60 seconds. bob has the keyboard now; you watch. "
                "^] t asks for it."
            ],
        )
        self.assertOver()

    def test_idle_without_a_request(self) -> None:
        """However idle the holder, without a request it stays where it is."""
        alice, _ = self.alice_and_bob()
        self.clock.advance(100000)
        self.assertTrue(alice.has_it)
        self.assertOver()

    def test_idle_already(self) -> None:
        """Of a holder who has been idle for that long nobody has to ask."""
        _, bob = self.alice_and_bob()
        self.clock.advance(200)
        self.keyboard.ask(bob)
        self.assertEqual(bob.told(), ["alice was idle for 3 minutes. You have the keyboard."])

    def test_take(self) -> None:
        """Asked twice, it is taken: who had it and the others hear who did."""
        alice, bob = self.alice_and_bob()
        vera = self.comes("vera", may_type=False)
        self.keyboard.ask(bob)
        for who in (alice, bob, vera):
            who.told()
        self.keyboard.ask(bob)
        self.assertTrue(bob.has_it)
        self.assertEqual(bob.told(), ["bob took it. You have the keyboard."])
        self.assertEqual(
            alice.told(), ["bob took it. bob has the keyboard now; you watch. ^] t asks for it."]
        )
        self.assertEqual(vera.told(), ["bob took it. bob has the keyboard now."])
        self.assertOver()

    def test_keep(self) -> None:
        """The holder keeps it: who asked is told, and it does not pass by itself; but it can still
        be taken."""
        alice, bob = self.alice_and_bob()
        self.keyboard.ask(bob)
        alice.told(), bob.told()
        self.keyboard.keep(alice)
        self.assertEqual(alice.told(), ["You keep the keyboard; bob is told."])
        self.assertEqual(bob.told(), ["alice keeps the keyboard. ^] t again takes it."])
        self.clock.advance(100)
        self.assertTrue(alice.has_it)
        self.keyboard.keep(alice)
        self.assertEqual(alice.told(), ["Nobody has asked for the keyboard."])
        self.types(alice)
        self.keyboard.ask(bob)
        self.assertEqual(bob.told(), ["bob took it. You have the keyboard."])

    def test_kept_from_one(self) -> None:
        """Who was refused is in nobody's way: another may ask, and the holder gives it to them."""
        alice, bob = self.alice_and_bob()
        carol = self.comes("carol")
        self.keyboard.ask(bob)
        self.keyboard.keep(alice)
        self.keyboard.ask(alice)
        self.assertTrue(alice.has_it)
        alice.told()
        self.keyboard.ask(carol)
        self.assertIn("carol asks for the keyboard", alice.told()[0])
        self.keyboard.ask(alice)
        self.assertTrue(carol.has_it)

    def test_several(self) -> None:
        """Several may ask; the first gets it, each of them may take it, one key refuses all."""
        alice, bob = self.alice_and_bob()
        carol = self.comes("carol")
        self.keyboard.ask(bob)
        self.keyboard.ask(carol)
        self.assertEqual([line.split()[0] for line in alice.told()], ["bob", "carol"])
        self.keyboard.keep(alice)
        self.assertEqual(alice.told(), ["You keep the keyboard; bob, carol are told."])
        for who in (bob, carol):
            self.assertEqual(who.told()[-1], "alice keeps the keyboard. ^] t again takes it.")
        self.keyboard.ask(carol)
        self.assertTrue(carol.has_it)
        self.keyboard.ask(bob)
        self.keyboard.ask(alice)
        self.clock.advance(60)
        self.assertTrue(bob.has_it)
        self.assertOver()

    def test_asker_leaves(self) -> None:
        """When who asked goes, the holder is told that nothing will pass, and nothing does."""
        alice, bob = self.alice_and_bob()
        self.keyboard.ask(bob)
        alice.told()
        self.keyboard.leave(bob)
        self.assertEqual(alice.told(), ["bob left; you keep the keyboard."])
        self.assertOver()
        self.keyboard.ask(alice)
        self.assertEqual(alice.told(), ["You have the keyboard."])

    def test_one_of_several_leaves(self) -> None:
        """When one of those who asked goes, the request of the next one still counts."""
        alice, bob = self.alice_and_bob()
        carol = self.comes("carol")
        self.keyboard.ask(bob)
        self.keyboard.ask(carol)
        alice.told()
        self.keyboard.leave(bob)
        self.assertEqual(alice.told(), [])
        self.clock.advance(60)
        self.assertTrue(carol.has_it)

    def test_no_wait(self) -> None:
        """With a handover_idle of 0 it passes to who asks, at once."""
        self.keyboard = Keyboard(self.clock, "vm1", True, 0.0)
        _, bob = self.alice_and_bob()
        self.keyboard.ask(bob)
        self.assertTrue(bob.has_it)
        self.assertOver()


class NoTakeoverTests(KeyboardTestCase):
    """Where it may not be taken."""

    takeover = False

    def test_ask_twice(self) -> None:
        """Asking again takes nothing, and no line says that it would."""
        alice, bob = self.alice_and_bob()
        self.keyboard.ask(bob)
        self.assertTrue(bob.told()[0].endswith("after their last key it passes."))
        self.keyboard.ask(bob)
        self.assertEqual(bob.told(), ["alice has been asked."])
        self.assertTrue(alice.has_it)
        self.assertEqual(len(alice.told()), 1)

    def test_refused(self) -> None:
        """Who was refused may ask again, and then it passes by itself."""
        alice, bob = self.alice_and_bob()
        self.keyboard.ask(bob)
        self.keyboard.keep(alice)
        self.assertEqual(bob.told()[-1], "alice keeps the keyboard.")
        alice.told()
        self.keyboard.ask(bob)
        self.assertIn("bob asks for the keyboard", alice.told()[0])
        self.clock.advance(60)
        self.assertTrue(bob.has_it)


class DepartureTests(KeyboardTestCase):
    """The holder goes, or may type no longer."""

    def test_heir_asked(self) -> None:
        """It goes to who asked for it, before those who have waited longer; all are told."""
        alice, bob = self.alice_and_bob()
        carol, vera = self.comes("carol"), self.comes("vera", may_type=False)
        self.keyboard.ask(carol)
        for who in (bob, carol, vera):
            who.told()
        self.keyboard.leave(alice)
        self.assertTrue(carol.has_it)
        self.assertEqual(carol.told(), ["alice left. You have the keyboard."])
        for who in (bob, vera):
            self.assertEqual(who.told(), ["alice left. carol has the keyboard."])
        self.assertOver()

    def test_heir_waited(self) -> None:
        """Else to who has waited longest, of those who want it and may type."""
        alice = self.comes("alice")
        self.comes("vera", may_type=False)
        self.comes("watcher", wants=False)
        bob = self.comes("bob")
        self.comes("carol")
        self.keyboard.leave(alice)
        self.assertTrue(bob.has_it)

    def test_nobody(self) -> None:
        """Else to nobody: those who may take it are told how."""
        alice, vera = self.comes("alice"), self.comes("vera", may_type=False)
        watcher = self.comes("watcher", wants=False)
        vera.told(), watcher.told()
        self.keyboard.leave(alice)
        self.assertEqual(vera.told(), ["alice left. Nobody has the keyboard."])
        self.assertEqual(watcher.told(), ["alice left. Nobody has the keyboard. ^] t takes it."])

    def test_a_watcher_goes(self) -> None:
        """Who only watched goes without a word, and who is unknown changes nothing."""
        alice, bob = self.alice_and_bob()
        self.keyboard.leave(bob)
        self.keyboard.leave(bob)
        self.assertEqual(alice.told(), [])
        self.assertTrue(alice.has_it)

    def test_demoted_holder(self) -> None:
        """A holder who may only watch from now on loses it, as if they had left; they are told who
        has it, too."""
        alice, bob = self.alice_and_bob()
        carol = self.comes("carol", wants=False)
        carol.told()
        alice.may_type = False
        self.keyboard.may_type_changed(alice)
        self.assertTrue(bob.has_it)
        self.assertEqual(bob.told(), ["alice may only watch now. You have the keyboard."])
        self.assertEqual(carol.told(), ["alice may only watch now. bob has the keyboard."])
        self.assertEqual(alice.told(), ["bob has the keyboard."])
        bob.may_type = False
        self.keyboard.may_type_changed(bob)
        self.assertIsNone(self.keyboard.holder)
        self.assertEqual(
            carol.told(), ["bob may only watch now. Nobody has the keyboard. ^] t takes it."]
        )
        self.assertEqual(alice.told(), ["bob may only watch now. Nobody has the keyboard."])
        self.assertEqual(bob.told(), ["Nobody has the keyboard."])

    def test_demoted_asker(self) -> None:
        """One who asked, and may only watch from now on, gets nothing; the holder is told."""
        alice, bob = self.alice_and_bob()
        self.keyboard.ask(bob)
        alice.told()
        bob.may_type = False
        self.keyboard.may_type_changed(bob)
        self.assertEqual(alice.told(), ["bob may only watch now; you keep the keyboard."])
        self.clock.advance(100)
        self.assertTrue(alice.has_it)

    def test_demoted_after_a_refusal(self) -> None:
        """Who was refused, and was a viewer in between, has to ask anew."""
        alice, bob = self.alice_and_bob()
        self.keyboard.ask(bob)
        self.keyboard.keep(alice)
        for may_type in (False, True):
            bob.may_type = may_type
            self.keyboard.may_type_changed(bob)
        self.keyboard.ask(bob)
        self.assertTrue(alice.has_it)

    def test_promoted(self) -> None:
        """A viewer who may type from now on gets a keyboard that is free, if they want it; else
        they are told who has it, and how to get it."""
        vera, bob = self.comes("vera", may_type=False), self.comes("bob", wants=False)
        viewer = self.comes("viewer", may_type=False, wants=False)
        for who in (vera, bob, viewer):
            who.told()
            who.may_type = True
        self.keyboard.may_type_changed(viewer)
        self.assertEqual(viewer.told(), ["Nobody has the keyboard. ^] t takes it."])
        self.keyboard.may_type_changed(vera)
        self.assertTrue(vera.has_it)
        self.assertEqual(vera.told(), ["You have the keyboard."])
        self.assertEqual(bob.told(), ["vera has the keyboard now."])
        viewer.told()
        self.keyboard.may_type_changed(viewer)
        self.assertEqual(
            viewer.told(),
            ["vera has the keyboard, held for 0 seconds, idle for 0 seconds. ^] t asks for it."],
        )
        self.keyboard.may_type_changed(vera)
        self.assertEqual(vera.told(), [])

    def test_closed(self) -> None:
        """When the console ends nothing passes any more, and nobody is told anything."""
        alice, bob = self.alice_and_bob()
        self.keyboard.ask(bob)
        alice.told(), bob.told()
        self.keyboard.close()
        self.assertOver()
        self.keyboard.leave(alice)
        self.assertEqual((alice.told(), bob.told()), ([], []))
        self.assertIsNone(self.keyboard.holder)


steps = some.tuples(
    some.sampled_from(["come", "leave", "ask", "ask", "keep", "type", "role", "refuse", "time"]),
    some.integers(0, 4),
    some.booleans(),
    some.booleans(),
)


class AnyOrderTests(SynchronousTestCase):
    """Whatever happens, in whatever order."""

    @given(some.lists(steps, max_size=40), some.booleans(), some.sampled_from([0.0, 0.1, 60.0]))
    def test_everybody_knows(
        self, happens: list[tuple[str, int, bool, bool]], takeover: bool, idle: float
    ) -> None:
        """One has it or nobody, and only one who may type. Everybody on the console knows who, by
        the last line that they were told of it; who got it or lost it was informed before. While
        somebody may type and wants it, it is not free."""
        clock = Clock()
        clock.advance(1e9 + 0.1)
        keyboard = Keyboard(clock, "vm1", takeover, idle)
        here: dict[str, Somebody] = {}
        for what, number, first, second in happens:
            name = "abcde"[number]
            who = here.get(name)
            if what == "come" and who is None:
                here[name] = who = Somebody(keyboard, name, first, second)
                keyboard.join(who)
            elif what == "time":
                clock.advance((0.03, 1, 30, 60, 100)[number])
            elif who is not None and what == "leave":
                del here[name]
                keyboard.leave(who)
            elif who is not None and what == "role" and who.may_type is not first:
                who.may_type = first
                keyboard.may_type_changed(who)
            elif who is not None and what == "ask":
                keyboard.ask(who)
            elif who is not None and what == "keep":
                keyboard.keep(who)
            elif who is not None and what == "type":
                if who.has_it:
                    who.typed_at = clock.seconds()
                else:
                    keyboard.refuse(who)
            holder = keyboard.holder
            if holder is None:
                self.assertEqual(
                    [one.name for one in here.values() if one.may_type and one.wants_keyboard], []
                )
            else:
                self.assertIs(here[holder.name], holder)
                self.assertTrue(holder.may_type)
            for one in here.values():
                self.assertEqual(one.believes, "Nobody" if holder is None else holder.name)
                self.assertEqual(one.moves[-1:] == [True], one is holder)
        for one in list(here.values()):
            keyboard.leave(one)
        self.assertIsNone(keyboard.holder)
        self.assertEqual(clock.getDelayedCalls(), [])
