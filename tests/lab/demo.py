"""``python -m tests.lab.demo [--check]``: what bin/demo shows, each command said as it is run."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.internet.error import ReactorNotRunning
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure

from tests import lab
from tests.functional.process import Child, Unexpected
from tests.functional.site import BIN, Site
from tests.lab.layout import free_port, is_taken

PORT = 2222
_HOW_LONG = 2_000_000.0  # seconds, about three weeks: as long as the reactor can wait
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What a guest says to a terminal, and a transcript leaves out.
_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[^\t\n -~]")


class DemoError(Exception):
    """The demonstration cannot go on; the text says why."""


class Demo:
    """Three guests on two hosts, and the proxy before them."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._site = Site(reactor)
        self._site.port = free_port() if is_taken(PORT) else PORT
        self._site.configure("")
        self._keys: list[Path] = []

    async def boot(self) -> None:
        """Start the hosts and their guests."""
        say("Booting vm1 and vm2 on node1, vm3 on node2: libvirt, QEMU and Linux, all for real.")
        # In steps, so that Ctrl-C is obeyed between them; the lab ends with Python.
        hosts = await deferToThread(lab.get)
        for host, name in ((hosts.node1, "vm1"), (hosts.node1, "vm2"), (hosts.node2, "vm3")):
            await deferToThread(host.run, lab.LinuxGuest(name))
        for host in (hosts.node1, hosts.node2):
            await self._run("host", "add", host.name, host.uri)
        await self._run("vm", "list")

    def begin(self) -> None:
        """Say how another terminal gets the ``vmconsole`` command of this demonstration."""
        say(f"$ export PATH={BIN}:$PATH VMCONSOLE_CONFIG={self._site.config}")

    async def add_user(self, name: str, vms: str, key: Path) -> None:
        """A user who may open ``vms``, with a new key. Raises DemoError if there is such a file."""
        try:
            key.touch(0o600, exist_ok=False)
        except FileExistsError as error:
            raise DemoError(
                f"{key} is there already, and not overwritten: move it, or start the "
                "demonstration in another folder."
            ) from error
        self._keys.append(key)
        await self._run("user", "add", name)
        await self._run("key", "generate", name, into=key)
        if "SUDO_UID" in os.environ and os.geteuid() == 0:
            os.chown(key, int(os.environ["SUDO_UID"]), int(os.environ["SUDO_GID"]))
        await self._run("grant", name, vms)

    async def start_proxy(self) -> None:
        """Start it, and wait until it knows all guests."""
        say("$ twistd -n vmconsole")
        await self._site.start()
        await self._site.log(rb"node1 has 2.*node2 has 1|node2 has 1.*node1 has 2")

    async def serve(self, key: Path) -> None:
        """Tell what to try, and wait for the end."""
        say("\nIn another terminal, try:\n")
        for what, words in (
            ("the menu", ()),
            ("straight in, by name", ("vm3",)),
            ("what there is", ("list",)),
        ):
            say(f"  # {what}\n  {shlex.join(self._command(key, *words))}")
        say(
            "\nPress Enter on the console: until then its screen is empty. Log in as root, with no "
            "password.\nCtrl-] and then a dot leaves.\n\n"
            f"Ctrl-C here takes everything down again, {key.name} included.",
        )
        assert self._site.proxy is not None
        try:
            status = await self._site.proxy.ended(_HOW_LONG)
        except CancelledError:
            say("\nTaking everything down.")
        else:
            raise DemoError(f"The proxy has ended by itself, with status {status}.")

    async def check(self, key: Path) -> None:
        """Drive ssh through all of that. Raises Unexpected when something else is seen."""
        only_vm2 = self.folder / "only-vm2.key"
        await self.add_user("only-vm2", "vm2", only_vm2)
        async with self._ssh(key) as ssh:
            await ssh.expect(rb"1\. vm1 \[.*2\. vm2 \[.*3\. vm3 \[.*\r\n> ")
            ssh.type(b"1\r")
            await _find_login(ssh, b"vm1", b"node1")
            ssh.type(b"root\r")
            await ssh.expect(rb"vm1:\S+ ")
            ssh.type(b"uname -srn; echo $((6 * 7))\r")
            await ssh.expect(rb"\nLinux vm1 \S+\r\n42\r\n.*vm1:\S+ ")
            await _leave(ssh, b"vm1")
        async with self._ssh(only_vm2) as ssh:
            await _find_login(ssh, b"vm2", b"node1")
            await _leave(ssh, b"vm2")
        async with self._ssh(key, "vm3") as ssh:
            await _find_login(ssh, b"vm3", b"node2")
            await _leave(ssh, b"vm3")
        async with self._ssh(key, "list") as ssh:
            await ssh.expect(rb"\tvm1\r\n.*\tvm2\r\n.*\tvm3\r\n")

    async def close(self) -> None:
        """End the proxy, and remove all files. The hosts end with Python."""
        for key in self._keys:
            key.unlink(missing_ok=True)
        await self._site.close()

    @property
    def folder(self) -> Path:
        """A temporary one, removed at the end."""
        return self._site.folder

    @property
    def logs(self) -> str:
        """The end of the proxy's log."""
        return "\n".join(self._site.logs.splitlines()[-20:])

    async def _run(self, *words: str, into: Path | None = None) -> None:
        command = shlex.join(["vmconsole", *words])
        say(f"$ (umask 077; {command} > {shlex.quote(str(into))})" if into else f"$ {command}")
        answer = await self._site.run(*words)
        if into:
            into.write_text(answer)
        else:
            say(answer, end="")

    def _command(self, key: Path, *words: str) -> list[str]:
        terminal = [] if words == ("list",) else ["-t"]
        options = ["-p", str(self._site.port), "-i", str(key)]
        # The host key is another one each time.
        options += ["-o", "NoHostAuthenticationForLocalhost=yes"]
        return ["ssh", *terminal, *options, "vmproxy@127.0.0.1", *words]

    @asynccontextmanager
    async def _ssh(self, key: Path, *words: str) -> AsyncIterator[Child]:
        """The real ssh, on a pty; at the end it has to end by itself, with 0. Shows what it saw."""
        command = self._command(key, *words)
        say(f"\n$ {shlex.join(command)}")
        ssh = Child("ssh").spawn(self._reactor, command, terminal=True)
        try:
            yield ssh
            status = await ssh.ended()
        finally:
            await ssh.kill()
            say(_CONTROLS.sub("", ssh.seen.decode("utf-8", "replace")).rstrip("\n"))
        if status:
            raise DemoError(f"ssh has ended with status {status}, and not 0.")
        say("(exit status 0)")


