"""Users, their keys and grants; hosts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """The tables of the first version, and its one row of ``meta``."""
    meta = op.create_table(
        "meta",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("schema_version", sa.Integer, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "users",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("name", sa.String(64), nullable=False, unique=True),
        sa.Column("created", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "keys",
        sa.Column("fingerprint", sa.String(64), primary_key=True),
        sa.Column("user_id", sa.String(36), _user(), nullable=False, index=True),
        sa.Column("type", sa.String(64), nullable=False),
        sa.Column("blob", sa.LargeBinary, nullable=False),
        sa.Column("comment", sa.Text, nullable=False),
        sa.Column("created", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "hosts",
        sa.Column("name", sa.String(253), primary_key=True),
        sa.Column("uri", sa.String(1024), nullable=False),
    )
    op.create_table(
        "grants",
        sa.Column("user_id", sa.String(36), _user(), primary_key=True),
        sa.Column("pattern", sa.String(255), primary_key=True),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("created", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(meta, [{"id": 1, "schema_version": 1, "revision": 0}])


def _user() -> sa.ForeignKey:
    return sa.ForeignKey("users.id", ondelete="CASCADE")
