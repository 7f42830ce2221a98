"""The engine's files: read again when they change, and their end told in time; SIGHUP."""

from __future__ import annotations

import functools
import itertools
import os
import signal
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from OpenSSL import SSL
from twisted.internet import reactor as real_reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.interfaces import IOpenSSLContextFactory
from twisted.internet.ssl import PrivateCertificate
from twisted.logger import LogLevel, formatEvent
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.trial.unittest import SynchronousTestCase, TestCase
from twisted.web.resource import Resource
from twisted.web.server import Request, Site
from zope.interface import implementer

from tests.engine_kit import (
    NOW,
    EngineTestCase,
    at_once,
    authority,
    clock_at,
    short_directory,
    signer,
    todays_authority,
)
from vmconsole import config, pki, watched
from vmconsole.check import check
from vmconsole.engine import files as files_module
from vmconsole.engine.client import EngineClient
from vmconsole.engine.credentials import expiries, load_engine_authorities
from vmconsole.engine.files import EngineFiles, ExpiryWatch
from vmconsole.engine.http import make_engine_client
from vmconsole.errors import ConfigError, EngineError
from vmconsole.signals import HangUp

T = TypeVar("T")

DAY = timedelta(days=1)
# When the certificates of engine_kit end.
SIGNER_ENDS = NOW + 825 * DAY
AUTHORITY_ENDS = NOW + 3650 * DAY
CA = authority().certificate_pem()
OTHER_CA = authority("other CA").certificate_pem()


def renewed(identity: pki.Identity, ends: datetime = SIGNER_ENDS, serial: int = 1000) -> bytes:
    """Another certificate for the same name and key, in PEM."""
    certificate = (
        x509.CertificateBuilder()
        .subject_name(identity.certificate.subject)
        .issuer_name(authority().certificate.subject)
        .public_key(identity.certificate.public_key())
        .serial_number(serial)
        .not_valid_before(NOW - DAY)
        .not_valid_after(ends)
        .add_extension(x509.ExtendedKeyUsage([pki.TICKET_OID]), critical=False)
        .sign(authority().key, hashes.SHA256())
    )
    return pki.Identity(certificate, identity.key).certificate_pem()


class FilesTestCase(EngineTestCase):
    """A state directory with the files of a remote engine."""

    def setUp(self) -> None:
        super().setUp()
        self.directory = Path(self.mktemp())
        self.directory.mkdir()
        self.mtimes = itertools.count(10**18, 10**9)
        self.old, self.new = signer(), signer("ticket", "other CA")
        self.write("ca.pem", CA)
        self.write("proxy.cer", self.old.certificate_pem())
        self.write("proxy.key", self.old.key_pem())

    def write(self, name: str, content: bytes) -> None:
        """Into the file itself, a second after the last one was written."""
        path = self.directory / name
        path.write_bytes(content)
        mtime = next(self.mtimes)
        os.utime(path, ns=(mtime, mtime))

    def config(self, ca: str = "ca.pem", hosts_pki: str = "") -> config.Config:
        return config.Config(
            engine=config.Engine(
                url="https://engine.example.com/", ca=ca, certificate="proxy.cer", key="proxy.key"
            ),
            hosts=config.Hosts(pki=hosts_pki and str(self.directory / hosts_pki)),
            state=config.State(directory=str(self.directory)),
        )

    def levels(self, words: str) -> list[LogLevel]:
        """Of the lines that have these words."""
        return [event["log_level"] for event in self.events if words in (formatEvent(event) or "")]


class LooksTestCase(FilesTestCase):
    """The files, looked at in no thread."""

    def setUp(self) -> None:
        super().setUp()
        self.files = self.started()

    def started(self, **settings: Any) -> EngineFiles:
        files = EngineFiles(self.clock, self.config(**settings), at_once)
        files.startService()
        self.addCleanup(files.stopService)
        return files

    def look(self, times: int = 1) -> None:
        for _ in range(times):
            self.clock.advance(5)

    def reload(self) -> None:
        self.successResultOf(self.files.reload())

    def in_use(self) -> pki.Identity:
        """What a client signs with."""
        return self.result(self.files.credentials())

    def authorities(self) -> bytes:
        return b"".join(pki.Identity(each, self.old.key).certificate_pem() for each in self.trust())

    def trust(self) -> Sequence[x509.Certificate]:
        return self.files.authorities


