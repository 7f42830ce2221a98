"""Where the VMs stand, and which hosts are watched."""

from __future__ import annotations

import json
from itertools import permutations
from typing import cast

from zope.interface import implementer
from zope.interface.verify import verifyObject

from tests.engine_kit import EngineTestCase
from vmconsole.engine.embedded.console_index import ConsoleIndex
from vmconsole.engine.embedded.inventory import Inventory, Placement
from vmconsole.engine.embedded.records import Rule
from vmconsole.engine.embedded.watch import HostWatch
from vmconsole.errors import ConfigError
from vmconsole.interfaces import (
    Domain,
    DomainState,
    IDomainObserver,
    IDomainSource,
    Role,
)

RUNNING, PAUSED, SHUT_OFF = DomainState.RUNNING, DomainState.PAUSED, DomainState.SHUT_OFF


def placements(inventory: Inventory) -> list[Placement]:
    """Every VM once, by id."""
    found = [inventory.find(id) for id in inventory.ids()]
    return [placement for placement in found if placement is not None]


def vm(id: str, state: DomainState = RUNNING) -> Domain:
    return Domain(id, f"name of {id}", state)


@implementer(IDomainSource)
class RecordingSource:
    """Notes what it is told; refuses the URI ``bad:``."""

    def __init__(self) -> None:
        self.observer: IDomainObserver | None = None
        self.told: list[tuple[str, ...]] = []

    def watch(self, host: str, uri: str) -> None:
        self.told.append(("watch", host, uri))
        if uri == "bad:":
            raise ConfigError("The URI bad: cannot be used.")

    def unwatch(self, host: str) -> None:
        self.told.append(("unwatch", host))


class InventoryTests(EngineTestCase):
    """``Inventory``."""

    def setUp(self) -> None:
        super().setUp()
        self.inventory = Inventory()
        verifyObject(IDomainObserver, self.inventory)

    def places(self) -> dict[str, str]:
        return {each.domain.id: each.host for each in placements(self.inventory)}

    def test_listed_and_changed(self) -> None:
        """All that a host listed is there, by id, also what is off; then the events count."""
        self.inventory.domains_listed("node1", [vm("b"), vm("a", SHUT_OFF), vm("c")])
        self.assertEqual(list(self.places()), ["a", "b", "c"])
        self.inventory.domain_changed("node1", vm("d"))
        self.inventory.domain_removed("node1", "c")
        self.inventory.domain_removed("node1", "unknown")
        self.inventory.domain_removed("node9", "a")
        self.assertEqual(list(self.places()), ["a", "b", "d"])

    def test_listed_again(self) -> None:
        """A new list replaces the old one."""
        self.inventory.domains_listed("node1", [vm("a"), vm("b")])
        self.inventory.domains_listed("node1", [vm("b")])
        self.assertEqual(list(self.places()), ["b"])

    def test_renamed(self) -> None:
        """A VM has the name that its host told last."""
        self.inventory.domains_listed("node1", [vm("a")])
        self.inventory.domain_changed("node1", Domain("a", "new", RUNNING))
        self.assertEqual([each.domain.name for each in placements(self.inventory)], ["new"])
        self.assertEqual(self.inventory.called("new"), ["a"])
        self.assertEqual(self.inventory.called("name of a"), [])

    def test_migration(self) -> None:
        """During a migration the VM is where it runs, not where it waits paused."""
        self.inventory.domains_listed("node1", [vm("a")])
        self.inventory.domain_changed("node2", vm("a", PAUSED))
        self.assertEqual(self.places(), {"a": "node1"})
        self.inventory.domain_changed("node1", vm("a", PAUSED))
        self.inventory.domain_changed("node2", vm("a"))
        self.assertEqual(self.places(), {"a": "node2"})
        self.inventory.domain_changed("node1", vm("a", SHUT_OFF))
        self.assertEqual(self.places(), {"a": "node2"})

    def test_seen_last(self) -> None:
        """Of two hosts that tell the same, the one that told it last is right."""
        self.inventory.domains_listed("node1", [vm("a")])
        self.inventory.domains_listed("node2", [vm("a")])
        self.assertEqual(self.places(), {"a": "node2"})
        self.inventory.domain_changed("node1", vm("a"))
        self.assertEqual(self.places(), {"a": "node1"})

    def test_lost(self) -> None:
        """The VMs of a lost host stay, unless another host has them."""
        self.inventory.domains_listed("node1", [vm("a"), vm("b"), vm("c")])
        self.inventory.domains_listed("node2", [vm("b", PAUSED), vm("c", SHUT_OFF)])
        self.inventory.host_lost("node1", "it does not answer")
        self.assertEqual(self.places(), {"a": "node1", "b": "node2", "c": "node1"})
        self.inventory.domains_listed("node1", [vm("a"), vm("b")])
        self.assertEqual(self.places(), {"a": "node1", "b": "node1", "c": "node2"})

    def test_never_reached(self) -> None:
        """A host that was never reached has no VMs."""
        self.inventory.host_lost("node1", "no route")
        self.assertEqual(self.places(), {})

    def test_forgotten(self) -> None:
        """A host that is no longer ours takes its VMs along."""
        self.inventory.domains_listed("node1", [vm("a")])
        self.inventory.forget("node1")
        self.inventory.forget("node1")
        self.assertEqual(self.places(), {})


