"""The embedded engine for other machines: HTTPS, its certificates, and what clients may take."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import select
import socket
import ssl
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from OpenSSL import SSL
from twisted.internet import reactor
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.testing import StringTransport
from twisted.internet.threads import deferToThread
from twisted.logger import LogLevel
from twisted.python.failure import Failure
from twisted.trial.unittest import TestCase

from tests.engine_kit import (
    NOW,
    EngineInMemory,
    EngineTestCase,
    all_keys,
    at_once,
    authority,
    clock_at,
    short_directory,
    signer,
    todays_authority,
)
from tests.test_inventory import RecordingSource
from vmconsole import config, pki
from vmconsole.engine.check import check_engine
from vmconsole.engine.client import EngineClient
from vmconsole.engine.embedded import connections, service
from vmconsole.engine.embedded.connections import LimitedSite
from vmconsole.engine.embedded.files import EmbeddedFiles
from vmconsole.engine.embedded.https import (
    ServerCertificate,
    _CurrentCertificate,
    _TLSFactory,
    load_server_certificate,
)
from vmconsole.engine.embedded.identity import TicketIdentities, ticket_identities
from vmconsole.engine.embedded.listen import https_endpoint, unix_address
from vmconsole.engine.embedded.service import EmbeddedEngine
from vmconsole.engine.embedded.store import Store
from vmconsole.engine.files import ExpiryWatch
from vmconsole.engine.http import make_engine_client
from vmconsole.engine.ticket import sign_ticket
from vmconsole.errors import ConfigError, EngineError

DAY = timedelta(days=1)
COMMAND = json.dumps({"command": "public_keys", "version": 1})
PEER = IPv4Address("TCP", "127.0.0.1", 1)
Private = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


@functools.cache
def todays(number: int = 1) -> pki.Identity:
    """A server's certificate for localhost that is valid by the real clock."""
    now = datetime.now(UTC)
    return pki.issue(todays_authority(), f"{number}", "server", now, ["localhost"], key_size=2048)


@functools.cache
def server(number: int = 1) -> pki.Identity:
    """One that is valid by the clock of the tests in memory."""
    return pki.issue(authority(), f"engine {number}", "server", NOW, ["localhost"], key_size=2048)


def chain_of(key: Private, signer: Private, issuer: str = "between") -> bytes:
    """A certificate for localhost that the CA between issued, in PEM; by the real clock."""

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name("between" if key is signer else "engine"))
        .issuer_name(name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - DAY)
        .not_valid_after(now + DAY)
    )
    return builder.sign(signer, hashes.SHA256()).public_bytes(Encoding.PEM)


def pem(key: Private, passphrase: bytes = b"") -> bytes:
    """A private key."""
    encryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


class ConfiguredTestCase(EngineTestCase):
    """A state directory with a certificate for HTTPS."""

    def setUp(self) -> None:
        super().setUp()
        self.directory = Path(self.mktemp())
        self.directory.mkdir()
        server().save(self.directory / "server.cer", self.directory / "server.key")

    def config(
        self,
        listen: str = "tcp:0:interface=127.0.0.1",
        certificate: str = "server.cer",
        key: str = "server.key",
        **embedded: str,
    ) -> config.Config:
        return configured(
            self.directory, listen=listen, certificate=certificate, key=key, **embedded
        )


def configured(directory: Path, **embedded: str) -> config.Config:
    """With these settings of [engine.embedded]."""
    return config.Config(
        engine=config.Engine(embedded=config.EmbeddedEngine(**embedded)),
        state=config.State(directory=str(directory)),
    )


