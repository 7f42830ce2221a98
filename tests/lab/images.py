"""What is built once and kept in a cache: boot sectors, kernel, initramfs, a library."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.lab.errors import LabError, environment, run

_HERE = Path(__file__).parent
# The size of a 3.5" floppy: QEMU takes the drive's geometry from it.
_FLOPPY = 1474560
# Metapackages that depend on the current kernel, the smallest first: Debian's, then Ubuntu's.
_KERNEL_PACKAGES = ("linux-image-cloud-amd64", "linux-image-amd64", "linux-image-virtual")
# What a virtio console needs, where the kernel has it as modules.
_MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_console",
)


class Images:
    """Builds images on first use; ``cache`` keeps them for the next run.

    A name in the cache carries a hash of all that went in, so a stale image is never used, and
    appears by a rename, so that two labs may share one cache.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def boot_sector(self, flood: bool = False) -> Path:
        """A floppy image with boot.S. Raises LabError when binutils are missing or fail."""
        source = _HERE / "boot.S"
        symbols = ["--defsym", "FLOOD=1"] if flood else []

        def build(target: Path, work: Path) -> None:
            code = work / "boot.o"
            run("as", "--32", *symbols, "-o", str(code), str(source))
            flat = ("-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary")
            run("ld", *flat, "-o", str(target), str(code))
            os.truncate(target, _FLOPPY)

        return self._cached("flood" if flood else "light", [source.read_bytes()], build)

    def nosetgroups(self) -> Path:
        """The shared library of nosetgroups.c. Raises LabError when gcc is missing or fails."""
        source = _HERE / "nosetgroups.c"

        def build(target: Path, _work: Path) -> None:
            run("gcc", "-shared", "-fPIC", "-o", str(target), str(source))

        return self._cached("nosetgroups", [source.read_bytes()], build)

    def kernel(self) -> Path:
        """The newest kernel in the cache; the distribution's, downloaded, when there is none.

        Nothing is installed. Raises LabError when no package is found or the download fails.
        """
        kernels = sorted(self.cache.glob("kernel/*/vmlinuz"), key=lambda path: path.stat().st_mtime)
        return kernels[-1] if kernels else self._fetch_kernel()

    def initramfs(self) -> Path:
        """busybox with guest_init.sh, as a cpio archive. Raises LabError."""
        script = _HERE / "guest_init.sh"
        busybox = _static_busybox() or self._fetch_busybox()
        modules = sorted(self.kernel().parent.glob("*.ko"))
        parts = [path.read_bytes() for path in (script, busybox, *modules)]

        def build(target: Path, work: Path) -> None:
            root = work / "root"
            for folder in ("bin", "etc", "lib/modules"):
                (root / folder).mkdir(parents=True)
            shutil.copy(busybox, root / "bin/busybox")
            shutil.copy(script, root / "init")
            (root / "init").chmod(0o755)
            (root / "etc/passwd").write_text("root::0:0:root:/root:/bin/sh\n")
            (root / "etc/group").write_text("root:x:0:\n")
            (root / "etc/issue").write_text("vmconsole lab, \\s \\r on \\l\n\n")
            for module in modules:
                shutil.copy(module, root / "lib/modules")
            names = "\n".join(sorted(str(path.relative_to(root)) for path in root.rglob("*")))
            archive = ("cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0")
            target.write_bytes(run(*archive, stdin=names.encode(), cwd=root))

        return self._cached("initramfs", parts, build)

    def _cached(self, name: str, parts: list[bytes], build: Callable[[Path, Path], None]) -> Path:
        # The recipe counts as much as the ingredients.
        digest = hashlib.sha256(Path(__file__).read_bytes())
        for part in parts:
            digest.update(hashlib.sha256(part).digest())
        target = self.cache / f"{name}-{digest.hexdigest()[:16]}.img"
        if not target.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.cache) as work:
                made = Path(work, "made")
                build(made, Path(work))
                os.replace(made, target)
        return target

    def _fetch_kernel(self) -> Path:
        package = _kernel_package()
        target = self.cache / "kernel" / package
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.cache) as work:
            _download(package, Path(work))
            made = Path(work, "made")
            made.mkdir()
            kernel = next(Path(work).glob("boot/vmlinuz-*"), None)
            if kernel is None:
                raise LabError(f"{package} has no /boot/vmlinuz-*")
            shutil.move(kernel, made / "vmlinuz")
            for module in Path(work).glob("**/kernel/drivers/**/virtio*.ko"):
                if module.stem in _MODULES:
                    shutil.move(module, made)
            with suppress(OSError):  # somebody else was faster: not empty
                os.replace(made, target)
        return target / "vmlinuz"

    def _fetch_busybox(self) -> Path:
        target = self.cache / "busybox"
        self.cache.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=self.cache) as work:
                _download("busybox-static", Path(work))
                os.replace(next(Path(work).glob("**/bin/busybox")), target)
        return target


def _static_busybox() -> Path | None:
    # The shared libraries of a dynamic busybox are not in the guest.
    path = shutil.which("busybox", path=environment()["PATH"])
    if path is None:
        return None
    with open(path, "rb") as file:
        head = file.read(4096)  # the name of the dynamic linker is near the start
    return None if b"/ld-" in head else Path(path)


def _download(package: str, target: Path) -> None:
    """Unpack a package of the distribution in ``target``; nothing is installed."""
    run("apt-get", "-q", "download", package, cwd=target, timeout=600)
    for archive in list(target.glob("*.deb")):
        run("dpkg", "-x", str(archive), str(target))


def _kernel_package() -> str:
    for name in _KERNEL_PACKAGES:
        found = subprocess.run(
            ["apt-cache", "depends", name], capture_output=True, text=True, check=False
        )
        match = re.search(r"Depends: (linux-image-\d\S+)", found.stdout)
        if match:
            return match[1]
    raise LabError(f"apt knows none of {', '.join(_KERNEL_PACKAGES)}: run apt-get update")
