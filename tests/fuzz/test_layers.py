"""Crowds, balancers and texts: a short run with a fixed seed, and the holes that each finds."""

from __future__ import annotations

import json

from twisted.trial.unittest import SynchronousTestCase

from tests.fuzz.balancer import Verdict, judge_header, v1, v2
from tests.fuzz.campaign import Campaign, make_program
from tests.fuzz.crowd_rules import source_of
from tests.fuzz.holes import HOLES
from tests.fuzz.keyring import PROVE
from tests.fuzz.slices import SliceCase
from tests.fuzz.world import start_logging


def setUpModule() -> None:
    """Connections that ended must not be kept by events that nobody reads."""
    start_logging()


class SliceTests(SliceCase):
    """The server, as it is."""

    def test_balancers(self) -> None:
        """PROXY headers, whole and not, and logins behind them."""
        endings = self.fuzz("proxy", 800).endings
        for what in ("good", "bad", "more", "lax"):
            self.assertGreater(endings[f"a header that is {what}"], 0, what)

    def test_crowds(self) -> None:
        """Storms of strangers, with users among them."""
        endings = self.fuzz("crowd", 3500).endings
        self.assertGreater(endings["in, leaves"], 50)
        self.assertGreater(endings["refused, ends: too many connections; try again later"], 5)

    def test_texts(self) -> None:
        """Revocation lists, lines of keys, ports."""
        endings = self.fuzz("texts", 2000).endings
        for what in ("text", "line", "port"):
            for become in ("taken", "refused"):
                self.assertGreater(endings[f"a {what} is {become}"], 5, (what, become))


class HoleTests(SynchronousTestCase):
    """Each hole that is opened on purpose is found by its own rule, and nothing is wrong with the
    same program without it."""

    def check(self, hole: str, layer: str, oracle: str, most: int = 40) -> None:
        """One of the first programs finds it."""
        campaign = Campaign(1, [layer], HOLES[hole])
        for number in range(most):
            program = json.loads(json.dumps(make_program(layer, f"1/{layer}/{number}")))
            finding = campaign.play(program)
            if finding is not None:
                self.assertEqual(finding.oracle, oracle, finding.what)
                self.assertIsNone(Campaign(1, [layer]).play(program))
                return
        self.fail(f"{hole} was not found")

    def test_limits(self) -> None:
        """More connections than there may be."""
        self.check("unbounded", "crowd", "limits")

    def test_rate(self) -> None:
        """An address that never logs in, and is not slowed down."""
        self.check("hasty", "crowd", "rate")

    def test_logins_cost_nothing(self) -> None:
        """An address that is slowed down though all log in."""
        self.check("greedy", "crowd", "slowed")

    def test_forgotten(self) -> None:
        """One that waits for ever."""
        self.check("neglecting", "crowd", "forgotten")

    def test_order(self) -> None:
        """One that overtakes those who wait."""
        self.check("unfair", "crowd", "order")

    def test_counts(self) -> None:
        """A connection that is gone, and counts."""
        self.check("leaking", "crowd", "counts")

    def test_bans(self) -> None:
        """An address that should be banned, and is not; and one that is, for too long."""
        limits = {"ban_after": 2, "ban_seconds": 5.0}
        come = [["come", number, "203.0.113.9", 0] for number in range(4)]
        gone = [["leave", number] for number in range(4)]
        program = [["crowd", limits, 1], come[0], gone[0], come[1], gone[1], come[2]]
        program += [["sleep", 6.0], come[3]]
        for hole, oracle in (("lenient", "ban"), ("harsh", "refused")):
            finding = Campaign(1, ["crowd"], HOLES[hole]).play(program)
            self.assertEqual(finding and finding.oracle, oracle, hole)
        self.assertIsNone(Campaign(1, ["crowd"]).play(program))

    def test_pauses(self) -> None:
        """Ports that stay paused; a backlog in which nothing moves; one who has just come, and is
        dropped."""
        self.check("closed", "crowd", "paused")
        strangers = [["come", number, f"203.0.113.{number}", 0] for number in range(9)]
        limits = {"unauthenticated": 8, "login_grace": 60.0}
        program = [["crowd", limits, 1], *strangers, ["sleep", 30.0]]
        finding = Campaign(1, ["crowd"], HOLES["crammed"]).play(program)
        self.assertEqual(finding and finding.oracle, "stuck")
        self.assertIsNone(Campaign(1, ["crowd"]).play(program))
        self.check("impatient", "crowd", "put-out")

    def test_proofs(self) -> None:
        """A proof of host keys that is good in other sessions, too; one after the other."""
        ask = ["send", [["c", 80], ["s", PROVE.hex()], ["c", 1], ["hostkey", 0]], [], 0]
        program = [HELLO, LOGIN, *[ask] * 3]
        for hole in ("transferable", "obliging"):
            finding = Campaign(1, ["session"], HOLES[hole]).play(program)
            self.assertEqual(finding and finding.oracle, "proof", hole)
        self.assertIsNone(Campaign(1, ["session"]).play(program))

    def test_balancers(self) -> None:
        """A client without a header; the balancer's address for the client's."""
        self.check("gullible", "proxy", "proxy")
        campaign = Campaign(1, ["proxy"], HOLES["blind"])
        program = [["proxied", v2("203.0.113.9").hex(), [], 0, HELLO], LOGIN]
        finding = campaign.play(program)
        self.assertEqual(finding and finding.oracle, "address")
        self.assertIsNone(Campaign(1, ["proxy"]).play(program))

    def test_texts(self) -> None:
        """A part of a revocation list, or one with a mistake in it, that does not count; an
        address that is excluded, and is let in."""
        self.check("shortened", "texts", "revoked")
        self.check("skipped", "texts", "revoked")
        self.check("everywhere", "texts", "options")


