"""Groups, options of keys, grants to groups, a record of changes, and a revision for each part."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.types import TypeEngine

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Nothing of what is there is lost."""
    _sort_by_code_points()
    op.create_table(
        "groups",
        sa.Column("id", _text(36), primary_key=True),
        sa.Column("name", _text(64), nullable=False, unique=True),
        sa.Column("created", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "members",
        sa.Column("group_id", _text(36), _reference("groups"), primary_key=True),
        sa.Column("user_id", _text(36), _reference("users"), primary_key=True, index=True),
    )
    op.add_column("keys", sa.Column("options", _text(), nullable=False, server_default=""))
    op.create_table(
        "changes",
        sa.Column("id", _serial(), primary_key=True),
        sa.Column("time", sa.BigInteger, nullable=False),
        sa.Column("actor", _text(255), nullable=False),
        sa.Column("action", _text(32), nullable=False),
        sa.Column("subject", _text(), nullable=False),
        sqlite_autoincrement=True,
    )
    _make_grants()
    for name in ("keys_revision", "access_revision", "hosts_revision"):
        op.add_column("meta", sa.Column(name, sa.BigInteger, nullable=False, server_default="0"))
    # A service of the former version that still runs would serve keys without their options: like
    # this it fails instead.
    op.execute("ALTER TABLE meta RENAME COLUMN revision TO all_revision")
    # Alembic's own table has it from now on.
    op.drop_column("meta", "schema_version")


def _make_grants() -> None:
    op.rename_table("grants", "old_grants")
    # PostgreSQL's name for the primary key stays with the old table, else.
    op.create_table(
        "grants",
        sa.Column("id", _serial()),
        sa.Column("user_id", _text(36), _reference("users")),
        sa.Column("group_id", _text(36), _reference("groups")),
        sa.Column("pattern", _text(255), nullable=False),
        sa.Column("role", _text(16), nullable=False),
        sa.Column("created", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="grants_id"),
        sa.CheckConstraint("(user_id IS NULL) <> (group_id IS NULL)", name="grants_subject"),
        sa.CheckConstraint("role IN ('operator', 'viewer')", name="grants_role"),
        sa.UniqueConstraint("user_id", "pattern", name="grants_user_pattern"),
        sa.UniqueConstraint("group_id", "pattern", name="grants_group_pattern"),
    )
    columns = "user_id, pattern, role, created"
    op.execute(f"INSERT INTO grants ({columns}) SELECT {columns} FROM old_grants")
    op.drop_table("old_grants")


def _sort_by_code_points() -> None:
    if op.get_bind().dialect.name != "postgresql":
        return
    for table, column, kind in (
        ("users", "id", "varchar(36)"),
        ("users", "name", "varchar(64)"),
        ("keys", "fingerprint", "varchar(64)"),
        ("keys", "user_id", "varchar(36)"),
        ("keys", "type", "varchar(64)"),
        ("keys", "comment", "text"),
        ("hosts", "name", "varchar(253)"),
        ("hosts", "uri", "varchar(1024)"),
    ):
        op.execute(f'ALTER TABLE {table} ALTER {column} TYPE {kind} COLLATE "C"')


def _text(length: int | None = None) -> TypeEngine[str]:
    kind = sa.String if length else sa.Text
    return kind(length).with_variant(kind(length, collation="C"), "postgresql")


def _serial() -> TypeEngine[int]:
    return sa.BigInteger().with_variant(sa.Integer, "sqlite")


def _reference(table: str) -> sa.ForeignKey:
    return sa.ForeignKey(f"{table}.id", ondelete="CASCADE")
