"""A real libvirtd with its real QEMU guests, apart from the machine's own."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import uuid4

from tests.lab import layout
from tests.lab.errors import LabError, log_end, run
from tests.lab.guests import Guest
from tests.lab.images import Images
from tests.lab.namespaces import Namespaces
from vmconsole.pki import Identity

_DAEMON = ["libvirtd", "--listen", "-f", "/etc/libvirt/libvirtd.conf"]


class LibvirtHost:
    """A hypervisor host: a libvirtd in namespaces of its own, on the loopback address.

    Making one lays out its folder and certificates, and starts its namespaces; ``start`` starts
    the daemon. Guests are steered by virsh, as a process: this one may have an event loop of its
    own in libvirt-python. Every method waits, raises LabError, and may be called in any thread.
    """

    def __init__(self, name: str, authority: Identity, images: Images) -> None:
        """``authority`` signs the certificates. Raises LabError and OSError."""
        self.name = name
        self.port = layout.free_port()
        self._images = images
        self._capabilities = images.cache / "capabilities"
        self._uuid = str(uuid4())
        self._announced = False
        self._placing = threading.Lock()
        # In /tmp whatever TMPDIR says: the path of a unix socket may have 107 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix=f"vmc-{name}-", dir="/tmp"))
        try:
            layout.lay_out(self.directory, name, authority)
            layout.configure(self.directory, self.port, self._uuid)
            layout.restore_capabilities(self.directory, self._capabilities)
            self._namespaces = Namespaces(self.directory, name, self._command(), self.log)
        except BaseException:
            shutil.rmtree(self.directory, ignore_errors=True)
            raise

    @property
    def uri(self) -> str:
        """Over TLS, with the client certificate in ``pki``."""
        return f"qemu+tls://{layout.ADDRESS}:{self.port}/system?pkipath={self.pki}"

    @property
    def local_uri(self) -> str:
        """Over the unix socket."""
        return f"qemu:///system?socket={self.directory}/run/libvirt/libvirt-sock"

    @property
    def pki(self) -> Path:
        """The folder with cacert.pem, clientcert.pem and clientkey.pem."""
        return self.directory / "pki"

    @property
    def log(self) -> Path:
        """What the daemon says."""
        return self.directory / "libvirtd.log"

    def start(self) -> None:
        """Start the daemon, and wait until it answers; it finds the guests it had before."""
        answer = self._namespaces.tell("start")
        while answer != "ok" and not self._announced and layout.is_taken(self.port):
            # Somebody was faster. Nobody has our URI yet, so another port is as good.
            self.port = layout.free_port()
            layout.configure(self.directory, self.port, self._uuid)
            answer = self._namespaces.tell("start")
        if answer != "ok":
            raise LabError(f"libvirtd of {self.name}: {answer}\n{log_end(self.log)}")
        try:
            # The first call makes libvirt find out what QEMU can do, unless the cache knows.
            self.virsh("capabilities")
        except LabError as error:
            raise LabError(f"{error}\n{log_end(self.log)}") from error
        if not self._announced:
            self._announced = True
            layout.keep_capabilities(self.directory, self._capabilities)

    def stop(self) -> None:
        """End the daemon in order; the guests live on."""
        self._tell("stop")

    def kill(self) -> None:
        """End the daemon by SIGKILL; the guests live on."""
        self._tell("kill")

    def freeze(self) -> None:
        """Stop the daemon (SIGSTOP): its connections stay open and silent."""
        self._tell("freeze")

    def thaw(self) -> None:
        """Let a frozen daemon go on (SIGCONT)."""
        self._tell("thaw")

    def close(self) -> None:
        """End the guests and the daemon, and remove the folder. May be called again."""
        self._namespaces.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _tell(self, word: str) -> None:
        answer = self._namespaces.tell(word)
        if answer != "ok":
            raise LabError(f"{self.name}: {word}: {answer}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # Guests, by name.

    def virsh(self, *arguments: str, stdin: bytes = b"", timeout: float = 60.0) -> str:
        """What a virsh command prints."""
        command = ("virsh", "-q", "-c", self.local_uri, *arguments)
        return run(*command, stdin=stdin, timeout=timeout).decode().strip()

    def define(self, guest: Guest) -> str:
        """Make a guest known, without starting it. Returns its UUID."""
        xml = guest.xml(self._images, self._place)
        self.virsh("define", "/dev/stdin", stdin=xml.encode())
        return self.uuid(guest.name)

    def create(self, name: str, paused: bool = False) -> None:
        """Start a defined guest."""
        self.virsh("start", name, *(["--paused"] if paused else []))

    def run(self, guest: Guest) -> str:
        """Define a guest and start it. Returns its UUID."""
        uuid = self.define(guest)
        self.create(guest.name)
        return uuid

    def uuid(self, name: str) -> str:
        """A guest's UUID."""
        return self.virsh("domuuid", name)

    def state(self, name: str) -> str:
        """A guest's state in virsh's words: ``running``, ``paused``, ``shut off``..."""
        return self.virsh("domstate", name)

    def destroy(self, name: str) -> None:
        """Pull a guest's plug; it stays defined."""
        self.virsh("destroy", name)

    def reset(self, name: str) -> None:
        """Press a guest's reset button."""
        self.virsh("reset", name)

    def suspend(self, name: str) -> None:
        """Pause a guest."""
        self.virsh("suspend", name)

    def resume(self, name: str) -> None:
        """Let a paused guest go on."""
        self.virsh("resume", name)

    def migrate(self, name: str, to: LibvirtHost) -> None:
        """Move a running guest to another host, live. Takes about 2 s."""
        self.virsh("migrate", "--live", "--unsafe", name, to.local_uri, f"tcp://{layout.ADDRESS}")

    def remove(self, name: str) -> None:
        """Destroy a guest if it runs, and forget it."""
        if self.state(name) != "shut off":
            self.destroy(name)
        # One that migrated here, or from here with --undefinesource, is gone by now.
        with suppress(LabError):
            self.virsh("undefine", name)

    def _command(self) -> list[str]:
        if os.geteuid() == 0:
            return _DAEMON
        return ["env", f"LD_PRELOAD={self._place(self._images.nosetgroups())}", *_DAEMON]

    def _place(self, image: Path) -> Path:
        # The host has a /var and a /run of its own: a cache in there would be out of its sight.
        target = self.directory / "images" / f"{image.parent.name}-{image.name}"
        with self._placing:
            if not target.exists():
                shutil.copyfile(image, target)
        return target
