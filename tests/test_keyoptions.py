"""What the options of a key let whom do, from where, and until when."""

from __future__ import annotations

import os
import re
import time
from fnmatch import fnmatchcase
from ipaddress import IPv4Address, IPv6Address, ip_network
from unittest import mock

from hypothesis import example, given
from hypothesis import strategies as some
from twisted.trial.unittest import SynchronousTestCase

from vmconsole.keyoptions import NO_OPTIONS, QUOTED, KeyOptions, parse_key_options

# 2030-01-02 03:04:05 UTC.
MOMENT = 1893553445.0


def admits(patterns: str, address: str) -> bool:
    """Whether ``from="PATTERNS"`` lets ``address`` in."""
    return not parse_key_options(f'from="{patterns}"').refusal(address, 0)


class StrTests(SynchronousTestCase):
    """``str``."""

    def test_forms(self) -> None:
        """One form for each, in a fixed order; what holds anyway is not in it."""
        for text, shown in (
            ("", ""),
            ("restrict,no-user-rc", ""),
            ('expiry-time="20300102030405Z"', 'expiry-time="20300102030405Z"'),
            ('expiry-time="20300102Z"', 'expiry-time="20300102000000Z"'),
            ('expiry-time="00070102Z"', 'expiry-time="00070102000000Z"'),
            (
                'verify-required,restrict,expiry-time="20300102Z",FROM="b,!10.*,a"',
                'from="b,!10.*,a",expiry-time="20300102000000Z",verify-required',
            ),
            ('from="a\\"b,c\\d,\\\\"e"', 'from="a\\"b,c\\d,\\\\"e"'),
        ):
            self.assertEqual(str(parse_key_options(text) if text else NO_OPTIONS), shown)

    def test_zone(self) -> None:
        """It says the same in every zone of time, wherever it was read."""
        with mock.patch.dict(os.environ, TZ="America/New_York"):
            self.addCleanup(time.tzset)
            time.tzset()
            here = parse_key_options('expiry-time="20300101"')
            self.assertEqual(str(here), 'expiry-time="20300101050000Z"')
            # A moment that has no year of four digits there.
            late = parse_key_options('expiry-time="99991231235959"')
            self.assertEqual(str(late), 'expiry-time="99991231235959Z"')

    @given(
        some.lists(some.text("ab.*?:!\\\\\"/%'", min_size=1), max_size=4),
        some.none() | some.datetimes().map("{:%m%d%H%M%S}".format),
        some.integers(1, 9999),
        some.booleans(),
    )
    def test_read_again(
        self, sources: list[str], moment: str | None, year: int, verify: bool
    ) -> None:
        """What was read and is shown is read as the same."""
        texts = ["verify-required"] * verify
        if sources:
            texts.append('from="{}"'.format(",".join(sources).replace('"', '\\"')))
        if moment is not None:
            texts.append(f'expiry-time="{year:04}{moment}Z"')
        try:
            options = parse_key_options(",".join(texts))
        except ValueError:
            return
        self.assertEqual(parse_key_options(str(options)), options)
        self.assertEqual(str(parse_key_options(str(options))), str(options))


