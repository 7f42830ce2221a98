"""The ``vmconsole`` command: what an administrator says to the embedded engine, and ``check``."""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Concatenate, Literal, NamedTuple, ParamSpec, TypeVar

import click

from vmconsole.check import check as check_configuration
from vmconsole.config import Config, default_path, load
from vmconsole.engine.embedded.database import database_url
from vmconsole.engine.embedded.keypair import generate_key_pair
from vmconsole.engine.embedded.store import HostRecord, Store
from vmconsole.engine.embedded.watch import LOCAL_HOST
from vmconsole.errors import ConfigError, StoreError, VMConsoleError
from vmconsole.hypervisor.libvirt_domains import list_domains
from vmconsole.hypervisor.libvirt_errors import host_unreachable
from vmconsole.hypervisor.libvirt_uri import host_uri
from vmconsole.interfaces import Domain
from vmconsole.text import printable

P = ParamSpec("P")
R = TypeVar("R")

_HOST_SECONDS = 10.0
_MAX_KEY_FILE = 1024 * 1024


class _Group(click.Group):
    """Says our errors in one line, on stderr."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except VMConsoleError as error:
            click.echo(f"ERROR: {error}", err=True)
            ctx.exit(1)
        except BrokenPipeError:
            raise
        except OSError as error:
            _drop_output()
            click.echo(f"ERROR: The output cannot be written: {error.strerror}.", err=True)
            ctx.exit(1)


def _drop_output() -> None:
    # What is still buffered would fail again at Python's exit, with a status of its own.
    with suppress(OSError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _with_config(command: Callable[Concatenate[Config, P], R]) -> Callable[P, R]:
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
        path = config_path or default_path(os.environ)
        return command(load(path, os.environ), *args, **kwargs)

    return configured  # type: ignore[return-value]


def _with_store(command: Callable[Concatenate[Store, P], R]) -> Callable[P, R]:
    """Adds ``--config``; the command gets the embedded engine's store, open."""

    @functools.wraps(command)
    def stored(config: Config, *args: Any, **kwargs: Any) -> R:
        with _open_store(config) as store:
            return command(store, *args, **kwargs)

    return _with_config(stored)


@contextmanager
def _open_store(config: Config) -> Iterator[Store]:
    if config.engine.url:
        raise ConfigError(
            f"engine.url is {config.engine.url}: users, keys, hosts and grants are kept there, "
            "and not by vmconsole."
        )
    store = Store(database_url(config))
    store.open()
    try:
        yield store
    finally:
        store.close()


_json_option = click.option("--json", "as_json", is_flag=True, help="Write JSON instead.")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Serial consoles of virtual machines over ssh: users, keys, hosts and grants.

    What a command changes counts within seconds, whether the service is running or not.
    """


@main.command()
@_with_config
def check(config: Config) -> None:
    """Tell what is wrong with the configuration. Exit status 1: something is."""
    findings = list(check_configuration(config, datetime.now(UTC)))
    for finding in findings:
        click.echo(f"{'ERROR' if finding.fatal else 'WARNING'}: {finding.text}", err=True)
    if any(finding.fatal for finding in findings):
        raise click.exceptions.Exit(1)
    click.echo("The configuration is good.")


@main.group()
def user() -> None:
    """Who may log in."""


@user.command("add")
@click.argument("name")
@_with_store
def user_add(store: Store, name: str) -> None:
    """Add the user NAME."""
    store.add_user(name)
    click.echo(f"Added user {name}. Next: vmconsole key add {name} FILE, vmconsole grant {name} VM")


@user.command("list")
@_json_option
@_with_store
def user_list(store: Store, as_json: bool) -> None:
    """List the users."""
    _show(store.users(), as_json, "name", "id", "created")


@user.command("remove")
@click.argument("name")
@_with_store
def user_remove(store: Store, name: str) -> None:
    """Remove the user NAME, with all keys and grants."""
    store.remove_user(name)
    click.echo(f"Removed user {printable(name)}.")


@main.group()
def key() -> None:
    """The public keys with which users log in."""


@key.command("add")
@click.argument("user")
@click.argument("file", type=click.File("rb"))
@_with_store
def key_add(store: Store, user: str, file: BinaryIO) -> None:
    """Give USER the public keys in FILE, or from standard input when FILE is ``-``."""
    content = file.read(_MAX_KEY_FILE + 1)
    if len(content) > _MAX_KEY_FILE:
        raise StoreError(f"The file has more than {_MAX_KEY_FILE} bytes.")
    for record in store.add_keys(user, content.decode("utf-8", "replace")):
        click.echo(f"Added key {record.fingerprint} of {record.user}.")


@key.command("generate")
@click.argument("user")
@click.option("--type", "kind", type=click.Choice(["ed25519", "rsa"]), default="ed25519")
@_with_store
def key_generate(store: Store, user: str, kind: Literal["ed25519", "rsa"]) -> None:
    """Make a key pair for USER: the private key goes to standard output, and nowhere else.

    For example: (umask 077; vmconsole key generate alice > alice.key)
    """
    if sys.stdout is None:
        raise StoreError("Standard output is closed: nobody would have the private key.")
    pair = generate_key_pair(kind)
    [record] = store.add_keys(user, f"{pair.public} {user}")
    try:
        click.echo(pair.private, nl=False)
    except OSError as error:
        _drop_output()
        # A key that nobody has is of no use.
        store.remove_key(record.fingerprint)
        raise StoreError(
            f"The private key could not be written: {error.strerror}. No key was added."
        ) from error


@key.command("list")
@click.argument("user", required=False)
@_json_option
@_with_store
def key_list(store: Store, user: str | None, as_json: bool) -> None:
    """List the keys of USER, or of all users."""
    _show(store.keys(user), as_json, "user", "type", "fingerprint", "comment", "created")


@key.command("remove")
@click.argument("fingerprint")
@_with_store
def key_remove(store: Store, fingerprint: str) -> None:
    """Remove the key with that FINGERPRINT (SHA256)."""
    record = store.remove_key(fingerprint)
    click.echo(f"Removed key {record.fingerprint} of {record.user}.")


@main.group()
def host() -> None:
    """The hosts whose VMs are served. Without any, it is this machine."""


@host.command("add")
@click.argument("name")
@click.argument("uri", default="")
@_with_config
def host_add(config: Config, name: str, uri: str) -> None:
    """Serve the VMs of host NAME, by libvirt's URI or by the rule of the configuration."""
    with _open_store(config) as store:
        used = _uri(HostRecord(name, uri), config)
        store.add_host(name, uri)
    click.echo(f"Added host {name}: {used}")


