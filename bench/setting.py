"""Everything that a row measures with: a host, guests, and both servers."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.alternative import Alternative
from bench.ours import Ours, Proxy
from bench.side import Side
from tests import lab

GUESTS = 16


@dataclass(frozen=True)
class Setting:
    """One lab host with light guests, which send back each byte, and both servers before it.

    ``directory`` is for what a row makes, and goes at the end.
    """

    host: lab.LibvirtHost
    guests: list[str]
    ours: Proxy
    alternative: Alternative
    directory: Path

    def order(self, number: int) -> tuple[Side, Side]:
        """Who comes first in a round: A B, B A, A B... makes a drift hit both alike."""
        pair: tuple[Side, Side] = (self.ours, self.alternative)
        return pair if number % 2 == 0 else (pair[1], pair[0])

    @contextmanager
    def held_open(self, guest: str) -> Iterator[None]:
        """Keep a guest's pty open, so that QEMU never stops to look at it.

        Otherwise QEMU looks once a second whether somebody has opened it.
        """
        pty = os.open(self.host.virsh("ttyconsole", guest), os.O_RDWR | os.O_NOCTTY)
        try:
            yield
        finally:
            os.close(pty)


@contextmanager
def set_up() -> Iterator[Setting]:
    """Start it all, and end it all. Raises LabError and BenchError."""
    with ExitStack() as stack:
        hosts = lab.get()
        stack.callback(hosts.close)
        host = hosts.node1
        names = [f"light{number}" for number in range(1, GUESTS + 1)]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda name: host.run(lab.LightGuest(name)), names))
        directory = Path(tempfile.mkdtemp(prefix="vmc-bench-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        # sshd's helper, who runs as nobody, reads the public keys in there.
        directory.chmod(0o711)
        for name in ("ours", "alternative"):
            (directory / name).mkdir(mode=0o711)
        ours = Ours(directory / "ours", {host.name: host.uri})
        alternative = Alternative(directory / "alternative", host.uri, host.pki, ours.access.key)
        for side in (ours, alternative):
            stack.callback(side.stop)
            side.start()
        yield Setting(host, names, ours, alternative, directory)
