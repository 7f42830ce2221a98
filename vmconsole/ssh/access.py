"""A session's permission for one console, as the engine tells it."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from vmconsole.audit import Audit, Login
from vmconsole.console.attachment import Attachment
from vmconsole.console.choice import still_listed
from vmconsole.errors import ConsoleError
from vmconsole.interfaces import ConsoleInfo, IPermissions, IWatch


class Access:
    """An IAccess: looks again at the permission while the console is open, and not while it is
    away, since an engine may not list a VM that stands nowhere. Tells the audit of both."""

    def __init__(
        self,
        permissions: IPermissions,
        watch: IWatch,
        audit: Audit,
        login: Login,
        channel: int,
        console: ConsoleInfo,
        stale: Callable[[float | None], None],
    ) -> None:
        """``stale`` is told when the engine gave an answer that was used; see ConsoleList."""
        self._permissions = permissions
        self._watch = watch
        self._audit = audit
        self._login = login
        self._channel = channel
        self._console = console
        self._stale = stale
        self._begun = False
        self._stop_looking: Callable[[], None] | None = None

    async def locate(self) -> ConsoleInfo | None:
        """See IAccess."""
        found = await self._permissions.consoles(self._login.user.id, fresh=True)
        self._stale(found.answered)
        return still_listed(found, self._console.vm_id)

    def begin(self, attachment: Attachment) -> None:
        """See IAccess."""
        console = msgspec.structs.replace(attachment.console.info, role=attachment.role)
        tell = self._audit.resumed if self._begun else self._audit.attached
        tell(self._login, self._channel, console)
        self._begun, self._console = True, console
        self._stop_looking = self._watch.console(console, attachment.revoke, attachment.change_role)

    def pause(self, reason: str) -> None:
        """See IAccess."""
        self._look_no_more()
        self._audit.interrupted(self._login, self._channel, self._console, reason)

    def __enter__(self) -> Access:
        """The session tries to attach."""
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _frames: object) -> None:
        """It is over; a console that never was opened is told to the audit."""
        self._look_no_more()
        if isinstance(error, ConsoleError) and not self._begun:
            self._audit.attach_failed(self._login, self._channel, self._console, str(error))

    def _look_no_more(self) -> None:
        if self._stop_looking is not None:
            self._stop_looking()
            self._stop_looking = None
