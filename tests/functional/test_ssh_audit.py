"""ssh-audit (PyPI), which knows what is weak, and floods a server a little, against the proxy."""

from __future__ import annotations

import json
import sys

from twisted.internet import reactor
from twisted.internet.utils import getProcessOutputAndValue
from twisted.trial.unittest import TestCase

from tests.functional.site import Site

# For the connections that have to wait, once there were too many without a login.
_SECONDS = "20"
# What is there to be said of each client's own part in a chosen cipher, whoever offers it.
_TERRAPIN = "Be aware that, while this target properly supports the strict key exchange method"


class SSHAuditTests(TestCase):
    """A proxy as it is at its first start: with both host keys, and nothing configured."""

    timeout = 120

    async def setUp(self) -> None:  # type: ignore[override]
        self.site = Site(reactor)
        self.addCleanup(self.site.close)
        await self.site.start()

    async def test_audit(self) -> None:
        """No failure; no warning but that curve25519 alone, which is there for older clients, does
        not withstand a quantum computer; and nothing to say about the rate of connections."""
        words = ["-m", "ssh_audit", "--json", "--timeout", _SECONDS, f"127.0.0.1:{self.site.port}"]
        out, err, _ = await getProcessOutputAndValue(sys.executable, words, reactor=reactor)
        found = json.loads(out) if out else self.fail(err)
        offered = {kind: [each["algorithm"] for each in found[kind]] for kind in ("key", "enc")}
        self.assertEqual(offered["key"], ["ssh-ed25519", "rsa-sha2-512", "rsa-sha2-256"])
        self.assertEqual(len(offered["enc"]), 5)
        said = {
            (severity, each["algorithm"], note)
            for kind in ("kex", "key", "enc", "mac")
            for each in found[kind]
            for severity in ("fail", "warn")
            for note in each["notes"].get(severity, ())
        }
        quantum = "does not provide protection against post-quantum attacks"
        names = ("curve25519-sha256", "curve25519-sha256@libssh.org")
        self.assertEqual(said, {("warn", name, quantum) for name in names})
        self.assertEqual(found["cves"], [])
        notes = [note for note in found["additional_notes"] if not note.startswith(_TERRAPIN)]
        self.assertEqual(notes, [])
