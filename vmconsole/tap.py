"""The composition root: the only module that knows everybody."""

from __future__ import annotations

import gc
import os
import resource
import secrets
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from twisted.application.service import IService, MultiService
from twisted.cred.portal import Portal
from twisted.internet.defer import CancelledError, succeed
from twisted.internet.error import CannotListenError
from twisted.logger import Logger
from twisted.python import usage
from twisted.python.failure import Failure

from vmconsole import __version__, config
from vmconsole.audit import Audit
from vmconsole.clocks import make_steady
from vmconsole.console.pool import ConsolePool
from vmconsole.console.recording import Recordings
from vmconsole.console.warm import WarmConsoles
from vmconsole.engine.embedded.answers import DOMAIN
from vmconsole.engine.embedded.service import EmbeddedEngine
from vmconsole.engine.files import EngineFiles, ExpiryWatch
from vmconsole.engine.http import make_engine_client
from vmconsole.engine.last_answer import Lifetimes
from vmconsole.engine.permissions import Permissions
from vmconsole.errors import ConfigError, VMConsoleError
from vmconsole.hypervisor.libvirt_host import HostPool
from vmconsole.publickeys import fingerprint
from vmconsole.signals import HangUp
from vmconsole.ssh.admission import Admission
from vmconsole.ssh.avatar import ConsoleRealm
from vmconsole.ssh.checker import EngineKeyChecker
from vmconsole.ssh.commands import Commands
from vmconsole.ssh.factory import ConsoleSSHFactory
from vmconsole.ssh.ports import Ports, make_port
from vmconsole.ssh.trust import Trust
from vmconsole.watched import WatchedFiles, reload_all

_log = Logger()


class Options(usage.Options):
    """The command line of ``twistd vmconsole``."""

    synopsis = "[--config vmconsole.toml]"
    longdesc = (
        "An ssh proxy to the serial consoles of virtual machines. Without a configuration it "
        "serves the local machine's libvirt, with an engine of its own."
    )
    optParameters = [  # noqa: RUF012 - Twisted's own way to say it
        [
            "config",
            "c",
            None,
            "The configuration file (default: $VMCONSOLE_CONFIG, /etc/vmconsole/vmconsole.toml).",
        ],
    ]

    def postOptions(self) -> None:
        """Read the configuration, so that its errors are told like those of the command line."""
        named = self["config"]
        path = Path(named) if named else config.default_path(os.environ)
        try:
            self["loaded"] = config.load(path, os.environ)
        except ConfigError as error:
            raise usage.UsageError(str(error)) from error


class ConsoleProxy(MultiService):
    """Everything that runs. What cannot start ends the process with one line that says why."""

    name = "vmconsole"
    _log = Logger()

    def __init__(
        self,
        reactor: Any,
        loaded: config.Config,
        factory: ConsoleSSHFactory,
        trust: Trust,
        embedded: EmbeddedEngine | None,
    ) -> None:
        super().__init__()
        self._reactor = reactor
        self._config = loaded
        self._factory = factory
        self._trust = trust
        self._embedded = embedded

    def privilegedStartService(self) -> None:
        """Read or make the host keys, and take the ports."""
        self._start(super().privilegedStartService, prepare=self._prepare)

    def startService(self) -> None:
        """Start the parts."""
        self._start(super().startService)
        # What is there by now stays. A full pass of the collector through it takes some 20 ms,
        # in which nobody's keys are served.
        gc.collect()
        gc.freeze()
        ready = self._embedded.ready() if self._embedded else succeed(None)
        ready.addCallbacks(self._say_ready, self._engine_failed)

    def _say_ready(self, _result: object) -> None:
        self._log.info(
            "vmconsole {version} is ready: ssh on {listen}",
            version=__version__,
            listen=", ".join(self._config.ssh.listen) or "nothing (an engine alone)",
        )

    def _engine_failed(self, failure: Failure) -> None:
        if failure.check(CancelledError) or not self.running:
            return
        text = f"the embedded engine did not start: {failure.getErrorMessage()}"
        self._log.critical("{text} The proxy ends.", text=text)
        # A service manager has to see that it failed, and twistd's own status would be 0.
        self._reactor.addSystemEventTrigger("after", "shutdown", os._exit, 1)
        self._reactor.stop()

    def _prepare(self) -> None:
        allowed = raise_open_files()
        self._log.info("may open {files} files", files=allowed)
        if self._config.ssh.listen:
            host_keys = self._trust.read_host_keys()
            self._factory.use_host_keys(host_keys)
            self._trust.observe(lambda: self._factory.use_host_keys(self._trust.host_keys))
            for key in host_keys.keys:
                self._log.info(
                    "host key {kind} {shown}",
                    kind=key.sshType().decode(),
                    shown=fingerprint(key.public().blob()),
                )
            for certificate in host_keys.certificates:
                self._log.info("host certificate {shown}", shown=str(certificate))

    def _start(self, start: Callable[[], None], prepare: Callable[[], None] | None = None) -> None:
        try:
            if prepare is not None:
                prepare()
            start()
        except VMConsoleError as error:
            self._give_up(str(error))
        except (OSError, OverflowError) as error:
            self._give_up(f"cannot listen: {error}. See ssh.listen.")
        except CannotListenError as error:
            self._give_up(
                f"cannot listen on {error.interface or 'any address'}, port {error.port}: "
                f"{error.socketError}. Is another proxy running? See ssh.listen."
            )

    def _give_up(self, text: str) -> NoReturn:
        self._log.critical("{text}", text=text)
        if is_daemon():
            # twistd's first process waits for the word of the daemon, and passes on an Exception's.
            raise VMConsoleError(text)
        raise SystemExit(f"vmconsole: {text}")


