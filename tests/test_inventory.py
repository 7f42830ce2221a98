"""Where the VMs stand, and which hosts are watched."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from tests.engine_kit import EngineTestCase
from vmconsole.engine.embedded.inventory import Inventory, matches
from vmconsole.engine.embedded.watch import HostWatch
from vmconsole.errors import ConfigError
from vmconsole.interfaces import (
    Domain,
    DomainState,
    IDomainObserver,
    IDomainSource,
)

RUNNING, PAUSED, SHUT_OFF = DomainState.RUNNING, DomainState.PAUSED, DomainState.SHUT_OFF


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
        return {each.domain.id: each.host for each in self.inventory.placements()}

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
        self.assertEqual([each.domain.name for each in self.inventory.placements()], ["new"])

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


class MatchTests(SynchronousTestCase):
    """``matches``."""

    def test_patterns(self) -> None:
        """An id and a name match exactly; a pattern matches names, letter case counts."""
        web = Domain("0aa5c1e8-0000", "web[1]", RUNNING)
        for pattern in ("0aa5c1e8-0000", "web[1]", "web*", "*", "web[[]?]", "[vw]eb*"):
            self.assertTrue(matches(pattern, web), pattern)
        for pattern in ("0aa5*", "web", "Web*", "web1", "eb*", ""):
            self.assertFalse(matches(pattern, web), pattern)


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
        self.assertEqual(list(self.inventory.placements()), [])

    def test_refused_uri(self) -> None:
        """A URI that is refused is logged once, and the other hosts are watched."""
        for _ in range(3):
            self.watch.follow({"node1": "bad:", "node2": ""})
        self.assertEqual(self.told(), [("watch", "node1", "bad:"), ("watch", "node2", "")])
        self.assertEqual(
            self.logged("watched"), ["node1 is not watched: The URI bad: cannot be used."]
        )
