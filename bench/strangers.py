"""Strangers who storm a server: a child of the bench, so that they do not disturb who types.

python -m bench.strangers PORT      plays the storms that its input names, and prints how each went
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from contextlib import closing
from typing import NamedTuple

from bench import processes
from bench.child import Child
from bench.errors import BenchError
from bench.handshake import Handshake
from bench.server import ADDRESS
from vmconsole.ssh.ciphers import BadPacketError

_READY = "ready"
# Seconds: for a child's start and a whole storm, and for one stranger.
_TIMEOUT = 120.0
_PATIENCE = 30.0
# Strangers for each 127.0.N.0/24, from N = 1 on: 127.0.0.1 is the user's.
_OF_A_NET = 250


class Storm(NamedTuple):
    """So many strangers, each from an address of its own, and gone after its key exchange.

    At most ``at_once`` of them are there, and they come ``interval`` seconds apart at least.
    """

    strangers: int
    at_once: int
    interval: float = 0.0


class Strangers(Child):
    """The child that plays storms on one port, one at a time."""

    def __init__(self, port: int) -> None:
        """Waits until the child is ready. Raises BenchError."""
        silence = "the strangers were not heard of again"
        super().__init__("bench.strangers", str(port), _TIMEOUT, silence)

    def begin(self, storm: Storm) -> None:
        """Let it come, when the one before is over."""
        self.write(json.dumps(storm))

    def going(self) -> bool:
        """Whether the storm is not over."""
        return not self.speaks()

    def seconds(self) -> float:
        """How long the storm took, when it is over. Raises BenchError when a stranger did not get
        through its key exchange."""
        found = json.loads(self.read())
        if "error" in found:
            raise BenchError(f"a stranger was not served: {found['error']}")
        return float(found["seconds"])

    def cpu(self) -> float:
        """CPU seconds that the child took so far."""
        return processes.own_cpu(self.pid)


def source(number: int) -> str:
    """The address that a storm's stranger comes from."""
    net, host = divmod(number, _OF_A_NET)
    return f"127.0.{net + 1}.{host + 1}"


async def play(port: int, storm: Storm) -> float:
    """Storm a port of the loopback address; how many seconds it took. Raises BenchError."""
    waiting = iter(range(storm.strangers))
    begun = time.perf_counter()

    async def some() -> None:
        for number in waiting:
            await asyncio.sleep(begun + number * storm.interval - time.perf_counter())
            await _visit(port, source(number))

    await asyncio.gather(*(some() for _ in range(storm.at_once)))
    return time.perf_counter() - begun


async def _visit(port: int, address: str) -> None:
    try:
        async with asyncio.timeout(_PATIENCE):
            reader, writer = await asyncio.open_connection(ADDRESS, port, local_addr=(address, 0))
            with closing(writer):
                handshake = Handshake(os.urandom)
                while not handshake.done:
                    data = await reader.read(65536)
                    if not data:
                        raise BenchError("the connection ended")
                    writer.write(handshake.receive(data))
    except (OSError, BadPacketError) as error:
        raise BenchError(f"{type(error).__name__} {error}") from error


def _main(port: int) -> None:
    print(_READY, flush=True)
    for line in sys.stdin:
        found: dict[str, object]
        try:
            found = {"seconds": asyncio.run(play(port, Storm(*json.loads(line))))}
        except BenchError as error:
            found = {"error": str(error)}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    _main(int(sys.argv[1]))
