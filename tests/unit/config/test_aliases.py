"""The historical import paths give the same module objects, whichever name is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

from config.settings import ROOT

PAIRS = [
    ("app.coordination.work_queue", "coordination.work_queue"),
    ("app.coordination.daemon_manager", "coordination.daemon_manager"),
    ("app.coordination", "coordination"),
    ("app.p2p.loops.job_loops", "p2p.loops.job_loops"),
    ("app.config.settings", "config.settings"),
    ("scripts.p2p.loops.job_loops", "p2p.loops.job_loops"),
    ("scripts.p2p", "p2p"),
]


def python(code: str) -> str:
    """What a fresh interpreter prints; a warning is an error."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("alias_first", [True, False], ids=["alias first", "real first"])
def test_alias_is_the_very_module_in_either_order(alias_first: bool) -> None:
    lines = ["import importlib, sys", "before = {}"]
    for alias, real in PAIRS:
        first, second = (alias, real) if alias_first else (real, alias)
        lines += [
            f"a = importlib.import_module({first!r}); b = importlib.import_module({second!r})",
            "assert a is b, (a, b)",
            f"assert sys.modules[{alias!r}] is sys.modules[{real!r}]",
            f"assert (a.__name__, a.__spec__.name) == ({real!r}, {real!r}), (a.__name__, a.__spec__)",
        ]
    assert python("\n".join([*lines, "print('same')"])) == "same"


def test_submodule_is_an_attribute_of_its_alias() -> None:
    code = (
        "import app.coordination.work_queue, scripts.p2p.loops.job_loops\n"
        "import coordination.work_queue, p2p.loops.job_loops\n"
        "assert app.coordination.work_queue is coordination.work_queue\n"
        "assert scripts.p2p.loops.job_loops is p2p.loops.job_loops\n"
        "from app.coordination import work_queue\n"
        "assert work_queue is coordination.work_queue\n"
        "print('same')"
    )
    assert python(code) == "same"


def test_singletons_and_classes_are_shared() -> None:
    code = (
        "from app.coordination.work_queue import get_work_queue as a\n"
        "from coordination.work_queue import get_work_queue as b\n"
        "from app.coordination.errors import Refused as r\n"
        "from coordination.errors import Refused as s\n"
        "assert a() is b() and r is s\n"
        "print('same')"
    )
    assert python(code) == "same"


def test_module_can_be_reloaded_after_its_alias_was_imported() -> None:
    """Reloading reads the module's own spec, which the alias must not have replaced."""
    code = (
        "import importlib, app.coordination.retry as retry\n"
        "assert importlib.reload(retry).__name__ == 'coordination.retry'\n"
        "print(retry.__spec__.origin)"
    )
    assert python(code).endswith("coordination/retry.py")


@pytest.mark.parametrize("name", ["app.coordination.nonesuch", "app.json", "scripts.coordination", "app.p2p.nonesuch"])
def test_what_is_not_there_is_not_found_under_its_alias(name: str) -> None:
    code = (
        f"import importlib\ntry:\n    importlib.import_module({name!r})\nexcept ModuleNotFoundError as e:\n    print(e)"
    )
    assert python(code) == f"No module named {name!r}"
