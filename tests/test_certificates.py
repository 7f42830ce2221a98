"""Logging in with OpenSSH certificates: which let in, and what is told of the others."""

from __future__ import annotations

import os
from base64 import b64decode
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from twisted.conch.ssh import userauth
from twisted.conch.ssh.common import NS
from twisted.conch.ssh.keys import Key
from twisted.internet.defer import Deferred
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from tests.authenticator import Authenticator
from tests.fakes import console
from tests.ssh_ca import (
    FOREVER,
    HOST,
    PERMIT_PTY,
    SUFFIX,
    ecdsa_key,
    ed25519_key,
    issue,
    options,
    public_line,
    rsa_key,
)
from tests.sshpair import ALICE, ALICE_KEY, PTY, SSHPair
from vmconsole.config import SSH, Config, Console
from vmconsole.errors import ConfigError, EngineUnreachable
from vmconsole.interfaces import AuthorizedKey, User
from vmconsole.publickeys import fingerprint
from vmconsole.ssh import certificates
from vmconsole.ssh.certificates import (
    CertificateError,
    authority_problem,
    parse_certificate,
    validity_problem,
)

SUCCESS = userauth.MSG_USERAUTH_SUCCESS
FAILURE = userauth.MSG_USERAUTH_FAILURE
PK_OK = userauth.MSG_USERAUTH_PK_OK
RECHECK = 15.0
CA, KEY = ed25519_key(), ed25519_key()
RSA = rsa_key()
# ssh-keygen -s CA -I alice@laptop -n alice@internal,bob@internal -z 42
# -V 20260101000000Z:20270101000000Z -O clear -O force-command=list
# -O source-address=192.0.2.0/24 -O permit-pty KEY.pub
SSH_KEYGEN = (
    b"AAAAIHNzaC1lZDI1NTE5LWNlcnQtdjAxQG9wZW5zc2guY29tAAAAIBN6+gTWMPMRodZzjT4vM/JAmjntYDeN6bG6zq"
    b"wmq26vAAAAIP6+fmLDTe+VKW0fNe6uc3eLNf2A+IF2u36xu8/JyaLyAAAAAAAAACoAAAABAAAADGFsaWNlQGxhcHRv"
    b"cAAAACIAAAAOYWxpY2VAaW50ZXJuYWwAAAAMYm9iQGludGVybmFsAAAAAGlVuQAAAAAAazbsgAAAAEMAAAANZm9yY2"
    b"UtY29tbWFuZAAAAAgAAAAEbGlzdAAAAA5zb3VyY2UtYWRkcmVzcwAAABAAAAAMMTkyLjAuMi4wLzI0AAAAEgAAAApw"
    b"ZXJtaXQtcHR5AAAAAAAAAAAAAAAzAAAAC3NzaC1lZDI1NTE5AAAAIFCa+LToMMQd7EY8t16LyBQnewa8eJPS/qREwU"
    b"FGM19lAAAAUwAAAAtzc2gtZWQyNTUxOQAAAEBaz6QzYpMd7zJXkD05feOZvK29/AvuCfb06dNwr+CxCqixmXtvIUk3"
    b"hJGKVW4MtmKEkcUOlC0sPVQw/KuLMiEB"
)
SSH_KEYGEN_KEY = "SHA256:QiIRRvIvq/IJKb3HfvO7J7Gre+ZuXBM/9KlvWsJcMYE"
BOB = User("u-bob", "bob@internal")


class _Blob:
    """A public key that is only bytes."""

    def __init__(self, blob: bytes) -> None:
        self._blob = blob

    def public(self) -> _Blob:
        return self

    def blob(self) -> bytes:
        return self._blob


