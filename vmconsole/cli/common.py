"""What the commands share: the configuration, the store, errors, and how something is listed."""

from __future__ import annotations

import functools
import json
import os
import pwd
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Concatenate, ParamSpec, TypeVar

import click

from vmconsole.config import Config, default_path, load
from vmconsole.engine.embedded.database import database_url
from vmconsole.engine.embedded.store import Store
from vmconsole.errors import ConfigError, StoreError, VMConsoleError
from vmconsole.text import printable

P = ParamSpec("P")
R = TypeVar("R")

_LONGEST_NAME = 64
_TIMES = ("created", "time")


class CommandGroup(click.Group):
    """Says our errors in one line, on stderr."""

    def invoke(self, ctx: click.Context) -> Any:
        """See click.Group."""
        try:
            return super().invoke(ctx)
        except VMConsoleError as error:
            click.echo(f"ERROR: {error}", err=True)
            ctx.exit(1)
        except BrokenPipeError:
            raise
        except OSError as error:
            drop_output()
            click.echo(f"ERROR: The output cannot be written: {error.strerror}.", err=True)
            ctx.exit(1)


class InputFile(click.File):
    """A file to read, in bytes. Standard input, ``-``, may be closed: that is an error of ours."""

    def __init__(self) -> None:
        super().__init__("rb")

    def convert(
        self,
        value: str | os.PathLike[str] | IO[Any],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> IO[Any]:
        """See click.ParamType. Raises StoreError."""
        if value == "-" and sys.stdin is None:
            raise StoreError("Standard input is closed: there is nothing to read from '-'.")
        return super().convert(value, param, ctx)


def drop_output() -> None:
    """After stdout has failed."""
    # What is still buffered would fail again at Python's exit, with a status of its own.
    with suppress(OSError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def with_config(command: Callable[Concatenate[Config, P], R]) -> Callable[P, R]:
    """Adds ``--config``; the command gets what it says."""

    @click.option(
        "--config",
        "config_path",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="The configuration; default: $VMCONSOLE_CONFIG, /etc/vmconsole/vmconsole.toml, none.",
    )
    @functools.wraps(command)
    def configured(*args: Any, config_path: Path | None, **kwargs: Any) -> R:
        return command(load_config(config_path), *args, **kwargs)

    return configured  # type: ignore[return-value]


def load_config(path: Path | None) -> Config:
    """The configuration in ``path``, or the one in effect. Raises ConfigError."""
    return load(path or default_path(os.environ), os.environ)


def with_store(command: Callable[Concatenate[Store, P], R]) -> Callable[P, R]:
    """Adds ``--config``; the command gets the embedded engine's store, open."""

    @functools.wraps(command)
    def stored(config: Config, *args: Any, **kwargs: Any) -> R:
        with open_store(config) as store:
            return command(store, *args, **kwargs)

    return with_config(stored)


@contextmanager
def open_store(config: Config) -> Iterator[Store]:
    """The embedded engine's store. That its database was upgraded is said on stderr."""
    refuse_remote(config)
    store = Store(database_url(config), actor=actor())
    try:
        done = store.open()
        # That there is one from now on is nothing to tell: it was asked to keep something.
        if done and not done.startswith("Made"):
            click.echo(f"NOTE: {done}.", err=True)
        yield store
    finally:
        store.close()


def refuse_remote(config: Config) -> None:
    """Raise ConfigError when the engine is another one than ours."""
    if config.engine.url:
        raise ConfigError(
            f"engine.url is {config.engine.url}: users, keys, hosts and grants are kept there, "
            "and not by vmconsole."
        )


def actor() -> str:
    """Who runs this, for the record of changes, which escapes it: ``root (sudo by alice)``."""
    uid = os.getuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = f"uid {uid}"
    invoker = os.environ.get("SUDO_USER", "")[:_LONGEST_NAME]
    return f"{name[:_LONGEST_NAME]} (sudo by {invoker})" if invoker else name


json_option = click.option("--json", "as_json", is_flag=True, help="Write JSON instead.")


def show(records: Sequence[object], as_json: bool, *names: str) -> None:
    """These attributes of the records: a table with a heading, or JSON."""
    rows = [{name: _value(name, getattr(record, name)) for name in names} for record in records]
    if as_json:
        # It escapes whatever is not ASCII.
        click.echo(json.dumps(rows, indent=4))
    elif rows:
        table = [[name.upper() for name in names]]
        table += [[_cell(value) for value in row.values()] for row in rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for line in table:
            cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            click.echo("  ".join(cells).rstrip())


def _value(name: str, value: Any) -> Any:
    return f"{datetime.fromtimestamp(value, UTC):%FT%TZ}" if name in _TIMES else value


def _cell(value: Any) -> str:
    return printable(value) if isinstance(value, str) else ", ".join(map(printable, value))
