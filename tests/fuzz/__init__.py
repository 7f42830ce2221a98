"""Fuzzing of the ssh server, before and after the login, over the wire.

``python -m tests.fuzz`` runs it; docs/fuzzing.md tells how. A *program* is a list of *steps*, each
a JSON value, so that a program can be kept, shrunk and played again:

- ``["hello", VERSION, TAMPERS, SUITE]``: the whole handshake, by a client that goes by the book but
  for what TAMPERS do to its packets; ``["stranger", VERSION]``: the version line alone.
- ``["proxied", HEX, CUTS, HOLD, FIRST]``: behind a balancer, that sends these bytes cut at CUTS,
  and then one of the two above; with HOLD the last piece arrives together with what that says.
  Crowds (``crowd.py``), lives (``lives.py``) and texts (``texts.py``) have steps of their own.
- ``["send", FIELDS, EDITS, LATER]``: a packet of these fields, edited, encrypted as it should be.
  With LATER it waits for the next step, and arrives in one piece with that.
- ``["wire", FIELDS, EDITS]``: the same, but it is the encrypted bytes that are edited.
- ``["raw", HEX]``: bytes; ``["plain", LENGTH, PADDING, HEX]``: a packet in the clear with this
  length and this padding length in its head.
- ``["rekey"]``: the client starts a key exchange; ``["deaf", YES]``: it does not read, or does
  again, as the server's TCP connection tells it.
- ``["lazy", YES]``: it answers neither CLOSE nor keepalives, or does again.
- ``["sleep", SECONDS]``, ``["guest", HEX]``: time passes; the guest prints; ``["gone"]``: it ends.
- ``["repeat", COUNT, STEPS]``.

Fields are ``["b", HEX]`` bytes, ``["s", HEX]`` a string, ``["c", N]`` a byte, ``["u", N]`` four,
``["chan", N]`` the server's number of the Nth channel that is open, ``["new"]`` a number for a new
one, ``["hostkey", N]`` the server's Nth host key, or none of its, ``["key", NAME]`` a public key,
``["cert", NAME, HOW]`` a certificate for it (``authority.py``), ``["sig", NAME, ALGORITHM, HOW]`` a
signature of all that is before it. A packet for a channel is not sent when none is open. Edits are
``["flip", AT, XOR]``, ``["cut", AT]``, ``["add", HEX]``, ``["put", AT, HEX]``,
``["drop", AT, COUNT]``.
"""
