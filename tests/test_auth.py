"""Logging in: who is let in, who is told what, and how often one may try."""

from __future__ import annotations

from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from twisted.conch.ssh import userauth
from twisted.conch.ssh.common import NS, getNS
from twisted.conch.ssh.keys import Key
from twisted.cred.checkers import ICredentialsChecker
from twisted.cred.portal import IRealm
from twisted.internet.defer import Deferred
from twisted.logger import formatEvent
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from tests.authenticator import (
    SK_ECDSA,
    SK_ED25519,
    USER_PRESENT,
    USER_VERIFIED,
    Authenticator,
)
from tests.sshpair import ALICE, ALICE_KEY, SSHPair
from vmconsole.config import SSH, Config, Limits
from vmconsole.errors import EngineError, EngineUnreachable
from vmconsole.interfaces import AuthorizedKey
from vmconsole.keyoptions import NO_OPTIONS, KeyOptions
from vmconsole.publickeys import fingerprint
from vmconsole.ssh.avatar import ConsoleRealm
from vmconsole.ssh.checker import EngineKeyChecker

SUCCESS = userauth.MSG_USERAUTH_SUCCESS
FAILURE = userauth.MSG_USERAUTH_FAILURE
PK_OK = userauth.MSG_USERAUTH_PK_OK


def new_key() -> Key:
    """A key that nobody knows."""
    return Key(ed25519.Ed25519PrivateKey.generate())


class AuthTestCase(SynchronousTestCase):
    """A connection on which nobody has logged in yet."""

    def setUp(self) -> None:
        self.pair = SSHPair()
        self.auth = self.pair.auth

    def know(self, key: Key) -> None:
        """Make ``key`` a key of Alice's."""
        self.pair.engine.keys.append(AuthorizedKey(ALICE.id, ALICE.name, key.public().blob()))

    def answers(self) -> list[int]:
        """What the server has answered since the last look."""
        self.pair.flush()
        answers, self.auth.answers = self.auth.answers, []
        return answers


