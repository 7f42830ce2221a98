"""The tables, as the newest migration leaves them."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.types import TypeEngine


def text(length: int | None = None) -> TypeEngine[str]:
    """A column's type that sorts by code points in every database, as SQLite does by itself."""
    kind = String if length else Text
    return kind(length).with_variant(kind(length, collation="C"), "postgresql")


# BIGSERIAL there; SQLite numbers by itself only what it calls INTEGER.
_serial = BigInteger().with_variant(Integer, "sqlite")

metadata = MetaData()
# One row. Each revision grows with the transactions that changed what its name says.
meta = Table(
    "meta",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("all_revision", BigInteger, nullable=False),
    Column("keys_revision", BigInteger, nullable=False, server_default="0"),
    Column("access_revision", BigInteger, nullable=False, server_default="0"),
    Column("hosts_revision", BigInteger, nullable=False, server_default="0"),
)
users = Table(
    "users",
    metadata,
    Column("id", text(36), primary_key=True),
    Column("name", text(64), nullable=False, unique=True),
    Column("created", BigInteger, nullable=False),
)
groups = Table(
    "groups",
    metadata,
    Column("id", text(36), primary_key=True),
    Column("name", text(64), nullable=False, unique=True),
    Column("created", BigInteger, nullable=False),
)
members = Table(
    "members",
    metadata,
    Column("group_id", ForeignKey(groups.c.id, ondelete="CASCADE"), primary_key=True),
    Column("user_id", ForeignKey(users.c.id, ondelete="CASCADE"), primary_key=True, index=True),
)
keys = Table(
    "keys",
    metadata,
    Column("fingerprint", text(64), primary_key=True),
    Column("user_id", ForeignKey(users.c.id, ondelete="CASCADE"), nullable=False, index=True),
    Column("type", text(64), nullable=False),
    Column("blob", LargeBinary, nullable=False),
    Column("comment", text(), nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("options", text(), nullable=False, server_default=""),
)
hosts = Table(
    "hosts",
    metadata,
    Column("name", text(253), primary_key=True),
    Column("uri", text(1024), nullable=False),
)
grants = Table(
    "grants",
    metadata,
    Column("id", _serial, primary_key=True),
    Column("user_id", ForeignKey(users.c.id, ondelete="CASCADE")),
    Column("group_id", ForeignKey(groups.c.id, ondelete="CASCADE")),
    Column("pattern", text(255), nullable=False),
    Column("role", text(16), nullable=False),
    Column("created", BigInteger, nullable=False),
    CheckConstraint("(user_id IS NULL) <> (group_id IS NULL)", name="grants_subject"),
    CheckConstraint("role IN ('operator', 'viewer')", name="grants_role"),
    UniqueConstraint("user_id", "pattern", name="grants_user_pattern"),
    UniqueConstraint("group_id", "pattern", name="grants_group_pattern"),
)
# Who changed what, and when: written in the transaction of the change itself.
changes = Table(
    "changes",
    metadata,
    Column("id", _serial, primary_key=True),
    Column("time", BigInteger, nullable=False),
    Column("actor", text(255), nullable=False),
    Column("action", text(32), nullable=False),
    Column("subject", text(), nullable=False),
    sqlite_autoincrement=True,
)