class LookTests(LooksTestCase):
    """The look every five seconds."""

    def test_unchanged(self) -> None:
        """What does not change is not read again, and nothing is logged."""
        self.assertEqual(self.in_use().certificate, self.old.certificate)
        self.assertEqual(self.authorities(), CA)
        for name in ("load_ticket_identity", "load_engine_authorities"):
            self.patch(files_module, name, None)
        self.look(20)
        self.assertEqual(self.logged(""), [])

    def test_certificate_and_key(self) -> None:
        """A new pair is taken at the second look that sees it, and the log says so, once."""
        self.write("proxy.cer", self.new.certificate_pem())
        self.write("proxy.key", self.new.key_pem())
        self.look()
        self.assertEqual(self.in_use().certificate, self.old.certificate)
        self.look()
        self.assertEqual(self.in_use().certificate, self.new.certificate)
        self.assertTrue(self.in_use().is_pair())
        self.look(20)
        [line] = self.logged("")
        for words in ("engine.certificate (", "proxy.cer)", "engine.key (", "in use from now on"):
            self.assertIn(words, line)

    def test_same_key(self) -> None:
        """A certificate that was renewed for the same key is taken alone."""
        self.write("proxy.cer", renewed(self.old))
        self.look(2)
        self.assertEqual(self.in_use().certificate.serial_number, 1000)
        self.assertTrue(self.in_use().is_pair())

    def test_authorities(self) -> None:
        """A new engine.ca is taken, a bundle whole, and the certificate stays as it was."""
        before = self.in_use()
        self.write("ca.pem", CA + OTHER_CA)
        self.look(2)
        self.assertEqual(self.authorities(), CA + OTHER_CA)
        self.assertIs(self.in_use(), before)
        [line] = self.logged("")
        self.assertIn("engine.ca (", line)

    def test_bundle_being_written(self) -> None:
        """A bundle that has only its first certificates yet is not taken; it grew in between."""
        for content in (OTHER_CA, OTHER_CA + CA, OTHER_CA + CA + OTHER_CA):
            self.write("ca.pem", content)
            self.look()
            self.assertEqual(self.authorities(), CA)
        self.look()
        self.assertEqual(self.authorities(), OTHER_CA + CA + OTHER_CA)
        self.assertEqual(len(self.logged("")), 1)

    def test_two_looks_running(self) -> None:
        """The two looks that see the same follow each other: it did not go away in between."""
        self.write("ca.pem", OTHER_CA)
        new = self.directory / "ca.pem.new"
        old = self.directory / "ca.pem.old"
        path = self.directory / "ca.pem"
        self.look()
        path.rename(new)
        self.write("ca.pem", CA + OTHER_CA)
        self.look()
        path.rename(old)
        new.rename(path)
        self.look()
        self.assertEqual(self.authorities(), CA)
        self.look()
        self.assertEqual(self.authorities(), OTHER_CA)

    def test_cut_off(self) -> None:
        """A bundle that ends within a certificate is not taken, however long it stays so."""
        self.write("ca.pem", OTHER_CA + CA[:-30])
        self.look(20)
        self.assertEqual(self.authorities(), CA)
        [line] = self.logged("")
        self.assertIn("engine.ca (", line)
        self.assertIn("cut off", line)
        self.assertIn("stays in use", line)

    def test_changed_while_read(self) -> None:
        """What changes in the middle of the reading is not taken, nor is it worth a line."""

        def slowly(settings: config.Config) -> Sequence[x509.Certificate]:
            authorities = load_engine_authorities(settings)
            if later:
                self.write("ca.pem", later.pop())
            return authorities

        later = [CA + OTHER_CA]
        self.patch(files_module, "load_engine_authorities", slowly)
        self.write("ca.pem", OTHER_CA)
        self.look(2)
        self.assertEqual(later, [])
        self.assertEqual(self.authorities(), CA)
        self.assertEqual(self.logged(""), [])
        self.look()
        self.assertEqual(self.authorities(), CA + OTHER_CA)

    def test_pair_in_two_steps(self) -> None:
        """A certificate without its key waits for it, with a warning."""
        self.write("proxy.cer", self.new.certificate_pem())
        self.look(20)
        self.assertEqual(self.in_use().certificate, self.old.certificate)
        [line] = self.logged("")
        self.assertIn("is not the key of engine.certificate", line)
        self.assertIn("stays in use", line)
        self.assertEqual(self.levels(""), [LogLevel.warn])
        self.write("proxy.key", self.new.key_pem())
        self.look(2)
        self.assertEqual(self.in_use().certificate, self.new.certificate)
        self.assertTrue(self.in_use().is_pair())
        self.assertEqual(len(self.logged("in use from now on")), 1)

    def test_no_good(self) -> None:
        """What is missing, empty or no PEM is told once, with setting, file and reason, and again
        when it is no good in another way; then that it is in order."""
        self.look()
        for name, setting in (
            ("ca.pem", "engine.ca"),
            ("proxy.cer", "engine.certificate"),
            ("proxy.key", "engine.key"),
        ):
            path = self.directory / name
            good = path.read_bytes()
            before = self.in_use(), self.trust()
            for content in (b"", b"garbage", good[:300], None):
                self.events.clear()
                if content is None:
                    path.unlink()
                else:
                    self.write(name, content)
                self.look(20)
                [line] = self.logged("")
                self.assertIn(f"{setting} ({path})", line)
                self.assertIn("What was read before stays in use.", line)
                self.assertIn("No such file" if content is None else "PEM", line)
                self.assertEqual(self.levels(""), [LogLevel.warn])
            self.events.clear()
            self.write(name, good)
            self.look(20)
            [line] = self.logged("")
            self.assertIn(f"{setting} ({path})", line)
            self.assertIn("in order", line)
            self.assertEqual((self.in_use(), self.trust()), before)

    def test_back_again(self) -> None:
        """A file that went away and came back, untouched, is in order again."""
        path = self.directory / "ca.pem"
        path.rename(self.directory / "away")
        self.look(3)
        self.assertEqual(len(self.logged("No such file")), 1)
        (self.directory / "away").rename(path)
        self.look(3)
        self.assertEqual(len(self.logged("in order")), 1)
        self.assertEqual(len(self.logged("")), 2)

    def test_touched(self) -> None:
        """The same content at another time is no news."""
        self.write("ca.pem", CA)
        self.write("proxy.key", self.old.key_pem())
        before = self.in_use()
        self.look(5)
        self.assertIs(self.in_use(), before)
        self.assertEqual(self.logged(""), [])

    def test_failure(self) -> None:
        """An error that nobody thought of is logged, and the looks go on."""

        def fail(_: config.Config) -> None:
            raise RuntimeError("unheard of")

        patched = self.patch(files_module, "load_engine_authorities", fail)
        self.write("ca.pem", OTHER_CA)
        self.look(2)
        self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 1)
        patched.restore()
        self.look()
        self.assertEqual(self.authorities(), OTHER_CA)

    def test_near_its_end(self) -> None:
        """That a new certificate ends soon, or has ended, is told when it is taken."""
        self.write("proxy.cer", renewed(self.old, NOW + 3 * DAY))
        self.look(2)
        [line] = self.logged("2026-11-27")
        self.assertIn("engine.certificate (", line)
        self.write("ca.pem", renewed(authority(), NOW - DAY / 2))
        self.look(2)
        self.assertEqual(self.levels("engine.ca (")[-1], LogLevel.error)

    def test_system_authorities(self) -> None:
        """Without engine.ca there are no authorities, and nothing to read there."""
        self.files = self.started(ca="")
        self.assertEqual(len(self.trust()), 0)
        self.reload()
        self.assertEqual(len(self.logged("")), 1)
        self.assertEqual(self.logged("engine.ca"), [])


