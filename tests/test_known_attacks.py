"""What has gone wrong in other ssh servers before and during the login, tried on ours."""

from __future__ import annotations

from typing import Any

from twisted.conch.ssh.common import NS, getNS
from twisted.conch.ssh.keys import Key
from twisted.internet.defer import Deferred

from tests.rawclient import (
    CHANNEL_OPEN,
    EXT_INFO,
    IGNORE,
    KEX_REPLY,
    KEXINIT,
    SERVICE_ACCEPT,
    SERVICE_REQUEST,
    UNIMPLEMENTED,
    USERAUTH_REQUEST,
    USERAUTH_SUCCESS,
    RawClient,
)
from tests.ssh_ca import ed25519_key
from tests.sshpair import ALICE_KEY, PTY
from tests.test_packets import USERAUTH, PacketTestCase
from vmconsole.config import Config, Limits
from vmconsole.interfaces import AuthorizedKey
from vmconsole.ssh import packets, transport
from vmconsole.ssh.auth import UserAuth
from vmconsole.ssh.transport import ConsoleTransport

FAILURE, BANNER, PK_OK = 51, 53, 60
PING = 192  # OpenSSH's PROTOCOL, section 1.9
BOB_KEY = ed25519_key()


def login_request(
    key: Key,
    session_id: bytes | None,
    user: bytes = b"vmproxy",
    service: bytes = b"ssh-connection",
) -> bytes:
    """A USERAUTH_REQUEST with the signature for ``session_id``; None: without one, a query."""
    head = NS(user) + NS(service) + NS(b"publickey")
    head += b"\x00" if session_id is None else b"\x01"
    head += NS(key.sshType()) + NS(key.public().blob())
    if session_id is None:
        return head
    return head + NS(key.sign(NS(session_id) + bytes((USERAUTH_REQUEST,)) + head, key.sshType()))


class LoginTestCase(PacketTestCase):
    """Alice and Bob have a key each."""

    def setUp(self) -> None:
        super().setUp()
        self.pair.engine.keys.append(AuthorizedKey("u-bob", "bob", BOB_KEY.public().blob()))

    def authenticating(self, **options: Any) -> RawClient:
        """A client that may log in now."""
        client = self.started(**options)
        self.assertWorks(client)
        return client

    def logged_in(self) -> list[str]:
        """Who has logged in, of the whole test."""
        return [event["user"] for event in self.pair.events.named("login_accepted")]


class BeforeLoginTests(LoginTestCase):
    """Messages for which one has to be logged in, or that only a server sends."""

    def test_messages_of_users(self) -> None:
        """Each message from 80 on ends the connection, before the login is begun and in the midst
        of it (CVE-2025-32433 of Erlang/OTP, CVE-2018-7750 of paramiko; RFC 4252, section 6)."""
        for number in range(80, 256):
            for begun in (False, True):
                # Another server: a hundred connections without a login are all that one takes.
                if number % 40 == 0:
                    self.setUp()
                client = self.authenticating() if begun else self.started()
                client.send(number, NS(b"session") + bytes(12))
                self.assertEqual([sent for sent, _ in client.received], [1], number)
                self.assertEnded(client)
                client.server.connectionLost(None)

    def test_open_and_execute(self) -> None:
        """A channel and its command in one piece with the key exchange, as those exploits send
        them: nothing is begun."""
        client = self.started()
        client.write(
            client.sealed(CHANNEL_OPEN, NS(b"session") + bytes(3) + b"\1" + b"\0\1\0\0" * 2)
            + client.sealed(98, bytes(4) + NS(b"pty-req") + b"\0" + PTY)
            + client.sealed(98, bytes(4) + NS(b"exec") + b"\0" + NS(b"vm1"))
        )
        self.pair.clock.advance(1)
        self.assertEnded(client)
        self.assertEqual((self.pair.engine.asked, self.pair.guests.opened), ([], []))

    def test_messages_of_servers(self) -> None:
        """Who sends the server's own messages is not logged in by them, at any place
        (CVE-2018-10933 of libssh, CVE-2018-1000805 of paramiko)."""
        for number in (USERAUTH_SUCCESS, FAILURE, BANNER, PK_OK, 61, SERVICE_ACCEPT, KEX_REPLY):
            for place in range(3):
                client = self.started()
                if place:
                    self.assertWorks(client)
                if place == 2:
                    client.send(USERAUTH_REQUEST, login_request(ALICE_KEY, None))
                    self.assertEqual(client.numbers(), [PK_OK])
                client.send(number, NS(b""))
                if number == KEX_REPLY:
                    self.assertEnded(client)
                    continue
                self.assertEqual(client.numbers(), [UNIMPLEMENTED])
                client.send(CHANNEL_OPEN, NS(b"session") + bytes(12))
                self.assertEnded(client)
        self.assertEqual(self.logged_in(), [])