class ListenTests(ConfiguredTestCase):
    """``engine.embedded.listen`` for HTTPS."""

    def test_own_socket(self) -> None:
        """Our own proxy has a unix socket, wherever else the engine listens."""
        for listen in ("tcp:8443", "ssl:8443", "ssl:8443:interface=\\:\\:1"):
            path, mode = unix_address(self.config(listen))
            self.assertEqual((path.name, mode), ("engine.sock", 0o600))
            self.assertEqual(path.parent, self.directory)
            self.assertIsNotNone(https_endpoint(reactor, self.config(listen)))
        other = self.config("unix:other.sock")
        self.assertEqual(unix_address(other).path.name, "other.sock")
        self.assertIsNone(https_endpoint(reactor, other))

    def test_systemd(self) -> None:
        """A socket that systemd opened; there is none in the tests."""
        error = self.assertRaises(
            ConfigError, https_endpoint, reactor, self.config("systemd:domain=INET:index=0")
        )
        self.assertIn("engine.embedded.listen", str(error))

    def test_without_certificate(self) -> None:
        """There is no plain HTTP; and half a pair is none."""
        for listen in ("tcp:8443", "ssl:8443"):
            settings = self.config(listen, "", "")
            for function in (unix_address, functools.partial(https_endpoint, reactor)):
                error = self.assertRaises(ConfigError, function, settings)
                for words in ("engine.embedded.listen", "HTTPS", "certificate", "key", "pki host"):
                    self.assertIn(words, str(error))
        for settings, missing in (
            (self.config("tcp:8443", key=""), "engine.embedded.key is missing"),
            (self.config("unix:a", certificate=""), "engine.embedded.certificate is missing"),
        ):
            self.assertIn(missing, str(self.assertRaises(ConfigError, unix_address, settings)))

    def test_no_endpoint(self) -> None:
        """What is no endpoint is told, with what would be."""
        for listen in ("tcp:x", "tcp", "tcp:1:certKey=a", "ssl:1:privateKey=a", "ssl:", "ssl:1\\"):
            settings = self.config(listen)
            error = self.assertRaises(ConfigError, https_endpoint, reactor, settings)
            self.assertIn(f"engine.embedded.listen = {listen!r}", str(error))
            self.assertIn("tcp:8443", str(error))


class CertificateTests(ConfiguredTestCase):
    """``load_server_certificate``."""

    def bad(self) -> str:
        return str(self.assertRaises(ConfigError, load_server_certificate, self.config()))

    def test_no_good(self) -> None:
        """What is missing, no PEM, encrypted, no pair, or too weak is told with its file."""
        weak = rsa.generate_private_key(65537, 1024)
        for name, content, setting, words in (
            ("server.cer", None, "engine.embedded.certificate", "No such file"),
            ("server.cer", b"garbage", "engine.embedded.certificate", "no certificate in PEM"),
            ("server.key", None, "engine.embedded.key", "No such file"),
            ("server.key", b"garbage", "engine.embedded.key", "no PEM file"),
            ("server.key", pem(server().key, b"secret"), "engine.embedded.key", "passphrase"),
            ("server.key", server(2).key_pem(), "engine.embedded.key", "is not the key of"),
        ):
            path = self.directory / name
            good = path.read_bytes()
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            told = self.bad()
            self.assertIn(f"{setting} ({path})", told)
            self.assertIn(words, told)
            path.write_bytes(good)
        (self.directory / "server.cer").write_bytes(chain_of(weak, weak))
        (self.directory / "server.key").write_bytes(pem(weak))
        told = self.bad()
        self.assertIn("cannot be used for TLS: ee key too small", told)

    def test_good(self) -> None:
        """RSA and elliptic curves; of a chain the first one is the engine's."""
        between = rsa.generate_private_key(65537, 2048)
        for key in (rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP256R1())):
            chain = chain_of(key, between) + chain_of(between, between, "CA")
            (self.directory / "server.cer").write_bytes(chain)
            (self.directory / "server.key").write_bytes(pem(key))
            loaded = load_server_certificate(self.config())
            self.assertEqual(len(loaded.chain), 2)
            # OpenSSL 3 would speak no older ones by itself, and others may.
            self.assertTrue(loaded.context.set_options(0) & SSL.OP_NO_TLSv1_1)
        (self.directory / "server.key").write_bytes(pem(between))
        self.assertIn("has to be the first", self.bad())


