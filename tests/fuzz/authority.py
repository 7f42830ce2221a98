"""Certificate authorities, and the certificates that they issue: good ones, and others.

A certificate is made of a *specification*, a JSON object of what is not as usual: ``ca``,
``signer`` (whose key really signs), ``algorithm`` (of that signature), ``kind``, ``nonce`` (its
length), ``key`` (``padded``, ``cut``), ``serial``, ``usage``, ``id``, ``principals`` (null: the
user's name), ``after`` and ``before`` (seconds from now; null: no limit), ``options``,
``extensions`` (pairs of a name and its data, in hex), ``reserved``, ``nested`` (the CA's key is
itself in a certificate), ``edits`` (before it is signed), ``damage`` (behind that).
Source: OpenSSH's PROTOCOL.certkeys.
"""

from __future__ import annotations

import struct
from base64 import b64encode
from functools import cache
from random import Random
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from twisted.conch.ssh.common import MP, NS, getNS

from tests.fuzz.edits import edit
from tests.fuzz.keyring import Known, key_of, sign

SUFFIX = b"-cert-v01@openssh.com"
USER, HOST = 1, 2
FOR_EVER = 2**64 - 1
TRUSTED = ("ed", "p256", "p521", "rsa", "gone")
"""The CAs that are trusted at first; ``gone`` is revoked."""
REVOKED_ID, REVOKED_SERIALS = b"stolen laptop", (666, 670)
# What nobody in ``ssh.user_ca`` is.
_OTHERS = ("stranger", "stranger", "weak", "sk")
_PTY = [b"permit-pty".hex(), ""]
_SIGNATURES = {"rsa": "rsa-sha2-512", "weak": "rsa-sha2-512"}


@cache
def authorities() -> dict[str, Known]:
    """All CAs by their names; made once, since RSA keys take a while."""
    raw = {
        **{
            name: ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(at, at + 32)))
            for at, name in enumerate(("ed", "gone", "stranger"))
        },
        "p256": ec.derive_private_key(4711, ec.SECP256R1()),
        "p521": ec.derive_private_key(4712, ec.SECP521R1()),
        "rsa": rsa.generate_private_key(65537, 2048),
        "weak": rsa.generate_private_key(65537, 1024),
    }
    made = {name: key_of(private) for name, private in raw.items()}
    return {**made, "sk": key_of(raw["ed"], security_key=True)}


def public_line(name: str = "ed") -> str:
    """A CA's public key, as a file of trusted CAs has it."""
    blob = authorities()[name].blob
    return f"{getNS(blob)[0].decode()} {b64encode(blob).decode()} the CA {name}\n"


def packed(pairs: list[list[str]]) -> bytes:
    """Options, or extensions."""
    return b"".join(NS(bytes.fromhex(name)) + NS(bytes.fromhex(data)) for name, data in pairs)


def certificate(known: Known, name: bytes, how: dict[str, Any], now: float) -> bytes:
    """A certificate for a key, and mostly for the user of this name, that counts at ``now``
    (seconds since the epoch)."""
    authority = authorities()[how.get("ca", "ed")]
    names = [name] if (given := how.get("principals")) is None else map(bytes.fromhex, given)
    body = (
        NS(bytes.fromhex(how["kind"]) if "kind" in how else known.kind + SUFFIX)
        + NS(bytes(how.get("nonce", 32)))
        + _fields(known, how.get("key", ""))
        + struct.pack(">QL", how.get("serial", 1), how.get("usage", USER))
        + NS(bytes.fromhex(how.get("id", b"a certificate".hex())))
        + NS(b"".join(map(NS, names)))
        + struct.pack(">Q", _moment(how.get("after"), now, 0))
        + struct.pack(">Q", _moment(how.get("before"), now, FOR_EVER))
        + NS(packed(how.get("options", [])))
        + NS(packed(how.get("extensions", [_PTY])))
        + NS(bytes.fromhex(how.get("reserved", "")))
    )
    if how.get("nested"):
        body += NS(certificate(authority, name, {}, now))
    else:
        body += NS(authority.blob)
    body = edit(body, how.get("edits", []))
    signer = how.get("signer", how.get("ca", "ed"))
    algorithm = how.get("algorithm") or _SIGNATURES.get(signer)
    signature = _signature(authorities()[signer], body, algorithm)
    return edit(body + NS(signature), how.get("damage", []))


def _moment(seconds: float | None, now: float, otherwise: int) -> int:
    return otherwise if seconds is None else min(FOR_EVER, max(0, int(now + seconds)))


def _fields(known: Known, how: str) -> bytes:
    fields = getNS(known.blob, 1)[1]
    if how == "cut":
        return NS(getNS(fields)[0][:-1]) + getNS(fields)[1]
    if how == "padded":
        first, rest = getNS(fields)
        return NS(b"\0" + first) + rest
    return bytes(fields)


def _signature(authority: Known, body: bytes, algorithm: str | None) -> bytes:
    if algorithm == "ssh-rsa" and isinstance(authority.private, rsa.RSAPrivateKey):
        made = authority.private.sign(body, padding.PKCS1v15(), hashes.SHA1())
        return NS(b"ssh-rsa") + NS(made)
    return sign(authority, body, (algorithm or authority.kind.decode()).encode(), "")


# --- which are made


