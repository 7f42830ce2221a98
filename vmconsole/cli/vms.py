"""``host`` and ``vm``: the hosts, and what stands on them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import click

from vmconsole.cli.common import json_option, open_store, show, with_config, with_store
from vmconsole.cli.complete import completes, host_names
from vmconsole.config import Config
from vmconsole.engine.embedded.records import HostRecord
from vmconsole.engine.embedded.store import Store
from vmconsole.engine.embedded.watch import LOCAL_HOST
from vmconsole.errors import ConfigError
from vmconsole.hypervisor.libvirt_domains import list_domains
from vmconsole.hypervisor.libvirt_errors import host_unreachable
from vmconsole.hypervisor.libvirt_uri import host_uri
from vmconsole.interfaces import Domain
from vmconsole.text import printable

_HOST_SECONDS = 10.0


@click.group()
def host() -> None:
    """The hosts whose VMs are served. Without any, it is this machine."""


@host.command("add")
@click.argument("name")
@click.argument("uri", default="")
@with_config
def host_add(config: Config, name: str, uri: str) -> None:
    """Serve the VMs of host NAME, by libvirt's URI or by the rule of the configuration."""
    with open_store(config) as store:
        used = _uri(HostRecord(name, uri), config)
        store.add_host(name, uri)
    click.echo(f"Added host {name}: {used}")


@host.command("list")
@json_option
@with_store
def host_list(store: Store, as_json: bool) -> None:
    """List the hosts. Without a URI, the rule of the configuration holds."""
    show(store.hosts(), as_json, "name", "uri")


@host.command("remove")
@click.argument("name", shell_complete=completes(host_names))
@with_store
def host_remove(store: Store, name: str) -> None:
    """Serve the VMs of host NAME no longer."""
    store.remove_host(name)
    click.echo(f"Removed host {printable(name)}.")


@click.group()
def vm() -> None:
    """The VMs on the hosts."""


@vm.command("list")
@json_option
@with_config
def vm_list(config: Config, as_json: bool) -> None:
    """List the VMs of all hosts, asking each host's libvirt. Exit status 1: one did not answer."""
    with open_store(config) as store:
        hosts = store.hosts() or [HostRecord(*item) for item in LOCAL_HOST.items()]
    listings = _ask_hosts(hosts, config)
    vms = [_VM.of(domain, each.host) for each in listings for domain in each.domains]
    show(vms, as_json, *_VM._fields)
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
