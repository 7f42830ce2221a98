"""What is said when something cannot be recorded: to users why, to the log what to do."""

from __future__ import annotations

import errno
from pathlib import Path

from vmconsole.errors import ConsoleUnavailable

_CURE = "Is recording.directory ({}) a directory that we may write to?"
_FULL = "Free space on the disk of {}; recording.retain_bytes and retain_age limit what is kept."
_CURES: dict[int | None, str] = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.ENOENT: "What is being recorded in {} has to be left there.",
    errno.EFBIG: "recording.max_size has to be less than the limit for files in {}.",
    errno.ETIMEDOUT: "See what holds up the disk of {}.",
}


def reason(error: Exception) -> str:
    """Why, in a few words."""
    return getattr(error, "strerror", None) or str(error)


def cure(error: Exception, directory: Path) -> str:
    """What whoever reads the log has to do."""
    return _CURES.get(getattr(error, "errno", None), _CURE).format(directory)


def unavailable(why: str) -> ConsoleUnavailable:
    """For who opens the console."""
    return ConsoleUnavailable(
        f"This console cannot be recorded: {why}. Ask the administrator to see to it."
    )
