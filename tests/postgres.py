"""A real PostgreSQL server for the tests, without the machine's own being touched.

    from tests import postgres

    server = postgres.get()               # starts it on first use; ends with Python
    url = server.database()               # a new empty database: postgresql+psycopg://...
    server.sql("SELECT 1", url)           # as the superuser, by psql
    server.drop(url)

    server.stop(); server.start()         # also restart, kill, freeze, thaw
    postgres.missing()                    # why there can be no server here, or "": for skips

``get`` is for all tests together, and has the server running whatever the last test did to it.
``with Postgres(tcp=True, fsync=True) as server`` is one of one's own. Every method waits until it
is done: call them from the test's thread or a thread pool.

The URLs are those of a plain role that owns its databases. The server differs from C, UTC and
ASCII where it can, so that whoever relies on these is found out: it sorts as people do (by ICU),
and its time zone is half an hour off.

Run as a program, this file is the server's keeper: see ``_Keeper``.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import itertools
import os
import pwd
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

_DEBIAN = Path("/usr/lib/postgresql")
_PROGRAMS = ("initdb", "pg_ctl", "postgres", "psql")
_SUPERUSER = "postgres"
_ROLE = "vmconsole"
_ADDRESS = "127.0.0.1"
# On a unix socket the port is a part of the file's name, and nothing else.
_SOCKET_PORT = 5432
_START_TIMEOUT = 60.0
_STOP_TIMEOUT = 30.0
_SIGNAL_TIMEOUT = 10.0
_CLOSE_TIMEOUT = 30.0
_SQL_TIMEOUT = 60.0

# Small, and quick to start. Dynamic shared memory is in files below the data directory, since
# what is in /dev/shm would outlive a server that was killed.
_CONFIGURATION = """
listen_addresses = '{addresses}'
port = {port}
unix_socket_directories = '{directory}'
fsync = {fsync}
shared_buffers = 16MB
dynamic_shared_memory_type = mmap
timezone = 'Asia/Kolkata'
log_timezone = 'UTC'
log_line_prefix = '%m [%p] %d '
"""

_INITDB = (
    *("--no-sync", "--no-instructions", "--wal-segsize=1", f"--username={_SUPERUSER}"),
    *("--auth-local=trust", "--auth-host=scram-sha-256", "--encoding=UTF8"),
)
# What sorts unlike C comes first, if this PostgreSQL and this system have it.
_LOCALES = (
    ("--locale-provider=icu", "--icu-locale=en-US", "--locale=C.UTF-8"),
    ("--locale=en_US.UTF-8", "--lc-messages=C"),
    ("--locale=C.UTF-8",),
)


class PostgresError(Exception):
    """The server cannot do what was asked; the text says why, with the program's own words."""


