"""Signatures, keys and certificates that other ssh servers have taken, and should not have."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

from twisted.conch.ssh.common import MP, NS, getNS
from twisted.conch.ssh.keys import Key

from tests.authenticator import SK_ECDSA, SK_ED25519, Authenticator
from tests.rawclient import USERAUTH_REQUEST, USERAUTH_SUCCESS, RawClient
from tests.ssh_ca import SUFFIX, ecdsa_key, ed25519_key, issue, rsa_key
from tests.sshpair import ALICE, ALICE_KEY
from tests.test_certificates import CA, KEY, SUCCESS, CertificateTestCase
from tests.test_known_attacks import FAILURE, LoginTestCase, login_request
from vmconsole.interfaces import AuthorizedKey

RSA_KEY = rsa_key()
ECDSA_KEY = ecdsa_key()
# Orders of the groups of P-256 and of Ed25519.
N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
L = 2**252 + 27742317777372353535851937790883648493


class SignatureTestCase(LoginTestCase):
    """Alice has a key of each type."""

    def setUp(self) -> None:
        super().setUp()
        for key in (RSA_KEY, ECDSA_KEY):
            self.know(key.public().blob())

    def know(self, blob: bytes) -> None:
        """Make it a key of Alice's."""
        self.pair.engine.keys.append(AuthorizedKey(ALICE.id, ALICE.name, blob))

    def answer(
        self,
        key: Any,
        change: Callable[[bytes], bytes] = lambda signature: signature,
        algorithm: bytes = b"",
        blob: bytes = b"",
        client: RawClient | None = None,
    ) -> int:
        """What a login is answered with whose signature went through ``change``."""
        client = client or self.authenticating()
        algorithm = algorithm or key.sshType()
        head = NS(b"vmproxy") + NS(b"ssh-connection") + NS(b"publickey") + b"\x01"
        head += NS(algorithm) + NS(blob or key.public().blob())
        name = algorithm.removesuffix(SUFFIX)
        signed = NS(client.session_id) + bytes((USERAUTH_REQUEST,)) + head
        client.send(USERAUTH_REQUEST, head + NS(change(key.sign(signed, name))))
        answer = client.numbers()[0]
        client.server.connectionLost(None)
        return answer


class BindingTests(SignatureTestCase):
    """What a signature is good for (RFC 4252, section 7)."""

    def test_replayed(self) -> None:
        """One that was made for another connection, another name, or another service is wrong
        here; the same one is good where it belongs."""
        other = self.authenticating()
        for request in (
            login_request(ALICE_KEY, other.session_id),
            login_request(ALICE_KEY, b""),
        ):
            client = self.authenticating()
            client.send(USERAUTH_REQUEST, request)
            self.assertEqual(client.numbers(), [FAILURE])
        [other_name] = set(self.pair.config.ssh.users) - {"vmproxy"}
        client = self.authenticating()
        for name, service in (
            (other_name.encode(), b"ssh-connection"),
            (b"root", b"ssh-connection"),
            (b"vmproxy", b"ssh-userauth"),
            (b"vmproxy\0", b"ssh-connection"),
        ):
            request = login_request(ALICE_KEY, client.session_id, name, service)
            forged = request.replace(NS(name) + NS(service), NS(b"vmproxy") + NS(b"ssh-connection"))
            self.assertNotEqual(forged, request)
            client.send(USERAUTH_REQUEST, forged)
            self.assertEqual(client.numbers(), [FAILURE])
            # It is a try of its own each time.
            client = self.authenticating()
        self.assertEqual(self.logged_in(), [])
        other.send(USERAUTH_REQUEST, login_request(ALICE_KEY, other.session_id))
        self.assertEqual(other.numbers(), [USERAUTH_SUCCESS, 80])

    def test_proof_of_host_keys(self) -> None:
        """What a login would have to be signed with is never signed by our host keys: a proof
        that we have them begins with its own name, and has this session's id."""
        client = self.authenticating().login(b"vmproxy", ALICE_KEY)
        blob = client.server.host_keys.blobs[0]
        name = b"hostkeys-prove-00@openssh.com"
        client.numbers()
        client.send(80, NS(name) + b"\1" + NS(blob))
        [(number, proof)] = client.received
        self.assertEqual(number, 81)
        key = Key.fromString(blob, type="BLOB")
        signature = getNS(proof)[0]
        self.assertTrue(key.verify(signature, NS(name) + NS(client.session_id) + NS(blob)))
        for session_id in (b"", client.session_id, name):
            head = NS(b"vmproxy") + NS(b"ssh-connection") + NS(b"publickey") + b"\1"
            head += NS(key.sshType()) + NS(blob)
            for signed in (NS(session_id) + b"\x32" + head, session_id, NS(session_id)):
                self.assertFalse(key.verify(signature, signed))


