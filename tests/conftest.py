"""What pytest does around every test; trial has its own ways."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# What needs the lab, which each process has to start for itself.
_LAB = ("tests/functional/", "tests/test_libvirt_stream.py")


class LabScheduling(LoadScopeScheduling):
    """Of two workers one has all that needs the lab. That mostly waits, for guests that boot and
    the like, and the other worker has the rest meanwhile."""

    def _split_scope(self, nodeid: str) -> str:
        return "lab" if nodeid.startswith(_LAB) else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LabScheduling:
    """For ``-n 2``; the groups of xdist's own ``--dist loadgroup`` are lost with pytest 9.2."""
    return LabScheduling(config, log)


@pytest.fixture(autouse=True, scope="session")
def _temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """trial's ``mktemp`` makes its folders in the current one: let that be a temporary one."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("trial"))
    yield
    os.chdir(before)
