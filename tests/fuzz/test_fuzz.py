"""A short run with a fixed seed, and the proof that the harness finds what it should."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

from twisted.trial.unittest import SynchronousTestCase

from tests.fuzz.campaign import Campaign, Discovery, Shrinker, load, make_program, save
from tests.fuzz.command import main
from tests.fuzz.edits import edit
from tests.fuzz.grammar import Grammar, hello, string
from tests.fuzz.holes import HOLES
from tests.fuzz.keyring import Malformed, Reader, make_ring, sign
from tests.fuzz.logins import judge
from tests.fuzz.measure import measured
from tests.fuzz.peer import Runaway
from tests.fuzz.play import Finding
from tests.fuzz.slices import SEED, SliceCase
from tests.fuzz.steps import Program, Step
from tests.fuzz.watchdog import cpu_limit
from tests.fuzz.world import start_logging

CORPUS = Path(__file__).parent / "corpus"


def setUpModule() -> None:
    """Connections that ended must not be kept by events that nobody reads."""
    start_logging()


def found(hole: str, layer: str, packets: int, seed: int = 1) -> Discovery | None:
    """The first that is found in a server with this hole."""
    campaign = Campaign(seed, [layer], HOLES[hole])
    while campaign.packets < packets:
        discovery = campaign.run_one()
        if discovery is not None:
            return discovery
    return None


class SliceTests(SliceCase):
    """The server, as it is, a few thousand packets of each layer."""

    def test_bytes(self) -> None:
        """Bytes that are no ssh, version lines, and packets in the clear."""
        campaign = self.fuzz("bytes", 3000)
        self.assertGreater(campaign.endings["reason 2"], 100)

    def test_handshakes(self) -> None:
        """Handshakes whose packets come twice, changed, in another order, damaged or not at all."""
        self.fuzz("handshake", 2000)

    def test_logins(self) -> None:
        """Requests to be let in: names, methods, keys, certificates and signatures of all kinds."""
        campaign = self.fuzz("login", 3000)
        self.assertGreater(campaign.endings["reason 14"], 5)

    def test_sessions(self) -> None:
        """Channels, their requests and data, windows, and the transport in between."""
        campaign = self.fuzz("session", 5000)
        self.assertGreater(campaign.endings["the client leaves"], 20)

    def test_repeats(self) -> None:
        """The same, said a thousand times."""
        self.fuzz("repeat", 6000)

    def test_corpus(self) -> None:
        """What once found something finds nothing any more."""
        campaign = Campaign(SEED, ["login"])
        programs = sorted(CORPUS.glob("*.json"))
        self.assertGreater(len(programs), 10)
        wrong = {path.name: campaign.play(load(path)) for path in programs}
        self.assertEqual({name: what for name, what in wrong.items() if what is not None}, {})
        self.assertEqual(self.flushLoggedErrors(), [])


class HoleTests(SynchronousTestCase):
    """Each hole that is opened on purpose is found, and by its own rule."""

    def check(self, hole: str, layer: str, packets: int, oracle: str) -> Program:
        """It is found, shrunk, and nothing is wrong with the same program without the hole."""
        discovery = found(hole, layer, packets)
        self.flushLoggedErrors()
        assert discovery is not None, f"{hole} was not found"
        self.assertEqual(discovery.finding.oracle, oracle, discovery.finding.what)
        again = Campaign(1, [layer], HOLES[hole]).play(discovery.program)
        self.flushLoggedErrors()
        self.assertEqual(again and again.oracle, oracle)
        self.assertIsNone(Campaign(1, [layer]).play(discovery.program))
        return discovery.program

    def test_exception(self) -> None:
        """An exception that gets out of dataReceived."""
        program = self.check("unguarded", "session", 2000, "escaped")
        self.assertLess(len(program), 6)

    def test_login(self) -> None:
        """A login without a signature."""
        program = self.check("credulous", "login", 2000, "login")
        self.assertEqual(len(program), 2)

    def test_growth_by_bytes(self) -> None:
        """Data of requests that are kept."""
        self.check("hoarding", "repeat", 60000, "growth")

    def test_growth_by_things(self) -> None:
        """A small thing for each request."""
        self.check("remembering", "repeat", 60000, "growth")

    def test_growth_before_the_login(self) -> None:
        """A packet that is larger than it may be before the login."""
        self.check("boundless", "bytes", 20000, "growth")

    def test_unanswered(self) -> None:
        """A request that gets no reply."""
        self.check("mute", "session", 3000, "unanswered")

    def test_window(self) -> None:
        """More data than the client has room for."""
        self.check("chatty", "session", 10000, "window")

    def test_sessions(self) -> None:
        """More sessions than there may be."""
        self.check("crowded", "session", 5000, "sessions")

    def test_after_the_end(self) -> None:
        """Packets that count though the connection is over."""
        self.check("careless", "session", 3000, "after-disconnect")
        # One that comes when the server has closed already.
        grammar = Grammar(Random(1))
        stray = grammar.send(["c", 97], ["u", 99])
        program = [hello(grammar.random), grammar.login(), stray]
        finding = Campaign(1, ["session"], HOLES["careless"]).play(program)
        assert finding is not None
        self.assertIn("a packet was handled", finding.what)

    def test_timer(self) -> None:
        """A timer that outlives its connection."""
        self.check("lingering", "login", 1000, "timers")

    def test_log(self) -> None:
        """An error in the log."""
        self.check("noisy", "session", 3000, "log")

    def test_wrong_reply(self) -> None:
        """A reply that must not be given."""
        self.check("generous", "session", 3000, "reply")

    def test_sequence(self) -> None:
        """A reply about another packet."""
        self.check("miscounting", "session", 3000, "sequence")

    def test_end_without_a_word(self) -> None:
        """A connection that is closed, and the client is not told why."""
        self.check("abrupt", "login", 1000, "disconnect")

    def test_end_for_nothing(self) -> None:
        """A client that broke no rule is put out."""
        program = self.check("touchy", "session", 10000, "disconnect")
        self.assertLess(len(program), 8)

    def test_connections_that_stay(self) -> None:
        """What is kept of connections that are gone: themselves, or something for each."""
        for hole, oracle in (("immortal", "freed"), ("collecting", "kept")):
            discovery = found(hole, "login", 10000)
            self.assertEqual(discovery and discovery.finding.oracle, oracle)

    def test_attached(self) -> None:
        """A guest that stays attached when the client is gone."""
        self.check("forgetful", "session", 3000, "attached")


class JudgeTests(SynchronousTestCase):
    """Which logins may be granted, told without the server's code."""

    def setUp(self) -> None:
        self.ring = make_ring()

    def request(self, name: str, algorithm: bytes, how: str = "", user: bytes = b"vmproxy") -> Any:
        """A request with a signature, judged."""
        known = self.ring[name]
        parts = [user, b"ssh-connection", b"publickey"]
        body = b"".join(len(part).to_bytes(4, "big") + part for part in parts) + b"\1"
        for part in (algorithm, known.blob):
            body += len(part).to_bytes(4, "big") + part
        message = (7).to_bytes(4, "big") + b"session" + b"\x32" + body
        signature = sign(known, message, algorithm, how)
        body += len(signature).to_bytes(4, "big") + signature
        return judge(Reader(body), b"session", self.ring, frozenset([b"vmproxy"]))

    def test_good(self) -> None:
        """A signature by a key that may log in, with an algorithm of the key's."""
        for name, algorithm in (
            ("alice", b"ssh-ed25519"),
            ("ecdsa", b"ecdsa-sha2-nistp256"),
            ("rsa", b"rsa-sha2-256"),
            ("rsa", b"rsa-sha2-512"),
            ("sk", b"sk-ssh-ed25519@openssh.com"),
        ):
            self.assertTrue(self.request(name, algorithm).exact, name)

    def test_bad(self) -> None:
        """Another message, name, algorithm, hash; a key that is unknown, too small, untouched."""
        for name, algorithm, how, user in (
            ("alice", b"ssh-ed25519", "other", b"vmproxy"),
            ("alice", b"ssh-ed25519", "", b"root"),
            ("alice", b"rsa-sha2-256", "", b"vmproxy"),
            ("rsa", b"ssh-rsa", "", b"vmproxy"),
            ("rsa", b"rsa-sha2-256", "sha1", b"vmproxy"),
            ("small", b"rsa-sha2-256", "", b"vmproxy"),
            ("stranger", b"ssh-ed25519", "", b"vmproxy"),
            ("sk", b"sk-ssh-ed25519@openssh.com", "absent", b"vmproxy"),
        ):
            self.assertFalse(self.request(name, algorithm, how, user).good, (name, how))

    def test_cut(self) -> None:
        """What is cut is malformed; to the lenient reader a string that is cut is a shorter one."""
        with self.assertRaises(Malformed):
            Reader(b"\0\0\0\5abc").string()
        self.assertEqual(Reader(b"\0\0\0\5abc", lenient=True).string(), b"abc")
        with self.assertRaises(Malformed):
            Reader(b"\0\0", lenient=True).uint32()


