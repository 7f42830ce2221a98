"""SIGHUP, which Twisted leaves alone."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from twisted.application.service import Service


def _on_terminal() -> bool:
    return os.isatty(0)


class HangUp(Service):
    """Calls ``action`` on the reactor's thread at each SIGHUP, as long as it runs.

    When it comes because the terminal is closed on which we were started, the reactor is stopped.
    Only the main thread may handle signals: started in another one, it does nothing.
    """

    def __init__(
        self,
        reactor: Any,
        action: Callable[[], object],
        on_terminal: Callable[[], bool] = _on_terminal,
    ) -> None:
        self._reactor = reactor
        self._action = action
        self._on_terminal = on_terminal
        self._was_on_terminal = False
        self._restore: Callable[[], object] = lambda: None

    def startService(self) -> None:
        """See IService."""
        super().startService()
        self._was_on_terminal = self._on_terminal()
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGHUP, self._hung_up)
            self._restore = lambda: signal.signal(signal.SIGHUP, before or signal.SIG_DFL)

    def stopService(self) -> None:
        """See IService."""
        super().stopService()
        self._restore()
        self._restore = lambda: None

    def _hung_up(self, _number: int, _frame: FrameType | None) -> None:
        gone = self._was_on_terminal and not self._on_terminal()
        self._reactor.callFromThread(self._reactor.stop if gone else self._action)
