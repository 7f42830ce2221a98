"""``grant``, ``revoke``, ``grants``: who may open what; ``changes``: who said so."""

from __future__ import annotations

import click

from vmconsole.cli.common import json_option, show, with_store
from vmconsole.cli.complete import completes, granted_patterns, grantees, subjects
from vmconsole.engine.embedded.records import GrantRecord
from vmconsole.engine.embedded.store import Store
from vmconsole.errors import StoreError
from vmconsole.interfaces import Role
from vmconsole.text import printable

_SUBJECT = "USER|@GROUP"
# What every database takes as a limit.
_MOST = 2**31 - 1


@click.command("grant")
@click.argument("subject", metavar=_SUBJECT, shell_complete=completes(subjects))
@click.argument("vm", metavar="VM|PATTERN")
@click.option(
    "--role",
    type=click.Choice(["operator", "viewer"]),
    default="operator",
    help="What may be done there; operator unless said otherwise.",
)
@with_store
def grant(store: Store, subject: str, vm: str, role: Role) -> None:
    """Let USER, or all of @GROUP, open the console of VM.

    VM is its id, its name, or a pattern of names such as 'web*'. Put a pattern into quotes, or
    the shell expands it. An operator watches and types, a viewer only watches. To grant the same
    again changes the role.

    For example: vmconsole grant @ops 'web*' --role viewer
    """
    store.grant(subject, vm, role)
    click.echo(f"Granted {printable(vm)} to {subject} as {role}.")


@click.command("revoke")
@click.argument("subject", metavar=_SUBJECT, shell_complete=completes(grantees))
@click.argument("vm", metavar="VM|PATTERN", shell_complete=completes(granted_patterns))
@with_store
def revoke(store: Store, subject: str, vm: str) -> None:
    """Take back a grant; VM or PATTERN as it was granted.

    Sessions that only this grant allowed end soon.
    """
    store.revoke(subject, vm)
    click.echo(f"Revoked {printable(vm)} from {subject}.")


@click.command("grants")
@click.argument(
    "subject", metavar=f"[{_SUBJECT}]", required=False, shell_complete=completes(subjects)
)
@json_option
@with_store
def grants(store: Store, subject: str | None, as_json: bool) -> None:
    """List who may open what.

    Of a USER also what groups of theirs were granted.
    """
    found = store.grants()
    if subject is not None:
        found = _of(subject, found, store)
    show(found, as_json, "subject", "pattern", "role", "created")


@click.command("changes")
@click.option(
    "--last",
    type=click.IntRange(min=1, max=_MOST),
    metavar="N",
    default=50,
    help="The last N changes; 50 unless said otherwise.",
)
@json_option
@with_store
def changes(store: Store, last: int, as_json: bool) -> None:
    """List who changed what, and when: users, groups, keys, hosts and grants."""
    show(store.last_changes(last), as_json, "time", "actor", "action", "subject")


def _of(subject: str, found: list[GrantRecord], store: Store) -> list[GrantRecord]:
    groups = store.groups()
    wanted = {subject}
    if subject.startswith("@"):
        known = any(f"@{group.name}" == subject for group in groups)
    else:
        known = any(user.name == subject for user in store.users())
        wanted |= {f"@{group.name}" for group in groups if subject in group.members}
    if not known:
        kind, listing = ("group", "group list") if subject[:1] == "@" else ("user", "user list")
        raise StoreError(
            f"There is no {kind} '{printable(subject.removeprefix('@'), 80)}': "
            f"`vmconsole {listing}` shows them."
        )
    return [grant for grant in found if grant.subject in wanted]