class ProgramTests(SynchronousTestCase):
    """Programs: made, edited, shrunk, kept."""

    def test_same_seed(self) -> None:
        """A seed makes one program, and another seed another."""
        for layer in ("bytes", "handshake", "login", "session", "repeat"):
            one = make_program(layer, "1/x/1")
            self.assertEqual(one, make_program(layer, "1/x/1"))
            self.assertNotEqual(one, make_program(layer, "1/x/2"))

    def test_edit(self) -> None:
        """Edits change bytes where they say; a place behind the end is counted from the start."""
        for change, expected in (
            (["flip", 1, 1], b"acc"),
            (["flip", 5, 1], b"acc"),
            (["cut", 2], b"ab"),
            (["add", "64"], b"abcd"),
            (["put", 0, "64"], b"dabc"),
            (["drop", 0, 2], b"c"),
        ):
            self.assertEqual(edit(b"abc", [change]), expected, change)

    def test_shrink(self) -> None:
        """Steps that are not needed go, and so do tampers, edits and repetitions."""
        needed: Step = ["send", [["c", 1]], [], 0]
        edited: Step = ["send", [["c", 1]], [["cut", 3]], 1]
        more: Step = ["sleep", 1]
        program = [["hello", "", [[0, "drop"]]], *[more] * 20, edited, *[more] * 20]
        program += [["repeat", 64, [needed]], more]

        def fails(smaller: Program) -> bool:
            kinds = [step[0] for step in smaller]
            return "send" in kinds and "repeat" in kinds

        shrunk = Shrinker(fails).shrink(program)
        self.assertEqual(shrunk, [["hello", "", []], needed, ["repeat", 1, [needed]]])

    def test_shrink_is_bounded(self) -> None:
        """A program that shrinks slowly is given up."""
        tries: Counter[str] = Counter()

        def never(smaller: Program) -> bool:
            tries["all"] += 1
            return False

        Shrinker(never).shrink([["sleep", number] for number in range(5000)])
        self.assertLessEqual(tries["all"], 400)

    def test_save(self) -> None:
        """A program comes back from its file as it was."""
        folder = Path(self.mktemp())
        folder.mkdir()
        program = make_program("session", "1/x/1")
        path = save(Discovery(Finding("window", "x"), program, "session", "1/x/1"), folder)
        self.assertEqual(path.name, "window-1-x-1.json")
        self.assertEqual(load(path), program)


