"""Edits: how a program changes bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def edit(data: bytes, edits: Sequence[Sequence[Any]]) -> bytes:
    """The data, edited; places beyond the end are counted from the beginning again."""
    for kind, *values in edits:
        at = values[0] % (len(data) + 1) if kind != "add" else 0
        if kind == "add":
            data += bytes.fromhex(values[0])
        elif kind == "cut":
            data = data[:at]
        elif kind == "put":
            data = data[:at] + bytes.fromhex(values[1]) + data[at:]
        elif kind == "drop":
            data = data[:at] + data[at + values[1] :]
        elif kind == "flip" and at < len(data):
            data = data[:at] + bytes((data[at] ^ values[1],)) + data[at + 1 :]
    return data