async def _find_login(ssh: Child, vm: bytes, host: bytes) -> None:
    """From the start of a console's session to the guest's login prompt."""
    await ssh.expect(rb"\[vmconsole: %b on %b\. To leave: .*\]\r\n" % (vm, host))
    for _ in range(30):
        # One that still boots may not hear it.
        ssh.type(b"\r")
        with suppress(Unexpected):
            await ssh.expect(rb"%b login: " % vm, 2)
            return
    raise DemoError(f"{vm.decode()} shows no login prompt.")


async def _leave(ssh: Child, vm: bytes) -> None:
    ssh.type(b"\x1d.")
    await ssh.expect(rb"\[vmconsole: You left %b\.\]" % vm)


def say(text: str, end: str = "\n") -> None:
    """Print at once, also into a pipe; a terminal that is gone is no reason not to clean up."""
    with suppress(OSError):
        print(text, end=end, flush=True)


async def run(reactor: Any, key: Path, check: bool) -> int:
    """The demonstration, or its check. The result is the exit status."""
    demo = Demo(reactor)
    start = time.monotonic()
    try:
        if check:
            key = demo.folder / key.name
        demo.begin()
        await demo.add_user("demo", "*", key)
        await demo.boot()
        await demo.start_proxy()
        await (demo.check(key) if check else demo.serve(key))
    except (DemoError, Unexpected, TimeoutError, lab.LabError, RuntimeError, OSError) as error:
        say(f"\nFAILED: {error}")
        if demo.logs:
            say(f"\nThe end of the proxy's log:\n{demo.logs}")
        return 1
    finally:
        await demo.close()
    if check:
        say(f"\nAll was as it should be, after {time.monotonic() - start:.0f} s.")
    return 0


def main() -> int:
    """Run the reactor around it; SIGINT, SIGTERM and SIGHUP end it in order."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.demo")
    parser.add_argument("--check", action="store_true", help="drive ssh, and tell what it saw")
    parser.add_argument("--key", type=Path, default=Path("console.key"), help="the key's file")
    arguments = parser.parse_args()
    reactor: Any = _reactor
    status = 130

    def start() -> None:
        running = Deferred.fromCoroutine(run(reactor, arguments.key.absolute(), arguments.check))
        reactor.addSystemEventTrigger("before", "shutdown", stop, running)
        running.addBoth(end)

    def stop(running: Deferred[None]) -> Deferred[None]:
        # Once is enough: nothing is to interrupt the end.
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        running.cancel()
        return running

    def end(result: int | Failure) -> None:
        nonlocal status
        if isinstance(result, int):
            status = result
        elif not result.check(CancelledError):
            result.printTraceback()
            status = 1
        stop_reactor()

    def stop_reactor() -> None:
        with suppress(ReactorNotRunning):
            reactor.stop()

    signal.signal(signal.SIGHUP, lambda *_: reactor.callFromThread(stop_reactor))
    reactor.callWhenRunning(start)
    reactor.run()
    return status


if __name__ == "__main__":
    sys.exit(main())
