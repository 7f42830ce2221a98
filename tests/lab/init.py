"""Process 1 of a lab host. Started by host.py in namespaces of its own (mount, pid, uts).

    init.py DIRECTORY NAME PROGRAM [ARGUMENT...]

The host gets its name, its state folders are laid over the machine's, and then words are taken
from standard input, a line each, and answered by a line: ``ok``, or what went wrong.

    start       run PROGRAM; answered when it says by sd_notify that it is ready
    stop        end it by SIGTERM, or SIGKILL after some seconds; its guests live on
    kill        end it by SIGKILL
    freeze      SIGSTOP
    thaw        SIGCONT

At the end of standard input, also when the test process was killed, everything here ends and
DIRECTORY is removed. What is left in a pid namespace dies with its process 1: that is the
kernel's promise, so no guest can outlive the lab.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

START_TIMEOUT = 30.0
STOP_TIMEOUT = 10.0
NOTIFY = Path("/run/lab-notify")  # in the host's own /run


def lay_over(directory: Path) -> None:
    """Mount the host's own state folders and accounts, in this namespace only. Raises OSError."""
    # Installed by none of the packages that the lab needs.
    Path("/etc/libvirt").mkdir(exist_ok=True)
    for name in ("etc/passwd", "etc/group", "etc/libvirt", "run", "var"):
        command = ["mount", "--bind", str(directory / name), f"/{name}"]
        mounted = subprocess.run(command, capture_output=True, text=True)
        if mounted.returncode:
            raise OSError(mounted.stderr.strip())


def reap(_number: int, _frame: FrameType | None) -> None:
    """Collect who ended: orphans are ours, and libvirt waits until its guests are gone."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


class Daemon:
    """The program, started and stopped any number of times."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._command = command
        self._log = log
        self._process: int | None = None  # a pidfd: readable when the process has ended

    def start(self) -> str:
        """Run it until it is ready."""
        if self._process is not None and not _readable(self._process, 0):
            return "it is running already"
        NOTIFY.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(str(NOTIFY))
            environment = {**os.environ, "NOTIFY_SOCKET": str(NOTIFY)}
            with self._log.open("ab") as log:
                daemon = subprocess.Popen(
                    self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
                )
            try:
                self._process = os.pidfd_open(daemon.pid)
            except ProcessLookupError:
                return "it ended at once"
            watched = [notify.fileno(), self._process]
            ready, _, _ = select.select(watched, [], [], START_TIMEOUT)
            if notify.fileno() in ready:
                return "ok"
        ended = bool(ready)
        self.stop(signal.SIGKILL)
        return "it ended at once" if ended else f"not ready after {START_TIMEOUT:.0f} s"

    def send(self, number: signal.Signals) -> str:
        """Send it a signal."""
        if self._process is None:
            return "it is not running"
        try:
            signal.pidfd_send_signal(self._process, number)
        except ProcessLookupError:
            return "it has ended"
        return "ok"

    def stop(self, number: signal.Signals) -> str:
        """End it by this signal, and wait until it has ended."""
        answer = self.send(number)
        if self._process is None:
            return answer
        self.send(signal.SIGCONT)
        if not _readable(self._process, STOP_TIMEOUT):
            self.send(signal.SIGKILL)
            _readable(self._process, STOP_TIMEOUT)
        os.close(self._process)
        self._process = None
        return answer


def _readable(descriptor: int, timeout: float) -> bool:
    return bool(select.select([descriptor], [], [], timeout)[0])


def main() -> None:
    """Serve until standard input ends."""
    directory, name, daemon = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    try:
        socket.sethostname(name)
        lay_over(directory)
        signal.signal(signal.SIGCHLD, reap)
        serve(Daemon(daemon, directory / "libvirtd.log"))
    except OSError as error:
        print(error, flush=True)
    finally:
        # Reaches all in this namespace but us. They are gone when we are; their files go now.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        shutil.rmtree(directory, ignore_errors=True)


def serve(daemon: Daemon) -> None:
    """Obey standard input."""
    words: dict[str, Callable[[], str]] = {
        "start": daemon.start,
        "stop": lambda: daemon.stop(signal.SIGTERM),
        "kill": lambda: daemon.stop(signal.SIGKILL),
        "freeze": lambda: daemon.send(signal.SIGSTOP),
        "thaw": lambda: daemon.send(signal.SIGCONT),
    }
    print("ok", flush=True)
    for line in sys.stdin:
        print(words[line.strip()](), flush=True)


# Run by hand in the machine's own namespaces this would be a disaster.
if __name__ == "__main__" and os.getpid() == 1:
    main()
