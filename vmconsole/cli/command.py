"""The command itself, with all that it can do."""

from __future__ import annotations

from datetime import UTC, datetime

import click

from vmconsole.check import check as check_configuration
from vmconsole.cli.common import CommandGroup, with_config
from vmconsole.cli.completion import completion
from vmconsole.cli.grants import changes, grant, grants, revoke
from vmconsole.cli.groups import group
from vmconsole.cli.keys import key
from vmconsole.cli.pki import pki
from vmconsole.cli.users import user
from vmconsole.cli.vms import host, vm
from vmconsole.config import Config


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Serial consoles of virtual machines over ssh: users, keys, hosts and grants.

    What a command changes counts at once, whether the service is running or not.
    """


@main.command()
@with_config
def check(config: Config) -> None:
    """Tell what is wrong with the configuration. Exit status 1: something is."""
    findings = list(check_configuration(config, datetime.now(UTC)))
    for finding in findings:
        click.echo(f"{'ERROR' if finding.fatal else 'WARNING'}: {finding.text}", err=True)
    if any(finding.fatal for finding in findings):
        raise click.exceptions.Exit(1)
    click.echo("The configuration is good.")


for _each in (user, key, group, host, vm, grant, revoke, grants, changes, completion, pki):
    main.add_command(_each)
