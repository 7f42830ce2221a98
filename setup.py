"""Metadata is in pyproject.toml; what only code can say is here."""

from setuptools import find_packages, setup

setup(
    # twisted.plugins is Twisted's own namespace: a folder without __init__.py,
    # into which every project puts its plugin files.
    packages=[*find_packages(include=["vmconsole", "vmconsole.*"]), "twisted.plugins"],
)
