"""Measures vmconsole beside the alternative, an OpenSSH sshd that execs virsh: ``bin/bench``.

A row is a module in ``bench.rows`` and an entry in its registry; see docs/bench.md.
"""