class FilesTests(ConfiguredTestCase):
    """``EmbeddedFiles``: the mechanism has tests of its own."""

    def setUp(self) -> None:
        super().setUp()
        self.mtimes = itertools.count(10**18, 10**9)
        self.changes = 0
        (self.directory / "ca.pem").write_bytes(authority().certificate_pem())

    def write(self, name: str, content: bytes) -> None:
        path = self.directory / name
        path.write_bytes(content)
        mtime = next(self.mtimes)
        os.utime(path, ns=(mtime, mtime))

    def changed(self) -> None:
        self.changes += 1

    def started(self, **settings: str) -> EmbeddedFiles:
        files = EmbeddedFiles(self.clock, self.config(**settings), self.changed, at_once)
        files.startService()
        self.addCleanup(files.stopService)
        return files

    def look(self) -> None:
        self.clock.advance(5)
        self.clock.advance(5)

    def test_pair(self) -> None:
        """The pair is taken together."""
        files = self.started()
        self.assertEqual(files.server.chain, (server().certificate,))
        self.write("server.cer", server(2).certificate_pem())
        self.look()
        self.assertEqual(files.server.chain, (server().certificate,))
        self.assertEqual(len(self.logged("engine.embedded.key (")), 1)
        self.assertEqual(self.changes, 0)
        self.write("server.key", server(2).key_pem())
        self.look()
        self.assertEqual(files.server.chain, (server(2).certificate,))
        self.assertEqual(len(self.logged("in use from now on")), 1)
        self.assertEqual(self.changes, 1)

    def test_ticket_ca(self) -> None:
        """So are the authorities, and whoever uses them is called."""
        files = self.started(ticket_ca="ca.pem")
        self.assertEqual(files.ticket_authorities, (authority().certificate,))
        both = authority().certificate_pem() + authority("other CA").certificate_pem()
        self.write("ca.pem", both)
        self.look()
        self.assertEqual(len(files.ticket_authorities), 2)
        self.assertEqual(self.changes, 1)
        self.write("ca.pem", b"garbage")
        self.look()
        self.assertEqual(len(files.ticket_authorities), 2)
        self.assertEqual(self.changes, 1)

    def test_nothing(self) -> None:
        """By default there is no file, and a reload says so."""
        files = EmbeddedFiles(self.clock, configured(self.directory), self.changed, at_once)
        self.assertEqual(files.ticket_authorities, ())
        self.successResultOf(files.reload())
        self.assertEqual(self.logged(""), ["There is no file that would have to be read again."])

    def test_expiries(self) -> None:
        """Their end is told a month before, with the cure."""
        self.clock = clock_at(NOW + 825 * DAY - 29 * DAY)
        files = self.started(ticket_ca="ca.pem")
        watch = ExpiryWatch(self.clock, config.Config(), [files], at_once)
        watch.startService()
        [line] = self.logged("")
        self.assertIn("engine.embedded.certificate (", line)
        self.assertIn("its key into engine.embedded.key; no restart is needed.", line)
        self.successResultOf(watch.stopService())
        self.clock = clock_at(NOW + 3651 * DAY)
        self.events.clear()
        watch = ExpiryWatch(self.clock, config.Config(), [files], at_once)
        watch.startService()
        [line] = self.logged("engine.embedded.ticket_ca (")
        self.assertIn("the CA's new certificate", line)
        self.successResultOf(watch.stopService())


class CheckTests(ConfiguredTestCase):
    """``vmconsole check`` of an embedded engine."""

    def found(self, now: datetime = NOW, **settings: str) -> dict[str, bool]:
        return dict(check_engine(self.config(**settings), now))

    def one(self, words: str, now: datetime = NOW, **settings: str) -> bool:
        """Whether the only thing that is wrong is fatal."""
        [(text, fatal)] = self.found(now, **settings).items()
        self.assertIn(words, text)
        return fatal

    def test_good(self) -> None:
        """Nothing to say, and nothing made."""
        self.assertEqual(self.found(), {})
        self.assertEqual(
            sorted(path.name for path in self.directory.iterdir()), ["server.cer", "server.key"]
        )

    def test_certificate(self) -> None:
        """It expires soon, has expired, is not valid yet, or has no names."""
        self.assertFalse(self.one("expires on", NOW + 800 * DAY))
        self.assertTrue(self.one("expired on", NOW + 826 * DAY))
        self.assertTrue(self.one("valid only from", NOW - DAY))
        signer().save(self.directory / "server.cer", self.directory / "server.key")
        self.assertFalse(self.one("subjectAltName"))

    def test_key(self) -> None:
        """Not the certificate's, or for everybody to read."""
        (self.directory / "server.key").chmod(0o644)
        self.assertFalse(self.one("can be read by others"))
        (self.directory / "server.key").chmod(0o640)
        self.assertEqual(self.found(), {})
        (self.directory / "server.key").write_bytes(server(2).key_pem())
        self.assertTrue(self.one("is not the key of"))
        self.assertTrue(self.one("engine.embedded.key is missing", key=""))

    def test_useless(self) -> None:
        """A certificate, and no HTTPS; and an endpoint that is none."""
        self.assertFalse(self.one("not used", listen="unix:engine.sock"))
        self.assertTrue(self.one("no Twisted endpoint", listen="tcp:x"))

    def test_ticket_ca(self) -> None:
        """It cannot be read, or ends."""
        self.assertTrue(self.one("engine.embedded.ticket_ca", ticket_ca="no.pem"))
        (self.directory / "ca.pem").write_bytes(signer().certificate_pem())
        self.assertFalse(
            self.one(
                "engine.embedded.ticket_ca", NOW + 800 * DAY, ticket_ca="ca.pem", **self.plain()
            )
        )

    def plain(self) -> dict[str, str]:
        return {"listen": "unix:engine.sock", "certificate": "", "key": ""}

    def test_database(self) -> None:
        """None yet is good; one of ours too, and it stays as it is; one that is none is not."""
        path = self.directory / "engine.db"
        store = Store(f"sqlite:///{path}")
        store.open()
        store.close()
        before = path.read_bytes()
        self.assertEqual(self.found(), {})
        self.assertEqual(path.read_bytes(), before)
        path.write_bytes(b"garbage" * 1000)
        self.assertTrue(self.one("engine.db"))

    def test_older_database(self) -> None:
        """It is told that the next start upgrades it, and that is not done here."""
        path = self.directory / "engine.db"
        store = Store(f"sqlite:///{path}")
        store.open()
        with store._database.writing() as connection:
            connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0001'")
        store.close()
        self.assertFalse(self.one("has version 0001: the next start upgrades it"))
        self.assertFalse(self.one("has version 0001: the next start upgrades it"))


