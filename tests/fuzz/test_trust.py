"""Certificates, and logins that come to their end: a short run with a fixed seed, and the holes
that each finds."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from twisted.conch.ssh.common import NS
from twisted.trial.unittest import SynchronousTestCase

from tests.fuzz.authority import FOR_EVER, HOST, REVOKED_ID, TRUSTED, certificate, public_line
from tests.fuzz.campaign import Campaign, make_program
from tests.fuzz.certify import (
    Judged,
    Truth,
    Worth,
    judge_certificate,
    judge_host_certificate,
    read_certificate,
)
from tests.fuzz.edits import edit
from tests.fuzz.grammar import Grammar, hello
from tests.fuzz.holes import HOLES
from tests.fuzz.keyring import Malformed, make_ring
from tests.fuzz.lives_rules import ENGINE_SECONDS, FILES_SECONDS, History, merged
from tests.fuzz.slices import SliceCase
from tests.fuzz.steps import Program
from tests.fuzz.world import USERS, World, start_logging

ALICE, BOB, TWIN = (name.encode().hex() for name in ("alice@internal", "bob@internal", "twin"))
GRAMMAR = Grammar(Random(1))


def setUpModule() -> None:
    """Connections that ended must not be kept by events that nobody reads."""
    start_logging()


def option(name: bytes, value: bytes) -> dict[str, Any]:
    """The specification of a certificate with this option, which is a string."""
    return {"options": [[name.hex(), NS(value).hex()]]}


def asked(how: dict[str, Any], key: str = "alice") -> Program:
    """Somebody logs in by a certificate."""
    return [hello(Random(1)), GRAMMAR.login_by(key, how)]


class SliceTests(SliceCase):
    """The server, as it is."""

    def test_certificates(self) -> None:
        """Certificates of all kinds, and what they let their users do."""
        endings = self.fuzz("certificate", 1000).endings
        self.assertGreater(endings["the client leaves"], 50)

    def test_lives(self) -> None:
        """Users with sessions, and an operator who changes their mind."""
        endings = self.fuzz("lives", 1500).endings
        for what in ("been revoked.", "expired."):
            self.assertGreater(endings[f"ended: Your certificate has {what}"], 2, what)
        self.assertGreater(endings["a session is refused"], 5)

    def test_texts(self) -> None:
        """Files of trusted CAs, and of host certificates."""
        endings = self.fuzz("texts", 800).endings
        for what in ("a CA file", "a host certificate"):
            for become in ("taken", "refused"):
                self.assertGreater(endings[f"{what} is {become}"], 0, (what, become))


class HoleCase(SynchronousTestCase):
    """Finds a hole."""

    def check(self, hole: str, program: Program, oracle: str) -> None:
        """It is found by its own rule, and nothing is wrong with the program without it."""
        program = json.loads(json.dumps(program))
        finding = Campaign(1, ["login"], HOLES[hole]).play(program)
        self.assertEqual(finding and finding.oracle, oracle, finding)
        self.assertIsNone(Campaign(1, ["login"]).play(program))


class CertificateHoleTests(HoleCase):
    """Whose certificates count, and what for."""

    def test_login(self) -> None:
        """One that does not count now, from here, or any more; one that its CA did not sign; and
        one that counts, and is refused."""
        for hole, how, oracle in (
            ("trusting", {"ca": "stranger"}, "login"),
            ("eternal", {"before": -1}, "login"),
            ("eternal", option(b"source-address", b"192.0.2.1"), "login"),
            ("unlisted", {"serial": 667}, "login"),
            ("unsigned", {"signer": "stranger"}, "login"),
            ("particular", {"serial": FOR_EVER}, "reply"),
        ):
            self.check(hole, asked(how), oracle)

    def test_user(self) -> None:
        """Somebody is taken for somebody else."""
        self.check("mistaken", asked({"principals": [ALICE, BOB]}), "user")

    def test_words(self) -> None:
        """Who shows a certificate of nobody's is told what is wrong with it; who shows one of a
        trusted CA's is not."""
        self.check("indiscreet", asked({"ca": "stranger"}), "told")
        self.check("secretive", asked({"before": -1}), "told")

    def test_rights(self) -> None:
        """A terminal without the right to one; another command than the certificate's."""
        session = GRAMMAR.open(plain=True)
        terminal = GRAMMAR._request(b"pty-req", *GRAMMAR._terminal())
        run = GRAMMAR._request(b"exec", ["s", b"vm1".hex()])
        for step in (session, terminal, run):
            step[3] = 0
        self.check("ordinary", [*asked({"extensions": []}), session, terminal], "reply")
        forced = asked(option(b"force-command", b"list"))
        self.check("unforced", [*forced, session, terminal, run], "forced")


