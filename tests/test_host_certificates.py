"""Host certificates, and how clients learn of new host keys."""

from __future__ import annotations

import os
import struct
from base64 import b64encode
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from msgspec.structs import replace
from twisted.conch.ssh.common import NS, getNS
from twisted.conch.ssh.keys import Key
from twisted.internet.defer import maybeDeferred
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from tests.ssh_ca import HOST, SUFFIX, ecdsa_key, ed25519_key, issue, rsa_key
from tests.sshpair import SSHPair
from vmconsole import pki
from vmconsole.check import check
from vmconsole.config import SSH, Config, EmbeddedEngine, Engine, State
from vmconsole.errors import ConfigError
from vmconsole.ssh.certificates import parse_certificate
from vmconsole.ssh.hostkeys import HostKeys
from vmconsole.ssh.hostkeys_update import HostKeysUpdate
from vmconsole.ssh.trust import Trust

CA, ED25519, RSA, NEXT = ed25519_key(), ed25519_key(), rsa_key(), ed25519_key()
NEXT_RSA = rsa_key()
PLAIN = [b"ssh-ed25519", b"rsa-sha2-512", b"rsa-sha2-256"]
DAY = 86400


def host_keys(**validity: int) -> HostKeys:
    """Both keys, and a certificate for each."""
    certificates = [
        parse_certificate(issue(CA, key, kind=HOST, **validity))  # type: ignore[arg-type]
        for key in (ED25519, RSA)
    ]
    return HostKeys([ED25519, RSA], certificates)


class CertificateTests(SynchronousTestCase):
    """What is offered, and what signs."""

    def test_offered_first(self) -> None:
        """Certificates stand before the keys in the offer; ``host_key_algorithms`` may choose
        among them."""
        pair = SSHPair(host_keys=host_keys())
        self.assertEqual(
            pair.server.algorithms.host_keys, [name + SUFFIX for name in PLAIN] + PLAIN
        )
        chosen = ("rsa-sha2-256", "ssh-ed25519-cert-v01@openssh.com")
        config = Config(ssh=SSH(host_key_algorithms=chosen))
        pair = SSHPair(config, host_keys=host_keys())
        offered = pair.server.algorithms.host_keys
        self.assertEqual(offered, [name.encode() for name in chosen])
        chosen = ("ssh-ed25519-cert-v01@openssh.com",)
        config = Config(ssh=SSH(host_key_algorithms=chosen))
        self.assertRaises(ConfigError, SSHPair, config)

    def test_only_while_valid(self) -> None:
        """One that has ended, or has not begun, is not offered; it is from its first moment on,
        to connections that come then."""
        pair = SSHPair(host_keys=host_keys(valid_after=1000, valid_before=2000))
        self.assertEqual(pair.server.algorithms.host_keys, PLAIN)
        for moment, count in ((1000.0, 6), (1999.9, 6), (2000.0, 3)):
            pair.clock.advance(moment - pair.clock.seconds())
            self.assertEqual(len(pair.beside().server.algorithms.host_keys), count, moment)

    def test_clock_is_set(self) -> None:
        """That goes by the time of day."""
        pair = SSHPair(host_keys=host_keys(valid_after=1000, valid_before=2000))
        for moment, count in ((1000.0, 6), (2000.0, 3)):
            pair.clock.time_of_day = lambda moment=moment: moment
            self.assertEqual(len(pair.beside().server.algorithms.host_keys), count, moment)

    def test_signature(self) -> None:
        """The certificate stands in the key's place, and the key signs, by its own algorithm."""
        keys = host_keys()
        for key, names in ((ED25519, PLAIN[:1]), (RSA, PLAIN[1:])):
            for name in names:
                public, private = keys.identity(name + SUFFIX)
                self.assertEqual(getNS(public.blob())[0], key.sshType() + SUFFIX)
                signature = private.sign(b"hash", signatureType=name + SUFFIX)
                self.assertEqual(getNS(signature)[0], name)
                self.assertTrue(key.public().verify(signature, b"hash"))
                public, private = keys.identity(name)
                self.assertEqual((public, private), (key.public(), key))

    def test_key_exchange(self) -> None:
        """A client that asks for a certificate gets it, signed for, and one that does not know
        certificates gets the key."""
        pair = SSHPair(host_keys=host_keys())
        public, private = pair.server._getHostKeys(b"ssh-ed25519" + SUFFIX)
        self.assertEqual(public.blob(), host_keys().certificates[0].blob)
        self.assertIs(public, private)
        pair.login()