class LoginTests(AuthTestCase):
    """The ways in, and the ways that are none."""

    def test_seams(self) -> None:
        """The checker and the realm are what cred takes."""
        pair = self.pair
        checker = EngineKeyChecker(pair.permissions, ["a"], pair.trust, pair.clock)
        verifyObject(ICredentialsChecker, checker)
        realm = ConsoleRealm(pair.permissions, pair.commands, pair.audit, pair.clock, 8)
        verifyObject(IRealm, realm)

    def test_known_key(self) -> None:
        """A key that the engine knows logs in, under each of the configured names."""
        for name in (b"vmproxy", b"ovirt-vmconsole"):
            pair = SSHPair()
            pair.auth.sign(name, ALICE_KEY)
            pair.flush()
            self.assertEqual(pair.auth.answers, [SUCCESS])

    def test_query(self) -> None:
        """A query is answered truthfully: yes for a known key, no for a stranger's."""
        self.auth.query(b"vmproxy", ALICE_KEY)
        self.assertEqual(self.answers(), [PK_OK])
        self.auth.query(b"vmproxy", new_key())
        self.assertEqual(self.answers(), [FAILURE])

    def test_strange_key(self) -> None:
        """A stranger's key with a good signature is refused; the connection may try another."""
        self.auth.sign(b"vmproxy", new_key())
        self.assertEqual(self.answers(), [FAILURE])
        self.auth.sign(b"vmproxy", ALICE_KEY)
        self.assertEqual(self.answers(), [SUCCESS])

    def test_wrong_signature(self) -> None:
        """A known key with somebody else's signature is refused."""
        self.auth.sign(b"vmproxy", ALICE_KEY, signed_with=new_key())
        self.assertEqual(self.answers(), [FAILURE])

    def test_wrong_name(self) -> None:
        """Another user name is refused without asking the engine, and told which would do."""
        self.auth.sign(b"root", ALICE_KEY)
        self.assertEqual(self.answers(), [FAILURE])
        self.assertEqual(self.pair.engine.asked, [])
        self.assertEqual(
            self.auth.banners, ["[vmconsole: log in as ovirt-vmconsole or vmproxy.]\r\n"]
        )

    def test_only_publickey(self) -> None:
        """No other method is offered, nor taken."""
        for method, rest in (
            (b"none", b""),
            (b"password", b"\0" + NS(b"secret")),
            (b"keyboard-interactive", NS(b"") + NS(b"")),
            (b"hostbased", b""),
        ):
            self.auth.request(b"vmproxy", method, rest)
            self.assertEqual(self.answers(), [FAILURE])
        self.assertEqual(self.pair.server.service.supportedAuthentications, [b"publickey"])

    def test_garbage(self) -> None:
        """A request that cannot be parsed is refused, without a traceback in the log."""
        blob = ALICE_KEY.public().blob()
        for rest in (
            b"",
            b"\x01",
            b"\x00" + NS(b"ssh-ed25519"),
            b"\x00" + NS(b"ssh-ed25519") + NS(blob[:-5]),
            b"\x00" + NS(b"ssh-ed25519") + NS(b""),
            b"\x01" + NS(b"ssh-ed25519") + NS(blob),
            b"\x01" + NS(b"ssh-ed25519") + NS(blob) + NS(b""),
            b"\x01" + NS(b"ssh-ed25519") + NS(blob) + NS(b"\0" * 40),
            b"\x01" + NS(b"ssh-ed25519") + NS(blob) + NS(NS(b"ssh-ed25519") + NS(b"short")),
            b"\x00" + NS(b"ssh-dss") + NS(blob),
            b"\x00" + NS(b"\xff\xfe") + NS(blob),
        ):
            pair = SSHPair()
            pair.auth.request(b"vmproxy", b"publickey", rest)
            pair.flush()
            self.assertEqual(pair.auth.answers, [FAILURE], rest)
            self.assertEqual(self.flushLoggedErrors(), [])

    def test_pipelined(self) -> None:
        """Requests sent without waiting are answered in order; after the success the rest is
        void, and does not start a second session."""
        self.auth.query(b"vmproxy", new_key())
        self.auth.sign(b"vmproxy", ALICE_KEY)
        self.auth.sign(b"vmproxy", ALICE_KEY)
        self.assertEqual(self.answers(), [FAILURE, SUCCESS])
        self.assertEqual(len(self.pair.events.named("login_accepted")), 1)

    def test_pipelined_while_the_engine_thinks(self) -> None:
        """Two good requests at once, with the engine still to answer, are one login."""
        self.pair.engine.keys_gate = Deferred()
        self.auth.sign(b"vmproxy", ALICE_KEY)
        self.auth.sign(b"vmproxy", ALICE_KEY)
        self.assertEqual(self.answers(), [])
        self.pair.engine.keys_gate.callback(None)
        self.assertEqual(self.answers(), [SUCCESS])
        self.assertEqual(self.pair.engine.asked, ["keys"])
        self.assertEqual(len(self.pair.events.named("login_accepted")), 1)

    def test_services(self) -> None:
        """The connection service is for who is logged in, and nobody logs in twice."""
        self.pair.client.sendPacket(5, NS(b"ssh-connection"))
        self.pair.flush()
        self.assertEqual((self.pair.client.disconnected or (0,))[0], 7)
        pair = SSHPair()
        pair.login()
        pair.client.sendPacket(5, NS(b"ssh-userauth"))
        pair.flush()
        self.assertEqual((pair.client.disconnected or (0,))[0], 7)

    def test_audit_of_a_refusal(self) -> None:
        """A connection that ends without a login leaves one event: name, keys, address, why."""
        self.auth.query(b"vmproxy", new_key())
        stranger = new_key()
        self.auth.sign(b"vmproxy", stranger)
        self.answers()
        self.pair.client_io.loseConnection()
        self.pair.flush()
        (event,) = self.pair.events.named("login_refused")
        self.assertEqual(event["login_name"], "vmproxy")
        self.assertEqual(event["fingerprints"][1], fingerprint(stranger.public().blob()))
        self.assertEqual(event["address"], "192.0.2.7")
        self.assertEqual(event["reason"], "the engine knows no user with this key")

    def test_known_but_not_used(self) -> None:
        """A known key that was only asked about is told apart from none at all, and a connection
        that tried other methods leaves its event, too."""
        self.auth.query(b"vmproxy", ALICE_KEY)
        self.answers()
        self.pair.client_io.loseConnection()
        self.pair.flush()
        (event,) = self.pair.events.named("login_refused")
        self.assertEqual(event["reason"], "a known key was offered, and not used")
        pair = SSHPair()
        pair.auth.request(b"root", b"password", b"\0" + NS(b"secret"))
        pair.flush()
        pair.client_io.loseConnection()
        pair.flush()
        (event,) = pair.events.named("login_refused")
        self.assertEqual((event["login_name"], event["reason"]), ("root", "no key was offered"))

    def test_another_service(self) -> None:
        """Who logs in for another service than the connection is refused, and not let in."""
        ask = self.auth.transport.sendPacket
        blob = ALICE_KEY.public().blob()
        rest = b"\x01" + NS(b"ssh-ed25519") + NS(blob)
        head = NS(b"vmproxy") + NS(b"ssh-userauth") + NS(b"publickey")
        message = NS(self.pair.client.sessionID) + bytes((50,)) + head + rest
        ask(50, head + rest + NS(ALICE_KEY.sign(message, b"ssh-ed25519")))
        self.assertEqual(self.answers(), [FAILURE])
        self.assertEqual(self.pair.events.named("login_accepted"), [])

    def test_a_name_cannot_pose_as_fields(self) -> None:
        """In the log's line, what a client chooses is quoted."""
        self.auth.query(b"x address=203.0.113.9 reason='y'", ALICE_KEY)
        self.answers()
        self.pair.client_io.loseConnection()
        self.pair.flush()
        line = formatEvent(self.pair.events.named("login_refused")[0])
        self.assertIn('login_name="x address=203.0.113.9', line)

    def test_names_in_the_audit_are_escaped(self) -> None:
        """A user name cannot forge a log line."""
        self.auth.query(b"x\n\x1b[2J\xff", ALICE_KEY)
        self.answers()
        self.pair.client_io.loseConnection()
        self.pair.flush()
        (event,) = self.pair.events.named("login_refused")
        self.assertEqual(event["login_name"], "x\\n\\x1b[2J\\\\xff")

    def test_configured_banner(self) -> None:
        """The configured banner is shown before the login."""
        pair = SSHPair(Config(ssh=SSH(banner="Authorised users only.\nGo away.")))
        self.assertEqual(pair.auth.banners, ["Authorised users only.\r\nGo away.\r\n"])