class CommandTests(SynchronousTestCase):
    """``python -m tests.fuzz``."""

    def run_command(self, *arguments: str) -> tuple[int, str]:
        """The status, and what it prints."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            status = main([*arguments])
        self.flushLoggedErrors()
        return status, printed.getvalue()

    def test_clean(self) -> None:
        """It tells its pace, and how the connections ended; nothing found is 0."""
        status, printed = self.run_command("--layer", "login", "--packets", "600", "--seed", "7")
        self.assertEqual(status, 0)
        self.assertRegex(printed, r"\d+ packets, \d+ connections, \d+ packets/s")
        self.assertIn("reason 14: no more authentication methods", printed)

    def test_found(self) -> None:
        """What is found is shown and kept, and can be played again: 1, and without the hole 0."""
        folder = Path(self.mktemp())
        folder.mkdir()
        status, printed = self.run_command(
            *("--hole", "credulous", "--layer", "login", "--findings", "1"),
            *("--packets", "2000", "--save", str(folder)),
        )
        self.assertEqual(status, 1)
        self.assertIn("FOUND login: USERAUTH_SUCCESS", printed)
        (kept,) = folder.glob("login-*.json")
        self.assertIn(f"--replay {kept}", printed)
        self.assertEqual(self.run_command("--hole", "credulous", "--replay", str(kept))[0], 1)
        self.assertEqual(self.run_command("--replay", str(kept)), (0, "nothing is wrong\n"))

    def test_no_coverage(self) -> None:
        """Without the package, --coverage says what is missing."""
        with patch.dict(sys.modules, {"coverage": None}):
            with self.assertRaisesRegex(SystemExit, "pip install coverage"):
                with measured(True):
                    pass
        with measured(False) as measuring:
            self.assertIsNone(measuring)

    def test_endless(self) -> None:
        """A server that does not stop writing is stopped, whatever catches exceptions there."""
        grammar = Grammar(Random(1))
        asked = ["send", [["c", 98], ["u", 0], string(b"endless"), ["c", 1]], [], 0]
        opened = grammar.open(plain=True)
        program = [hello(grammar.random), grammar.login("alice"), [*opened[:3], 0], asked]
        finding = Campaign(1, ["session"], HOLES["endless"]).play(json.loads(json.dumps(program)))
        self.flushLoggedErrors()
        assert finding is not None
        self.assertEqual(finding.oracle, "runaway")
        self.assertIn("writes", finding.what)

    def test_endless_silence(self) -> None:
        """What takes too much CPU time, and writes nothing, is stopped, too."""
        with self.assertRaisesRegex(Runaway, "CPU time"):
            with cpu_limit(0.01):
                while True:
                    pass
