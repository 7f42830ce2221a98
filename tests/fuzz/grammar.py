"""Makes programs: what a client may say, in a likely order, and then with mistakes in it."""

from __future__ import annotations

from random import Random
from typing import Any

from tests.fuzz.authority import SUFFIX, specification
from tests.fuzz.keyring import PROVE
from tests.fuzz.sealed import SUITES
from tests.fuzz.steps import Step

_U32 = (0, 1, 2, 4, 255, 1000, 32768, 32769, 35000, 65536, 131072, 2**20, 2**31 - 1, 2**31)
_EDGES = (*_U32, 2**32 - 1, 2**32 - 2)
_USERS = (b"vmproxy", b"ovirt-vmconsole", b"root", b"", b"vmproxy\0", b"\xff\xfe", b"x" * 300)
_SERVICES = (b"ssh-connection", b"ssh-userauth", b"", b"x\0y")
_METHODS = (
    b"none",
    b"password",
    b"keyboard-interactive",
    b"hostbased",
    b"gssapi-with-mic",
    b"\xff",
)
KEYS = ("alice", "rsa", "ecdsa", "sk", "small", "stranger", "pin", "home", "bob", "lost")
_OWN = {
    "alice": "ssh-ed25519",
    "stranger": "ssh-ed25519",
    "ecdsa": "ecdsa-sha2-nistp256",
    "sk": "sk-ssh-ed25519@openssh.com",
    "pin": "sk-ssh-ed25519@openssh.com",
    "home": "ssh-ed25519",
    "rsa": "rsa-sha2-512",
    "small": "rsa-sha2-512",
    "bob": "ssh-ed25519",
    "lost": "ssh-ed25519",
}
# Keys that are in certificates.
CERTIFIED = (
    *("alice", "alice", "alice", "rsa", "rsa", "ecdsa", "ecdsa", "bob", "stranger"),
    *("lost", "small", "sk"),
)
_ALGORITHMS = (
    *_OWN.values(),
    "rsa-sha2-256",
    "ssh-rsa",
    "ssh-dss",
    "ecdsa-sha2-nistp384",
    "ssh-ed25519-cert-v01@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
    "sk-ssh-ed25519-cert-v01@openssh.com",
    "",
    "\xff",
)
_KINDS = (
    b"direct-tcpip",
    b"x11",
    b"auth-agent@openssh.com",
    b"forwarded-tcpip",
    b"tun@openssh.com",
)
_REQUESTS = (
    (b"subsystem", b"sftp"),
    (b"x11-req", b""),
    (b"auth-agent-req@openssh.com", b""),
    (b"xon-xoff", b""),
    (b"exit-status", b""),
    (b"keepalive@openssh.com", b""),
    (b"eow@openssh.com", b""),
    (b"received", b""),
    (b"_start", b""),
    (b"\xff\xfe", b""),
    (b"", b""),
)
_GLOBALS = (
    b"tcpip-forward",
    b"cancel-tcpip-forward",
    b"streamlocal-forward@openssh.com",
    b"keepalive@openssh.com",
    b"no-more-sessions@openssh.com",
    PROVE,
    b"\xff\xfe",
    b"",
)
# Host keys, by number, that are to be proved: the first is the server's.
_PROVED: tuple[tuple[int, ...], ...] = ((0,), (0,), (0,), (1,), (0, 0), (0, 1), ())
_WORDS = (
    *("help", "info", "list", "connect", "watch", "log", "who", "--debug", "--help", "-h"),
    *("--format", "json", "plain", "--vm-id", "--vm-name", "--force", "--wait", "--bytes"),
    *("--follow", "--raw", "vm1", "vm2", "vm", "id-vm1", "vm two", "*", "v?1", "nobody", "", "-"),
    *("1", "0", "-1", "9" * 30, "'", '"', "\\", "$(x)", "\x1b[2J", "\x00", "\u202e", "=", "--x=y"),
)
_TYPED = (b"1\r", b"q", b"\x1d", b"\x1d.", b"\x1d?", b"\x1db", b"\x1dt", b"\x1ds", b"\x03", b"\x04")
_TERMINALS = (b"xterm", b"", b"dumb", b"\xff" * 8, b"x" * 4000)
_JUNK = 4096


