"""A site of 100 hosts with 10,000 domains: from the hosts' events to the lists of their users."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred

from tests.engine_kit import EngineTestCase, at_once
from tests.fakes_libvirt import PAUSED, SHUT_OFF, FakeDaemon, Site
from vmconsole.engine.embedded.answers import Answers, Features
from vmconsole.engine.embedded.inventory import Inventory
from vmconsole.engine.embedded.store import Store
from vmconsole.engine.embedded.watch import HostWatch

_HOSTS = 100
_DOMAINS = 100
_NO_CONSOLE = "<domain><devices></devices></domain>"
_ALL = Features(role=True, key_options=True, console_problem=True)


class LargeSiteTests(EngineTestCase):
    """The real pool of hosts, inventory, store and answers over a libvirt in memory."""

    def setUp(self) -> None:
        super().setUp()
        self.site = Site()
        self.addCleanup(self.site.stop)
        self.daemons = []
        for host in range(_HOSTS):
            daemon = FakeDaemon(self.site.reactor)
            self.site.libvirt.daemons[f"qemu+tls://host{host}/system"] = daemon
            self.daemons.append(daemon)
            for number in range(_DOMAINS):
                daemon.add(f"{host:03}-{number:03}", f"vm{host:03}{number:03}")
        self.inventory = Inventory()
        self.watch = HostWatch(self.site.hosts, self.inventory)
        self.watch.start()
        directory = Path(self.mktemp())
        self.store = Store(f"sqlite:///{directory / 'engine.db'}", self.clock.seconds)
        self.store.open()
        self.answers = Answers(self.store, self.inventory, at_once, self.site.reactor)
        self.user_id = self.store.add_user("alice").id
        self.watch.follow({f"host{host}": "" for host in range(_HOSTS)})
        self.site.settle()

    def consoles(self) -> dict[str, Any]:
        """What alice is told, by name."""
        answer: list[Any] = []
        coroutine = self.answers.console_list(self.user_id, _ALL)
        Deferred.fromCoroutine(coroutine).addBoth(answer.append)
        self.site.settle()
        consoles = json.loads(b"".join(answer[0]))["consoles"]
        return {each["vmname"]: each for each in consoles}

    def test_all(self) -> None:
        """All are listed, each on its host; one connection a host is all that it takes."""
        self.store.grant("alice", "*")
        consoles = self.consoles()
        self.assertEqual(len(consoles), _HOSTS * _DOMAINS)
        self.assertEqual(consoles["vm042007"]["host"], "host42")
        self.assertEqual({daemon.opened for daemon in self.daemons}, {1})
        self.store.revoke("alice", "*")
        self.store.grant("alice", "vm04200?", "viewer")
        self.assertEqual(len(self.consoles()), 10)

    def test_changes(self) -> None:
        """What happens to some of them, and to a host, is in the next list."""
        self.store.grant("alice", "vm00*")
        new = self.daemons[0].add("new", "vm00new", xml=_NO_CONSOLE)
        self.daemons[0].tell("new", event=2)
        moved = self.daemons[1].domains.pop("001-001")
        self.daemons[2].domains["001-001"] = moved
        self.daemons[2].tell("001-001", event=4)
        self.daemons[1].tell("001-001", event=5, detail=3)
        self.daemons[3].domains["003-003"].state = (SHUT_OFF, 1)
        self.daemons[3].tell("003-003", event=5)
        del self.daemons[4].domains["004-004"]
        self.daemons[4].tell("004-004", event=1)
        self.site.settle()
        consoles = self.consoles()
        self.assertIn("no console device: add <console type='pty'/>", consoles[new.name]["problem"])
        self.assertEqual(consoles["vm001001"]["host"], "host2")
        self.assertNotIn("vm004004", consoles)
        self.assertEqual(len(consoles), 1000)

    def test_hosts_come_and_go(self) -> None:
        """Half of the hosts end their connections at once, and refuse new ones for a while: their
        VMs stay in the list, and what changed meanwhile is there when they are back."""
        self.store.grant("alice", "*")
        away = self.daemons[: _HOSTS // 2]
        for daemon in away:
            daemon.open_error = self.site.libvirt.libvirtError("Connection refused", 38, 7)
            daemon.drop()
        self.site.settle(1)
        self.assertEqual(len(self.consoles()), _HOSTS * _DOMAINS)
        for daemon in away:
            daemon.open_error = None
            daemon.domains.popitem()
        self.daemons[0].domains["000-000"].state = (PAUSED, 1)
        self.site.settle(60)
        self.assertEqual(len(self.consoles()), _HOSTS * _DOMAINS - len(away))
        self.assertEqual(len({len(daemon.connections) for daemon in self.daemons}), 1)
