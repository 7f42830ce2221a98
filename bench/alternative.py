"""The alternative: OpenSSH's sshd, whose forced command execs ``virsh console``."""

from __future__ import annotations

import os
import pwd
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from bench import processes
from bench.lists import VM, menu
from bench.server import ADDRESS, free_port, output, program
from bench.side import Access, Side
from vmconsole.ssh.algorithms import KEX

_SUBREAPER = Path(__file__).with_name("subreaper.py")
# Seconds until the processes of a connection that ended must be gone.
_SETTLE = 5.0

# What it does not need is off. The key exchange is what ours offers: that of OpenSSH 9.2 with
# sntrup761 takes 0.1 s longer. Ciphers are OpenSSH's own. Keepalives are those of vmconsole.
_SSHD_CONFIG = """\
ListenAddress {address}
Port {port}
HostKey {host_key}
KexAlgorithms {kex}
PidFile none
UsePAM no
UseDNS no
PermitRootLogin no
AllowUsers {user}
PubkeyAuthentication yes
PasswordAuthentication no
KbdInteractiveAuthentication no
AuthenticationMethods publickey
AuthorizedKeysFile none
AuthorizedKeysCommand {grep} {options} -- %k {keys}
AuthorizedKeysCommandUser {lookup_user}
DisableForwarding yes
PermitUserRC no
PermitUserEnvironment no
PrintMotd no
PrintLastLog no
Compression no
MaxStartups 100
ClientAliveInterval 10
ClientAliveCountMax 3
{forced}"""

# Run by the account's shell as ``-c``, which the exec replaces: no process but virsh is left.
_FORCED_COMMAND = (
    "case $SSH_ORIGINAL_COMMAND in ''|-*|*[!A-Za-z0-9._-]*) echo 'Which VM?'; exit 1;; esac; "
    "exec {console} $SSH_ORIGINAL_COMMAND"
)
# Besides: without a name a menu, whose answer is the number of a line, and a word for info.
_FORCED_MENU = (
    "case $SSH_ORIGINAL_COMMAND in "
    "info) echo sshd; exit;; "
    "'') cat {menu}; printf '> '; read -r n; case $n in ''|*[!0-9]*) exit;; esac; "
    'set -- $(sed -n "$n"p {menu});; '
    "-*|*[!A-Za-z0-9._-]*) echo 'Which VM?'; exit 1;; "
    "*) set -- 1. $SSH_ORIGINAL_COMMAND;; "
    "esac; exec {console} $2"
)

# As root: an account of its own without a change to the machine, and no trace in its logins.
_ACCOUNT = "console"
# virsh starts a polkit agent for each terminal, where there is one: a gateway needs no polkit.
_NAMESPACE = """\
set -e
mount --bind "$1" /etc/passwd
[ ! -e /usr/bin/pkttyagent ] || mount --bind /dev/null /usr/bin/pkttyagent
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/sshd
mount -t tmpfs tmpfs /var/log
shift
exec "$@"
"""