class Wire(StringTransport):
    """It knows how it ended."""

    aborting = False

    def setTcpNoDelay(self, enabled: bool) -> None:
        """Nothing is delayed."""

    def pauseProducing(self) -> None:
        """As a real one it may be told twice."""
        self.producerState = "paused"

    def abortConnection(self) -> None:
        self.aborting = True
        super().abortConnection()


class LimitTestCase(EngineTestCase):
    """Clients of the site, over transports in memory."""

    def setUp(self) -> None:
        super().setUp()
        directory = Path(self.mktemp())
        directory.mkdir()
        self.engine = EngineInMemory(directory, self.clock)
        self.salts = 0

    def connect(self, site: Any = None) -> tuple[Any, Any]:
        peer = (site or self.engine.site).buildProtocol(PEER)
        if peer is None:
            return None, None
        transport = Wire()
        peer.makeConnection(transport)
        return peer, transport

    def request(self, close: bool = False) -> bytes:
        self.salts += 1
        now = datetime.fromtimestamp(self.clock.seconds(), UTC)
        body = sign_ticket(COMMAND, signer(), now, self.salts.to_bytes(8, "big"))
        return (
            b"POST /services/vmconsole-proxy HTTP/1.1\r\nHost: x\r\n%sContent-Length: %d\r\n\r\n"
            % (b"Connection: close\r\n" if close else b"", len(body))
        ) + body

    def lose(self, peer: Any) -> None:
        peer.connectionLost(Failure(ConnectionDone()))


