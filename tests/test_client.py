"""The client of the engine: against our own servlet, bad replies, and no reply at all."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as some
from treq.testing import RequestTraversalAgent
from twisted.internet import reactor as real_reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint, UNIXServerEndpoint
from twisted.internet.interfaces import IReactorTime
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import PrivateCertificate
from twisted.internet.task import Clock
from twisted.logger import Logger, capturedLogs, formatEvent
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.trial.unittest import TestCase
from twisted.web.client import Agent
from twisted.web.http_headers import Headers
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request, Site
from zope.interface.verify import verifyObject

from tests.engine_kit import (
    NOW,
    EngineInMemory,
    EngineTestCase,
    all_keys,
    authority,
    client_of,
    clock_at,
    public_line,
    short_directory,
    signer,
    start,
    todays_authority,
)
from vmconsole import config, pki
from vmconsole.engine import replies, slices
from vmconsole.engine.client import EngineClient
from vmconsole.engine.http import make_engine_client, without_cookies
from vmconsole.engine.keyline import parse_key_line
from vmconsole.engine.ticket import TicketVerifier
from vmconsole.errors import ConfigError, EngineError, EngineUnreachable
from vmconsole.interfaces import AuthorizedKey, ConsoleInfo, Domain, DomainState, IEngine, User
from vmconsole.keyoptions import KeyOptions
from vmconsole.publickeys import fingerprint

USER = "11111111-2222-3333-4444-555555555555"
WEB = {"vmid": "1", "vmname": "web", "host": "node1", "console": "default"}
DB = {"vmid": "2", "vmname": "db", "host": "node2", "console": "default"}


def consoles(*entries: object) -> dict[str, object]:
    return {"version": "1", "content": "console_list", "consoles": entries}


def keys(*entries: object) -> dict[str, object]:
    return {"version": "1", "content": "key_list", "keys": entries}


def entry(name: str, line: str, **more: object) -> dict[str, object]:
    return {"entityid": f"id of {name}", "entity": f"{name}@internal", "key": line, **more}


class Servlet(Resource):
    """Takes tickets on any path, and answers what the test says; with ``later``, when it fires."""

    isLeaf = True

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.status = 200
        self.body: object = consoles()
        self.headers: dict[bytes, bytes] = {}
        self.later: Deferred[None] | None = None
        self.paths: list[bytes] = []
        self.commands: list[Any] = []
        self.request_headers: list[Headers] = []
        self.verifier = TicketVerifier([authority().certificate])

    def render(self, request: Request) -> bytes | int:
        assert request.method == b"POST" and request.content is not None
        self.paths.append(request.uri)
        self.request_headers.append(request.requestHeaders)
        now = datetime.fromtimestamp(self.clock.seconds(), UTC)
        self.commands.append(json.loads(self.verifier.verify(request.content.read(), now)))
        if self.later is None:
            return self.reply(request)

        def finish(_: None) -> None:
            request.write(self.reply(request))
            request.finish()

        self.later.addCallback(finish)
        return NOT_DONE_YET

    def reply(self, request: Request) -> bytes:
        request.setResponseCode(self.status)
        for name, value in self.headers.items():
            request.setHeader(name, value)
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


class NoVerifier(TicketVerifier):
    """Takes any ticket."""

    def __init__(self) -> None:
        super().__init__([])

    def verify(self, body: bytes, now: datetime) -> str:
        return "{}"


class ClientTestCase(EngineTestCase):
    """A client of a Servlet."""

    def setUp(self) -> None:
        super().setUp()
        self.servlet = Servlet(self.clock)
        self.agent = RequestTraversalAgent(self.servlet)
        self.client = client_of(self.agent, self.clock)

    def consoles(self) -> Sequence[ConsoleInfo]:
        return self.result(self.client.consoles(USER))

    def keys(self) -> Sequence[AuthorizedKey]:
        return self.result(all_keys(self.client))


class OwnEngineTests(EngineTestCase):
    """With our own store and servlet at the other end."""

    def setUp(self) -> None:
        super().setUp()
        directory = Path(self.mktemp())
        directory.mkdir()
        self.engine = EngineInMemory(directory, self.clock)
        self.client = client_of(RequestTraversalAgent(self.engine.root), self.clock)

    def test_interface(self) -> None:
        """It is an IEngine."""
        verifyObject(IEngine, self.client)

    def test_keys(self) -> None:
        """The keys of all users, with the domain that oVirt's users have."""
        self.assertEqual(self.result(all_keys(self.client)), ())
        for name in ("alice", "bob"):
            self.engine.store.add_user(name)
            self.engine.store.add_keys(name, public_line(name))
        found = self.result(all_keys(self.client))
        self.assertEqual([key.user_name for key in found], ["alice@internal", "bob@internal"])
        self.assertEqual(found[0].user_id, self.engine.store.users()[0].id)
        self.assertEqual(found[0].blob, parse_key_line(public_line("alice")).blob)

    def test_consoles(self) -> None:
        """What is granted, by name, also what is shut off; nothing of somebody else's."""
        user = self.engine.store.add_user("alice")
        self.engine.store.add_user("bob")
        self.engine.store.grant("alice", "web*")
        self.engine.store.grant("alice", "4")
        self.engine.store.grant("bob", "*")
        self.engine.inventory.domains_listed(
            "node1",
            [
                Domain("1", "web2", DomainState.RUNNING),
                Domain("2", "web1", DomainState.SHUT_OFF),
                Domain("3", "db", DomainState.RUNNING),
                Domain("4", "mail", DomainState.PAUSED),
            ],
        )
        self.assertEqual(
            self.result(self.client.consoles(user.id)),
            (
                ConsoleInfo("4", "mail", "node1"),
                ConsoleInfo("2", "web1", "node1"),
                ConsoleInfo("1", "web2", "node1"),
            ),
        )

    def test_both_urls(self) -> None:
        """With /ovirt-engine/ and without, with the last slash and without."""
        for url in ("http://e/ovirt-engine/", "http://e/ovirt-engine", "http://e/", "http://e"):
            self.result(
                client_of(
                    RequestTraversalAgent(self.engine.root), self.clock, url=url
                ).authorized_keys()
            )

    def test_clock_is_set(self) -> None:
        """Tickets have the time of day: an engine by whose clock it is an hour earlier refuses."""
        engine_clock, self.clock.time_of_day = clock_at(), lambda: self.clock.seconds() + 3600
        self.result(self.client.authorized_keys())
        directory = Path(self.mktemp())
        directory.mkdir()
        other = EngineInMemory(directory, engine_clock)
        client = client_of(RequestTraversalAgent(other.root), self.clock)
        self.failure(client.authorized_keys(), EngineError)

    def test_refused(self) -> None:
        """A certificate that is not for tickets: 403, and the text says what to look at."""
        client = client_of(RequestTraversalAgent(self.engine.root), self.clock, signer("client"))
        text = self.failure(all_keys(client), EngineError)
        for words in ("403", "certificate", "1.3.6.1.4.1.2312.13.1.2.1.1", "clocks", "expired"):
            self.assertIn(words, text)

    def test_failed(self) -> None:
        """A user whom the engine does not know: 500, and the text says so."""
        text = self.failure(self.client.consoles(USER), EngineError)
        self.assertIn("500", text)
        self.assertIn("user", text)


