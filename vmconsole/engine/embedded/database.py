"""Transactions on the embedded engine's database, whose failures are StoreErrors."""

from __future__ import annotations

import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from sqlite3 import Connection as SQLiteConnection
from typing import Literal

from sqlalchemy import URL, Connection, create_engine, event, select, text, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    OperationalError,
    SQLAlchemyError,
)

from vmconsole.config import Config
from vmconsole.engine.embedded.schema import meta
from vmconsole.engine.embedded.upgrade import check_version, newest_version, upgrade, version
from vmconsole.errors import ConfigError, StoreError, StoreUnavailable
from vmconsole.pki import give_to_owner_of, make_private_directory
from vmconsole.text import printable

Part = Literal["keys", "access", "hosts"]

_BUSY_SECONDS = 10
_RETRY_SECONDS = 0.01
_LARGEST_STEP = 2**31
_VERSION = text("SELECT version_num FROM alembic_version")
_LONGEST = 300
_PASSWORDS = ("password", "sslpassword", "passwd")
# What becomes better by itself, or by somebody's hand, while we run.
_SQLITE_TROUBLE = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_PROTOCOL,
    }
)
# libpq's, so that a server that is gone, or silent, is noticed soon; milliseconds are said.
_POSTGRESQL = {
    "connect_timeout": "5",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
    "application_name": "vmconsole",
    "options": "-c lock_timeout=10s -c statement_timeout=60s "
    "-c idle_in_transaction_session_timeout=60s",
}


def database_url(config: Config) -> str:
    """``engine.embedded.database``, an SQLite file's relative path below the state directory.

    Raises ConfigError.
    """
    try:
        url = make_url(config.engine.embedded.database)
    except (ArgumentError, ValueError) as error:
        # A port that is no number is the ValueError.
        raise ConfigError(
            "engine.embedded.database is no URL such as sqlite:///engine.db."
        ) from error
    if url.drivername == "sqlite":
        if not url.database or url.database == ":memory:":
            raise ConfigError("engine.embedded.database names no file: sqlite:///engine.db does.")
        url = url.set(database=str(config.path(url.database)))
    elif url.drivername in ("postgresql", "postgresql+psycopg"):
        url = url.set(drivername="postgresql+psycopg")
    else:
        raise ConfigError(
            f"engine.embedded.database = {_shown(url)}: sqlite:///FILE or "
            "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE is needed."
        )
    return url.render_as_string(hide_password=False)


def database_file(url: str) -> Path | None:
    """The SQLite file of a URL; None: it is not SQLite's."""
    parsed = make_url(url)
    return Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None


def random_step() -> int:
    """By how much a revision grows: one that was set back, with a backup, never comes to stand for
    something else that way."""
    return 1 + secrets.randbelow(_LARGEST_STEP)


