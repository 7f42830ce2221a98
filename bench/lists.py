"""A site's lists, for both sides the same: whose keys may log in, and which VMs there are."""

from __future__ import annotations

import json
import random
import struct
from base64 import b64encode
from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

ED25519 = "ssh-ed25519"
RSA = "ssh-rsa"
# Of the VMs that are only listed, so many are on each host.
_VMS_PER_HOST = 50


class VM(NamedTuple):
    """A VM that is listed. ``host`` is its name in the engine."""

    id: str
    name: str
    host: str


def key_lines(count: int, own: str, kind: str = ED25519) -> list[str]:
    """``count`` lines of authorized_keys, ``own`` in the middle, and of others that nobody has.

    Theirs are of the right format and length, with random bytes for numbers.
    """
    source = random.Random(1)
    others = [
        f"{kind} {b64encode(_blob(kind, source)).decode()} user{number}@laptop"
        for number in range(count - 1)
    ]
    return [*others[: count // 2], own, *others[count // 2 :]]


def vms(count: int, own: VM) -> list[VM]:
    """``count`` VMs by name, ``own`` in the middle; nobody can open the others."""
    source = random.Random(1)
    others = [
        VM(
            str(UUID(bytes=source.randbytes(16), version=4)),
            # Half of them are before the own one's name, which begins with "light".
            f"{'app' if number < count // 2 else 'web'}{number:05}.example.com",
            f"host{number // _VMS_PER_HOST + 1}.example.com",
        )
        for number in range(count - 1)
    ]
    return sorted([*others, own], key=lambda vm: vm.name)


def key_reply(lines: Sequence[str]) -> bytes:
    """The engine's list of these keys, each of another user."""
    source = random.Random(2)
    keys = [
        {
            "entityid": str(UUID(bytes=source.randbytes(16), version=4)),
            "entity": f"user{number}@example.com-authz",
            "key": line,
        }
        for number, line in enumerate(lines)
    ]
    return _json({"version": "1", "content": "key_list", "keys": keys})


def console_reply(listed: Sequence[VM]) -> bytes:
    """The engine's list of these VMs' consoles, ordered by id as an Engine's is."""
    consoles = [
        {"vmid": vm.id, "vmname": vm.name, "host": vm.host, "console": "default"}
        for vm in sorted(listed)
    ]
    return _json({"version": "1", "content": "console_list", "consoles": consoles})


def menu(listed: Sequence[VM]) -> str:
    """The numbered list that users see."""
    return "".join(f"{number}. {vm.name} [{vm.id}]\n" for number, vm in enumerate(listed, 1))


def _blob(kind: str, source: random.Random) -> bytes:
    """The wire format of RFC 4253, section 6.6; RSA with 4096 bits."""
    if kind == RSA:
        # The first bit of a number is its sign.
        fields = [b"\x01\x00\x01", b"\x00\xff" + source.randbytes(511)]
    else:
        fields = [source.randbytes(32)]
    return b"".join(struct.pack(">I", len(field)) + field for field in (kind.encode(), *fields))


def _json(reply: dict[str, object]) -> bytes:
    return json.dumps(reply, separators=(",", ":")).encode()
