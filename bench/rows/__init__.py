"""The rows of the bench, by name. A new one: a module with a ``ROW``, and its entry here."""

from __future__ import annotations

from bench.row import Row
from bench.rows import connect, echo, engine, migrate, storm

ROWS: dict[str, Row] = {
    row.name: row for row in (connect.ROW, echo.ROW, engine.ROW, migrate.ROW, storm.ROW)
}