class EngineTests(AuthTestCase):
    """When the engine cannot say."""

    def test_unreachable(self) -> None:
        """The user is told, once, that it is the engine and not the key; no traceback."""
        self.pair.engine.error = EngineUnreachable("refused")
        self.auth.query(b"vmproxy", ALICE_KEY)
        self.auth.query(b"vmproxy", new_key())
        self.assertEqual(self.answers(), [FAILURE, FAILURE])
        self.assertEqual(len(self.auth.banners), 1)
        self.assertIn("the engine, which knows your key, does not answer", self.auth.banners[0])
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_no_use(self) -> None:
        """An answer that is no use is told apart from none."""
        self.pair.engine.error = EngineError("403")
        self.auth.query(b"vmproxy", ALICE_KEY)
        self.assertEqual(self.answers(), [FAILURE])
        self.assertIn("gave no usable answer", self.auth.banners[0])


class AlgorithmTests(AuthTestCase):
    """Which keys and signatures are good enough."""

    def test_good_ones(self) -> None:
        """ecdsa of each curve, and RSA of 2048 bits and more with SHA-2, log in."""
        rsa_key = Key(rsa.generate_private_key(65537, 2048))
        cases = [
            (Key(ec.generate_private_key(curve())), b"")
            for curve in (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
        ]
        cases += [(rsa_key, b"rsa-sha2-256"), (rsa_key, b"rsa-sha2-512")]
        for key, algorithm in cases:
            pair = SSHPair()
            pair.engine.keys.append(AuthorizedKey("u", "u", key.public().blob()))
            pair.auth.sign(b"vmproxy", key, algorithm)
            pair.flush()
            self.assertEqual(pair.auth.answers, [SUCCESS], key)

    def test_sha1(self) -> None:
        """RSA with SHA-1 is refused, also when the signature names it behind a better name."""
        key = Key(rsa.generate_private_key(65537, 2048))
        self.know(key)
        self.auth.sign(b"vmproxy", key, b"ssh-rsa")
        self.assertEqual(self.answers(), [FAILURE])
        self.auth.sign(b"vmproxy", key, b"rsa-sha2-256", signature_algorithm=b"ssh-rsa")
        self.assertEqual(self.answers(), [FAILURE])

    def test_small_rsa(self) -> None:
        """RSA below 2048 bits is refused."""
        key = Key(rsa.generate_private_key(65537, 1024))
        self.know(key)
        self.auth.sign(b"vmproxy", key, b"rsa-sha2-512")
        self.assertEqual(self.answers(), [FAILURE])

    def test_algorithm_of_another_key(self) -> None:
        """An algorithm that does not go with the key's type is refused at the query."""
        self.auth.query(b"vmproxy", ALICE_KEY, b"rsa-sha2-512")
        key = Key(rsa.generate_private_key(65537, 2048))
        self.know(key)
        self.auth.query(b"vmproxy", key, b"ssh-ed25519")
        self.assertEqual(self.answers(), [FAILURE, FAILURE])

    def test_other_encodings(self) -> None:
        """A key whose blob is written in another way is refused, though Conch can read it, and the
        engine knows it so: the revocation list would not find it."""
        keys = [new_key(), Key(ec.generate_private_key(ec.SECP256R1()))]
        keys.append(Key(rsa.generate_private_key(65537, 2048)))
        edwards, curve, large = (key.public().blob() for key in keys)
        kind, name, point, _ = getNS(curve, 3)
        compressed = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
        point = compressed.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
        rsa_kind, exponent, modulus, _ = getNS(large, 3)
        for key, blob in (
            (keys[0], edwards + b"\0"),
            (keys[0], edwards[:-33] + b"\x40" + edwards[-32:]),
            (keys[1], curve + b"\0"),
            (keys[1], curve.replace(NS(name), NS(b"nistp521"))),
            (keys[1], NS(kind) + NS(name) + NS(point)),
            (keys[2], NS(rsa_kind) + NS(exponent) + NS(b"\0" + modulus)),
            (keys[2], NS(rsa_kind) + NS(b"\0\0" + exponent) + NS(modulus)),
        ):
            pair = SSHPair()
            pair.engine.keys.append(AuthorizedKey(ALICE.id, ALICE.name, blob))
            algorithm = b"rsa-sha2-512" if key is keys[2] else key.sshType()
            pair.auth.query(b"vmproxy", key, algorithm, blob)
            pair.auth.sign(b"vmproxy", key, algorithm, blob=blob)
            pair.flush()
            self.assertEqual(pair.auth.answers, [FAILURE, FAILURE], blob)
            self.assertEqual(pair.server.tries.refusal, "the key is not encoded as RFC 4253 has it")

    def test_huge(self) -> None:
        """A key that is larger than any that is taken is refused before it is read."""
        blob = NS(b"ssh-rsa") + NS(b"\1\0\1") + NS(b"\0" + b"\xff" * 30000)
        self.patch(Key, "fromString", lambda *_, **__: self.fail("it was read"))
        self.auth.query(b"vmproxy", None, b"rsa-sha2-512", blob)
        self.assertEqual(self.answers(), [FAILURE])
        self.assertEqual(self.pair.server.tries.refusal, "the key is too large")


class SecurityKeyTests(SynchronousTestCase):
    """Keys in hardware: FIDO authenticators."""

    def setUp(self) -> None:
        self.keys = [Authenticator(SK_ED25519), Authenticator(SK_ECDSA)]
        self.pair = SSHPair()

    def sign(self, key: Authenticator, options: KeyOptions = NO_OPTIONS, **how: Any) -> list[int]:
        """Log in on a new connection; the answers, and why, if it was refused."""
        self.pair = SSHPair()
        self.pair.engine.keys.append(AuthorizedKey("u", "u", key.blob, options))
        rest = b"\x01" + NS(key.kind) + NS(key.blob)
        message = (
            NS(self.pair.client.sessionID)
            + bytes((userauth.MSG_USERAUTH_REQUEST,))
            + NS(b"vmproxy")
            + NS(b"ssh-connection")
            + NS(b"publickey")
            + rest
        )
        signature = how.pop("change", lambda signature: signature)(key.sign(message, **how))
        self.pair.auth.request(b"vmproxy", b"publickey", rest + NS(signature))
        self.pair.flush()
        return self.pair.auth.answers

    def test_presence(self) -> None:
        """A security key logs in when it was touched, and only then, whatever else it says; with
        verify-required only when it verified its user, too."""
        verify = KeyOptions(verify_required=True)
        for key in self.keys:
            for flags, options, expected in (
                (USER_PRESENT, NO_OPTIONS, SUCCESS),
                (USER_PRESENT | USER_VERIFIED, NO_OPTIONS, SUCCESS),
                (0, NO_OPTIONS, FAILURE),
                (USER_VERIFIED, NO_OPTIONS, FAILURE),
                (0xFE, NO_OPTIONS, FAILURE),
                (USER_PRESENT, verify, FAILURE),
                (USER_VERIFIED, verify, FAILURE),
                (USER_PRESENT | USER_VERIFIED, verify, SUCCESS),
            ):
                self.assertEqual(self.sign(key, options, flags=flags), [expected], flags)

    def test_claimed_presence(self) -> None:
        """Flags that were changed after signing, and a counter, make the signature wrong."""
        for key in self.keys:
            for at in (-5, -1):

                def change(signature: bytes, at: int = at) -> bytes:
                    changed = bytearray(signature)
                    changed[at] |= USER_PRESENT
                    return bytes(changed)

                how = {"flags": 0, "counter": 6, "change": change}
                if at == -1:
                    how["flags"] = USER_PRESENT
                self.assertEqual(self.sign(key, **how), [FAILURE])
                self.assertEqual(self.pair.server.tries.refusal, "the signature is wrong")

    def test_counter(self) -> None:
        """Whatever the counter says: sshd does not look at it, either."""
        for counter in (0, 1, 0xFFFFFFFF):
            self.assertEqual(self.sign(self.keys[0], counter=counter), [SUCCESS])

    def test_application(self) -> None:
        """A key may have any application that begins with ssh:, as ssh-keygen makes them; one that
        a web site could use is refused at the query, and a signature for another application than
        the key's is wrong."""
        for kind in (SK_ED25519, SK_ECDSA):
            for application, expected in (
                (b"ssh:work", SUCCESS),
                (b"https://example.com", FAILURE),
                (b"SSH:", FAILURE),
                (b"", FAILURE),
            ):
                key = Authenticator(kind, application)
                self.assertEqual(self.sign(key), [expected], application)
                self.pair = SSHPair()
                self.pair.engine.keys.append(AuthorizedKey("u", "u", key.blob))
                rest = b"\x00" + NS(kind) + NS(key.blob)
                self.pair.auth.request(b"vmproxy", b"publickey", rest)
                self.pair.flush()
                answers = {SUCCESS: PK_OK, FAILURE: FAILURE}
                self.assertEqual(self.pair.auth.answers, [answers[expected]])
            self.assertEqual(self.sign(Authenticator(kind), application=b"ssh:other"), [FAILURE])
            self.assertEqual(self.pair.server.tries.refusal, "the signature is wrong")

    def test_cut(self) -> None:
        """A signature without flags, or with half a counter, is refused, without a traceback."""
        for key in self.keys:
            for size in range(1, 6):
                answers = self.sign(key, change=lambda signature, size=size: signature[:-size])
                self.assertEqual(answers, [FAILURE])
        self.assertEqual(self.flushLoggedErrors(), [])


class LimitTests(AuthTestCase):
    """How often one may try."""

    def test_signatures(self) -> None:
        """After auth_tries signatures the connection ends."""
        for _ in range(self.pair.config.limits.auth_tries):
            self.auth.sign(b"vmproxy", new_key())
        self.assertEqual(self.answers(), [FAILURE] * 6)
        self.auth.sign(b"vmproxy", ALICE_KEY)
        self.assertEqual(self.answers(), [])
        self.assertEqual(self.pair.client.disconnected, (14, b"too many authentication failures"))

    def test_queries(self) -> None:
        """A client with many keys gets in: queries are counted apart, up to auth_queries."""
        for _ in range(60):
            self.auth.query(b"vmproxy", new_key())
            self.assertEqual(self.answers(), [FAILURE])
        self.auth.sign(b"vmproxy", ALICE_KEY)
        self.assertEqual(self.answers(), [SUCCESS])

    def test_endless_queries(self) -> None:
        """Beyond auth_queries the connection ends."""
        for _ in range(self.pair.config.limits.auth_queries):
            self.auth.query(b"vmproxy", new_key())
            self.answers()
        self.auth.query(b"vmproxy", ALICE_KEY)
        self.assertEqual(self.answers(), [])
        self.assertIsNotNone(self.pair.client.disconnected)

    def test_other_requests(self) -> None:
        """Requests that cannot be parsed, of other methods, and for another service count, too."""
        for method, rest, count in (
            (b"publickey", b"\0", 64),
            (b"publickey", b"\1", 6),
            (b"publickey", b"", 6),
            (b"none", b"", 64),
            (b"password", b"\0" + NS(b"secret"), 64),
        ):
            self.setUp()
            for _ in range(count):
                self.auth.request(b"vmproxy", method, rest)
                self.assertEqual(self.answers(), [FAILURE])
            self.auth.request(b"vmproxy", method, rest)
            self.assertEqual(self.answers(), [])
            self.assertIsNotNone(self.pair.client.disconnected)

    def test_service_asked_for_again(self) -> None:
        """Asking for the userauth service again does not start the count anew."""
        for _ in range(6):
            self.auth.sign(b"vmproxy", new_key())
        self.answers()
        self.pair.client.sendPacket(5, NS(b"ssh-userauth"))
        self.pair.flush()
        self.auth.sign(b"vmproxy", ALICE_KEY)
        self.assertEqual(self.answers(), [])
        self.assertIsNotNone(self.pair.client.disconnected)

    def test_flood(self) -> None:
        """Requests by the dozen without waiting for an answer end the connection."""
        self.pair.engine.keys_gate = Deferred()
        for _ in range(30):
            self.auth.query(b"vmproxy", ALICE_KEY)
        self.assertEqual(self.answers(), [])
        self.assertEqual(self.pair.client.disconnected, (14, b"too many requests at once"))
        self.pair.engine.keys_gate.callback(None)
        self.assertEqual(self.pair.engine.asked, ["keys"])

    def test_grace(self) -> None:
        """Who has not logged in when login_grace is over is disconnected; a user is not."""
        self.pair.advance(29)
        self.assertIsNone(self.pair.client.disconnected)
        self.pair.advance(2)
        self.assertEqual(self.pair.client.disconnected, (11, b"no login within the time limit"))
        pair = SSHPair(Config(limits=Limits(login_grace=5)))
        pair.login()
        pair.advance(60)
        self.assertIsNone(pair.client.disconnected)