class SourcesTests(SynchronousTestCase):
    """``from=``."""

    def check(self, patterns: str, good: str, bad: str) -> None:
        """``patterns`` let in the ``good`` addresses, and not the ``bad`` ones."""
        for address in good.split():
            self.assertTrue(admits(patterns, address), f"{patterns}: {address}")
        for address in bad.split():
            self.assertFalse(admits(patterns, address), f"{patterns}: {address}")

    def test_none(self) -> None:
        """Without it a key may be used from anywhere, also from where nobody knows."""
        self.assertEqual(NO_OPTIONS.refusal("10.0.0.1", 0), "")
        self.assertEqual(NO_OPTIONS.refusal("unknown", 0), "")

    def test_refusal(self) -> None:
        """The refusal says from where the key may not be used, and is fit to be logged."""
        options = KeyOptions(sources=("10.0.0.1",))
        self.assertEqual(options.refusal("10.0.0.1", 0), "")
        self.assertEqual(options.refusal("10.0.0.2", 0), "the key may not be used from 10.0.0.2")
        self.assertEqual(options.refusal("\x1b[2J", 0), "the key may not be used from \\x1b[2J")

    def test_addresses(self) -> None:
        """Addresses match as such, one of several is enough."""
        self.check("10.0.0.1,10.0.0.2", "10.0.0.1 10.0.0.2", "10.0.0.3 10.0.0.11 ::1")
        self.check("2001:DB8:0:0::1", "2001:db8::1 2001:0DB8::0001", "2001:db8::2")

    def test_networks(self) -> None:
        """CIDR, of either version, from /0 to a single address."""
        self.check("10.1.0.0/16", "10.1.0.0 10.1.255.255", "10.2.0.0 11.1.0.0 a01::")
        self.check("192.0.2.7/32", "192.0.2.7", "192.0.2.6")
        self.check("0.0.0.0/0", "10.0.0.1 255.255.255.255", "::1")
        self.check("2001:db8::/32", "2001:db8:ffff::1", "2001:db9::1 10.0.0.1")
        self.check("::/0", "::1 fe80::1", "10.0.0.1")

    def test_bad_networks(self) -> None:
        """A network that is none makes the line bad: host bits, masks of other kinds, names."""
        for pattern in (
            "10.0.0.1/8",
            "10.0.0.0/33",
            "10.0.0.0/-1",
            "10.0.0.0/",
            "10.0.0.0/255.0.0.0",
            "10.0.0.0/0.255.255.255",
            "10.0.0.0/8/8",
            "10/8",
            "10.0.0.*/24",
            "2001:db8::1/64",
            "::/129",
            "fe80::%1/64",
            "example.com/24",
            "/8",
        ):
            for patterns in (pattern, f"!{pattern},*", f"*,{pattern}"):
                with self.assertRaisesRegex(ValueError, "option from has a malformed network$"):
                    parse_key_options(f'from="{patterns}"')

    def test_wildcards(self) -> None:
        """``*`` is any number of characters and ``?`` is one, of the address as it is written."""
        self.check("10.*", "10.0.0.1 10.255.0.1", "110.0.0.1 1.10.0.1")
        self.check("10.0.0.?", "10.0.0.1", "10.0.0.11 10.0.0.")
        self.check("10.0.0.1?*", "10.0.0.10 10.0.0.100", "10.0.0.1")
        self.check("*.1", "10.0.0.1", "10.0.0.11")
        self.check("*0.*.1", "10.0.0.1", "11.1.1.1")
        self.check("*", "10.0.0.1 ::1", "")
        self.check("2001:DB8:*", "2001:db8::1 2001:0db8:0::1", "2001:db9::1")

    def test_names(self) -> None:
        """No DNS is asked: a host name lets nobody in, whatever it is like."""
        self.check("localhost", "", "127.0.0.1 ::1 localhost")
        self.check("*.example.com,10.0.0.1", "10.0.0.1", "10.0.0.2 a.example.com")
        self.check("10.0.0.256,10.1,fe80::1%1", "", "10.0.0.256 10.0.0.1 fe80::1 fe80::1%1")

    def test_negation(self) -> None:
        """Whom a negation covers is kept out, whatever else covers him, and in any order."""
        for patterns in ("!10.0.0.0/8,*", "*,!10.0.0.0/8", "*,!10.*", "!10.*,*", "!10.0.?.*,*"):
            self.check(patterns, "11.0.0.1 ::1", "10.0.0.1")
        self.check("!10.0.0.1,10.0.0.0/8", "10.0.0.2", "10.0.0.1 11.0.0.1")
        self.check("!2001:DB8::1,2001:db8::/32", "2001:db8::2", "2001:db8::1")

    def test_only_negations(self) -> None:
        """Negations alone let nobody in."""
        self.check("!10.0.0.1", "", "10.0.0.1 10.0.0.2 ::1")

    def test_negated_names(self) -> None:
        """Who is to be kept out by what no address matches would get in: the line is bad."""
        for pattern in ("host1", "*.example.com", "10.1", "fe80::1%1", "!10.0.0.1", "10.0.0.256"):
            with self.assertRaisesRegex(ValueError, "option from excludes what is no IP address$"):
                parse_key_options(f'from="!{pattern},*"')

    def test_malformed(self) -> None:
        """Empty patterns and white space, which would change what is meant."""
        for patterns in ("", "!", ",", "10.0.0.1,", "10.0.0.1, 10.0.0.2", "*, !10.0.0.1", "\xe9"):
            with self.assertRaisesRegex(ValueError, "option from has an empty pattern"):
                parse_key_options(f'from="{patterns}"')

    def test_constructed(self) -> None:
        """Bad patterns make no KeyOptions, wherever they come from."""
        for pattern in ("10.0.0.1/8", "!name", ""):
            self.assertRaises(ValueError, KeyOptions, sources=("*", pattern))

    def test_mapped(self) -> None:
        """An IPv4 address that is mapped into IPv6 is the IPv4 address, here and there."""
        self.check("10.0.0.0/8", "::ffff:10.0.0.1 ::FFFF:a00:1", "::ffff:11.0.0.1")
        self.check("10.*", "::ffff:10.0.0.1", "::ffff:11.0.0.1")
        self.check("::ffff:10.0.0.1", "10.0.0.1 ::ffff:10.0.0.1", "10.0.0.2")
        self.check("::ffff:10.0.0.0/104", "10.255.0.1 ::ffff:10.0.0.1", "11.0.0.1")
        self.check("::ffff:0:0/96", "10.0.0.1", "::1")
        self.check("!::ffff:10.0.0.1,*", "10.0.0.2", "10.0.0.1 ::ffff:10.0.0.1")
        self.check("::/0", "::1", "::ffff:10.0.0.1")

    def test_zones(self) -> None:
        """The zone of an address does not matter."""
        self.check("fe80::/10", "fe80::1 fe80::1%eth0", "fec0::1%eth0")
        self.check("fe80::1", "fe80::1%eth0", "fe80::2%eth0")
        self.check("fe80::?", "fe80::1%eth0", "")
        self.check("!fe80::1,*", "fe80::2%eth0", "fe80::1%eth0")

    def test_no_address(self) -> None:
        """Where nobody knows the address, no pattern covers it, and the key is refused."""
        for patterns in ("*", "unknown", "!10.0.0.1,*", "0.0.0.0/0"):
            self.check(patterns, "", "unknown 10.0.0.1/32 167772161 10.1")
            self.assertFalse(admits(patterns, ""))

    @given(some.integers(0, 2**32 - 1), some.integers(0, 32), some.integers(0, 2**32 - 1))
    def test_cidr(self, base: int, mask: int, other: int) -> None:
        """CIDR is what the ipaddress module says, for addresses near and far."""
        for address in (other, base, base ^ 1 << (32 - mask), base ^ 1 << (31 - mask) % 32):
            ip = IPv4Address(address % 2**32)
            network = ip_network((base, mask), strict=False)
            self.assertEqual(admits(str(network), str(ip)), ip in network)
            self.assertEqual(admits(f"*,!{network}", str(ip)), ip not in network)
            self.assertEqual(
                admits(f"::ffff:{network}".replace(f"/{mask}", f"/{96 + mask}"), str(ip)),
                ip in network,
            )

    @given(
        some.integers(2**48, 2**128 - 1), some.integers(0, 128), some.integers(2**48, 2**128 - 1)
    )
    def test_cidr6(self, base: int, mask: int, other: int) -> None:
        """So it is for IPv6, however the address is written."""
        for address in (other, base, base ^ 1 << (128 - mask), base ^ 1 << (127 - mask) % 128):
            ip = IPv6Address(address % 2**128)
            network = ip_network((base, mask), strict=False)
            if ip.ipv4_mapped is None:
                for text in (str(ip), ip.exploded, str(ip).upper(), f"{ip}%1"):
                    self.assertEqual(admits(network.exploded, text), ip in network)

    @given(some.text("*?0123.:a", min_size=1, max_size=20), some.ip_addresses())
    def test_any_wildcards(self, pattern: str, ip: IPv4Address | IPv6Address) -> None:
        """Wildcards are those of the shell, over the address as it is written."""
        text = str(getattr(ip, "ipv4_mapped", None) or ip)
        for wildcards in (f"{pattern}*", f"*{pattern}", f"{text[:3]}*{pattern}*{text[-2:]}"):
            self.assertEqual(admits(wildcards, str(ip)), fnmatchcase(text, wildcards))


