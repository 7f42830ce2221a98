"""The guests of the lab, as libvirt's domain XML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol
from uuid import uuid4
from xml.sax.saxutils import escape, quoteattr

from tests.lab.images import Images

# Takes an image from the cache to where the host's QEMU can read it.
Place = Callable[[Path], Path]
# What the guest's serial port leads to. libvirt opens only a pty.
Serial = Literal["pty", "unix", "tcp", "null", "none"]

LIGHT_PROMPT = b"light ready\r\n> "
FLOOD_PROMPT = b"flood ready\r\n> "

_SERIALS: dict[Serial, str] = {
    "pty": '<serial type="pty"/><console type="pty"/>',
    # In the host's own /run: for us in LibvirtHost.directory / "run".
    "unix": '<serial type="unix"><source mode="bind" path="/run/{name}.sock"/></serial>',
    "tcp": '<serial type="tcp"><source mode="bind" host="127.0.0.1" service="0"/></serial>',
    "null": '<serial type="null"/>',
    "none": "",
}


class Guest(Protocol):
    """What a LibvirtHost can define."""

    @property
    def name(self) -> str: ...

    def xml(self, images: Images, place: Place) -> str:
        """The domain XML. Raises LabError when an image cannot be made."""


@dataclass(frozen=True)
class LightGuest:
    """A boot sector that prints LIGHT_PROMPT and sends back every byte it receives.

    It prompts about 0.4 s after its start, and takes no CPU while it is idle.
    """

    name: str
    serial: Serial = "pty"
    uuid: str = field(default_factory=lambda: str(uuid4()))

    def xml(self, images: Images, place: Place) -> str:
        """The domain XML."""
        return _floppy_xml(self.name, self.uuid, self.serial, place(images.boot_sector()))


@dataclass(frozen=True)
class FloodGuest:
    """A boot sector that prints FLOOD_PROMPT, and numbered lines without end from the first byte
    it receives until the next one."""

    name: str
    serial: Serial = "pty"
    uuid: str = field(default_factory=lambda: str(uuid4()))

    def xml(self, images: Images, place: Place) -> str:
        """The domain XML."""
        return _floppy_xml(self.name, self.uuid, self.serial, place(images.boot_sector(True)))


@dataclass(frozen=True)
class LinuxGuest:
    """Linux with busybox: ``NAME login:``, where root needs no password, then a shell with job
    control; it acts on SysRq. The prompt comes in about 3 s under TCG.

    ``console`` is the 16550 on ttyS0, or the faster virtio console on hvc0.
    """

    name: str
    console: Literal["serial", "virtio"] = "serial"
    memory: int = 128  # MiB
    uuid: str = field(default_factory=lambda: str(uuid4()))

    def xml(self, images: Images, place: Place) -> str:
        """The domain XML."""
        if self.console == "serial":
            terminal, devices = "ttyS0", _SERIALS["pty"]
            console = "console=ttyS0,115200"
        else:
            terminal = "hvc0"
            devices = '<console type="pty"><target type="virtio"/></console>'
            console = "console=hvc0"
        # Only what matters goes to the console, lest it run into the prompt.
        command_line = (
            f"{console} quiet loglevel=3 mitigations=off nokaslr "
            f"lab.hostname={self.name} lab.console={terminal}"
        )
        system = (
            '<os><type arch="x86_64" machine="pc">hvm</type>'
            f"<kernel>{escape(str(place(images.kernel())))}</kernel>"
            f"<initrd>{escape(str(place(images.initramfs())))}</initrd>"
            f"<cmdline>{escape(command_line)}</cmdline></os>"
        )
        return _xml(self.name, self.uuid, self.memory * 1024, system, devices)


def _floppy_xml(name: str, uuid: str, serial: Serial, image: Path) -> str:
    system = '<os><type arch="x86_64" machine="pc">hvm</type><boot dev="fd"/></os>'
    # Several guests share the image.
    devices = (
        '<disk type="file" device="floppy"><driver name="qemu" type="raw"/>'
        f"<source file={quoteattr(str(image))}/>"
        f'<target dev="fda" bus="fdc"/><readonly/></disk>'
        + _SERIALS[serial].format(name=escape(name))
    )
    return _xml(name, uuid, 8 * 1024, system, devices)


def _xml(name: str, uuid: str, memory: int, system: str, devices: str) -> str:
    # type='qemu': KVM may be there and yet make no progress, where the machine is a guest itself.
    return f"""<domain type="qemu">
  <name>{escape(name)}</name>
  <uuid>{uuid}</uuid>
  <memory unit="KiB">{memory}</memory>
  <vcpu>1</vcpu>
  {system}
  <features><acpi/></features>
  <devices>
    {devices}
    <controller type="usb" model="none"/>
    <memballoon model="none"/>
    <video><model type="none"/></video>
  </devices>
</domain>
"""