class WhoTests(LoginTestCase):
    """Who it is that logs in, when a client mixes requests."""

    def test_queried_key(self) -> None:
        """The key that has signed counts, not one that was asked about before or behind it
        (CVE-2024-45337 of golang.org/x/crypto)."""
        for queries in ((ALICE_KEY,), (ALICE_KEY, BOB_KEY, ALICE_KEY)):
            client = self.authenticating()
            requests = [login_request(key, None) for key in queries]
            requests.append(login_request(BOB_KEY, client.session_id))
            requests += requests[:1]
            client.write(b"".join(client.sealed(USERAUTH_REQUEST, each) for each in requests))
            self.assertEqual(client.server.avatar.login.user.name, "bob")
            self.assertEqual(client.numbers()[-2:], [USERAUTH_SUCCESS, 80])

    def test_user_switched_in_flight(self) -> None:
        """While the engine is asked about one request, others with other names, keys and
        services change nothing about it (CVE-2023-46446 of asyncssh)."""
        gate = self.pair.engine.keys_gate = Deferred()
        client = self.authenticating()
        client.send(USERAUTH_REQUEST, login_request(BOB_KEY, client.session_id))
        for request in (
            login_request(ALICE_KEY, None),
            login_request(ALICE_KEY, client.session_id, b"root"),
            login_request(ALICE_KEY, client.session_id, service=b"ssh-userauth"),
            NS(b"alice@internal") + NS(b"ssh-connection") + NS(b"none"),
        ):
            client.send(USERAUTH_REQUEST, request)
        client.send(SERVICE_REQUEST, USERAUTH)
        client.send(USERAUTH_REQUEST, login_request(ALICE_KEY, client.session_id))
        client.numbers()
        gate.callback(None)
        client.write(b"")
        self.assertEqual(self.logged_in(), ["bob"])
        self.assertEqual(client.server.avatar.login.user.name, "bob")
        self.assertEqual(client.numbers(), [USERAUTH_SUCCESS, 80])

    def test_request_ahead_of_the_login(self) -> None:
        """What a client, or somebody on the way without strict key exchange, sent ahead of a
        login is judged by itself, and leaves nothing behind (CVE-2023-46445, CVE-2023-46446)."""
        client = self.started(strict=False)
        client.send(EXT_INFO, b"\0\0\0\1" + NS(b"server-sig-algs") + NS(b"ssh-rsa"))
        self.assertWorks(client)
        client.send(USERAUTH_REQUEST, login_request(BOB_KEY, b"of another session"))
        client.send(USERAUTH_REQUEST, login_request(ALICE_KEY, client.session_id))
        self.assertEqual(client.numbers(), [FAILURE, USERAUTH_SUCCESS, 80])
        self.assertEqual(self.logged_in(), ["alice@internal"])

    def test_grace_ends_in_flight(self) -> None:
        """The grace period may end while the engine is asked: nobody is logged in then, and the
        answer finds nothing to do (the races of CVE-2006-5051 and CVE-2024-6387)."""
        gate = self.pair.engine.keys_gate = Deferred()
        client = self.authenticating()
        client.send(USERAUTH_REQUEST, login_request(ALICE_KEY, client.session_id))
        self.pair.clock.advance(Limits().login_grace)
        client.read()
        gate.callback(None)
        client.write(b"")
        self.assertEqual([number for number, _ in client.received], [1])
        self.assertEqual(self.logged_in(), [])
        self.pair.clock.advance(transport.LAST_WORDS)
        self.assertTrue(client.wire.aborted)
        client.server.connectionLost(None)
        self.assertEqual(self.pair.timers(), [])