class IndexTests(EngineTestCase):
    """``ConsoleIndex``: which VMs rules cover."""

    def setUp(self) -> None:
        super().setUp()
        self.inventory = Inventory()
        self.index = ConsoleIndex(self.inventory)
        web = Domain("0aa5c1e8-0000", "web[1]", RUNNING)
        self.inventory.domains_listed("node1", [web, vm("b"), vm("c")])

    def roles(self, *rules: tuple[str, Role]) -> dict[str, Role]:
        found: dict[str, Role] = {}
        for _ in self.index.roles([Rule(*rule) for rule in rules], found):
            pass
        return found

    def entries(
        self, roles: dict[str, Role], viewers: bool = True, problems: bool = True
    ) -> list[dict[str, str]]:
        parts: list[bytes] = []
        for _ in self.index.entries(roles, parts, viewers=viewers, problems=problems):
            pass
        found: list[dict[str, str]] = json.loads(b"[%b]" % b",".join(filter(None, parts)))
        return found

    def test_patterns(self) -> None:
        """An id and a name match exactly; a pattern matches names, letter case counts."""
        for pattern in ("0aa5c1e8-0000", "web[1]", "web*", "web[[]?]", "[vw]eb*"):
            self.assertEqual(list(self.roles((pattern, "operator"))), ["0aa5c1e8-0000"], pattern)
        for pattern in ("0aa5*", "web", "Web*", "web1", "eb*", ""):
            self.assertEqual(self.roles((pattern, "operator")), {}, pattern)
        self.assertEqual(list(self.roles(("*", "viewer"))), ["0aa5c1e8-0000", "b", "c"])

    def test_same_name(self) -> None:
        """A name is that of all VMs that are called so."""
        self.inventory.domain_changed("node2", Domain("d", "name of b", RUNNING))
        self.assertEqual(set(self.roles(("name of b", "viewer"))), {"b", "d"})

    def test_roles(self) -> None:
        """Who may type by one rule may type, whatever the others say, in any order."""
        rules: list[tuple[str, Role]] = [("b", "operator"), ("name*", "viewer"), ("c", "viewer")]
        for order in permutations(rules):
            self.assertEqual(self.roles(*order), {"b": "operator", "c": "viewer"})
        self.assertEqual(
            self.roles(("*", "viewer"), ("name*", "operator")),
            {"0aa5c1e8-0000": "viewer", "b": "operator", "c": "operator"},
        )

    def test_many_patterns(self) -> None:
        """More patterns than are remembered are all the same."""
        for number in range(1100):
            self.assertEqual(self.roles((f"{number}*", "operator")), {})
        self.assertLessEqual(len(self.index._patterns), 1000)
        self.assertEqual(list(self.roles(("*b", "operator"))), ["b"])

    def test_entries(self) -> None:
        """An entry is made once, and anew when its VM changed; it says what it is asked for."""
        [entry] = self.entries({"b": "viewer"})
        self.assertEqual((entry["vmid"], entry["role"]), ("b", "viewer"))
        made = self.index._entries["b"]
        self.assertNotIn("role", self.entries({"b": "operator"})[0])
        self.inventory.domain_changed("node1", vm("b"))
        self.entries({"b": "operator"})
        self.assertIs(self.index._entries["b"], made)
        self.inventory.domain_changed("node2", vm("b"))
        self.assertEqual(self.entries({"b": "viewer"})[0]["host"], "node2")
        self.assertEqual(
            self.entries({"b": "viewer", "c": "operator"}, viewers=False)[0]["vmid"], "c"
        )

    def test_unknown_role(self) -> None:
        """A role that we do not know lets nobody type."""
        found = self.entries({"b": cast(Role, "auditor")})
        self.assertEqual(found[0]["role"], "viewer")
        self.assertEqual(self.entries({"b": cast(Role, "auditor")}, viewers=False), [])

    def test_many_entries(self) -> None:
        """Long lists come in pieces, in order."""
        ids = [f"vm{number:04}" for number in range(600)]
        self.inventory.domains_listed("node1", [vm(id) for id in ids])
        parts: list[bytes] = []
        roles: dict[str, Role] = dict.fromkeys(ids, "operator")
        steps = list(self.index.entries(roles, parts, viewers=True, problems=True))
        self.assertEqual(len(steps), 600)
        self.assertEqual(len(parts), 3)
        found = json.loads(b"[%b]" % b",".join(parts))
        self.assertEqual([each["vmid"] for each in found], ids)

    def test_many_rules(self) -> None:
        """Many patterns of one user are gone through in small steps."""
        rules = [Rule(f"none{number}*", "operator") for number in range(500)]
        found: dict[str, Role] = {}
        steps = list(self.index.roles([*rules, Rule("name of b", "viewer")], found))
        self.assertEqual(found, {"b": "viewer"})
        # For each rule one, and for each of three VMs one in 50 patterns.
        self.assertGreaterEqual(len(steps), 501 + 3 * 10)

    def test_gone(self) -> None:
        """A VM that goes away meanwhile is left out, and nothing of it is kept for ever."""
        for number in range(100):
            id = f"vm{number}"
            self.inventory.domain_changed("node1", vm(id))
            self.assertEqual(len(self.entries({id: "operator"})), 1)
            self.inventory.domain_removed("node1", id)
            self.assertEqual(self.entries({id: "operator"}), [])
        self.assertLess(len(self.index._entries), 10)


