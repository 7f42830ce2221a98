"""The ``vmconsole`` command: what an administrator says to the embedded engine, and ``check``."""

from vmconsole.cli.command import main

__all__ = ["main"]