def is_daemon() -> bool:
    """Whether twistd has made a daemon of us: nobody reads our standard error then."""
    return os.fstat(2).st_rdev == os.stat(os.devnull).st_rdev


def raise_open_files() -> int:
    """Raise the soft limit of open files to the hard one, and return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def makeService(options: Options) -> IService:
    """Compose the proxy. Opens nothing: twistd forks between this and the start."""
    import libvirt
    import libvirt_qemu
    from twisted.internet import reactor

    make_steady(reactor, time.monotonic, time.time)
    try:
        return make_proxy(options["loaded"], reactor, libvirt, libvirt_qemu, os.urandom)
    except ConfigError as error:
        # Only in postOptions does twistd make a line of a UsageError.
        raise SystemExit(f"vmconsole: {error}") from None


def make_recordings(reactor: Any, settings: config.Recording) -> Recordings | None:
    """What records consoles; None: they are not recorded."""
    if not settings.directory:
        return None
    return Recordings(
        reactor,
        Path(settings.directory),
        required=settings.required,
        max_size=settings.max_size,
        max_age=settings.max_age,
        retain_age=settings.retain_age,
        retain_bytes=settings.retain_bytes,
    )


def make_proxy(
    loaded: config.Config,
    reactor: Any,
    libvirt: Any,
    libvirt_qemu: Any,
    random: Callable[[int], bytes],
) -> ConsoleProxy:
    """Compose the proxy of its parts. Raises ConfigError."""
    hosts = HostPool(
        reactor,
        libvirt,
        loaded.hosts,
        may_force=loaded.console.force,
        monitor=libvirt_qemu if loaded.console.allow_break else None,
    )
    audit = Audit()
    embedded = None
    files: WatchedFiles
    if loaded.engine.url:
        files = remote = EngineFiles(reactor, loaded)
        client = make_engine_client(reactor, loaded, remote.credentials, lambda: remote.authorities)
    else:
        embedded = EmbeddedEngine(reactor, loaded, hosts, audit)
        files = embedded.files
        client = make_engine_client(reactor, loaded, embedded.credentials)
    permissions = Permissions(
        client,
        reactor,
        Lifetimes(loaded.engine.cache_ttl, loaded.engine.stale_grace),
        loaded.engine.recheck,
        # The embedded engine tells of VMs that are off, too.
        placed_only=bool(loaded.engine.url),
        domain="" if loaded.engine.url else DOMAIN,
    )
    recordings = make_recordings(reactor, loaded.recording)
    consoles = hosts.guest_observer = ConsolePool(hosts, reactor, loaded.console, recordings)
    warm = None
    if loaded.console.warm:
        warm = hosts.guest_observer = WarmConsoles(
            permissions, consoles, reactor, loaded.console.warm
        )
    commands = Commands(permissions, consoles, audit, reactor, loaded.escape_byte)
    realm = ConsoleRealm(
        permissions, commands, audit, reactor, loaded.limits.sessions_per_connection
    )
    trust = Trust(reactor, loaded)
    trust.observe(lambda: realm.end_refused(trust.refusal))
    portal = Portal(realm, [EngineKeyChecker(permissions, loaded.ssh.users, trust, reactor)])
    ports = Ports()
    admission = Admission(
        reactor, loaded.limits, secrets.randbelow, pause=ports.pause, resume=ports.resume
    )
    factory = ConsoleSSHFactory(portal, loaded, audit, reactor, random, admission)

    proxy = ConsoleProxy(reactor, loaded, factory, trust, embedded)
    # They stop in the reverse order: first the ssh ports, then the consoles, last the hosts. What
    # consoles still print is recorded.
    expiry_watch = ExpiryWatch(reactor, loaded, (files, trust))
    hang_up = HangUp(reactor, partial(reload_all, (files, trust)))
    for part in (
        *(hosts, embedded, files, trust, expiry_watch, hang_up, permissions),
        *(recordings, consoles, warm),
    ):
        if part is not None:
            part.setServiceParent(proxy)
    for description in loaded.ssh.listen:
        make_port(reactor, description, factory).setServiceParent(ports)
    ports.setServiceParent(proxy)
    return proxy