class ReplacedTests(LooksTestCase):
    """The ways to replace a file: each of inode, size and times shows it."""

    def setUp(self) -> None:
        super().setUp()
        self.path = self.directory / "proxy.cer"
        self.write("proxy.cer", renewed(self.old, serial=1001))
        self.reload()
        self.mtime = self.path.stat().st_mtime_ns

    def assert_taken(self, serial: int) -> None:
        self.look(2)
        self.assertEqual(self.in_use().certificate.serial_number, serial)

    def test_in_place(self) -> None:
        """Written over with as many bytes."""
        size = self.path.stat().st_size
        self.write("proxy.cer", renewed(self.old, serial=1002))
        self.assertEqual(self.path.stat().st_size, size)
        self.assert_taken(1002)

    def test_size(self) -> None:
        """Written over by who keeps the time."""
        self.write("proxy.cer", renewed(self.old, serial=2**100))
        os.utime(self.path, ns=(self.mtime, self.mtime))
        self.assert_taken(2**100)

    def test_time_kept(self) -> None:
        """Written over with as many bytes, by who keeps the time: as rsync and cp -p do."""
        self.write("proxy.cer", renewed(self.old, serial=1002))
        os.utime(self.path, ns=(self.mtime, self.mtime))
        self.assert_taken(1002)

    def test_renamed(self) -> None:
        """A new file under the old name, with the same size and time."""
        self.write("new", renewed(self.old, serial=1002))
        os.utime(self.directory / "new", ns=(self.mtime, self.mtime))
        (self.directory / "new").rename(self.path)
        self.assert_taken(1002)

    def test_symlink(self) -> None:
        """A link to a folder that is made to point elsewhere, as Kubernetes does."""
        for version, serial in (("v1", 1002), ("v2", 1003)):
            (self.directory / version).mkdir()
            self.write(f"{version}/proxy.cer", renewed(self.old, serial=serial))
            os.utime(self.directory / version / "proxy.cer", ns=(self.mtime, self.mtime))
        (self.directory / "data").symlink_to("v1")
        self.path.unlink()
        self.path.symlink_to("data/proxy.cer")
        self.assert_taken(1002)
        (self.directory / "data.new").symlink_to("v2")
        (self.directory / "data.new").rename(self.directory / "data")
        self.assert_taken(1003)


