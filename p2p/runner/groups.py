"""A memory cgroup for each attempt that has a limit, where this process may make one (cgroup v2).

    <parent>/p2p-<runner>/            made by the runner, holds no process; `memory` is switched on for what is below
        job-<job>.<attempt>/          memory.max, memory.swap.max = 0, memory.oom.group = 1; removed with the attempt

The kernel then holds the limit to the page, for all that the job is and writes to /dev/shm; it takes back cached files
before it kills, and kills all of the job at once.

Where <parent> may be (kernel: Documentation/admin-guide/cgroup-v2.rst; systemd: "Control Group APIs and Delegation").
cgroups that others manage are not touched: the parent is the nearest delegated cgroup above us (systemd marks it, with
``Delegate=yes``), whose processes, which are all of this unit, are moved to a leaf, since a cgroup that hands out
memory must not hold processes itself; or the root of all, if root runs us and no cgroup above us has a limit that jobs
would so escape. Anything else, such as a container whose cgroups are read-only, cannot be used: the reason is told, and
the runner watches instead (``memory.py``).

A process is started in the runner's own cgroup and moved at once; what it touches in the milliseconds before that is
not accounted to its group. Decides: where groups are, what their files say. Does not decide: what follows.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT_FILE = "cgroup.type"  # every cgroup has it but the root of all
MOVE_ROUNDS = 20
_LEAF = "node"
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")
_DELEGATED = ("user.delegate", "trusted.delegate")
_LIMITS = ("memory.max", "memory.high", "memory.swap.max", "cpu.max")


class Unusable(Exception):
    """Why there are no groups here, in words."""


class Kills(NamedTuple):
    """What the kernel's OOM killer did in a group. ``own``: because of the group's own limit."""

    killed: int
    own: bool


class Group:
    """One attempt's. ``holds`` once its processes are in it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.holds = False

    def enter(self, pid: int) -> None:
        """Moves a process and what it has started since. Blocking, 0.1 to 16 ms. Raises ``OSError``."""
        waiting = [pid]
        while waiting:
            one = waiting.pop()
            try:
                _write(self._path / "cgroup.procs", str(one))
            except ProcessLookupError:
                continue  # it has ended, and its children are strays
            waiting += [child for child in _children(one) if not self._has(child)]
        self.holds = True

    def kills(self) -> Kills:
        try:
            text = (self._path / "memory.events").read_text()
        except OSError:
            return Kills(0, False)
        events = {name: int(count) for name, count in (line.split() for line in text.splitlines())}
        # `oom_kill` counts every kind of OOM killer; `oom` only what this group's own limit has caused.
        return Kills(events.get("oom_kill", 0), events.get("oom", 0) > 0)

    def kill(self) -> None:
        """SIGKILL to all that is in it (Linux 5.14)."""
        with contextlib.suppress(OSError):
            _write(self._path / "cgroup.kill", "1")

    def remove(self) -> bool:
        """False: there is still somebody in it."""
        try:
            self._path.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def _has(self, pid: int) -> bool:
        return str(pid) in (self._path / "cgroup.procs").read_text().split()


class Groups:
    """Made by ``find``."""

    def __init__(self, base: Path, log: Callable[[str], None]) -> None:
        self.base, self._log = base, log
        self._thread = ThreadPoolExecutor(1, "groups")
        # An earlier runner's: they go when the last of their processes has gone.
        self._doomed = [Group(entry) for entry in base.iterdir() if entry.is_dir()]

    @classmethod
    def find(cls, directory: Path, log: Callable[[str], None]) -> Groups:
        """For the runner of this directory. Raises ``Unusable``."""
        name = "p2p-" + hashlib.sha256(os.fsencode(directory)).hexdigest()[:12]
        try:
            mount, own = _where()
            return cls(_made(_parent(mount, own), name), log)
        except OSError as error:
            raise Unusable(f"{error.filename or 'cgroup'}: {error.strerror}") from error

    def make(self, job: str, attempt: int, limit_mb: int) -> Group:
        """Raises ``OSError``."""
        name = f"job-{_UNSAFE.sub('_', job)[:80]}.{attempt}"
        if _UNSAFE.search(job) or len(job) > 80:
            name += "-" + hashlib.sha256(job.encode(errors="replace")).hexdigest()[:12]
        path = self.base / name
        path.mkdir(exist_ok=True)
        try:
            _write(path / "memory.max", str(limit_mb << 20))
            _write(path / "memory.oom.group", "1")
            if (path / "memory.swap.max").exists():  # a kernel without swap has none
                _write(path / "memory.swap.max", "0")
        except OSError:
            path.rmdir()
            raise
        return Group(path)

    def enter_soon(self, group: Group, pid: int) -> None:
        """On a thread of its own: the kernel may take its time."""
        self._thread.submit(self._enter, group, pid)

    def remove(self, group: Group) -> None:
        if not group.remove():
            self._doomed.append(group)

    def tidy(self) -> None:
        """Once a second: groups whose last process was still on its way out."""
        if self._doomed:
            self._doomed = [group for group in self._doomed if not group.remove()]

    def close(self) -> None:
        """What this runner leaves: nothing, if nothing runs."""
        self._thread.shutdown()
        self.tidy()
        with contextlib.suppress(OSError):
            self.base.rmdir()

    def _enter(self, group: Group, pid: int) -> None:
        try:
            group.enter(pid)
        except OSError as error:
            self._log(f"pid {pid} cannot be moved to its memory cgroup: {error}; it is watched instead")


