"""An ssh proxy to the serial consoles of virtual machines."""

__version__ = "0.1.0"