class ValueTests(SignatureTestCase):
    """Numbers in a signature that no signer makes."""

    def test_ecdsa(self) -> None:
        """r and s have to be from 1 to below the group's order; cut, or with something behind
        them, they are none."""

        def raw(signature: bytes) -> tuple[int, int]:
            r, s, _ = getNS(getNS(signature, 2)[1], 2)
            return int.from_bytes(r, "big"), int.from_bytes(s, "big")

        def made(values: bytes) -> bytes:
            return NS(ECDSA_KEY.sshType()) + NS(values)

        self.assertEqual(self.answer(ECDSA_KEY), USERAUTH_SUCCESS)
        changes: tuple[Callable[[int, int], bytes], ...] = (
            lambda r, s: MP(0) + MP(0),
            lambda r, s: MP(0) + MP(s),
            lambda r, s: MP(r) + MP(0),
            lambda r, s: MP(r + N) + MP(s),
            lambda r, s: MP(r) + MP(s + N),
            lambda r, s: MP(N) + MP(N),
            lambda r, s: MP(s) + MP(r),
            lambda r, s: MP(r),
            lambda r, s: MP(r) + NS(b""),
            lambda r, s: NS(b"\xff" * 30000) + MP(s),
            lambda r, s: r.to_bytes(32, "big") + s.to_bytes(32, "big"),
        )
        for number, change in enumerate(changes):
            answer = self.answer(
                ECDSA_KEY, lambda signature, change=change: made(change(*raw(signature)))
            )
            self.assertEqual(answer, FAILURE, number)

    def test_ed25519(self) -> None:
        """S has to be below the group's order (RFC 8032, section 5.1.7), and 64 bytes there."""

        def larger(signature: bytes) -> bytes:
            name, raw, _ = getNS(signature, 2)
            s = int.from_bytes(raw[32:], "little") + L
            return NS(name) + NS(raw[:32] + s.to_bytes(32, "little"))

        name = ALICE_KEY.sshType()
        for change in (
            larger,
            lambda _: NS(name) + NS(bytes(64)),
            lambda _: NS(name) + NS(b""),
            lambda signature: NS(name) + NS(getNS(signature, 2)[1][:63]),
            lambda signature: NS(name) + NS(getNS(signature, 2)[1] + b"\0"),
        ):
            self.assertEqual(self.answer(ALICE_KEY, change), FAILURE)

    def test_rsa(self) -> None:
        """A number that is not below the modulus, or longer than it, is none."""
        modulus = RSA_KEY.data()["n"]

        def larger(signature: bytes) -> bytes:
            name, raw, _ = getNS(signature, 2)
            return NS(name) + NS((int.from_bytes(raw, "big") + modulus).to_bytes(257, "big"))

        name = b"rsa-sha2-512"
        for change in (
            larger,
            lambda signature: NS(name) + NS(b"\0" + getNS(signature, 2)[1]),
            lambda signature: NS(name) + NS(getNS(signature, 2)[1][:-1]),
            lambda _: NS(name) + NS(b""),
            lambda _: NS(name) + NS(b"\0" * 256),
            lambda _: NS(name) + NS(b"\0" * 255 + b"\1"),
        ):
            self.assertEqual(self.answer(RSA_KEY, change, name), FAILURE)

    def test_rsa_without_leading_zeros(self) -> None:
        """One that begins with zeros may come without them, as some clients send it, and OpenSSH
        takes it: else one login in 256 would fail. The number is the same."""

        def stripped(signature: bytes) -> bytes:
            name, raw, _ = getNS(signature, 2)
            lengths.append(len(raw.lstrip(b"\0")))
            return NS(name) + NS(raw.lstrip(b"\0"))

        for algorithm in (b"rsa-sha2-256", b"rsa-sha2-512"):
            lengths: list[int] = []
            head = NS(b"vmproxy") + NS(b"ssh-connection") + NS(b"publickey") + b"\x01"
            head += NS(algorithm) + NS(RSA_KEY.public().blob())
            for number in count():
                session_id = number.to_bytes(32, "big")
                signed = NS(session_id) + bytes((USERAUTH_REQUEST,)) + head
                if getNS(RSA_KEY.sign(signed, algorithm), 2)[1][0] == 0:
                    break
            client = self.authenticating()
            client.session_id = client.server.sessionID = session_id
            answer = self.answer(RSA_KEY, stripped, algorithm, client=client)
            self.assertLess(lengths[0], 256)
            self.assertEqual(answer, USERAUTH_SUCCESS)

    def test_behind_a_signature(self) -> None:
        """Nothing may stand behind a signature, nor be missing of it, as OpenSSH has it."""
        for key, algorithm in ((ALICE_KEY, b""), (RSA_KEY, b"rsa-sha2-256"), (ECDSA_KEY, b"")):
            for change in (
                lambda signature: signature + b"\0",
                lambda signature: signature + NS(b""),
                lambda signature: signature[:-1],
                # A length beyond the end.
                lambda signature: NS(getNS(signature)[0]) + b"\xff" * 4 + getNS(signature, 2)[1],
            ):
                self.assertEqual(self.answer(key, change, algorithm), FAILURE)
            self.assertEqual(self.answer(key, algorithm=algorithm), USERAUTH_SUCCESS)

    def test_behind_a_security_keys_signature(self) -> None:
        """Behind a security key's stand its flags and its counter, and nothing else."""
        keys = [Authenticator(kind) for kind in (SK_ED25519, SK_ECDSA)]
        for key in keys:
            self.know(key.blob)
        for key in keys:
            for tail, expected in ((b"", USERAUTH_SUCCESS), (b"\0", FAILURE)):
                client = self.authenticating()
                head = NS(b"vmproxy") + NS(b"ssh-connection") + NS(b"publickey") + b"\x01"
                head += NS(key.kind) + NS(key.blob)
                signature = key.sign(NS(client.session_id) + bytes((USERAUTH_REQUEST,)) + head)
                client.send(USERAUTH_REQUEST, head + NS(signature + tail))
                self.assertEqual(client.numbers()[0], expected)
                client.server.connectionLost(None)