class FileTests(SynchronousTestCase):
    """``ssh.host_keys`` and ``ssh.host_certificates``."""

    def setUp(self) -> None:
        self.state = Path(self.mktemp()).absolute()
        self.state.mkdir(mode=0o700)
        self.clock = Clock()
        self.clock.advance(1000 * DAY)
        self.keys = ["ed25519", "rsa"]
        self.algorithms: tuple[str, ...] = ()
        self.certificates = ["ed25519-cert.pub", "rsa-cert.pub"]
        self.put("ed25519", ED25519)
        self.put("rsa", RSA)
        self.certify("ed25519-cert.pub", ED25519)
        self.certify("rsa-cert.pub", RSA)

    def put(self, name: str, key: Key) -> None:
        """A private key."""
        pki.write_private(self.state / name, key.toString("OPENSSH", subtype="v1"))

    def certify(self, name: str, key: Key, ca: Key = CA, **how: Any) -> bytes:
        """A certificate."""
        blob = issue(ca, key, **{"kind": HOST, "id": b"gateway", **how})
        self.write(name, f"{getNS(blob)[0].decode()} {b64encode(blob).decode()} x\n")
        return blob

    def write(self, name: str, text: str) -> None:
        """A file that is new in all that shows from outside."""
        (self.state / "new").write_text(text)
        os.replace(self.state / "new", self.state / name)

    @property
    def config(self) -> Config:
        """With these files."""
        ssh = SSH(
            host_keys=tuple(self.keys),
            host_certificates=tuple(self.certificates),
            host_key_algorithms=self.algorithms,
        )
        # This folder's path is too long for a unix socket.
        engine = Engine(embedded=EmbeddedEngine(listen="unix:/run/engine.sock"))
        return Config(ssh=ssh, engine=engine, state=State(directory=str(self.state)))

    def trust(self) -> Trust:
        """All read."""
        trust = Trust(self.clock, self.config, maybeDeferred)
        trust.read_host_keys()
        return trust

    def findings(self) -> list[tuple[str, bool]]:
        """What `vmconsole check` says."""
        now = datetime.fromtimestamp(self.clock.seconds(), UTC)
        return [(text, fatal) for text, fatal in check(self.config, now)]

    def refused(self) -> str:
        """The text of the error at the start, which `vmconsole check` has, too."""
        with self.assertRaises(ConfigError) as caught:
            self.trust()
        self.assertIn((str(caught.exception), True), self.findings())
        return str(caught.exception)

    def test_read(self) -> None:
        """Each certificate goes with its key, in whatever order; check finds nothing."""
        self.certificates.reverse()
        found = self.trust().host_keys
        self.assertEqual(found.offered(0.0), {*PLAIN, *(name + SUFFIX for name in PLAIN)})
        self.assertEqual(self.findings(), [])

    def test_wrong(self) -> None:
        """What is no host certificate for a key that is used is an error, which names the file,
        and the cure."""
        self.keys.append("next")
        self.put("next", NEXT)
        path = self.state / "ed25519-cert.pub"
        for make, words in (
            (lambda: self.certify(path.name, NEXT), "ssh-keygen -h -s CA"),
            (lambda: self.certify(path.name, ED25519, kind=1), "a user's certificate"),
            (lambda: self.certify(path.name, ED25519, signed_by=NEXT), "CA did not sign it"),
            (lambda: self.certify(path.name, ED25519, rsa_key(1024)), "CA's key is not accepted"),
            (lambda: self.certify(path.name, ecdsa_key()), "which is none of those"),
            (lambda: self.write(path.name, "x"), "no certificate, such as ssh-keygen -s makes"),
            (lambda: self.write(path.name, "ssh-ed25519 AAAA"), "this is no certificate"),
            (lambda: path.write_bytes(b"\xff \xff"), "this is no certificate"),
            (lambda: os.unlink(path), "cannot be read: No such file"),
        ):
            make()
            text = self.refused()
            self.assertIn(words, text)
            self.assertIn(str(path), text)
        self.certify(path.name, ED25519)
        self.certificates.append(path.name)
        self.assertIn("names two for the same key", self.refused())

    def test_nothing_to_offer(self) -> None:
        """Algorithms that go with none of the keys and certificates are an error."""
        self.algorithms, self.certificates = (f"ssh-ed25519{SUFFIX.decode()}",), []
        self.assertIn("host_key_algorithms", self.refused())

    def test_expiry(self) -> None:
        """One that has expired is told, and is no error; one that soon will is told within 30
        days, and within the last third of its life."""
        now = int(self.clock.seconds())
        for after, before, said in (
            (now - 300 * DAY, now + 31 * DAY, ""),
            (now - 300 * DAY, now + 29 * DAY, "expires on 1972-10-26"),
            (now - 3 * DAY, now + 4 * DAY, ""),
            (now - 5 * DAY, now + 2 * DAY, "expires on 1972-09-29"),
            (now - 4 * DAY, now + 3 * DAY, ""),
            (now - 5 * DAY, now - 1, "expired on 1972-09-26"),
            (now - 5 * DAY, now, "expired on 1972-09-27"),
            (now + 5, now + 9, "is not valid before 1972-09-27"),
        ):
            self.certify("rsa-cert.pub", RSA, valid_after=after, valid_before=before)
            told = [text for text, fatal in self.findings() if not fatal]
            self.assertEqual(len(told), 1 if said else 0, (told, said))
            for text in told:
                self.assertIn(f"ssh.host_certificates: gateway {said}", text)
            expiries = list(self.trust().expiries(datetime.fromtimestamp(now, UTC)))
            if "expire" in said:
                self.assertEqual([each.text for each in expiries], told)
                self.assertEqual(expiries[0].expired, "expired" in said)

    def test_doubts(self) -> None:
        """One that clients may refuse, though it is in order, is told, and is no error."""
        for changes, said in (
            ({"principals": []}, "gateway names no host"),
            ({"critical": {b"source-address": b"192.0.2.1"}}, "gateway has critical options"),
        ):
            self.certify("rsa-cert.pub", RSA, **changes)
            [(text, fatal)] = self.findings()
            self.assertIn(said, text)
            self.assertFalse(fatal)

    def test_check_tells_all(self) -> None:
        """What is wrong with the CAs, the revocation list and the certificates is told together."""
        self.write("x", "x")
        ssh = replace(self.config.ssh, user_ca="x", revoked_keys="x", host_certificates=("x",))
        told = "".join(text for text, _ in check(replace(self.config, ssh=ssh), datetime.now(UTC)))
        for words in (
            f"ssh.user_ca ({self.state / 'x'}), line 1: ",
            f"ssh.revoked_keys ({self.state / 'x'}): line 1: ",
            f"{self.state / 'x'}: this is no certificate",
        ):
            self.assertIn(words, told)

    def test_engine_alone(self) -> None:
        """Without an ssh server host keys and their certificates are not looked at; the other
        files are, since they are read at the start."""
        self.write("x", "x")
        ssh = replace(self.config.ssh, listen=(), user_ca="x", host_certificates=("x",))
        config = replace(self.config, ssh=ssh)
        found = [text for text, _ in check(config, datetime.now(UTC))]
        self.assertEqual(len(found), 1, found)
        with self.assertRaises(ConfigError) as caught:
            Trust(self.clock, config, maybeDeferred)
        self.assertEqual(found, [str(caught.exception)])

    def test_renewed(self) -> None:
        """A new certificate is taken while the proxy runs; one that is no good is logged, and the
        old one stays."""
        self.algorithms = ("rsa-sha2-512-cert-v01@openssh.com",)
        trust = self.trust()
        changed: list[int] = []
        trust.observe(lambda: changed.append(1))
        blob = self.certify("rsa-cert.pub", RSA, serial=8)
        self.successResultOf(trust.reload())
        self.assertEqual(trust.host_keys.certificates[1].blob, blob)
        self.assertEqual(len(changed), 1)
        for key, words in ((NEXT, "which is none of those"), (ED25519, "host_key_algorithms")):
            self.certificates = ["rsa-cert.pub"]
            trust = self.trust()
            self.certify("rsa-cert.pub", key)
            with capturedLogs() as logs:
                self.successResultOf(trust.reload())
            [text] = [text for text in map(str, map(formatEvent, logs)) if words in text]
            self.assertIn("What was read before stays in use.", text)
            self.assertEqual(trust.host_keys.certificates[0].blob, blob)
            self.write("rsa-cert.pub", f"ssh-rsa{SUFFIX.decode()} {b64encode(blob).decode()}")
        self.assertEqual(len(changed), 1)


