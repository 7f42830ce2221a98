"""Lines of OpenSSH's authorized_keys format (sshd(8)), to and from the blob of a key."""

from __future__ import annotations

import binascii
import re
from base64 import b64encode

import msgspec

from vmconsole.publickeys import KEY_TYPES
from vmconsole.text import printable

# They ask for less than what holds here for everybody.
_HARMLESS_OPTIONS = frozenset(
    {
        "restrict",
        "no-agent-forwarding",
        "no-port-forwarding",
        "no-user-rc",
        "no-x11-forwarding",
    }
)
_OPTIONS = re.compile(r'((?:[^\s"]|"(?:[^"\\]|\\.)*+")++)[ \t]+')
_OPTION = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*+")++')


class KeyLine(msgspec.Struct, frozen=True):
    """One key that may log in here. The options, harmless ones all, are left out."""

    type: str
    blob: bytes
    """The wire format of RFC 4253, section 6.6."""
    comment: str

    def __str__(self) -> str:
        """The line, without options."""
        return f"{self.type} {b64encode(self.blob).decode()} {self.comment}".rstrip()


def parse_key_line(line: str) -> KeyLine:
    """Read a line. Raises ValueError whose text says why this key is not taken.

    The text never holds what was read, except for the names of a type or an option: a private
    key given by mistake must not end in a log. An option that we do not know disables the key,
    because it may be a restriction. That the blob is a sound key is not checked.
    """
    line = line.strip()
    key = _bare_key(line)
    if key is None:
        options = _OPTIONS.match(line)
        key = _bare_key(line[options.end() :]) if options else None
        if options is None or key is None:
            raise ValueError("this is no public key in the format of OpenSSH")
        for option in _OPTION.findall(options[1]):
            name = option.split("=", 1)[0]
            if name.lower() not in _HARMLESS_OPTIONS:
                raise ValueError(f"its option {printable(name, 40)} is not supported")
    if key.type not in KEY_TYPES:
        raise ValueError(f"its type {printable(key.type, 40)} is not accepted")
    return key


def _bare_key(line: str) -> KeyLine | None:
    words = line.split(None, 2)
    if len(words) < 2:
        return None
    try:
        blob = binascii.a2b_base64(words[1], strict_mode=True)
    except ValueError:
        return None
    # A key names its type in the line and, first thing, in the blob.
    length = int.from_bytes(blob[:4], "big")
    if len(blob) < 5 or blob[4 : 4 + length] != words[0].encode():
        return None
    return KeyLine(words[0], blob, words[2] if len(words) == 3 else "")