def specification(random: Random, sound: bool = False) -> dict[str, Any]:
    """One that is good, or has a mistake in it, or a few; ``sound``: it is mostly good."""
    how: dict[str, Any] = {"ca": random.choice(TRUSTED[:4])}
    if random.random() < 0.3:
        how["before"] = random.choice((5, 60, 90, 86400))
    if random.random() < 0.3:
        how["extensions"] = _extensions(random)
    faults = _UNUSUAL if sound else _FAULTS
    for fault in random.sample(faults, random.choice((0, 0, 1, 1, 1, 2))):
        how.update(fault(random))
    return how


def _of_whom(random: Random) -> dict[str, Any]:
    if random.random() < 0.5:
        return {"ca": random.choice(_OTHERS)}
    if random.random() < 0.3:
        return {"ca": "gone"}
    return {"signer": random.choice((*TRUSTED, *_OTHERS))}


def _signed(random: Random) -> dict[str, Any]:
    algorithms = ("ssh-rsa", "ssh-rsa", "rsa-sha2-256", "ssh-ed25519", "ssh-dss", "\xff")
    return {"ca": "rsa", "algorithm": random.choice(algorithms)}


def _shape(random: Random) -> dict[str, Any]:
    kinds = (b"ssh-ed25519", b"ssh-ed25519-cert-v00@openssh.com", b"ssh-rsa" + SUFFIX, b"", b"\xff")
    return random.choice(
        (
            {"nonce": random.choice((0, 1, 16, 31, 64, 2000))},
            {"kind": random.choice(kinds).hex()},
            {"key": random.choice(("padded", "cut"))},
            {"nested": 1},
            {"reserved": random.randbytes(5).hex()},
            {"usage": random.choice((0, HOST, HOST, 3, 2**32 - 1))},
        )
    )


def _numbers(random: Random) -> dict[str, Any]:
    if random.random() < 0.4:
        return {
            "id": random.choice((b"", REVOKED_ID, REVOKED_ID + b" ", b"\xff\n", b"x" * 900)).hex()
        }
    first, last = REVOKED_SERIALS
    return {"serial": random.choice((0, FOR_EVER, 2**63, first - 1, first, last, last + 1))}


def _window(random: Random) -> dict[str, Any]:
    edges = (-(10**12), -86400, -2, -1, 0, 1, 2, 61, 86400, 10**12, 2**64, None)
    return {"after": random.choice(edges), "before": random.choice(edges)}


def _names(random: Random) -> dict[str, Any]:
    names = (
        *(b"alice@internal", b"bob@internal", b"carol@internal", b"twin", b"mallory", b"alice"),
        *(b"", b"\xff", b"ALICE@internal", b"alice@internal\0", b" alice@internal", b"*", b"a,b"),
        *(b"\xd0\xb0lice@internal", b"alice@internal,bob@internal"),
    )
    chosen = random.choices(names, k=random.choice((0, 1, 1, 2, 3)))
    if random.random() < 0.05:
        chosen += [b"n"] * random.choice((255, 256, 257))
    return {"principals": [name.hex() for name in chosen]}


def _options(random: Random) -> dict[str, Any]:
    values = {
        b"force-command": (NS(b"list"), NS(b"vm1"), NS(b""), b"", b"list", NS(b"list") + b"x"),
        b"source-address": (
            *(
                NS(b"10.0.0.0/8"),
                NS(b"10.0.0.0/8,::1"),
                NS(b"192.0.2.1"),
                NS(b""),
                b"",
                b"10.0.0.0",
            ),
            *(NS(b"!10.0.0.1,0.0.0.0/0"), NS(b"10.*"), NS(b"10.0.0.1/8"), NS(b"10.0.0.0/8 ")),
        ),
        b"verify-required": (b"", NS(b"")),
        b"x@example.org": (b"", NS(b"y")),
        b"Force-Command": (NS(b"list"),),
        b"": (b"",),
    }
    chosen = random.choices((*values, b"force-command", b"source-address"), k=random.choice((1, 2)))
    pairs = [[name.hex(), random.choice(values[name]).hex()] for name in chosen]
    if random.random() < 0.7:
        pairs.sort(key=lambda pair: bytes.fromhex(pair[0]))
    return {"options": pairs}


def _extensions(random: Random) -> list[list[str]]:
    names = (b"permit-pty", b"permit-pty", b"no-touch-required", b"permit-X11-forwarding", b"z@y")
    pairs = [[name.hex(), ""] for name in random.choices(names, k=random.choice((0, 1, 2, 3)))]
    if random.random() < 0.8:
        pairs = sorted({name: [name, data] for name, data in pairs}.values())
    if random.random() < 0.2:
        pairs.append([b"zz@y".hex(), random.choice((NS(b"1"), b"1", NS(b"1") * 2)).hex()])
    return pairs


def _damage(random: Random) -> dict[str, Any]:
    at = random.getrandbits(11)
    edits = [
        random.choice(
            (
                ["flip", at, 1 << random.randrange(8)],
                ["cut", at],
                ["add", random.randbytes(random.choice((1, 4, 9))).hex()],
                ["put", at, random.choice(("00", "00000000", "00000001"))],
                ["drop", at, random.choice((1, 4))],
            )
        )
    ]
    return {random.choice(("edits", "edits", "damage")): edits}


_UNUSUAL = (_numbers, _options, _names)
_FAULTS = (_of_whom, _signed, _shape, _numbers, _window, _names, _options, _damage)


def ecdsa_pair(value: bytes) -> bytes:
    """Two numbers of an ECDSA signature, written as RFC 5656 has it."""
    first, rest = getNS(value)
    second = getNS(rest)[0]
    return b"".join(MP(int.from_bytes(each, "big")) for each in (first, second))
