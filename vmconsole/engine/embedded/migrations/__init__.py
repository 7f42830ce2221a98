"""How an older database becomes a newer one, by alembic; ``versions`` has one step a module."""
