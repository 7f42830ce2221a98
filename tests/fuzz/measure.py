"""Which lines and branches of the ssh server a run reaches. Imports nothing of that by itself."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_PACKAGE = "vmconsole.ssh"


@contextmanager
def measured(wanted: bool) -> Iterator[Any]:
    """Measure; gives None when it is not wanted. Raises SystemExit when ``coverage``, which is
    not needed for anything else, is not installed."""
    if not wanted:
        yield None
        return
    try:
        import coverage
    except ImportError:
        raise SystemExit(
            "--coverage needs the package coverage, which is not installed: pip install coverage"
        ) from None
    # Nothing is left on the disk, and the project's own settings are for its tests.
    measuring = coverage.Coverage(
        data_file=None, branch=True, config_file=False, source_pkgs=[_PACKAGE]
    )
    measuring.start()
    try:
        yield measuring
    finally:
        measuring.stop()


def covered(measuring: Any) -> str:
    """For each file: the share of its lines and branches that ran, and those that did not."""
    text = io.StringIO()
    measuring.report(file=text, show_missing=True)
    return text.getvalue()