class ReloadTests(LooksTestCase):
    """``reload``, which is for SIGHUP."""

    def test_at_once(self) -> None:
        """What is good is taken now, and the log tells of each file."""
        self.write("ca.pem", OTHER_CA)
        self.reload()
        self.assertEqual(self.authorities(), OTHER_CA)
        [pair, ca] = self.logged("")
        self.assertIn("engine.certificate (", pair)
        self.assertIn("engine.key (", pair)
        self.assertIn("the same as before", pair)
        self.assertIn("engine.ca (", ca)
        self.assertIn("in use from now on", ca)

    def test_unseen(self) -> None:
        """It reads also what seems not to have changed."""
        # As on a file system whose times are coarse.
        self.patch(watched, "_stamp", lambda path: (path,))
        self.write("proxy.cer", renewed(self.old, serial=1001))
        self.reload()
        self.write("proxy.cer", renewed(self.old, serial=1002))
        self.look(2)
        self.assertEqual(self.in_use().certificate.serial_number, 1001)
        self.reload()
        self.assertEqual(self.in_use().certificate.serial_number, 1002)

    def test_no_good(self) -> None:
        """What does not fit or is no PEM is not taken, and the log says so, each time; the looks
        after it do not say it again."""
        self.write("proxy.key", self.new.key_pem())
        self.write("ca.pem", b"garbage")
        for times in (1, 2, 3):
            self.reload()
            self.assertEqual(len(self.logged("is not the key of")), times)
            self.assertEqual(len(self.logged("no certificate in PEM")), times)
        self.assertEqual(self.in_use().certificate, self.old.certificate)
        self.assertTrue(self.in_use().is_pair())
        self.assertEqual(self.authorities(), CA)
        self.look(20)
        self.assertEqual(len(self.logged("What was read before stays in use.")), 6)

    def test_changed_while_read(self) -> None:
        """What changes in the middle of the reading is not taken, and the log says so."""

        def slowly(settings: config.Config) -> Sequence[x509.Certificate]:
            authorities = load_engine_authorities(settings)
            self.write("ca.pem", CA + OTHER_CA)
            return authorities

        patched = self.patch(files_module, "load_engine_authorities", slowly)
        self.write("ca.pem", OTHER_CA)
        self.reload()
        patched.restore()
        self.assertEqual(self.authorities(), CA)
        [line] = self.logged("changed while being read")
        self.assertIn("engine.ca (", line)
        self.assertIn("stays in use", line)
        self.look()
        self.assertEqual(self.authorities(), CA + OTHER_CA)

    def test_failure(self) -> None:
        """An error that nobody thought of is logged: who called has nothing to do about it."""

        def fail(_: config.Config) -> None:
            raise RuntimeError("unheard of")

        self.patch(files_module, "load_engine_authorities", fail)
        self.reload()
        self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 1)


class StartTests(FilesTestCase):
    """The first reading."""

    def test_no_good(self) -> None:
        """Without good files to begin with it raises ConfigError, which names the setting."""
        for name, setting in (
            ("ca.pem", "engine.ca"),
            ("proxy.cer", "engine.certificate"),
            ("proxy.key", "engine.key"),
        ):
            good = (self.directory / name).read_bytes()
            for content in (b"garbage", good[:-30]):
                self.write(name, content)
                error = self.assertRaises(ConfigError, EngineFiles, self.clock, self.config())
                self.assertIn(f"{setting} ({self.directory / name})", str(error))
            self.write(name, good)
        self.write("proxy.key", self.new.key_pem())
        error = self.assertRaises(ConfigError, EngineFiles, self.clock, self.config())
        self.assertIn("is not the key of", str(error))

    def test_changed_while_read(self) -> None:
        """What changed in the middle of the first reading is read again soon."""

        def slowly(settings: config.Config) -> Sequence[x509.Certificate]:
            authorities = load_engine_authorities(settings)
            self.write("ca.pem", CA + OTHER_CA)
            return authorities

        patched = self.patch(files_module, "load_engine_authorities", slowly)
        files = EngineFiles(self.clock, self.config(), at_once)
        patched.restore()
        files.startService()
        self.assertEqual(len(files.authorities), 1)
        self.clock.advance(5)
        self.clock.advance(5)
        self.assertEqual(len(files.authorities), 2)