class Alternative(Side):
    """An sshd apart from the machine's own.

    As root it has an account for its users, whose shell is /bin/sh; otherwise it can only log in
    the account that runs the bench.
    """

    label = "sshd + virsh"
    attached = b"Escape character is ^] (Ctrl + ])\r\n"
    leave = b"\x1d"
    _grep_options = "-hF"

    def __init__(self, directory: Path, uri: str, pki: Path, key: Path) -> None:
        """``uri`` is libvirt's of the host; ``pki`` has the certificate for it; ``key`` is the
        private key of the user, as on our side. Raises BenchError."""
        super().__init__()
        own = pwd.getpwuid(os.geteuid())
        self._as_root = own.pw_uid == 0
        self._directory = directory
        self._config = directory / "sshd_config"
        self._keys = directory / "keys"
        self._passwd = directory / "passwd"
        user = _ACCOUNT if self._as_root else own.pw_name
        self.access = Access(user, free_port(), key, directory / "known_hosts")
        self._copy_pki(pki)

        host_key = directory / "ssh_host_ed25519_key"
        output("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(host_key))
        public = host_key.with_suffix(".pub").read_text()
        self.access.known_hosts.write_text(f"[{ADDRESS}]:{self.access.port} {public}")

        uri = f"{uri.partition('?')[0]}?pkipath={quote(str(directory / 'pki'))}"
        forced = self._write_keys(
            output("ssh-keygen", "-y", "-f", str(key)),
            f"{program('virsh')} -c '{uri}' console --safe",
        )
        self._config.write_text(
            _SSHD_CONFIG.format(
                address=ADDRESS,
                port=self.access.port,
                host_key=host_key,
                kex=_kex(),
                grep=program("grep"),
                options=self._grep_options,
                keys=self._keys,
                lookup_user="nobody" if self._as_root else user,
                user=user,
                forced=forced,
            )
        )

    def start(self) -> None:
        """Start it, and wait until it serves. Raises BenchError."""
        command = [program("sshd"), "-D", "-e", "-f", str(self._config)]
        if self._as_root:
            namespace = ["unshare", "--mount", "sh", "-c", _NAMESPACE, "sh", str(self._passwd)]
            command = [*namespace, *command]
        command = [sys.executable, "-I", str(_SUBREAPER), *command]
        self._spawn(command, self._directory / "log", self._directory, dict(os.environ))

    def configuration(self) -> str:
        shell = "/bin/sh" if self._as_root else pwd.getpwuid(os.geteuid()).pw_shell
        return (
            f"# sshd_config; the shell of {self.access.user} is {shell}\n"
            f"{self._config.read_text()}\n# {self._keys}\n{self._keys.read_text()}"
        )

    def settle(self) -> None:
        deadline = time.monotonic() + _SETTLE
        while len(processes.tree(self.pid)) > 1 and time.monotonic() < deadline:
            time.sleep(0.02)

    def _write_keys(self, user_key: str, console: str) -> str:
        """Write who may log in; what that takes in sshd_config. ``console`` and the name of a VM
        are the command for its console."""
        forced = _FORCED_COMMAND.format(console=console)
        self._keys.write_text(f'restrict,pty,command="{forced}" {user_key}')
        return ""

    def _copy_pki(self, pki: Path) -> None:
        """Give the account a copy of the client's certificate, and as root make the account."""
        copy = self._directory / "pki"
        shutil.copytree(pki, copy)
        if not self._as_root:
            return
        known = {entry.pw_uid for entry in pwd.getpwall()}
        uid = next(uid for uid in range(64900, 65500) if uid not in known)
        line = f"{_ACCOUNT}:x:{uid}:{uid}::/:/bin/sh\n"
        self._passwd.write_text(Path("/etc/passwd").read_text() + line)
        for path in (copy, *copy.iterdir()):
            os.chown(path, uid, uid)


class AlternativeWithLists(Alternative):
    """With many keys and a menu, all in files, and nobody who is asked for rights."""

    # The first one that is found will do.
    _grep_options = "-hFm1"

    def __init__(
        self,
        directory: Path,
        uri: str,
        pki: Path,
        key: Path,
        keys: Sequence[str],
        listed: Sequence[VM],
    ) -> None:
        """``keys`` are the lines of the file of keys, the user's among them."""
        self._menu = directory / "menu"
        self._lines = keys
        self._listed = listed
        super().__init__(directory, uri, pki, key)

    def configuration(self) -> str:
        return self._config.read_text()

    def _write_keys(self, user_key: str, console: str) -> str:
        # With the command in each line of many there would be more to look through.
        self._keys.write_text("".join(f"restrict,pty {line}\n" for line in self._lines))
        self._menu.write_text(menu(self._listed))
        return f"ForceCommand {_FORCED_MENU.format(menu=self._menu, console=console)}\n"


def _kex() -> str:
    """The key exchanges that ours offers, as far as OpenSSH knows them."""
    known = output("ssh", "-Q", "kex").split()
    return ",".join(name.decode() for name in KEX if name.decode() in known)
