"""Lines of OpenSSH's authorized_keys format (sshd(8)), to and from the blob of a key."""

from __future__ import annotations

import re
from base64 import b64encode
from itertools import pairwise

import msgspec

from vmconsole.keyoptions import NO_OPTIONS, QUOTED, KeyOptions, parse_key_options
from vmconsole.publickeys import KEY_TYPES, decode_key, fingerprint
from vmconsole.text import printable

# Of OpenSSH: a line with the largest key, RSA of 16384 bits, has some 2,800 characters.
MAX_LINE = 16384

_OPTIONS = re.compile(rf'((?:[^\s"]|{QUOTED})+)[ \t]+')


class KeyLine(msgspec.Struct, frozen=True):
    """One key that may log in here, as far as its options let it."""

    type: str
    blob: bytes
    """The wire format of RFC 4253, section 6.6."""
    comment: str
    options: KeyOptions = NO_OPTIONS

    def __str__(self) -> str:
        """The line, without options."""
        return f"{self.type} {b64encode(self.blob).decode()} {self.comment}".rstrip()


def parse_key_line(line: str) -> KeyLine:
    """Read a line. Raises ValueError whose text says why this key is not taken.

    The text never holds what was read, except for the names of a type or an option: a private
    key given by mistake must not end in a log. An option that we do not know disables the key,
    because it may be a restriction. That the blob is a sound key is not checked.
    """
    if len(line) > MAX_LINE:
        raise ValueError("it is too long")
    line = line.strip()
    key = _bare_key(line)
    if key is None:
        options = _OPTIONS.match(line)
        key = _bare_key(line[options.end() :]) if options else None
        if options is None or key is None:
            raise ValueError("this is no public key in the format of OpenSSH")
        key = msgspec.structs.replace(key, options=parse_key_options(options[1]))
    if key.type not in KEY_TYPES:
        raise ValueError(f"its type {printable(key.type, 40)} is not accepted")
    if key.options.verify_required and not key.type.startswith("sk-"):
        raise ValueError("its option verify-required is for sk- keys only")
    return key


def find_fingerprint(line: str) -> str:
    """Which key a line is about that cannot be taken; empty: it has no public key in it."""
    words = line[:MAX_LINE].split()
    for kind, text in pairwise(words):
        key = _bare_key(f"{kind} {text}")
        if key is not None:
            return fingerprint(key.blob)
    return ""


def _bare_key(line: str) -> KeyLine | None:
    words = line.split(None, 2)
    if len(words) < 2:
        return None
    blob = decode_key(words[0], words[1])
    if blob is None:
        return None
    return KeyLine(words[0], blob, words[2] if len(words) == 3 else "")