def _where() -> tuple[Path, Path]:
    """The root of the cgroups that we see, and ours. Raises ``Unusable``."""
    own = next((line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")), "")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, kind = line.partition(" - ")
        if kind.split()[0] == "cgroup2":
            inside, mount = fields.split()[3:5]
            relative = os.path.relpath(own, inside)  # what is mounted may be a part of the tree
            if own and not relative.startswith(".."):
                return Path(mount), Path(mount, relative)
    raise Unusable("cgroup v2 is not mounted here, or not the part of it that this process is in")


def _parent(mount: Path, own: Path) -> Path:
    """Where groups may be made. Raises ``Unusable``, ``OSError``."""
    if "memory" not in _words(own / "cgroup.controllers") and "memory" not in _words(mount / "cgroup.controllers"):
        raise Unusable("cgroup v2 has no memory controller here (it may belong to cgroup v1)")
    above = [own, *own.parents][: len(own.parts) - len(mount.parts) + 1]
    delegated = next((path for path in above if _is_delegated(path)), None)
    if delegated is not None:
        return delegated
    if (mount / ROOT_FILE).exists():
        raise Unusable("this process is in a cgroup that was not delegated to it (systemd: Delegate=yes)")
    if os.geteuid() != 0:
        raise Unusable(f"the cgroup {own} was not delegated to this user (systemd: Delegate=yes)")
    held = next((path / name for path in above for name in _LIMITS if _is_limit(path / name)), None)
    if held is not None:
        raise Unusable(f"jobs would escape {held}, and nothing below it was delegated (systemd: Delegate=yes)")
    return mount


def _made(parent: Path, name: str) -> Path:
    if not os.access(parent, os.W_OK):
        raise Unusable(f"{parent} may not be written")
    _hand_out_memory(parent)
    base = parent / name
    base.mkdir(exist_ok=True)
    _hand_out_memory(base)
    return base


def _hand_out_memory(path: Path) -> None:
    control = path / "cgroup.subtree_control"
    for _ in range(MOVE_ROUNDS):
        if "memory" in _words(control):
            return
        try:
            _write(control, "+memory")
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            _empty(path)  # while somebody starts processes there, one round is not enough
    raise Unusable(f"{path} holds processes that do not stay in a leaf")


def _empty(path: Path) -> None:
    leaf = path / _LEAF
    leaf.mkdir(exist_ok=True)
    for pid in _words(path / "cgroup.procs"):
        with contextlib.suppress(ProcessLookupError):
            _write(leaf / "cgroup.procs", pid)


def _is_delegated(path: Path) -> bool:
    for name in _DELEGATED:
        with contextlib.suppress(OSError):
            if os.getxattr(path, name) == b"1":
                return True
    return False


def _is_limit(path: Path) -> bool:
    try:
        words = path.read_text().split()
    except OSError:
        return False  # the root has none
    return bool(words) and words[0] != "max"


def _words(path: Path) -> list[str]:
    return path.read_text().split()


def _children(pid: int) -> Iterator[int]:
    """Of all its threads; none where the kernel does not tell."""
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            yield from map(int, (task / "children").read_text().split())
    except OSError:
        return


def _write(path: Path, text: str) -> None:
    """In one call, as the kernel wants it."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(fd)