class ConfusionTests(SignatureTestCase):
    """An algorithm's name in one place, and another one's bytes in another."""

    def test_names(self) -> None:
        """The name in the request, that in the key, and that in the signature have to go
        together: SHA-1 behind a better name, one RSA hash for the other, another curve, a
        certificate's algorithm in a signature (RFC 8332, section 3.2)."""
        for key, algorithm, named in (
            (RSA_KEY, b"rsa-sha2-512", b"ssh-rsa"),
            (RSA_KEY, b"rsa-sha2-512", b"rsa-sha2-256"),
            (RSA_KEY, b"rsa-sha2-256", b"rsa-sha2-512"),
            (RSA_KEY, b"rsa-sha2-256", b"rsa-sha2-256" + SUFFIX),
            (RSA_KEY, b"rsa-sha2-256", b""),
            (ALICE_KEY, b"ssh-ed25519", b"ssh-ed25519" + SUFFIX),
            (ALICE_KEY, b"ssh-ed25519", SK_ED25519),
            (ECDSA_KEY, b"ecdsa-sha2-nistp256", b"ecdsa-sha2-nistp384"),
            (ECDSA_KEY, b"ecdsa-sha2-nistp256", SK_ECDSA),
        ):

            def renamed(signature: bytes, named: bytes = named) -> bytes:
                return NS(named) + NS(getNS(signature, 2)[1])

            self.assertEqual(self.answer(key, renamed, algorithm), FAILURE, (algorithm, named))
            self.assertEqual(self.answer(key, algorithm=algorithm), USERAUTH_SUCCESS)

    def test_key_of_another_size(self) -> None:
        """A key whose point or number has another size than its type says is refused, without a
        traceback (CVE-2020-9283 of golang.org/x/crypto), though the engine knew it."""
        cases = (
            (b"ssh-ed25519", NS(bytes(31))),
            (b"ssh-ed25519", NS(b"")),
            (b"ssh-ed25519", NS(bytes(33))),
            (SK_ED25519, NS(bytes(31)) + NS(b"ssh:")),
            (b"ecdsa-sha2-nistp256", NS(b"nistp256") + NS(b"\4" + bytes(64))),
            (b"ecdsa-sha2-nistp256", NS(b"nistp256") + NS(b"\0")),
            (b"ecdsa-sha2-nistp521", NS(b"nistp521") + getNS(ECDSA_KEY.public().blob(), 2)[2]),
            (b"rsa-sha2-256", NS(b"") + NS(b"")),
            (b"rsa-sha2-256", MP(1) + MP((1 << 2048) - 1)),
            (b"rsa-sha2-256", MP(65536) + MP((1 << 2048) - 1)),
            (b"rsa-sha2-256", MP(65537) + NS(b"\xff" * 256)),
        )
        named = {b"rsa-sha2-256": b"ssh-rsa"}
        blobs = [(kind, NS(named.get(kind, kind)) + rest) for kind, rest in cases]
        for _, blob in blobs:
            self.know(blob)
        for kind, blob in blobs:
            client = self.authenticating()
            head = NS(b"vmproxy") + NS(b"ssh-connection") + NS(b"publickey")
            key = NS(kind) + NS(blob)
            for request in (b"\0" + key, b"\1" + key + NS(NS(kind) + NS(bytes(64)) + bytes(5))):
                client.send(USERAUTH_REQUEST, head + request)
                self.assertEqual(client.numbers(), [FAILURE], blob)
            client.server.connectionLost(None)
        self.assertEqual(self.flushLoggedErrors(), [])


