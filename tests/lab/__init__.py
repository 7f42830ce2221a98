"""Real hypervisors for the tests: libvirtd and QEMU, without the machine's own being touched.

    from tests import lab

    hosts = lab.get()                     # starts node1 and node2 on first use; ends with Python
    hosts.node1, hosts.node2              # LibvirtHost
    hosts.pki                             # a client's folder, good for both
    uuid = hosts.node1.run(lab.LightGuest("light"))
    hosts.node1.uri                       # qemu+tls://127.0.0.1:PORT/system?pkipath=...
    hosts.node1.remove("light")

    lab.missing()                         # why there can be no lab here, or "": for skips

A host: ``start stop kill freeze thaw close`` for the daemon; ``define create run destroy reset
suspend resume migrate remove state uuid virsh`` for guests; ``uri local_uri pki port name
directory log``. All of them wait: call them from the test's thread or a thread pool.

Guests: ``LightGuest`` (echoes every byte), ``FloodGuest`` (prints without end), ``LinuxGuest``
(login and shell). ``LightGuest(name, serial="unix")``, ``"tcp"``, ``"null"`` and ``"none"`` have
consoles that libvirt cannot open; ``host.define(guest)`` alone gives one that is off.

QEMU looks only once a second whether somebody opened a console; what a guest printed before
is gone. To see a guest's first words: open, send a byte, await the echo, then ``reset``.

``python -m tests.lab`` starts a lab to play with; ``--check`` tries it out.
"""

from __future__ import annotations

import atexit
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

from tests.lab.errors import LabError, environment
from tests.lab.guests import FLOOD_PROMPT, LIGHT_PROMPT, FloodGuest, Guest, LightGuest, LinuxGuest
from tests.lab.host import LibvirtHost
from tests.lab.images import Images
from vmconsole import pki

__all__ = [
    "FLOOD_PROMPT",
    "LIGHT_PROMPT",
    "FloodGuest",
    "Guest",
    "Lab",
    "LabError",
    "LibvirtHost",
    "LightGuest",
    "LinuxGuest",
    "get",
    "missing",
]

_PROGRAMS = (
    *("libvirtd", "virsh", "qemu-system-x86_64", "unshare"),
    *("as", "ld", "gcc", "cpio", "dpkg", "apt-get"),
)


class Lab:
    """Two hosts under one CA."""

    def __init__(self) -> None:
        """Start both; raises LabError."""
        lacking = missing()
        if lacking:
            raise LabError(lacking)
        # Images and the like, kept from run to run.
        cache = os.environ.get("VMCONSOLE_LAB_CACHE")
        self.images = Images(Path(cache) if cache else Path(__file__).parents[2] / ".cache" / "lab")
        self.authority = pki.make_authority("vmconsole lab", datetime.now(UTC))
        self.hosts: dict[str, LibvirtHost] = {}
        try:
            # One after the other: the second finds in the cache what the first learnt of QEMU.
            self.node1 = self.add_host("node1")
            self.node2 = self.add_host("node2")
        except BaseException:
            self.close()
            raise

    @property
    def pki(self) -> Path:
        """The folder with a client's cacert.pem, clientcert.pem and clientkey.pem."""
        return self.node1.pki

    def add_host(self, name: str) -> LibvirtHost:
        """Start one more host. Close it to be rid of it before the lab ends."""
        host = LibvirtHost(name, self.authority, self.images)
        self.hosts[name] = host
        host.start()
        return host

    def close(self) -> None:
        """End all hosts and their guests. May be called again."""
        for host in self.hosts.values():
            host.close()


_lab: Lab | None = None


def get() -> Lab:
    """The one lab of this process, started at first use. Raises LabError.

    It ends with Python. If Python is killed, the hosts see the end of their input and go too.
    """
    global _lab
    if _lab is None:
        _lab = Lab()
        atexit.register(_close, _lab, os.getpid())
    return _lab


def _close(lab: Lab, owner: int) -> None:
    # A child that was forked off and ends as Python does must not take our hosts along.
    if os.getpid() == owner:
        lab.close()


def missing() -> str:
    """What keeps a lab from starting on this machine; empty when nothing is known to."""
    lacking = [name for name in _PROGRAMS if not shutil.which(name, path=environment()["PATH"])]
    return f"missing: {', '.join(lacking)} (bin/test installs them)" if lacking else ""
