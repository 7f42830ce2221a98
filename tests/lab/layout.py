"""The folder of a lab host: configuration, certificates, and what was learnt of QEMU before."""

from __future__ import annotations

import os
import random
import shutil
import socket
from datetime import UTC, datetime
from pathlib import Path

from tests.lab.errors import LabError
from vmconsole import pki

ADDRESS = "127.0.0.1"
# Below where the kernel takes ports for outgoing connections: a stopped daemon finds its port free.
_PORTS = range(20000, 32000)
# The host's own /etc/libvirt, /run and /var: see init.py.
_FOLDERS = ("etc/libvirt", "run/lock", "run/libvirt", "var/lib", "var/tmp", "var/log")
_CAPABILITIES = "var/cache/libvirt/qemu/capabilities"

# libvirt does not start without the user and group it was built for (Debian's, Ubuntu's), though
# qemu.conf names others. The package that makes them is also the one that starts the machine's own
# libvirtd: we do without it, and the host has an /etc/passwd and /etc/group of its own.
_ACCOUNTS = {
    "passwd": ("libvirt-qemu:x:64055:64055::/:/usr/sbin/nologin",),
    "group": ("libvirt-qemu:x:64055:", "kvm:x:64056:"),
}

_LIBVIRTD_CONF = """\
listen_tls = 1
listen_tcp = 0
listen_addr = "{address}"
tls_port = "{port}"
key_file = "{tls}/serverkey.pem"
cert_file = "{tls}/servercert.pem"
ca_file = "{tls}/cacert.pem"
auth_tls = "none"
auth_unix_rw = "none"
host_uuid = "{uuid}"
max_clients = 5000
max_anonymous_clients = 1000
"""
_QEMU_CONF = """\
user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
namespaces = []
dynamic_ownership = 0
remember_owner = 0
stdio_handler = "file"
"""


def lay_out(directory: Path, name: str, authority: pki.Identity) -> None:
    """Make the folders, QEMU's configuration and the certificates. Raises OSError."""
    for folder in (*_FOLDERS, _CAPABILITIES, "pki", "tls", "images"):
        (directory / folder).mkdir(parents=True)
    (directory / "var/run").symlink_to("/run")
    (directory / "var/lock").symlink_to("/run/lock")
    (directory / "etc/libvirt/qemu.conf").write_text(_QEMU_CONF)
    for file, accounts in _ACCOUNTS.items():
        lines = Path("/etc", file).read_text().splitlines()
        known = {line.split(":")[0] for line in lines}
        lines += [account for account in accounts if account.split(":")[0] not in known]
        (directory / "etc" / file).write_text("\n".join(lines) + "\n")
    now = datetime.now(UTC)
    server = pki.issue(authority, name, "server", now, ["localhost", ADDRESS, name], key_size=2048)
    client = pki.issue(authority, "vmconsole lab", "client", now, key_size=2048)
    for identity, kind, folder in ((server, "server", "tls"), (client, "client", "pki")):
        target = directory / folder
        identity.save(target / f"{kind}cert.pem", target / f"{kind}key.pem")
        (target / "cacert.pem").write_bytes(authority.certificate_pem())


def configure(directory: Path, port: int, uuid: str) -> None:
    """Write the daemon's configuration. Raises OSError."""
    text = _LIBVIRTD_CONF.format(address=ADDRESS, port=port, tls=directory / "tls", uuid=uuid)
    (directory / "etc/libvirt/libvirtd.conf").write_text(text)


def restore_capabilities(directory: Path, cache: Path) -> None:
    """Give a new host what an earlier one learnt of QEMU, which saves it the probing.

    libvirt compares what it finds with the versions and times of itself, QEMU and the kernel.
    """
    if cache.is_dir():
        shutil.copytree(cache, directory / _CAPABILITIES, dirs_exist_ok=True)


def keep_capabilities(directory: Path, cache: Path) -> None:
    """Keep what this host learnt of QEMU, each file whole or not at all."""
    cache.mkdir(parents=True, exist_ok=True)
    for file in (directory / _CAPABILITIES).glob("*.xml"):
        temporary = cache / f".{directory.name}"
        shutil.copyfile(file, temporary)
        os.replace(temporary, cache / file.name)


def free_port() -> int:
    """A port that nobody uses now. Raises LabError."""
    for _ in range(100):
        port = random.choice(_PORTS)
        if not is_taken(port):
            return port
    raise LabError(f"no free port on {ADDRESS}")


def is_taken(port: int) -> bool:
    """Whether somebody listens on this port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
        except OSError:
            return True
    return False