class Threads:
    """Runs what it is given when the test says."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def __call__(self, function: Callable[[], T], /) -> Deferred[T]:
        result: Deferred[None] = Deferred()
        self.waiting.append(lambda: result.callback(None))
        return result.addCallback(lambda _: function())

    def run(self) -> None:
        """One; what it leads to may be the next."""
        self.waiting.pop(0)()


class ThreadTests(FilesTestCase):
    """What goes on while a thread reads."""

    def setUp(self) -> None:
        super().setUp()
        self.threads = Threads()
        self.files = EngineFiles(self.clock, self.config(), self.threads)
        self.files.startService()

    def test_not_here(self) -> None:
        """Nothing is read where the clock ticks."""
        for name in ("load_ticket_identity", "load_engine_authorities"):
            self.patch(files_module, name, None)
        self.patch(watched, "_stamp", None)
        self.clock.advance(5)
        self.assertEqual(len(self.threads.waiting), 1)

    def test_one_at_a_time(self) -> None:
        """A disk that does not answer gets no second question, and a reload waits its turn."""
        self.clock.advance(5)
        reload = self.files.reload()
        self.clock.advance(60)
        self.assertEqual(len(self.threads.waiting), 1)
        self.write("ca.pem", OTHER_CA)
        for _ in range(4):
            self.assertNoResult(reload)
            self.assertEqual(len(self.threads.waiting), 1)
            self.threads.run()
        self.successResultOf(reload)
        self.assertEqual(len(self.logged("in use from now on")), 1)

    def test_stop(self) -> None:
        """The stop waits for a look that is under way, and there is none after it."""
        self.clock.advance(5)
        stopped = self.files.stopService()
        for _ in range(2):
            self.assertNoResult(stopped)
            self.threads.run()
        self.successResultOf(stopped)
        self.clock.advance(60)
        self.assertEqual(self.threads.waiting, [])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_stop_before_start(self) -> None:
        """What was never started stops, too."""
        files = EngineFiles(self.clock, self.config(), self.threads)
        self.successResultOf(files.stopService())
        watch = ExpiryWatch(self.clock, self.config(), [files], self.threads)
        self.successResultOf(watch.stopService())

    def test_stop_expiry_watch(self) -> None:
        """So does the watch for expiries."""
        self.successResultOf(self.files.stopService())
        watch = ExpiryWatch(self.clock, self.config(hosts_pki="pki"), [self.files], self.threads)
        self.patch(files_module, "host_expiries", lambda *_: iter(()))
        watch.startService()
        stopped = watch.stopService()
        for _ in range(2):
            self.assertNoResult(stopped)
            self.assertEqual(len(self.threads.waiting), 1)
            self.threads.run()
        self.successResultOf(stopped)
        self.assertEqual(self.clock.getDelayedCalls(), [])


class ExpiryTests(SynchronousTestCase):
    """``expiries``, pure."""

    def found(self, setting: str, now: datetime) -> list[tuple[str, bool]]:
        certificate = signer().certificate
        return list(expiries(setting, Path("/pki/file"), [certificate], now))

    def test_from_30_days(self) -> None:
        """From 30 days before the end on, and not a second sooner."""
        month = SIGNER_ENDS - 30 * DAY
        self.assertEqual(self.found("engine.ca", month - timedelta(seconds=1)), [])
        [(text, expired)] = self.found("engine.ca", month)
        self.assertIn("expires on 2029-02-26", text)
        self.assertFalse(expired)

    def test_expired(self) -> None:
        """It is valid up to its last second."""
        [(text, expired)] = self.found("engine.ca", SIGNER_ENDS)
        self.assertFalse(expired)
        [(text, expired)] = self.found("engine.ca", SIGNER_ENDS + timedelta(seconds=1))
        self.assertTrue(expired)
        self.assertIn("expired on 2029-02-26", text)

    def test_text(self) -> None:
        """It names the setting, the file, whose certificate, and the cure."""
        for setting, cure in (
            ("engine.certificate", "Have the engine's CA issue a new one"),
            ("engine.ca", "Put the engine's new CA certificate"),
            ("hosts.pki", "Put a new one"),
        ):
            [(text, _)] = self.found(setting, SIGNER_ENDS)
            for words in (f"{setting} (/pki/file)", "CN=proxy", cure, "no restart is needed."):
                self.assertIn(words, text)


class ReloadAllTests(FilesTestCase):
    """``reload_all``."""

    def test_all(self) -> None:
        """Those that have files are read; that none has any is told once."""
        read: list[int] = []
        empty = [watched.WatchedFiles(self.clock, (), at_once) for _ in range(2)]
        files = EngineFiles(self.clock, self.config(), at_once)
        for number, each in enumerate((files, *empty)):
            self.patch(each, "reload", lambda number=number: read.append(number))
        watched.reload_all([*empty, files])
        self.assertEqual(read, [0])
        watched.reload_all(empty)
        self.assertEqual(read, [0, 1])


class ExpiryWatchTests(FilesTestCase):
    """What the log says of certificates that end."""

    def setUp(self) -> None:
        super().setUp()
        pki_directory = self.directory / "pki"
        pki_directory.mkdir()
        self.write("pki/cacert.pem", CA)
        self.write("pki/clientcert.pem", signer("client").certificate_pem())

    def watch(self, now: datetime, hosts_pki: str = "pki", engine: bool = True) -> EngineFiles:
        self.clock = clock_at(now)
        settings = self.config(hosts_pki=hosts_pki)
        files = EngineFiles(self.clock, settings, at_once)
        watch = ExpiryWatch(self.clock, settings, [files] if engine else [], at_once)
        for service in (files, watch):
            service.startService()
            self.addCleanup(service.stopService)
        return files

    def days(self, count: int) -> None:
        for _ in range(24 * count):
            self.clock.advance(3600)

    def test_from_30_days(self) -> None:
        """Nothing before; from then on one warning a day, for each file."""
        self.watch(SIGNER_ENDS - 32 * DAY)
        self.days(1)
        self.assertEqual(self.logged(""), [])
        for count in (1, 2, 3):
            self.days(1)
            self.assertEqual(len(self.logged("engine.certificate (")), count)
            self.assertEqual(len(self.logged("clientcert.pem")), count)
        self.assertEqual(set(self.levels("")), {LogLevel.warn})
        self.assertEqual(len(self.logged("expires on 2029-02-26")), 6)
        self.assertEqual(len(self.logged("")), 6)

    def test_clock_is_set(self) -> None:
        """What counts is the time of day."""
        self.watch(SIGNER_ENDS - 32 * DAY)
        self.clock.time_of_day = lambda: self.clock.seconds() + 2 * DAY.total_seconds()
        self.days(1)
        self.assertEqual(len(self.logged("engine.certificate (")), 1)

    def test_at_start(self) -> None:
        """At the start it is told at once; an end that is past is an error."""
        self.watch(SIGNER_ENDS - DAY)
        self.assertEqual(set(self.levels("")), {LogLevel.warn})
        self.days(2)
        self.assertEqual(self.levels("engine.certificate (")[-1], LogLevel.error)
        self.assertEqual(self.levels("clientcert.pem")[-1], LogLevel.error)
        self.assertIn("expired on 2029-02-26", self.logged("engine.certificate (")[-1])

    def test_authorities(self) -> None:
        """Each certificate of engine.ca counts, and so does cacert.pem."""
        soon = renewed(authority(), SIGNER_ENDS - 100 * DAY)
        sooner = renewed(authority("other CA"), SIGNER_ENDS - 101 * DAY)
        self.write("ca.pem", OTHER_CA + soon + sooner)
        self.write("pki/cacert.pem", OTHER_CA + soon)
        self.watch(SIGNER_ENDS - 120 * DAY)
        self.assertEqual(len(self.logged("CN=other CA expires on 2028-11-17")), 1)
        self.assertEqual(len(self.logged("engine.ca (")), 2)
        [line] = self.logged("cacert.pem")
        self.assertIn("hosts.pki (", line)
        self.assertIn("CN=test CA expires on 2028-11-18", line)
        self.assertEqual(len(self.logged("")), 3)

    def test_renewed(self) -> None:
        """What was renewed is not warned of the next day."""
        self.watch(SIGNER_ENDS - 20 * DAY)
        self.assertEqual(len(self.logged("expires")), 2)
        self.write("proxy.cer", renewed(self.old, AUTHORITY_ENDS))
        self.write("pki/clientcert.pem", renewed(signer("client"), AUTHORITY_ENDS))
        self.clock.advance(5)
        self.clock.advance(5)
        self.days(3)
        self.assertEqual(len(self.logged("expires")), 2)

    def test_hosts_files_unreadable(self) -> None:
        """What cannot be read in hosts.pki is a warning a day, and nothing else stops."""
        (self.directory / "pki" / "cacert.pem").unlink()
        self.write("pki/clientcert.pem", b"garbage")
        self.watch(SIGNER_ENDS - DAY)
        for count in (1, 2):
            for words in ("cacert.pem) cannot be read: No such file", "clientcert.pem) has no"):
                self.assertEqual(len(self.logged(words)), count)
                self.assertEqual(set(self.levels(words)), {LogLevel.warn})
            self.assertEqual(len(self.logged("engine.certificate (")), count)
            self.days(1)

    def test_embedded_engine(self) -> None:
        """Without a remote engine only hosts.pki is watched; without hosts.pki, nothing."""
        self.watch(SIGNER_ENDS, engine=False)
        self.assertEqual(len(self.logged("clientcert.pem")), 1)
        self.assertEqual(len(self.logged("")), 1)
        self.events.clear()
        self.watch(SIGNER_ENDS, hosts_pki="", engine=False)
        self.assertEqual(self.logged(""), [])

    def test_failure(self) -> None:
        """An error that nobody thought of is logged, and the days go on."""

        def fail(*_: object) -> None:
            raise RuntimeError("unheard of")

        patched = self.patch(files_module, "host_expiries", fail)
        self.watch(SIGNER_ENDS - DAY)
        self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 1)
        patched.restore()
        self.days(1)
        self.assertEqual(len(self.logged("clientcert.pem")), 1)


class CheckTests(FilesTestCase):
    """``vmconsole check``, as far as it is about the end of certificates."""

    def setUp(self) -> None:
        super().setUp()
        (self.directory / "pki").mkdir()
        self.write("pki/cacert.pem", CA)
        self.write("pki/clientcert.pem", signer("client").certificate_pem())
        self.write("pki/clientkey.pem", signer("client").key_pem())

    def found(self, now: datetime) -> dict[str, bool]:
        """What is wrong, and whether it is fatal; the ssh keys are not there yet, and need not."""
        return {
            text: fatal
            for text, fatal in check(self.config(hosts_pki="pki"), now)
            if "state.directory" not in text
        }

    def of(self, words: str, now: datetime) -> bool:
        [fatal] = [fatal for text, fatal in self.found(now).items() if words in text]
        return fatal

    def test_good(self) -> None:
        """Nothing to say more than 30 days before."""
        self.assertEqual(self.found(SIGNER_ENDS - 31 * DAY), {})

    def test_soon(self) -> None:
        """From 30 days before it is a warning, for the engine's files and for hosts.pki's."""
        now = SIGNER_ENDS - 29 * DAY
        self.assertEqual(len(self.found(now)), 2)
        for words in ("engine.certificate (", "clientcert.pem"):
            self.assertFalse(self.of(words, now))
        now = AUTHORITY_ENDS - 29 * DAY
        for words in ("engine.ca (", "cacert.pem"):
            self.assertFalse(self.of(words, now))

    def test_expired(self) -> None:
        """A certificate that the engine would refuse is an error, once; others stay warnings."""
        now = SIGNER_ENDS + DAY
        self.assertTrue(self.of("engine.certificate (", now))
        self.assertFalse(self.of("clientcert.pem", now))

    def test_hosts_files_unreadable(self) -> None:
        """What we cannot read, libvirt may: a warning."""
        self.write("pki/cacert.pem", b"garbage")
        self.assertFalse(self.of("cacert.pem", NOW))
        (self.directory / "pki" / "cacert.pem").unlink()
        self.assertTrue(self.of("cacert.pem", NOW))


class Answer(Resource):
    """No consoles, to anybody."""

    isLeaf = True

    def render(self, request: Request) -> bytes:
        return b'{"version": "1", "content": "console_list", "consoles": []}'


@implementer(IOpenSSLContextFactory)
class Swapped:
    """A server's side of TLS, whose certificate the test changes."""

    def __init__(self) -> None:
        self.speak_as(todays("server"))

    def speak_as(self, identity: pki.Identity) -> None:
        pem = identity.key_pem() + identity.certificate_pem()
        self.options = PrivateCertificate.loadPEM(pem).options()

    def getContext(self) -> SSL.Context:
        context: SSL.Context = self.options.getContext()
        return context


