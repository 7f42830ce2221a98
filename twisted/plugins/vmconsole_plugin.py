"""Makes ``vmconsole`` known to ``twistd``."""

from twisted.application.service import ServiceMaker

vmconsole = ServiceMaker(
    "vmconsole",
    "vmconsole.tap",
    "An ssh proxy to the serial consoles of virtual machines",
    "vmconsole",
)