class ExchangeDuringLoginTests(LoginTestCase):
    """New keys in the midst of a login."""

    def test_between_query_and_signature(self) -> None:
        """The session id stays the first exchange's (RFC 4253, section 7.2): it has to be in the
        signature, and no later exchange's hash will do."""
        hashes: list[bytes] = []
        setup = ConsoleTransport._keySetup

        def noted(server: Any, secret: bytes, exchange_hash: bytes) -> None:
            hashes.append(exchange_hash)
            setup(server, secret, exchange_hash)

        self.patch(ConsoleTransport, "_keySetup", noted)
        client = self.authenticating()
        client.send(USERAUTH_REQUEST, login_request(ALICE_KEY, None))
        client.exchange()
        client.numbers()
        client.send(USERAUTH_REQUEST, login_request(ALICE_KEY, hashes[1]))
        self.assertEqual(client.numbers(), [FAILURE])
        client.send(USERAUTH_REQUEST, login_request(ALICE_KEY, hashes[0]))
        self.assertEqual(client.numbers(), [USERAUTH_SUCCESS, 80])

    def test_in_flight(self) -> None:
        """An exchange may begin while the engine is asked: the answer waits for the new keys, and
        comes before whatever else belongs to the login."""
        gate = self.pair.engine.keys_gate = Deferred()
        client = self.authenticating()
        client.send(USERAUTH_REQUEST, login_request(ALICE_KEY, client.session_id))
        client.send_kexinit()
        gate.callback(None)
        client.write(b"")
        self.assertEqual(client.numbers(), [KEXINIT])
        client.send_init()
        self.assertEqual(client.numbers(), [KEX_REPLY, 21, USERAUTH_SUCCESS, 80])
        client.send_newkeys()
        self.assertGreater(client.open_session(), -1)

    def test_exchanges_without_end(self) -> None:
        """KEXINIT again and again is an error; whole exchanges before a login wait for their time
        (CVE-2016-8858)."""
        client = self.authenticating()
        client.send_kexinit()
        client.send_kexinit()
        self.assertEnded(client)
        client = self.authenticating()
        for _ in range(20):
            client.send_kexinit()
            client.send_init()
            if KEX_REPLY not in client.numbers():
                break
            client.send_newkeys()
        self.assertEqual(client.server.exchanges, 8)


class PingTests(LoginTestCase):
    """OpenSSH's PING, which we do not offer (CVE-2025-26466)."""

    def test_not_offered(self) -> None:
        """Clients are not told of it, so that none sends it."""
        client = self.client().start()
        [told] = [payload for number, payload in client.received if number == EXT_INFO]
        self.assertNotIn(b"ping@openssh.com", getNS(told[4:])[0])

    def test_during_an_exchange(self) -> None:
        """Within an exchange that the client has begun it ends the connection: nothing is kept
        for later."""
        for login in (False, True):
            client = self.authenticating()
            if login:
                client.login(b"vmproxy", ALICE_KEY)
            client.send_kexinit()
            client.numbers()
            client.send(PING, NS(b"x"))
            self.assertEnded(client)

    def test_of_users(self) -> None:
        """It is unknown to us, which is said at once, also while our KEXINIT has no answer; a
        client that does not read that is soon not read, either."""
        client = self.authenticating().login(b"vmproxy", ALICE_KEY)
        client.numbers()
        client.server.renew_keys()
        for _ in range(2 * packets._MAX_BLOCKED):
            client.send(PING, NS(b"x"))
        self.assertEqual(client.server._blocked, [])
        self.assertEqual(set(client.numbers()), {KEXINIT, UNIMPLEMENTED})
        client.exchange()
        client.wire.taken = False
        self.assertLess(client.flood(PING, NS(bytes(100)), 20000), 20000)
        self.assertLess(client.wire.waiting, 3 * 65536)


