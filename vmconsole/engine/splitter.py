"""Takes the entries out of a JSON document, from the events of a streaming parser."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

# Deeper than any answer is. The parser's memory grows with the depth.
_DEEPEST = 32
_OPENING = frozenset({"start_map", "start_array"})
_CLOSING = frozenset({"end_map", "end_array"})


class EntrySplitter:
    """Gives the elements of the array ``name`` of the top-level object; also has its ``content``.

    An element that is an object comes as a dictionary of its plain values; a value that is nested
    is None there. An element that is no object comes as the name of its event.
    """

    def __init__(self, name: str) -> None:
        self.content: object = None
        self.complete = False
        """Whether the array was there, to its end."""
        self._name = name
        self._depth = 0
        self._key: str | None = None
        self._inside = False
        self._entry: dict[str, Any] = {}
        self._entry_key = ""

    def feed(self, events: Iterable[tuple[str, Any]]) -> Iterator[Any]:
        """The elements that end in ``events``, of ijson's basic_parse. Raises ValueError."""
        for event, value in events:
            if event in _OPENING:
                self._open(event)
            elif event in _CLOSING:
                yield from self._close()
            elif self._inside:
                if self._depth == 2:
                    yield event
                elif self._depth == 3:
                    if event == "map_key":
                        self._entry_key = value
                    else:
                        self._entry[self._entry_key] = value
            elif self._depth == 1:
                if event == "map_key":
                    self._key = value
                elif self._key == "content":
                    self.content = value

    def _open(self, event: str) -> None:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ValueError("it is nested too deeply")
        if self._depth == 1:
            # An array has no keys, and so nothing in it is found.
            self._key = None
        elif self._depth == 2 and self._key == self._name and event == "start_array":
            self._inside, self.complete = True, False
        elif self._depth == 3:
            self._entry = {}
            self._entry_key = ""
        elif self._depth == 4:
            self._entry[self._entry_key] = None

    def _close(self) -> Iterator[Any]:
        if self._inside and self._depth == 3:
            yield self._entry
        elif self._inside and self._depth == 2:
            self._inside, self.complete = False, True
        self._depth -= 1
