"""``python -m tests.lab [--check]``: a lab by itself."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from tests import lab
from tests.lab.check import check


def main() -> int:
    """Run the lab, or check it. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="try all parts out, then end")
    arguments = parser.parse_args()
    # SIGTERM as Ctrl-C, so that the lab is taken down in order.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _check() if arguments.check else _serve()
    except KeyboardInterrupt:
        return 130
    except lab.LabError as error:
        print(error, file=sys.stderr)
        return 1


def _serve() -> int:
    hosts = lab.get()
    hosts.node1.run(lab.LinuxGuest("vm1"))
    hosts.node1.run(lab.LinuxGuest("vm2"))
    hosts.node2.run(lab.LinuxGuest("vm3"))
    for name, host in hosts.hosts.items():
        print(f"{name}  {host.uri}\n{'':{len(name)}}  {host.local_uri}")
    print("vm1, vm2 on node1; vm3 on node2: root, no password. Ctrl-C ends the lab.", flush=True)
    try:
        signal.pause()
    except KeyboardInterrupt:
        hosts.close()
    return 0


def _check() -> int:
    start = time.monotonic()
    hosts = lab.get()
    print(f"{time.monotonic() - start:7.2f} s  two hosts started", flush=True)
    directories = [host.directory for host in hosts.hosts.values()]
    check(hosts.node1)
    start = time.monotonic()
    hosts.close()
    print(f"{time.monotonic() - start:7.2f} s  closed")
    left = [*(path for path in directories if path.exists()), *_processes(directories)]
    mounts = Path("/proc/self/mounts").read_text()
    left += [path for path in directories if str(path) in mounts]
    if left:
        raise lab.LabError(f"left behind: {', '.join(map(str, left))}")
    print("The lab works, and nothing is left behind.")
    return 0


def _processes(directories: list[Path]) -> list[str]:
    """Processes whose command line names one of the hosts' folders, as every QEMU's does."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:
            continue
        if int(process.name) != os.getpid() and any(bytes(path) in command for path in directories):
            found.append(f"{process.name} {command.decode(errors='replace')}")
    return found


if __name__ == "__main__":
    sys.exit(main())
