"""The embedded engine's certificates: made at first start, renewed, kept, withdrawn."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

from cryptography import x509

from tests.engine_kit import (
    EngineTestCase,
    signer,
)
from vmconsole import pki
from vmconsole.engine.embedded.identity import ticket_authority, ticket_identities
from vmconsole.errors import (
    EngineError,
)


class IdentityTests(EngineTestCase):
    """What is made at first start."""

    def setUp(self) -> None:
        super().setUp()
        self.directory = Path(self.mktemp())
        self.now = datetime.fromtimestamp(self.clock.seconds(), UTC)
        self.made = ticket_identities(self.directory, self.now)

    def again(self, days: int = 0) -> tuple[bool, bool]:
        """Whether the CA and the certificate are the same when read again, and fit."""
        now = self.now + timedelta(days=days)
        read = ticket_identities(self.directory, now)
        self.assertTrue(read.authority.is_pair() and read.proxy.is_pair())
        self.assertTrue(pki.issued_by(read.proxy.certificate, read.authority.certificate))
        return (
            read.authority.certificate == self.made.authority.certificate,
            read.proxy.certificate == self.made.proxy.certificate,
        )

    def test_kept(self) -> None:
        """Made once, in a private directory, with private keys."""
        self.assertEqual(self.again(), (True, True))
        self.assertEqual(self.directory.stat().st_mode & 0o777, 0o700)
        for name in ("ticket-ca.key", "ticket.key"):
            self.assertEqual((self.directory / name).stat().st_mode & 0o777, 0o600)

    def test_healed(self) -> None:
        """What a killed first start left half is made again, and our proxy's pair always."""
        other = signer()
        for name, spoil, expected in (
            ("ticket.cer", lambda whole: whole[: len(whole) // 2], (True, False)),
            ("ticket.cer", lambda whole: other.certificate_pem(), (True, False)),
            ("ticket.key", lambda whole: other.key_pem(), (True, False)),
            ("ticket.key", lambda whole: b"", (True, False)),
            ("ticket-ca.cer", None, (False, False)),
        ):
            self.made = ticket_identities(self.directory, self.now)
            path = self.directory / name
            whole = path.read_bytes()
            path.unlink()
            if spoil is not None:
                path.write_bytes(spoil(whole))
            self.assertEqual(self.again(), expected, name)

    def test_renewed(self) -> None:
        """A certificate that ends within 90 days is made anew, by the same CA."""
        self.assertEqual(self.again(825 - 91), (True, True))
        self.assertEqual(self.again(825 - 89), (True, False))
        self.assertEqual(self.again(3650 - 89), (False, False))

    def former(self, days: int) -> list[x509.Certificate]:
        """Which replaced CAs are trusted then."""
        return list(ticket_identities(self.directory, self.now + timedelta(days=days)).former)

    def test_damaged_authority(self) -> None:
        """Is never replaced silently: what it issued, on other machines, would be void."""
        other = signer()
        for name, content, words in (
            ("ticket-ca.key", None, "ticket-ca.key is missing"),
            ("ticket-ca.key", b"", "ticket-ca.key is damaged"),
            ("ticket-ca.key", other.key_pem(), "ticket-ca.key is not the key of"),
            ("ticket-ca.cer", b"", "ticket-ca.cer is damaged"),
            ("ticket-ca.cer", b"garbage", "ticket-ca.cer is damaged"),
        ):
            path = self.directory / name
            whole = path.read_bytes()
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            for make in (ticket_identities, ticket_authority):
                error = str(self.assertRaises(EngineError, make, self.directory, self.now))
                self.assertIn(words, error)
                self.assertIn("restore it, or remove both files", error)
                self.assertIn("vmconsole pki ticket --renew", error)
            self.assertEqual(path.read_bytes() if path.exists() else None, content)
            path.write_bytes(whole)
            self.assertEqual(self.again(), (True, True))

    def test_former(self) -> None:
        """A CA that was replaced because it ended soon is trusted to its end, also after a
        restart."""
        self.assertEqual(self.former(0), [])
        old = self.made.authority.certificate
        for days in (3650 - 89, 3650 - 1):
            self.assertEqual(self.former(days), [old])
        mode = (self.directory / "ticket-ca.former.cer").stat().st_mode & 0o777
        self.assertEqual(mode, 0o644)
        self.assertEqual(self.former(3651), [])

    def test_withdrawn(self) -> None:
        """A CA whose files somebody removed is not trusted any more, nor one before it."""
        self.assertEqual(len(self.former(3650 - 89)), 1)
        for name in ("ticket-ca.cer", "ticket-ca.key"):
            (self.directory / name).unlink()
        self.assertEqual(self.former(3650 - 88), [])
        self.assertEqual(self.former(3650 - 88), [])

    def test_damaged_former(self) -> None:
        """Is in nobody's way."""
        (self.directory / "ticket-ca.former.cer").write_bytes(b"garbage")
        self.assertEqual(self.former(0), [])
        self.assertEqual(len(self.logged("ticket-ca.former.cer is damaged")), 1)

    def test_killed_renewal(self) -> None:
        """Killed between the new CA's key and certificate, it begins again; the old is trusted."""
        write = pki.write_public

        def killed(path: Path, content: bytes) -> None:
            if path.name == "ticket-ca.cer":
                raise KeyboardInterrupt
            write(path, content)

        with mock.patch.object(pki, "write_public", killed):
            self.assertRaises(KeyboardInterrupt, self.former, 3650 - 89)
        self.assertEqual(self.former(3650 - 89), [self.made.authority.certificate])
        self.assertEqual(self.again(3650 - 89), (False, False))

    def test_beside(self) -> None:
        """Who works beside the service takes its CA as it is, and makes one only where none is."""
        later = self.now + timedelta(days=3650 - 1)
        self.assertEqual(
            ticket_authority(self.directory, later).certificate, self.made.authority.certificate
        )
        new = self.directory.with_name("new")
        made = ticket_authority(new, self.now)
        self.assertEqual(ticket_identities(new, self.now).authority.certificate, made.certificate)

    def test_at_the_same_time(self) -> None:
        """Who comes while another one makes the CA waits, and takes that one."""
        new = self.directory.with_name("raced")
        make, made = pki.make_authority, list[pki.Identity]()

        def slow(*arguments: Any) -> pki.Identity:
            time.sleep(0.3)
            return make(*arguments)

        with mock.patch.object(pki, "make_authority", slow):
            threads = [
                threading.Thread(target=lambda: made.append(ticket_authority(new, self.now)))
                for _ in range(2)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        self.assertEqual(made[0].certificate, made[1].certificate)

    def test_lock_is_no_link(self) -> None:
        """A link in the lock's place is not followed."""
        target = self.directory.with_name("target")
        target.touch()
        (self.directory / "ticket-ca.lock").unlink()
        (self.directory / "ticket-ca.lock").symlink_to(target.absolute())
        self.assertRaises(EngineError, ticket_identities, self.directory, self.now)

    def test_unwritable(self) -> None:
        """A state directory that cannot be is an EngineError that names it."""
        self.directory.with_name("file").write_bytes(b"")
        below = self.directory.with_name("file") / "state"
        error = self.assertRaises(EngineError, ticket_identities, below, self.now)
        self.assertIn(str(below), str(error))
