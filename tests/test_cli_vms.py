"""``vmconsole vm list``."""

from __future__ import annotations

import json
import socket
import time

from tests.cli_kit import CliTestCase
from vmconsole.cli import vms


class VmListTests(CliTestCase):
    """``vm list``, against libvirt's own test driver."""

    def test_listed(self) -> None:
        """Each VM with its host and state, in a table and in JSON."""
        self.good("host", "add", "node1", "test:///default")
        self.good("host", "add", "node2", "test:///default")
        table = self.lines("vm", "list")
        self.assertEqual(table[0], ["NAME", "ID", "HOST", "STATE", "PROBLEM"])
        self.assertEqual([line[:4:2] for line in table[1:]], [["test", "node1"], ["test", "node2"]])
        [vm, _] = json.loads(self.good("vm", "list", "--json"))
        self.assertEqual(vm["state"], "running")
        self.assertIn("no console device", vm["problem"])

    def test_silent_host(self) -> None:
        """A host that does not answer is told on stderr, and the others are listed."""
        self.patch(vms, "_HOST_SECONDS", 1.0)
        listener = socket.socket(socket.AF_UNIX)
        self.addCleanup(listener.close)
        path = self.directory / "silent.sock"
        listener.bind(str(path))
        listener.listen()
        self.good("host", "add", "node1", "test:///default")
        self.good("host", "add", "silent", f"qemu+unix:///system?socket={path}")
        self.good("host", "add", "gone", "qemu+unix:///system?socket=/nonexistent")
        started = time.monotonic()
        result = self.run_it("vm", "list")
        self.assertLess(time.monotonic() - started, 6)
        self.assertEqual(result.exit_code, 1)
        self.assertIn("test", result.stdout)
        self.assertIn("ERROR: Cannot connect to gone", result.stderr)
        self.assertIn("ERROR: silent gave no answer within 1 seconds", result.stderr)
        self.assertEqual(result.stderr.count("\n"), 2)

    def test_refused_uri(self) -> None:
        """So is one whose URI the configuration no longer allows."""
        self.good("host", "add", "node1", "test:///default")
        self.good("host", "add", "node2")
        self.configure('[hosts.overrides]\nnode2 = "qemu+ssh://node2/system"')
        result = self.run_it("vm", "list")
        self.assertEqual(result.exit_code, 1)
        self.assertIn("node1", result.stdout)
        self.assertIn("node2 cannot be used", result.stderr)

    def test_local(self) -> None:
        """Without any host, this machine is asked."""
        self.configure('[hosts.overrides]\nlocalhost = "test:///default"')
        self.assertEqual(self.lines("vm", "list")[1][2], "localhost")