@functools.cache
def todays_other_authority() -> pki.Identity:
    """Another CA that is valid by the real clock."""
    return pki.make_authority("today's other CA", datetime.now(UTC))


@functools.cache
def todays(usage: pki.Usage, other: bool = False) -> pki.Identity:
    """A certificate for localhost that is valid by the real clock."""
    ca = todays_other_authority() if other else todays_authority()
    return pki.issue(ca, "localhost", usage, datetime.now(UTC), ["localhost"], key_size=2048)


class RealTestCase(TestCase):
    """With the real reactor, its threads and the real clock."""

    timeout = 30

    def setUp(self) -> None:
        self.directory = short_directory(self)
        todays("ticket").save(self.directory / "proxy.cer", self.directory / "proxy.key")
        self.put_ca(todays_authority())

    def put_ca(self, ca: pki.Identity) -> None:
        new = self.directory / "ca.new"
        new.write_bytes(ca.certificate_pem())
        new.rename(self.directory / "ca.pem")

    def config(self, url: str = "https://localhost/") -> config.Config:
        return config.Config(
            engine=config.Engine(
                url=url, ca="ca.pem", certificate="proxy.cer", key="proxy.key", cache_ttl=0.0
            ),
            state=config.State(directory=str(self.directory)),
        )


class TrustTests(RealTestCase):
    """TLS to an engine whose CA is another one from now on."""

    async def listen(self) -> str:
        """The URL of an engine, whose certificate is ``tls``'s."""
        self.tls = Swapped()
        factory = TLSMemoryBIOFactory(self.tls, False, Site(Answer()))
        port = await TCP4ServerEndpoint(real_reactor, 0, interface="127.0.0.1").listen(factory)
        self.addCleanup(port.stopListening)
        return f"https://localhost:{port.getHost().port}/"

    async def works(self, client: EngineClient) -> bool:
        try:
            await client.consoles("somebody")
        except EngineError as error:
            self.assertIn("engine.ca", str(error))
            return False
        return True

    async def test_swapped(self) -> None:
        """After the reload a connection with the new CA works, and with the old one no longer;
        the client is the same."""
        settings = self.config(await self.listen())
        files = EngineFiles(real_reactor, settings)
        client = make_engine_client(
            real_reactor, settings, files.credentials, lambda: files.authorities
        )
        self.assertTrue(await self.works(client))
        self.tls.speak_as(todays("server", other=True))
        self.assertFalse(await self.works(client))
        self.put_ca(todays_other_authority())
        self.assertFalse(await self.works(client))
        await files.reload()
        self.assertTrue(await self.works(client))
        self.tls.speak_as(todays("server"))
        self.assertFalse(await self.works(client))

    async def test_configured(self) -> None:
        """Who gives no authorities gets those of engine.ca, as they are now."""
        settings = self.config(await self.listen())
        files = EngineFiles(real_reactor, settings)
        clients = (
            make_engine_client(real_reactor, settings),
            make_engine_client(real_reactor, settings, files.credentials),
        )
        self.put_ca(todays_other_authority())
        for client in clients:
            self.assertTrue(await self.works(client))

    async def test_system(self) -> None:
        """No authorities at all: the system's count, which do not know ours."""
        settings = self.config(await self.listen())
        files = EngineFiles(real_reactor, settings)
        client = make_engine_client(real_reactor, settings, files.credentials, lambda: ())
        self.assertFalse(await self.works(client))

    async def test_thread(self) -> None:
        """Files are read in a thread of the reactor's."""
        files = EngineFiles(real_reactor, self.config())
        readers = []

        def spy(settings: config.Config) -> Sequence[x509.Certificate]:
            readers.append(threading.current_thread())
            return load_engine_authorities(settings)

        self.patch(files_module, "load_engine_authorities", spy)
        self.put_ca(todays_other_authority())
        await files.reload()
        self.assertEqual(files.authorities, (todays_other_authority().certificate,))
        [reader] = readers
        self.assertIsNot(reader, threading.current_thread())