class CertificateTestCase(SynchronousTestCase):
    """A server that trusts CA, and an engine that knows Alice, by a key, and Bob, who has none."""

    def setUp(self) -> None:
        self.folder = Path(self.mktemp()).absolute()
        self.folder.mkdir()
        self.trusted(CA)
        self.make()

    def trusted(self, *authorities: Key) -> None:
        """What the file with the CAs has."""
        lines = ["# who may issue certificates", ""]
        lines += [public_line(ca) for ca in authorities]
        self.write("user_ca", "\n".join(lines))

    def write(self, name: str, text: str) -> None:
        """A file that is new in all that shows from outside."""
        path = self.folder / name
        replaced = self.folder / "new"
        replaced.write_text(text)
        os.replace(replaced, path)

    def make(self, **settings: Any) -> None:
        """A server with these settings of [ssh], besides the CAs."""
        chosen = {"user_ca": str(self.folder / "user_ca"), **settings}
        self.pair = SSHPair(Config(ssh=SSH(**chosen), console=Console(linger=0.0)))
        self.pair.engine.keys.append(BOB)
        self.pair.engine.vms = {ALICE.id: [console("vm1")], BOB.id: [console("vm1")]}
        self.pair.permissions.startService()
        self.addCleanup(self.pair.permissions.stopService)

    def again(self) -> None:
        """Another connection."""
        self.pair = self.pair.beside()
        # Key exchanges take turns, and an address without logins is slowed down.
        waits = iter([0.0] + [0.1] * 10)
        while self.pair.auth.transport is None:
            self.pair.clock.advance(next(waits))
            self.pair.pump.flush()

    def query(self, blob: bytes, algorithm: bytes = b"") -> list[int]:
        """Ask about a certificate; the answers."""
        self.pair.auth.query(b"vmproxy", None, algorithm, blob)
        return self.answers()

    def sign(self, blob: bytes, key: Key = KEY, **how: Any) -> list[int]:
        """Log in with a certificate for ``key``; the answers."""
        base = b"rsa-sha2-512" if key.sshType() == b"ssh-rsa" else key.sshType()
        how = {"algorithm": base + SUFFIX, "signature_algorithm": base, **how}
        self.pair.auth.sign(b"vmproxy", key, blob=blob, **how)
        return self.answers()

    def answers(self) -> list[int]:
        """What the server has answered since the last look."""
        self.pair.flush()
        answers, self.pair.auth.answers = self.pair.auth.answers, []
        return answers

    def refused(self, blob: bytes, key: Key = KEY, **how: Any) -> list[str]:
        """A new connection is refused at the query, and when it signs; what it is told."""
        self.again()
        self.assertEqual(self.query(blob, how.get("algorithm", b"")), [FAILURE])
        self.assertEqual(self.sign(blob, key, **how), [FAILURE])
        return self.pair.auth.banners

    def reason(self) -> str:
        """Why the last connection was refused, as the audit has it."""
        self.pair.client_io.loseConnection()
        self.pair.flush()
        reason: str = self.pair.events.named("login_refused")[-1]["reason"]
        return reason


class LoginTests(CertificateTestCase):
    """Certificates that let in."""

    def test_mapping(self) -> None:
        """The query is answered with yes, and the signature lets in the user whose name the
        principal is, also one without any key."""
        for user in (ALICE, BOB):
            self.again()
            blob = issue(CA, KEY, principals=[user.name.encode()])
            self.assertEqual(self.query(blob), [PK_OK])
            self.assertEqual(self.sign(blob), [SUCCESS])
            self.assertEqual(self.pair.events.named("login_accepted")[-1]["user_id"], user.id)
        self.assertEqual(self.pair.auth.banners, [])

    def test_work(self) -> None:
        """The CA's signature, which takes time, is verified once for each request."""
        verified: list[None] = []
        verify = certificates.Certificate.verify

        def counted(certificate: certificates.Certificate) -> None:
            verified.append(None)
            verify(certificate)

        self.patch(certificates.Certificate, "verify", counted)
        blob = issue(CA, KEY)
        self.assertEqual(self.query(blob), [PK_OK])
        self.assertEqual(len(verified), 1)
        self.assertEqual(self.sign(blob), [SUCCESS])
        self.assertEqual(len(verified), 2)

    def test_first_principal(self) -> None:
        """Of several principals the first that is a user's name counts, in the certificate's
        order; one that is no text is none, and not Latin-1, either."""
        self.pair.engine.keys.append(User("u-other", "\xff"))
        self.pair.advance(10)
        self.again()
        blob = issue(CA, KEY, principals=[b"\xff", b"alice", b"bob@internal", b"alice@internal"])
        self.assertEqual(self.sign(blob), [SUCCESS])
        self.assertEqual(self.pair.events.named("login_accepted")[-1]["user_id"], BOB.id)

    def test_algorithms(self) -> None:
        """Certified keys of each type, by CAs of each type, let in; RSA with SHA-2."""
        kinds = (CA, RSA, *map(ecdsa_key, (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)))
        self.trusted(*kinds)
        self.make()
        for key in kinds:
            for ca in kinds:
                self.again()
                self.assertEqual(self.sign(issue(ca, key), key), [SUCCESS], (key, ca))
        for name in (b"rsa-sha2-256", b"rsa-sha2-512"):
            self.again()
            how = {"algorithm": name + SUFFIX, "signature_algorithm": name}
            self.assertEqual(self.sign(issue(CA, RSA), RSA, **how), [SUCCESS])
            self.again()
            self.assertEqual(self.sign(issue(RSA, KEY, algorithm=name)), [SUCCESS])

    def test_audit(self) -> None:
        """Events have the certified key's fingerprint, and serial, CA and id of the certificate;
        the id is escaped, and cannot pose as anything else. `info` tells it, too."""
        blob = issue(CA, KEY, serial=42, id=b"x' ca=SHA256:y\n\xff")
        self.assertEqual(self.sign(blob), [SUCCESS])
        (event,) = self.pair.events.named("login_accepted")
        self.assertEqual(event["fingerprint"], fingerprint(KEY.public().blob()))
        shown = f"serial=42 ca={fingerprint(CA.public().blob())} id=x' ca=SHA256:y\\n\\xff"
        self.assertEqual(event["certificate"], shown)
        self.assertIn(f" certificate={shown!r} address=", formatEvent(event))
        self.assertIn(f"certificate: {shown}\n".encode(), self.pair.run(b"info").output)

    def test_audit_of_keys(self) -> None:
        """For a plain key the field is there, and empty."""
        self.pair.login()
        (event,) = self.pair.events.named("login_accepted")
        self.assertEqual(event["certificate"], "")
        self.assertNotIn(b"certificate", self.pair.run(b"info").output)

    def test_audit_of_refusals(self) -> None:
        """A refusal names the certified key and the certificate; what these have in them cannot
        pose as fields of the event."""
        other = ed25519_key()
        self.refused(issue(other, KEY, id=b"mallory"))
        self.reason()
        shown = f"serial=7 ca={fingerprint(other.public().blob())} id=mallory"
        expected = [f"{fingerprint(KEY.public().blob())} ({shown})"]
        self.assertEqual(self.pair.events.named("login_refused")[-1]["fingerprints"], expected)
        self.refused(issue(CA, KEY, principals=[b"x address=203.0.113.9"]))
        reason = self.reason()
        self.assertIn("x address=203.0.113.9", reason)
        line = formatEvent(self.pair.events.named("login_refused")[-1])
        self.assertIn(f" reason={reason!r}", line)