HELLO = ["hello", b"SSH-2.0-OpenSSH_9.2".hex(), [], "aes256-ctr hmac-sha2-256"]
LOGIN = json.loads(
    '["send", [["c", 50], ["s", "766d70726f7879"], ["s", "7373682d636f6e6e656374696f6e"],'
    '["s", "7075626c69636b6579"], ["c", 1], ["s", "7373682d65643235353139"], ["key", "alice"],'
    '["sig", "alice", "ssh-ed25519", ""]], [], 0]'
)


class RuleTests(SynchronousTestCase):
    """What the harness itself goes by."""

    def test_headers(self) -> None:
        """A header in each version, cut anywhere, changed at its beginning, and the balancer's."""
        for address in ("198.51.100.7", "2001:db8::1"):
            for header in (v1(address), v2(address, b"\4\0\1x")):
                judged = judge_header(header + b"SSH-")
                self.assertEqual(judged, (Verdict.GOOD, address, len(header)))
                for at in range(len(header)):
                    self.assertIs(judge_header(header[:at]).verdict, Verdict.MORE)
                self.assertIs(judge_header(b"x" + header).verdict, Verdict.BAD)
        for header in (v2("192.0.2.1", command=0x20), b"PROXY UNKNOWN\r\n"):
            self.assertEqual(judge_header(header), (Verdict.GOOD, None, len(header)))

    def test_sources(self) -> None:
        """An IPv4 address, also where it is mapped; a /64; nobody."""
        self.assertEqual(source_of("192.0.2.1"), source_of("::ffff:192.0.2.1"))
        self.assertEqual(source_of("2001:db8::1"), source_of("2001:db8::ffff:1"))
        self.assertNotEqual(source_of("2001:db8::1"), source_of("2001:db8:0:1::1"))
        self.assertEqual(source_of(""), "")

    def test_same_seed(self) -> None:
        """A seed makes one program, and another seed another."""
        for layer in ("proxy", "crowd", "texts"):
            one = make_program(layer, "1/x/1")
            self.assertEqual(one, make_program(layer, "1/x/1"))
            self.assertNotEqual(one, make_program(layer, "1/x/2"))