class EnumerationTests(LoginTestCase):
    """What strangers can find out."""

    def answers(self, requests: list[bytes]) -> list[Any]:
        """What one client hears to each of these, and what it has to wait for."""
        client = self.authenticating()
        heard = []
        for request in requests:
            client.send(USERAUTH_REQUEST, request)
            received, client.received = client.received, []
            heard.append(received)
        client.server.connectionLost(None)
        return heard

    def test_names(self) -> None:
        """Names are no secret here; but nothing else depends on them: a key that is known and one
        that is not have one answer under a wrong name, and no engine is asked (CVE-2016-6210,
        CVE-2018-15473)."""
        stranger = ed25519_key()
        heard = [
            self.answers([login_request(key, None, b"root"), login_request(key, b"", b"root")])
            for key in (ALICE_KEY, stranger)
        ]
        self.assertEqual(heard[0], heard[1])
        self.assertEqual([number for number, _ in heard[0][0]], [BANNER, FAILURE])
        self.assertEqual(self.pair.engine.asked, [])

    def test_malformed(self) -> None:
        """A request that is cut, at any place, has the same answer whether the engine knows its
        key or not."""
        whole = [login_request(key, b"") for key in (ALICE_KEY, ed25519_key())]
        self.assertEqual(len(whole[0]), len(whole[1]))
        # Behind the method's name: before it there is no request that could be answered.
        first = len(NS(b"vmproxy") + NS(b"ssh-connection") + NS(b"publickey"))
        kept = self.pair.events
        for end in range(first, len(whole[0])):
            heard = [self.answers([request[:end]]) for request in whole]
            self.assertEqual(heard[0], heard[1], end)
            self.assertEqual([number for number, _ in heard[0][0]], [FAILURE], end)
            if end % 20 == 0:
                self.setUp()
        self.assertEqual(kept.named("login_accepted"), [])
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_signatures(self) -> None:
        """A wrong signature by a known key, and by a stranger's, have one answer."""
        heard = [self.answers([login_request(key, b"")]) for key in (ALICE_KEY, ed25519_key())]
        self.assertEqual(heard[0], heard[1])

    def test_passwords(self) -> None:
        """A password is not even looked at, however long it is: there is nothing that could take
        time (CVE-2016-6515)."""
        looked_at: list[bytes] = []
        self.patch(UserAuth, "auth_password", lambda _, data: looked_at.append(data))
        head = NS(b"vmproxy") + NS(b"ssh-connection") + NS(b"password") + b"\0"
        heard = self.answers([head + NS(b"x"), head + NS(bytes(30000))])
        self.assertEqual(heard[0], heard[1])
        self.assertEqual([number for number, _ in heard[0]], [FAILURE])
        self.assertEqual(looked_at, [])


class LimitTests(LoginTestCase):
    """Counts that a client might set back."""

    def test_tries_over_new_keys(self) -> None:
        """A new key exchange, or the userauth service anew, sets no count back (CVE-2015-5600)."""
        tries = Config().limits.auth_tries
        client = self.authenticating()
        for count in range(tries):
            client.send(USERAUTH_REQUEST, login_request(ALICE_KEY, b"wrong"))
            self.assertEqual(client.numbers(), [FAILURE], count)
            client.exchange()
            client.send(SERVICE_REQUEST, USERAUTH)
            client.send(IGNORE, NS(b""))
            client.numbers()
        client.send(USERAUTH_REQUEST, login_request(ALICE_KEY, client.session_id))
        self.assertEqual([number for number, _ in client.received], [1])
        self.assertEqual(self.logged_in(), [])
