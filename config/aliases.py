"""Two names for one module. Decides nothing; `app` and `scripts` install it for the operators' historical paths.

``app.coordination…`` and ``scripts.p2p.loops…`` must be *the same objects* as ``coordination…`` and ``p2p.loops…``: a
copy would have its own singletons, and a runbook that asks the copy whether the reaper runs would be lied to.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _SameModule(Loader):
    """Loads an alias by importing the real module and answering that very object."""

    def __init__(self, real: str) -> None:
        self._real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._real)
        self._own_spec, self._own_loader = module.__spec__, module.__loader__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just written the alias's spec over the module's own; put it back.
        module.__spec__, module.__loader__ = self._own_spec, self._own_loader


class AliasFinder(MetaPathFinder):
    """Finds ``<prefix>.<name>…`` as ``<name>…`` for the given top-level packages."""

    def __init__(self, prefix: str, packages: Sequence[str]) -> None:
        self._prefix, self._packages = f"{prefix}.", tuple(packages)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(self._prefix):
            return None
        real = fullname[len(self._prefix) :]
        if real.partition(".")[0] not in self._packages or importlib.util.find_spec(real) is None:
            return None
        return ModuleSpec(fullname, _SameModule(real), is_package=True)


def install(prefix: str, packages: Sequence[str]) -> None:
    """Makes ``<prefix>.<package>`` another name of ``<package>``, submodules included; once."""
    if not any(isinstance(f, AliasFinder) and f._prefix == f"{prefix}." for f in sys.meta_path):
        sys.meta_path.insert(0, AliasFinder(prefix, packages))