class RefusalTests(CertificateTestCase):
    """Certificates that do not, and what their users are told."""

    def test_unknown_ca(self) -> None:
        """Of a CA that is not trusted nothing is told, and the certified key itself, though the
        engine knows it, does not count. So it is when no CA is trusted at all."""
        other = ed25519_key()
        self.assertEqual(self.refused(issue(other, ALICE_KEY, valid_before=1), ALICE_KEY), [])
        self.assertEqual(self.reason(), "the certificate is of no CA that is trusted here")
        self.make(user_ca="")
        self.assertEqual(self.refused(issue(CA, ALICE_KEY), ALICE_KEY), [])
        self.assertEqual(self.reason(), "the certificate is of no CA that is trusted here")

    def test_forged(self) -> None:
        """A certificate that names the CA, and that another key signed, or whose bytes were
        changed, is refused without a word."""
        self.assertEqual(self.refused(issue(CA, KEY, signed_by=ed25519_key())), [])
        self.assertIn("its CA did not sign it", self.reason())
        changed = issue(CA, KEY, principals=[b"nobody"]).replace(b"nobody", b"root@x")
        self.assertEqual(self.refused(changed), [])

    def test_ca_goes_while_the_engine_thinks(self) -> None:
        """A CA that is no longer trusted when the engine has answered lets nobody in."""
        self.pair.advance(10)
        self.pair.engine.keys_gate = Deferred()
        self.assertEqual(self.sign(issue(CA, KEY)), [])
        self.trusted(ed25519_key())
        self.successResultOf(self.pair.trust.reload())
        self.pair.engine.keys_gate.callback(None)
        self.assertEqual(self.answers(), [FAILURE])
        self.assertEqual(self.reason(), "the certificate is of no CA that is trusted here")

    def test_validity(self) -> None:
        """Before its first moment and from its last on it does not let in, and its user is told
        which that is."""
        blob = issue(CA, KEY, valid_after=1001, valid_before=1010)
        self.until(1000.9)
        self.assertEqual(
            self.refused(blob),
            ["[vmconsole: the certificate is not valid before 1970-01-01 00:16:41 UTC]\r\n"],
        )
        for moment in (1001.0, 1009.9):
            self.until(moment)
            self.again()
            self.assertEqual(self.query(blob), [PK_OK])
        self.until(1010.0)
        self.assertEqual(
            self.refused(blob),
            ["[vmconsole: the certificate expired on 1970-01-01 00:16:50 UTC]\r\n"],
        )

    def test_clock_was_set(self) -> None:
        """What counts for validity is the time of day, not how long the proxy runs."""
        blob = issue(CA, KEY, valid_after=1001, valid_before=1010)
        for moment, answer in ((1000.9, FAILURE), (1001.0, PK_OK), (1010.0, FAILURE)):
            self.again()
            self.pair.clock.time_of_day = lambda moment=moment: moment
            self.assertEqual(self.query(blob), [answer])

    def until(self, moment: float) -> None:
        """Time passes up to then."""
        self.pair.clock.advance(moment - self.pair.clock.seconds())

    def test_end_of_time(self) -> None:
        """A moment past all calendars can be told."""
        blob = issue(CA, KEY, valid_after=FOREVER - 1)
        self.assertIn("not valid before 9999-12-31", self.refused(blob)[0])

    def test_host_certificate(self) -> None:
        """A host's certificate lets nobody in."""
        self.assertIn("one of a host", self.refused(issue(CA, KEY, kind=HOST))[0])

    def test_principals(self) -> None:
        """Without a principal it is nobody's; with those that the engine does not know its user
        is told which they are, escaped."""
        self.assertIn("names no principal", self.refused(issue(CA, KEY, principals=[]))[0])
        told = self.refused(issue(CA, KEY, principals=[b"alice", b"x\x1b[2J"]))
        self.assertEqual(
            told,
            [
                "[vmconsole: the engine knows no user by the certificate's principals: "
                "alice, x\\x1b[2J]\r\n"
            ],
        )

    def test_exact_names(self) -> None:
        """What only looks like a user's name is none; nor is no name, though the engine has a
        user without one."""
        self.pair.engine.keys.append(AuthorizedKey("u-nameless", "", KEY.public().blob()))
        self.pair.advance(10)
        name = ALICE.name.encode()
        names = [name + b"\0", b" " + name, name.upper(), name[:-1], name + b",x", b""]
        names += ["\uff41lice@internal".encode(), b"alice@internal\xff"]
        self.assertIn("knows no user", self.refused(issue(CA, KEY, principals=names))[0])

    def test_shared_name(self) -> None:
        """A name that two users have is nobody's, and its owner is told so."""
        self.pair.engine.keys.append(User("u-other", ALICE.name))
        self.pair.advance(10)
        self.assertEqual(
            self.refused(issue(CA, KEY)),
            [
                "[vmconsole: the certificate is nobody's: several users are called "
                f"{ALICE.name}]\r\n"
            ],
        )

    def test_source_address(self) -> None:
        """source-address is honoured, networks and addresses, IPv6 and its form of IPv4."""
        for value in (b"192.0.2.7", b"10.0.0.0/8,192.0.2.0/24", b"::/0,0.0.0.0/0"):
            self.again()
            blob = issue(CA, KEY, critical={b"source-address": value})
            self.assertEqual(self.sign(blob), [SUCCESS], value)
        for value in (b"10.0.0.0/8", b"192.0.2.8", b"2001:db8::/32"):
            told = self.refused(issue(CA, KEY, critical={b"source-address": value}))
            self.assertEqual(
                told, ["[vmconsole: the certificate may not be used from 192.0.2.7]\r\n"]
            )

    def test_malformed_source_address(self) -> None:
        """A source-address that is no list of networks lets in from nowhere."""
        for value in (
            *(b"", b"*", b"192.0.2.*", b"!10.0.0.1,*", b"192.0.2.7/33", b"192.0.2.7/24"),
            *(b"192.0.2.7,", b"192.0.2.7 ", b"0.0.0.0/0.0.0.0", b"\xff", b"host"),
        ):
            told = self.refused(issue(CA, KEY, critical={b"source-address": value}))
            self.assertIn("source-address is malformed", told[0], value)

    def test_critical_options(self) -> None:
        """An unknown critical option, verify-required, and an empty command let nobody in."""
        for critical, words in (
            ({b"no-such\x1b": b""}, "option no-such\\x1b is not supported"),
            ({b"verify-required": b""}, "verify-required is for sk- keys"),
            ({b"force-command": b""}, "force-command is empty"),
        ):
            self.assertIn(words, self.refused(issue(CA, KEY, critical=critical))[0])

    def test_sk(self) -> None:
        """Certificates of security keys are refused with a clear word, whatever is in them."""
        for kind in (b"sk-ssh-ed25519", b"sk-ecdsa-sha2-nistp256"):
            self.again()
            for flag in (b"\x00", b"\x01"):
                rest = NS(kind + SUFFIX) + NS(NS(kind + SUFFIX) + b"x")
                signature = NS(NS(kind + b"@openssh.com") + NS(b"") + b"\x01\0\0\0\1")
                self.pair.auth.request(b"vmproxy", b"publickey", flag + rest + signature)
            self.assertEqual(self.answers(), [FAILURE, FAILURE])
            (told,) = self.pair.auth.banners
            self.assertIn("certificates of security keys (sk-) cannot be used here", told)
            self.assertIn("security keys (sk-)", self.reason())

    def test_algorithm(self) -> None:
        """An algorithm that is not the certificate's, or ssh-rsa's, which is SHA-1, is refused;
        so is a signature of another algorithm than the one that was named."""
        blob, rsa_blob = issue(CA, KEY), issue(CA, RSA)
        self.assertEqual(self.query(blob, b"rsa-sha2-512" + SUFFIX), [FAILURE])
        self.assertEqual(self.query(blob, b"ssh-ed25519"), [FAILURE])
        self.assertEqual(self.query(rsa_blob, b"ssh-rsa" + SUFFIX), [FAILURE])
        self.assertEqual(self.query(rsa_blob, b"ssh-dss" + SUFFIX), [FAILURE])
        self.assertEqual(self.query(rsa_blob, b"rsa-sha2-256" + SUFFIX), [PK_OK])
        for named in (b"ssh-rsa", b"rsa-sha2-256"):
            self.assertEqual(self.sign(rsa_blob, RSA, signature_algorithm=named), [FAILURE])
        self.assertEqual(self.sign(rsa_blob, RSA), [SUCCESS])

    def test_wrong_signature(self) -> None:
        """Who has the certificate, and not its key, is refused."""
        self.assertEqual(self.sign(issue(CA, KEY), signed_with=ed25519_key()), [FAILURE])
        self.assertEqual(self.reason(), "the signature is wrong")

    def test_weak(self) -> None:
        """A certified RSA key below 2048 bits is refused, and a CA that signed with SHA-1."""
        small = rsa_key(1024)
        told = self.refused(issue(CA, small), small, algorithm=b"rsa-sha2-512" + SUFFIX)
        self.assertIn("2048 to 16384 bits", told[0])
        self.trusted(CA, RSA)
        self.make()
        self.assertEqual(self.refused(issue(RSA, KEY, algorithm=b"ssh-rsa")), [])
        self.assertIn("signed it with ssh-rsa", self.reason())

    def test_garbage(self) -> None:
        """What is no certificate is refused, without a traceback in the log."""
        good = issue(CA, KEY)
        unsorted = options({b"b": b""}) + options({b"a": b""})
        many = [b"alice@internal"] * 257
        for blob in (
            b"\0",
            NS(b"ssh-ed25519" + SUFFIX),
            *(good[:cut] for cut in range(5, len(good), 40)),
            good + b"\0",
            issue(CA, KEY, kind=3),
            issue(CA, KEY, critical=b"\0\0"),
            issue(CA, KEY, critical=unsorted),
            issue(CA, KEY, critical=options({b"source-address": b"192.0.2.7"}) * 2),
            issue(CA, KEY, principals=many),
        ):
            self.again()
            self.assertEqual(self.query(blob, b"ssh-ed25519" + SUFFIX), [FAILURE], blob)
            self.assertEqual(self.sign(blob), [FAILURE], blob)
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_points(self) -> None:
        """A point that is compressed, or none, is refused, without a traceback in the log."""
        key = ecdsa_key()
        blob = issue(CA, key)
        at = blob.index(b"nistp256\0\0\0\x41") + 12
        for first in (b"\2", b"\3", b"\5", b"\0"):
            changed = blob[:at] + first + blob[at + 1 :]
            self.again()
            self.assertEqual(self.query(changed), [FAILURE])
            self.assertIn("cannot be understood", self.reason())
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_next_key(self) -> None:
        """After a certificate that is refused, the client's next key lets in."""
        self.refused(issue(CA, KEY, valid_before=0))
        self.pair.login()

    def test_outage(self) -> None:
        """In an outage the last answer serves for certificates as it does for keys; names that it
        does not have are no answer, which the user is told."""
        self.pair.advance(6)
        self.pair.engine.error = EngineUnreachable("refused")
        self.again()
        self.assertEqual(self.sign(issue(CA, KEY)), [SUCCESS])
        self.assertIsNotNone(self.pair.server.avatar.login.answered)
        self.again()
        self.assertEqual(self.query(issue(CA, KEY, principals=[b"carol"])), [FAILURE])
        self.assertIn("does not answer", self.pair.auth.banners[0])

    def test_new_user(self) -> None:
        """A user who is new to the engine is found at once."""
        blob = issue(CA, KEY, principals=[b"carol"])
        self.refused(blob)
        self.pair.engine.keys.append(User("u-carol", "carol"))
        self.pair.advance(1.1)
        self.again()
        self.assertEqual(self.query(blob), [PK_OK])