class RequestTests(ClientTestCase):
    """What is sent."""

    def test_commands(self) -> None:
        """Both commands, as the real Engine knows them, and what else we understand; text/plain,
        no cookie, one try."""
        self.servlet.headers[b"Set-Cookie"] = b"JSESSIONID=1"
        self.consoles()
        self.servlet.body = keys()
        self.keys()
        self.assertEqual(
            self.servlet.commands,
            [
                {
                    "command": "available_consoles",
                    "version": 1,
                    "user_id": USER,
                    "features": "role,key_options,console_problem,keyless_users",
                },
                {
                    "command": "public_keys",
                    "version": 1,
                    "key_fp": "",
                    "key_type": "",
                    "key_content": "",
                    "features": "role,key_options,console_problem,keyless_users",
                },
            ],
        )
        self.assertEqual(set(self.servlet.paths), {b"/ovirt-engine/services/vmconsole-proxy"})
        for headers in self.servlet.request_headers:
            self.assertEqual(headers.getRawHeaders("Content-Type"), ["text/plain"])
            self.assertFalse(headers.hasHeader("Cookie"))

    def test_no_redirect(self) -> None:
        """A ticket goes nowhere else, whatever the engine says."""
        self.servlet.status = 302
        self.servlet.headers[b"Location"] = b"http://elsewhere.example.com/"
        text = self.failure(all_keys(self.client), EngineError)
        self.assertIn("engine.url", text)
        self.assertEqual(len(self.servlet.commands), 1)


