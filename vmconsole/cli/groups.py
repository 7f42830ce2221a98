"""``group``: users who are granted something together."""

from __future__ import annotations

import click

from vmconsole.cli.common import json_option, show, with_store
from vmconsole.cli.complete import completes, group_names, member_names, user_names
from vmconsole.engine.embedded.store import Store
from vmconsole.text import printable


@click.group()
def group() -> None:
    """Groups of users: what is granted to @GROUP, each of its members may open."""


@group.command("add")
@click.argument("name")
@with_store
def group_add(store: Store, name: str) -> None:
    """Add the group NAME, which is empty at first."""
    store.add_group(name)
    click.echo(
        f"Added group {name}. Next: vmconsole group member add {name} USER, "
        f"vmconsole grant @{name} VM"
    )


@group.command("list")
@json_option
@with_store
def group_list(store: Store, as_json: bool) -> None:
    """List the groups, with their members."""
    show(store.groups(), as_json, "name", "members", "created")


@group.command("remove")
@click.argument("name", shell_complete=completes(group_names))
@with_store
def group_remove(store: Store, name: str) -> None:
    """Remove the group NAME, with its grants. Its members stay users."""
    store.remove_group(name)
    click.echo(f"Removed group {printable(name)}.")


@group.group()
def member() -> None:
    """Who is in a group."""


@member.command("add")
@click.argument("group", shell_complete=completes(group_names))
@click.argument("user", shell_complete=completes(user_names))
@with_store
def member_add(store: Store, group: str, user: str) -> None:
    """Put USER into GROUP.

    For example: vmconsole group member add ops alice
    """
    store.add_member(group, user)
    click.echo(f"Added {user} to group {group}.")


@member.command("remove")
@click.argument("group", shell_complete=completes(group_names))
@click.argument("user", shell_complete=completes(member_names))
@with_store
def member_remove(store: Store, group: str, user: str) -> None:
    """Take USER out of GROUP."""
    store.remove_member(group, user)
    click.echo(f"Removed {user} from group {group}.")