class SessionTests(CertificateTestCase):
    """What a certificate allows once its user is in."""

    def login(self, blob: bytes) -> None:
        """Somebody logs in."""
        self.again()
        self.assertEqual(self.sign(blob), [SUCCESS])

    def test_permit_pty(self) -> None:
        """Without permit-pty there is no terminal, as with sshd; what needs none goes on. Other
        extensions change nothing."""
        self.login(issue(CA, KEY, extensions={b"permit-X11-forwarding": b"", b"x": b"y"}))
        opened = self.pair.open()
        asked = self.pair.connection.sendRequest(opened, b"pty-req", PTY, wantReply=1)
        self.pair.flush()
        self.failureResultOf(asked)
        self.pair.connection.sendRequest(opened, b"shell", b"")
        self.pair.flush()
        self.assertIn(b"A console needs a terminal", opened.error)
        self.assertEqual(self.pair.run(b"list").output, b"id-vm1\tvm1\n")
        self.login(issue(CA, KEY, extensions=PERMIT_PTY))
        self.pair.run(b"vm1", pty=True)
        self.assertEqual(len(self.pair.guests.opened), 1)

    def test_force_command(self) -> None:
        """With force-command that line runs, whatever the client asks for: another one, or a
        shell. The user is not told."""
        self.login(issue(CA, KEY, critical={b"force-command": b"list"}))
        for line in (b"vm1", b"", b"help"):
            channel = self.pair.run(line, pty=True)
            self.assertEqual((channel.output, channel.error), (b"id-vm1\tvm1\r\n", b""))
        self.assertEqual(self.pair.guests.opened, [])

    def test_no_other_request(self) -> None:
        """Nor is there another way past it: a subsystem is refused, and sets nothing off."""
        self.login(issue(CA, KEY, critical={b"force-command": b"list"}))
        channel = self.pair.open()
        self.pair.connection.sendRequest(channel, b"subsystem", NS(b"vm1"))
        self.pair.flush()
        self.assertEqual((channel.output, channel.error, channel.status), (b"", b"", None))

    def test_expiry(self) -> None:
        """A session ends when its certificate does, with a line that says so and one event; the
        connection, too."""
        self.pair.advance(10)
        self.login(issue(CA, KEY, valid_before=100))
        channel = self.pair.run(b"vm1", pty=True)
        self.pair.advance(99.9 - self.pair.clock.seconds())
        self.assertIsNone(channel.status)
        self.pair.advance(0.2)
        self.assertIn(b"[vmconsole: Your certificate has expired.]", channel.output)
        self.assertEqual((channel.error, channel.status), (b"", 0))
        self.assertEqual(self.pair.client.disconnected, (11, b"Your certificate has expired."))
        for name in ("revoked", "detached"):
            (event,) = self.pair.events.named(name)
            self.assertEqual(event["reason"], "Your certificate has expired.")

    def test_clock_is_set(self) -> None:
        """The certificate's end is one by the time of day: a clock that is set forward past it
        ends the session within a minute, one that is set back gives it longer."""
        day = 0.0
        self.pair.clock.time_of_day = lambda: self.pair.clock.seconds() + day
        self.pair.advance(10)
        self.login(issue(CA, KEY, valid_before=3610))
        channel = self.pair.run(b"vm1", pty=True)
        day = -3600.0
        for _ in range(70):
            self.pair.advance(60)
        self.assertIsNone(channel.status)
        day = 3600.0
        self.pair.advance(60)
        self.assertEqual(channel.status, 0)
        self.assertEqual(self.pair.client.disconnected, (11, b"Your certificate has expired."))

    def test_gone_before_expiry(self) -> None:
        """Who has left is not waited for, nor told of as revoked."""
        before = len(self.pair.clock.getDelayedCalls())
        self.login(issue(CA, KEY, valid_before=100))
        self.pair.client_io.loseConnection()
        self.pair.flush()
        self.assertEqual(
            [call for call in self.pair.clock.getDelayedCalls() if call.getTime() == 100.0], []
        )
        self.assertLessEqual(len(self.pair.clock.getDelayedCalls()), before)
        self.pair.advance(200)
        self.assertEqual(self.pair.events.named("revoked"), [])

    def test_no_expiry(self) -> None:
        """A certificate for ever ends nothing."""
        self.login(issue(CA, KEY))
        self.assertLess(max(call.getTime() for call in self.pair.clock.getDelayedCalls()), 1e15)
        self.pair.advance(10000)
        self.assertIsNone(self.pair.client.disconnected)

    def test_user_gone(self) -> None:
        """A user who is gone from the engine is found by name, and their sessions end; so they do
        when somebody else has the name. Until then they go on, though their key is none of the
        engine's."""
        unknown = "the engine does not know its user"
        shared = f"several users are called {BOB.name}"
        for now, why in (
            ([], unknown),
            ([User("u-other", BOB.name)], unknown),
            ([BOB, User("u-other", BOB.name)], shared),
        ):
            self.make()
            self.login(issue(CA, KEY, principals=[BOB.name.encode()]))
            channel = self.pair.run(b"vm1", pty=True)
            for _ in range(3):
                self.pair.advance(RECHECK)
            self.assertIsNone(channel.status)
            self.pair.engine.keys[:] = [AuthorizedKey("u", "u", ALICE_KEY.public().blob()), *now]
            self.pair.advance(RECHECK)
            line = f"Your certificate no longer lets you in: {why}.".encode()
            self.assertIn(line, channel.output + channel.error)
            self.assertEqual(len(self.pair.events.named("revoked")), 1)


