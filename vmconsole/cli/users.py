"""``user``: who may log in."""

from __future__ import annotations

import click

from vmconsole.cli.common import json_option, show, with_store
from vmconsole.cli.complete import completes, user_names
from vmconsole.engine.embedded.store import Store
from vmconsole.text import printable


@click.group()
def user() -> None:
    """Who may log in."""


@user.command("add")
@click.argument("name")
@with_store
def user_add(store: Store, name: str) -> None:
    """Add the user NAME."""
    store.add_user(name)
    click.echo(f"Added user {name}. Next: vmconsole key add {name} FILE, vmconsole grant {name} VM")


@user.command("list")
@json_option
@with_store
def user_list(store: Store, as_json: bool) -> None:
    """List the users."""
    show(store.users(), as_json, "name", "id", "created")


@user.command("remove")
@click.argument("name", shell_complete=completes(user_names))
@with_store
def user_remove(store: Store, name: str) -> None:
    """Remove the user NAME, with all keys, grants and memberships of groups.

    Sessions that are open end soon.
    """
    store.remove_user(name)
    click.echo(f"Removed user {printable(name)}.")