@host.command("list")
@_json_option
@_with_store
def host_list(store: Store, as_json: bool) -> None:
    """List the hosts. Without a URI, the rule of the configuration holds."""
    _show(store.hosts(), as_json, "name", "uri")


@host.command("remove")
@click.argument("name")
@_with_store
def host_remove(store: Store, name: str) -> None:
    """Serve the VMs of host NAME no longer."""
    store.remove_host(name)
    click.echo(f"Removed host {printable(name)}.")


@main.command("grant")
@click.argument("user")
@click.argument("vm", metavar="VM|PATTERN")
@_with_store
def grant(store: Store, user: str, vm: str) -> None:
    """Let USER open the console of VM: its id, its name, or a pattern of names such as 'web*'.

    The user can watch and type; a role that may only watch does not exist yet. Put a pattern
    into quotes, or the shell expands it.
    """
    store.grant(user, vm)
    click.echo(f"Granted {printable(vm)} to {user}.")


@main.command("revoke")
@click.argument("user")
@click.argument("vm", metavar="VM|PATTERN")
@_with_store
def revoke(store: Store, user: str, vm: str) -> None:
    """Take back a grant; VM or PATTERN as it was granted."""
    store.revoke(user, vm)
    click.echo(f"Revoked {printable(vm)} from {user}.")


@main.command("grants")
@_json_option
@_with_store
def grants(store: Store, as_json: bool) -> None:
    """List who may open what."""
    _show(store.grants(), as_json, "user", "pattern", "role", "created")


@main.group()
def vm() -> None:
    """The VMs on the hosts."""


@vm.command("list")
@_json_option
@_with_config
def vm_list(config: Config, as_json: bool) -> None:
    """List the VMs of all hosts, asking each host's libvirt. Exit status 1: one did not answer."""
    with _open_store(config) as store:
        hosts = store.hosts() or [HostRecord(*item) for item in LOCAL_HOST.items()]
    listings = _ask_hosts(hosts, config)
    vms = [_VM.of(domain, each.host) for each in listings for domain in each.domains]
    _show(vms, as_json, *_VM._fields)
    for listing in listings:
        if listing.error:
            click.echo(f"ERROR: {listing.error}", err=True)
    if any(listing.error for listing in listings):
        raise click.exceptions.Exit(1)


class _VM(NamedTuple):
    name: str
    id: str
    host: str
    state: str
    problem: str

    @classmethod
    def of(cls, domain: Domain, host: str) -> _VM:
        return cls(domain.name, domain.id, host, domain.state.value, domain.console_problem)


class _Listing(NamedTuple):
    host: str
    domains: Sequence[Domain] = ()
    error: str = ""


def _ask_hosts(hosts: Sequence[HostRecord], config: Config) -> list[_Listing]:
    """What stands on each host; all are asked at once, and each answers in time or not at all."""
    answers: dict[str, _Listing] = {}

    def ask(host: HostRecord) -> None:
        answers[host.name] = _ask_host(host, config)

    # A call into libvirt cannot be cancelled: the process ends without these.
    threads = [threading.Thread(target=ask, args=[host], daemon=True) for host in hosts]
    for thread in threads:
        thread.start()
    end = time.monotonic() + _HOST_SECONDS
    for thread in threads:
        thread.join(max(0, end - time.monotonic()))
    silent = f"gave no answer within {_HOST_SECONDS:g} seconds."
    return [
        answers.get(name) or _Listing(name, error=f"{printable(name)} {silent}")
        for name in (host.name for host in hosts)
    ]


def _ask_host(host: HostRecord, config: Config) -> _Listing:
    import libvirt

    # Else libvirt writes each error to stderr itself.
    libvirt.registerErrorHandler(lambda context, error: None, None)
    try:
        connection = libvirt.open(_uri(host, config))
        try:
            return _Listing(host.name, list_domains(connection))
        finally:
            connection.close()
    except ConfigError as error:
        return _Listing(host.name, error=str(error))
    except libvirt.libvirtError as error:
        problem = host_unreachable(error, host.name, config.hosts.pki)
        return _Listing(host.name, error=str(problem))


def _uri(host: HostRecord, config: Config) -> str:
    return host_uri(host.name, host.uri, config.hosts)


def _show(records: Sequence[object], as_json: bool, *names: str) -> None:
    """These attributes of the records: a table with a heading, or JSON."""
    rows = [{name: _text(getattr(record, name)) for name in names} for record in records]
    if as_json:
        # It escapes whatever is not ASCII.
        click.echo(json.dumps(rows, indent=4))
    elif rows:
        table = [[name.upper() for name in names]]
        table += [[printable(value) for value in row.values()] for row in rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for line in table:
            cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            click.echo("  ".join(cells).rstrip())


def _text(value: str | int) -> str:
    # The only numbers are times.
    return value if isinstance(value, str) else f"{datetime.fromtimestamp(value, UTC):%FT%TZ}"
