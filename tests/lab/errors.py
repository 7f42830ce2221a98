"""The lab's one error, and how it runs other programs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


class LabError(Exception):
    """The lab cannot do what was asked; the text says why, with the program's own words."""


def environment() -> dict[str, str]:
    """Ours, in the C locale, and with the folders that hold daemons in PATH."""
    path = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"
    return {**os.environ, "LC_ALL": "C", "PATH": path}


def run(*command: str, stdin: bytes = b"", cwd: Path | None = None, timeout: float = 60.0) -> bytes:
    """The standard output of a command. Raises LabError when it fails or takes too long."""
    try:
        done = subprocess.run(
            command, input=stdin, cwd=cwd, env=environment(), capture_output=True, timeout=timeout
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LabError(f"{' '.join(command)}: {error}") from error
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip()
        raise LabError(f"{' '.join(command)}: {words or f'exit status {done.returncode}'}")
    return done.stdout


def log_end(log: Path, lines: int = 10) -> str:
    """The last lines of a log file, if there is one."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