class Database:
    """Transactions on the database at ``url``. All methods wait, and raise StoreError.

    Of these StoreUnavailable is for what a later try may find better. The constructor opens
    nothing, and raises ConfigError.
    """

    def __init__(self, url: str, step: Callable[[], int] = random_step) -> None:
        """``step`` gives by how much a revision grows."""
        parsed = make_url(url)
        self._step = step
        self._name = _shown(parsed)
        self._file = database_file(url)
        self._is_ours = False
        # From ``open`` on.
        self._version = ""
        self._opened_file: tuple[int, int] | None = None
        try:
            if self._file is not None:
                self._engine = create_engine(parsed)
            else:
                # A server that was restarted costs nobody an error.
                self._engine = create_engine(
                    parsed, connect_args=_missing(parsed), pool_pre_ping=True
                )
        except ImportError as error:
            raise ConfigError(
                f"The database {self._name} needs a package that is missing: "
                "pip install 'vmconsole[postgresql]'."
            ) from error
        except SQLAlchemyError as error:
            raise ConfigError(f"The database {self._name} cannot be used: {error}.") from error
        if self._file is not None:
            event.listen(self._engine, "connect", self._prepare_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)

    def open(self) -> str:
        """Make the tables where there are none, and bring older ones to the newest version.

        The result says what was done; empty: nothing had to be. StoreError: they are newer.
        """
        if self._file is not None:
            _make_private(self._file)
        with self.reading() as connection:
            found = version(connection, self._name)
            check_version(found, self._name)
        self._is_ours = True
        self._engine.dispose()
        done = ""
        if found != newest_version():
            with self._transaction(write=True) as connection:
                done = upgrade(connection, self._name, self._file)
        if self._file is not None:
            self._opened_file = _identity(self._file)
        self._version = newest_version()
        return done

    def check(self) -> None:
        """Raise what ``open`` would, as far as it shows without changing anything."""
        if self._file is not None and not self._file.exists():
            return
        with self.reading() as connection:
            check_version(version(connection, self._name), self._name)

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one moment."""
        with self._transaction(write=False) as connection:
            yield connection

    @contextmanager
    def writing(self, *parts: Part) -> Iterator[Connection]:
        """A transaction, one at a time, that bumps the revisions of what it changes.

        It is rolled back on any error.
        """
        with self._transaction(write=True) as connection:
            # First, so that on PostgreSQL writers wait for each other here.
            step = self._step()
            columns = [meta.c[f"{part}_revision"] for part in ("all", *parts)]
            connection.execute(update(meta).values({each: each + step for each in columns}))
            yield connection

    def revision(self, connection: Connection, part: Part | None = None) -> int:
        """Grows with each transaction that changed something of ``part``; None: anything."""
        return int(connection.execute(select(meta.c[f"{part or 'all'}_revision"])).scalar_one())

    @contextmanager
    def _transaction(self, write: bool) -> Iterator[Connection]:
        self._check_file()
        try:
            with self._engine.connect() as plain:
                if self._file is not None:
                    plain = plain.execution_options(vmconsole_write=write)
                else:
                    # Writers wait for each other and go by what they see then.
                    level = "READ COMMITTED" if write else "REPEATABLE READ"
                    plain = plain.execution_options(isolation_level=level)
                with plain.begin():
                    self._check_version(plain)
                    yield plain
        except DBAPIError as error:
            reason = f"The database {self._name} failed: {_one_line(error.orig)}."
            raise (StoreUnavailable if _may_recover(error) else StoreError)(reason) from error
        except SQLAlchemyError as error:
            # A pool without a free connection is one: all of them hang.
            reason = f"The database {self._name} failed: {_one_line(error)}."
            raise StoreUnavailable(reason) from error

    def _check_file(self) -> None:
        # Connections would go on with the old file, and new ones mix the new one with its log.
        if self._file is None or self._opened_file is None:
            return
        now = _identity(self._file)
        if now is None:
            raise StoreUnavailable(f"The database {self._name} is gone.")
        if now != self._opened_file:
            raise StoreError(
                f"The database {self._name} was replaced by another file while it was in use: "
                f"stop the service, remove {self._file.name}-wal and {self._file.name}-shm if the "
                "new file came without them, and start it again."
            )

    def _check_version(self, connection: Connection) -> None:
        # Who does not know what was added would leave it out of what it answers.
        if self._version:
            found = connection.execute(_VERSION).scalar()
            if found != self._version:
                raise StoreError(
                    f"The database {self._name} was upgraded to version {found} meanwhile: restart "
                    "what works on it, with a vmconsole that is as new."
                )

    def _prepare_sqlite(self, connection: SQLiteConnection, _: object) -> None:
        for pragma in (
            f"busy_timeout = {_BUSY_SECONDS * 1000}",
            # A confirmed write survives a power cut.
            "synchronous = FULL",
            "foreign_keys = ON",
        ):
            _execute(connection, f"PRAGMA {pragma}")
        if self._is_ours:
            # This writes into the file.
            _execute(connection, "PRAGMA journal_mode = WAL")


def _identity(file: Path) -> tuple[int, int] | None:
    """Which file it is now; None: there is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _missing(url: URL) -> dict[str, str]:
    """The settings that the URL does not have itself."""
    return {name: value for name, value in _POSTGRESQL.items() if name not in url.query}


def _may_recover(error: DBAPIError) -> bool:
    original = error.orig
    if isinstance(original, sqlite3.Error):
        code = getattr(original, "sqlite_errorcode", 0)
        return code & 0xFF in _SQLITE_TROUBLE
    return error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)


def _one_line(error: object) -> str:
    # libpq's have several lines, with hints behind the first.
    lines = "; ".join(line.strip() for line in str(error).splitlines())
    return printable(lines, _LONGEST).rstrip(".; ")


def _shown(url: URL) -> str:
    """Without passwords, which may be among the settings, too."""
    return url.difference_update_query(_PASSWORDS).render_as_string(hide_password=True)


def _make_private(file: Path) -> None:
    """Create the file for its owner only; SQLite gives its other files the same mode."""
    try:
        make_private_directory(file.parent)
        if os.geteuid() == 0 and file.is_symlink() and file.lstat().st_uid != 0:
            # Whoever made the link would have root write into any file.
            raise StoreError(
                f"The database {file} is a symbolic link that is not root's, and root does not "
                "follow it: work on it as the user whom the service runs as."
            )
        with suppress(FileExistsError):
            descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            try:
                give_to_owner_of(file.parent, descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        raise StoreError(f"The database {file} cannot be made: {error.strerror}.") from error


def _execute(connection: SQLiteConnection, statement: str) -> None:
    # To turn to WAL takes the file alone for a moment, and SQLite does not always wait for that.
    until = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute(statement).close()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= until:
                raise
        time.sleep(_RETRY_SECONDS)


def _begin_sqlite(connection: Connection) -> None:
    # Python itself would begin only at the first write, and too late: what was read before could
    # have changed, and a transaction that turns from reading to writing may fail instead of wait.
    write = connection.get_execution_options().get("vmconsole_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
