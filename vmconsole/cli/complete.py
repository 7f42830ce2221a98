"""What may stand where the cursor is: names out of the embedded engine's database."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import click
from click.shell_completion import CompletionItem

from vmconsole.cli.common import load_config
from vmconsole.config import Config
from vmconsole.engine.embedded.database import database_file, database_url
from vmconsole.engine.embedded.store import Store

Names = Callable[[Store, click.Context], Iterable[str]]

# Whoever pressed TAB waits for it.
_SECONDS = 2.0


def completes(
    names: Names,
) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem[str]]]:
    """For an argument's ``shell_complete``: those of ``names`` that begin as what is typed."""

    def complete(
        context: click.Context, parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        given = context.params.get(parameter.name or "")
        taken = set(given) if isinstance(given, tuple) else set()
        return [
            CompletionItem(name)
            for name in _in_time(names, context)
            if name.startswith(incomplete) and name not in taken
        ]

    return complete


def user_names(store: Store, _: click.Context) -> Iterable[str]:
    """All users."""
    return [user.name for user in store.users()]


def group_names(store: Store, _: click.Context) -> Iterable[str]:
    """All groups, without ``@``."""
    return [group.name for group in store.groups()]


def subjects(store: Store, context: click.Context) -> Iterable[str]:
    """Whom something can be granted to."""
    groups = [f"@{name}" for name in group_names(store, context)]
    return [*user_names(store, context), *groups]


def grantees(store: Store, _: click.Context) -> Iterable[str]:
    """Whom something was granted to."""
    return dict.fromkeys(grant.subject for grant in store.grants())


def granted_patterns(store: Store, context: click.Context) -> Iterable[str]:
    """What was granted to the subject on the command line."""
    subject = context.params.get("subject")
    return [grant.pattern for grant in store.grants() if grant.subject == subject]


def member_names(store: Store, context: click.Context) -> Iterable[str]:
    """Who is in the group on the command line."""
    group = context.params.get("group")
    return [name for each in store.groups() if each.name == group for name in each.members]


def key_fingerprints(store: Store, _: click.Context) -> Iterable[str]:
    """Of all keys."""
    return [key.fingerprint for key in store.keys()]


def host_names(store: Store, _: click.Context) -> Iterable[str]:
    """All hosts that were added."""
    return [host.name for host in store.hosts()]


def _in_time(names: Names, context: click.Context) -> list[str]:
    found: list[str] = []

    def look() -> None:
        try:
            config = load_config(context.params.get("config_path"))
            if _is_there(config):
                # Not opened: that would make tables, or upgrade them.
                store = Store(database_url(config))
                try:
                    found.extend(names(store, context))
                finally:
                    store.close()
        except Exception:
            # Whatever it is, the command itself will tell: here it would be in the line's way.
            found.clear()

    # A database that does not answer is left waiting: the process ends without it.
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    return [] if thread.is_alive() else found


def _is_there(config: Config) -> bool:
    if config.engine.url:
        return False
    file = database_file(database_url(config))
    return file is None or file.is_file()
