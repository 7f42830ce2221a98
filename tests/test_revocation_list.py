"""The revocation list: what it says, and that what is on it lets nobody in."""

from __future__ import annotations

import os
from base64 import b64encode
from types import SimpleNamespace
from typing import Any

from twisted.conch.interfaces import IConchUser
from twisted.internet.defer import Deferred
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from tests.authenticator import SK_ECDSA, SK_ED25519, Authenticator
from tests.ssh_ca import ecdsa_key, ed25519_key, issue, public_line, rsa_key
from tests.sshpair import ALICE_KEY
from tests.test_certificates import CA, KEY, SUCCESS, CertificateTestCase
from vmconsole.errors import ConfigError
from vmconsole.interfaces import KeyOwner, User
from vmconsole.publickeys import fingerprint
from vmconsole.ssh.avatar import Connection, ConsoleRealm
from vmconsole.ssh.certificates import parse_certificate
from vmconsole.ssh.checker import Proof
from vmconsole.ssh.revocation import RevocationList, parse_revocation_list

FAILURE = 51


def parse(text: str) -> RevocationList:
    """Of the lines in ``text``."""
    return parse_revocation_list(text.encode())


def revoked(text: str, **certificate: Any) -> bool:
    """Whether such a certificate of CA's, for KEY, is."""
    return parse(text).revokes(parse_certificate(issue(CA, KEY, **certificate)))


class ParseTests(SynchronousTestCase):
    """The format."""

    def test_keys(self) -> None:
        """A public key of any type, as it is or behind key:, sha256: or sha1:, with options or
        without, and its fingerprint, as it is or behind hash:."""
        for key in (ed25519_key(), ecdsa_key(), rsa_key()):
            line, shown = public_line(key), fingerprint(key.public().blob())
            for text in (
                *(line, f"{line} a comment", f'from="10.0.0.0/8,::1" {line}', f"  {line}\r"),
                *(f"key: {line}", f"KEY:{line}", f"sha1: {line}", f"sha256:\t{line}"),
                *(shown, f"hash: {shown}", f"Hash:{shown}=", f"{shown} # laptop, lost"),
            ):
                found = parse(f"# lost\n\n{text}\n")
                self.assertTrue(found.revokes_key(key.public().blob()), text)
                self.assertFalse(found.revokes_key(ALICE_KEY.public().blob()), text)

    def test_security_keys(self) -> None:
        """So it is with security keys."""
        for kind in (SK_ED25519, SK_ECDSA):
            blob = Authenticator(kind).blob
            line = f"{kind.decode()} {b64encode(blob).decode()}"
            self.assertTrue(parse(line).revokes_key(blob))

    def test_serials(self) -> None:
        """Serials alone and in ranges, decimal and hexadecimal, in any order, overlapping."""
        text = (
            "serial: 9\nserial: 20-30\nserial:0x10 - 0x12\nSerial: 25-35\nserial: 36\nserial: 1\n"
            "serial: 22-23"
        )
        inside = {1, 9, 16, 17, 18, *range(20, 37)}
        for serial in range(45):
            self.assertEqual(revoked(text, serial=serial), serial in inside, serial)
        self.assertEqual(parse(text).serials, ((1, 1), (9, 9), (16, 18), (20, 36)))
        largest = 0xFFFFFFFFFFFFFFFF
        self.assertTrue(revoked(f"serial: 5-{largest}", serial=largest))
        self.assertFalse(revoked("", serial=largest))

    def test_ids(self) -> None:
        """An id is revoked as it stands there, to the end of the line."""
        text = "id: alice@laptop\nid:Zo\u00eb  at home "
        self.assertTrue(revoked(text, id=b"alice@laptop"))
        self.assertTrue(revoked(text, id="Zo\u00eb  at home".encode()))
        for id in (b"alice", b"alice@laptop ", b"ALICE@laptop", b""):
            self.assertFalse(revoked(text, id=id), id)

    def test_ids_with_a_hash(self) -> None:
        """An id in which a comment would begin is a mistake: a part of it would be revoked."""
        with self.assertRaises(ValueError) as caught:
            parse("id: alice\nID:alice#2 # lost")
        self.assertIn("line 2: an id with a # cannot be named here", str(caught.exception))
        self.assertTrue(revoked("id: alice # 2", id=b"alice"))

    def test_line_ends(self) -> None:
        """Lines end with LF or CR LF; CR alone would hide the lines behind a comment."""
        self.assertTrue(revoked("# x\r\nserial: 7\r\n\r\nid: x\r", serial=7))
        for text in ("# x\rserial: 7\r", "id: a\rid: b", "\r\rserial: 7"):
            with self.assertRaises(ValueError) as caught:
                parse(f"serial: 1\n{text}")
            self.assertIn("line 2: there is a carriage return", str(caught.exception))

    def test_keys_of_certificates(self) -> None:
        """A certificate is revoked by its key, and by its CA's."""
        for key, expected in ((KEY, True), (CA, True), (ALICE_KEY, False)):
            self.assertEqual(revoked(public_line(key)), expected)

    def test_mistakes(self) -> None:
        """Whatever is not understood is an error, which names the line, and not what is in it."""
        good = public_line(ALICE_KEY)
        blob = good.split()[1]
        certificate = issue(CA, KEY)
        for bad in (
            *("serial:", "serial: x", "serial: 0", "serial: 5-4", "serial: -5", "serial: 1-2-3"),
            *("serial: 010", "serial: 18446744073709551616", "serial: 1 2", "serials: 1", "42"),
            *("id:", "id: # nobody", "identity: x", "ed25519", "ssh-ed25519"),
            *("SHA256:short", "hash: MD5:00:11", "SHA256:" + "A" * 42 + "!", "hash:"),
            *(f"ssh-ed25519 {blob[:-4]}", f"ssh-rsa {blob}", f"ssh-ed25519 {blob[4:]}"),
            *(f"ssh-ed25519 {blob[:-4]}!AAA", "key:", f"keys: {good}", f"ca: {good}"),
            # Nobody logs in with this one, and so it would revoke nothing.
            f"ssh-ed25519 {b64encode(ALICE_KEY.public().blob() + bytes(1)).decode()}",
            f"ssh-ed25519-cert-v01@openssh.com {b64encode(certificate).decode()}",
            "-----BEGIN OPENSSH PRIVATE KEY-----",
        ):
            with self.assertRaises(ValueError, msg=bad) as caught:
                parse(f"{good}\n\n{bad}\n{good}")
            self.assertTrue(str(caught.exception).startswith("line 3: "), (bad, caught.exception))
            self.assertNotIn(blob[:-4], str(caught.exception))

    def test_certificate(self) -> None:
        """For a certificate in the list it is told what to write instead."""
        line = f"ssh-ed25519-cert-v01@openssh.com {b64encode(issue(CA, KEY)).decode()}"
        with self.assertRaises(ValueError) as caught:
            parse(line)
        self.assertIn("an id or a serial is meant here", str(caught.exception))

    def test_bytes(self) -> None:
        """What is no text is an error; a binary KRL is told what to do about."""
        with self.assertRaises(ValueError) as caught:
            parse_revocation_list(b"# x\nid: \xff")
        self.assertEqual(str(caught.exception), "line 2: it is no UTF-8")
        with self.assertRaises(ValueError) as caught:
            parse_revocation_list(b"SSHKRL\n\0\0\0\0\1")
        self.assertIn("binary KRL", str(caught.exception))