class ReplyTests(ClientTestCase):
    """Replies of every kind."""

    def test_extra_fields(self) -> None:
        """Fields that we do not know, any order, a reply without a version, a console without
        its kind: all fine."""
        self.servlet.body = {
            "x": {"y": [1]},
            "consoles": [{"vmid": "1", "vmname": "web", "host": "node1", "extra": [1]}],
            "content": "console_list",
        }
        self.assertEqual(self.consoles(), (ConsoleInfo("1", "web", "node1"),))

    def test_sorted(self) -> None:
        """By name; of the same name, by id."""
        self.servlet.body = consoles(WEB, {**DB, "vmid": "3"}, DB)
        self.assertEqual([console.vm_id for console in self.consoles()], ["2", "3", "1"])

    def test_roles(self) -> None:
        """A role counts when it is there; one that we do not know is no permission."""
        self.servlet.body = consoles(
            WEB, {**DB, "role": "viewer"}, {**DB, "vmid": "3", "role": "owner"}
        )
        self.assertEqual([console.role for console in self.consoles()], ["viewer", "operator"])

    def test_problems(self) -> None:
        """Why a console cannot be opened is taken as it is told; what is no text spoils its own
        entry alone."""
        self.servlet.body = consoles(
            {**DB, "problem": "no\x1b console"},
            WEB,
            *({**WEB, "vmid": "3", "problem": problem} for problem in (1, None, ["x"])),
        )
        self.assertEqual(
            [(console.vm_name, console.problem) for console in self.consoles()],
            [("db", "no\x1b console"), ("web", "")],
        )
        self.assertTrue(self.logged("Left out"))

    def test_bad_consoles(self) -> None:
        """A malformed entry is left out and logged, once; the others serve."""
        self.servlet.body = consoles(
            1,
            None,
            [],
            {},
            {**WEB, "vmid": 7},
            {**WEB, "vmname": None},
            {**WEB, "host": ""},
            {**WEB, "vmid": "", "vmname": "\x1b[2J"},
            DB,
        )
        for _ in range(3):
            self.assertEqual(self.consoles(), (ConsoleInfo("2", "db", "node2"),))
        lines = self.logged("Left out")
        self.assertEqual(len(lines), len(set(lines)))
        # The first three differ in their kind only.
        self.assertEqual(len(lines), 8)
        self.assertFalse(any("\x1b" in line for line in lines))

    def test_bad_keys(self) -> None:
        """A key that cannot be used locks out nobody else, and is logged once; its user is one
        without a key, as is that of an entry with an empty one."""
        good = public_line("alice")
        self.servlet.body = keys(
            entry("bob", "ssh-ed25519 garbage"),
            entry("carol", f'command="true" {public_line("carol")}'),
            entry("dave", "ssh-dss AAAAB3NzaC1kc3M= dave"),
            entry("erin", ""),
            entry("erin", " \t"),
            entry("frank", good, entityid=""),
            entry("grace", "", entity=""),
            {"entity": "x", "key": good},
            {"entity": "x", "entityid": 1, "key": good},
            "garbage",
            entry("alice", f"restrict {good}"),
        )
        for _ in range(3):
            *others, key = self.keys()
            names = ("bob", "carol", "dave", "erin", "erin")
            self.assertEqual(others, [User(f"id of {name}", f"{name}@internal") for name in names])
            self.assertEqual((key.user_id, key.user_name), ("id of alice", "alice@internal"))
        lines = self.logged("Left out")
        self.assertEqual(len(lines), 7)
        shown = fingerprint(parse_key_line(public_line("carol")).blob)
        line = f"carol@internal ({shown}): its option command is not supported"
        self.assertEqual(len(self.logged(line)), 1)
        self.assertFalse(self.logged("erin"), "a blank line is no mistake")

    def test_many_problems(self) -> None:
        """However many entries are bad, the log stays short; one user's do not hide another's."""
        bad = [entry("mallory", f"no-{number} {public_line('m')}") for number in range(2000)]
        bad += [entry(f"u{number}", "no key") for number in range(100)]
        self.servlet.body = keys(*bad)
        for _ in range(2):
            self.keys()
        self.assertEqual(len(self.logged("Left out")), 10 + 1 + 100)
        self.assertEqual(len(self.logged("more of mallory@internal")), 1)
        self.servlet.body = keys(*(entry(f"v{number}", "no key") for number in range(3000)))
        self.keys()
        self.assertEqual(len(self.logged("Left out")), 111 + 1000 + 1)
        self.assertEqual(len(self.logged("much more")), 1)

    def test_problem_again(self) -> None:
        """A problem that was mended, and is there again later, is news."""
        for seconds, count in ((0, 1), (599, 1), (599, 1), (601, 2), (-3600, 3)):
            self.clock.rightNow += seconds
            self.servlet.body = keys(entry("bob", "no key"))
            self.keys()
            self.assertEqual(len(self.logged("Left out")), count)

    def test_problems_forgotten(self) -> None:
        """Only so many problems are remembered: those that were seen last."""
        self.patch(replies, "_CAPACITY", 3)
        for names, told in (("abc", "abc"), ("a", ""), ("d", "d"), ("a", ""), ("b", "b")):
            self.events.clear()
            self.servlet.body = consoles(*({**WEB, "vmname": name, "host": ""} for name in names))
            self.consoles()
            lines = [line[line.index("console of ") + 11] for line in self.logged("Left out")]
            self.assertEqual("".join(lines), told)

    def test_names_of_problems(self) -> None:
        """What a user's name may do to a terminal is escaped."""
        self.servlet.body = keys({"entityid": "1", "entity": "x\x1b[2J", "key": "no key"})
        self.keys()
        [line] = self.logged("Left out")
        self.assertIn("a key of x\\x1b[2J", line)
        self.assertTrue(line.isprintable())

    def test_fingerprints(self) -> None:
        """Of two keys of a user with the same problem each is told; of what is no public key
        nothing is shown."""
        lines = [f"no-pty {public_line(name)}" for name in ("one", "two")]
        self.servlet.body = keys(*(entry("bob", line) for line in (*lines, "no-pty secret")))
        self.keys()
        shown = [fingerprint(parse_key_line(public_line(name)).blob) for name in ("one", "two")]
        told = self.logged("Left out")
        self.assertEqual(len(told), 3)
        for each in shown:
            self.assertEqual(len(self.logged(each)), 1)
        self.assertFalse(self.logged("secret"))

    def test_useless(self) -> None:
        """A reply that is not the answer is an EngineError, and never an empty answer."""
        for body in (
            b"",
            b"<html>",
            b"null",
            b"[]",
            b"\xff",
            b"[" * 100000,
            b'{"x":' + b"[" * 100000,
            json.dumps(consoles(WEB)).encode()[:-1],
            keys(),
            {"content": "console_list"},
            {"content": "console_list", "consoles": {}},
            {"content": "console_list", "consoles": None},
            {"consoles": [WEB]},
            {"content": "\x1b[2J", "consoles": [WEB]},
        ):
            self.servlet.body = body
            text = self.failure(self.client.consoles(USER), EngineError)
            self.assertTrue(text.isprintable(), text)
            self.assertIn("answer", text)

    def test_statuses(self) -> None:
        """502 to 504 mean no answer; any other status but 200 is one, and useless."""
        for status in (502, 503, 504):
            self.servlet.status = status
            self.failure(self.client.consoles(USER), EngineUnreachable)
        for status in (201, 204, 301, 400, 401, 403, 404, 405, 500, 501):
            self.servlet.status = status
            text = self.failure(self.client.consoles(USER), EngineError)
            self.assertIn(str(status), text)
            self.assertEqual("engine.url" in text, status in (301, 404))
            failure = self.failureResultOf(start(self.client.consoles(USER)))
            self.assertNotIsInstance(failure.value, EngineUnreachable)

    def test_what_to_look_at(self) -> None:
        """403 and 500 tell what is wrong with our certificate, and how far the clocks are apart,
        as far as it shows."""
        for status in (403, 500):
            self.servlet.status = status
            text = self.failure(self.client.consoles(USER), EngineError)
            self.assertNotIn("Our certificate", text)
            for seconds, words in (
                (4, "The engine's clock is 4 seconds ahead of ours"),
                (-3700, "The engine's clock is 3700 seconds behind ours"),
            ):
                date = format_datetime(NOW + timedelta(seconds=seconds), usegmt=True)
                for text in (date, date.replace("GMT", "-0000"), date.removesuffix(" GMT")):
                    self.servlet.headers[b"Date"] = text.encode()
                    self.assertIn(words, self.failure(self.client.consoles(USER), EngineError))
            close = format_datetime(NOW + timedelta(seconds=3), usegmt=True)
            endless = f"Tue, 24 Nov {'9' * 30} 08:00:00 GMT"
            for date in (format_datetime(NOW, usegmt=True), close, endless, "yesterday", ""):
                self.servlet.headers[b"Date"] = date.encode()
                text = self.failure(self.client.consoles(USER), EngineError)
                self.assertIn(f"HTTP status {status}", text)
                self.assertNotIn("clock is", text)
        self.servlet.verifier = NoVerifier()
        self.client = client_of(self.agent, self.clock, signer("client"))
        text = self.failure(self.client.consoles(USER), EngineError)
        self.assertIn("Our certificate: its extended key usage lacks", text)

    def test_read_as_taken(self) -> None:
        """The keys are read one by one, as they are taken; the same reply has the same digest,
        another one has another."""
        self.servlet.body = keys(entry("alice", public_line("alice")), 1, 2)
        first = self.result(self.client.authorized_keys())
        self.assertFalse(self.logged("Left out"))
        self.assertEqual(len([key for key in first.keys if key is not None]), 1)
        self.assertEqual(len(self.logged("Left out")), 1)
        self.assertEqual(self.result(self.client.authorized_keys()).digest, first.digest)
        self.servlet.body = keys(entry("alice", public_line("alice")))
        self.assertNotEqual(self.result(self.client.authorized_keys()).digest, first.digest)

    def test_in_pieces(self) -> None:
        """A long list of keys is read a little at a time: what is wrong at its end shows there."""
        line = public_line("alice")
        whole = json.dumps(keys(*(entry(f"u{n}", line) for n in range(10000)))).encode()
        for body in (whole, whole[:-2] + b"}"):
            self.servlet.body = body
            found = iter(self.result(self.client.authorized_keys()).keys)
            self.assertEqual(next(key for key in found if key).user_name, "u0@internal")
            if body is whole:
                self.assertEqual(len([key for key in found if key]), 9999)
            else:
                self.assertRaises(EngineError, list, found)

    def test_many_consoles(self) -> None:
        """A long list of consoles is read a little at a time as well."""
        self.patch(slices, "SLICE", 0.0)
        self.servlet.body = consoles(*({**WEB, "vmid": str(n)} for n in range(5)))
        asked = start(self.client.consoles(USER))
        self.assertNoResult(asked)
        for _ in range(10):
            self.clock.advance(0)
        self.assertEqual(len(self.successResultOf(asked)), 5)

    def test_options(self) -> None:
        """The options of a key come with it."""
        self.servlet.body = keys(entry("alice", f'from="192.0.2.7" {public_line("alice")}'))
        [key] = self.keys()
        self.assertEqual(key.options, KeyOptions(sources=("192.0.2.7",)))

    def test_options_apart(self) -> None:
        """So do those that an engine tells in a field of their own. Options in both places, or
        ones that we do not know, disable the key."""
        line = public_line("alice")
        self.servlet.body = keys(
            entry("alice", line, options='from="192.0.2.7"'),
            entry("bob", public_line("bob"), options=""),
            entry("carol", public_line("carol"), options="no-pty"),
            entry("dave", f"restrict {public_line('dave')}", options='from="192.0.2.7"'),
            entry("erin", public_line("erin"), options=["restrict"]),
            entry("frank", public_line("frank"), options=" "),
        )
        self.assertEqual(
            [
                (key.user_name, key.options.sources)
                for key in self.keys()
                if isinstance(key, AuthorizedKey)
            ],
            [("alice@internal", ("192.0.2.7",)), ("bob@internal", ()), ("frank@internal", ())],
        )
        self.assertEqual(len(self.logged("Left out")), 3)

    def test_no_keys(self) -> None:
        """A reply that has no keys is an answer only when it says so."""
        self.servlet.body = keys()
        self.assertEqual(self.keys(), ())
        for body in (
            consoles(WEB),
            {"content": "key_list"},
            {"content": "key_list", "keys": None},
            {"keys": []},
            [],
            {"content": "key_list", "other": ["x" * 1000] * 2000},
            {"content": "console_list", "keys": [entry("alice", public_line("alice"))]},
            {"content": "key_list", "keys": {"item": entry("alice", public_line("alice"))}},
            {"content": "key_list", "keys.item": entry("alice", public_line("alice"))},
            {"content": "key_list", "x": {"keys": [entry("alice", public_line("alice"))]}},
            [[{"content": "key_list", "keys": []}]],
            keys(1, [], {}, {"entityid": 1}),
        ):
            self.servlet.body = body
            self.assertIn("answer", self.failure(all_keys(self.client), EngineError))

    def test_cut(self) -> None:
        """A reply that ends in the middle gives no keys at all: whoever reads them is told."""
        whole = json.dumps(keys(*(entry(f"u{n}", public_line("alice")) for n in range(9)))).encode()
        for size in (len(whole) - 1, len(whole) - 2, len(whole) // 2):
            self.servlet.body = whole[:size]
            self.failure(all_keys(self.client), EngineError)
        self.servlet.body = whole + b"]"
        self.failure(all_keys(self.client), EngineError)

    def test_hostile(self) -> None:
        """Numbers without end, deep nesting, and what is no Unicode are clear errors, or spoil
        their own entry alone."""
        line = json.dumps(public_line("alice"))
        good = f'{{"entityid":"1","entity":"alice","key":{line}}}'
        for extra in ("9" * 5000, "[" * 100000, '{"a":' * 100000):
            self.servlet.body = f'{{"content":"key_list","keys":[{good}],"x":{extra}'.encode()
            self.failure(all_keys(self.client), EngineError)
        for bad in (
            rb'{"entityid":"2","entity":"x\udc00","key":" "}',
            b"[[[[]]]]",
            b'{"entityid":{"entityid":"2"},"entity":"x","key":"x"}',
            b'{"entityid":"2","entity":"x","key":"x\u0000"}',
        ):
            whole = b'{"content":"key_list","keys":[%s,%s]}' % (bad, good.encode())
            self.servlet.body = whole
            found = [key.user_name for key in self.keys() if isinstance(key, AuthorizedKey)]
            self.assertEqual(found, ["alice"])

    def test_surrogates(self) -> None:
        """Wherever a reply is cut, pairs of surrogates stay what they are, beside lone ones."""
        for shift in range(40):
            line = f"{public_line('alice')} " + "x" * shift
            entries = [{"entityid": "1", "entity": "a\U0001f600\\" * 300, "key": line}] * 60
            text = json.dumps(keys(*entries, entry("x\udc00\ud83d", line)))
            self.servlet.body = text.encode()
            self.assertEqual(
                {key.user_name for key in self.keys()},
                {entries[0]["entity"], "x\ufffd\ufffd@internal"},
            )

    def test_strange_json(self) -> None:
        """JSON that is valid, and beyond what we can hold, is an EngineError, too, or no key."""
        for value in ("1e9999999999999999999999", "1e999", '"\\ud800"', "[" * 400 + "]" * 400):
            for body in (f'{{"keys": [{value}]}}', f'{{"keys": [{{"entity": {value}}}]}}'):
                self.servlet.body = body.encode()
                asked = start(all_keys(self.client))
                asked.addErrback(lambda failure: failure.trap(EngineError) and ())
                self.assertFalse(any(self.successResultOf(asked)))

    def test_no_keys_of_others(self) -> None:
        """An entry has what it says itself, and nothing of its neighbours or of what is nested in
        it; what looks like keys elsewhere is none."""
        good = entry("alice", public_line("alice"))
        bare = {"key": public_line("bob")}
        for body, names in (
            (keys(good, bare, {"entity": "x", **bare}, good), ["alice@internal"] * 2),
            (keys({"x": good, **bare}, good), ["alice@internal"]),
            (keys([good], good), ["alice@internal"]),
            (keys(good) | {"other": [bare, good], "x": {"keys": [good]}}, ["alice@internal"]),
            ({"x": [good], **keys()}, []),
            ({"x": {"keys": [good]}, **keys(), "y": [good, [good], good]}, []),
            ({"x": {"content": "x"}, **keys(), "y": {"content": "x"}, "z": "x"}, []),
        ):
            self.servlet.body = body
            self.assertEqual([key.user_name for key in self.keys()], names)
        for body in ([keys(good)], {"x": keys(good)}, {"content": "key_list", "keys": good}):
            self.servlet.body = body
            self.assertIn("answer", self.failure(all_keys(self.client), EngineError))

    def test_depth(self) -> None:
        """What is nested a little is passed by; more than that is not read."""
        good = json.dumps(entry("alice", public_line("alice")))
        for depth, fits in ((20, True), (5000, False)):
            nested = "[" * depth + "]" * depth
            self.servlet.body = f'{{"content":"key_list","x":{nested},"keys":[{good}]}}'.encode()
            if fits:
                self.assertEqual(len(self.keys()), 1)
            else:
                self.failure(all_keys(self.client), EngineError)

    def test_escapes(self) -> None:
        """Beside what is no Unicode, what only looks like an escape stays what it is."""
        line = public_line("alice")
        entries = [entry("\\ud800", line), entry("\udc00", line), entry("\\", line)]
        self.servlet.body = json.dumps(keys(*entries)).encode()
        self.assertEqual(
            {key.user_name for key in self.keys()},
            {"\\ud800@internal", "\ufffd@internal", "\\@internal"},
        )
        self.servlet.body += b" \xff"
        self.failure(all_keys(self.client), EngineError)

    def test_steps(self) -> None:
        """A long reply takes many steps, also where it has no keys."""
        self.servlet.body = keys() | {"x": ["x" * 1000] * 1000}
        steps = list(self.result(self.client.authorized_keys()).keys)
        self.assertGreater(len(steps), 20)
        self.assertEqual(set(steps), {None})

    def test_slow_parser(self) -> None:
        """That reading keys will be slow here is logged; else nothing is."""
        for backend, count in (("yajl2_c", 0), ("python", 1)):
            self.patch(replies.ijson, "backend", backend)
            replies.warn_if_slow(Logger())
            self.assertEqual(len(self.logged("will be slow")), count)

    def test_gzip(self) -> None:
        """A compressed reply is read; the limit counts what comes out."""
        self.servlet.headers[b"Content-Encoding"] = b"gzip"
        self.servlet.body = gzip.compress(json.dumps(consoles(WEB)).encode())
        self.assertEqual(len(self.consoles()), 1)
        self.servlet.body = gzip.compress(b" " * 1000000)
        self.client = client_of(RequestTraversalAgent(self.servlet), self.clock, max_reply=100000)
        self.assertIn("larger", self.failure(self.client.consoles(USER), EngineError))

    def test_too_large(self) -> None:
        """A reply larger than the limit is an EngineError; one of just that size is read. One
        user's consoles may have an eighth of it."""
        for reply, ask, part in (
            (keys(), lambda: all_keys(self.client), 1),
            (consoles(WEB), lambda: self.client.consoles(USER), 8),
        ):
            body = json.dumps(reply).encode()
            self.servlet.body = body
            for size, fits in ((len(body), True), (len(body) - 1, False)):
                self.client = client_of(self.agent, self.clock, max_reply=size * part)
                asked: Deferred[object] = start(ask())
                if fits:
                    self.successResultOf(asked)
                else:
                    text = str(self.failureResultOf(asked, EngineError).value)
                    self.assertIn(f"larger than {size} bytes", text)

    def test_timeout(self) -> None:
        """No answer within the time is EngineUnreachable; one that comes later changes nothing."""
        self.servlet.later = Deferred()
        asked = start(self.client.consoles(USER))
        self.clock.advance(4.9)
        self.assertNoResult(asked)
        self.clock.advance(0.1)
        text = str(self.failureResultOf(asked, EngineUnreachable).value)
        self.assertIn("within 5 seconds", text)
        self.servlet.later.addErrback(lambda _: None)
        self.servlet.later = None
        self.servlet.body = consoles(WEB)
        self.assertEqual(len(self.consoles()), 1)

    @given(
        some.recursive(
            some.none() | some.integers() | some.text() | some.sampled_from(["key_list", "1"]),
            lambda inner: (
                some.lists(inner)
                | some.dictionaries(
                    some.sampled_from(
                        ["content", "keys", "consoles", "entity", "entityid", "key", "vmid"]
                    ),
                    inner,
                )
            ),
        )
    )
    def test_any_json(self, value: object) -> None:
        """Any JSON, as reply or as entry, gives an answer or an EngineError."""
        for body in (value, keys(value), consoles(value), keys({**entry("a", ""), "key": value})):
            self.servlet.body = json.dumps(body).encode()
            for ask in (all_keys(self.client), self.client.consoles(USER)):
                asked = start(ask)
                asked.addErrback(lambda failure: failure.trap(EngineError))
                self.successResultOf(asked)

    @given(some.binary())
    def test_any_bytes(self, body: bytes) -> None:
        """So do any bytes."""
        self.servlet.body = body
        self.failure(all_keys(self.client), EngineError)


class SocketTests(TestCase):
    """Over real sockets, with the real clock."""

    timeout = 30

    def setUp(self) -> None:
        self.directory = short_directory(self)
        self.now = datetime.now(UTC)
        self.ca = todays_authority()
        self.ticket = pki.issue(self.ca, "proxy", "ticket", self.now, key_size=2048)
        self.ticket.save(self.directory / "proxy.cer", self.directory / "proxy.key")
        (self.directory / "ca.pem").write_bytes(self.ca.certificate_pem())

    def servlet(self) -> Servlet:
        servlet = Servlet(clock_at(self.now))
        servlet.verifier = TicketVerifier([self.ca.certificate])
        servlet.body = consoles(WEB)
        return servlet

    async def listen(self, factory: Any) -> int:
        """On a port of this machine."""
        endpoint = TCP4ServerEndpoint(real_reactor, 0, interface="127.0.0.1")
        port = await endpoint.listen(factory)
        self.addCleanup(port.stopListening)
        number: int = port.getHost().port
        return number

    async def listen_tls(self, name: str, ca: pki.Identity, days: int = 1) -> int:
        """HTTPS, with a certificate for ``name``."""
        server = pki.issue(ca, name, "server", self.now, [name], days, key_size=2048)
        options = PrivateCertificate.loadPEM(server.key_pem() + server.certificate_pem()).options()
        return await self.listen(TLSMemoryBIOFactory(options, False, Site(self.servlet())))

    def client(self, url: str, ca: str = "ca.pem", timeout: float = 5.0) -> EngineClient:
        return make_engine_client(
            real_reactor,
            config.Config(
                engine=config.Engine(
                    url=url, ca=ca, certificate="proxy.cer", key="proxy.key", timeout=timeout
                ),
                state=config.State(directory=str(self.directory)),
            ),
        )

    async def fails(self, client: EngineClient) -> EngineError:
        """What it raises."""
        try:
            await client.consoles(USER)
        except EngineError as error:
            self.assertTrue(str(error).isprintable())
            return error
        self.fail("it answered")

    async def test_tls(self) -> None:
        """Over TLS, verified against the configured CA, by name and by address."""
        for name in ("localhost", "127.0.0.1"):
            number = await self.listen_tls(name, self.ca)
            client = self.client(f"https://{name}:{number}/ovirt-engine/")
            [console] = await client.consoles(USER)
            self.assertEqual(console.vm_name, "web")

    async def test_wrong_ca(self) -> None:
        """A certificate of another CA: the text names the setting."""
        other = pki.make_authority("other CA", self.now)
        number = await self.listen_tls("localhost", other)
        error = await self.fails(self.client(f"https://localhost:{number}/"))
        self.assertIn("engine.ca", str(error))
        self.assertNotIsInstance(error, EngineUnreachable)

    async def test_system_cas(self) -> None:
        """Without engine.ca the system's CAs count, which do not know ours."""
        number = await self.listen_tls("localhost", self.ca)
        error = await self.fails(self.client(f"https://localhost:{number}/", ca=""))
        self.assertIn("engine.ca", str(error))

    async def test_wrong_name(self) -> None:
        """A certificate for another name: the text says so."""
        number = await self.listen_tls("other.example.com", self.ca)
        error = await self.fails(self.client(f"https://localhost:{number}/"))
        self.assertIn("not for this name", str(error))
        self.assertNotIsInstance(error, EngineUnreachable)

    async def test_no_tls(self) -> None:
        """A server without TLS behind https:// is no outage."""
        number = await self.listen(Speaking(b"HTTP/1.1 400 Bad Request\r\n\r\n", close=True))
        error = await self.fails(self.client(f"https://localhost:{number}/"))
        self.assertIn("TLS", str(error))
        self.assertNotIsInstance(error, EngineUnreachable)

    async def test_plain_http(self) -> None:
        """http:// works, and the log shouts."""
        number = await self.listen(Site(self.servlet()))
        with capturedLogs() as events:
            client = self.client(f"http://localhost:{number}/")
            [console] = await client.consoles(USER)
        self.assertEqual(console.vm_id, "1")
        lines = [formatEvent(event) for event in events]
        self.assertEqual(len([line for line in lines if "not protected by TLS" in line]), 1)
        self.assertFalse([line for line in lines if "HTTP11ClientFactory" in line])

    async def test_refused(self) -> None:
        """Nobody listens: unreachable."""
        error = await self.fails(self.client("https://127.0.0.1:1/"))
        self.assertIsInstance(error, EngineUnreachable)
        self.assertIn("refused", str(error))

    async def test_unknown_name(self) -> None:
        """The name does not resolve: unreachable."""
        error = await self.fails(self.client("https://engine.invalid/"))
        self.assertIsInstance(error, EngineUnreachable)

    async def test_hanging(self) -> None:
        """Says nothing, begins to speak, or has half a reply: unreachable in time."""
        for words in (
            b"",
            b"HTTP/1.1 200 OK\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{",
        ):
            peer = Speaking(words)
            number = await self.listen(peer)
            error = await self.fails(self.client(f"http://127.0.0.1:{number}/", timeout=0.3))
            self.assertIsInstance(error, EngineUnreachable)
            self.assertIn("within 0.3 seconds", str(error))
            # And the connection is not left behind.
            await peer.lost

    async def test_cut(self) -> None:
        """The connection ends before, in, or after the headers: unreachable."""
        for words in (
            b"",
            b"HTTP/1.1 200 OK\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{",
        ):
            number = await self.listen(Speaking(words, close=True))
            error = await self.fails(self.client(f"http://127.0.0.1:{number}/"))
            self.assertIsInstance(error, EngineUnreachable)

    async def test_not_http(self) -> None:
        """Something else listens: an answer, and useless."""
        number = await self.listen(Speaking(b"SSH-2.0-OpenSSH_9.2\r\n", close=True))
        error = await self.fails(self.client(f"http://127.0.0.1:{number}/"))
        self.assertIn("engine", str(error))

    async def test_endless(self) -> None:
        """A reply without end is cut off at the limit, and the connection closed."""
        peer = Speaking(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 100000)
        number = await self.listen(peer)
        agent = Agent(real_reactor)

        async def credentials() -> pki.Identity:
            return self.ticket

        client = EngineClient(
            without_cookies(agent),
            f"http://127.0.0.1:{number}/",
            credentials,
            IReactorTime(real_reactor),
            max_reply=400000,
        )
        error = await self.fails(client)
        self.assertIn("50000 bytes", str(error))
        await peer.lost

    async def test_unix_socket(self) -> None:
        """Without a URL, the embedded engine's socket is asked; a missing one is an outage."""
        endpoint = UNIXServerEndpoint(real_reactor, str(self.directory / "engine.sock"))
        port = await endpoint.listen(Site(self.servlet()))

        async def credentials() -> pki.Identity:
            return self.ticket

        settings = config.Config(state=config.State(directory=str(self.directory)))
        client = make_engine_client(real_reactor, settings, credentials)
        [console] = await client.consoles(USER)
        self.assertEqual(console.host, "node1")
        await port.stopListening()
        try:
            await client.consoles(USER)
        except EngineUnreachable as error:
            self.assertIn("The embedded engine does not answer", str(error))
        else:
            self.fail("it answered")

    def test_files(self) -> None:
        """A file that is missing or no good is a ConfigError that names setting and file."""
        for name, content, words in (
            ("ca.pem", None, "engine.ca"),
            ("ca.pem", b"garbage", "engine.ca"),
            ("proxy.cer", None, "engine.certificate"),
            ("proxy.cer", b"garbage", "engine.certificate"),
            ("proxy.key", None, "engine.key"),
            ("proxy.key", b"garbage", "engine.key"),
            ("proxy.key", self.ca.key_pem(), "engine.key"),
        ):
            path = self.directory / name
            good = path.read_bytes()
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            error = self.assertRaises(ConfigError, self.client, "https://localhost/")
            self.assertIn(words, str(error))
            self.assertIn(str(path), str(error))
            path.write_bytes(good)


class Speaking(Factory):
    """A peer that says its words when it heard something."""

    noisy = False

    def __init__(self, words: bytes, close: bool = False) -> None:
        self.words = words
        self.close = close
        self.lost: Deferred[None] = Deferred()

    def buildProtocol(self, address: object) -> Protocol:
        factory = self

        class Peer(Protocol):
            def dataReceived(self, data: bytes) -> None:
                assert self.transport is not None
                self.transport.write(factory.words)
                if factory.close:
                    self.transport.loseConnection()

            def connectionLost(self, reason: object = None) -> None:
                factory.lost.callback(None)

        return Peer()