class SlowTests(LimitTestCase):
    """What a client has to do in time."""

    def test_silent(self) -> None:
        """One that says nothing is dropped after 30 seconds."""
        _, transport = self.connect()
        self.clock.advance(29.9)
        self.assertFalse(transport.disconnecting)
        self.clock.advance(0.2)
        self.assertTrue(transport.aborting)

    def test_drip(self) -> None:
        """So is one that sends a byte a second, of the headers or of the body."""
        whole = self.request()
        for start in (0, whole.index(b"\r\n\r\n") + 4):
            peer, transport = self.connect()
            peer.dataReceived(whole[:start])
            for at in range(start, start + 29):
                self.clock.advance(1)
                peer.dataReceived(whole[at : at + 1])
            self.assertFalse(transport.disconnecting)
            self.clock.advance(1.5)
            self.assertTrue(transport.aborting)

    def test_keep_alive(self) -> None:
        """Each request has its own time, which begins with the reply to the one before."""
        peer, transport = self.connect()
        for _ in range(5):
            self.clock.advance(20)
            peer.dataReceived(self.request())
        self.assertEqual(transport.value().count(b"HTTP/1.1 200"), 5)
        self.clock.advance(29.9)
        self.assertFalse(transport.disconnecting)
        self.clock.advance(0.2)
        self.assertTrue(transport.aborting)

    def test_pipelined(self) -> None:
        """Two requests at once, of which the second is half there: it has to come."""
        peer, transport = self.connect()
        peer.dataReceived(self.request() + self.request()[:-1])
        self.assertEqual(transport.value().count(b"HTTP/1.1 200"), 1)
        self.clock.advance(30.1)
        self.assertTrue(transport.aborting)

    def test_long_question(self) -> None:
        """While the database thinks, the client is not to blame."""
        waiting: list[Callable[[], None]] = []
        original = self.engine.answers._in_thread

        def later(function: Callable[[], Any]) -> Any:
            answer: Deferred[None] = Deferred()
            waiting.append(lambda: answer.callback(None))
            return answer.addCallback(lambda _: original(function))

        self.engine.answers._in_thread = later
        peer, transport = self.connect()
        peer.dataReceived(self.request())
        self.clock.advance(600)
        self.assertFalse(transport.disconnecting)
        waiting[0]()
        self.assertIn(b"HTTP/1.1 200", transport.value())
        self.clock.advance(30.1)
        self.assertTrue(transport.aborting)

    def test_not_taken(self) -> None:
        """A reply that is not taken: 60 seconds after the last of it was."""
        peer, transport = self.connect()
        peer.dataReceived(self.request())
        for _ in range(3):
            transport.producer.pauseProducing()
            self.clock.advance(50)
            transport.producer.resumeProducing()
            self.clock.advance(5)
        transport.producer.pauseProducing()
        self.clock.advance(59.9)
        self.assertFalse(transport.disconnecting)
        self.clock.advance(0.2)
        self.assertTrue(transport.aborting)

    def test_taken_late(self) -> None:
        """When it was taken in the end, there are 30 seconds for the next request."""
        peer, transport = self.connect()
        peer.dataReceived(self.request())
        transport.producer.pauseProducing()
        self.clock.advance(59)
        transport.producer.resumeProducing()
        self.clock.advance(29.9)
        self.assertFalse(transport.disconnecting)
        self.clock.advance(0.2)
        self.assertTrue(transport.aborting)

    def test_many_not_taken(self) -> None:
        """More requests at once, and none of the replies is taken."""
        peer, transport = self.connect()
        write = transport.writeSequence

        def full(data: Iterable[bytes]) -> None:
            write(data)
            transport.producer.pauseProducing()

        transport.writeSequence = full
        peer.dataReceived(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
        self.assertEqual(transport.value().count(b"HTTP/1.1 404"), 3)
        for _ in range(2):
            self.clock.advance(29.9)
            transport.producer.pauseProducing()
        self.assertFalse(transport.disconnecting)
        self.clock.advance(0.3)
        self.assertTrue(transport.aborting)

    def test_full_while_answering(self) -> None:
        """The same while the reply is being written; what comes meanwhile gives no more time."""
        peer, transport = self.connect()
        write = transport.write

        def full(data: bytes) -> None:
            write(data)
            if transport.producer:
                transport.producer.pauseProducing()

        transport.write = full
        peer.dataReceived(self.request())
        for _ in range(6):
            self.clock.advance(9.9)
            peer.dataReceived(b"P")
        self.assertFalse(transport.disconnecting)
        self.clock.advance(1)
        self.assertTrue(transport.aborting)

    def test_last_reply_not_taken(self) -> None:
        """Who said that the connection ends, or spoke no HTTP, and does not let it: 60 seconds."""
        for sent in (self.request(close=True), b"\r\n\r\nGET\r\n\r\n"):
            peer, transport = self.connect()
            peer.dataReceived(sent)
            self.assertTrue(transport.disconnecting)
            self.clock.advance(59.9)
            self.assertFalse(transport.aborting)
            self.clock.advance(0.2)
            self.assertTrue(transport.aborting)

    def test_gone(self) -> None:
        """A connection that ended leaves no timer."""
        for sent in (b"", b"POST", self.request(), self.request(close=True)):
            peer, _ = self.connect()
            peer.dataReceived(sent)
            self.lose(peer)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_handshake(self) -> None:
        """TLS's handshake is a part of it: whether nothing comes, or a byte a second."""
        context = SSL.Context(SSL.TLS_METHOD)
        current = ServerCertificate((), context)
        factory = _TLSFactory(
            _CurrentCertificate(lambda: current), False, self.engine.site, self.clock
        )
        client = SSL.Connection(SSL.Context(SSL.TLS_METHOD), None)
        client.set_connect_state()
        self.assertRaises(SSL.WantReadError, client.do_handshake)
        hello = client.bio_read(65536)
        for sent in (b"", hello):
            peer, transport = self.connect(factory)
            for at in range(29):
                self.clock.advance(1)
                if at < len(sent):
                    peer.dataReceived(sent[at : at + 1])
            self.assertFalse(transport.disconnecting)
            self.clock.advance(1.5)
            self.assertTrue(transport.aborting)


class CountTests(LimitTestCase):
    """How many connections there may be."""

    def setUp(self) -> None:
        super().setUp()
        self.site = LimitedSite(
            self.engine.site.resource, self.engine.site.requestFactory, self.clock, 4
        )

    def test_too_many(self) -> None:
        """More are not taken, which is told once until half of them were free again."""
        peers = [self.connect(self.site)[0] for _ in range(4)]
        for _ in range(10):
            self.assertIsNone(self.site.buildProtocol(PEER))
        self.assertEqual(len(self.logged("4 clients are connected")), 1)
        self.lose(peers.pop())
        peers.append(self.connect(self.site)[0])
        self.assertIsNotNone(peers[-1])
        self.assertIsNone(self.site.buildProtocol(PEER))
        self.assertEqual(len(self.logged("4 clients are connected")), 1)
        for peer in peers[:2]:
            self.lose(peer)
        for _ in range(2):
            self.assertIsNotNone(self.connect(self.site)[0])
        self.assertIsNone(self.site.buildProtocol(PEER))
        self.assertEqual(len(self.logged("4 clients are connected")), 2)
        self.assertEqual({event["log_level"] for event in self.events}, {LogLevel.warn})

    def test_unlimited(self) -> None:
        """On the unix socket there is no such limit: it is our own proxy's."""
        for _ in range(1000):
            self.assertIsNotNone(self.engine.site.buildProtocol(PEER))
            self.connect()

    def test_stop(self) -> None:
        """With the last port the connections end."""
        self.site.doStart()
        _, transport = self.connect(self.site)
        self.site.doStop()
        self.assertTrue(transport.aborting)


class HTTPSTestCase(TestCase):
    """The whole service, with real sockets and threads."""

    timeout = 60

    def setUp(self) -> None:
        self.directory = short_directory(self) / "state"
        self.directory.mkdir(mode=0o700)
        self.put(todays())

    def put(self, identity: pki.Identity) -> None:
        identity.save(self.directory / "server.cer", self.directory / "server.key")

    def config(self, listen: str = "ssl:0:interface=127.0.0.1", **settings: str) -> config.Config:
        names = {"certificate": "server.cer", "key": "server.key"}
        return configured(self.directory, listen=listen, **names, **settings)

    async def start(self, **settings: str) -> EmbeddedEngine:
        engine = EmbeddedEngine(reactor, self.config(**settings), RecordingSource())
        engine.startService()
        self.addCleanup(engine.stopService)
        await engine.ready()
        self.port = engine._ports[-1].getHost().port  # type: ignore[attr-defined]
        return engine

    def client(self, identity: pki.Identity) -> EngineClient:
        """A proxy on another machine."""
        folder = self.directory / "remote"
        folder.mkdir(exist_ok=True)
        identity.save(folder / "proxy.cer", folder / "proxy.key")
        (folder / "ca.pem").write_bytes(todays_authority().certificate_pem())
        settings = config.Config(
            engine=config.Engine(
                url=f"https://localhost:{self.port}/",
                ca="ca.pem",
                certificate="proxy.cer",
                key="proxy.key",
            ),
            state=config.State(directory=str(folder)),
        )
        return make_engine_client(reactor, settings)

    async def refused(self, client: EngineClient) -> str:
        with self.assertRaises(EngineError) as caught:
            await client.authorized_keys()
        return str(caught.exception)

    def handshake(self, alpn: Sequence[str] = (), **limits: Any) -> tuple[Any, Any, Any]:
        """The version, the chosen protocol and the chain that a client gets. Waits."""
        context = ssl.create_default_context(cadata=todays_authority().certificate_pem().decode())
        for name, value in limits.items():
            setattr(context, name, value)
        if alpn:
            context.set_alpn_protocols(list(alpn))
        with (
            socket.create_connection(("127.0.0.1", self.port), 10) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as tls,
        ):
            return tls.version(), tls.selected_alpn_protocol(), tls.getpeercert(True)


class HTTPSTests(HTTPSTestCase):
    """What it serves, and to whom."""

    async def test_both(self) -> None:
        """Our own proxy by the unix socket, another by HTTPS."""
        engine = await self.start()
        own = make_engine_client(reactor, self.config(), engine.credentials)
        self.assertEqual(await all_keys(own), ())
        authority = pki.Identity.load(
            self.directory / "ticket-ca.cer", self.directory / "ticket-ca.key"
        )
        identity = pki.issue(authority, "proxy", "ticket", datetime.now(UTC), key_size=2048)
        self.assertEqual(await all_keys(self.client(identity)), ())
        stranger = pki.issue(
            todays_authority(), "stranger", "ticket", datetime.now(UTC), key_size=2048
        )
        self.assertIn("403", await self.refused(self.client(stranger)))

    async def test_tls(self) -> None:
        """1.2 and 1.3, no HTTP/2; older versions and plain HTTP get nothing."""
        await self.start()
        for version, name in ((ssl.TLSVersion.TLSv1_2, "TLSv1.2"), (None, "TLSv1.3")):
            limits = {"maximum_version": version} if version else {}
            shown = await deferToThread(self.handshake, ["h2", "http/1.1"], **limits)
            self.assertEqual(shown[:2], (name, "http/1.1"))
        with self.assertRaises(OSError):
            await deferToThread(
                self.handshake,
                minimum_version=ssl.TLSVersion.TLSv1,
                maximum_version=ssl.TLSVersion.TLSv1_1,
            )

        def plain() -> bytes:
            with socket.create_connection(("127.0.0.1", self.port), 10) as peer:
                peer.sendall(b"POST /services/vmconsole-proxy HTTP/1.1\r\nHost: x\r\n\r\n")
                return peer.recv(100)

        self.assertNotIn(b"HTTP", await deferToThread(plain))

    async def test_own_is_unlimited(self) -> None:
        """Others at the unix socket do not keep our own proxy away."""
        self.patch(service, "_CONNECTIONS", 1)
        engine = await self.start()
        for _ in range(3):
            peer = socket.socket(socket.AF_UNIX)
            self.addCleanup(peer.close)
            await deferToThread(peer.connect, str(self.directory / "engine.sock"))
        own = make_engine_client(reactor, self.config(), engine.credentials)
        self.assertEqual(await all_keys(own), ())

    async def test_chain(self) -> None:
        """The CA between stands in the certificate's file, and is served."""
        between, key = (rsa.generate_private_key(65537, 2048) for _ in range(2))
        chain = chain_of(key, between) + chain_of(between, between, "CA")
        (self.directory / "server.cer").write_bytes(chain)
        (self.directory / "server.key").write_bytes(pem(key))
        await self.start()

        def served() -> int:
            context = SSL.Context(SSL.TLS_METHOD)
            with socket.create_connection(("127.0.0.1", self.port)) as plain:
                tls = SSL.Connection(context, plain)
                tls.set_connect_state()
                tls.do_handshake()
                return len(tls.get_peer_cert_chain() or ())

        self.assertEqual(await deferToThread(served), 2)

    async def test_renewed(self) -> None:
        """The next connection gets the new certificate, and one that is open goes on."""
        engine = await self.start()
        _, _, first = await deferToThread(self.handshake)
        opened = await deferToThread(socket.create_connection, ("127.0.0.1", self.port), 10)
        self.addCleanup(opened.close)
        self.put(todays(2))
        self.assertEqual((await deferToThread(self.handshake))[2], first)
        await engine.files.reload()
        _, _, second = await deferToThread(self.handshake)
        self.assertEqual(second, todays(2).certificate.public_bytes(Encoding.DER))
        self.assertEqual(len(engine._ports), 2)

    async def test_ticket_ca(self) -> None:
        """Whose tickets are taken follows the file, and our own always are."""
        now = datetime.now(UTC)
        one, other = (pki.make_authority(name, now) for name in ("one", "other"))
        path = self.directory / "ca.pem"
        path.write_bytes(one.certificate_pem())
        engine = await self.start(ticket_ca="ca.pem")
        by_one, by_other = (
            pki.issue(each, "proxy", "ticket", now, key_size=2048) for each in (one, other)
        )
        self.assertEqual(await all_keys(self.client(by_one)), ())
        self.assertIn("403", await self.refused(self.client(by_other)))
        path.write_bytes(other.certificate_pem())
        await engine.files.reload()
        self.assertEqual(await all_keys(self.client(by_other)), ())
        self.assertIn("403", await self.refused(self.client(by_one)))
        own = make_engine_client(reactor, self.config(), engine.credentials)
        self.assertEqual(await all_keys(own), ())

    async def test_own_renewed(self) -> None:
        """Our own CA and certificate are made anew before they end, also while it runs; what the
        old CA issued goes on."""
        engine = await self.start()
        self.assertTrue(engine._renewal.running)
        self.assertEqual(engine._renewal.interval, 86400.0)
        first = await engine.credentials()
        old = ticket_identities(self.directory, datetime.now(UTC)).authority
        await Deferred.fromCoroutine(engine._renew())
        self.assertEqual((await engine.credentials()).certificate, first.certificate)

        def much_later(*_: object) -> TicketIdentities:
            now = datetime.now(UTC)
            authority = pki.make_authority("vmconsole tickets", now)
            proxy = pki.issue(authority, "vmconsole proxy", "ticket", now)
            return TicketIdentities(authority, proxy, (old.certificate,))

        self.patch(service, "ticket_identities", much_later)
        await Deferred.fromCoroutine(engine._renew())
        second = await engine.credentials()
        self.assertNotEqual(second.certificate, first.certificate)
        by_old = pki.issue(old, "proxy", "ticket", datetime.now(UTC), key_size=2048)
        for identity in (second, first, by_old):
            self.assertEqual(await all_keys(self.client(identity)), ())

    async def test_renewal_fails(self) -> None:
        """Then what there is goes on, and the log says so."""
        engine = await self.start()
        first = await engine.credentials()

        def fail(*_: object) -> None:
            raise EngineError("The disk is full.")

        self.patch(service, "ticket_identities", fail)
        await Deferred.fromCoroutine(engine._renew())
        self.assertEqual(await engine.credentials(), first)

    async def test_cannot_listen(self) -> None:
        """A port that is taken, an address that is not ours, one that is none: a line, which
        names the setting."""
        await self.start()
        for listen, words in (
            (f"tcp:{self.port}:interface=127.0.0.1", "Address already in use"),
            ("tcp:0:interface=192.0.2.1", "assign requested address"),
            ("tcp:99999:interface=127.0.0.1", "0-65535"),
        ):
            directory = short_directory(self)
            for name in ("server.cer", "server.key"):
                (directory / name).write_bytes((self.directory / name).read_bytes())
            settings = configured(
                directory, listen=listen, certificate="server.cer", key="server.key"
            )
            second = EmbeddedEngine(reactor, settings, RecordingSource())
            second.startService()
            self.addCleanup(second.stopService)
            with self.assertRaises(EngineError) as caught:
                await second.ready()
            self.assertIn(words, str(caught.exception))
            self.assertIn("engine.embedded.listen", str(caught.exception))

    async def test_no_certificate(self) -> None:
        """What cannot be read is told when the engine is made."""
        (self.directory / "server.key").unlink()
        with self.assertRaises(ConfigError) as caught:
            EmbeddedEngine(reactor, self.config(), RecordingSource())
        self.assertIn("server.key) cannot be read: No such file", str(caught.exception))

    async def test_slow(self) -> None:
        """A real client that is too slow is disconnected."""
        self.patch(connections, "REQUEST_SECONDS", 0.3)
        await self.start()

        def ended() -> bytes:
            with socket.create_connection(("127.0.0.1", self.port), 10) as peer:
                try:
                    return peer.recv(1)
                except ConnectionResetError:
                    return b""

        self.assertEqual(await deferToThread(ended), b"")

    async def test_reads_nothing(self) -> None:
        """A real client that asks, and never reads the long reply, is disconnected."""
        self.patch(connections, "REPLY_SECONDS", 0.3)
        engine = await self.start()

        async def much(_: object) -> Sequence[bytes]:
            return [bytes(65536)] * 1000

        self.patch(engine._answers, "key_list", much)
        identity = await engine.credentials()
        body = sign_ticket(COMMAND, identity, datetime.now(UTC), bytes(8))

        def events() -> int:
            context = ssl.create_default_context(
                cadata=todays_authority().certificate_pem().decode()
            )
            with (
                socket.create_connection(("127.0.0.1", self.port), 10) as plain,
                context.wrap_socket(plain, server_hostname="localhost") as tls,
            ):
                tls.sendall(
                    b"POST /services/vmconsole-proxy HTTP/1.1\r\nHost: x\r\n"
                    b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
                )
                # Without reading it notices only the end.
                poll = select.poll()
                poll.register(tls, 0)
                return sum(event for _, event in poll.poll(20000))

        self.assertTrue(await deferToThread(events) & (select.POLLHUP | select.POLLERR))

    async def test_too_many(self) -> None:
        """A real client that is one too many is disconnected; when another has gone, it is not."""
        self.patch(service, "_CONNECTIONS", 2)
        await self.start()

        def refused() -> list[bytes]:
            address = ("127.0.0.1", self.port)
            with (
                socket.create_connection(address, 10),
                socket.create_connection(address, 10) as second,
                socket.create_connection(address, 10) as third,
            ):
                found = third.recv(1)
                second.setblocking(False)
                try:
                    second.recv(1)
                except BlockingIOError:
                    return [found]
                return []

        self.assertEqual(await deferToThread(refused), [b""])
        for _ in range(100):
            # It may not have noticed yet that they are gone.
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                await deferToThread(self.handshake)
                return
        self.fail("nobody is let in any more")
