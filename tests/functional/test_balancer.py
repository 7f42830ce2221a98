"""Behind a balancer, which speaks the PROXY protocol with the proxy."""

from __future__ import annotations

import sys

from tests.functional.case import FunctionalTestCase
from tests.functional.process import Child

# Connects, sends the header, and passes on both ways, each until its own end: what HAProxy does
# with `send-proxy`.
_RELAY = """
import os, socket, sys, threading
upstream = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
upstream.sendall(sys.argv[2].encode() + b"\\r\\n")
def down():
    while data := upstream.recv(65536):
        os.write(1, data)
    os.close(1)
threading.Thread(target=down).start()
while data := os.read(0, 65536):
    upstream.sendall(data)
upstream.shutdown(socket.SHUT_WR)
"""


class BalancerTests(FunctionalTestCase):
    """``haproxy:`` in ``ssh.listen``, with the real ssh."""

    configuration = "[limits]\nper_address = 1\n"

    async def start_site(self) -> None:
        """Behind a balancer alone."""
        self.relay = self.site.folder / "relay.py"
        self.relay.write_text(_RELAY)
        config = self.site.config.read_text()
        self.site.config.write_text(config.replace('["tcp:', '["haproxy:tcp:'))
        await super().start_site()

    def ssh(self, address: str, *command: str) -> Child:
        """Bob's, from ``address``."""
        header = f"PROXY TCP4 {address} 127.0.0.1 4711 22"
        relay = f"ProxyCommand={sys.executable} {self.relay} %p '{header}'"
        return self.site.ssh(self.bob, *command, terminal=not command, options=(relay,))

    async def test_clients_address(self) -> None:
        """Who is told to be elsewhere is elsewhere: for ``info``, the audit, and the limits."""
        console = self.ssh("192.0.2.1")
        await console.expect(rb"To leave")
        info = self.ssh("192.0.2.2", "info")
        self.assertEqual(await info.ended(), 0, info.errors)
        self.assertIn(b"from: 192.0.2.2\n", info.seen)
        await self.site.log(rb"login accepted [^\n]* address=192\.0\.2\.2\n")
        refused = self.ssh("192.0.2.1", "info")
        self.assertEqual(await refused.ended(), 255)
        self.assertIn(b"too many connections from your address", refused.errors)
        console.type(b"\x1d.")
        self.assertEqual(await console.ended(), 0)

    async def test_without_the_balancer(self) -> None:
        """Who comes without a header gets nothing."""
        ssh = self.site.ssh(self.bob, "info", terminal=False)
        self.assertEqual(await ssh.ended(), 255)
        self.assertEqual(ssh.seen, b"")
        await self.site.log(rb"Refused a connection without a PROXY header: 127\.0\.0\.1: ")