class ReadAgainTests(CertificateTestCase):
    """The file with the CAs, while the proxy runs."""

    def test_ca_gone(self) -> None:
        """When a CA is taken out, the open sessions of its certificates end with a line; those of
        keys and of other CAs go on, and new logins are refused."""
        other = ed25519_key()
        self.trusted(CA, other)
        self.make()
        pairs = []
        for blob in (issue(CA, KEY), issue(other, KEY), b""):
            self.again()
            if blob:
                self.assertEqual(self.sign(blob), [SUCCESS])
            else:
                self.pair.login()
            pairs.append(self.pair)
        channel = pairs[0].run(pty=True)
        self.trusted(other)
        self.successResultOf(self.pair.trust.reload())
        for pair in pairs:
            pair.flush()
        reason = "The CA of your certificate is no longer trusted here."
        self.assertIn(reason.encode(), channel.output + channel.error)
        self.assertEqual(pairs[0].client.disconnected, (11, reason.encode()))
        self.assertEqual([pair.client.disconnected for pair in pairs[1:]], [None, None])
        (event,) = self.pair.events.named("revoked")
        self.assertEqual(event["reason"], reason)
        self.assertEqual(self.refused(issue(CA, KEY)), [])

    def test_new_ca(self) -> None:
        """A CA that is added counts from the next look on, without a word of anybody."""
        other = ed25519_key()
        self.pair.trust.startService()
        self.addCleanup(self.pair.trust.stopService)
        self.trusted(CA, other)
        self.pair.clock.pump([5.0] * 3)
        self.again()
        self.assertEqual(self.sign(issue(other, KEY)), [SUCCESS])

    def test_damaged(self) -> None:
        """A file that is damaged, empty or gone while the proxy runs changes nothing, and is
        logged."""
        for damage in (lambda: self.write("user_ca", "x"), lambda: self.write("user_ca", "")):
            damage()
            with capturedLogs() as logs:
                self.successResultOf(self.pair.trust.reload())
            self.assertTrue(any("stays in use" in formatEvent(event) for event in logs))
        os.unlink(self.folder / "user_ca")
        with capturedLogs() as logs:
            self.successResultOf(self.pair.trust.reload())
        self.assertIn("cannot be read: No such file", formatEvent(logs[0]))
        self.again()
        self.assertEqual(self.sign(issue(CA, KEY)), [SUCCESS])

    def test_at_the_start(self) -> None:
        """A file that is missing or wrong at the start is an error, which names it and the line."""
        good = public_line(CA)
        for text, words in (
            ("", "has no public key"),
            ("# nothing\n", "has no public key"),
            (f"{good}\n\nssh-ed25519 garbage\n", "line 3: there is no public key"),
            (f'principals="x" {good}', "line 1: options are not supported"),
            (public_line(rsa_key(1024)), "line 1: this key cannot be a CA's here: RSA keys have"),
            (good.replace("AAAA", "AAAB", 1), "line 1: there is no public key"),
        ):
            self.write("user_ca", text)
            with self.assertRaises(ConfigError) as caught:
                self.make()
            self.assertIn(words, str(caught.exception))
            self.assertIn(f"ssh.user_ca ({self.folder / 'user_ca'})", str(caught.exception))
        self.write("user_ca", f"cert-authority {good}\r\n")
        self.make()
        os.unlink(self.folder / "user_ca")
        self.assertRaises(ConfigError, self.make)


