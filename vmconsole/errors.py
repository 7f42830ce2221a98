"""What can go wrong, in words for the person who has to do something about it.

Every error's text is one or two whole sentences, fit to be shown to a user as it is. Foreign
errors (libvirt's, treq's, SQLAlchemy's) become one of these where they enter.
"""

from __future__ import annotations


class VMConsoleError(Exception):
    """The root of all our errors."""


class ConfigError(VMConsoleError):
    """The configuration, or a file that it names, is wrong. The text says where, and what to do."""


class EngineError(VMConsoleError):
    """The engine answered, and the answer is no use: refused, broken, or not to be understood."""


class EngineUnreachable(EngineError):
    """The engine gave no answer: refused, reset, timed out, or 502 to 504 from a gateway."""


class KeyRefused(VMConsoleError):
    """The key, or name, is known, and does not let in here or now. The text is no sentence."""


class ConsoleError(VMConsoleError):
    """A console could not be opened, or could not go on."""


class HostUnreachable(ConsoleError):
    """The host's libvirtd does not answer, or does not let us in."""


class ConsoleUnavailable(ConsoleError):
    """The VM is there, but its console is not: off, no console device, or one that is no pty.

    Or what is asked of it is not to be had: no device for it, or not allowed here.
    """


class ConsoleElsewhere(ConsoleUnavailable):
    """The host does not know the VM, which may have moved."""


class ConsoleBusy(ConsoleError):
    """Somebody else has the console open."""


class ConsoleGone(ConsoleError):
    """An open console ended, for the reason in the text."""


class ConsoleInterrupted(ConsoleGone):
    """It may be opened again, now or later, here or elsewhere. The kinds are below."""


class ConsoleTaken(ConsoleInterrupted):
    """Another program took it by force, or may have: its guest runs on."""


class GuestStopped(ConsoleInterrupted):
    """The guest was shut off, or crashed: when it comes back it starts afresh."""


class GuestGone(ConsoleInterrupted):
    """The guest was saved to disk, or its host does not know what became of it."""


class GuestMoved(ConsoleInterrupted):
    """The guest runs on, on another host."""


class HostLost(ConsoleInterrupted):
    """The connection to the host ended; the guest may run on."""


class InputLost(ConsoleInterrupted):
    """The guest took no input until its host dropped the connection; it may run on."""


class StoreError(VMConsoleError):
    """The embedded engine's database refused what was asked of it."""


class StoreUnavailable(StoreError):
    """The database does not work now: gone, locked, its disk full. A later try may succeed."""
