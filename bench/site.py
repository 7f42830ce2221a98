"""A site of any size: pairs of servers for its lists, and an engine that ours asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from bench import lists
from bench.alternative import AlternativeWithLists
from bench.engine import Engine
from bench.ours import OursAtEngine
from bench.server import output
from bench.setting import Setting

_HOST = "node1"


class Site:
    """Its user has one key among the listed, and may open one guest among the listed VMs."""

    def __init__(self, setting: Setting, directory: Path) -> None:
        """Makes ``directory``, and starts nothing. The user is the setting's, and the guest its
        first. Raises BenchError and LabError."""
        self._setting = setting
        self._directory = directory
        directory.mkdir(mode=0o711)
        key = output("ssh-keygen", "-y", "-f", str(setting.ours.access.key)).strip()
        self._own_key = f"{key} user@laptop"
        guest = setting.guests[0]
        self._own_vm = lists.VM(setting.host.uuid(guest), guest, _HOST)
        self.engine = Engine(directory / "engine")

    @contextmanager
    def servers(
        self,
        name: str,
        keys: int,
        vms: int,
        settings: str,
        kind: str = lists.ED25519,
        restless: bool = False,
    ) -> Iterator[Setting]:
        """Both servers, started, with so many keys and VMs. ``settings`` are lines of our
        ``[engine]``, ``kind`` is that of the others' keys; of a ``restless`` site each second list
        of keys lacks the last one. The name is new each time. Raises BenchError."""
        setting = self._setting
        lines = lists.key_lines(keys, self._own_key, kind)
        listed = lists.vms(vms, self._own_vm)
        replies = [lists.key_reply(lines)]
        if restless:
            replies.append(lists.key_reply(lines[:-1]))
        self.engine.add(name, replies, lists.console_reply(listed))
        folders = [self._directory / f"{name}-{side}" for side in ("ours", "alternative")]
        for folder in folders:
            folder.mkdir(mode=0o711)
        ours = OursAtEngine(
            folders[0],
            setting.ours,
            self.engine.settings(name) + settings,
            {_HOST: setting.host.uri},
        )
        alternative = AlternativeWithLists(
            folders[1], setting.host.uri, setting.host.pki, setting.ours.access.key, lines, listed
        )
        with ExitStack() as stack:
            for side in (ours, alternative):
                stack.callback(side.stop)
                side.start()
            yield replace(setting, ours=ours, alternative=alternative)

    def number(self, vms: int) -> int:
        """Which one of so many in the menu the real one is."""
        return lists.vms(vms, self._own_vm).index(self._own_vm) + 1