class Postgres:
    """A server with a data directory of its own, on a unix socket.

    Every method waits, raises PostgresError, and may be called in any thread.
    """

    def __init__(self, tcp: bool = False, fsync: bool = False) -> None:
        """Make the data directory and start the server.

        ``tcp`` makes it listen on the loopback address too. Without ``fsync`` what it has
        committed outlives every end of the server, but not that of the machine.
        """
        self._bin = _find_bin()
        self._lock = threading.Lock()
        self._names = (f"test_{number}" for number in itertools.count(1))
        self._password = secrets.token_hex(16)
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", __file__, str(self._bin)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,  # Ctrl-C is for the tests: they close us in order
        )
        assert self._keeper.stdin is not None and self._keeper.stdout is not None
        self._input, self._output = self._keeper.stdin, self._keeper.stdout
        #: Where everything is, the unix socket included.
        self.directory = Path(self._output.readline().decode().strip() or "/nonexistent")
        try:
            self._tell("initdb")
            self.port = self._start_at_port(tcp, fsync)
            self._tcp = tcp
            self.sql(f"CREATE ROLE {_ROLE} LOGIN PASSWORD '{self._password}'")
        except BaseException:
            self.close()
            raise

    @property
    def log(self) -> Path:
        """What the server says."""
        return self.directory / "log"

    def database(self, tcp: bool = False) -> str:
        """Make a new empty database. Returns its URL for SQLAlchemy, with psycopg as the driver.

        With ``tcp`` the URL is of the loopback address, and has a password in it.
        """
        if tcp and not self._tcp:
            raise PostgresError("this server is on a unix socket only")
        with self._lock:
            name = next(self._names)
        self.sql(f"CREATE DATABASE {name} OWNER {_ROLE}")
        if tcp:
            return f"postgresql+psycopg://{_ROLE}:{self._password}@{_ADDRESS}:{self.port}/{name}"
        return f"postgresql+psycopg://{_ROLE}@/{name}?host={self.directory}&port={self.port}"

    def drop(self, url: str) -> None:
        """Remove a database, if it is still there, and throw out whoever is connected to it."""
        self.sql(f"DROP DATABASE IF EXISTS {_name(url)} WITH (FORCE)")

    def sql(self, statement: str, url: str = "") -> str:
        """Execute a statement as the superuser, in the database of this URL if there is one.

        Returns the rows that psql prints: a line each, with ``|`` between the columns.
        """
        command = [str(self._bin / "psql"), "-XAtq", "-v", "ON_ERROR_STOP=1"]
        command += ["-h", str(self.directory), "-p", str(self.port), "-U", _SUPERUSER]
        command += ["-d", _name(url) if url else "postgres", "-c", statement]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env=_environment(),
                timeout=_SQL_TIMEOUT,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PostgresError(f"{statement}: {error}") from error
        if done.returncode:
            raise PostgresError(f"{statement}: {done.stderr.decode(errors='replace').strip()}")
        return done.stdout.decode().removesuffix("\n")

    def start(self) -> None:
        """Have the server running and answering. Does nothing when it is."""
        self._tell("start")

    def stop(self, mode: str = "fast") -> None:
        """End the server and its connections. ``immediate`` is without saving what is in memory.

        After ``immediate`` it starts as after a crash.
        """
        if mode not in ("fast", "immediate"):
            raise ValueError(mode)
        self._tell(mode)

    def restart(self, mode: str = "fast") -> None:
        """Stop and start."""
        self.stop(mode)
        self.start()

    def kill(self) -> None:
        """End all processes of the server by SIGKILL."""
        self._tell("kill")

    def freeze(self) -> None:
        """Stop all processes of the server (SIGSTOP): connections stay open and silent."""
        self._tell("freeze")

    def thaw(self) -> None:
        """Let a frozen server go on (SIGCONT)."""
        self._tell("thaw")

    def close(self) -> None:
        """End the server and remove its directory. May be called again."""
        for pipe in (self._input, self._output):
            with contextlib.suppress(OSError):
                pipe.close()
        try:
            self._keeper.wait(_CLOSE_TIMEOUT)
        except subprocess.TimeoutExpired:
            # A server that finds its data directory gone ends by itself, within a minute.
            self._keeper.kill()
            self._keeper.wait()
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _start_at_port(self, tcp: bool, fsync: bool) -> int:
        configuration = self.directory / "data" / "postgresql.conf"
        given = configuration.read_text()
        for _ in range(3):
            port = _free_port() if tcp else _SOCKET_PORT
            ours = _CONFIGURATION.format(
                addresses=_ADDRESS if tcp else "",
                port=port,
                directory=self.directory,
                fsync="on" if fsync else "off",
            )
            configuration.write_text(given + ours)
            try:
                self.start()
                break
            except PostgresError as error:
                # Somebody was faster. Nobody has our URL yet, so another port is as good.
                if not tcp or "Address already in use" not in str(error):
                    raise
                taken = error
        else:
            raise taken
        return port

    def _tell(self, word: str) -> None:
        with self._lock:
            try:
                self._input.write(word.encode() + b"\n")
                self._input.flush()
                answer = self._output.readline().decode().strip() or "its keeper has ended"
            except (OSError, ValueError) as error:
                raise PostgresError("PostgreSQL is closed") from error
        if answer != "ok":
            raise PostgresError(f"PostgreSQL: {word}: {answer}\n{_log_end(self.log)}".rstrip())


_postgres: Postgres | None = None