class ServerTests(CertificateTestCase):
    """A server with a list."""

    def make(self, **settings: Any) -> None:
        """With a list, which is empty at first."""
        self.write("revoked", "")
        super().make(revoked_keys=str(self.folder / "revoked"), **settings)

    def revoke(self, text: str) -> None:
        """The list is this now, and was read again."""
        self.write("revoked", text)
        self.successResultOf(self.pair.trust.reload())

    def test_certificate(self) -> None:
        """A certificate on the list is refused, and its user told; others are let in."""
        self.revoke("serial: 7")
        self.assertEqual(
            self.refused(issue(CA, KEY)), ["[vmconsole: the certificate has been revoked]\r\n"]
        )
        self.assertEqual(self.reason(), "the certificate has been revoked")
        self.again()
        self.assertEqual(self.sign(issue(CA, KEY, serial=8)), [SUCCESS])

    def test_plain_key(self) -> None:
        """A plain key on the list is refused before the engine is asked, at the query, too."""
        self.revoke(fingerprint(ALICE_KEY.public().blob()))
        self.pair.advance(60)
        self.pair.engine.asked.clear()
        self.again()
        self.pair.auth.query(b"vmproxy", ALICE_KEY)
        self.pair.auth.sign(b"vmproxy", ALICE_KEY)
        self.assertEqual(self.answers(), [FAILURE, FAILURE])
        self.assertEqual(self.pair.auth.banners, ["[vmconsole: the key has been revoked]\r\n"])
        self.assertEqual(self.pair.engine.asked, [])

    def test_while_the_engine_thinks(self) -> None:
        """What is revoked while the engine is asked does not get in."""
        for blob in (b"", issue(CA, KEY)):
            self.make()
            self.pair.advance(10)
            self.pair.engine.keys_gate = Deferred()
            if blob:
                self.assertEqual(self.sign(blob), [])
            else:
                self.pair.auth.sign(b"vmproxy", ALICE_KEY)
                self.assertEqual(self.answers(), [])
            self.revoke("\n".join(map(public_line, (KEY, ALICE_KEY))))
            self.pair.engine.keys_gate.callback(None)
            self.assertEqual(self.answers(), [FAILURE])

    def test_open_sessions(self) -> None:
        """When the list is read again, what it has new ends the sessions of its key or
        certificate, with a line, one event each, and the connection; others go on."""
        pairs = []
        for serial in (0, 7, 8):
            self.again()
            if serial:
                self.assertEqual(self.sign(issue(CA, KEY, serial=serial)), [SUCCESS])
            else:
                self.pair.login()
            pairs.append(self.pair)
        channels = [pair.run(pty=True) for pair in pairs]
        self.revoke(f"serial: 7\n{public_line(ALICE_KEY)}")
        for pair in pairs:
            pair.flush()
        told = [channel.output + channel.error for channel in channels]
        self.assertIn(b"[vmconsole: Your key has been revoked.]", told[0])
        self.assertIn(b"[vmconsole: Your certificate has been revoked.]", told[1])
        self.assertNotIn(b"revoked", told[2])
        gone = [pair.client.disconnected is not None for pair in pairs]
        self.assertEqual(gone, [True, True, False])
        self.assertEqual(
            [event["reason"] for event in self.pair.events.named("revoked")],
            ["Your key has been revoked.", "Your certificate has been revoked."],
        )
        self.revoke(f"serial: 7\nserial: 9\n{public_line(ALICE_KEY)}")
        self.assertEqual(len(self.pair.events.named("revoked")), 2)

    def test_gone_at_once(self) -> None:
        """Connections that are gone the moment their logins are ended hide none of the others."""
        pair = self.pair
        realm = ConsoleRealm(pair.permissions, pair.commands, pair.audit, pair.clock, 8)
        for name in ("a", "b", "c"):
            proof = Proof(KeyOwner(User(name, name)), name.encode())
            mind = Connection("session", "192.0.2.7")
            _, avatar, logout = realm.requestAvatar(proof, mind, IConchUser)
            avatar.conn = SimpleNamespace(end_all=lambda reason, logout=logout: logout())
        realm.end_refused(lambda blob, certificate: "" if blob == b"b" else "no more")
        self.assertEqual([event["user"] for event in pair.events.named("revoked")], ["a", "c"])

    def test_told_once(self) -> None:
        """A session whose client does not take its last line is not told of again when the list
        is read again meanwhile; one that has ended by itself is not told of at all."""
        self.pair.login()
        self.pair.run(pty=True, window=10, reads_no_more=True)
        self.revoke(fingerprint(ALICE_KEY.public().blob()))
        self.pair.flush()
        self.assertIsNone(self.pair.client.disconnected)
        self.revoke(public_line(ALICE_KEY) + "\nserial: 1")
        self.assertEqual(len(self.pair.events.named("revoked")), 1)
        self.revoke("")
        self.again()
        self.pair.login()
        self.pair.client_io.loseConnection()
        self.pair.flush()
        self.revoke(public_line(ALICE_KEY))
        self.assertEqual(len(self.pair.events.named("revoked")), 1)

    def test_mistake(self) -> None:
        """A mistake in the list while the proxy runs is logged with its line; what was read
        before still counts, all of it."""
        self.revoke("serial: 7")
        with capturedLogs() as logs:
            self.revoke("serial: 8\nsreial: 9\n")
        [text] = [text for text in map(str, map(formatEvent, logs)) if "line" in text]
        self.assertIn(f"ssh.revoked_keys ({self.folder / 'revoked'}): line 2: there is no", text)
        self.assertIn("What was read before stays in use.", text)
        self.refused(issue(CA, KEY))
        self.again()
        self.assertEqual(self.sign(issue(CA, KEY, serial=8)), [SUCCESS])

    def test_at_the_start(self) -> None:
        """A list that is missing, or has a mistake, is an error at the start."""
        settings = {"revoked_keys": str(self.folder / "list")}
        for text, words in (
            (None, "cannot be read: No such file"),
            ("x", "line 1: there is no public key"),
            ("SSHKRL\n\0", "a binary KRL is not read here"),
        ):
            if text is not None:
                self.write("list", text)
            with self.assertRaises(ConfigError) as caught:
                CertificateTestCase.make(self, **settings)
            self.assertIn(words, str(caught.exception))
            self.assertIn(f"ssh.revoked_keys ({self.folder / 'list'})", str(caught.exception))
        os.unlink(self.folder / "list")