class ExpiryTests(SynchronousTestCase):
    """``expiry-time=``."""

    def zone(self, name: str) -> None:
        """For this test, the system's time zone."""
        patch = mock.patch.dict(os.environ, TZ=name)
        patch.start()
        self.addCleanup(time.tzset)
        self.addCleanup(patch.stop)
        time.tzset()

    def expires(self, text: str) -> float | None:
        return parse_key_options(f'expiry-time="{text}"').expires

    def test_utc(self) -> None:
        """With a Z it is UTC, wherever we are; what is left out is zero."""
        self.zone("Asia/Tokyo")
        self.assertEqual(self.expires("20300102030405Z"), MOMENT)
        self.assertEqual(self.expires("203001020304z"), MOMENT - 5)
        self.assertEqual(self.expires("20300102Z"), MOMENT - 5 - 4 * 60 - 3 * 3600)
        self.assertEqual(self.expires("19700101Z"), 0)
        self.assertEqual(self.expires("20280229Z"), 1835395200)

    def test_local(self) -> None:
        """Without one it is the system's time zone, with its summer time."""
        self.zone("Europe/Berlin")
        self.assertEqual(self.expires("20300102040405"), MOMENT)
        self.assertEqual(self.expires("203001020404"), MOMENT - 5)
        self.assertEqual(self.expires("20300702"), self.expires("203007012200Z"))
        self.assertEqual(self.expires("203010270230"), self.expires("203010270030Z"))

    def test_refusal(self) -> None:
        """The key may be used up to that moment, and not after it."""
        options = KeyOptions(expires=MOMENT)
        for now in (0, MOMENT - 1, MOMENT):
            self.assertEqual(options.refusal("10.0.0.1", now), "")
        for now in (MOMENT + 0.001, MOMENT + 1e9):
            self.assertEqual(options.refusal("10.0.0.1", now), "the key has expired")
        self.assertEqual(KeyOptions(expires=0.0).refusal("10.0.0.1", 1), "the key has expired")

    def test_several(self) -> None:
        """The earliest of several holds, in any order."""
        times = ['expiry-time="20300102030406Z"', 'Expiry-Time="20300102030405Z"']
        for both in (times, times[::-1]):
            self.assertEqual(parse_key_options(",".join(both)).expires, MOMENT)

    def test_with_sources(self) -> None:
        """Either option alone keeps one out."""
        options = KeyOptions(("10.0.0.1",), MOMENT)
        self.assertEqual(options.refusal("10.0.0.1", MOMENT), "")
        self.assertIn("10.0.0.2", options.refusal("10.0.0.2", MOMENT))
        self.assertIn("expired", options.refusal("10.0.0.1", MOMENT + 1))

    def test_malformed(self) -> None:
        """Other forms, and times that there are not."""
        for text in (
            "",
            "Z",
            "2030",
            "2030010203Z",
            "2030-01-02",
            "20300102T0304",
            "20300102UTC",
            "20300102 ",
            " 20300102",
            "20300102\n",
            "20300102ZZ",
            "20301301Z",
            "20300230Z",
            "203001022400Z",
            "203001020360Z",
            "20300102030460Z",
            "00000101Z",
            "0001010100000",
            "+2030102",
            "2030010203040506Z",
            "2030\u0660\u066102",
            "forever",
        ):
            with self.assertRaisesRegex(ValueError, "^its option expiry-time is no time$"):
                self.expires(text)

    def test_far(self) -> None:
        """Times at the ends of the calendar are times, or are refused, and never forever."""
        for name in ("Asia/Tokyo", "America/New_York", "UTC"):
            self.zone(name)
            for text in ("00010101", "99991231235959", "00010101Z", "99991231235959Z"):
                try:
                    self.assertIsNotNone(self.expires(text))
                except ValueError as error:
                    self.assertEqual(str(error), "its option expiry-time is no time")


