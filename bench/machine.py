"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

from bench.server import program

_TOP = Path(__file__).parents[1]


def facts() -> dict[str, str]:
    """The machine and the versions of all that takes part."""
    release = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "CPU": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores",
        "memory": f"{memory:.1f} GiB",
        "system": f"{release}, Linux {platform.release()}",
        "load": load(),
        "OpenSSH": _said("ssh", "-V").split(",")[0],
        "libvirt": _number(_said("libvirtd", "--version")),
        "QEMU": f"{_number(_said('qemu-system-x86_64', '--version'))}, guests under TCG",
        "Python": platform.python_version(),
        "Twisted": version("twisted"),
        "cryptography": version("cryptography"),
        "libvirt-python": version("libvirt-python"),
        "vmconsole": _revision(),
    }


def load() -> str:
    """The load averages, to tell whether others took part too."""
    return "load average {:.2f} {:.2f} {:.2f}".format(*os.getloadavg())


def _cpu_model() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def _said(name: str, *arguments: str) -> str:
    done = subprocess.run([program(name), *arguments], capture_output=True, text=True)
    return (done.stdout + done.stderr).strip()


def _number(text: str) -> str:
    found = re.search(r"\d+(\.\d+)+", text)
    return found[0] if found else "unknown"


def _revision() -> str:
    git = ["git", "-C", str(_TOP)]
    try:
        done = subprocess.run(
            [*git, "describe", "--always", "--dirty"], capture_output=True, text=True
        )
    except OSError:
        return version("vmconsole")
    return f"{version('vmconsole')}, {done.stdout.strip() or 'no git revision'}"
