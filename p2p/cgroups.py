"""How much CPU and memory the cgroups of this process leave it, for both versions of cgroups and both at once.

A limit holds for everything below it, so the least one on the way from our own group up to the root counts: a quota is
as often set on a parent (a pod, a slice) as on the group itself. Decides nothing else; reads four kinds of files.

Sources: Linux `Documentation/admin-guide/cgroup-v2.rst` and `cgroup-v1/`, man 7 cgroups. In a container the group named
in ``/proc/self/cgroup`` may be the host's, while the mount shows only what is below the container's own: the mount's
root (`/proc/self/mountinfo`, man 5 proc) says what to cut off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

T = TypeVar("T")
UNLIMITED_BYTES = 1 << 60  # cgroup v1 says "no limit" as the largest page-aligned number
CPU, MEMORY = "cpu", "memory"


class Limits(NamedTuple):
    """None: no limit. CPUs are cores' worth of time."""

    cpus: float | None = None
    memory_bytes: int | None = None


class _Mount(NamedTuple):
    version: int
    controllers: frozenset[str]
    root: str  # the group that the mount point shows
    point: Path


def limits(root: Path = Path("/")) -> Limits:
    """Of this process. `root` is where a test keeps its own ``/proc`` and ``/sys``."""
    mounts = list(_mounts(root))
    cpus: list[float] = []
    memory: list[int] = []
    for version, controllers, group in _groups(root):
        for mount in mounts:
            if mount.version != version or (version == 1 and not controllers & mount.controllers):
                continue
            for folder in _upwards(mount, group):
                cpus += _each(folder, _cpus_v2 if version == 2 else _cpus_v1)
                memory += _each(folder, _memory_v2 if version == 2 else _memory_v1)
    return Limits(min(cpus, default=None), min(memory, default=None))


def _groups(root: Path) -> Iterator[tuple[int, frozenset[str], str]]:
    """Lines of ``/proc/self/cgroup``: hierarchy, controllers, group. Hierarchy 0 is version 2."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, names, group = line.split(":", 2)
            yield (2 if number == "0" else 1), frozenset(names.split(",")), group


def _mounts(root: Path) -> Iterator[_Mount]:
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            kind, options = after.split()[0], after.split()[-1]
            if kind in ("cgroup", "cgroup2"):
                shown, point = before.split()[3:5]
                controllers = frozenset(options.split(",")) & {CPU, MEMORY}
                yield _Mount(2 if kind == "cgroup2" else 1, controllers, shown, root / point.lstrip("/"))


def _upwards(mount: _Mount, group: str) -> Iterator[Path]:
    """The folders of a group and of all above it, as far as they can be seen here."""
    inside = PurePosixPath(group)
    if mount.root != "/":
        inside = PurePosixPath("/") / (
            inside.relative_to(mount.root) if inside.is_relative_to(mount.root) else PurePosixPath()
        )
    for part in (inside, *inside.parents):
        folder = mount.point / str(part).lstrip("/")
        if folder.is_dir():
            yield folder


def _each(folder: Path, read: Callable[[Path], T | None]) -> list[T]:
    try:
        found = read(folder)
    except (OSError, ValueError):
        return []  # this controller is not enabled here, so it has no limit to honour
    return [] if found is None else [found]


def _cpus_v2(folder: Path) -> float | None:
    quota, period = (folder / "cpu.max").read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def _cpus_v1(folder: Path) -> float | None:
    quota = int((folder / "cpu.cfs_quota_us").read_text())
    return None if quota <= 0 else quota / int((folder / "cpu.cfs_period_us").read_text())


def _memory_v2(folder: Path) -> int | None:
    text = (folder / "memory.max").read_text().strip()
    return None if text == "max" else int(text)


def _memory_v1(folder: Path) -> int | None:
    limit = int((folder / "memory.limit_in_bytes").read_text())
    return None if limit >= UNLIMITED_BYTES else limit
