"""Commands, and the operators' historical import path: ``scripts.p2p.loops…`` is ``p2p.loops…``, the same objects."""

from config.aliases import install

install("scripts", ["p2p"])
