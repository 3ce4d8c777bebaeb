"""The least limit on the way from our own group to the root, under both versions of cgroups."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2p.cgroups import Limits, limits

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw"
V1_CPU = "31 23 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "32 23 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
NO_LIMIT = str(9_223_372_036_854_771_712)  # as cgroup v1 writes it


def machine(root: Path, cgroup: str, mounts: list[str], files: dict[str, str]) -> Path:
    proc = root / "proc/self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(cgroup)
    (proc / "mountinfo").write_text("\n".join(mounts) + "\n")
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


CASES: dict[str, tuple[str, list[str], dict[str, str], Limits]] = {
    "v2, own group": (
        "0::/jobs/p2p\n", [V2], {"jobs/p2p/cpu.max": "150000 100000", "jobs/p2p/memory.max": "1073741824"},
        Limits(1.5, 1 << 30),
    ),
    "v2, a parent is the tighter": (
        "0::/pod/p2p\n", [V2],
        {"pod/p2p/cpu.max": "max 100000", "pod/cpu.max": "200000 100000", "pod/p2p/memory.max": "4096000000",
         "pod/memory.max": "2048000000"},
        Limits(2.0, 2_048_000_000),
    ),
    "v2, the root of a container": ("0::/\n", [V2], {"cpu.max": "50000 100000"}, Limits(0.5, None)),
    "v2, no limits": ("0::/user.slice\n", [V2], {"user.slice/memory.max": "max"}, Limits()),
    "v1": (
        "5:memory:/jobs\n4:cpu,cpuacct:/jobs/p2p\n", [V1_CPU, V1_MEMORY],
        {"cpu,cpuacct/jobs/p2p/cpu.cfs_quota_us": "-1", "cpu,cpuacct/jobs/p2p/cpu.cfs_period_us": "100000",
         "cpu,cpuacct/jobs/cpu.cfs_quota_us": "300000", "cpu,cpuacct/jobs/cpu.cfs_period_us": "100000",
         "memory/jobs/memory.limit_in_bytes": "512000000", "memory/memory.limit_in_bytes": NO_LIMIT},
        Limits(3.0, 512_000_000),
    ),
    "v1 in a container: the group is the host's, the mount shows the container's": (
        "4:cpu,cpuacct:/docker/abc\n", [V1_CPU.replace(" / /sys", " /docker/abc /sys")],
        {"cpu,cpuacct/cpu.cfs_quota_us": "25000", "cpu,cpuacct/cpu.cfs_period_us": "50000"},
        Limits(0.5, None),
    ),
    "both at once": (
        "4:memory:/a\n0::/b\n", [V1_MEMORY, V2.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified ")],
        {"memory/a/memory.limit_in_bytes": "700000000", "unified/b/cpu.max": "100000 100000"},
        Limits(1.0, 700_000_000),
    ),
    "the group is not to be seen here": ("0::/../elsewhere\n", [V2], {"cpu.max": "400000 100000"}, Limits(4.0, None)),
    "nonsense in the files": ("0::/a\n", [V2], {"a/cpu.max": "?", "a/memory.max": ""}, Limits()),
}  # fmt: skip


@pytest.mark.parametrize(("cgroup", "mounts", "files", "expected"), CASES.values(), ids=CASES)
def test_limits(tmp_path: Path, cgroup: str, mounts: list[str], files: dict[str, str], expected: Limits) -> None:
    assert limits(machine(tmp_path, cgroup, mounts, files)) == expected


def test_a_machine_without_cgroups_has_no_limits(tmp_path: Path) -> None:
    assert limits(tmp_path) == Limits()


def test_this_machine_can_be_asked() -> None:
    found = limits()
    assert found.cpus is None or found.cpus > 0
    assert found.memory_bytes is None or found.memory_bytes > 0