class LifeHoleTests(HoleCase):
    """How logins and sessions end, and how they are counted."""

    def lives(self, *steps: list[Any], **limits: Any) -> Program:
        """Two users with a certificate each, and what happens then."""
        first = ["come", 1, "alice", {"serial": 7, "before": 100}]
        other = ["come", 2, "alice", {"principals": [BOB]}]
        return [["lives", limits], first, other, *steps]

    def test_end(self) -> None:
        """A certificate that has expired, or was revoked, and its user stays."""
        self.check("outliving", self.lives(["sleep", 101.0]), "stays")
        revoked = ["revoke", "serial", 7]
        self.check("inattentive", self.lives(revoked, ["sleep", 12.0]), "stays")

    def test_others(self) -> None:
        """Somebody else is put out."""
        program = self.lives(["revoke", "serial", 7], ["sleep", 12.0])
        self.check("rash", program, "put-out")

    def test_sentence(self) -> None:
        """A session ends with its login, and is not told why."""
        self.check("curt", self.lives(["open", 1, "nothing"], ["sleep", 101.0]), "words")

    def test_idle(self) -> None:
        """A session that goes on, ends without a warning, or though a key was pressed."""
        console = ["open", 2, "console"]
        for hole in ("sleepless", "unwarned"):
            self.check(hole, self.lives(console, ["sleep", 12.0], idle=10.0), "idle")
        typing = (["sleep", 8.0], ["type", 2, 0], ["sleep", 4.0])
        self.check("untyped", self.lives(console, *typing, idle=10.0), "idle")

    def test_counts(self) -> None:
        """A session too many; one that is over, and counts."""
        opened, shut = ["open", 1, "nothing"], ["shut", 1, 0]
        self.check("uncounted", self.lives(opened, opened, sessions_per_user=1), "counts")
        again = (opened, opened, shut, opened)
        self.check("unforgetting", self.lives(*again, sessions_per_user=2), "counts")


class TextHoleTests(HoleCase):
    """What files about trust are taken for."""

    def test_authorities(self) -> None:
        """A CA that does not count; a mistake that is passed over."""
        lines = [["line", line.encode().hex(), meaning] for line, meaning in self.lines()]
        self.check("sole", [["texts", "authorities"], *lines[:2]], "authorities")
        mistake = ["line", b"ssh-ed25519 AAAA".hex(), ["refused"]]
        self.check("tolerant", [["texts", "authorities"], lines[0], mistake], "authorities")

    def lines(self) -> list[tuple[str, list[str]]]:
        """Lines of CAs, and what they mean."""
        lines = [public_line(name).strip() for name in TRUSTED[:3]]
        return [(line, ["ca", line.split()[1]]) for line in lines]

    def test_host(self) -> None:
        """A user's certificate for a host's."""
        self.check("hospitable", [["texts", "host"], ["file", {"usage": 1}, []]], "host")