class CertificateConfusionTests(CertificateTestCase):
    """Certificates and plain keys in each other's place."""

    def test_in_each_others_place(self) -> None:
        """A certificate under a plain name, and a plain key under a certificate's, is refused,
        though each would let in under its own."""
        blob, plain = issue(CA, ALICE_KEY), ALICE_KEY.public().blob()
        self.pair.auth.sign(b"vmproxy", ALICE_KEY, blob=blob)
        self.assertEqual(self.answers(), [FAILURE])
        self.assertEqual(self.sign(plain, ALICE_KEY), [FAILURE])
        self.assertEqual(self.sign(blob, ALICE_KEY), [SUCCESS])
        self.again()
        self.pair.auth.sign(b"vmproxy", ALICE_KEY)
        self.assertEqual(self.answers(), [SUCCESS])

    def test_chain(self) -> None:
        """A certificate does not make its key a CA's: there are no chains (PROTOCOL.certkeys)."""
        inner = Key(KEY._keyObject)
        by_key = issue(inner, ed25519_key())
        self.assertEqual(self.refused(by_key), [])
        certified = issue(CA, KEY)
        by_certificate = by_key.replace(NS(inner.public().blob()), NS(certified))
        self.assertNotEqual(by_certificate, by_key)
        self.assertEqual(self.refused(by_certificate), [])