def get() -> Postgres:
    """The one server of this process, started at first use, and running. Raises PostgresError.

    It ends with Python. If Python is killed, its keeper sees the end of its input and ends it.
    """
    global _postgres
    if _postgres is None:
        _postgres = Postgres()
        atexit.register(_close, _postgres, os.getpid())
    else:
        _postgres.start()
    return _postgres


def _close(server: Postgres, owner: int) -> None:
    # A child that was forked off and ends as Python does must not take our server along.
    if os.getpid() == owner:
        server.close()


def missing() -> str:
    """What keeps a server from starting on this machine; empty when nothing is known to."""
    try:
        _find_bin()
    except PostgresError as error:
        return str(error)
    return ""


def _find_bin() -> Path:
    """The folder with the server's programs. Raises PostgresError."""
    # Debian has only the client's programs in PATH, and those through a wrapper.
    folders = sorted(_DEBIAN.glob("*/bin"), key=_version, reverse=True)
    found = shutil.which("pg_ctl")
    if found:
        folders.append(Path(found).resolve().parent)
    for folder in folders:
        if all(os.access(folder / program, os.X_OK) for program in _PROGRAMS):
            return folder
    raise PostgresError(
        f"missing: PostgreSQL's {', '.join(_PROGRAMS)}, in {_DEBIAN}/*/bin or in PATH"
        " (bin/test installs them)"
    )


def _version(folder: Path) -> list[int]:
    return [int(part) for part in folder.parent.name.split(".") if part.isdigit()]


