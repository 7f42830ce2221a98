"""A stand-in for an engine, in a process of its own: what it costs is not the proxy's.

It says what was written for it beforehand, over HTTPS as a real site's engine, and looks at
nothing in a ticket but the command.

``python -m bench.engine DIRECTORY PORT`` serves each folder in DIRECTORY below its name.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
from base64 import b64decode
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from twisted.internet.ssl import PrivateCertificate
from twisted.web.resource import Resource
from twisted.web.server import Request, Site

from bench.server import ADDRESS, Server, free_port
from vmconsole import pki

_TOP = Path(__file__).parents[1]
_CERTIFICATE, _KEY, _CA = "engine.crt", "engine.key", "ca.crt"
_TICKET_CERTIFICATE, _TICKET_KEY = "ticket.crt", "ticket.key"
KEYS, CONSOLES = "public_keys", "available_consoles"


class Engine(Server):
    """The stand-in, with a CA of its own. Each of its sites has its own lists."""

    label = "the stand-in of an engine"

    def __init__(self, directory: Path) -> None:
        """Makes ``directory`` and the certificates in it."""
        super().__init__()
        self._directory = directory
        self._port = free_port()
        directory.mkdir()
        now = datetime.now(UTC)
        authority = pki.make_authority("the bench's CA", now)
        (directory / _CA).write_bytes(authority.certificate_pem())
        uses: tuple[tuple[pki.Usage, str, str], ...] = (
            ("server", _CERTIFICATE, _KEY),
            ("ticket", _TICKET_CERTIFICATE, _TICKET_KEY),
        )
        for usage, certificate, key in uses:
            # As those that an oVirt Engine issues.
            identity = pki.issue(authority, "bench", usage, now, [ADDRESS], key_size=2048)
            identity.save(directory / certificate, directory / key)

    def add(self, name: str, keys: Sequence[bytes], consoles: bytes) -> None:
        """A site with these replies, before it is asked for any. Of several the first is given
        first, and after the last it again."""
        site = self._directory / name
        for command, replies in ((KEYS, keys), (CONSOLES, [consoles])):
            (site / command).mkdir(parents=True)
            for number, reply in enumerate(replies):
                (site / command / str(number)).write_bytes(reply)

    def start(self) -> None:
        """Start it, and wait until it serves. Raises BenchError."""
        command = [sys.executable, "-P", "-m", "bench.engine", str(self._directory)]
        environment = {**os.environ, "PYTHONPATH": str(_TOP)}
        self._spawn(
            [*command, str(self._port)], self._directory / "log", self._directory, environment
        )

    def answers(self) -> bool:
        try:
            socket.create_connection((ADDRESS, self._port), timeout=1).close()
        except OSError:
            return False
        return True

    def settings(self, name: str) -> str:
        """What is in a proxy's ``[engine]`` to ask for a site's lists."""
        return (
            f'url = "https://{ADDRESS}:{self._port}/{name}/"\n'
            f'ca = "{self._directory / _CA}"\n'
            f'certificate = "{self._directory / _TICKET_CERTIFICATE}"\n'
            f'key = "{self._directory / _TICKET_KEY}"\n'
        )

    def replies(self, name: str, command: str) -> int:
        """How many times a site's list was given so far."""
        return self._log.read_text().count(f"{name} {command}\n")


class _Servlet(Resource):
    """Answers a ticket with what is in the folder for the site and the command."""

    isLeaf = True

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self._replies: dict[Path, Iterator[bytes]] = {}

    def render_POST(self, request: Request) -> bytes:
        assert request.content is not None
        ticket = json.loads(b64decode(request.content.read()))
        command = json.loads(ticket["data"])["command"]
        name = request.path.split(b"/")[1].decode()
        folder = self._directory / name / command
        if folder not in self._replies:
            files = sorted(folder.iterdir())
            self._replies[folder] = itertools.cycle([file.read_bytes() for file in files])
        # Counted by Engine.replies.
        print(name, command, flush=True)
        request.setHeader(b"Content-Type", b"application/json")
        return next(self._replies[folder])


def main() -> None:
    """Serve until ended."""
    from twisted.internet import reactor

    directory, port = Path(sys.argv[1]), int(sys.argv[2])
    pem = (directory / _CERTIFICATE).read_bytes() + (directory / _KEY).read_bytes()
    options = PrivateCertificate.loadPEM(pem).options()
    reactor.listenSSL(  # type: ignore[attr-defined]
        port, Site(_Servlet(directory)), options, interface=ADDRESS
    )
    reactor.run()


if __name__ == "__main__":
    main()
