"""Twisted's endpoint strings: one error for all that can be wrong with one."""

from __future__ import annotations

from pathlib import Path

from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.testing import MemoryReactorClock
from twisted.trial.unittest import SynchronousTestCase

from vmconsole.endpoints import server_endpoint


class EndpointTests(SynchronousTestCase):
    """What a description becomes."""

    def test_good(self) -> None:
        """A port is Twisted's endpoint for it."""
        made = server_endpoint(MemoryReactorClock(), "tcp:2222")
        self.assertIsInstance(made, TCP4ServerEndpoint)

    def test_bad(self) -> None:
        """What Twisted cannot make anything of is a ValueError: an unknown type, no number, too
        many words, a backslash at the end, a socket that systemd did not give."""
        for text in (
            *("", "nonsense:1", "tcp:x", "tcp:1:interface=::1", "tcp:1\\"),
            "systemd:domain=INET:index=0",
        ):
            with self.assertRaises(ValueError, msg=text):
                server_endpoint(MemoryReactorClock(), text)

    def test_bad_tls_files(self) -> None:
        """So are files for ``ssl:`` that are missing, or no PEM, for which there are errors of
        OpenSSL's own."""
        garbage = Path(self.mktemp())
        for content in (None, "no key"):
            if content is not None:
                garbage.write_text(content)
            with self.assertRaises(ValueError):
                server_endpoint(MemoryReactorClock(), f"ssl:1:privateKey={garbage}")