class JudgeTests(SynchronousTestCase):
    """Which certificates are good, told without the server's code."""

    def setUp(self) -> None:
        self.ring = make_ring()
        self.world = World(self.ring)

    def judge(self, how: dict[str, Any], key: str = "alice") -> Judged:
        """A certificate, judged."""
        made = certificate(self.ring[key], b"alice@internal", how, self.world.time_of_day())
        return self.world.judge_certificate(made, "10.0.0.1")

    def test_good(self) -> None:
        """Each trusted CA's but the revoked one's; at the first moment, and in the last second;
        any serial, nonce and id; the first principal that is somebody."""
        for ca in TRUSTED[:4]:
            for key in ("alice", "rsa", "ecdsa"):
                judged = self.judge({"ca": ca}, key)
                self.assertEqual((judged.worth, judged.user), (Worth.GOOD, "alice@internal"))
                self.assertEqual(judged.key, self.ring[key].blob)
        how: dict[str, Any]
        for how in (
            *({"after": 0}, {"before": 1}, {"serial": 0}, {"serial": FOR_EVER}, {"nonce": 0}),
            *({"id": ""}, {"reserved": "00"}, {"extensions": []}, {"serial": 665}),
            *(option(b"force-command", b"x"), option(b"source-address", b"10.0.0.0/8")),
        ):
            self.assertIs(self.judge(how).worth, Worth.GOOD, how)
        self.assertEqual(self.judge({"principals": [TWIN, BOB, ALICE]}).user, "bob@internal")
        self.assertFalse(self.judge({"extensions": []}).terminal)
        self.assertEqual(self.judge(option(b"force-command", b"list")).forced, b"list")

    def test_bad(self) -> None:
        """Of another CA, or signed by another, or with SHA-1; of a host; not at this time; for
        nobody; with options that are unknown, twice, out of order, or not to be read; revoked."""
        command, source = option(b"force-command", b"x"), option(b"source-address", b"10.0.0.1")
        pairs = [*command["options"], *source["options"]]
        how: dict[str, Any]
        for how in (
            *({"ca": "stranger"}, {"ca": "weak"}, {"ca": "sk"}, {"ca": "gone"}, {"nested": 1}),
            *({"signer": "stranger"}, {"ca": "rsa", "algorithm": "ssh-rsa"}, {"usage": HOST}),
            *({"usage": 0}, {"after": 1}, {"before": 0}, {"before": -1}, {"principals": []}),
            *({"principals": [TWIN]}, {"principals": ["ff"]}, {"serial": 666}, {"serial": 670}),
            *({"id": REVOKED_ID.hex()}, {"key": "cut"}, {"kind": b"ssh-ed25519".hex()}),
            *(option(b"x", b""), {"options": pairs[::-1]}, {"options": pairs[:1] * 2}),
            *({"options": [[pairs[0][0], "78"]]}, option(b"source-address", b"10.0.0.1/8")),
            *(option(b"source-address", b"!10.0.0.2"), {"damage": [["add", "00"]]}),
        ):
            self.assertIs(self.judge(how).worth, Worth.BAD, how)
        self.assertIs(self.judge({}, "lost").worth, Worth.BAD)

    def test_lax(self) -> None:
        """One that is not written as usual need not be taken, whatever it says."""
        padded = self.judge({"key": "padded"}, "rsa")
        self.assertEqual((padded.worth, padded.key), (Worth.LAX, self.ring["rsa"].blob))
        self.assertIs(self.judge({"extensions": [["78", "78"]]}).worth, Worth.LAX)

    def test_changed(self) -> None:
        """None of which a byte was changed, or that is cut."""
        made = certificate(self.ring["alice"], b"alice@internal", {}, self.world.time_of_day())
        for at in range(len(made)):
            flipped = edit(made, [["flip", at, 1]])
            self.assertIs(self.world.judge_certificate(flipped, "10.0.0.1").worth, Worth.BAD, at)
            with self.assertRaises(Malformed):
                read_certificate(made[:at])

    def test_told(self) -> None:
        """A trusted CA's client is told why theirs does not count, and nobody else."""
        self.assertTrue(self.judge({"before": -1}).told)
        how: dict[str, Any]
        for how in ({}, {"before": -1, "ca": "stranger"}, {"before": -1, "signer": "stranger"}):
            self.assertFalse(self.judge(how).told, how)

    def test_host(self) -> None:
        """A host's, for its key; whenever it ends."""
        alice, rsa = self.ring["alice"], self.ring["rsa"]
        for how, key, worth in (
            ({"usage": HOST}, alice, Worth.GOOD),
            ({"usage": HOST, "before": -1, "ca": "stranger"}, alice, Worth.GOOD),
            ({"usage": HOST}, rsa, Worth.BAD),
            ({}, alice, Worth.BAD),
            ({"usage": HOST, "ca": "weak"}, alice, Worth.BAD),
            ({"usage": HOST, **option(b"x", b"")}, alice, Worth.LAX),
        ):
            made = certificate(alice, b"console", how, 1e9)
            self.assertIs(judge_host_certificate(made, key.blob), worth, how)


class HistoryTests(SynchronousTestCase):
    """What the server need not have seen yet."""

    def test_window(self) -> None:
        """What was true counts for a while, and longer when it changes again."""
        history = History("a", FILES_SECONDS)
        history.change("b", 100.0)
        history.change("c", 109.0)
        self.assertEqual(history.may_be(119.0), ["c", "b", "a"])
        self.assertEqual(history.may_be(120.0), ["c"])

    def test_hidden(self) -> None:
        """A mistake in a file keeps what the server had, for ever; one in a file that it has read
        changes nothing."""
        history = History("a", ENGINE_SECONDS)
        history.hide(1.0)
        self.assertEqual(history.may_be(1.0), ["a"])
        history.change("b", 2.0)
        history.hide(3.0)
        self.assertEqual(history.may_be(1e6), ["b", "a"])
        history.change("c", 2e6)
        history.hide(3e6)
        self.assertEqual(history.may_be(3e6), ["c"])

    def test_merged(self) -> None:
        """A certificate is good for sure only when it is, whatever the server knows."""
        ring, world = make_ring(), World()
        made = certificate(ring["alice"], b"alice@internal", {}, 1e9)

        def worth(*truths: Truth) -> Worth:
            return merged(
                [judge_certificate(made, each, USERS, 1e9, "::1") for each in truths]
            ).worth

        nobody = world.truth._replace(trusted=frozenset())
        self.assertIs(worth(world.truth, world.truth), Worth.GOOD)
        self.assertIs(worth(world.truth, nobody), Worth.LAX)
        self.assertIs(worth(nobody, nobody), Worth.BAD)


class ProgramTests(SynchronousTestCase):
    """Programs are made again from their seed."""

    def test_same_seed(self) -> None:
        """A seed makes one program, and another seed another."""
        for layer in ("certificate", "lives"):
            one = make_program(layer, "1/x/1")
            self.assertEqual(one, make_program(layer, "1/x/1"))
            self.assertNotEqual(one, make_program(layer, "1/x/2"))