class Calls:
    """A reactor for HangUp."""

    def __init__(self) -> None:
        self.later: list[Callable[[], object]] = []

    def callFromThread(self, function: Callable[[], object]) -> None:
        self.later.append(function)


class HangUpTests(TestCase):
    """SIGHUP."""

    timeout = 30

    def setUp(self) -> None:
        self.heard: list[int] = []
        before = signal.signal(signal.SIGHUP, lambda *_: self.heard.append(1))
        self.addCleanup(signal.signal, signal.SIGHUP, before)
        self.reactor = Calls()
        self.done: list[str] = []
        self.reactor.stop = lambda: self.done.append("stop")
        self.service = HangUp(self.reactor, lambda: self.done.append("reload"), lambda: False)

    def test_each(self) -> None:
        """Each leads to one call, and not within the handler."""
        self.service.startService()
        for count in (1, 2):
            signal.raise_signal(signal.SIGHUP)
            self.assertEqual(self.done, ["reload"] * (count - 1))
            self.reactor.later.pop()()
            self.assertEqual(self.done, ["reload"] * count)
        self.service.stopService()

    def test_terminal_closed(self) -> None:
        """When it comes because our terminal was closed, it is the end; from somebody else while
        the terminal is there, it is not."""
        terminal = [True]
        service = HangUp(self.reactor, lambda: self.done.append("reload"), lambda: terminal[-1])
        service.startService()
        signal.raise_signal(signal.SIGHUP)
        terminal.append(False)
        signal.raise_signal(signal.SIGHUP)
        service.stopService()
        for call in self.reactor.later:
            call()
        self.assertEqual(self.done, ["reload", "stop"])

    def test_handler_restored(self) -> None:
        """Before the start and after the stop, who listened before hears; a second stop changes
        nothing."""
        signal.raise_signal(signal.SIGHUP)
        self.service.startService()
        signal.raise_signal(signal.SIGHUP)
        self.assertEqual(len(self.heard), 1)
        self.service.stopService()
        signal.raise_signal(signal.SIGHUP)
        self.assertEqual(len(self.heard), 2)
        self.assertEqual(len(self.reactor.later), 1)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self.service.stopService()
        self.assertEqual(signal.getsignal(signal.SIGHUP), signal.SIG_IGN)

    def test_other_thread(self) -> None:
        """Where Python allows no handler, it starts and stops without one."""
        failed = []

        def run() -> None:
            try:
                self.service.startService()
                self.service.stopService()
            except ValueError as error:
                failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        self.assertEqual(failed, [])
        signal.raise_signal(signal.SIGHUP)
        self.assertEqual(len(self.heard), 1)

    async def test_real_reactor(self) -> None:
        """The real reactor wakes up for it."""
        done: Deferred[None] = Deferred()
        service = HangUp(cast(Any, real_reactor), lambda: done.callback(None))
        service.startService()
        self.addCleanup(service.stopService)
        os.kill(os.getpid(), signal.SIGHUP)
        await done
