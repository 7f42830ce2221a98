"""``key``: the public keys with which users log in."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Literal

import click

from vmconsole.cli.common import InputFile, drop_output, json_option, show, with_store
from vmconsole.cli.complete import completes, key_fingerprints, user_names
from vmconsole.engine.embedded.keypair import LONGEST_PASSPHRASE, generate_key_pair
from vmconsole.engine.embedded.store import Store
from vmconsole.errors import StoreError
from vmconsole.text import printable

_MAX_KEY_FILE = 1024 * 1024


@click.group()
def key() -> None:
    """The public keys with which users log in."""


@key.command("add")
@click.argument("user", shell_complete=completes(user_names))
@click.argument("file", type=InputFile())
@with_store
def key_add(store: Store, user: str, file: BinaryIO) -> None:
    """Give USER the public keys in FILE, or from standard input when FILE is ``-``.

    One a line, as authorized_keys has them. Options may stand in front: from=, expiry-time=,
    verify-required, restrict; others are refused. All keys are added, or none.

    For example: vmconsole key add alice id_ed25519.pub
    """
    content = _read(file, file.read, _MAX_KEY_FILE + 1)
    if len(content) > _MAX_KEY_FILE:
        raise StoreError(f"The file has more than {_MAX_KEY_FILE} bytes.")
    for record in store.add_keys(user, content.decode("utf-8", "replace")):
        click.echo(f"Added key {record.fingerprint} of {record.user}.")


@key.command("generate")
@click.argument("user", shell_complete=completes(user_names))
@click.option(
    "--type",
    "kind",
    type=click.Choice(["ed25519", "rsa"]),
    default="ed25519",
    help="ed25519 unless said otherwise.",
)
@click.option("--passphrase", "ask", is_flag=True, help="Encrypt it; asks for the passphrase.")
@click.option(
    "--passphrase-file",
    type=InputFile(),
    metavar="FILE",
    help="Encrypt it with FILE's first line; '-': of standard input.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write it to this file, which must be a new one.",
)
@with_store
def key_generate(
    store: Store,
    user: str,
    kind: Literal["ed25519", "rsa"],
    ask: bool,
    passphrase_file: BinaryIO | None,
    output: Path | None,
) -> None:
    """Make a key pair for USER. The private key goes to standard output, or to a new file.

    It is kept nowhere else. Unless it was written, no key is added.

    For example: vmconsole key generate alice --passphrase --output alice.key
    """
    if ask and passphrase_file:
        raise click.UsageError("Give --passphrase or --passphrase-file, not both.")
    # Nobody types a passphrase for a user who is not there.
    store.keys(user)
    with _output(output) as write:
        passphrase = b""
        if ask:
            passphrase = _ask_passphrase()
        elif passphrase_file:
            passphrase = _read_passphrase(passphrase_file)
        pair = generate_key_pair(kind, passphrase)
        [record] = store.add_keys(user, f"{pair.public} {user}", lambda: write(pair.private))
    if output:
        click.echo(f"Added key {record.fingerprint} of {record.user}.", err=True)


@key.command("list")
@click.argument("user", required=False, shell_complete=completes(user_names))
@json_option
@with_store
def key_list(store: Store, user: str | None, as_json: bool) -> None:
    """List the keys of USER, or of all users."""
    show(store.keys(user), as_json, "user", "type", "fingerprint", "comment", "created", "options")


@key.command("remove")
@click.argument("fingerprint", shell_complete=completes(key_fingerprints))
@with_store
def key_remove(store: Store, fingerprint: str) -> None:
    """Remove the key with that FINGERPRINT (SHA256).

    `vmconsole key list` shows it, and so does `ssh-keygen -l -f FILE`.
    """
    record = store.remove_key(fingerprint)
    click.echo(f"Removed key {record.fingerprint} of {record.user}.")


def _ask_passphrase() -> bytes:
    # Without a terminal getpass would read, and show, what comes on standard input.
    if not _has_terminal():
        raise StoreError(
            "There is no terminal to ask for the passphrase: give --passphrase-file FILE."
        )
    answer = click.prompt(
        "Passphrase",
        default="",
        show_default=False,
        hide_input=True,
        confirmation_prompt=True,
        err=True,
    )
    return _checked_passphrase(str(answer).encode("utf-8", "surrogateescape"), "--passphrase")


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _read_passphrase(file: BinaryIO) -> bytes:
    line = _read(file, file.readline, LONGEST_PASSPHRASE + 3)
    return _checked_passphrase(line.rstrip(b"\r\n"), "--passphrase-file")


def _checked_passphrase(passphrase: bytes, option: str) -> bytes:
    if not passphrase:
        raise StoreError(
            f"The passphrase is empty. For a private key without one, leave {option} out."
        )
    if len(passphrase) > LONGEST_PASSPHRASE:
        raise StoreError(f"The passphrase has more than {LONGEST_PASSPHRASE} bytes.")
    return passphrase


def _read(file: BinaryIO, read: Callable[[int], bytes], size: int) -> bytes:
    try:
        return read(size)
    except OSError as error:
        raise StoreError(f"{printable(file.name)} cannot be read: {error.strerror}.") from error


@contextmanager
def _output(path: Path | None) -> Iterator[Callable[[bytes], None]]:
    """What writes the private key, to stdout or a new file, which is gone if all this fails."""
    if path is None:
        if sys.stdout is None:
            raise StoreError("Standard output is closed: nobody would have the private key.")
        yield _write_to_stdout
        return
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise StoreError(
            f"{printable(str(path))} exists already, and nothing is overwritten: give --output "
            "another name."
        ) from None
    except OSError as error:
        raise _not_written(str(path), error) from error

    def write(private: bytes) -> None:
        try:
            view = memoryview(private)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        except OSError as error:
            raise _not_written(str(path), error) from error

    try:
        yield write
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise
    finally:
        os.close(descriptor)


def _write_to_stdout(private: bytes) -> None:
    try:
        click.echo(private, nl=False)
    except OSError as error:
        drop_output()
        raise _not_written("The private key", error) from error


def _not_written(what: str, error: OSError) -> StoreError:
    return StoreError(
        f"{printable(what)} could not be written: {error.strerror}. No key was added."
    )