class ParseTests(SynchronousTestCase):
    """``parse_key_options``."""

    def test_all(self) -> None:
        """All that is honoured, together, and its names."""
        options = parse_key_options(
            'restrict,from="10.0.0.1,!10.*",expiry-time="20300102030405Z",verify-required'
        )
        self.assertEqual(options, KeyOptions(("10.0.0.1", "!10.*"), MOMENT, True))
        self.assertEqual(options.names, ["from", "expiry-time", "verify-required"])
        self.assertEqual(KeyOptions(expires=0.0).names, ["expiry-time"])

    def test_harmless(self) -> None:
        """What asks for less than holds here anyway changes nothing, nor do stray commas."""
        for text in (
            "",
            "restrict",
            "no-agent-forwarding,no-port-forwarding,no-user-rc,no-X11-forwarding",
            "restrict,restrict",
            ",restrict,,no-user-rc,",
        ):
            self.assertEqual(parse_key_options(text), NO_OPTIONS)
        self.assertEqual(NO_OPTIONS.names, [])

    def test_case(self) -> None:
        """The names' case does not matter."""
        options = parse_key_options(
            'RESTRICT,From="10.0.0.1",EXPIRY-TIME="20300102030405Z",Verify-Required'
        )
        self.assertEqual(options, KeyOptions(("10.0.0.1",), MOMENT, True))

    def test_other(self) -> None:
        """Any other option is refused by its name, which is all that is said of it."""
        for text, name in (
            ("pty", "pty"),
            ("no-pty", "no-pty"),
            ("cert-authority", "cert-authority"),
            ("no-touch-required", "no-touch-required"),
            ("touch-required", "touch-required"),
            ("verify-required,no-verify-required", "no-verify-required"),
            ("port-forwarding", "port-forwarding"),
            ('Command="secret, restrict"', "Command"),
            ('environment="A=secret"', "environment"),
            ('principals="secret"', "principals"),
            ('permitopen="secret:22"', "permitopen"),
            ("tunnel=secret", "tunnel"),
            ("restricted", "restricted"),
            ("verify-required2", "verify-required2"),
            ('restrict="secret"', "restrict"),
            ('verify-required="secret"', "verify-required"),
            ('restrict"secret"', "restrict"),
            ('"secret"', "(no name)"),
            ('="secret"', "(no name)"),
            ('\\"secret"', "\\\\"),
            ("\x1b[2J", "\\x1b[2J"),
            ("x" * 100, f"{'x' * 40}..."),
        ):
            for options in (text, f"restrict,{text}", f"{text},restrict"):
                error = self.assertRaises(ValueError, parse_key_options, options)
                self.assertEqual(str(error), f"its option {name} is not supported")

    def test_values(self) -> None:
        """A value stands in quotes, and nothing beside it."""
        for option in ("from", "expiry-time"):
            for value in ("", "=", "=secret", '"secret"', '="secret"x', '="a""b"', '=x"secret"'):
                error = self.assertRaises(ValueError, parse_key_options, f"{option}{value}")
                self.assertEqual(str(error), f"its option {option} needs a value in quotes")

    def test_quoting(self) -> None:
        """A backslash quotes a quote, and nothing else; commas and spaces may be quoted."""
        for value, source in (('a\\"b', 'a"b'), ("a\\b", "a\\b"), ('a\\\\"b', 'a\\"b')):
            self.assertEqual(parse_key_options(f'from="{value}"').sources, (source,))
        self.assertEqual(parse_key_options('from="a,b",restrict').sources, ("a", "b"))
        options = parse_key_options('from="\\",restrict,pty",restrict')
        self.assertEqual(options.sources, ('"', "restrict", "pty"))

    def test_malformed(self) -> None:
        """Open quotes, and spaces outside of quotes."""
        for text in ('from="10.0.0.1', 'from="10.0.0.1\\"', "restrict, pty", " ", 'restrict,"'):
            error = self.assertRaises(ValueError, parse_key_options, text)
            self.assertEqual(str(error), "its options are malformed")

    def test_two_sources(self) -> None:
        """Two ``from=`` are an error, as for sshd."""
        error = self.assertRaises(ValueError, parse_key_options, 'from="*",FROM="10.0.0.1"')
        self.assertEqual(str(error), "its option from is there twice")

    def test_too_long(self) -> None:
        """Options that are longer than sense are refused: matching takes time."""
        for size, good in ((4096, True), (4097, False)):
            text = 'from="' + ",".join(["10.0.0.1"] * 100)
            text = text.ljust(size - 1, "x") + '"'
            if good:
                self.assertTrue(parse_key_options(text).sources)
            else:
                error = self.assertRaises(ValueError, parse_key_options, text)
                self.assertEqual(str(error), "its options have more than 4096 characters")

    def test_too_many(self) -> None:
        """So are more patterns than sense."""
        self.assertTrue(parse_key_options('from="' + ",".join("*" * 128) + '"').sources)
        text = 'from="' + ",".join("*" * 129) + '"'
        error = self.assertRaises(ValueError, parse_key_options, text)
        self.assertEqual(str(error), "its option from has more than 128 patterns")

    @given(some.text())
    @example('from="fe80::%/1"')
    def test_anything(self, text: str) -> None:
        """Any text is options, or a ValueError; and options answer to any address."""
        for options in (text, f'from="{text}"', f'expiry-time="{text}"', f"restrict,{text}"):
            try:
                found = parse_key_options(options)
            except ValueError:
                continue
            self.assertIsInstance(found.refusal(text, 0), str)
            self.assertIsInstance(found.refusal("10.0.0.1", 0), str)

    @given(
        some.lists(
            some.sampled_from(
                [
                    "restrict",
                    "from=",
                    '"10.0.0.1"',
                    "expiry-time=",
                    '"20300102Z"',
                    ",",
                    '"',
                    "\\",
                    "!",
                ]
            )
        ).map("".join)
    )
    def test_nothing_is_dropped(self, text: str) -> None:
        """Where a restriction is named outside of quotes, it holds or the line is bad."""
        try:
            options = parse_key_options(text)
        except ValueError:
            return
        outside = re.sub(QUOTED, "", text)
        self.assertEqual("from=" in outside, bool(options.sources))
        self.assertEqual("expiry-time=" in outside, options.expires is not None)
