"""The operators' historical import path: ``app.coordination…`` is ``coordination…``, the same module objects."""

from config.aliases import install

__path__: list[str] = []  # makes this module a package to the import system
install("app", ["coordination", "p2p", "config"])