def _environment() -> dict[str, str]:
    """Ours, in the C locale, and without what would direct PostgreSQL's programs elsewhere."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return {**kept, "LC_ALL": "C"}


def _name(url: str) -> str:
    return urlsplit(url).path.removeprefix("/")


def _free_port() -> int:
    # Not above: the keeper is this file, without the project in its path.
    from tests.lab.layout import free_port

    return free_port()


def _log_end(log: Path, lines: int = 10) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


class _Keeper:
    """Starts the server, and ends it when the tests end, in whatever way they do.

    It says where its directory is, and then takes words from standard input, a line each, and
    answers each by a line: ``ok``, or what went wrong. At the end of standard input, also when
    the test process was killed, the server ends and the directory is removed.

    PostgreSQL refuses to run as root; then it gets an account of the system.
    """

    def __init__(self, bin_folder: Path) -> None:
        self._bin = bin_folder
        self._postmaster: int | None = None
        self._account: dict[str, Any] = {}
        # In /tmp whatever TMPDIR says: the path of a unix socket may have 107 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="vmc-postgres-", dir="/tmp"))
        self._data = self.directory / "data"
        if os.geteuid() == 0:
            account = _find_account()
            os.chown(self.directory, account.pw_uid, account.pw_gid)
            self._account = {
                "user": account.pw_uid,
                "group": account.pw_gid,
                "extra_groups": [],
            }

    def serve(self) -> None:
        """Obey standard input."""
        words: dict[str, Callable[[], str]] = {
            "initdb": self.initdb,
            "start": self.start,
            "fast": lambda: self.stop(signal.SIGINT),
            "immediate": lambda: self.stop(signal.SIGQUIT),
            "kill": self.kill,
            "freeze": self.freeze,
            "thaw": self.thaw,
        }
        _say(str(self.directory))
        for line in sys.stdin:
            _say(" ".join(words[line.strip()]().split()))

    def initdb(self) -> str:
        """Make the data directory."""
        for locale in _LOCALES:
            answer = self._run("initdb", *_INITDB, *locale)
            if answer == "ok":
                break
        return answer

    def start(self) -> str:
        """Have it running and answering."""
        if self._lives():
            return self.thaw()
        # A postmaster that was killed leaves processes that may not have noticed yet.
        self._end_all()
        timeout = f"--timeout={_START_TIMEOUT:.0f}"
        answer = self._run("pg_ctl", "start", "--wait", timeout, f"--log={self.directory / 'log'}")
        if answer != "ok":
            self._end_all()
            return answer
        # pg_ctl has ended by now, and what it left is ours, as with any process of the server.
        self._postmaster = int(self._lock_file()[0])
        return "ok"

    def stop(self, number: signal.Signals) -> str:
        """End it by this signal, and wait until it has ended."""
        if not self._lives():
            return "it is not running"
        self.thaw()
        assert self._postmaster is not None
        descriptor = os.pidfd_open(self._postmaster)
        os.kill(self._postmaster, number)
        ended, _, _ = select.select([descriptor], [], [], _STOP_TIMEOUT)
        os.close(descriptor)
        if not ended:
            return f"it has not ended after {_STOP_TIMEOUT:.0f} s"
        self._end_all()
        return "ok"

    def kill(self) -> str:
        """End all processes by SIGKILL, and wait until they have ended."""
        if not self._lives():
            return "it is not running"
        self._end_all()
        return "ok"

    def freeze(self) -> str:
        """Stop all processes, and wait until they have stopped."""
        if not self._lives():
            return "it is not running"
        deadline = time.monotonic() + _SIGNAL_TIMEOUT
        # Only a parent is told when a process stops, and most are not our children. When the
        # postmaster has stopped there can be no new ones.
        while running := [pid for pid, state in self._family() if state not in "TZX"]:
            if time.monotonic() > deadline:
                return f"it has not stopped after {_SIGNAL_TIMEOUT:.0f} s"
            _send(running, signal.SIGSTOP)
            time.sleep(0.001)
        return "ok"

    def thaw(self) -> str:
        """Let all processes go on."""
        if not self._lives():
            return "it is not running"
        _send([pid for pid, _ in self._family()], signal.SIGCONT)
        return "ok"

    def close(self) -> None:
        """End the server if it runs, and remove the directory."""
        self.stop(signal.SIGQUIT)
        self._end_all()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> str:
        command = [str(self._bin / program), "-D", str(self._data), *arguments]
        # Into a file: a server that pg_ctl gave up keeps a pipe open.
        with tempfile.TemporaryFile() as output:
            status = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.directory,
                **self._account,
            ).returncode
            output.seek(0)
            words = output.read().decode(errors="replace").strip()
        return f"{program}: {words or f'exit status {status}'}" if status else "ok"

    def _lives(self) -> bool:
        """Whether there is a postmaster. Collects those who ended."""
        with contextlib.suppress(ChildProcessError):
            while pid := os.waitpid(-1, os.WNOHANG)[0]:
                if pid == self._postmaster:
                    self._postmaster = None
        return self._postmaster is not None

    def _family(self) -> list[tuple[int, str]]:
        """The processes of the server and their states, the postmaster first."""
        return _descendants(os.getpid())

    def _end_all(self) -> None:
        """End all processes that there are, and what would be left of them in the kernel."""
        with contextlib.suppress(ChildProcessError):
            while True:
                # Orphans become our children, so this ends when there is nobody.
                _send([pid for pid, _ in self._family()], signal.SIGKILL)
                os.waitpid(-1, 0)
        self._postmaster = None
        # There is a lock file only when the server had no time to clear up.
        with contextlib.suppress(OSError, IndexError, ValueError):
            segment = int(self._lock_file()[6].split()[1])
            ctypes.CDLL(None).shmctl(segment, 0, None)  # IPC_RMID

    def _lock_file(self) -> list[str]:
        return (self._data / "postmaster.pid").read_text().splitlines()


def _find_account() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def _descendants(ancestor: int) -> list[tuple[int, str]]:
    """The numbers and states of all processes below this one, parents before children."""
    children: dict[int, list[tuple[int, str]]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # The program's name, in parentheses, may have any character in it.
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                children.setdefault(int(parent), []).append((int(entry.name), state))
    found = list(children.get(ancestor, []))
    for pid, _ in found:
        found += children.get(pid, [])
    return found


def _send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _say(line: str) -> None:
    # Tests that were killed do not listen any more; then standard input has ended too.
    with contextlib.suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), line.encode() + b"\n")


def _keep() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    # Those whose parents are gone come to us, the postmaster the first of them.
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    keeper = _Keeper(Path(sys.argv[1]))
    try:
        keeper.serve()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        keeper.close()


if __name__ == "__main__":
    _keep()