class HostWatchTests(EngineTestCase):
    """``HostWatch``."""

    def setUp(self) -> None:
        super().setUp()
        self.source = RecordingSource()
        verifyObject(IDomainSource, self.source)
        self.inventory = Inventory()
        self.watch = HostWatch(self.source, self.inventory)
        self.watch.start()

    def told(self) -> list[tuple[str, ...]]:
        told, self.source.told = self.source.told, []
        return told

    def test_observer(self) -> None:
        """The source tells our inventory, until the end."""
        self.assertIs(self.source.observer, self.inventory)
        self.watch.follow({"node1": ""})
        self.watch.stop()
        self.assertIsNone(self.source.observer)
        self.assertEqual(self.told()[-1], ("unwatch", "node1"))

    def test_nothing_named(self) -> None:
        """With no host named, this machine is watched; with one, it is not."""
        self.watch.follow({})
        self.watch.follow({})
        self.assertEqual(self.told(), [("watch", "localhost", "qemu:///system")])
        self.watch.follow({"node1": ""})
        self.assertEqual(self.told(), [("unwatch", "localhost"), ("watch", "node1", "")])

    def test_differences(self) -> None:
        """Only what changed is told; a host that went takes its VMs along."""
        self.watch.follow({"node1": "", "node2": "qemu:///system"})
        self.inventory.domains_listed("node1", [vm("a")])
        self.inventory.domains_listed("node2", [vm("b")])
        self.told()
        self.watch.follow({"node2": "qemu:///session", "node3": ""})
        self.assertEqual(
            self.told(),
            [
                ("unwatch", "node1"),
                ("unwatch", "node2"),
                ("watch", "node2", "qemu:///session"),
                ("watch", "node3", ""),
            ],
        )
        self.assertEqual(placements(self.inventory), [])

    def test_refused_uri(self) -> None:
        """A URI that is refused is logged once, and the other hosts are watched."""
        for _ in range(3):
            self.watch.follow({"node1": "bad:", "node2": ""})
        self.assertEqual(self.told(), [("watch", "node1", "bad:"), ("watch", "node2", "")])
        self.assertEqual(
            self.logged("watched"), ["node1 is not watched: The URI bad: cannot be used."]
        )

    def test_source_fails(self) -> None:
        """A host that could not be watched, for no reason of its own, is tried again."""
        watch = self.source.watch

        def fail(host: str, uri: str) -> None:
            raise RuntimeError("oops")

        self.watch.follow({"node0": ""})
        self.told()
        self.source.watch = fail  # type: ignore[method-assign]
        self.assertRaises(RuntimeError, self.watch.follow, {"node0": "", "node1": ""})
        self.assertFalse(self.watch.follows)
        self.assertEqual(self.told(), [("unwatch", "node1")])
        self.source.watch = watch  # type: ignore[method-assign]
        self.watch.follow({"node0": "", "node1": ""})
        self.assertEqual(self.told(), [("watch", "node1", "")])

    def test_stopped(self) -> None:
        """Who is told too late, after the end, watches nothing; started again, it does."""
        self.watch.follow({"node1": ""})
        self.assertTrue(self.watch.follows)
        self.watch.stop()
        self.told()
        self.watch.follow({"node1": ""})
        self.assertFalse(self.watch.follows)
        self.assertEqual(self.told(), [])
        self.watch.start()
        self.watch.follow({"node1": ""})
        self.assertEqual(self.told(), [("watch", "node1", "")])
