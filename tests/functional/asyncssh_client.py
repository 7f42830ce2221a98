"""An ssh client made of asyncssh, for the tests: its own standard streams are the session's."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import threading
import tty
from typing import Any

import asyncssh


def _only(options: argparse.Namespace) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for option, name in (("cipher", "encryption"), ("mac", "mac"), ("kex", "kex")):
        if getattr(options, option):
            chosen[f"{name}_algs"] = [getattr(options, option)]
    if options.rekey != "0":
        chosen["rekey_bytes"] = int(options.rekey)
    return chosen


def _send(process: asyncssh.SSHClientProcess[bytes], loop: asyncio.AbstractEventLoop) -> None:
    async def write(data: bytes) -> None:
        process.stdin.write(data)
        await process.stdin.drain()

    async def end() -> None:
        process.stdin.write_eof()

    while data := os.read(0, 32768):
        asyncio.run_coroutine_threadsafe(write(data), loop).result()
    asyncio.run_coroutine_threadsafe(end(), loop)


async def _run(options: argparse.Namespace) -> int:
    async with asyncssh.connect(
        "127.0.0.1",
        int(options.port),
        username="vmproxy",
        client_keys=[options.key],
        known_hosts=options.known_hosts,
        config=None,
        agent_path=None,
        **_only(options),
    ) as connection:
        process = await connection.create_process(
            " ".join(options.words) or None,
            encoding=None,
            term_type="xterm" if options.terminal else None,
        )
        if options.terminal:
            tty.setraw(0)
        # No executor's thread: asyncio would wait for the end of its read.
        loop = asyncio.get_running_loop()
        threading.Thread(target=_send, args=(process, loop), daemon=True).start()
        while data := await process.stdout.read(65536):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        sys.stderr.buffer.write(await process.stderr.read())
        await process.wait_closed()
        status = process.exit_status
    return 255 if status is None else status


def main() -> int:
    """Run a command line, or the shell; the result is its exit status."""
    parser = argparse.ArgumentParser()
    for name in ("port", "key", "known-hosts", "cipher", "mac", "kex", "rekey"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--terminal", action="store_true")
    parser.add_argument("words", nargs="*")
    return asyncio.run(_run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