def string(value: bytes) -> list[Any]:
    """A string's field."""
    return ["s", value.hex()]


class Grammar:
    """All its choices come from ``random``."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.wild = random.choice((0.0, 0.0, 0.01, 0.1))
        """How often a client says what ends its connection: most should live long."""

    def junk(self, most: int = 64) -> bytes:
        """Some bytes; now and then many."""
        size = self.random.randrange(most + 1)
        return self.random.randbytes(size if self.random.random() < 0.98 else size * 64)

    def number(self) -> int:
        """A uint32, mostly one at an edge."""
        random = self.random
        if random.random() < 0.8:
            return random.choice(_EDGES)
        return random.getrandbits(random.choice((4, 12, 32)))

    def send(self, *fields: list[Any], later: float = 0.0) -> Step:
        """A packet of these fields."""
        return ["send", list(fields), [], int(self.random.random() < later)]

    # --- before the login

    def login(self, key: str = "alice") -> Step:
        """A good login."""
        algorithm = _OWN[key]
        how = "pin" if key == "pin" else ""
        return self._auth(b"vmproxy", b"ssh-connection", key, algorithm, how, True)

    def _auth(
        self, user: bytes, service: bytes, key: str, algorithm: str, how: str, signed: bool
    ) -> Step:
        fields = [["c", 50], string(user), string(service), string(b"publickey")]
        fields += [["c", int(signed)], string(algorithm.encode("latin-1")), ["key", key]]
        if signed:
            fields.append(["sig", key, algorithm, how])
        return self.send(*fields)

    def attempt(self) -> Step:
        """A USERAUTH_REQUEST that may be right, and mostly is not."""
        random = self.random
        user = random.choice(_USERS) if random.random() < 0.2 else _USERS[random.randrange(2)]
        service = random.choice(_SERVICES) if random.random() < 0.1 else _SERVICES[0]
        roll = random.random()
        if roll < 0.15:
            method = random.choice(_METHODS)
            head = (["c", 50], string(user), string(service), string(method))
            return self.send(*head, ["b", self.junk().hex()])
        key = random.choice(KEYS)
        algorithm = _OWN[key] if random.random() < 0.7 else random.choice(_ALGORITHMS)
        how = random.choice(("", "", "pin", "other", "absent", "sha1"))
        step = self._auth(user, service, key, algorithm, how, random.random() < 0.6)
        fields = step[1]
        if roll < 0.3:
            return self.certified(user, service)
        if roll < 0.36 and len(fields) > 7:
            fields[7] = ["sig", random.choice(KEYS), algorithm, how]
        elif roll < 0.42:
            fields[6] = string(self.junk(200))
        return step

    def certified(self, user: bytes = _USERS[0], service: bytes = _SERVICES[0]) -> Step:
        """A request with a certificate, that may be right."""
        random = self.random
        if random.random() < 0.3:
            return self.login_by(random.choice(CERTIFIED[:9]), specification(random, sound=True))
        key = random.choice(CERTIFIED)
        plain = random.choice(_ALGORITHMS) if random.random() < 0.05 else _OWN[key]
        if plain == "rsa-sha2-512" and random.random() < 0.4:
            plain = random.choice(("rsa-sha2-256", "ssh-rsa"))
        suffix = SUFFIX.decode() if random.random() < 0.97 else ""
        fields = [["c", 50], string(user), string(service), string(b"publickey")]
        signed = random.random() < 0.5
        fields += [["c", int(signed)], string((plain + suffix).encode("latin-1"))]
        fields.append(["cert", key, specification(random)])
        if signed:
            named = plain if random.random() < 0.95 else plain + suffix
            how = random.choice(("", "", "", "", "", "", "other", "sha1"))
            signer = key if random.random() < 0.95 else random.choice(KEYS)
            fields.append(["sig", signer, named, how])
        return self.send(*fields)

    def login_by(self, key: str, how: dict[str, Any]) -> Step:
        """A request with this certificate, signed as it should be."""
        fields = [["c", 50], string(b"vmproxy"), string(b"ssh-connection"), string(b"publickey")]
        fields += [["c", 1], string(_OWN[key].encode() + SUFFIX), ["cert", key, how]]
        return self.send(*fields, ["sig", key, _OWN[key], ""])

    # --- after it

    def anything(self) -> Step:
        """One message of a client that is logged in."""
        makers = (
            (self.open, 10),
            (self.request, 26),
            (self.data, 16),
            (self.adjust, 8),
            (self.eof, 2),
            (self.close, 4),
            (self.ask, 5),
            (self.guest, 6),
            (self.stray, 3 if self.random.random() < self.wild else 0),
            (self.transport, 3),
            (self.time, 4),
            (self.attempt, 1),
        )
        (chosen,) = self.random.choices([m for m, _ in makers], [w for _, w in makers])
        return chosen()

    def session(self, plain: bool = False) -> list[Step]:
        """A channel that is opened, prepared, and runs something; ``plain``: on a console."""
        steps = [self.open(plain=True)]
        if self.random.random() < 0.7:
            steps.append(self._request(b"pty-req", *self._terminal()))
        line = b"vm1" if plain else self.line()
        steps.append(self._request(b"exec", string(line)) if line else self._request(b"shell"))
        return steps

    def open(self, plain: bool = False) -> Step:
        """CHANNEL_OPEN."""
        random = self.random
        kind = b"session" if plain or random.random() < 0.85 else random.choice(_KINDS)
        window = 2**20 if plain else self.number()
        most = 32768 if random.random() < 0.7 else self.number()
        number = ["u", self.number()] if not plain and random.random() < self.wild else ["new"]
        return self.send(["c", 90], string(kind), number, ["u", window], ["u", most], later=0.1)

    def _chan(self) -> list[Any]:
        if self.random.random() < self.wild / 5:
            return ["u", self.number()]
        return ["chan", self.random.randrange(8)]

    def _request(self, name: bytes, *rest: list[Any]) -> Step:
        wanted = ["c", 1 if self.random.random() < 0.9 else self.random.choice((0, 2, 255))]
        return self.send(["c", 98], self._chan(), string(name), wanted, *rest, later=0.1)

    def _terminal(self) -> list[list[Any]]:
        random = self.random
        name = _TERMINALS[0] if random.random() < 0.7 else random.choice(_TERMINALS)
        sizes = [["u", 80 if random.random() < 0.6 else self.number()] for _ in range(4)]
        return [string(name), *sizes, string(self.junk(20))]

    def line(self) -> bytes:
        """A command line."""
        random = self.random
        if random.random() < 0.3:
            return random.choice((b"", b"vm1", b"vm2", b"list", b"who", b"log vm1 --follow"))
        if random.random() < 0.04:
            return self.junk(_JUNK)
        return " ".join(random.choices(_WORDS, k=random.randrange(1, 6))).encode()

    def request(self) -> Step:
        """CHANNEL_REQUEST."""
        random = self.random
        roll = random.random()
        if roll < 0.15:
            return self._request(b"pty-req", *self._terminal())
        if roll < 0.35:
            return self._request(b"exec", string(self.line()))
        if roll < 0.45:
            return self._request(b"shell")
        if roll < 0.55:
            sizes = [["u", self.number()] for _ in range(random.choice((4, 4, 4, 2, 0)))]
            return self._request(b"window-change", *sizes)
        if roll < 0.65:
            return self._request(b"break", ["u", self.number()])
        if roll < 0.78:
            name = random.choice((b"LANG", b"LC_ALL", b"TERM", b"LD_PRELOAD", b"", b"\xff", b"LC_"))
            return self._request(b"env", string(name), string(self.junk(200)))
        if roll < 0.84:
            return self._request(b"signal", string(random.choice((b"TERM", b"INT", b"\xff"))))
        name, value = random.choice(_REQUESTS)
        return self._request(name, string(value), ["b", self.junk().hex()])

    def data(self) -> Step:
        """CHANNEL_DATA, mostly what somebody may type, or extended data."""
        random = self.random
        typed = random.choice(_TYPED) if random.random() < 0.5 else self.junk(200)
        if random.random() < self.wild:
            typed = bytes(random.choice((32767, 32768, 32769)))
        if random.random() < 0.1:
            return self.send(["c", 95], self._chan(), ["u", self.number()], string(typed))
        return self.send(["c", 94], self._chan(), string(typed), later=0.2)

    def adjust(self) -> Step:
        """CHANNEL_WINDOW_ADJUST."""
        size = self.number() if self.random.random() < self.wild else self.random.getrandbits(16)
        return self.send(["c", 93], self._chan(), ["u", size], later=0.2)

    def eof(self) -> Step:
        """CHANNEL_EOF."""
        return self.send(["c", 96], self._chan(), later=0.2)

    def close(self) -> Step:
        """CHANNEL_CLOSE."""
        return self.send(["c", 97], self._chan(), later=0.2)

    def ask(self) -> Step:
        """GLOBAL_REQUEST."""
        wanted = ["c", int(self.random.random() < 0.8)]
        if self.random.random() < 0.3:
            keys = [["hostkey", number] for number in self.random.choice(_PROVED)]
            return self.send(["c", 80], string(PROVE), wanted, *keys, later=0.2)
        name = string(self.random.choice(_GLOBALS))
        return self.send(["c", 80], name, wanted, ["b", self.junk().hex()], later=0.2)

    def guest(self) -> Step:
        """The guest prints, or its console ends."""
        if self.random.random() < 0.1:
            return ["gone"]
        text = self.junk(200) if self.random.random() < 0.7 else b"login: \x1b[6n" * 3000
        return ["guest", text.hex()]

    def time(self) -> Step:
        """Time passes, or the client stops reading, or reads again."""
        random = self.random
        if random.random() < 0.5:
            return ["sleep", random.choice((0.005, 0.25, 1, 6, 40, 70))]
        if random.random() < 0.3:
            return ["lazy", int(random.random() < 0.3)]
        return ["deaf", int(random.random() < 0.4)]

    def stray(self) -> Step:
        """Answers to what nobody asked."""
        number = self.random.choice((81, 82, 91, 92, 99, 100))
        if number in (81, 82):
            return self.send(["c", number], ["b", self.junk(8).hex()])
        rest = [["u", self.number()] for _ in range(3)] if number == 91 else []
        if number == 92:
            rest = [["u", self.number()], string(self.junk()), string(b"")]
        return self.send(["c", number], self._chan(), *rest)

    def transport(self) -> Step:
        """Messages of the transport, and numbers that nobody knows."""
        random = self.random
        roll = random.random()
        if roll < 0.25:
            return ["rekey"]
        if roll < 0.5:
            return self.send(["c", 2], string(self.junk(300)), later=0.3)
        if roll < 0.6:
            return self.send(["c", 4], ["c", 1], string(self.junk()), string(b""))
        if roll < 0.9 or random.random() > self.wild:
            number = random.choice((8, 9, 19, 22, 29, 101, 127, 128, 191, 192, 200, 255))
            return self.send(["c", number], ["b", self.junk().hex()], later=0.3)
        number = random.choice((1, 3, 5, 6, 7, 20, 21, 30, 31, 32, 33, 34, 51, 52, 60))
        return self.send(["c", number], ["b", self.junk().hex()])


HELLO = b"SSH-2.0-OpenSSH_9.2"


def hello(random: Random, *tampers: list[Any]) -> Step:
    """A handshake."""
    return ["hello", HELLO.hex(), list(tampers), random.choice(SUITES)]
