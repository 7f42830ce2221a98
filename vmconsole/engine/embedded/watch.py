"""Watches the hosts that the store names."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from twisted.logger import Logger

from vmconsole.engine.embedded.inventory import Inventory
from vmconsole.errors import ConfigError
from vmconsole.interfaces import IDomainSource
from vmconsole.text import printable

# With no host at all, this machine is served.
LOCAL_HOST: Mapping[str, str] = MappingProxyType({"localhost": "qemu:///system"})


class HostWatch:
    """Keeps what ``source`` watches equal to what it is told, and ``inventory`` without others."""

    _log = Logger()

    def __init__(self, source: IDomainSource, inventory: Inventory) -> None:
        self._source = source
        self._inventory = inventory
        self._hosts: dict[str, str] = {}
        self._started = False
        self._follows = False

    def start(self) -> None:
        """Be told what stands on the hosts."""
        self._source.observer = self._inventory
        self._started = True

    @property
    def follows(self) -> bool:
        """Whether it watches all that it was told; not before it is told, nor after stop."""
        return self._follows

    def follow(self, hosts: Mapping[str, str]) -> None:
        """Watch these from now on: URIs by name; an empty URI is the configuration's rule.

        Nothing, unless it is started: what was read before stop may come after it.
        """
        self._follows = False
        if not self._started:
            return
        wanted = hosts or LOCAL_HOST
        for name in self._hosts.keys() - wanted.keys():
            self._forget(name)
        for name, uri in wanted.items():
            if self._hosts.get(name) == uri:
                continue
            if name in self._hosts:
                self._forget(name)
            # Remembered also when it is refused: the same refusal once a second helps nobody.
            self._hosts[name] = uri
            try:
                self._source.watch(name, uri)
            except ConfigError as error:
                self._log.error(
                    "{host} is not watched: {reason}", host=printable(name), reason=str(error)
                )
            except Exception:
                # No refusal, but a mistake: the next one to say so tries again.
                self._forget(name)
                raise
        self._follows = True

    def stop(self) -> None:
        """Watch nothing."""
        self._started = self._follows = False
        for name in list(self._hosts):
            self._forget(name)
        self._source.observer = None

    def _forget(self, name: str) -> None:
        del self._hosts[name]
        self._source.unwatch(name)
        self._inventory.forget(name)
