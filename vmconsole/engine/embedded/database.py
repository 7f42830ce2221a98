"""The tables, and transactions on them whose failures are StoreErrors."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from sqlite3 import Connection as SQLiteConnection

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from vmconsole.config import Config
from vmconsole.errors import ConfigError, StoreError

SCHEMA_VERSION = 1
_BUSY_SECONDS = 10
_RETRY_SECONDS = 0.01

metadata = MetaData()
meta = Table(
    "meta",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("schema_version", Integer, nullable=False),
    Column("revision", BigInteger, nullable=False),
)
users = Table(
    "users",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("created", BigInteger, nullable=False),
)
keys = Table(
    "keys",
    metadata,
    Column("fingerprint", String(64), primary_key=True),
    Column("user_id", ForeignKey(users.c.id, ondelete="CASCADE"), nullable=False, index=True),
    Column("type", String(64), nullable=False),
    Column("blob", LargeBinary, nullable=False),
    Column("comment", Text, nullable=False),
    Column("created", BigInteger, nullable=False),
)
hosts = Table(
    "hosts",
    metadata,
    Column("name", String(253), primary_key=True),
    Column("uri", String(1024), nullable=False),
)
grants = Table(
    "grants",
    metadata,
    Column("user_id", ForeignKey(users.c.id, ondelete="CASCADE"), primary_key=True),
    Column("pattern", String(255), primary_key=True),
    Column("role", String(16), nullable=False),
    Column("created", BigInteger, nullable=False),
)


def database_url(config: Config) -> str:
    """``engine.embedded.database``, an SQLite file's relative path below the state directory.

    Raises ConfigError.
    """
    try:
        url = make_url(config.engine.embedded.database)
    except ArgumentError as error:
        raise ConfigError(
            "engine.embedded.database is no URL such as sqlite:///engine.db."
        ) from error
    if url.get_backend_name() == "sqlite":
        if not url.database or url.database == ":memory:":
            raise ConfigError("engine.embedded.database names no file: sqlite:///engine.db does.")
        url = url.set(database=str(config.path(url.database)))
    return url.render_as_string(hide_password=False)


def database_file(url: str) -> Path | None:
    """The SQLite file of a URL; None: it is not SQLite's."""
    parsed = make_url(url)
    return Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None


class Database:
    """Transactions on the database at ``url``. All methods wait, and raise StoreError.

    The constructor opens nothing, and raises ConfigError.
    """

    def __init__(self, url: str) -> None:
        self._name = make_url(url).render_as_string(hide_password=True)
        self._file = database_file(url)
        try:
            self._engine = create_engine(url)
        except (ImportError, SQLAlchemyError) as error:
            raise ConfigError(f"The database {self._name} cannot be used: {error}.") from error
        if self._file is not None:
            event.listen(self._engine, "connect", _prepare_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)

    def open(self) -> None:
        """Make the file and the tables where there are none."""
        if self._file is not None:
            _make_private(self._file)
        with self.reading() as connection:
            if inspect(connection).has_table(meta.name):
                self._check_version(connection)
                return
        with self._transaction(write=True) as connection:
            # Another process may have been faster.
            metadata.create_all(connection)
            if connection.execute(select(meta.c.id)).first() is None:
                connection.execute(
                    insert(meta).values(id=1, schema_version=SCHEMA_VERSION, revision=0)
                )

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one moment."""
        with self._transaction(write=False) as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction, one at a time, that bumps the revision; rolled back on any error."""
        with self._transaction(write=True) as connection:
            # First, so that on PostgreSQL writers wait for each other here.
            connection.execute(update(meta).values(revision=meta.c.revision + 1))
            yield connection

    def revision(self, connection: Connection) -> int:
        """Counts the transactions that wrote."""
        return int(connection.execute(select(meta.c.revision)).scalar_one())

    @contextmanager
    def _transaction(self, write: bool) -> Iterator[Connection]:
        try:
            with (
                self._engine.connect() as plain,
                plain.execution_options(vmconsole_write=write) as connection,
                connection.begin(),
            ):
                yield connection
        except DBAPIError as error:
            raise StoreError(f"The database {self._name} failed: {error.orig}.") from error
        except SQLAlchemyError as error:
            raise StoreError(f"The database {self._name} failed: {error}.") from error

    def _check_version(self, connection: Connection) -> None:
        version = connection.execute(select(meta.c.schema_version)).scalar_one()
        if version != SCHEMA_VERSION:
            raise StoreError(
                f"The database {self._name} has schema version {version}, and this vmconsole "
                f"knows {SCHEMA_VERSION}: it was made by another version of vmconsole."
            )


def _make_private(file: Path) -> None:
    """Create the file for its owner only; SQLite gives its other files the same mode."""
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            if os.geteuid() == 0:
                # The command may run as root, and the service as the directory's owner.
                owner = file.parent.stat()
                os.chown(file, owner.st_uid, owner.st_gid)
    except OSError as error:
        raise StoreError(f"The database {file} cannot be made: {error.strerror}.") from error


def _prepare_sqlite(connection: SQLiteConnection, _: object) -> None:
    for pragma in (
        f"busy_timeout = {_BUSY_SECONDS * 1000}",
        "journal_mode = WAL",
        # A confirmed write survives a power cut.
        "synchronous = FULL",
        "foreign_keys = ON",
    ):
        _execute(connection, f"PRAGMA {pragma}")


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
