"""Brings a database's tables to the newest version, whole or not at all."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text

from vmconsole.errors import StoreError

_SCRIPTS = "vmconsole.engine.embedded:migrations"
# Of the databases that were made before alembic kept count.
_FIRST = "0001"
# Engines that share a PostgreSQL database begin one after the other. The number is our own.
_LOCK = "SELECT pg_advisory_xact_lock(7368617265)"


def newest_version() -> str:
    """The version that this program works with."""
    head = _scripts().get_current_head()
    assert head is not None
    return head


def version(connection: Connection, name: str) -> str:
    """The version of what is there; empty: nothing is. Raises StoreError when it is not ours."""
    current = MigrationContext.configure(connection).get_current_revision()
    tables = inspect(connection)
    names = set(tables.get_table_names()) - {"alembic_version"}
    if current is None and not names:
        return ""
    meta = {each["name"] for each in tables.get_columns("meta")} if "meta" in names else set()
    if not meta or (current is None and "schema_version" not in meta):
        raise StoreError(
            f"The database {name} has tables that are not vmconsole's: it needs one of its own. "
            "Nothing was changed."
        )
    return current or _FIRST


def check_version(found: str, name: str) -> None:
    """Raises StoreError when the database ``name`` is newer than this program."""
    known = {script.revision for script in _scripts().walk_revisions()}
    if found and found not in known:
        raise StoreError(
            f"The database {name} has version {found}, and this vmconsole knows up to "
            f"{newest_version()}: it was made by a newer vmconsole. Install that one; nothing was "
            "changed."
        )


def upgrade(connection: Connection, name: str, file: Path | None) -> str:
    """Take the steps that are missing, in ``connection``'s transaction, which writes.

    Of an SQLite ``file`` a copy is made before. The result tells what happened; empty: nothing
    had to. Raises StoreError, also when the database is a newer one.
    """
    if file is None:
        connection.execute(text(_LOCK))
    found = version(connection, name)
    check_version(found, name)
    if found == newest_version():
        return ""
    kept = ""
    if found and file is not None:
        copy = file.with_name(f"{file.name}.{found}")
        _copy(file, copy)
        kept = f"; {copy} is as it was before"
    config = _config()
    config.attributes["connection"] = connection
    if found == _FIRST and not inspect(connection).has_table("alembic_version"):
        command.stamp(config, _FIRST)
    command.upgrade(config, "head")
    if not found:
        return f"Made the database {name}"
    return f"Upgraded the database {name} from version {found} to {newest_version()}{kept}"


def _copy(file: Path, copy: Path) -> None:
    """A copy that is whole, made while nobody can write, and appears as such or not at all."""
    temporary = copy.with_name(f"{copy.name}.new")
    try:
        temporary.unlink(missing_ok=True)
        with (
            closing(sqlite3.connect(file)) as source,
            closing(sqlite3.connect(":memory:")) as target,
        ):
            source.backup(target)
            content = target.serialize()
        # SQLite would open it by its name, which may lead elsewhere: root writes here, in a
        # directory of the service's.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(temporary, flags, 0o600), "wb") as output:
            if os.geteuid() == 0:
                owner = file.stat()
                os.fchown(output.fileno(), owner.st_uid, owner.st_gid)
            output.write(content)
            output.flush()
            os.fsync(output.fileno())
        os.replace(temporary, copy)
        _sync(copy.parent)
    except (OSError, sqlite3.Error) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or error
        raise StoreError(
            f"The database {file} has to be upgraded, and no copy of it could be made: {reason}. "
            "Nothing was changed. Make room, or look at the rights of its directory."
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _config() -> AlembicConfig:
    config = AlembicConfig()
    config.set_main_option("script_location", _SCRIPTS)
    config.set_main_option("path_separator", "os")
    return config