class UpdateTests(SynchronousTestCase):
    """hostkeys-00@openssh.com and hostkeys-prove-00@openssh.com."""

    def setUp(self) -> None:
        self.host_keys = HostKeys([ED25519, RSA, NEXT, NEXT_RSA])
        self.blobs = self.host_keys.blobs
        self.pair = SSHPair(host_keys=self.host_keys)
        self.asked: list[tuple[bytes, bytes]] = []
        self.pair.connection.gotGlobalRequest = self.note  # type: ignore[method-assign]

    def note(self, requestType: bytes, data: bytes) -> int:
        self.asked.append((requestType, data))
        return 0

    def prove(self, data: bytes) -> bytes | None:
        """The server's answer; None: the request failed."""
        answer = self.pair.connection.sendGlobalRequest(
            b"hostkeys-prove-00@openssh.com", data, wantReply=1
        )
        self.pair.flush()
        answer.addErrback(lambda _: None)
        result: bytes | None = self.successResultOf(answer)
        return result

    def test_first_is_used(self) -> None:
        """Of two keys of a type, the first one is what the server shows."""
        self.assertEqual(self.host_keys.identity(b"ssh-ed25519")[1], ED25519)
        self.assertEqual(self.host_keys.identity(b"rsa-sha2-512")[1], RSA)
        swapped = HostKeys([NEXT, NEXT_RSA, ED25519, RSA])
        self.assertEqual(swapped.identity(b"ssh-ed25519")[1], NEXT)

    def test_announced(self) -> None:
        """After the login, and not before, the client is told all keys once, without certificates,
        and without being asked for an answer."""
        self.assertEqual(self.asked, [])
        self.pair.login()
        self.pair.flush()
        self.assertEqual(self.asked, [(b"hostkeys-00@openssh.com", b"".join(map(NS, self.blobs)))])

    def test_certificates_are_not_announced(self) -> None:
        """A certificate is no key."""
        update = HostKeysUpdate(host_keys(), b"session", b"ssh-ed25519")
        expected = NS(ED25519.public().blob()) + NS(RSA.public().blob())
        self.assertEqual(update.announcement(), expected)

    def test_proved(self) -> None:
        """For each key that is asked about, in that order, its signature over this session."""
        self.pair.login()
        asked = [self.blobs[2], self.blobs[3], self.blobs[0]]
        answer = self.prove(b"".join(map(NS, asked)))
        assert answer is not None
        *signatures, rest = getNS(answer, 3)
        self.assertEqual(rest, b"")
        session = self.pair.client.sessionID
        for blob, signature in zip(asked, signatures, strict=True):
            signed = NS(b"hostkeys-prove-00@openssh.com") + NS(session) + NS(blob)
            self.assertTrue(Key.fromString(blob, type="BLOB").verify(signature, signed))
        self.assertEqual(getNS(signatures[1])[0], b"rsa-sha2-512")

    def test_rsa_as_negotiated(self) -> None:
        """RSA keys sign as in the key exchange, if that was by RSA."""
        for algorithm, expected in (
            (b"rsa-sha2-256", b"rsa-sha2-256"),
            (b"rsa-sha2-512", b"rsa-sha2-512"),
            (b"rsa-sha2-256" + SUFFIX, b"rsa-sha2-256"),
            (b"ssh-ed25519" + SUFFIX, b"rsa-sha2-512"),
        ):
            update = HostKeysUpdate(HostKeys([RSA]), b"session", algorithm)
            answer = update.prove(NS(RSA.public().blob()))
            assert answer is not None
            self.assertEqual(getNS(getNS(answer)[0])[0], expected)

    def test_strange_keys(self) -> None:
        """A key that is not ours, a certificate, garbage, and nothing at all get no signature."""
        blob = issue(CA, ED25519, kind=HOST)
        for data in (
            NS(self.blobs[0]) + NS(CA.public().blob()),
            NS(blob),
            NS(self.blobs[0])[:-1],
            NS(self.blobs[0]) + b"\0",
            struct.pack(">L", 0xFFFFFFFF),
            b"",
        ):
            update = HostKeysUpdate(self.host_keys, b"session", b"ssh-ed25519")
            self.assertIsNone(update.prove(data), data)

    def test_bounded(self) -> None:
        """No more signatures at a time than there are keys, and not again and again."""
        self.pair.login()
        many = b"".join(map(NS, self.blobs)) + NS(self.blobs[0])
        self.assertIsNone(self.prove(many))
        self.assertIsNotNone(self.prove(b"".join(map(NS, self.blobs))))
        for _ in range(3):
            self.assertIsNone(self.prove(NS(self.blobs[0])))
        self.assertIsNone(self.pair.client.disconnected)

    def test_other_requests(self) -> None:
        """Other global requests fail as before, and a keepalive gets its answer."""
        self.pair.login()
        answer = self.pair.connection.sendGlobalRequest(b"keepalive@openssh.com", b"", wantReply=1)
        self.pair.flush()
        self.failureResultOf(answer)