class ParseTests(SynchronousTestCase):
    """``parse_certificate``."""

    def test_of_ssh_keygen(self) -> None:
        """A certificate of ssh-keygen's is read, with all that it says."""
        certificate = parse_certificate(b64decode(SSH_KEYGEN))
        certificate.verify()
        self.assertEqual((certificate.serial, certificate.id), (42, b"alice@laptop"))
        self.assertEqual(certificate.names, ["alice@internal", "bob@internal"])
        self.assertEqual((certificate.valid_after, certificate.expires), (1767225600, 1798761600.0))
        self.assertEqual(certificate.force_command, b"list")
        self.assertEqual(certificate.critical_options[b"source-address"], b"192.0.2.0/24")
        self.assertTrue(certificate.permits_pty)
        self.assertEqual(fingerprint(certificate.key_blob), SSH_KEYGEN_KEY)

    def test_moments(self) -> None:
        """The first moment counts, the last does not; when that comes first there is none."""
        certificate = parse_certificate(issue(CA, KEY, valid_after=10, valid_before=20))
        for now, good in ((9.999, False), (10.0, True), (19.999, True), (20.0, False)):
            self.assertEqual(not validity_problem(certificate, now), good, now)
        never = parse_certificate(issue(CA, KEY, valid_after=20, valid_before=10))
        self.assertTrue(all(validity_problem(never, now) for now in (5.0, 10.0, 15.0, 20.0, 25.0)))
        ever = parse_certificate(issue(CA, KEY))
        self.assertEqual((validity_problem(ever, 0.0), ever.expires), ("", None))

    def test_too_much(self) -> None:
        """What is far larger than certificates are is refused before it is read, since anybody
        may send it."""
        self.patch(certificates, "load_ssh_public_identity", lambda _: self.fail("it was read"))
        many = options({b"%05d" % number: b"" for number in range(129)})
        own = NS(CA.public().blob())
        huge = NS(b"ssh-rsa") + NS(b"\1\0\1") + NS(bytes(30000))
        for blob, words in (
            (issue(CA, KEY, principals=[b""] * 257), "more than 256 principals"),
            (issue(CA, KEY, critical=many), "too many options"),
            (issue(CA, KEY, extensions={b"%05d" % n: b"" for n in range(129)}), "too many options"),
            (issue(CA, _Blob(huge)), "its key, or its CA's, is too large"),
            (issue(CA, KEY).replace(own, NS(huge)), "its key, or its CA's, is too large"),
        ):
            with self.assertRaises(CertificateError) as caught:
                parse_certificate(blob)
            self.assertIn(words, str(caught.exception))

    def test_much(self) -> None:
        """As many principals as OpenSSH takes, and the largest key, are read."""
        names = [b"%d" % number for number in range(256)]
        parse_certificate(issue(CA, KEY, principals=names)).verify()
        extensions = {b"%05d" % number: b"x" for number in range(128)}
        parse_certificate(issue(CA, KEY, extensions=extensions)).verify()
        largest = NS(b"ssh-rsa") + NS(b"\1\0\1") + NS(b"\0" + b"\xff" * 2048)
        self.assertEqual(parse_certificate(issue(CA, _Blob(largest))).key.size(), 16384)

    def test_ca_of_another_kind(self) -> None:
        """A CA is a key, of a kind that is accepted: no certificate, and no DSA key."""
        own = NS(CA.public().blob())
        for ca, words in (
            (issue(CA, CA), "it is of type ssh-ed25519-cert-v01@openssh.com"),
            (NS(b"ssh-dss") + NS(b"\1") * 4, "it is of type ssh-dss"),
            (b"", "it cannot be understood"),
        ):
            self.assertEqual(authority_problem(ca), words)
            with self.assertRaises(CertificateError):
                parse_certificate(issue(CA, KEY).replace(own, NS(ca)))

    def test_sk_ca(self) -> None:
        """A CA whose key is a security key's is refused: nothing here can verify it."""
        blob = issue(CA, KEY).replace(NS(CA.public().blob()), NS(Authenticator().blob))
        with self.assertRaises(CertificateError) as caught:
            parse_certificate(blob)
        self.assertIn("it cannot be understood", str(caught.exception))
