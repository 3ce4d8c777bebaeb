"""New names for a new store, which are random and so not the cores' business; and where a store's file lies, by which
a store is told from a copy of it (PROTOCOL §2.10)."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import NamedTuple

from p2p.ids import ClusterId, DiskId

MACHINE_ID = Path("/etc/machine-id")
_ANONYMOUS = "0:"  # major number of what has no block device: NFS, btrfs, ZFS, overlays. Another one after each mount


class Place(NamedTuple):
    """Where a file lies. Text, because an inode number may not fit into SQLite's integers."""

    machine: str  # empty if this machine has no id
    device: str  # "major:minor"
    inode: str

    def is_copy_of(self, made: Place) -> bool:
        """A file put in this place is not the one made in that place."""
        if self.inode != made.inode:
            return True
        comparable = not (self.device.startswith(_ANONYMOUS) or made.device.startswith(_ANONYMOUS))
        return comparable and self.device != made.device

    def on_another_machine(self, made: Place) -> bool:
        return bool(self.machine and made.machine) and self.machine != made.machine


def place_of(path: Path) -> Place:
    """Where the file at `path` lies now."""
    try:
        machine = MACHINE_ID.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        machine = ""
    found = path.stat()
    return Place(machine, f"{os.major(found.st_dev)}:{os.minor(found.st_dev)}", str(found.st_ino))


def new_disk_id() -> DiskId:
    """128 random bits in hexadecimal."""
    return DiskId(secrets.token_hex(16))


def new_cluster_id() -> ClusterId:
    """64 random bits in hexadecimal."""
    return ClusterId(secrets.token_hex(8))
