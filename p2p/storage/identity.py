"""New names for a new store. Random, so not the cores' business."""

from __future__ import annotations

import secrets

from p2p.ids import ClusterId, DiskId


def new_disk_id() -> DiskId:
    """128 random bits in hexadecimal."""
    return DiskId(secrets.token_hex(16))


def new_cluster_id() -> ClusterId:
    """64 random bits in hexadecimal."""
    return ClusterId(secrets.token_hex(8))
